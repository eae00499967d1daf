# Attach, detach and their refusals. A mounted LVM volume is adopted, and afterwards has its own table again.
. "$REPO/vm-tests/cases/lib_stack.sh"

raw=$(disk 0)
mkfs.ext4 -q "$raw"
mkdir -p /mnt/data
mount "$raw" /mnt/data

refused() { # WHAT COMMAND...
    local what=$1 status=0
    shift
    "$@" >/run/out 2>&1 || status=$?
    assert_same "exit status of: $*" "$status" 3
    grep -q "$what" /run/out || fail "no message says '$what': $(cat /run/out)"
}

refused 'mounted' "$TIDEMARK" attach "$raw" --name data
umount /mnt/data
assert_status 2 "$TIDEMARK" attach "$raw" --name 'a/b'
"$TIDEMARK" attach "$raw" --name data --install-unit
ls /etc/systemd/system/tidemark-volume-data.service
settle
# Attaching the same device again is no error; attaching another device under the same name is.
"$TIDEMARK" attach "$raw" --name data
refused 'data' "$TIDEMARK" attach "$(disk 1)" --name data
mount "$(dm_node data)" /mnt/data
refused 'mounted' "$TIDEMARK" detach data
"$TIDEMARK" status | tee /run/status
grep -q data /run/status || fail "status does not show the volume"

# A stack beneath the attached volume: it cannot be detached meanwhile, and recover leaves the living job alone.
TABLE_BEFORE=$(dmsetup table data)
COW=$(stat -L -c '%Hr:%Lr' "$(disk 1)")
fresh_store
# Queue settings that an administrator has made survive insertion and removal.
queue=/sys/dev/block/$(stat -L -c '%Hr:%Lr' "$(dm_node data)")/queue
settings() { cat "$queue/read_ahead_kb" "$queue/max_sectors_kb" | xargs; }
echo 4096 >"$queue/read_ahead_kb"
echo 64 >"$queue/max_sectors_kb"
insert 20000 true
assert_same "read-ahead and largest request, over the stack" "$(settings)" "4096 64"
grep -q '^in place' "$REPORT" || fail "$(cat "$REPORT")"
refused 'being copied' "$TIDEMARK" detach data
"$TIDEMARK" recover
assert_stack_is_over data
# Recover leaves it alone also in another mount namespace, where it sees neither record nor lock of the job.
unshare -m sh -c "mount -t tmpfs none /run && '$TIDEMARK' recover && '$TIDEMARK' status" >"$ARTIFACTS/elsewhere" 2>&1 ||
    fail "recover in another namespace: $(cat "$ARTIFACTS/elsewhere")"
assert_stack_is_over data
grep -q 'runs in another mount namespace' "$ARTIFACTS/elsewhere" ||
    fail "status in another namespace does not show the job as alive: $(cat "$ARTIFACTS/elsewhere")"
remove_stack
assert_same "read-ahead and largest request, afterwards" "$(settings)" "4096 64"
assert_same "the table of data" "$(dmsetup table data)" "$TABLE_BEFORE"
umount /mnt/data
"$TIDEMARK" detach data
[ ! -e /etc/systemd/system/tidemark-volume-data.service ] || fail "the systemd unit is left"
assert_status 3 "$TIDEMARK" detach data
assert_no_tidemark_left
mount "$raw" /mnt/data
umount /mnt/data
e2fsck -fn "$raw"

# A mounted LVM volume with two segments.
wipefs -qa "$raw"
touch /run/lvm-in-use
pvcreate -qq "$raw"
vgcreate -qq vg "$raw"
lvcreate -qq -an -Zn -L 12m -n lv vg
lvcreate -qq -an -Zn -L 4m -n gap vg
lvextend -qq -L 20m vg/lv
vgchange -qq -ay vg
settle
mkfs.ext4 -q "$(dm_node vg-lv)"
mount "$(dm_node vg-lv)" /mnt/data
TABLE_BEFORE=$(dmsetup table vg-lv)
assert_same "segments" "$(wc -l <<<"$TABLE_BEFORE")" 2
fresh_store
insert_lv() {
    rm -f "$REPORT" /run/hold
    mkfifo /run/hold
    "$TIDEMARK" __stack "$REPORT" vg-lv "$COW" 20000 true /mnt/data </run/hold &
    HOLDER=$!
    exec 9>/run/hold
    wait_until 30 test -s "$REPORT"
}
insert_lv
grep -q '^in place' "$REPORT" || fail "$(cat "$REPORT")"
for command in lvs vgs lvdisplay pvs; do
    timeout 20 "$command" >/run/out 2>&1 || fail "$command does not work during a copy: $(cat /run/out)"
done
dd if=/dev/urandom of=/mnt/data/file bs=64k count=20 conv=fsync status=none
remove_stack
assert_same "the table of the LVM volume" "$(dmsetup table vg-lv)" "$TABLE_BEFORE"
assert_no_tidemark_left

# Another tool replaces the table during a copy: the copy says so, and the new table stays.
fresh_store
insert_lv
lvextend -qq -L 24m vg/lv
exec 9>&-
status=0
wait "$HOLDER" || status=$?
assert_same "exit status after a resize" "$status" 1
grep -q 'another tool replaced the table' "$REPORT" || fail "$(cat "$REPORT")"
assert_same "sectors" "$(blockdev --getsz "$(dm_node vg-lv)")" $((24 * 2048))
assert_same "suspended devices" "$(suspended_devices)" ""
assert_no_tidemark_left
umount /mnt/data
e2fsck -fn "$(dm_node vg-lv)"
vgchange -qq -an vg
