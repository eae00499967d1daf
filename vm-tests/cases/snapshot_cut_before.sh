# Power cut, first boot: the machine dies while a mounted volume with snapshots is busy.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_load.sh"

make_filesystem ext4 "$(disk 1)" /mnt/stores
mkdir -p /mnt/stores/state /var/lib/tidemark
mount --bind /mnt/stores/state /var/lib/tidemark
tidemark attach "$(disk 0)" --name data
make_filesystem ext4 /dev/mapper/data /mnt/data
for i in 1 2 3; do
    head -c 2m /dev/urandom >/mnt/data/file
    sync -f /mnt/data
    tidemark snapshot create data --name "s$i" --store /mnt/stores --store-size 60MiB --freeze-budget 60s
    sha256sum </dev/mapper/data@s"$i" >/mnt/stores/s"$i".sum
done
sync -f /mnt/stores
start_load /mnt/data "$SEED"
sleep 5
load_is_alive
cut_here busy
