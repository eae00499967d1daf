# A copy is killed, and its secondary is a disk with a cache that is unplugged and comes back: what it had not synced is
# gone. What resume makes of it is right all the same.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_load.sh"

tidemark attach "$(disk 0)" --name data
origin=/dev/mapper/data
make_filesystem ext4 "$origin" /mnt/origin
make_filesystem ext4 "$(disk 1)" /mnt/scratch
table_before=$(dmsetup table "$origin")
size=$(blockdev --getsize64 "$origin")
dd if=/dev/urandom of=/mnt/origin/content bs=1M count=40 status=none
sync -f /mnt/origin

# null_blk's cache is lost when it is switched off, and nothing else: a disk that is unplugged. The filesystem is over a
# linear device, which does not tell it beforehand.
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

placed() { find /run/tidemark -name '*.segments' -printf '%s\n' | awk '{ n += ($1 - 128) / 16 } END { print n + 0 }'; }
has_placed() { [ "$(placed)" -gt "$1" ]; }

for name in copy.raw copy.tdm; do
    note "$name"
    tidemark copy "$origin" "/mnt/usb/$name" --all --yes --store /mnt/scratch --store-ram 1MiB --rate 16MiB --region 4MiB \
        --segment 256KiB --freeze-budget 120s --hook-frozen "$(capture_hook /mnt/scratch/instant)" >/run/copy.out 2>&1 &
    process=$!
    # The file itself stays; most of what is in it does not.
    wait_until 60 has_placed 5
    sync -f /mnt/usb
    wait_until 60 has_placed 60
    kill -KILL "$process"
    wait "$process" || true
    dd if=/dev/urandom of=/mnt/origin/after bs=64k count=8 conv=fsync status=none
    placed_before=$(placed)
    unplug
    tidemark resume --json >/run/resume.json 2>&1 || { tail -n 3 /run/resume.json; fail "the resume"; }
    grep -q '"phase":"verify"' /run/resume.json || fail "nothing was read back from a disk that had been away"
    resumed=$(grep -o '"resumed_segment_count":[0-9]*' /run/resume.json | cut -d: -f2)
    note "$placed_before were noted, $resumed were still there"
    assert_same "segments that a sync stood behind" "$resumed" "$placed_before"
    target=/mnt/usb/$name
    if [ "$name" = copy.tdm ]; then
        tidemark verify "$target"
        tidemark restore "$target" /mnt/scratch/restored --yes
        target=/mnt/scratch/restored
    fi
    same_bytes /mnt/scratch/instant "$target" "$size"
    [ "$(dmsetup table "$origin")" = "$table_before" ] || fail "the origin's table changed"
    assert_no_tidemark_left data
    rm -f "/mnt/usb/$name" /mnt/scratch/instant
done

note "somebody has written to it: it was there all the time, and a sample tells"
tidemark copy "$origin" /mnt/usb/copy.raw --all --yes --store /mnt/scratch --store-ram 1MiB --rate 16MiB --region 32MiB \
    --segment 256KiB --freeze-budget 120s --order physical --hook-frozen "$(capture_hook /mnt/scratch/instant)" >/run/copy.out 2>&1 &
process=$!
wait_until 60 has_placed 30
kill -KILL "$process"
wait "$process" || true
partial=$(find /mnt/usb -name '*tidemark-partial*')
dd if=/dev/urandom of="$partial" bs=1M count=2 conv=notrunc,fsync status=none
tidemark resume >/run/resume.out 2>&1 || { cat /run/resume.out; fail "the resume"; }
same_bytes /mnt/scratch/instant /mnt/usb/copy.raw "$size"
assert_no_tidemark_left data

umount /mnt/usb
dmsetup remove --noudevsync usb
echo 0 >"$usb/power"
rmdir "$usb"
umount /mnt/origin
filesystem_check ext4 "$origin"
