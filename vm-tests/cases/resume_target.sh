# A killed copy continues only with the secondary that it wrote to. Anything else under the same name is refused (3),
# and not a byte of it is changed.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_resume.sh"

make_volume "$(disk 2)" 16
size=$(blockdev --getsize64 "$origin")
is_resumable() { [ -n "$(find /run/tidemark -name '*.segments' -size +200c)" ]; }

# start_and_kill TARGET: kills a copy after it has placed some segments.
start_and_kill() {
    begin "$1" --rate 40MiB --region 4MiB
    wait_until 60 is_resumable
    sleep 0.5
    kill_copy
}

refused() { # WORDS
    assert_status 3 tidemark resume 2>/run/err
    grep -q "$1" /run/err || { cat /run/err; fail "resume does not say '$1'"; }
    grep -q 'next: ' /run/err || fail "resume does not say what to do"
}

other_is_untouched() { assert_same "what is on the other disk" "$(digest "$1")" "$other"; }

note "the disk is unplugged, and another one gets its name and number"
truncate -s 80M /mnt/scratch/first
fill /mnt/scratch/second $((80 << 20)) second
other=$(digest /mnt/scratch/second)
losetup /dev/loop5 /mnt/scratch/first
start_and_kill /dev/loop5
wait_until 20 losetup -d /dev/loop5
wait_until 20 sh -c '! losetup /dev/loop5'
losetup /dev/loop5 /mnt/scratch/second
refused "is not the copy's target"
other_is_untouched /mnt/scratch/second
losetup -d /dev/loop5
refused '/dev/loop5'
losetup /dev/loop5 /mnt/scratch/first
note "the first disk comes back"
goes_on /dev/loop5
losetup -d /dev/loop5

note "a volume of the same name on another disk"
losetup /dev/loop5 /mnt/scratch/first
losetup /dev/loop6 /mnt/scratch/second
dmsetup create --noudevsync target --table "0 $(blockdev --getsz /dev/loop5) linear /dev/loop5 0"
settle
start_and_kill /dev/mapper/target
wait_until 20 dmsetup remove --noudevsync target
dmsetup create --noudevsync target --table "0 $(blockdev --getsz /dev/loop6) linear /dev/loop6 0"
settle
refused "is not the copy's target"
note "the same volume, its table now mapping to another disk"
dmsetup remove --noudevsync target
tidemark recover
dmsetup create --noudevsync target --table "0 $(blockdev --getsz /dev/loop5) linear /dev/loop5 0"
settle
start_and_kill /dev/mapper/target
dmsetup load target --table "0 $(blockdev --getsz /dev/loop6) linear /dev/loop6 0"
dmsetup resume --noudevsync target
refused "is not the copy's target"
other_is_untouched /mnt/scratch/second
dmsetup load target --table "0 $(blockdev --getsz /dev/loop5) linear /dev/loop5 0"
dmsetup resume --noudevsync target
goes_on /dev/mapper/target
dmsetup remove --noudevsync target
losetup -d /dev/loop5
losetup -d /dev/loop6
rm /mnt/scratch/first /mnt/scratch/second

for name in copy.raw copy.tdm; do
    note "$name: another file under the partial file's name"
    start_and_kill "/mnt/scratch/$name"
    partial=$(find /mnt/scratch -name '*tidemark-partial*')
    mv "$partial" /mnt/scratch/kept
    cp --sparse=always /mnt/scratch/kept "$partial"
    other=$(digest "$partial")
    refused "is not the copy's target file"
    other_is_untouched "$partial"
    mv /mnt/scratch/kept "$partial"
    # The partial file is too short for the recorded segments.
    length=$(stat -c %s "$partial")
    cp --sparse=always "$partial" /mnt/scratch/kept
    truncate -s 65536 "$partial"
    refused 'shorter'
    dd if=/mnt/scratch/kept of="$partial" bs=1M conv=notrunc,fsync status=none
    rm /mnt/scratch/kept
    [ "$(stat -c %s "$partial")" = "$length" ] || fail "the refused resume changed the length"
    goes_on "/mnt/scratch/$name"
    rm "/mnt/scratch/$name"
done

note "another filesystem at the file's mount point"
mkfs.ext4 -q "$(disk 1)"
mkdir /mnt/first /mnt/target
mount --bind /mnt/scratch /mnt/target
start_and_kill /mnt/target/copy.raw
partial=$(basename "$(find /mnt/target -name '*tidemark-partial*')")
umount /mnt/target
mount "$(disk 1)" /mnt/target
refused 'gone'
fill "/mnt/target/$partial" "$size" third
other=$(digest "/mnt/target/$partial")
refused "is not the copy's target file"
other_is_untouched "/mnt/target/$partial"
umount /mnt/target
mount --bind /mnt/scratch /mnt/target
goes_on /mnt/target/copy.raw
umount /mnt/target

umount /mnt/origin
filesystem_check ext4 "$origin"
