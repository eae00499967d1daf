# A copy is killed, and its secondary, a disk with a volatile cache, is unplugged and comes back without the data that
# was not flushed. A resume still makes a correct copy.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_resume.sh"

make_volume "$(disk 1)" 40

# Powering null_blk off loses its cache and nothing else, like unplugging a disk. The linear device between hides the
# power off from the filesystem.
usb=/sys/kernel/config/nullb/usb
mkdir "$usb"
for word in memory_backed=1 blocksize=512 size=256 cache_size=200; do echo "${word#*=}" >"$usb/${word%%=*}"; done
plug_in() {
    echo 1 >"$usb/power"
    wait_until 10 test -b /dev/usb
    dmsetup create --noudevsync usb --table "0 $(blockdev --getsz /dev/usb) linear /dev/usb 0"
    settle
}
plug_in
make_filesystem ext4 /dev/mapper/usb /mnt/usb

unplug() {
    echo 0 >"$usb/power"
    umount /mnt/usb
    dmsetup remove --noudevsync usb
    plug_in
    mount /dev/mapper/usb /mnt/usb
}

for name in copy.raw copy.tdm; do
    note "$name"
    begin "/mnt/usb/$name" --rate 16MiB --region 4MiB --segment 256KiB
    # The file itself is synced, most of its data is not.
    wait_until 60 has_placed 5
    sync -f /mnt/usb
    wait_until 60 has_placed 60
    kill_copy
    placed_before=$(placed)
    unplug
    tidemark resume --json >/run/resume.json 2>&1 || { tail -n 3 /run/resume.json; fail "the resume"; }
    grep -q '"phase":"verify"' /run/resume.json || fail "nothing was read back from a disk that had been unplugged"
    resumed=$(grep -o '"resumed_segment_count":[0-9]*' /run/resume.json | cut -d: -f2)
    note "$placed_before were noted, $resumed were still there"
    assert_same "synced segments" "$resumed" "$placed_before"
    is_right "/mnt/usb/$name"
    rm "/mnt/usb/$name"
done

note "data on it was changed: the disk was never away, and reading a sample detects the change"
begin /mnt/usb/copy.raw --rate 16MiB --region 32MiB --segment 256KiB --order physical
wait_until 60 has_placed 30
kill_copy
partial=$(find /mnt/usb -name '*tidemark-partial*')
dd if=/dev/urandom of="$partial" bs=1M count=2 conv=notrunc,fsync status=none
goes_on /mnt/usb/copy.raw

umount /mnt/usb
dmsetup remove --noudevsync usb
echo 0 >"$usb/power"
rmdir "$usb"
umount /mnt/origin
filesystem_check ext4 "$origin"
