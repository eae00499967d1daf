# Stacks under two origins at one instant: if a write to the second origin depends on one to the first, the snapshots
# never hold the second without the first. A group is inserted as a whole or not at all: after a kill at any step, a
# member that cannot be frozen, or a hook that exceeds the budget, both origins have their own tables and neither is
# held.
. "$REPO/vm-tests/cases/lib_stack.sh"

make_origin
wal_disk=$(disk 2)
dmsetup create wal --table "0 $(blockdev --getsz "$wal_disk") linear $wal_disk 0"
settle
WAL=$(dm_node wal)
WAL_TABLE_BEFORE=$(dmsetup table wal)
WAL_COW=$(stat -L -c '%Hr:%Lr' "$(disk 3)")
fresh_stores() {
    fresh_store
    dd if=/dev/zero of="$(disk 3)" bs=1M count=1 oflag=direct status=none
}
fresh_stores
assert_group_as_before() {
    assert_as_before
    assert_same "the table of wal" "$(dmsetup table wal)" "$WAL_TABLE_BEFORE"
}

# Writes N to the last block of the log, then to that of the data. Each write is durable before the next one begins.
cat >/run/writer.py <<'PYTHON'
import mmap, os, sys
log, data = (os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_DSYNC) for path in sys.argv[1:3])
at = [os.lseek(fd, 0, os.SEEK_END) - 4096 for fd in (log, data)]
block = mmap.mmap(-1, 4096)
number = 0
while True:
    number += 1
    block[:20] = b"%020d" % number
    for fd, offset in zip((log, data), at):
        os.pwrite(fd, block, offset)
PYTHON
number_on() { # DEVICE
    local blocks
    blocks=$(($(blockdev --getsize64 "$1") / 4096))
    dd if="$1" bs=4096 skip=$((blocks - 1)) count=1 iflag=direct status=none | head -c 20 | sed 's/^0*\(.\)/\1/'
}

# Without a filesystem, the suspension alone determines the instant.
umount /mnt/data
python3 /run/writer.py "$WAL" "$ORIGIN" &
writer=$!
insert_group() { # BUDGET_MS HOOK [MOUNT-POINT...]
    rm -f "$REPORT" /run/hold
    mkfifo /run/hold
    "$TIDEMARK" __stack "$REPORT" data,wal "$COW,$WAL_COW" "$@" </run/hold &
    HOLDER=$!
    exec 9>/run/hold
    wait_until 30 test -s "$REPORT"
}
highest=0
for round in $(seq 12); do
    insert_group 20000 true
    grep -q '^in place' "$REPORT" || fail "not in place: $(cat "$REPORT")"
    log=$(number_on "$(dm_node wal#snap)") data=$(number_on "$(dm_node data#snap)")
    [ "$data" -le "$log" ] && [ "$log" -le $((data + 1)) ] ||
        fail "round $round: the log is at $log, the data at $data: not one instant"
    [ "$data" -gt "$highest" ] || fail "round $round: the writer does not advance"
    highest=$data
    remove_stack
    [ "$(grep -c 'status Active' "$REPORT")" = 2 ] || fail "$(cat "$REPORT")"
    assert_group_as_before
    fresh_stores
done
kill -0 "$writer" || fail "the writer saw an error"
kill "$writer"
wait "$writer" || true
note "12 instants, the last at $highest"

mkfs.ext4 -q -F "$ORIGIN"
mkfs.ext4 -q "$WAL"
mount "$ORIGIN" /mnt/data
mkdir -p /mnt/wal
mount "$WAL" /mnt/wal
writes_within_seconds() { # SECONDS MOUNT-POINT
    timeout "$1" dd if=/dev/zero of="$2/probe" bs=4k count=1 conv=fsync status=none
}
both_answer() { # WHAT
    writes_within_seconds 20 /mnt/data || fail "$1: data does not answer"
    writes_within_seconds 20 /mnt/wal || fail "$1: wal does not answer"
}

# The points of the second origin, and those that happen once for both. stack_crash covers those of the first origin.
"$TIDEMARK" __stack /run/points points 2 </dev/null
grep -e '-2\.' -e guard -e freeze -e 'insert\.switch' -e instant -e thaw /run/points >/run/group-points
[ "$(wc -l </run/group-points)" -ge 40 ] || fail "only $(wc -l </run/group-points) crash points"
crashes=0
while read -r point; do
    rm -f "$REPORT"
    status=0
    TIDEMARK_CRASH_AT=$point "$TIDEMARK" __stack "$REPORT" data,wal "$COW,$WAL_COW" 60000 true /mnt/data /mnt/wal \
        </dev/null 2>/run/err || status=$?
    assert_same "exit status at $point" "$status" 137
    crashes=$((crashes + 1))
    both_answer "$point"
    "$TIDEMARK" recover || fail "$point: recover: exit status $?"
    assert_group_as_before
    fresh_stores
done </run/group-points
note "$crashes crashes"

# A member that cannot be frozen.
fsfreeze -f /mnt/wal
rm -f "$REPORT"
assert_status 3 "$TIDEMARK" __stack "$REPORT" data,wal "$COW,$WAL_COW" 20000 true /mnt/data /mnt/wal </dev/null
grep -q 'already frozen' "$REPORT" || fail "$(cat "$REPORT")"
writes_within_seconds 20 /mnt/data || fail "data stays frozen with wal"
fsfreeze -u /mnt/wal
both_answer "one was frozen"
assert_group_as_before

# A member that another tool has suspended, and one whose table another tool is about to replace.
dmsetup suspend wal
rm -f "$REPORT"
assert_status 3 "$TIDEMARK" __stack "$REPORT" data,wal "$COW,$WAL_COW" 20000 true /mnt/data </dev/null
writes_within_seconds 20 /mnt/data || fail "data is held with wal"
assert_same "what another tool suspended" "$(suspended_devices)" wal
dmsetup resume wal
both_answer "one was suspended"
dmsetup load wal --table "$WAL_TABLE_BEFORE"
rm -f "$REPORT"
assert_status 3 "$TIDEMARK" __stack "$REPORT" data,wal "$COW,$WAL_COW" 20000 true /mnt/data /mnt/wal </dev/null
dmsetup clear wal
both_answer "one was about to be replaced"
assert_group_as_before

# A hook that exceeds the budget.
rm -f "$REPORT"
assert_status 1 "$TIDEMARK" __stack "$REPORT" data,wal "$COW,$WAL_COW" 1000 'sleep 30' /mnt/data /mnt/wal </dev/null
grep -q '\[\]$' "$REPORT" || fail "not everything could be undone: $(cat "$REPORT")"
both_answer "a hook past the budget"
assert_group_as_before

umount /mnt/data /mnt/wal
e2fsck -fn "$ORIGIN" || fail "the filesystem of data is damaged"
e2fsck -fn "$WAL" || fail "the filesystem of wal is damaged"

# What is no group.
refused_group() { # WORDS ORIGINS COWS
    rm -f "$REPORT"
    assert_status 3 "$TIDEMARK" __stack "$REPORT" "$2" "$3" 20000 true </dev/null
    grep -q "$1" "$REPORT" || fail "the error does not say '$1': $(cat "$REPORT")"
    assert_group_as_before
}
refused_group 'data is named twice' data,wal,data "$COW,$WAL_COW,$COW"
dmsetup create top --table "0 8192 linear $ORIGIN 0"
refused_group 'top is on data' top,data "$WAL_COW,$COW"
refused_group 'top is on data' data,wal,top "$COW,$WAL_COW,$COW"
dmsetup remove top

# Two volumes of one volume group, which LVM commands change all the time: a writer of LVM that waits for the group's lock
# must not come between our lock for the one volume and that for the other.
dmsetup remove data
dmsetup remove wal
pvcreate -qq -ff -y "$(disk 0)" "$wal_disk"
vgcreate -qq -s 1m tidetest "$(disk 0)" "$wal_disk"
for volume in a b c; do lvcreate -qq -y -Wn -Zn -L 8m -n "$volume" tidetest; done
(while [ ! -e /run/no-lvm ]; do lvchange -qq --addtag busy tidetest/c; lvchange -qq --deltag busy tidetest/c; done) &
lvm=$!
table_before=$(dmsetup table tidetest-a; dmsetup table tidetest-b)
for round in 1 2 3; do
    fresh_stores
    rm -f "$REPORT"
    start=${EPOCHREALTIME/./}
    # A writer comes while the first lock is held, for sure.
    TIDEMARK_STALL_AT=lvm.locked:1 "$TIDEMARK" __stack "$REPORT" tidetest-a,tidetest-b "$COW,$WAL_COW" 20000 true \
        </dev/null || fail "$(cat "$REPORT")"
    took=$(((${EPOCHREALTIME/./} - start) / 1000))
    note "round $round: $took ms"
    [ "$took" -lt 30000 ] || fail "round $round: the group waited for LVM for $took ms"
    assert_same "the tables" "$(dmsetup table tidetest-a; dmsetup table tidetest-b)" "$table_before"
done
touch /run/no-lvm
wait "$lvm"
assert_no_tidemark_left
vgchange -qq -an tidetest
