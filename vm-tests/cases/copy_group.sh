# Copies of several volumes from one instant: writes that depend on each other, on ext4 and xfs; equal to what the
# volumes held at the instant; a member that fails, before the instant and after it; what is refused; hooks; kills at
# every step.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_load.sh"

make_filesystem ext4 "$(disk 2)" /mnt/scratch
tidemark attach "$(disk 0)" --name wal
tidemark attach "$(disk 1)" --name data
make_filesystem ext4 /dev/mapper/wal /mnt/wal
make_filesystem xfs /dev/mapper/data /mnt/data
mkdir /mnt/scratch/out /mnt/scratch/stores
tables=$(dmsetup table wal; dmsetup table data)
options=(--yes --store /mnt/scratch/stores --store-ram 2MiB --freeze-budget 20s)

nothing_left() { # WHAT
    assert_same "$1: the tables" "$(dmsetup table wal; dmsetup table data)" "$tables"
    assert_same "$1: partial files" "$(find /mnt/scratch -name '.*tidemark-partial*')" ""
    assert_same "$1: stores" "$(find /mnt/scratch/stores /run/tidemark/stores -type f)" ""
    assert_same "$1: suspended devices" "$(suspended_devices)" ""
    assert_same "$1: tickets" "$(find /run/tidemark -path '*/disks/*.json')" ""
    assert_no_tidemark_left wal data
}
answers() { # WHAT: both filesystems take writes
    local at
    for at in /mnt/wal /mnt/data; do
        timeout 30 dd if=/dev/zero of=$at/probe bs=4k count=1 conv=fsync status=none || fail "$1: $at does not answer"
    done
}
# refused_whole STATUS WORDS COMMAND...: as refused, and nothing is left of it
refused_whole() {
    refused "$@"
    nothing_left "${*:3}"
}

note "each instant of a pair of writers"
rounds=$([ "$MACHINE" = um ] && echo 12 || echo 3)
timeout -s KILL 400 python3 "$REPO/vm-tests/cases/copy_group.py" /mnt/scratch/out "$rounds" \
    wal=/mnt/wal:data=/mnt/data "${options[@]}" || fail "the instants"
nothing_left "after the instants"
rm /mnt/scratch/out/*

note "the copies are what the volumes held at the instant; archives; hooks"
head -c 8M /dev/urandom >/mnt/wal/file
head -c 8M /dev/urandom >/mnt/data/file
cat >/run/frozen.sh <<'END'
set -- $TIDEMARK_ORIGINS_BELOW
dd if=$1 of=/mnt/scratch/data.then bs=1M iflag=direct conv=fsync status=none
dd if=$2 of=/mnt/scratch/wal.then bs=1M iflag=direct conv=fsync status=none
END
(while [ ! -e /run/stop ]; do
    dd if=/dev/urandom of=/mnt/wal/file bs=64k count=16 seek=$((RANDOM % 100)) conv=notrunc,fsync status=none
    dd if=/dev/urandom of=/mnt/data/file bs=64k count=16 seek=$((RANDOM % 100)) conv=notrunc,fsync status=none
done) &
load=$!
tidemark copy --pair data=/mnt/scratch/out/d.tdm --pair wal=/mnt/scratch/out/w.img "${options[@]}" --all --rate 32MiB \
    --hook-before 'echo "before $TIDEMARK_ORIGIN $TIDEMARK_ORIGINS" >>/run/hooks' \
    --hook-frozen 'sh /run/frozen.sh; echo frozen >>/run/hooks' \
    --hook-after 'echo after >>/run/hooks' >/run/report 2>/run/progress &
copy=$!
wait_until 60 grep -q '/dev/mapper/wal: copying' /run/progress
tidemark status >/run/status
wait $copy || { cat /run/progress; fail "the copy"; }
assert_same "the hooks" "$(xargs </run/hooks)" "before /dev/mapper/data /dev/mapper/data /dev/mapper/wal frozen after"
for volume in data wal; do
    grep -q "^  */dev/mapper/$volume$" /run/status || fail "no progress of $volume in status: $(cat /run/status)"
done
same_bytes /mnt/scratch/out/w.img /mnt/scratch/wal.then
tidemark restore /mnt/scratch/out/d.tdm /mnt/scratch/out/d.img
same_bytes /mnt/scratch/out/d.img /mnt/scratch/data.then
touch /run/stop
wait $load
nothing_left "archives"
rm /mnt/scratch/out/* /mnt/scratch/*.then

note "a plan"
tidemark copy wal data /mnt/scratch/out "${options[@]}" --dry-run --json | python3 -c '
import json, sys
plan = json.loads(sys.stdin.readline())["plan"]
secondaries = [one["request"]["secondary"]["path"] for one in plan["copies"]]
assert secondaries == ["/mnt/scratch/out/wal.tdm", "/mnt/scratch/out/data.tdm"], plan
assert sorted(plan["filesystems"]) == ["/mnt/data", "/mnt/wal"], plan
assert [step["name"] for step in plan["steps"]["steps"]].count("instant") == 1, plan'
tidemark copy wal data /mnt/scratch/out "${options[@]}" --dry-run | grep -q '^step  *suspend-2$' || fail "the plan as text"
nothing_left "a plan"

note "what is refused"
refused_whole 3 "is named twice" tidemark copy --pair data=/mnt/scratch/x --pair wal=/mnt/scratch/y \
    --pair /dev/mapper/data=/mnt/scratch/z "${options[@]}"
refused_whole 2 "would both be copied to" tidemark copy data wal /dev/mapper/data /mnt/scratch/out "${options[@]}"
refused_whole 3 'secondary of two origins' tidemark copy --pair data=/mnt/scratch/x --pair wal=/mnt/scratch/x "${options[@]}"
refused_whole 3 'no instant to share' tidemark copy data "$(disk 3)" /mnt/scratch/out "${options[@]}"
refused_whole 3 'may wait for\|wait for the origin' tidemark copy data wal /mnt/scratch/out --yes --store /mnt/wal
refused_whole 3 'belongs to the origin' tidemark copy --pair data=/mnt/wal/x --pair wal=/mnt/scratch/x "${options[@]}"
refused_whole 2 'have a store each' tidemark copy data wal /mnt/scratch/out --yes --store /mnt/scratch/new
refused_whole 2 'for one origin' tidemark copy data wal /mnt/scratch/out "${options[@]}" --since x
refused_whole 3 'no file /etc/tidemark/groups.toml' tidemark copy --group mail /mnt/scratch/out "${options[@]}"

note "a member whose secondary cannot be opened, and one that cannot be frozen: nothing is copied"
refused_whole 3 'nowhere' tidemark copy --pair data=/mnt/scratch/out/d.img --pair wal=/mnt/scratch/nowhere/x "${options[@]}"
# The plan does not see that this filesystem has no inode left.
truncate -s 2M /run/few
mkfs.ext4 -q -F -N 16 /run/few
mkdir -p /mnt/few
mount -o loop /run/few /mnt/few
while touch "/mnt/few/$RANDOM$RANDOM" 2>/dev/null; do :; done
for pairs in "data=/mnt/few/d wal=/mnt/scratch/out/w" "wal=/mnt/scratch/out/w data=/mnt/few/d"; do
    # shellcheck disable=SC2046,SC2086
    refused_whole 1 '/mnt/few' tidemark copy $(printf -- '--pair %s ' $pairs) "${options[@]}" --hook-before 'touch /run/begun'
done
[ ! -e /run/begun ] || fail "the hook ran, although a secondary could not be opened"
umount /mnt/few
fsfreeze -f /mnt/data
status=0
tidemark copy wal data /mnt/scratch/out "${options[@]}" >/run/out 2>&1 || status=$?
assert_same "exit status" "$status" 3
timeout 20 dd if=/dev/zero of=/mnt/wal/probe bs=4k count=1 conv=fsync status=none || fail "wal stays frozen with data"
fsfreeze -u /mnt/data
answers "one was frozen"
refused_whole 1 'hook-frozen' tidemark copy wal data /mnt/scratch/out "${options[@]}" --hook-frozen 'exit 7'
assert_same "results" "$(ls /mnt/scratch/out)" ""

note "a group of the configuration"
mkdir -p /etc/tidemark
cat >/etc/tidemark/groups.toml <<'END'
[group.mail]
volumes = ["wal", "data"]
hook-after = "echo named >>/run/named"
END
tidemark copy --group mail /mnt/scratch/out --yes --store /mnt/scratch/stores --quiet
assert_same "the hook of the file" "$(cat /run/named)" named
for volume in wal data; do tidemark verify /mnt/scratch/out/$volume.tdm --quiet; done
nothing_left "a named group"
rm /mnt/scratch/out/*

note "one origin's secondary is full, and another's store overflows: the others are finished"
truncate -s 24M /run/small
mkfs.ext4 -q -F -m 0 /run/small
mkdir -p /mnt/small
mount -o loop /run/small /mnt/small
head -c 40M /dev/urandom >/mnt/data/big
sync -f /mnt/data
status=0
tidemark copy --pair data=/mnt/small/d.tdm --pair wal=/mnt/scratch/out/w.tdm "${options[@]}" --json \
    >/run/out 2>/run/err || status=$?
assert_same "exit status" "$status" 1
grep -q '1 of 2 copies failed, that of /dev/mapper/data' /run/err || fail "$(cat /run/err)"
grep -q 'complete, and of the same instant: /mnt/scratch/out/w.tdm' /run/err || fail "$(cat /run/err)"
python3 - <<'END'
import json
report = next(line["report"] for line in map(json.loads, open("/run/out")) if line["type"] == "result")
data, wal = report["origins"]
assert data["error"] and data["copy"] is None, data
assert wal["error"] is None and wal["copy"]["secondary"] == "/mnt/scratch/out/w.tdm", wal
END
tidemark verify /mnt/scratch/out/w.tdm --quiet
nothing_left "a full secondary"
umount /mnt/small
rm /mnt/scratch/out/*
(while [ ! -e /run/stop.full ]; do
    dd if=/dev/urandom of=/mnt/data/big bs=1M count=40 conv=notrunc,fsync status=none
done) &
load=$!
status=0
tidemark copy wal data /mnt/scratch/out --yes --store /mnt/scratch/stores --store-size 4MiB --store-ram 0 --rate 4MiB \
    --freeze-budget 20s >/run/out 2>/run/err || status=$?
touch /run/stop.full
wait $load
assert_same "exit status" "$status" 1
grep -q 'NOT COPIED: /dev/mapper/data' /run/out || { cat /run/out /run/err; fail "the report does not name data"; }
tidemark verify /mnt/scratch/out/wal.tdm --quiet
assert_same "results" "$(ls /mnt/scratch/out)" wal.tdm
nothing_left "an overflow"
rm /mnt/scratch/out/*

note "a signal gives up all"
tidemark copy wal data /mnt/scratch/out "${options[@]}" --rate 1MiB >/run/out 2>/run/err &
copy=$!
wait_until 60 is_preserved /dev/mapper/data
kill -TERM $copy
status=0
wait $copy || status=$?
assert_same "exit status" "$status" 130
nothing_left "a signal"
assert_same "results" "$(ls /mnt/scratch/out)" ""

note "killed at every step"
count=0
for point in copy.store.before copy.store.before:2 store.create.record:2 store.create.head:2 store.create.tail:2 \
    copy.store.after copy.store.after:2 $(for step in own-2 create-real create-snap-2 claim-2 load-preserve-2 guard freeze \
        load-origin load-origin-2 suspend suspend-2 instant switch-2 switch thaw unguard expect-2; do
        echo insert.$step.before insert.$step.after
    done) copy.group.held copy.data.before copy.data.before:2 release.swap.before release.swap.after copy.data.after \
    copy.release.before copy.release.before:2 store.release.device store.release.device:2 copy.release.after copy.release.after:2; do
    status=0
    TIDEMARK_CRASH_AT=$point tidemark copy wal data /mnt/scratch/out "${options[@]}" >/run/out 2>&1 || status=$?
    assert_same "exit status at $point" "$status" 137
    answers "$point"
    if [ $point = copy.data.before ]; then
        id=$(find /run/tidemark -maxdepth 1 -name '*.json' -printf '%f\n')
        for words in "" "${id%.json}"; do
            # shellcheck disable=SC2086
            tidemark resume $words >/run/out 2>&1 && fail "several origins were resumed"
        done
        grep -q 'several origins' /run/out || { cat /run/out; fail "the refusal gives no reason"; }
        tidemark status | grep -q "job ${id%.json} died: run 'tidemark recover'" || fail "$(tidemark status)"
    fi
    tidemark recover >/run/out || fail "$point: recover: $(cat /run/out)"
    nothing_left "$point"
    answers "$point"
    rm -f /mnt/scratch/out/*
    count=$((count + 1))
done
note "$count kills"
for round in 1 2 3; do
    tidemark copy wal data /mnt/scratch/out "${options[@]}" --rate 4MiB >/run/out 2>&1 &
    copy=$!
    wait_until 60 is_preserved /dev/mapper/data
    sleep "0.$(rand "moment-$round" 0 9)"
    kill -KILL $copy
    wait $copy || true
    # The first one recovering dies, too.
    [ $round != 2 ] || TIDEMARK_CRASH_AT=recover-restore.switch.after tidemark recover || true
    tidemark recover >/run/out || fail "round $round: recover: $(cat /run/out)"
    nothing_left "round $round"
    answers "round $round"
done
umount /mnt/data /mnt/wal
e2fsck -fn /dev/mapper/wal >/run/fsck 2>&1 || { cat /run/fsck; fail "wal"; }
xfs_repair -n /dev/mapper/data >/run/fsck 2>&1 || { cat /run/fsck; fail "data"; }
for volume in wal data; do tidemark detach $volume; done
assert_no_tidemark_left
