# PostgreSQL with its data and its log on two volumes, under load and checkpoints: copies of the snapshots of one group
# start, recover and pass pg_amcheck. So does a server on clones of them.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_load.sh"

bin=$(echo /usr/lib/postgresql/*/bin | awk '{print $NF}')
tidemark attach "$(disk 0)" --name data
tidemark attach "$(disk 1)" --name wal
make_filesystem ext4 /dev/mapper/data /mnt/data
make_filesystem ext4 /dev/mapper/wal /mnt/wal
make_filesystem ext4 "$(disk 2)" /mnt/scratch
install -d -o postgres -g postgres -m 0700 /mnt/data/pg /mnt/wal/pg
install -d -o postgres -g postgres /run/pg

export PGHOST=/run/pg
server() { # server ACTION
    as_postgres "$bin/pg_ctl" -D /mnt/data/pg -w -t 300 -l /run/pg/log \
        -o "-c listen_addresses='' -c unix_socket_directories=/run/pg -c shared_buffers=1MB -c max_wal_size=64MB" "$1"
}
check_server() { # WHAT: the server on what is mounted at /mnt/data and /mnt/wal
    rm -f /mnt/data/pg/postmaster.pid
    : >/run/pg/log
    server start || { cat /run/pg/log; fail "$1: the server does not start"; }
    grep -q 'redo starts' /run/pg/log || fail "$1: no recovery was needed: it was not taken under load"
    as_postgres "$bin/pg_amcheck" --heapallindexed bench || fail "$1: pg_amcheck"
    # pgbench's invariant: every transaction adds the same to all three tables.
    sums=$(as_postgres psql -Atc \
        'select (select sum(abalance) from pgbench_accounts) - (select sum(bbalance) from pgbench_branches),
                (select sum(tbalance) from pgbench_tellers) - (select sum(bbalance) from pgbench_branches)' bench)
    assert_same "$1: balances" "$sums" "0|0"
    if grep -E 'PANIC|invalid page|could not' /run/pg/log; then fail "$1: the server complained"; fi
    server stop
    # The server's process ends a little after it says so.
    wait_until 20 umount /mnt/data
    umount /mnt/wal
}

as_postgres "$bin/initdb" -D /mnt/data/pg --waldir=/mnt/wal/pg -A trust -N --data-checksums >/run/initdb.log
server start
as_postgres createdb bench
as_postgres "$bin/pgbench" -i -s 2 -q bench 2>/run/pgbench-init.log
as_postgres psql -qc 'create extension amcheck' bench
as_postgres "$bin/pgbench" -T 600 -c 4 -j 2 bench >/run/pgbench.log 2>&1 &
load=$!
# Each checkpoint ties the data to the log: the control file, with the data, names a place in the log.
(while [ ! -e /run/stop ]; do as_postgres psql -qc checkpoint bench; sleep 0.2; done) &
checkpoints=$!
for name in first second; do
    sleep 3
    tidemark snapshot create data wal --name $name --store /mnt/scratch --store-size 128MiB --freeze-budget 10s
done
sleep 1
kill -0 "$load" || { cat /run/pgbench.log; fail "pgbench has ended"; }
# Not SIGINT: bash makes background jobs ignore it.
kill -TERM "$load"
wait "$load" || true
touch /run/stop
wait "$checkpoints" || fail "a checkpoint failed"
if grep -iE 'error|fatal|aborted|[1-9][0-9]* failed' /run/pgbench.log; then fail "pgbench saw an error"; fi
server stop
wait_until 20 umount /mnt/data
umount /mnt/wal

note "copies of the second"
for volume in data wal; do tidemark copy $volume@second /mnt/scratch/$volume.raw; done
mount /mnt/scratch/data.raw /mnt/data
mount /mnt/scratch/wal.raw /mnt/wal
check_server "copies"
rm /mnt/scratch/*.raw

note "clones of the first"
for volume in data wal; do
    tidemark snapshot clone $volume@first --name test --store /mnt/scratch --store-size 64MiB
    tidemark snapshot mount $volume@test /mnt/$volume
done
check_server "clones"
for volume in data wal; do tidemark snapshot delete $volume@test $volume@first $volume@second --yes; done
assert_no_tidemark_left data wal
