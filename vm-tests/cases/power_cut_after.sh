# Power cut, second boot: the origin's filesystem recovers as without Tidemark, the interrupted copy is void, and a new
# copy succeeds.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_load.sh"

assert_no_tidemark_left
mkdir -p /mnt/scratch /mnt/origin
mount "$(disk 1)" /mnt/scratch
[ ! -e /mnt/scratch/copy.raw ] || fail "a partial copy has the final name"
tidemark attach "$(disk 0)" --name data
mount /dev/mapper/data /mnt/origin
(cd /mnt/origin/settled && sha256sum --quiet -c /mnt/scratch/settled.sums) || fail "settled files were harmed"
umount /mnt/origin
filesystem_check ext4 /dev/mapper/data
tidemark recover
mount /dev/mapper/data /mnt/origin
tidemark copy /dev/mapper/data /mnt/scratch/copy.raw --all --yes --store /mnt/scratch --freeze-budget 120s \
    --hook-frozen "$(capture_hook /mnt/scratch/instant)"
assert_identical /mnt/scratch/copy.raw /mnt/scratch/instant
umount /mnt/origin
assert_no_tidemark_left data
