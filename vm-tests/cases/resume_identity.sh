# The secondary of a killed copy is away for a while. Resume continues if it is provably the same, or else reads back
# what was written. If neither is possible, it refuses before it writes a byte, and nothing of the copy is lost.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_resume.sh"

make_volume "$(disk 2)" 16
is_resumable() { [ -n "$(find /run/tidemark -name '*.segments' -size +400c)" ]; }
options=(--region 4MiB --segment 256KiB --rate 16MiB)

start_and_kill() { # TARGET
    begin "$1" "${options[@]}"
    wait_until 60 is_resumable
    sleep 0.5
    kill_copy
}

plug_in() {
    dmsetup create --noudevsync "$1" --table "0 $(blockdev --getsz "$(disk 1)") linear $(disk 1) 0"
    settle
}
# away NAME: the disk comes back with another device number, and its filesystem with another mount ID.
away() {
    wait_until 20 umount /mnt/usb
    dmsetup rename usb away
    plug_in usb
    dmsetup remove --noudevsync away
    mkdir -p /mnt/between
    mount -t tmpfs none /mnt/between
    mount /dev/mapper/usb /mnt/usb
    umount /mnt/between
}

note "a filesystem whose ID is its device number"
plug_in usb
make_filesystem xfs /dev/mapper/usb /mnt/usb
start_and_kill /mnt/usb/copy.raw
away
goes_on /mnt/usb/copy.raw
rm /mnt/usb/copy.raw

for name in copy.raw copy.tdm; do
    note "$name: originals had already been applied"
    rm -f /run/written
    (while [ ! -e /run/written ]; do dd if=/dev/urandom of=/mnt/origin/content bs=64k count=1 seek=$((RANDOM % 256)) conv=notrunc,fsync status=none; done) &
    writer=$!
    TIDEMARK_CRASH_AT=copy.originals.laid begin "/mnt/usb/$name" "${options[@]}"
    wait "$process" || true
    touch /run/written
    wait "$writer"
    is_resumable || { cat /run/copy.out; fail "it was not killed at the intended point"; }
    away
    goes_on "/mnt/usb/$name"
    rm "/mnt/usb/$name"
done

note "written data is missing: resume detects it, and nothing is lost"
start_and_kill /mnt/usb/copy.raw
away
partial=$(find /mnt/usb -name '*tidemark-partial*')
cp --sparse=always "$partial" /mnt/scratch/kept
fill "$partial" $((8 << 20)) other
assert_status 4 tidemark resume
[ -e "$partial" ] || fail "the partial file was removed"
dd if=/mnt/scratch/kept of="$partial" bs=1M conv=notrunc,fsync status=none
rm /mnt/scratch/kept
goes_on /mnt/usb/copy.raw
umount /mnt/usb
dmsetup remove --noudevsync usb

note "a dock whose disks all report its serial number"
dock=/sys/kernel/config/nullb/usb
mkdir "$dock"
for word in memory_backed=1 blocksize=512 size=80; do echo "${word#*=}" >"$dock/${word%%=*}"; done
mkdir -p /run/dock/port /run/shown
echo 1234 >/run/dock/idVendor
echo DOCK-0001 >/run/dock/serial
insert_disk() {
    echo 1 >"$dock/power"
    wait_until 10 test -b /dev/usb
    node=$(readlink -f "/sys/dev/block/$(stat -c '%Hr:%Lr' /dev/usb)")
    rm -rf /run/shown/usb
    cp -r --no-dereference "$node" /run/shown/usb 2>/dev/null || true
    ln -sfn /run/dock/port /run/shown/usb/device
    mount --bind /run/shown/usb "$node"
}
remove_disk() {
    umount "$node"
    echo 0 >"$dock/power"
}
insert_disk
start_and_kill /dev/usb
remove_disk
insert_disk
fill /dev/usb $((80 << 20)) stranger
other=$(digest /dev/usb)
assert_status 3 tidemark resume --dry-run
assert_status 3 tidemark resume 2>/run/err
cat /run/err
grep -q 'next: ' /run/err || fail "no message says what to do"
assert_same "what is on the other disk" "$(digest /dev/usb)" "$other"
[ -n "$(find /run/tidemark -name '*.segments')" ] || fail "the copy's segment log was removed"
tidemark recover
is_back || fail "the origin's table changed"
assert_no_tidemark_left data
remove_disk
rmdir "$dock"

umount /mnt/origin
filesystem_check ext4 "$origin"
