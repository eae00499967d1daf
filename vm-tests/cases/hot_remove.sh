# A virtio disk is removed during a copy, under a mounted and busy filesystem: its PCI function is removed, or its
# driver unbound. If the store's or the secondary's disk is removed, the copy fails in bounded time and says why; the
# origin has its own table again and no writer sees an error. If the origin's own disk is removed, nothing hangs, and
# the leftovers can be removed as the messages say.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_vanish.sh"

place_of() { readlink -f "/sys/class/block/${1#/dev/}/device"; }
remove() { echo 1 >"$(dirname "$(place_of "$1")")/remove"; }
unplug() { remove "$1"; }
unbind() { basename "$(place_of "$1")" >/sys/bus/virtio/drivers/virtio_blk/unbind; }
# plug_in NUMBER: makes the kernel find the disk again, perhaps under another name.
plug_in() {
    local function
    echo 1 >/sys/bus/pci/rescan
    for function in /sys/bus/virtio/devices/*; do
        [ "$(cat "$function/device")" != 0x0002 ] || [ -e "$function/driver" ] ||
            basename "$function" >/sys/bus/virtio/drivers/virtio_blk/bind
    done
    wait_until 10 has_disk "$1"
}
has_disk() { grep -qx "disk$1" /sys/block/vd*/serial; }

rounds() { cat /run/load.churn-rounds 2>/dev/null || echo 0; }
has_more_rounds_than() { [ "$(rounds)" -gt "$1" ]; }

# is_whole: the origin has its own table, and its writers continue without an error.
is_whole() {
    load_is_alive
    wait_until 60 has_more_rounds_than "$(rounds)"
    assert_same "the table" "$(dmsetup table data)" "$table_before"
}

says() { grep -q "$1" /run/copy.err || fail "the error does not say '$1': $(cat /run/copy.err)"; }
no_file_is_left() { [ -z "$(find /mnt/scratch -name 'copy*' -o -name '*partial*')" ] || fail "left: $(ls -la /mnt/scratch)"; }

tidemark attach "$(disk 0)" --name data
make_filesystem ext4 /dev/mapper/data /mnt/origin
make_filesystem ext4 "$(disk 3)" /mnt/scratch
table_before=$(dmsetup table data)
start_load /mnt/origin "$SEED"

note "the store, a device"
copied_without "$(disk 1)" /mnt/scratch/copy.raw "$(disk 1)"
says 'the COW store'
is_whole
assert_no_tidemark_left data
no_file_is_left
plug_in 1

note "the store, a file"
make_filesystem ext4 "$(disk 1)" /mnt/store
copied_without "$(disk 1)" /mnt/scratch/copy.raw /mnt/store
says 'the COW store'
is_whole
assert_no_tidemark_left data
no_file_is_left
umount /mnt/store
plug_in 1

note "the secondary, a device"
secondary=$(disk 2)
copied_without "$secondary" "$secondary" "$(disk 1)"
says "the secondary is gone: .* of $secondary"
is_whole
assert_no_tidemark_left data
plug_in 2

note "the secondary, a device that loses its driver"
secondary=$(disk 2)
unplug() { unbind "$1"; }
copied_without "$secondary" "$secondary" "$(disk 1)"
unplug() { remove "$1"; }
says "the secondary is gone: .* of $secondary"
is_whole
assert_no_tidemark_left data
plug_in 2

note "the secondary, a file"
make_filesystem ext4 "$(disk 2)" /mnt/secondary
copied_without "$(disk 2)" /mnt/secondary/copy.tdm "$(disk 1)"
says 'of /mnt/secondary/copy.tdm'
says 'not undone: remove the partial file'
says 'tidemark recover'
is_whole
# The partial file cannot be removed while its filesystem is mounted without a disk.
assert_status 1 tidemark recover
umount /mnt/secondary
tidemark recover
assert_no_tidemark_left data

stop_load
umount /mnt/origin
filesystem_check ext4 /dev/mapper/data

note "the origin"
mount /dev/mapper/data /mnt/origin
(while [ ! -e /run/no-writes ]; do dd if=/dev/urandom of=/mnt/origin/fio.dat bs=64k count=8 conv=fsync,notrunc status=none 2>/dev/null || sleep 0.1; done) &
writer=$!
copied_without "$(disk 0)" /mnt/scratch/copy.raw "$(disk 1)" --region 64MiB
touch /run/no-writes
wait "$writer"
says 'reading the origin failed'
says 'the disk [0-9:]* under data was removed'
no_file_is_left
tidemark status >/run/status.out
cat /run/status.out
grep -q "under data was removed: unmount data, remove it ('dmsetup remove data')" /run/status.out || fail "status does not say what to do"
! grep -q 'tidemark resume' /run/status.out || fail "status suggests resume"
fails_to_recover
timeout 60 umount /mnt/origin || fail "the filesystem cannot be unmounted"
dmsetup remove --noudevsync data
tidemark recover
assert_no_tidemark_left
