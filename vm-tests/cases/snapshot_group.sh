# Snapshots of several volumes at one instant: writes that depend on each other, raw and on ext4; a member that cannot be
# held; what is no group; a volume in a file of another one of the group.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_load.sh"

make_filesystem ext4 "$(disk 4)" /mnt/stores
number=0
for volume in wal data rawwal raw; do
    tidemark attach "$(disk $number)" --name $volume
    number=$((number + 1))
done
for volume in wal data; do make_filesystem ext4 /dev/mapper/$volume /mnt/$volume; done
no_snapshots() { # WHAT
    assert_same "$1: snapshots" "$(tidemark snapshot list --json | grep -c '@' || true)" 0
    assert_same "$1: devices" "$(dmsetup ls | grep -cE '[@#]' || true)" 0
    assert_same "$1: stores" "$(find /mnt/stores -name '*.store')" ""
    assert_same "$1: records" "$(find /var/lib/tidemark/snapshots -name '*.json')" ""
    assert_same "$1: suspended devices" "$(suspended_devices)" "${2:-}"
}
create() { tidemark snapshot create "$@" --store /mnt/stores --store-size 4MiB --freeze-budget 20s; }
answers() { # WHAT: both filesystems take writes
    local at
    for at in /mnt/wal /mnt/data; do
        timeout 20 dd if=/dev/zero of=$at/probe bs=4k count=1 conv=fsync status=none || fail "$1: $at does not answer"
    done
}

note "each instant of two pairs of writers"
timeout -s KILL 400 python3 "$REPO/vm-tests/cases/snapshot_group.py" instants 50 /mnt/stores wal=/mnt/wal:data=/mnt/data \
    rawwal:raw || fail "the instants"
no_snapshots "after 50 instants"

note "what is no group"
refused 3 'data is named twice' create data wal /dev/mapper/data
refused 3 'is not a volume' create data "$(disk 4)"
no_snapshots "refused"
create wal --name monday
refused 3 'wal@monday exists already' create data wal --name monday
assert_same "snapshots of data" "$(tidemark snapshot list data --json | grep -c '@' || true)" 0
create data wal >/run/created
grep -q 'data@1' /run/created && grep -q 'wal@1' /run/created || fail "not the first free number: $(cat /run/created)"
tidemark snapshot create data wal --dry-run --store /mnt/stores --json | python3 -c '
import json, sys
plan = json.loads(sys.stdin.readline())["plan"]
assert [one["name"] for one in plan["snapshots"]] == ["2", "2"], plan
assert plan["filesystems"] == ["/mnt/data", "/mnt/wal"] or plan["filesystems"] == ["/mnt/wal", "/mnt/data"], plan'

note "one member is deleted, the other stays"
tidemark snapshot delete data@1 --yes
tidemark snapshot show wal@1 --json | python3 -c '
import json, sys
shown = json.loads(sys.stdin.readline())["report"]
assert shown["group_snapshots"] == ["wal@1"] and shown["state"] == "valid", shown'
tidemark snapshot list | grep -q 'GROUP' || fail "the list does not show the group"
tidemark snapshot delete wal@1 wal@monday --yes
tidemark snapshot list | grep -q 'GROUP' && fail "a group is listed, and there is none"
no_snapshots "deleted"

note "a store that would wait for another member"
refused 3 'wait for the origin' tidemark snapshot create raw data --store /mnt/data
no_snapshots "a store on a member"

note "a member that cannot be frozen, and one that cannot be suspended"
fsfreeze -f /mnt/data
refused 3 'already frozen' create wal data rawwal
timeout 20 dd if=/dev/zero of=/mnt/wal/probe bs=4k count=1 conv=fsync status=none || fail "wal stays frozen with data"
no_snapshots "one was frozen"
fsfreeze -u /mnt/data
answers "one was frozen"
dmsetup suspend raw
refused 3 'raw' create wal data raw
answers "one was suspended"
no_snapshots "one was suspended" raw
dmsetup resume raw
# Its I/O in flight does not end: a device below it is suspended.
raw_disk=$(disk 3)
tidemark detach raw
dmsetup create slow --noudevsync --table "0 $(blockdev --getsz "$raw_disk") linear $raw_disk 0"
settle
slow_loop=$(losetup -f --show --direct-io=on /dev/mapper/slow)
tidemark attach "$slow_loop" --name raw
TIDEMARK_STOP_AT=capture.guard.after tidemark snapshot create wal data raw --store /mnt/stores --store-size 4MiB \
    --freeze-budget 10s >/run/out 2>&1 &
command=$!
wait_until 20 grep -q '^State:.*stopped' /proc/$command/status
dmsetup suspend slow
dd if=/dev/zero of=/dev/mapper/raw bs=4k count=1 oflag=direct status=none &
sleep 0.3
kill -CONT $command
status=0
wait $command || status=$?
[ "$status" = 1 ] && grep -qi 'budget' /run/out || { cat /run/out; fail "exit status $status"; }
answers "one could not be suspended"
no_snapshots "one could not be suspended" slow
dmsetup resume slow
wait

note "a hook that exceeds the budget"
status=0
tidemark snapshot create wal data raw --store /mnt/stores --store-size 4MiB --freeze-budget 1s \
    --hook-frozen 'sleep 30' >/run/out 2>&1 || status=$?
assert_same "exit status" "$status" 1
answers "a hook past the budget"
no_snapshots "a hook past the budget"

note "a hook that fails at the instant"
status=0 began=$SECONDS
tidemark snapshot create wal data raw --store /mnt/stores --store-size 4MiB --freeze-budget 60s \
    --hook-frozen 'exit 7' >/run/out 2>&1 || status=$?
assert_same "exit status" "$status" 1
# By the undo, and not by the watchdog at the end of the budget.
[ $((SECONDS - began)) -lt 30 ] || fail "the volumes were released after $((SECONDS - began)) s"
answers "a hook that fails"
no_snapshots "a hook that fails"

note "the hooks of a group"
create data wal --name hooks --hook-before 'echo "before $TIDEMARK_ORIGIN $TIDEMARK_ORIGINS" >>/run/hooks' \
    --hook-frozen 'echo frozen >>/run/hooks' --hook-after 'echo after >>/run/hooks'
assert_same "the hooks" "$(xargs </run/hooks)" \
    "before /dev/mapper/data /dev/mapper/data /dev/mapper/wal frozen after"
# What was begun is ended, once for all volumes, whatever fails.
for failing in before frozen; do
    rm -f /run/hooks
    assert_status 1 tidemark snapshot create wal data raw --store /mnt/stores --store-size 4MiB \
        "--hook-$failing" false --hook-after 'echo "after $TIDEMARK_ORIGINS" >>/run/hooks'
    assert_same "the end of the hooks" "$(cat /run/hooks)" "after /dev/mapper/wal /dev/mapper/data /dev/mapper/raw"
done
tidemark snapshot delete data@hooks --yes
tidemark snapshot delete wal@hooks --yes

note "a group of the configuration"
refused 3 'no file /etc/tidemark/groups.toml' tidemark snapshot create --group mail --store /mnt/stores
mkdir -p /etc/tidemark
cat >/etc/tidemark/groups.toml <<'END'
[group.mail]
volumes = ["wal", "data"]
freeze-budget = "1s"
hook-before = "echo group >>/run/named"
hook-frozen = "sleep 2"
hook-timeout = "3s"
END
refused 3 "no group 'web'" tidemark snapshot create --group web --store /mnt/stores
# The hook and the budget are those of the file: the hook takes too long.
assert_status 1 tidemark snapshot create --group mail --store /mnt/stores --store-size 4MiB
no_snapshots "a group whose hook takes too long"
status=0 began=$SECONDS
tidemark snapshot create --group mail --store /mnt/stores --store-size 4MiB --hook-before 'sleep 60' >/run/out 2>&1 \
    || status=$?
assert_same "exit status" "$status" 1
grep -q 'ran past --hook-timeout' /run/out && [ $((SECONDS - began)) -lt 40 ] || fail "$(cat /run/out)"
no_snapshots "a group whose hook hangs"
# Options come before the file.
create --group mail --name named --hook-frozen true
assert_same "the hook of the file" "$(xargs </run/named)" "group group"
assert_same "snapshots" "$(tidemark snapshot list --quiet | awk '/@/ { print $1 }' | sort | xargs)" "data@named wal@named"
for volume in data wal; do tidemark snapshot delete $volume@named --yes; done
echo 'hook-forzen = "x"' >>/etc/tidemark/groups.toml
status=0
tidemark snapshot create --group mail --store /mnt/stores 2>/run/out || status=$?
assert_same "exit status" "$status" 4
grep -q 'groups.toml, line 7: .*hook-forzen' /run/out || fail "no line is named: $(cat /run/out)"
chmod o+w /etc/tidemark/groups.toml
refused 3 'written by others' tidemark snapshot create --group mail --store /mnt/stores
no_snapshots "a bad file"

note "a volume in a file of another one of the group: with a filesystem, and written directly"
truncate -s 6M /mnt/data/image
loop=$(losetup -f --show /mnt/data/image)
tidemark attach "$loop" --name upper
for kind in ext4 raw; do
    if [ $kind = ext4 ]; then
        make_filesystem ext4 /dev/mapper/upper /mnt/upper
        pair=upper=/mnt/upper:data=/mnt/data
    else
        umount /mnt/upper
        pair=upper:rawwal
    fi
    timeout -s KILL 120 python3 "$REPO/vm-tests/cases/snapshot_group.py" instants 10 /mnt/stores "$pair" ||
        fail "the instants of $kind in a file"
    # Both orders of the command line, while the upper one is written; data is below it.
    python3 - $kind <<'END' &
import mmap, os, sys
path = "/mnt/upper/load" if sys.argv[1] == "ext4" else "/dev/mapper/upper"
file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
block = mmap.mmap(-1, 65536)
while True:
    for at in range(16):
        os.pwrite(file, block, at * 65536)
END
    load=$!
    for order in "upper data" "data upper" "wal data rawwal upper"; do
        # shellcheck disable=SC2086
        create $order --name nested >/run/created || fail "$order: $(cat /run/created)"
        note "$order, $kind: $(grep -E 'frozen|suspended' /run/created | xargs)"
        # shellcheck disable=SC2086
        for volume in $order; do tidemark snapshot delete $volume@nested --yes; done
    done
    kill $load
    wait $load || true
    no_snapshots "$kind in a file"
done
tidemark detach upper
losetup -d "$loop"
umount /mnt/data /mnt/wal
for volume in wal data rawwal raw; do tidemark detach $volume; done
losetup -d "$slow_loop"
dmsetup remove slow
assert_no_tidemark_left
