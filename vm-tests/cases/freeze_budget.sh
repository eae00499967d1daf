# Safety promise 4 on a slow disk. A freeze cannot be stopped in the kernel: one that does not fit the budget is refused
# in advance, with the figure. A suspension can be stopped: it ends at the budget. No message says that the origin is
# usable before it is.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_load.sh"
. "$REPO/vm-tests/cases/lib_slow.sh"

make_slow "$(disk 0)"
make_filesystem ext4 "$(disk 1)" /mnt/scratch
tidemark attach /dev/mapper/tidetest-slow --name data
origin=/dev/mapper/data
make_filesystem ext4 "$origin" /mnt/origin
head -c 8m /dev/urandom >/mnt/origin/some
sync
table_before=$(dmsetup table data)

# copied STATUS OPTION...
copied() {
    local want=$1 got=0
    shift
    rm -f /mnt/scratch/copy.raw
    tidemark copy "$origin" /mnt/scratch/copy.raw --yes --json --store /mnt/scratch "$@" >/run/copy.out 2>/run/copy.err || got=$?
    note "copy $*: exit status $got: $(grep -oE '"message":"[^"]*"' /run/copy.err || true)"
    [ "$got" = "$want" ] || fail "exit status $got, not $want: $(tail -n 2 /run/copy.out) $(cat /run/copy.err)"
    assert_same "the table" "$(dmsetup table data)" "$table_before"
    assert_same "suspended devices" "$(suspended_devices)" ""
    assert_no_tidemark_left data
}
frozen_ms() { grep '"result"' /run/copy.out | grep -oE '"frozen_ms":[0-9]+' | cut -d: -f2; }
appends() { (while [ -e /run/appends ]; do head -c 20000 /dev/urandom >>/mnt/origin/log; mv -f /mnt/origin/log /mnt/origin/log.1; cp /mnt/origin/log.1 /mnt/origin/log; sleep 0.1; done) & APPENDS=$!; }

note "a freeze that does not fit is refused, with the time that it would take"
touch /run/appends
appends
slow 300 300
sleep 1
before=$(dmesg | grep -c 'tidemark watchdog' || true)
copied 3 --freeze-budget 500ms
assert_same "what the watchdog said" "$(dmesg | grep -c 'tidemark watchdog' || true)" "$before"
expected=$(grep -oE 'would hold writers for up to [0-9.]+ s' /run/copy.err | sed -n '1s/[^0-9.]//gp')
[ -n "$expected" ] || fail "the refusal says no time: $(cat /run/copy.err)"
copied 0 --freeze-budget 120s
took=$(frozen_ms)
note "expected: at most $expected s; frozen for $took ms"
[ "$took" -le "$(echo "$expected" | awk '{ print int($1 * 1000) }')" ] || fail "the freeze took longer than expected"
rm /run/appends
wait "$APPENDS"

note "the disk becomes slow after the last check: the freeze cannot be stopped, and no message says that it was"
slow 0 0
sync
rm -f /mnt/scratch/copy.raw
TIDEMARK_STALL_AT=insert.freeze.before:2 tidemark copy "$origin" /mnt/scratch/copy.raw --yes --json --store /mnt/scratch \
    --freeze-budget 3s >/run/copy.out 2>/run/copy.err &
process=$!
wait_until 20 dmsetup info "data#real" >/dev/null
sleep 1
head -c 40000 /dev/urandom >/mnt/origin/late
slow 600 600
start=${EPOCHREALTIME/./}
status=0
wait "$process" || status=$?
took=$(((${EPOCHREALTIME/./} - start) / 1000))
note "exit status $status after $took ms: $(cat /run/copy.err)"
dmesg | grep 'tidemark watchdog' | tail -n 2
assert_same "the exit status" "$status" 1
grep -q 'freeze budget' /run/copy.err || fail "no message says that the budget ran out"
grep -q 'could not be stopped' /run/copy.err || fail "no message says that the kernel could not be stopped"
# It reports a thaw when that has happened, not when it begins: not before the freeze was over.
frozen=$(sed -n 's/.*freezing the filesystems took \([0-9.]*\)s.*/\1/p' /run/copy.err)
thawed=$(dmesg | sed -n 's/.*tidemark watchdog.*thawed after \([0-9]*\) ms.*/\1/p' | tail -n 1)
awk -v frozen="${frozen:?}" -v thawed="${thawed:-$took}" 'BEGIN { exit !(thawed >= frozen * 1000 - 100) }' ||
    fail "the watchdog reports a thaw after $thawed ms, but the freeze took $frozen s"
assert_same "the table" "$(dmsetup table data)" "$table_before"
timeout 30 touch /mnt/origin/probe || fail "the filesystem stays frozen"
slow 0 0
assert_no_tidemark_left data

note "a suspension that waits for slow writes ends at the budget, so fast reads are held no longer than that"
umount /mnt/origin
slow 2500 2500
writes() { dd if=/dev/zero of="$origin" bs=4k count=1 seek=20000 oflag=direct conv=notrunc status=none; }
reads() { dd if="$origin" of=/dev/null bs=4k count=1 skip=9000 iflag=direct status=none; }
(while [ ! -e /run/no-writes ]; do writes; done) &
writer=$!
measure reads
copied 1 --freeze-budget 500ms
measured
note "the slowest read: $WORST ms"
[ "$WORST" -lt 1800 ] || fail "a read took $WORST ms at a budget of 500 ms"
grep -q 'freeze budget' /run/copy.err || fail "no message says that the budget ran out"

note "slow only once the copy runs: the table is put back, after one or more attempts that took too long"
slow 0 0
rm -f /mnt/scratch/copy.raw
tidemark copy "$origin" /mnt/scratch/copy.raw --yes --json --store /mnt/scratch --rate 24MiB --region 96MiB \
    --freeze-budget 500ms >/run/copy.out 2>/run/copy.err &
process=$!
wait_until 20 is_preserved "$origin"
slow 2000 2000
status=0
wait "$process" || status=$?
touch /run/no-writes
wait "$writer"
slow 0 0
assert_same "the exit status: $(cat /run/copy.err)" "$status" 0
assert_same "the table" "$(dmsetup table data)" "$table_before"
assert_no_tidemark_left data
tidemark detach data
dmsetup remove --noudevsync tidetest-slow
