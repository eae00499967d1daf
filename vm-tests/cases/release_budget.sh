# A release suspends the origin, and the suspension waits for writes that wait for the store. On a slow store disk, that
# wait ends at the freeze budget: reads, which do not need the store, are held no longer than that.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_store.sh"
. "$REPO/vm-tests/cases/lib_slow.sh"

make_volume
make_slow "$(disk 2)"
start_writes --iodepth=2 --rate_iops=300
reads() { dd if="$origin" of=/dev/null bs=4k count=1 skip=9000 iflag=direct status=none; }

tidemark copy "$origin" /mnt/scratch/copy.raw --all --yes --json --store /dev/mapper/tidetest-slow --store-ram 0 \
    --region 1MiB --rate 6MiB --freeze-budget 500ms >/run/copy.out 2>/run/copy.err &
process=$!
wait_until 20 is_preserved "$origin"
slow 3000 3000
measure reads
sleep 12
measured
# Fast again before the end: the table is put back in further attempts, with four times the budget.
slow 0 0
wait "$process" || fail "exit status $?: $(cat /run/copy.err) $(tail -n 1 /run/copy.out)"
stall=$(grep -oE '"longest_stall_seconds":[0-9.]+' /run/copy.out | tail -n 1 | awk -F: '{ print int($2 * 1000) }')
note "the slowest read: $WORST ms; the longest release: $stall ms"
[ "$stall" -ge 400 ] || fail "no release met a slow write: this proves nothing"
[ "$stall" -lt 1000 ] || fail "a release held the origin for $stall ms at a budget of 500 ms"
[ "$WORST" -lt 1800 ] || fail "a read took $WORST ms"
stop_writes
volume_as_before
dmsetup remove --noudevsync tidetest-slow
dmsetup remove --noudevsync data
