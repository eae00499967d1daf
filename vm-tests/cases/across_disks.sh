# A read or write that goes over two disks, of which one has to split its part again: the kernel, which tries without
# waiting at first, then answers EAGAIN however often it is asked so. An origin and a secondary of two pieces each.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_load.sh"

make_filesystem ext4 "$(disk 2)" /mnt/scratch
# The second piece begins in the middle of the largest segment, and is read with more than a disk takes at once.
first=28552 second=40000
for name in origin secondary; do
    offset=$([ "$name" = origin ] && echo 0 || echo 131072)
    dmsetup create --noudevsync "$name" <<TABLE
0 $((first * 2)) linear $(disk 0) $offset
$((first * 2)) $((second * 2)) linear $(disk 1) $offset
TABLE
done
settle
origin=/dev/mapper/origin secondary=/dev/mapper/secondary
fill "$origin" "$(blockdev --getsize64 "$origin")" data
for segment in 1MiB 2MiB 16MiB; do
    note "segments of $segment"
    tidemark copy "$origin" "$secondary" --yes --impact none --segment "$segment" --verify --store /mnt/scratch
    assert_identical "$origin" "$secondary"
    blkdiscard -f "$secondary"
done
assert_no_tidemark_left
