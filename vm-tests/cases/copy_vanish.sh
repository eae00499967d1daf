# The disk under the origin, or the store's, is unplugged in mid-copy: the copy fails and says so, nothing hangs, nothing
# stays suspended, and nothing is left. The origin fares as without a copy: on its own disk it goes on, and on one that is
# gone it fails.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_load.sh"

plug() { # NAME MEBIBYTES
    local disk=/sys/kernel/config/nullb/$1
    mkdir "$disk"
    for word in memory_backed=1 "size=$2" power=1; do echo "${word#*=}" >"$disk/${word%%=*}"; done
    wait_until 10 test -b "/dev/$1"
}
unplug() { echo 0 >"/sys/kernel/config/nullb/$1/power"; }
pack_up() { rmdir "/sys/kernel/config/nullb/$1"; }
is_gone() { ! kill -0 "$process" 2>/dev/null; }

# One region: once part of the origin leads past the snapshot, its table holds its disk open, and its own can be loaded.
# copied_without NAME: copies, and disk NAME is unplugged meanwhile. The copy's error is in /run/copy.err.
copied_without() {
    tidemark copy /dev/mapper/data /mnt/scratch/copy.raw --all --yes --store /dev/usbstore --store-ram 0 --rate 8MiB --region 64MiB \
        >/run/copy.out 2>/run/copy.err &
    process=$!
    wait_until 20 is_preserved data
    (while dd if=/dev/urandom of=/dev/mapper/data bs=64k count=1 seek=$((RANDOM % 900)) oflag=direct conv=notrunc status=none 2>/dev/null; do :; done) &
    local writer=$!
    sleep 1
    # It sees the first error when the disk has gone for good, and not while it goes.
    kill -STOP "$process"
    unplug "$1"
    kill -CONT "$process"
    wait_until 60 is_gone
    local status=0
    wait "$process" || status=$?
    note "$1 unplugged: exit status $status: $(grep -v '^copying\|^instant\|^prepar' /run/copy.err | head -n 3 | xargs -d '\n')"
    assert_same "the exit status" "$status" 1
    kill "$writer" 2>/dev/null || true
    wait "$writer" || true
    assert_same "suspended devices" "$(suspended_devices)" ""
    [ -z "$(find /mnt/scratch -name 'copy*' -o -name '*partial*')" ] || fail "left: $(ls -la /mnt/scratch)"
}

make_filesystem ext4 "$(disk 0)" /mnt/scratch
plug usborigin 64
plug usbstore 64
tidemark attach /dev/usborigin --name data
table_before=$(dmsetup table data)

note "the store's disk"
copied_without usbstore
grep -qi 'store' /run/copy.err || fail "the error does not name the store"
tidemark recover
assert_same "the table" "$(dmsetup table data)" "$table_before"
timeout 20 dd if=/dev/zero of=/dev/mapper/data bs=4k count=1 oflag=direct conv=notrunc status=none || fail "the origin does not go on"
assert_no_tidemark_left data
pack_up usbstore

note "the origin's disk"
plug usbstore 64
copied_without usborigin
for _ in 1 2; do
    assert_status 1 tidemark recover 2>/run/recover.err
    grep -q "remove it ('dmsetup remove data')" /run/recover.err || fail "nothing says what to do: $(cat /run/recover.err)"
done
assert_same "suspended devices" "$(suspended_devices)" ""
if timeout 20 dd if=/dev/zero of=/dev/mapper/data bs=4k count=1 oflag=direct conv=notrunc status=none; then
    fail "a disk that is gone was written"
fi
dmsetup remove --noudevsync data
tidemark recover
assert_no_tidemark_left data
unplug usbstore
pack_up usbstore
pack_up usborigin
