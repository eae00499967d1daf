# Snapshots of a busy xfs and ext4 can be mounted beside their origin.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_load.sh"

make_filesystem ext4 "$(disk 1)" /mnt/stores
mkdir -p /mnt/snapshot
for kind in xfs ext4; do
    wipefs -qa "$(disk 0)"
    tidemark attach "$(disk 0)" --name data
    make_filesystem "$kind" /dev/mapper/data /mnt/data
    start_load /mnt/data "$SEED"
    for i in 1 2 3; do
        sleep 0.5
        echo "$i" >/mnt/data/number
        sync -f /mnt/data
        tidemark snapshot create data --name "s$i" --store /mnt/stores --store-size 100MiB
    done
    for i in 3 1 2; do
        tidemark snapshot mount "data@s$i" /mnt/snapshot
        assert_same "$kind: what s$i shows" "$(cat /mnt/snapshot/number)" "$i"
        find /mnt/snapshot -type f -exec cat {} + >/dev/null || fail "$kind: s$i has files that cannot be read"
        umount /mnt/snapshot
        # A frozen xfs leaves counters that its log recovery computes, which a read-only device does not do.
        [ "$kind" = xfs ] || e2fsck -fn "/dev/mapper/data@s$i" >/run/fsck 2>&1 || { cat /run/fsck; fail "check of s$i"; }
    done
    stop_load
    tidemark snapshot delete data@s2 --yes
    tidemark snapshot mount data@s1 /mnt/snapshot
    assert_same "$kind: what s1 shows without s2" "$(cat /mnt/snapshot/number)" 1
    umount /mnt/snapshot
    tidemark snapshot delete data@s1 data@s3 --yes
    umount /mnt/data
    tidemark detach data
done
assert_no_tidemark_left
