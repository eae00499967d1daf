# Filesystems are stacked on the origin through loop devices, partitions and mappings, on the device itself or in a file
# of its filesystem. All are frozen, topmost first. One that cannot be frozen is named, in the warning and in the
# report.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_load.sh"

make_filesystem ext4 "$(disk 1)" /mnt/scratch
tidemark attach "$(disk 0)" --name data
origin=/dev/mapper/data

note "a disk image on the volume: partitions by loop, a mapping over one of them"
printf 'label: gpt\nsize=40MiB\nsize=40MiB\n' | sfdisk -q "$origin" 2>/dev/null || true
losetup -P /dev/loop6 "$origin"
wait_until 10 test -b /dev/loop6p2
make_filesystem ext4 /dev/loop6p1 /mnt/first
dmsetup create --noudevsync tidetest-over --table "0 $(blockdev --getsz /dev/loop6p2) linear /dev/loop6p2 0"
dmsetup mknodes
make_filesystem ext4 /dev/mapper/tidetest-over /mnt/second
note "and a filesystem in a file on the first"
truncate -s 16m /mnt/first/image
losetup /dev/loop7 /mnt/first/image
make_filesystem ext4 /dev/loop7 /mnt/third

# Each probe tries to write: it must hang, because the filesystem is frozen.
probes() { for at in /mnt/first /mnt/second /mnt/third; do echo "timeout -s KILL 1 touch $at/probe && echo $at >>/run/wrote"; done; echo true; }
for at in /mnt/first /mnt/second /mnt/third; do head -c 30000 /dev/urandom >"$at/file"; done
rm -f /run/wrote
tidemark copy "$origin" /mnt/scratch/copy.raw --yes --json --store /mnt/scratch --freeze-budget 30s \
    --hook-frozen "$(probes)" >/run/copy.out 2>/run/copy.err || fail "the copy: $(cat /run/copy.err)"
[ ! -e /run/wrote ] || fail "not frozen: $(xargs </run/wrote)"
grep -q '"not_frozen":\[\]' /run/copy.out || fail "the report names something that was not frozen: $(tail -n 1 /run/copy.out)"

note "unsynced data is in the copy of each filesystem, and the journals are empty"
losetup -r -P /dev/loop5 /mnt/scratch/copy.raw
wait_until 10 test -b /dev/loop5p2
mkdir -p /mnt/c1 /mnt/c2 /mnt/c3
mount -o ro,noload /dev/loop5p1 /mnt/c1
mount -o ro,noload /dev/loop5p2 /mnt/c2
losetup -r /dev/loop4 /mnt/c1/image
mount -o ro,noload /dev/loop4 /mnt/c3
for pair in first:c1 second:c2 third:c3; do same_bytes "/mnt/${pair%:*}/file" "/mnt/${pair#*:}/file"; done
umount /mnt/c3
losetup -d /dev/loop4
umount /mnt/c1 /mnt/c2
losetup -d /dev/loop5
rm /mnt/scratch/copy.raw

note "a filesystem on a loop device, mounted only in another mount namespace: named"
umount /mnt/second
mkfifo /run/hold
unshare -m sh -c 'mount /dev/mapper/tidetest-over /mnt/second; touch /run/there; read -r _ </run/hold' &
holder=$!
wait_until 10 test -e /run/there
tidemark copy "$origin" /mnt/scratch/copy.raw --yes --json --store /mnt/scratch >/run/copy.out 2>/run/copy.err || fail "the copy: $(cat /run/copy.err)"
grep -q '"not_frozen":\["[^]]*dm-' /run/copy.out || fail "the report does not name what was not frozen: $(tail -n 1 /run/copy.out)"
grep '"warning"' /run/copy.out | grep -q 'power cut' || fail "no warning: $(cat /run/copy.out)"
echo >/run/hold
wait "$holder"

umount /mnt/third
losetup -d /dev/loop7
umount /mnt/first
dmsetup remove --noudevsync tidetest-over
losetup -d /dev/loop6
wait_until 10 sh -c '! [ -b /dev/loop6p1 ]'
tidemark detach data
assert_no_tidemark_left
