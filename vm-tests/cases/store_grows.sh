# The store begins in memory, spills to its file, and grows while in use. The copy is exact.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_store.sh"

make_volume
# With large chunks, every small write preserves a megabyte, so the store fills as fast as the disk allows.
start_writes --bs=4k --blockalign=1m --rate_iops=40
for ram in 96MiB 0; do
    note "a head of $ram"
    tidemark copy "$origin" /mnt/scratch/copy.raw --all --yes --chunk 1MiB --store /mnt/scratch --store-ram "$ram" \
        --rate 24MiB --freeze-budget 120s --json \
        --hook-frozen "dd if=\$TIDEMARK_ORIGIN_BELOW of=/mnt/scratch/instant bs=1M iflag=direct status=none" \
        >"$ARTIFACTS/copy.$ram.json" 2>"$ARTIFACTS/copy.$ram.log" || {
        cat "$ARTIFACTS/copy.$ram.log"
        fail "the copy failed"
    }
    used=$(grep -ho '"used_bytes":[0-9]*' "$ARTIFACTS/copy.$ram.json" "$ARTIFACTS/copy.$ram.log" | cut -d: -f2 | sort -n | tail -1)
    total=$(grep -ho '"total_bytes":[0-9]*' "$ARTIFACTS/copy.$ram.json" "$ARTIFACTS/copy.$ram.log" | cut -d: -f2 | sort -n | tail -1)
    note "used $used of $total"
    grep -h 'has grown' "$ARTIFACTS/copy.$ram.json" "$ARTIFACTS/copy.$ram.log" || fail "the store has not grown"
    [ "$used" -gt $((8 << 20)) ] || fail "the writes hardly reached the store: this proves nothing"
    assert_identical /mnt/scratch/copy.raw /mnt/scratch/instant
    writes_go_on
    volume_as_before
    rm /mnt/scratch/copy.raw /mnt/scratch/instant
done
stop_writes
