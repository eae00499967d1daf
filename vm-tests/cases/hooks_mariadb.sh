# hooks/mariadb around the instant of a busy server: the copy starts, and no table needs a repair. Without the hook, the
# tables without transactions do.
# shellcheck shell=bash

origin=/dev/mapper/data
tidemark attach "$(disk 0)" --name data
for device in $origin "$(disk 1)"; do mkfs.ext4 -q "$device"; done
mkdir -p /mnt/data /mnt/copy
mount $origin /mnt/data

# The user-mode kernel has no asynchronous I/O, and little address space to reserve.
small=(--innodb-log-file-size=8M --innodb-buffer-pool-size=16M --innodb-use-native-aio=OFF
    --loose-innodb-buffer-pool-size-max=64M)
server() { # DIRECTORY
    mkdir -p "/run/mariadb$1"
    mariadbd --no-defaults --user=root --skip-networking --datadir="$1/db" --socket="/run/mariadb$1/socket" \
        --tmpdir="/run/mariadb$1" --pid-file="/run/mariadb$1/pid" "${small[@]}" \
        --innodb-flush-log-at-trx-commit=1 --myisam-recover-options=OFF --aria-recover-options=OFF \
        >"/run/mariadb$1/log" 2>&1 &
    wait_until 60 query "$1" 'select 1' >/dev/null 2>&1
}
query() { # DIRECTORY STATEMENTS
    mariadb --no-defaults --batch --skip-column-names --user=root --socket="/run/mariadb$1/socket" -e "$2"
}
mariadb-install-db --no-defaults --user=root --auth-root-authentication-method=normal --skip-test-db \
    "${small[@]}" --datadir=/mnt/data/db --tmpdir=/run >/run/install 2>&1 || { cat /run/install; fail "install"; }
server /mnt/data
query /mnt/data 'create database d; use d; create table i (n int primary key auto_increment, t text) engine=innodb;
    create table m (n int primary key auto_increment, t text, key (t(20))) engine=myisam;
    create table a (n int primary key auto_increment, t text, key (t(20))) engine=aria transactional=0'
printf '[client]\nuser=root\nsocket=/run/mariadb/mnt/data/socket\n' >/run/client.cnf

# Each round writes the same number to all three, one after the other: a row of i is there before that of m and a.
while :; do
    echo "insert into i (t) values (repeat(md5(rand()), 20)); insert into m (t) select t from i order by n desc limit 1;
        insert into a (t) select t from i order by n desc limit 1;"
done | mariadb --defaults-file=/run/client.cnf d &
load=$!

# take [OPTION...]: copies the volume, starts a server on the copy, and prints what it says of its tables.
take() {
    tidemark copy $origin "$(disk 1)" --yes --store /run "$@" 2>/run/copy.err || fail "the copy failed"
    ! grep -q 'hook' /run/copy.err || fail "the copy complains about the hook"
    mount "$(disk 1)" /mnt/copy
    server /mnt/copy
    query /mnt/copy 'check table d.i, d.m, d.a' >/run/checked
    query /mnt/copy 'select (select count(*) from d.i) - (select count(*) from d.a)' >/run/ahead 2>&1 || true
    query /mnt/copy shutdown
    wait %%
    umount /mnt/copy
    cat /run/checked
}

sleep 2
note "without the hook"
take
grep -q 'd\.a.*\(warning\|error\)' /run/checked || fail "no table is in doubt: this proves nothing"

note "with the hook, twice"
hook="$REPO/hooks/mariadb"
for _ in 1 2; do
    rows=$(query /mnt/data 'select count(*) from d.i')
    take --hook-before "$hook before --defaults /run/client.cnf" --hook-after "$hook after --defaults /run/client.cnf"
    assert_same "tables that are whole" "$(grep -c 'status.*OK' /run/checked)" 3
    ! grep -q 'warning\|error' /run/checked || fail "a table is not whole"
    # A round is one statement each: at most one is under way.
    [ "$(cat /run/ahead)" -le 1 ] || fail "rows are missing: $(cat /run/ahead)"
    wait_until 30 test "$(query /mnt/data 'select count(*) from d.i')" -gt "$rows"
done
kill "$load" || true
query /mnt/data shutdown
wait
umount /mnt/data
tidemark detach data
assert_no_tidemark_left
