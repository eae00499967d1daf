# The origin's disk or the store's disk is unplugged in mid-copy. The copy fails and says so, nothing hangs, nothing
# stays suspended, and nothing is left. The origin behaves as without a copy: it works if its own disk is there, and
# otherwise fails.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_vanish.sh"

plug() { # NAME MEBIBYTES
    local disk=/sys/kernel/config/nullb/$1
    mkdir "$disk"
    for word in memory_backed=1 "size=$2" power=1; do echo "${word#*=}" >"$disk/${word%%=*}"; done
    wait_until 10 test -b "/dev/$1"
}
# Stopped meanwhile, the copy sees its first error only when the disk has gone completely.
unplug() {
    kill -STOP "$process"
    power_off "$1"
    kill -CONT "$process"
}
power_off() { echo 0 >"/sys/kernel/config/nullb/$1/power"; }
pack_up() { rmdir "/sys/kernel/config/nullb/$1"; }

# loses NAME: a copy loses disk NAME while the origin is written. The copy uses one region: as soon as part of the
# origin bypasses the snapshot, its table keeps the disk open, and the origin's own table can still be loaded.
loses() {
    (while [ ! -e /run/no-writes ]; do dd if=/dev/urandom of=/dev/mapper/data bs=64k count=1 seek=$((RANDOM % 900)) oflag=direct conv=notrunc status=none 2>/dev/null; done) &
    local writer=$!
    copied_without "$1" /mnt/scratch/copy.raw /dev/usbstore --region 64MiB
    touch /run/no-writes
    wait "$writer" || true
    rm /run/no-writes
    [ -z "$(find /mnt/scratch -name 'copy*' -o -name '*partial*')" ] || fail "left: $(ls -la /mnt/scratch)"
}

make_filesystem ext4 "$(disk 0)" /mnt/scratch
plug usborigin 64
plug usbstore 64
tidemark attach /dev/usborigin --name data
table_before=$(dmsetup table data)

note "the store's disk"
loses usbstore
grep -qi 'store' /run/copy.err || fail "the error does not name the store"
tidemark recover
assert_same "the table" "$(dmsetup table data)" "$table_before"
timeout 20 dd if=/dev/zero of=/dev/mapper/data bs=4k count=1 oflag=direct conv=notrunc status=none || fail "the origin cannot be written"
assert_no_tidemark_left data
pack_up usbstore

note "the origin's disk"
plug usbstore 64
loses usborigin
fails_to_recover
if timeout 20 dd if=/dev/zero of=/dev/mapper/data bs=4k count=1 oflag=direct conv=notrunc status=none; then
    fail "a write to an unplugged disk succeeded"
fi
dmsetup remove --noudevsync data
tidemark recover
assert_no_tidemark_left data
power_off usbstore
pack_up usbstore
pack_up usborigin
