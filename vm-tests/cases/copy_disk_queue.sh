# Copies from one rotating disk take turns: shown by status; a killed one, one that is stopped by a signal and one that
# ends let the next one go on; copies from another disk, from solid state and with --no-wait do not wait. Several origins
# on one disk are copied one after the other.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_load.sh"

make_filesystem ext4 "$(disk 2)" /mnt/scratch
mkdir /mnt/scratch/stores
rotates() { echo "$2" >"/sys/block/$(basename "$1")/queue/rotational"; }
rotates "$(disk 0)" 1
rotates "$(disk 1)" 0
# Two volumes on one disk, by a partition each of device-mapper, and one on another.
half=$(($(blockdev --getsz "$(disk 0)") / 2))
dmsetup create --noudevsync one --table "0 $half linear $(disk 0) 0"
dmsetup create --noudevsync two --table "0 $half linear $(disk 0) $half"
dmsetup create --noudevsync other --table "0 $half linear $(disk 1) 0"
settle
for volume in one two other; do
    dd if=/dev/urandom of=/dev/mapper/$volume bs=1M count=16 oflag=direct conv=fsync status=none
done
options=(--yes --store /mnt/scratch/stores --store-ram 0 --segment 64KiB)
copying() { tidemark status --json | python3 -c '
import json, sys
for one in json.loads(sys.stdin.readline())["report"]["disks"]:
    print(one["origins"], "waits" if one["waits"] else "reads")'; }
in_line() { [ "$(copying | xargs)" = "$1" ]; }
as_told() { wait_until 30 in_line "$1" || fail "the queue is $(copying | xargs), not $1"; }
start() { # VOLUME RATE [OPTION...]: process $!
    tidemark copy "$1" "/mnt/scratch/$1.img" "${options[@]}" --rate "$2" "${@:3}" >"/run/$1.out" 2>"/run/$1.err" &
}

note "the second waits for the first, frozen is nothing; status shows it"
start one 1MiB
first=$!
as_told "/dev/mapper/one reads"
start two 1GiB --hook-before 'date +%s.%N >/run/two.begun'
second=$!
as_told "/dev/mapper/one reads /dev/mapper/two waits"
tidemark status >/run/status
grep -q "waits for disk $(disk 0), used by job [0-9a-f]* (process $first)" /run/status || fail "$(cat /run/status)"
grep -q "waiting: /dev/mapper/one is copied from the rotating disk $(disk 0) (process $first)" /run/two.err ||
    fail "$(cat /run/two.err)"
! is_preserved /dev/mapper/two || fail "the second has its snapshot while it waits"
assert_same "devices of the second" "$(dmsetup ls | grep -c '^two[#]' || true)" 0
note "another disk, and one that does not wait"
start other 1GiB
wait $! || fail "other: $(cat /run/other.err)"
kill -0 $first || fail "the first has ended too early"
in_line "/dev/mapper/one reads /dev/mapper/two waits" || fail "the queue is $(copying)"
kill -TERM $second
status=0
wait $second || status=$?
assert_same "exit status of one that waits, after a signal" "$status" 130
[ ! -e /run/two.begun ] || fail "the hook ran before the turn"
as_told "/dev/mapper/one reads"
start two 1GiB --no-wait
wait $! || fail "two: $(cat /run/two.err)"
kill -0 $first || fail "the first has ended too early"
wait $first || fail "one: $(cat /run/one.err)"
as_told ""

note "the end of one is the beginning of the next"
start one 4MiB --hook-after 'date +%s.%N >/run/one.begun'
first=$!
as_told "/dev/mapper/one reads"
start two 8MiB --hook-before 'date +%s.%N >/run/two.begun'
second=$!
as_told "/dev/mapper/one reads /dev/mapper/two waits"
wait $first || fail "one: $(cat /run/one.err)"
ended=$(date +%s.%N)
wait $second || fail "two: $(cat /run/two.err)"
python3 -c '
import sys
begun, ended = float(open("/run/two.begun").read()), float(sys.argv[1])
assert -1 < begun - ended < 5, (begun, ended)' "$ended"
for volume in one two; do same_bytes /mnt/scratch/$volume.img /dev/mapper/$volume; done

note "killed holders and killed waiters"
for round in 1 2 3; do
    start one 2MiB
    first=$!
    as_told "/dev/mapper/one reads"
    start two 1GiB
    second=$!
    as_told "/dev/mapper/one reads /dev/mapper/two waits"
    tidemark copy "$(disk 0)" /mnt/scratch/cold.img --yes >/run/cold.out 2>&1 && fail "a disk in use was copied"
    if [ $round = 2 ]; then
        kill -KILL $second
        wait $second || true
        as_told "/dev/mapper/one reads"
        start two 1GiB
        second=$!
    fi
    kill -KILL $first
    wait $first || true
    wait $second || fail "round $round: two: $(cat /run/two.err)"
    same_bytes /mnt/scratch/two.img /dev/mapper/two
    tidemark recover >/run/recovered || fail "recover: $(cat /run/recovered)"
    assert_same "tickets" "$(find /run/tidemark/disks -type f)" ""
    rm -f /mnt/scratch/*.img
done

note "a copy that is resumed does not wait, and others wait for it"
start one 4MiB
first=$!
wait_until 30 is_preserved /dev/mapper/one
sleep 1
kill -KILL $first
wait $first || true
start two 512KiB
second=$!
as_told "/dev/mapper/two reads"
tidemark resume >/run/out 2>&1 || fail "resume: $(cat /run/out)"
same_bytes /mnt/scratch/one.img /dev/mapper/one
kill -0 $second || fail "the other copy has ended too early"
kill -TERM $second
wait $second || true

note "solid state: side by side"
rotates "$(disk 0)" 0
start one 1MiB
first=$!
wait_until 30 is_preserved /dev/mapper/one
start two 1GiB
wait $! || fail "two: $(cat /run/two.err)"
kill -0 $first || fail "the first has ended too early"
in_line "" || fail "the queue is $(copying)"
kill -TERM $first
wait $first || true

note "several origins: those on one disk one after the other, others meanwhile; the disk is left with the last of them"
rotates "$(disk 0)" 1
rotates "$(disk 1)" 1
rm -f /mnt/scratch/*.img
tidemark copy one other two /mnt/scratch --format raw "${options[@]}" --rate 8MiB --json >/run/group.out 2>/run/group.err &
group=$!
as_told "/dev/mapper/one, /dev/mapper/other, /dev/mapper/two reads"
wait $group || fail "$(cat /run/group.err)"
for volume in one two other; do same_bytes /mnt/scratch/$volume.img /dev/mapper/$volume; done
python3 - <<'END'
import json
lines = [json.loads(line) for line in open("/run/group.out")]
report = lines[-1]["report"]
data = [(line["origin"], line["event"], line.get("phase")) for line in lines if line.get("origin")]
begins = {origin: index for index, (origin, event, phase) in enumerate(data) if event == "phase" and phase == "data"}
ends = {origin: index for index, (origin, event, phase) in enumerate(data) if phase == "finish"}
one, two, other = (f"/dev/mapper/{name}" for name in ("one", "two", "other"))
assert ends[one] < begins[two], data
assert begins[other] < ends[one] and ends[other] < ends[two], data
assert any("is on the same rotating disk" in line.get("text", "") and line["origin"] == two for line in lines), lines
END
assert_same "tickets" "$(find /run/tidemark/disks -type f)" ""
dmsetup remove one
dmsetup remove two
dmsetup remove other
assert_no_tidemark_left
