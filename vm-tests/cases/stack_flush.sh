# During a copy, a flush reaches every disk of the origin exactly once, wherever the write went. A disk that missed a
# flush could lose data that an application believes to be safe.
. "$REPO/vm-tests/cases/lib_stack.sh"

COUNT=40
first=$(disk 0) second=$(disk 2)
sectors=$(blockdev --getsz "$first")
dmsetup create data <<TABLE
0 $sectors linear $first 0
$sectors $sectors linear $second 0
TABLE
settle
TABLE_BEFORE=$(dmsetup table data)
ORIGIN=$(dm_node data)
mkfs.ext4 -q "$ORIGIN"
mkdir -p /mnt/data
mount "$ORIGIN" /mnt/data
COW=$(stat -L -c '%Hr:%Lr' "$(disk 1)")
fresh_store

# Number of flushes that a disk has completed (Documentation/block/stat.rst).
flushes() { awk '{ print $16 }' "/sys/block/$(basename "$1")/stat"; }

make_file() { # FILE
    dd if=/dev/urandom of="$1" bs=64k count=16 conv=fsync status=none
    sync
}

# Overwrites of allocated blocks: each is a write and a flush, without metadata.
overwrites() { # WHAT FILE
    local before_first before_second after_first after_second
    before_first=$(flushes "$first") before_second=$(flushes "$second")
    dd if=/dev/zero of="$2" bs=4k count=$COUNT oflag=direct,dsync conv=notrunc status=none
    after_first=$(($(flushes "$first") - before_first)) after_second=$(($(flushes "$second") - before_second))
    note "$1: $COUNT writes, $after_first flushes of the first disk, $after_second of the second"
    for count in $after_first $after_second; do
        [ "$count" -ge $COUNT ] || fail "$1: $COUNT synchronous writes, but a disk was flushed only $count times"
        # Some flushes come from the journal.
        [ "$count" -le $((COUNT + COUNT / 4)) ] || fail "$1: $COUNT synchronous writes, but a disk was flushed $count times"
    done
}

make_file /mnt/data/old
overwrites "no copy" /mnt/data/old
insert 20000 true
grep -q '^in place' "$REPORT" || fail "not in place: $(cat "$REPORT")"
assert_stack_is_over data
dmsetup table data
# Data of the instant is preserved; new data is written to space that was free.
overwrites "a copy, what is preserved" /mnt/data/old
make_file /mnt/data/new
python3 - "$(dmsetup table data)" "$(filefrag -v -b512 /mnt/data/new)" "$(dmsetup info -c --noheadings -o major,minor data#preserve)" <<'END'
import re
import sys

table, fragments, preserve = sys.argv[1:]
lines = [line.split() for line in table.splitlines()]
preserved = [(int(it[0]), int(it[0]) + int(it[1])) for it in lines if preserve in it]
found = re.findall(r"^ *\d+: *\d+\.\. *\d+: *(\d+)\.\. *(\d+):", fragments, re.M)
assert found, fragments
for start, end in found:
    inside = any(low <= int(start) and int(end) < high for low, high in preserved)
    assert not inside, f"the new file lies at {start}, which is preserved: {table}"
END
overwrites "a copy, what was free" /mnt/data/new
remove_stack
assert_as_before

# Once the start of the origin is released, the line that takes the flushes bypasses the preserving device.
"$TIDEMARK" copy /dev/mapper/data /run/copy.raw --yes --quiet --store "$(disk 1)" --rate 2MiB --region 1MiB &
copy=$!
begins_past() {
    local preserve
    is_preserved data || return 1
    preserve=$(dmsetup info -c --noheadings -o major,minor data#preserve)
    ! dmsetup table data | head -n 1 | grep -q " $preserve "
}
wait_until 60 begins_past
kill -STOP $copy
is_preserved data || fail "everything is already released: this proves nothing"
dmsetup table data
overwrites "a copy with its beginning released, an old file" /mnt/data/old
overwrites "a copy with its beginning released, a new file" /mnt/data/new
kill -CONT $copy
wait $copy || fail "the copy ended with $?"
assert_as_before
umount /mnt/data
e2fsck -fn "$ORIGIN" || fail "the origin's filesystem is damaged"
