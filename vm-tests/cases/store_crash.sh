# The copy is killed while its store is created, used, or released: the writes continue, and recover leaves no part of
# it.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_store.sh"

make_volume
start_writes
# A RAM disk of another owner must survive every recover.
foreign=$(cat /sys/class/zram-control/hot_add)
echo 1M >"/sys/block/zram$foreign/disksize"

recovers() {
    writes_go_on
    tidemark recover
    assert_same "the table of data" "$(dmsetup table data)" "$TABLE_BEFORE"
    assert_same "the other's RAM disk" "$(cat "/sys/block/zram$foreign/disksize")" 1048576
    echo 1 >"/sys/block/zram$foreign/reset"
    volume_as_before
    echo 1M >"/sys/block/zram$foreign/disksize"
}

for at in store.create.record store.create.head store.create.tail copy.store.after copy.data.before copy.data.after copy.release.before; do
    note "killed at $at"
    assert_status 137 env TIDEMARK_CRASH_AT="$at" \
        tidemark copy "$origin" /mnt/scratch/copy.raw --yes --store /mnt/scratch --store-ram 4MiB
    recovers
done
# A store to be kept has a name. Until it belongs to the user, recover removes it.
kept() { find /mnt/scratch -name '*.store'; }
for at in store.named.before store.named.after store.named.noted store.create.tail copy.data.after \
    store.release.device store.keep.before; do
    note "to be kept, killed at $at"
    assert_status 137 env TIDEMARK_CRASH_AT="$at" \
        tidemark copy "$origin" /mnt/scratch/copy.raw --yes --store /mnt/scratch --keep-store
    recovers
    assert_same "what is left of the store" "$(kept)" ""
done
note "kept, killed after that"
assert_status 137 env TIDEMARK_CRASH_AT=store.keep.after \
    tidemark copy "$origin" /mnt/scratch/copy.raw --yes --store /mnt/scratch --keep-store
recovers
[ -s "$(kept)" ] || fail "the store that was kept is gone"
rm "$(kept)"
note "killed in the middle"
tidemark copy "$origin" /mnt/scratch/copy.raw --yes --store /mnt/scratch --rate 2MiB >"$ARTIFACTS/killed" 2>&1 &
copy=$!
wait_until 60 sh -c "dmsetup status | grep -qE 'snapshot [0-9]{4,}/'"
# A store in use is not a leftover.
tidemark recover || true
grep -q . /run/tidemark/stores/*.json || fail "recover removed the record of a store in use"
kill -0 "$copy" || fail "the copy did not survive recover: $(cat "$ARTIFACTS/killed")"
kill -KILL "$copy"
wait "$copy" || true
recovers
note "a copy succeeds after all crashes"
rm -f /mnt/scratch/.*partial* /mnt/scratch/*partial* /mnt/scratch/copy.raw
tidemark copy "$origin" /mnt/scratch/copy.raw --yes --store /mnt/scratch
echo 1 >"/sys/block/zram$foreign/reset"
volume_as_before
stop_writes
