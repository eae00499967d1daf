# One request spans two disks, and one disk has to split its part. The kernel first tries without waiting, and then
# answers EAGAIN to every retry without waiting. Origin and secondary each consist of two pieces.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_load.sh"

make_filesystem ext4 "$(disk 2)" /mnt/scratch
# The second piece begins in the middle of the largest segment. Its part of a request exceeds a disk's largest request.
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
    note "segment size $segment"
    tidemark copy "$origin" "$secondary" --yes --impact none --segment "$segment" --verify --store /mnt/scratch
    assert_identical "$origin" "$secondary"
    blkdiscard -f "$secondary"
done
assert_no_tidemark_left
