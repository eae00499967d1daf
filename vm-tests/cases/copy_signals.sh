# Every catchable signal makes the copy put everything back. USR1 prints the progress. A file size limit is an error.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_load.sh"

make_filesystem ext4 "$(disk 1)" /mnt/scratch
tidemark attach "$(disk 0)" --name data
origin=/dev/mapper/data
make_filesystem ext4 "$origin" /mnt/origin
head -c 24m /dev/urandom >/mnt/origin/some
sync
table_before=$(dmsetup table data)

begin() { # OPTION...
    rm -f /mnt/scratch/copy.raw
    env --default-signal=INT,QUIT tidemark copy "$origin" /mnt/scratch/copy.raw --yes --store /mnt/scratch --rate 8MiB "$@" >/run/copy.out 2>/run/copy.err &
    process=$!
    wait_until 20 is_preserved "$origin"
}
ended() { # STATUS
    local got=0
    wait "$process" || got=$?
    [ "$got" = "$1" ] || fail "exit status $got, not $1: $(cat /run/copy.err)"
    assert_same "the table" "$(dmsetup table data)" "$table_before"
    assert_no_tidemark_left data
    [ -z "$(find /mnt/scratch -name '*partial*')" ] || fail "a partial file is left"
}

for signal in INT TERM HUP QUIT ALRM USR2 XCPU PROF VTALRM PWR IO RTMIN RTMAX; do
    begin
    kill -"$signal" "$process"
    note "$signal"
    ended 130
done


note "USR1 prints the progress, and the copy continues"
begin
for _ in 1 2 3; do sleep 0.3; kill -USR1 "$process"; done
ended 0
count=$(grep -c '^copying: .*%' /run/copy.err || true)
[ "$count" -ge 3 ] || fail "USR1 does not print the progress: $(cat /run/copy.err)"
begin --json
sleep 0.3
kill -USR1 "$process"
ended 0
note "USR1 while the origin is suspended: no wait is cut short"
tidemark copy "$origin" /mnt/scratch/copy.raw --yes --store /mnt/scratch --freeze-budget 20s \
    --hook-frozen 'for i in 1 2 3 4 5; do kill -USR1 $PPID; sleep 0.1; done' >/run/copy.out 2>/run/copy.err || fail "USR1 at the instant: $(cat /run/copy.err)"

note "file size limit of 4 MiB: an error, and everything is put back"
for limit in 4096 16384; do
    got=0
    rm -f /mnt/scratch/copy.raw
    (ulimit -f "$limit"; exec "$TIDEMARK" copy "$origin" /mnt/scratch/copy.raw --yes --store-ram 8MiB --store /mnt/scratch) >/run/copy.out 2>/run/copy.err || got=$?
    note "exit status $got: $(cat /run/copy.err)"
    [ "$got" = 1 ] || fail "exit status $got where files are limited to $limit KiB"
    grep -qi 'too large' /run/copy.err || fail "the error does not say why"
    assert_same "the table" "$(dmsetup table data)" "$table_before"
    assert_no_tidemark_left data
done
umount /mnt/origin
tidemark detach data
