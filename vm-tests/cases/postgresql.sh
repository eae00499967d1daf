# A real application: PostgreSQL with pgbench on the volume. A server on the copy starts, recovers and passes
# pg_amcheck; the live server sees no error.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_load.sh"

bin=$(echo /usr/lib/postgresql/*/bin | awk '{print $NF}')
tidemark attach "$(disk 0)" --name data
make_filesystem ext4 /dev/mapper/data /mnt/pg
make_filesystem ext4 "$(disk 2)" /mnt/scratch
install -d -o postgres -g postgres -m 0700 /mnt/pg/data
install -d -o postgres -g postgres /run/pg /run/pg2

export PGHOST=/run/pg
server() { # server ACTION DATADIR SOCKETDIR PORT
    as_postgres "$bin/pg_ctl" -D "$2" -w -t 300 -l "$3/log" \
        -o "-c listen_addresses='' -c unix_socket_directories=$3 -p $4 -c shared_buffers=32MB -c max_wal_size=128MB" "$1"
}

as_postgres "$bin/initdb" -D /mnt/pg/data -A trust -N --data-checksums >/run/initdb.log
server start /mnt/pg/data /run/pg 5432
as_postgres createdb bench
as_postgres "$bin/pgbench" -i -s 3 -q bench 2>/run/pgbench-init.log
as_postgres psql -qc 'create extension amcheck' bench
as_postgres "$bin/pgbench" -T 600 -c 4 -j 2 -P 5 bench >/run/pgbench.log 2>&1 &
load=$!
sleep 5
raw_disk=$(disk 1)
tidemark copy /dev/mapper/data "$raw_disk" --yes --store /mnt/scratch --rate 16MiB --verify
kill -0 "$load" || { cat /run/pgbench.log; fail "pgbench ended during the copy"; }
# Not SIGINT: bash makes background jobs ignore it.
kill -TERM "$load"
wait "$load" || true
if grep -iE 'error|fatal|aborted|[1-9][0-9]* failed' /run/pgbench.log; then fail "pgbench saw an error"; fi
if grep -E 'ERROR|FATAL|PANIC' /run/pg/log; then fail "the live server saw an error"; fi
server stop /mnt/pg/data /run/pg 5432
umount /mnt/pg
assert_no_tidemark_left data

mkdir -p /mnt/copy
mount "$raw_disk" /mnt/copy
rm -f /mnt/copy/data/postmaster.pid
server start /mnt/copy/data /run/pg2 5433
grep -q 'redo starts' /run/pg2/log || fail "the copy needed no recovery: it was not taken under load"
as_postgres "$bin/pg_amcheck" -h /run/pg2 -p 5433 --heapallindexed bench
# pgbench's invariant: every transaction adds the same delta to all three tables.
sums=$(as_postgres psql -h /run/pg2 -p 5433 -Atc \
    'select (select sum(abalance) from pgbench_accounts) - (select sum(bbalance) from pgbench_branches),
            (select sum(tbalance) from pgbench_tellers) - (select sum(bbalance) from pgbench_branches)' bench)
[ "$sums" = "0|0" ] || fail "the copy's balances do not add up: $sums"
if grep -E 'PANIC|invalid page|could not' /run/pg2/log; then fail "the copy's server complained"; fi
server stop /mnt/copy/data /run/pg2 5433
umount /mnt/copy
