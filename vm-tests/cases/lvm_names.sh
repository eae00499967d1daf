# A device is identified by number and UUID. Volume, group and device are renamed during a copy, LVM takes a snapshot of
# the volume in mid-copy, and a volume has a name that looks like one of ours.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_load.sh"

make_filesystem ext4 "$(disk 1)" /mnt/scratch
pvcreate -q -y "$(disk 0)"
vgcreate -q -s 1m tidetest "$(disk 0)"
lvcreate -q -y -Wn -Zn -L 24m -n data tidetest
dmsetup mknodes
make_filesystem ext4 /dev/mapper/tidetest-data /mnt/origin
fio --name=hot --filename=/mnt/origin/hot --size=8m --rw=randwrite --bs=4k --direct=1 --ioengine=psync --rate_iops=200 \
    --time_based --runtime=3600 --randseed="$SEED" >/run/hot.log 2>&1 &
LOAD=$!
wait_until 30 test -s /mnt/origin/hot
COPY=''

# copy_begins DEVICE OPTION...: starts a copy with many releases in the background, and returns in mid-copy.
copy_begins() {
    rm -f /mnt/scratch/copy.raw /mnt/scratch/instant
    tidemark copy "$@" /mnt/scratch/copy.raw --yes --store /mnt/scratch --region 256KiB --segment 64KiB --rate 6MiB \
        --hook-frozen "$(capture_hook /mnt/scratch/instant)" >/run/copy.out 2>/run/copy.err &
    COPY=$!
    wait_until 30 is_preserved "$1"
    sleep 1
    kill -0 "$COPY" || fail "the copy was over too early: $(cat /run/copy.err)"
}

# as_before NAME: the device has the table of a plain volume, and no Tidemark device is left.
as_before() {
    assert_same "the targets of $1" "$(dmsetup table "$1" | cut -d' ' -f3 | sort -u)" linear
    assert_same "suspended devices" "$(suspended_devices)" ""
    assert_no_tidemark_left
}

# copy_ends WHAT NAME MAY_BE_VOID: when LVM renames a volume, it may replace its table. The copy then says that it is
# void.
copy_ends() {
    local status=0
    wait "$COPY" || status=$?
    if [ "$status" = 0 ]; then
        assert_identical /mnt/scratch/copy.raw /mnt/scratch/instant
    else
        [ "$3" = void ] && grep -q 'another tool replaced the table' /run/copy.err ||
            fail "$1: the copy failed: $(cat /run/copy.err)"
        [ ! -e /mnt/scratch/copy.raw ] || fail "$1: a void copy has its final name"
    fi
    note "$1: the copy ended with $status"
    as_before "$2"
}

knows_it_as() { # NAME
    tidemark status --json >/run/status
    grep -q "\"origin\":\"$1\",\"snapshot\"" /run/status || fail "status does not show the new name: $(cat /run/status)"
}

note "renamed by hand while it is copied"
copy_begins /dev/mapper/tidetest-data --all
dmsetup rename tidetest-data tidetest-other
knows_it_as tidetest-other
sleep 1
copy_ends "dmsetup rename" tidetest-other whole
dmsetup rename tidetest-other tidetest-data
dmsetup mknodes

note "renamed by LVM while it is copied"
copy_begins /dev/mapper/tidetest-data --all
lvrename -q tidetest data other
copy_ends "lvrename" tidetest-other void
dmsetup mknodes
copy_begins /dev/mapper/tidetest-other --all
vgrename -q tidetest tidenew
# LVM renames the devices of volumes in use only when they are refreshed.
lvchange -q --refresh tidenew/other
copy_ends "vgrename, lvchange --refresh" tidenew-other void
dmsetup mknodes

for how in dmsetup lvrename; do
    note "renamed by $how, then killed, then recovered"
    copy_begins /dev/mapper/tidenew-other --all
    if [ "$how" = dmsetup ]; then dmsetup rename tidenew-other tidenew-data; else lvrename -q tidenew other data; fi
    kill -9 "$COPY"
    wait "$COPY" 2>/dev/null || true
    tidemark recover >/run/recover.out 2>&1 || fail "recover: $(cat /run/recover.out)"
    as_before tidenew-data
    if [ "$how" = dmsetup ]; then dmsetup rename tidenew-data tidenew-other; else lvrename -q tidenew data other; fi
    dmsetup mknodes
done

note "killed, then renamed, then resumed"
copy_begins /dev/mapper/tidenew-other --all
kill -9 "$COPY"
wait "$COPY" 2>/dev/null || true
dmsetup rename tidenew-other tidenew-data
tidemark resume >/run/resume.out 2>&1 || fail "resume: $(cat /run/resume.out)"
assert_identical /mnt/scratch/copy.raw /mnt/scratch/instant
as_before tidenew-data
dmsetup rename tidenew-data tidenew-other
lvrename -q tidenew other data
vgrename -q tidenew tidetest
lvchange -q --refresh tidetest/data
dmsetup mknodes

note "LVM takes a snapshot of the volume: that succeeds, and only the copy is void"
copy_begins /dev/mapper/tidetest-data --all
# No udevd runs here, so LVM makes its device nodes itself.
lvcreate -q -y -s -L 8m -n theirs --config 'activation { udev_sync=0 udev_rules=0 verify_udev_operations=1 }' \
    tidetest/data >/run/lvm.out 2>&1 || fail "lvcreate -s: $(cat /run/lvm.out)"
status=0
wait "$COPY" || status=$?
assert_same "the copy's exit status" "$status" 1
grep -q 'another tool replaced the table' /run/copy.err || fail "the copy gives another reason: $(cat /run/copy.err)"
[ ! -e /mnt/scratch/copy.raw ] || fail "a void copy has its final name"
assert_no_tidemark_left
assert_same "LVM's snapshot" "$(lvs --noheadings -o lv_attr tidetest/theirs | tr -d ' ' | cut -c1,5)" sa
kill -0 "$LOAD" || fail "the application has died"
lvremove -q -y tidetest/theirs
as_before tidetest-data
stop_hot_load
umount /mnt/origin
e2fsck -fn /dev/mapper/tidetest-data >/run/fsck 2>&1 || fail "the origin's filesystem: $(cat /run/fsck)"

note "a volume whose own name looks like one of ours"
for name in data-real data-cow 'data#real' data-snap 'data#cow#snap'; do
    dmsetup create "$name" --table "0 16384 linear $(disk 2) 0"
    dmsetup mknodes
    dd if=/dev/urandom of="/dev/mapper/$name" bs=1M count=8 oflag=direct status=none
    exec 9<>"/dev/mapper/$name"
    rm -f /mnt/scratch/copy.raw
    tidemark copy "/dev/mapper/$name" /mnt/scratch/copy.raw --yes --store /mnt/scratch >/run/copy.out 2>&1 ||
        fail "$name cannot be copied: $(cat /run/copy.out)"
    exec 9>&-
    assert_identical /mnt/scratch/copy.raw "/dev/mapper/$name"
    as_before "$name"
    dmsetup remove "$name"
done
