# Kept snapshots and a clone beside systemd-udevd, LVM and udisks: they show the filesystems and physical volumes of their
# volumes a second time, and no tool finds them by what they hold, also not after events that every device gets again.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_load.sh"

start_udevd
mkdir -p /run/dbus
dbus-daemon --system --fork --nopidfile
# ask_udisks: writes what a udisks daemon that starts now finds to /run/udisks.
ask_udisks() {
    local daemon
    /usr/libexec/udisks2/udisksd --replace >/run/udisksd.log 2>&1 &
    daemon=$!
    wait_until 60 grep -q 'Acquired the name' /run/udisksd.log
    # It probes the devices beside that.
    for _ in $(seq 20); do
        udisksctl dump >/run/udisks
        [ -z "$(found_by_udisks "$fs")" ] || [ -z "$(found_by_udisks "$xfs")" ] || break
        sleep 1
    done
    kill "$daemon"
    wait "$daemon" || true
}
# Names of the device-mapper devices on which udisks found something with this UUID.
found_by_udisks() {
    awk -v uuid="$1" '$1 == "Device:" { at = $2 } $1 == "IdUUID:" && $2 == uuid { print at }' /run/udisks |
        while read -r at; do cat "/sys/class/block/${at##*/}/dm/name" 2>/dev/null || true; done | xargs
}

make_filesystem ext4 "$(disk 2)" /mnt/stores
tidemark attach "$(disk 0)" --name data
tidemark attach "$(disk 1)" --name pv
make_filesystem ext4 /dev/mapper/data /mnt/data
# As on any stack of devices, LVM has to be told which one it is to use; the snapshots need no line.
printf 'devices {\n global_filter = ["r|^%s$|"]\n}\n' "$(disk 1)" >/etc/lvm/lvmlocal.conf
pvcreate -q -y /dev/mapper/pv
vgcreate -q tidetest /dev/mapper/pv
lvcreate -q -y -n lv -l 90%FREE tidetest
make_filesystem xfs /dev/tidetest/lv /mnt/lv
udevadm settle --timeout=60
fs=$(blkid -s UUID -o value /dev/mapper/data)
xfs=$(blkid -s UUID -o value /dev/tidetest/lv)
links() {
    local link at
    for link in $(find /dev/disk /dev/tidetest -type l | grep -vE '/by-(id/(dm-uuid|dm-name)|diskseq)' | sort); do
        at=$(readlink -f "$link")
        echo "$link $(cat "/sys/class/block/${at##*/}/dm/name" 2>/dev/null || echo "$at")"
    done
}
lvm() { pvs --noheadings -o pv_name,pv_uuid,pv_missing,pv_duplicate && lvs --noheadings -o lv_name,lv_uuid,devices; }

{ links; lvm; } >/run/before
echo first >/mnt/data/file
tidemark snapshot create data pv --name one --store /mnt/stores --freeze-budget 60s
dd if=/dev/urandom of=/mnt/data/file bs=64k count=16 conv=fsync status=none
dd if=/dev/urandom of=/mnt/lv/file bs=64k count=16 conv=fsync status=none
tidemark snapshot create data pv --name two --store /mnt/stores --freeze-budget 60s
tidemark snapshot clone pv@one --name clone --store /mnt/stores
tidemark snapshot clone data@two --name clone --store /mnt/stores

# nothing_is_found WHEN: every tool finds what it found before there were snapshots.
nothing_is_found() {
    udevadm settle --timeout=60 || fail "udev hangs $1"
    { links; lvm 2>/run/lvm.err; } >/run/now
    diff /run/before /run/now || fail "links and LVM $1"
    ! grep -i duplicate /run/lvm.err || fail "LVM finds duplicates $1"
    pvscan >/run/lvm.out 2>&1 || { cat /run/lvm.out; fail "pvscan $1"; }
    ! grep -iE 'duplicate|@|#' /run/lvm.out || fail "pvscan finds snapshots $1"
    ask_udisks
    assert_same "udisks $1" "$(found_by_udisks "$fs") $(found_by_udisks "$xfs")" "data tidetest-lv"
    for node in /sys/block/dm-*; do
        case "$(cat "$node/dm/uuid")" in
            TIDEMARK-*-volume-*) ;;
            *TIDEMARK*)
                udevadm info --query=property --path="$node" >/run/properties || true
                ! grep -E '^(ID_FS_|SYSTEMD_WANTS|DEVLINKS=.*by-(uuid|label))' /run/properties ||
                    fail "udev scanned $(cat "$node/dm/name") $1"
                ;;
        esac
    done
}

nothing_is_found "at first"
udevadm trigger --action=change --subsystem-match=block
nothing_is_found "after a change of every device"
udevadm trigger --action=add --subsystem-match=block
nothing_is_found "after every device was added again"
# What is opened for writing and closed gets an event.
for clone in data@clone pv@clone; do
    dd if=/dev/urandom of="/dev/mapper/$clone" bs=4k seek=512 count=1 conv=notrunc,fsync status=none
done
nothing_is_found "after writes to the clones"
tidemark snapshot rollback data@one --only /mnt/data/file --yes
assert_same "the file" "$(cat /mnt/data/file)" first
nothing_is_found "after files went back"

umount /mnt/data
mount "UUID=$fs" /mnt/data
assert_same "what is mounted by UUID" "$(findmnt -no SOURCE /mnt/data)" /dev/mapper/data
umount /mnt/data
umount /mnt/lv
vgchange -q -an tidetest
tidemark snapshot delete data@clone --yes
tidemark snapshot delete pv@clone --yes
tidemark detach data --keep-snapshots
tidemark detach pv --keep-snapshots
tidemark attach "$(disk 0)" --name data
tidemark attach "$(disk 1)" --name pv
vgchange -q -ay tidetest
nothing_is_found "after they were put together again"

vgchange -q -an tidetest
tidemark snapshot delete data@one data@two --yes
tidemark snapshot delete pv@one pv@two --yes
tidemark detach data
tidemark detach pv
umount /mnt/stores
assert_no_tidemark_left
