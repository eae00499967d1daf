# Power cut in a rollback, first boot: the machine dies while a snapshot is merged into its volume, which is mounted and
# written again.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_load.sh"
. "$REPO/vm-tests/cases/lib_slow.sh"

make_filesystem ext4 "$(disk 1)" /mnt/stores
mkdir -p /mnt/stores/state /var/lib/tidemark
mount --bind /mnt/stores/state /var/lib/tidemark
make_slow "$(disk 0)"
tidemark attach /dev/mapper/tidetest-slow --name data
make_filesystem ext4 /dev/mapper/data /mnt/data
for i in 1 2 3; do
    dd if=/dev/urandom of=/mnt/data/rewritten bs=1M count=60 conv=notrunc,fsync status=none
    dd if=/dev/urandom of=/mnt/data/of"$i" bs=1M count=4 conv=fsync status=none
    (cd /mnt/data && sha256sum rewritten of*) >/mnt/stores/files"$i".sum
    tidemark snapshot create data --name "s$i" --store /mnt/stores --store-size 110MiB --freeze-budget 60s
    sha256sum </dev/mapper/data@s"$i" >/mnt/stores/s"$i".sum
done
dd if=/dev/urandom of=/mnt/data/rewritten bs=1M count=60 conv=notrunc,fsync status=none
umount /mnt/data
tidemark monitor >/run/monitor.log 2>&1 &
monitor=$!
# Each of the merge's 120 regions then takes this time.
slow 250 0
tidemark snapshot rollback data@s2 --no-wait --yes
mount /dev/mapper/data /mnt/data
# Acknowledged with a flush, so it must be there after the power cut, whether its region is merged or not.
dd if=/dev/urandom of=/mnt/data/of1 bs=4k seek=100 count=64 conv=notrunc,fsync status=none
dd if=/dev/urandom of=/mnt/data/new bs=4k count=256 conv=fsync status=none
(cd /mnt/data && sha256sum rewritten of1 of2 new) >/mnt/stores/files.sum
sync -f /mnt/stores
# The monitor notes that the volume was mounted.
notes_mounts() { grep -q '"rollback":{.*"mounts":"ext4 ' /var/lib/tidemark/snapshots/*.json; }
wait_until 20 notes_mounts
kill "$monitor"
dmsetup status --target mirror
cut_here merging
