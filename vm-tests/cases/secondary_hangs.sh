# A secondary that hangs (a suspended device, a dead server) or vanishes. After a signal, the origin works again within
# seconds, even if the process cannot end. Later everything can be put back.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_resume.sh"

make_volume "$(disk 2)" 16
dmsetup create --noudevsync secondary --table "0 $(blockdev --getsz "$(disk 1)") linear $(disk 1) 0"
settle

has_said() { grep -q "$1" /run/copy.err; }

start() { # TARGET
    tidemark copy "$origin" "$1" --all --yes --store /mnt/scratch --store-ram 1MiB --rate 8MiB --region 4MiB \
        --segment 256KiB >/run/copy.out 2>/run/copy.err &
    process=$!
    wait_until 60 has_placed 10
}

# hang TARGET: TARGET hangs, the copy is interrupted, and the origin is put back.
hang() {
    start "$1"
    dmsetup suspend --noflush --nolockfs secondary
    sleep 1
    kill -TERM "$process"
    wait_until 8 is_back
    timeout 10 dd if=/dev/zero of=/mnt/origin/probe bs=4k count=16 conv=fsync status=none || fail "the origin cannot be written"
    assert_same "suspended devices" "$(suspended_devices)" secondary
}

ends() { # STATUS: after the secondary has come back
    dmsetup resume --noudevsync secondary
    wait_until 30 is_gone
    local status=0
    wait "$process" || status=$?
    assert_same "the exit status ($(cat /run/copy.err))" "$status" "$1"
    tidemark recover
    is_back || fail "the origin's table changed"
    assert_no_tidemark_left data
    [ -z "$(find /mnt/target -name '*tidemark-partial*' 2>/dev/null)" ] || fail "a partial file is left"
}

note "a device that hangs temporarily"
hang /dev/mapper/secondary
ends 130
grep -q interrupted /run/copy.err || fail "no message says that the copy was interrupted"

note "a device that hangs permanently"
hang /dev/mapper/secondary
wait_until 40 has_said 'does not answer'
grep -q 'tidemark recover' /run/copy.err || fail "no message says what to do"
ends 1

note "a file, and system calls that do not return"
mkfs.ext4 -q /dev/mapper/secondary
mkdir -p /mnt/target
mount /dev/mapper/secondary /mnt/target
io_uring=/proc/sys/kernel/io_uring_disabled
[ ! -e "$io_uring" ] || echo 2 >"$io_uring"
hang /mnt/target/copy.tdm
wait_until 10 has_said 'has its own table again'
ends 130
[ ! -e "$io_uring" ] || echo 0 >"$io_uring"
umount /mnt/target
dmsetup remove --noudevsync secondary

note "a disk that vanishes"
usb=/sys/kernel/config/nullb/usb
mkdir "$usb"
for word in memory_backed=1 size=128 power=1; do echo "${word#*=}" >"$usb/${word%%=*}"; done
wait_until 10 test -b /dev/usb
start /dev/usb
echo 0 >"$usb/power"
status=0
wait "$process" || status=$?
cat /run/copy.err
assert_same "the exit status" "$status" 1
grep -q '/dev/usb' /run/copy.err || fail "the error does not name the disk"
is_back || fail "the origin's table changed"
assert_no_tidemark_left data

note "a disk that vanishes after the copy was killed, and another disk in its place"
echo 1 >"$usb/power"
wait_until 10 test -b /dev/usb
start /dev/usb
kill -KILL "$process"
wait "$process" || true
echo 0 >"$usb/power"
assert_status 3 tidemark resume
echo 1 >"$usb/power"
wait_until 10 test -b /dev/usb
assert_status 3 tidemark resume
tidemark recover
is_back || fail "the origin's table changed"
assert_no_tidemark_left data
echo 0 >"$usb/power"
rmdir "$usb"

umount /mnt/origin
filesystem_check ext4 "$origin"
