# Kept snapshots as users meet them: refusals with what to do instead, mounts, hooks, the monitor, full stores.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_load.sh"

raw=$(disk 0)
make_filesystem ext4 "$(disk 1)" /mnt/stores

refused() { # WHAT COMMAND...
    local what=$1 status=0
    shift
    "$@" >/run/out 2>&1 || status=$?
    [ "$status" = 3 ] || { cat /run/out; fail "exit status $status, expected 3: $*"; }
    grep -q -- "$what" /run/out || { cat /run/out; fail "no message says '$what': $*"; }
    grep -q 'next:' /run/out || { cat /run/out; fail "the refusal does not say what to do instead: $*"; }
}
create() { tidemark snapshot create data --store /mnt/stores "$@" >/run/created || fail "create: $(cat /run/created)"; }
state() { tidemark snapshot list data --json | python3 -c '
import json, sys
views = {view["snapshot"]: view["state"] for line in sys.stdin for view in json.loads(line)["report"]}
print(views.get(sys.argv[1], "gone"))' "$1"; }
field() { tidemark snapshot show "$1" --json | python3 -c '
import json, sys
print(json.loads(sys.stdin.readline())["report"][sys.argv[1]])' "$2"; }

note "what cannot have snapshots"
refused 'attach DEVICE' tidemark snapshot create "$raw" --store /mnt/stores
pvcreate -qq "$(disk 2)"
vgcreate -qq vg "$(disk 2)"
touch /run/lvm-in-use
lvcreate -qq -an -Zn -L 8m -n lv vg
vgchange -qq -ay vg
settle
refused 'attach DEVICE' tidemark snapshot create vg-lv --store /mnt/stores
vgremove -qqf vg
wipefs -qa "$(disk 2)"

tidemark attach "$raw" --name data
make_filesystem ext4 /dev/mapper/data /mnt/data
refused 'wait for the origin itself' tidemark snapshot create data --store /mnt/data
assert_status 2 tidemark snapshot create data --name 'a b' --store /mnt/stores
assert_status 2 tidemark snapshot create data --store "$(disk 2)"
refused 'no snapshot' tidemark snapshot delete data@none --yes
refused 'no snapshot' tidemark snapshot show data@none

note "what a snapshot shows while its filesystem goes on"
echo before >/mnt/data/file
create --name one --hook-before 'echo before >>/run/hooks' \
    --hook-frozen 'echo frozen >>/run/hooks' --hook-after 'echo after >>/run/hooks'
assert_same "the hooks" "$(xargs </run/hooks)" "before frozen after"
# What was begun is ended, whatever fails.
for failing in before frozen; do
    rm -f /run/hooks
    assert_status 1 tidemark snapshot create data --name not --store /mnt/stores \
        "--hook-$failing" 'echo failed >>/run/hooks; false' --hook-after 'echo after >>/run/hooks'
    assert_same "the end of the hooks" "$(tail -n 1 /run/hooks)" after
done
refused 'no snapshot' tidemark snapshot show data@not
echo between >/mnt/data/file
create --name two
echo after >/mnt/data/file
sync
refused 'exists already' tidemark snapshot create data --name one --store /mnt/stores
assert_status 2 tidemark snapshot create data --chunk 64KiB --store /mnt/stores
mkdir -p /mnt/one /mnt/two
tidemark snapshot mount data@one /mnt/one
tidemark snapshot mount data@two /mnt/two
assert_same "the file in the first snapshot" "$(cat /mnt/one/file)" before
assert_same "the file in the second" "$(cat /mnt/two/file)" between
assert_same "the file now" "$(cat /mnt/data/file)" after
! touch /mnt/one/x 2>/dev/null || fail "a snapshot was written"
! dd if=/dev/zero of=/dev/mapper/data@one bs=4k count=1 2>/dev/null || fail "a snapshot's device was written"
refused 'mounted at /mnt/one' tidemark snapshot delete data@one --yes
refused 'data is mounted' tidemark detach data
[ "$(field data@two receives)" = True ] || fail "the newest does not receive"
[ "$(field data@one receives)" = False ] || fail "an older one receives"
[ "$(field data@one chunks_changed)" -gt 0 ] || fail "nothing has changed between the two"
tidemark snapshot show data@one
tidemark status | grep -q 'data@one' || fail "status does not show the snapshots"
umount /mnt/one /mnt/two
e2fsck -fn /dev/mapper/data@one >/run/fsck 2>&1 || fail "fsck of a snapshot: $(cat /run/fsck)"

note "internal devices are not found by their contents"
uuid=$(blkid -s UUID -o value "$raw")
found=$(blkid -t UUID="$uuid" -o device)
assert_same "devices with this UUID" "$(grep -c data <<<"$found" || true)" "$(grep -cx /dev/mapper/data <<<"$found" || true)"

note "the snapshots of a volume that was detached, in order and not"
umount /mnt/data
refused 'has 2 snapshots' tidemark detach data
tidemark detach data --keep-snapshots
refused 'not attached' tidemark snapshot delete data@one --yes
assert_same "its state meanwhile" "$(state data@one)" not-attached
tidemark attach "$raw" --name data
assert_same "its state afterwards" "$(state data@one)" valid
# What a reboot leaves: the records and the files, and nothing in the kernel.
forget() {
    dmsetup remove data
    # A device that another one uses goes in a later pass.
    for _ in 1 2 3 4 5 6; do
        dmsetup ls | awk '/^data[@#]/ { print $1 }' | xargs -r -n 1 dmsetup remove 2>/dev/null || true
    done
}
note "without an order: what ext4 notes of its mounts decides"
forget
assert_same "devices left" "$(dmsetup ls | grep -c '^data' || true)" 0
tidemark attach "$raw" --name data
assert_same "its state after a crash" "$(state data@one)" valid
tidemark monitor 2>/dev/null &
monitor=$!
recorded() { grep -q "dirty $1" /var/lib/tidemark/snapshots/*.json; }
mount /dev/mapper/data /mnt/data
wait_until 20 recorded 1
echo more >/mnt/data/file
umount /mnt/data
wait_until 20 recorded 0
kill "$monitor"
wait "$monitor"
forget
tidemark attach "$raw" --name data
assert_same "its state after mounts that the monitor saw" "$(state data@one)" valid
tidemark detach data --keep-snapshots
mount "$raw" /mnt/data
umount /mnt/data
tidemark attach "$raw" --name data 2>/run/attach.err
grep -q 'lost' /run/attach.err || fail "attach does not say that the snapshots are lost: $(cat /run/attach.err)"
assert_same "its state after a mount without it" "$(state data@one)" invalid
field data@one lost | grep -q 'was written' || fail "no reason is given"
assert_status 1 tidemark status --check
assert_same "the volume's table" "$(dmsetup table data | cut -d' ' -f3)" linear
tidemark snapshot delete data@one data@two --yes
assert_same "stores left" "$(find /mnt/stores -name '*.store')" ""
assert_no_snapshot_devices() { assert_same "devices left" "$(dmsetup ls | grep -c '^data[@#]' || true)" 0; }
assert_no_snapshot_devices
mount /dev/mapper/data /mnt/data

note "a store that fills takes its snapshot and the older ones, and no other"
create --name a --store-size 4MiB
create --name b --store-size 4MiB
dd if=/dev/urandom of=/mnt/data/big bs=1M count=12 oflag=direct status=none
sync
assert_same "the snapshot whose store was full" "$(state data@b)" invalid
assert_same "the older one" "$(state data@a)" needs-lost
create --name c
head -c 100k /dev/urandom >/mnt/data/more
sync
assert_same "a new one beside them" "$(state data@c)" valid
assert_status 1 tidemark status --check
tidemark snapshot delete data@b --yes
assert_same "a, which needed b" "$(state data@a)" invalid
assert_same "c, which did not" "$(state data@c)" valid
mkdir -p /mnt/third
tidemark snapshot mount data@c /mnt/third
cmp /mnt/third/big /mnt/data/big || fail "c does not show its instant"
[ ! -e /mnt/third/more ] || fail "c shows what was written later"
umount /mnt/third
tidemark snapshot delete data@a data@c --yes
assert_no_snapshot_devices

note "the monitor enlarges a store in time, and says when it cannot"
tidemark monitor --hook 'echo "$TIDEMARK_EVENT $TIDEMARK_SNAPSHOT" >>/run/events' 2>/run/monitor.err &
monitor=$!
sleep 1
refused 'another monitor' tidemark monitor
create --name d --store-size 4MiB
tidemark status --check >/run/check || { cat /run/check; fail "status --check with a monitor"; }
for i in 1 2 3 4 5 6; do
    dd if=/dev/urandom of=/mnt/data/big bs=1M count=2 seek=$((i * 2)) conv=notrunc oflag=direct status=none
    sleep 0.6
done
assert_same "the snapshot whose store had 4 MiB" "$(state data@d)" valid
grep -q 'grown data@d' /run/events || fail "no event: $(cat /run/events /run/monitor.err)"
kill "$monitor"
wait "$monitor" || fail "the monitor ended with $?: $(cat /run/monitor.err)"
assert_status 1 tidemark status --check
tidemark snapshot delete data@d --yes

note "the monitor deletes the oldest to make room, if it may"
tidemark monitor --auto-delete oldest --hook 'echo "$TIDEMARK_EVENT $TIDEMARK_SNAPSHOT" >>/run/events' 2>/run/monitor.err &
monitor=$!
create --name old --store-size 24MiB
wait_until 20 grep -q 'grown data@old' /run/events
# The file system keeps a twentieth of its size as a reserve; beyond it there are 5 MiB.
block=$(stat -f -c %S /mnt/stores)
free=$(($(stat -f -c %a /mnt/stores) * block / 1048576))
size=$(($(stat -f -c %b /mnt/stores) * block / 1048576))
fallocate -l $((free - size / 20 - 5))M /mnt/stores/filler
create --name new --store-size 4MiB
for i in $(seq 1 18); do
    dd if=/dev/urandom of=/mnt/data/big bs=256k count=1 seek=$i conv=notrunc oflag=direct status=none
    sleep 0.8
    if grep -q 'grown data@new' /run/events; then break; fi
done
sed "s/^/monitor: /" /run/events /run/monitor.err
assert_same "the oldest" "$(state data@old)" gone
assert_same "the newest" "$(state data@new)" valid
grep -q 'deleted data@old' /run/events || fail "no event: $(cat /run/events /run/monitor.err)"
grep -q 'nearly-full data@new' /run/events || fail "no warning: $(cat /run/events /run/monitor.err)"
kill "$monitor"
wait "$monitor" || fail "the monitor ended with $?"
tidemark snapshot delete data@new --yes
rm /mnt/stores/filler

umount /mnt/data
tidemark detach data
assert_no_tidemark_left
