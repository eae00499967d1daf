# A disk with two paths: one SCSI device for each. Without multipath, only the WWN shows that both are one disk, and
# what is in use on one path is refused on the other. A multipath device is copied cold, and refused while in use. A
# volume on it is copied exactly while paths fail, disappear and return. Resume recognizes a secondary on it.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_resume.sh"

modprobe -r scsi_debug
modprobe scsi_debug add_host=2 max_luns=1 num_tgts=1 dev_size_mb=64 vpd_use_hostno=0 delay=0

# path NUMBER: prints the name (sdX) of the disk on its Nth path.
path() { basename "/sys/bus/pseudo/drivers/scsi_debug/adapter$1/"host*/target*/*/block/*; }
has_path() { [ -b "/dev/$(path "$1")" ]; }
number() { cat "/sys/block/$1/dev"; }
wait_until 20 has_path 0
wait_until 20 has_path 1
one=$(path 0)
other=$(path 1)
assert_same "the world-wide name" "$(cat "/sys/block/$one/device/wwid")" "$(cat "/sys/block/$other/device/wwid")"

refused() { # PATTERN COMMAND...
    local pattern=$1 before
    shift
    before=$(dmsetup table)
    assert_status 3 "$@" >/run/refused.out 2>/run/refused.err
    note "$(head -n 1 /run/refused.err)"
    grep -q "$pattern" /run/refused.err || fail "the refusal does not match '$pattern': $(cat /run/refused.err)"
    grep -q 'next:' /run/refused.err || fail "the refusal does not say what to do instead: $(cat /run/refused.err)"
    assert_same "the tables" "$(dmsetup table)" "$before"
}

# multipath NAME...: prints the table of a multipath device with these paths, as multipathd loads it.
multipath() {
    local path paths=
    for path in "$@"; do paths+=" $(number "$path") 1"; done
    echo "0 131072 multipath 1 queue_if_no_path 0 1 1 round-robin 0 $# 1$paths"
}
reload() { # NAME...
    dmsetup load mpatha --table "$(multipath "$@")"
    dmsetup suspend --noflush --nolockfs mpatha
    dmsetup resume --noudevsync mpatha
}
path_is() { dmsetup status mpatha | grep -q " $(number "$1") $2 "; }
breaks() {
    echo offline >"/sys/block/$1/device/state"
    wait_until 20 path_is "$1" F
}
heals() {
    echo running >"/sys/block/$1/device/state"
    dmsetup message mpatha 0 reinstate_path "$(number "$1")"
    wait_until 20 path_is "$1" A
}

make_filesystem ext4 "$(disk 0)" /mnt/scratch
head -c 1m /dev/urandom >/mnt/scratch/small
tidemark copy /mnt/scratch/small /mnt/scratch/small.tdm

note "two paths, and no multipath"
dmsetup create --noudevsync data --table "0 131072 linear /dev/$one 0"
dmsetup mknodes
make_filesystem ext4 /dev/mapper/data /mnt/origin
refused 'another path' tidemark copy data "/dev/$other" --yes --store /mnt/scratch
refused 'another path' tidemark copy data /mnt/scratch/x.raw --yes --store "/dev/$other"
refused 'another path' tidemark copy "/dev/$other" /mnt/scratch/x.raw --yes
refused 'another path' tidemark restore /mnt/scratch/small.tdm "/dev/$other" --yes
umount /mnt/origin
dmsetup remove --noudevsync data
mount "/dev/$one" /mnt/origin
refused 'another path' tidemark copy "/dev/$other" /mnt/scratch/x.raw --yes
refused 'another path' tidemark restore /mnt/scratch/small.tdm "/dev/$other" --yes
umount /mnt/origin
exec 8<>"/dev/$one"
refused 'open for writing' tidemark restore /mnt/scratch/small.tdm "/dev/$other" --yes
exec 8>&-

note "a multipath device at rest and in use"
dmsetup create --noudevsync mpatha --uuid mpath-333333330000007d0 --table "$(multipath "$one" "$other")"
dmsetup mknodes
tidemark copy /dev/mapper/mpatha /mnt/scratch/rest.raw --yes
assert_identical /dev/mapper/mpatha /mnt/scratch/rest.raw
rm /mnt/scratch/rest.raw
mount /dev/mapper/mpatha /mnt/origin
refused 'tidemark attach' tidemark copy /dev/mapper/mpatha /mnt/scratch/x.raw --yes
umount /mnt/origin
tidemark attach /dev/mapper/mpatha --name data
tidemark copy data /mnt/scratch/x.raw --yes --store /mnt/scratch --dry-run >/dev/null
tidemark detach data

note "a logical volume on the multipath device"
pvcreate -q -y /dev/mapper/mpatha
vgcreate -q -s 1m tidetest /dev/mapper/mpatha
lvcreate -q -y -Wn -Zn -L 56m -n data tidetest
dmsetup mknodes
origin=/dev/mapper/tidetest-data
make_filesystem ext4 "$origin" /mnt/origin
table_before=$(dmsetup table "$origin")
start_load /mnt/origin "$SEED"
for device in "/dev/$one" /dev/mapper/mpatha; do
    refused 'in use\|origin' tidemark copy "$origin" "$device" --yes --store /mnt/scratch
    refused 'in use\|origin' tidemark copy "$origin" /mnt/scratch/x.raw --yes --store "$device"
done

note "its paths fail and come back"
begin /mnt/scratch/copy.raw --rate 1536KiB --region 4MiB
wait_until 60 is_preserved "$origin"
breaks "$other"
heals "$other"
breaks "$one"
breaks "$other"
note "no path is left"
sleep 2
heals "$one"
heals "$other"
note "one path is removed, and comes back as another device"
echo 1 >"/sys/block/$one/device/delete"
reload "$other"
for scan in /sys/bus/pseudo/drivers/scsi_debug/adapter0/host*/scsi_host/host*/scan; do echo '- - -' >"$scan"; done
wait_until 20 has_path 0
one=$(path 0)
reload "$one" "$other"
! is_gone || fail "the copy ended before its paths failed: $(cat /run/copy.out)"
status=0
wait "$process" || status=$?
assert_same "the exit status: $(cat /run/copy.out)" "$status" 0
load_is_alive
stop_load
same_bytes /mnt/scratch/instant /mnt/scratch/copy.raw
assert_same "the table" "$(dmsetup table "$origin")" "$table_before"
assert_no_tidemark_left
umount /mnt/origin
filesystem_check ext4 "$origin"
rm /mnt/scratch/copy.raw /mnt/scratch/instant
lvremove -q -y tidetest/data
vgremove -q -y tidetest
pvremove -q -y /dev/mapper/mpatha

note "a secondary that has lost a path is recognized"
tidemark attach "$(disk 1)" --name data
size=$(blockdev --getsize64 /dev/mapper/data)
fill /dev/mapper/data "$size" data
origin=/dev/mapper/data
begin /dev/mapper/mpatha --rate 6MiB --segment 256KiB
wait_until 60 has_placed 20
kill -KILL "$process"
wait "$process" || true
dd if=/dev/urandom of="$origin" bs=64k count=80 oflag=direct conv=notrunc status=none
echo 1 >"/sys/block/$one/device/delete"
reload "$other"
tidemark resume >/run/resume.out 2>&1 || fail "the resume: $(cat /run/resume.out)"
same_bytes /mnt/scratch/instant /dev/mapper/mpatha "$size"
assert_no_tidemark_left data
tidemark detach data
dmsetup remove --noudevsync mpatha
