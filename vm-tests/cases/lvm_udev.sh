# Safety promise 3 on a real LVM stack, with systemd-udevd and the udev rules of device-mapper and LVM: a mounted
# logical volume is copied, LVM's commands work meanwhile, our internal devices are not scanned, and the table is
# identical afterwards.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_load.sh"

start_udevd

pvcreate -q -y "$(disk 0)"
vgcreate -q tidetest "$(disk 0)"
lvcreate -q -y -l 60%FREE -n data tidetest
lvcreate -q -y -l 100%FREE -n other tidetest
udevadm settle --timeout=60
origin=/dev/tidetest/data
[ -b "$origin" ] || fail "udev created no $origin: its rules are not active"
make_filesystem ext4 "$origin" /mnt/origin
make_filesystem ext4 "$(disk 1)" /mnt/scratch
uuid=$(blkid -s UUID -o value "$origin")
udevadm settle --timeout=60
link_before=$(readlink -f "/dev/disk/by-uuid/$uuid")
table_before=$(dmsetup table "$origin")
lv_before=$(lvs --noheadings -o lv_name,lv_size,lv_attr,lv_uuid,devices tidetest)
udevadm monitor --udev --property --subsystem-match=block >/run/udev-monitor.log 2>&1 &
monitor=$!
start_load /mnt/origin "$SEED"

tidemark copy "$origin" /mnt/scratch/copy.raw --all --yes --store /mnt/scratch --rate 8MiB --freeze-budget 120s \
    --hook-frozen "$(capture_hook /mnt/scratch/instant)" &
copy=$!
for _ in $(seq 600); do
    if is_preserved "$origin"; then break; fi
    kill -0 "$copy" || fail "the copy ended early"
    sleep 0.1
done
seen=0
while kill -0 "$copy" 2>/dev/null && [ "$seen" -lt 4 ]; do
    for command in "lvs -a" "vgs" "pvs" "lvdisplay tidetest"; do
        # shellcheck disable=SC2086
        timeout 60 $command >/run/lvm.out 2>/run/lvm.err || { cat /run/lvm.err; fail "'$command' failed during the copy"; }
        # LVM notices a table that is not its own and warns about lines of another type or size (released lines are
        # linear again). No other message is allowed.
        ! grep -viE 'segment type does not match|Cannot find matching [a-z-]+ segment' /run/lvm.err ||
            fail "'$command' complained during the copy: $(cat /run/lvm.err)"
    done
    [ "$(readlink -f "/dev/disk/by-uuid/$uuid")" = "$link_before" ] || fail "/dev/disk/by-uuid points elsewhere during the copy"
    for node in /sys/block/dm-*; do
        case "$(cat "$node/dm/uuid")" in
            LVM-TIDEMARK-*)
                udevadm info --query=property --path="$node" >/run/udev.props || true
                ! grep -qE '^(ID_FS_UUID|ID_FS_TYPE|DEVLINKS=.*by-uuid)' /run/udev.props ||
                    fail "udev scanned an internal device: $(cat /run/udev.props)"
                ;;
        esac
    done
    seen=$((seen + 1))
done
[ "$seen" -ge 1 ] || fail "the copy ended before LVM was queried"
wait "$copy" || fail "the copy failed"
load_is_alive
stop_load
kill "$monitor"
udevadm settle --timeout=60 || fail "udev hangs"
[ "$(dmsetup table "$origin")" = "$table_before" ] || fail "the table changed: $(dmsetup table "$origin")"
[ "$(lvs --noheadings -o lv_name,lv_size,lv_attr,lv_uuid,devices tidetest)" = "$lv_before" ] || fail "lvs shows something else than before"
assert_identical /mnt/scratch/copy.raw /mnt/scratch/instant
[ -z "$(ipcs -s | awk '$1 ~ /^0x0d4d/')" ] || fail "a udev cookie was left: $(ipcs -s)"
assert_no_tidemark_left
umount /mnt/origin
lvchange -an tidetest/data
lvchange -ay tidetest/data
filesystem_check ext4 "$origin"
