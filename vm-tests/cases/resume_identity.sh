# What a copy was made to is away for a while: a copy goes on where it is provably the same, or what was written is read
# back from it; what cannot be told is refused before a byte is written, and nothing of the copy is lost by that.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_load.sh"

tidemark attach "$(disk 0)" --name data
origin=/dev/mapper/data
make_filesystem ext4 "$origin" /mnt/origin
make_filesystem ext4 "$(disk 2)" /mnt/scratch
dd if=/dev/urandom of=/mnt/origin/content bs=1M count=16 status=none
sync -f /mnt/origin
table_before=$(dmsetup table "$origin")
size=$(blockdev --getsize64 "$origin")

is_resumable() { [ -n "$(find /run/tidemark -name '*.segments' -size +400c)" ]; }
is_gone() { ! kill -0 "$process" 2>/dev/null; }

begin() { # TARGET OPTION...
    tidemark copy "$origin" "$1" --all --yes --store /mnt/scratch --store-ram 1MiB --region 4MiB --segment 256KiB \
        --freeze-budget 120s --hook-frozen "$(capture_hook /mnt/scratch/instant)" "${@:2}" >/run/copy.out 2>&1 &
    process=$!
}

start_and_kill() { # TARGET
    begin "$1" --rate 16MiB
    wait_until 60 is_resumable
    sleep 0.5
    kill -KILL "$process"
    wait "$process" || true
    dd if=/dev/urandom of=/mnt/origin/after bs=64k count=8 conv=fsync status=none
}

goes_on() { # TARGET
    tidemark resume >/run/resume.out 2>&1 || { cat /run/resume.out; fail "the resume"; }
    local target=$1
    if [[ "$target" = *.tdm ]]; then
        tidemark verify "$target"
        tidemark restore "$target" /mnt/scratch/restored --yes
        target=/mnt/scratch/restored
    fi
    same_bytes /mnt/scratch/instant "$target" "$size"
    [ "$(dmsetup table "$origin")" = "$table_before" ] || fail "the origin's table changed"
    assert_no_tidemark_left data
    rm -f /mnt/scratch/restored /mnt/scratch/instant
}

plug_in() {
    dmsetup create --noudevsync "$1" --table "0 $(blockdev --getsz "$(disk 1)") linear $(disk 1) 0"
    settle
}
# away NAME: the disk comes back with another number, and its filesystem in another mount.
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

note "a filesystem whose id is the number of its device"
plug_in usb
make_filesystem xfs /dev/mapper/usb /mnt/usb
start_and_kill /mnt/usb/copy.raw
away
goes_on /mnt/usb/copy.raw
rm /mnt/usb/copy.raw

for name in copy.raw copy.tdm; do
    note "$name: originals had been laid over what was written"
    rm -f /run/written
    (while [ ! -e /run/written ]; do dd if=/dev/urandom of=/mnt/origin/content bs=64k count=1 seek=$((RANDOM % 256)) conv=notrunc,fsync status=none; done) &
    writer=$!
    TIDEMARK_CRASH_AT=copy.originals.laid begin "/mnt/usb/$name" --rate 16MiB
    wait "$process" || true
    touch /run/written
    wait "$writer"
    is_resumable || { cat /run/copy.out; fail "it was not killed where it should have been"; }
    away
    goes_on "/mnt/usb/$name"
    rm "/mnt/usb/$name"
done

note "what was written is not there any more: nothing is lost by finding out"
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

note "a dock, whose disks all have its serial number"
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
assert_status 3 tidemark resume 2>/run/err
cat /run/err
grep -q 'next: ' /run/err || fail "nothing says what to do"
assert_same "what is on the other disk" "$(digest /dev/usb)" "$other"
[ -n "$(find /run/tidemark -name '*.segments')" ] || fail "the copy was given up"
tidemark recover
[ "$(dmsetup table "$origin")" = "$table_before" ] || fail "the origin's table changed"
assert_no_tidemark_left data
remove_disk
rmdir "$dock"

umount /mnt/origin
filesystem_check ext4 "$origin"
