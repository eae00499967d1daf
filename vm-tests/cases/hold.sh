# --on-full: a store that cannot grow ends the copy (abort) or holds the writers until the copier has caught up (hold).
# In both modes no writer sees an error. The watchdog ends a hold whose command is killed.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_load.sh"

tidemark attach "$(disk 0)" --name data
origin=/dev/mapper/data
make_filesystem ext4 "$origin" /mnt/origin
make_filesystem ext4 "$(disk 1)" /mnt/scratch
table_before=$(dmsetup table "$origin")
start_load /mnt/origin "$SEED"

# Large chunks: each small write preserves 16 KiB, and the store has room for half of the data in use.
options=(--yes --store /mnt/scratch --store-ram 0 --store-size 6MiB --chunk 16KiB --region 1MiB
    --freeze-budget 120s --json)

note "abort"
status=0
tidemark copy "$origin" /mnt/scratch/copy.raw "${options[@]}" --rate 2MiB >/run/abort.json 2>&1 || status=$?
[ "$status" = 1 ] || { tail -n 3 /run/abort.json; fail "exit status $status of a copy whose store is full"; }
grep -q 'COW store is full' /run/abort.json || fail "the error does not say that the store is full"
load_is_alive
assert_no_tidemark_left data

note "hold"
tidemark copy "$origin" /mnt/scratch/copy.raw "${options[@]}" --rate 2MiB --on-full hold --hold-budget 120s \
    --hook-frozen "$(capture_hook /mnt/scratch/instant)" >/run/hold.json 2>&1 || { tail -n 3 /run/hold.json; fail "the copy"; }
holds=$(grep -o '"holds":[0-9]*' /run/hold.json | tail -n 1 | cut -d: -f2)
note "held in $holds slices: $(grep -o '"held_seconds":[0-9.]*' /run/hold.json | tail -n 1)"
[ "$holds" -gt 0 ] || fail "no write was held: this proves nothing"
python3 "$REPO/vm-tests/guest/same_in_use.py" ext4 /mnt/scratch/instant /mnt/scratch/copy.raw || fail "the copy differs"
[ "$(dmsetup table "$origin")" = "$table_before" ] || fail "the origin's table changed"
load_is_alive
assert_no_tidemark_left data

note "killed while it holds writers"
tidemark copy "$origin" /mnt/scratch/copy2.raw "${options[@]}" --rate 1MiB --on-full hold --hold-budget 120s >/run/kill.json 2>&1 &
process=$!
wait_until 120 sh -c "grep -q 'are held until' /run/kill.json || ! kill -0 $process"
grep -q 'are held until' /run/kill.json || { tail -n 3 /run/kill.json; fail "the copy ended before it held any write"; }
kill -KILL "$process"
wait "$process" || true
timeout 20 dd if=/dev/zero of=/mnt/origin/probe bs=4k count=1 conv=fsync status=none || fail "the origin stays held"
tidemark recover
[ "$(dmsetup table "$origin")" = "$table_before" ] || fail "the origin's table changed"
assert_no_tidemark_left data

note "a hold budget that runs out"
status=0
tidemark copy "$origin" /mnt/scratch/copy3.raw "${options[@]}" --rate 1MiB --on-full hold --hold-budget 1s >/run/spent.json 2>&1 || status=$?
[ "$status" = 1 ] || { tail -n 3 /run/spent.json; fail "exit status $status of a copy whose hold budget ran out"; }
grep -q 'hold-budget' /run/spent.json || fail "no message says that the hold budget ran out"
assert_no_tidemark_left data

stop_load
umount /mnt/origin
filesystem_check ext4 "$origin"
