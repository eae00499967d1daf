# Power cut, first boot: the machine dies in mid-copy.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_load.sh"

tidemark attach "$(disk 0)" --name data
make_filesystem ext4 /dev/mapper/data /mnt/origin
make_filesystem ext4 "$(disk 1)" /mnt/scratch
cp -a /usr/share/common-licenses /mnt/origin/settled
(cd /mnt/origin/settled && find . -type f -exec sha256sum {} +) >/mnt/scratch/settled.sums
sync
start_load /mnt/origin "$SEED"
tidemark copy /dev/mapper/data /mnt/scratch/copy.raw --yes --store /mnt/scratch --rate 2MiB &
for _ in $(seq 300); do
    if is_preserved /dev/mapper/data; then break; fi
    sleep 0.1
done
is_preserved /dev/mapper/data || fail "the copy did not begin"
sleep 3
load_is_alive
cut_here copying
