# Increments of a volume in use: against what it held at the instant, with free space, after kills and a rollback.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_since.sh"

note "generations 0 and 1"
begin
churn "$SEED"
create s1
copy data@s1 --since s0 $stores/chain/s1.tdm
delete data@s0

note "a volume in use: what it holds at the instant, by the tables of the stores"
capture=(--hook-frozen "dd if=\$TIDEMARK_ORIGIN_BELOW of=$stores/instant bs=1M iflag=direct status=none" --freeze-budget 60s)
for round in 1 2 3; do
    churn $((SEED + 100 + round))
    copy data --since s1 $stores/live$round.tdm --parent $stores/chain --store $stores --store-ram 0 --region 1MiB \
        "${capture[@]}"
    tidemark verify $stores/live$round.tdm --parent $stores/chain --against $stores/instant --quiet
    moved=$(report 'report["since"]["moved_bytes"]') changed=$(report 'report["since"]["changed_bytes"]')
    note "live $round: $changed bytes changed, $moved moved, $(report 'report["originals_count"]') originals"
    [ "$moved" -le "$changed" ] || fail "more was moved than has changed"
done
stop_busy

note "changed, and free again: not copied"
copy data --since s1 $stores/live4.tdm --parent $stores/chain --store $stores
before=$(report 'report["since"]["moved_bytes"]')
dd if=/dev/urandom of=/mnt/data/fleeting bs=1M count=8 conv=fsync status=none
rm /mnt/data/fleeting
sync
copy data --since s1 $stores/live5.tdm --parent $stores/chain --store $stores
moved=$(report 'report["since"]["moved_bytes"]') changed=$(report 'report["since"]["changed_bytes"]')
[ "$changed" -gt $((before + (7 << 20))) ] || fail "only $changed bytes count as changed"
[ "$moved" -lt $((before + (2 << 20))) ] || fail "$moved bytes were moved, free space among them"
copy data --since s1 $stores/live6.tdm --parent $stores/chain --store $stores --all "${capture[@]}"
[ "$(report 'report["since"]["moved_bytes"]')" -gt $((7 << 20)) ] || fail "--all does not copy free space"
tidemark verify $stores/live6.tdm --parent $stores/chain --against $stores/instant --quiet

note "a file that is left out"
copy data --since s1 $stores/part.tdm --parent $stores/chain --store $stores --exclude /mnt/data/big "${capture[@]}"
tidemark verify $stores/part.tdm --parent $stores/chain --against $stores/instant --quiet
[ "$(report 'report["since"]["moved_bytes"]')" -lt $((before / 2)) ] || fail "a file that is left out was copied"

note "killed at every point"
for point in copy.store.before copy.store.after copy.data.before copy.originals.laid copy.data.after copy.release.before; do
    rm -f $stores/killed.tdm
    status=0
    TIDEMARK_CRASH_AT=$point tidemark copy data --since s1 $stores/killed.tdm --parent $stores/chain --store $stores \
        >/run/out 2>&1 || status=$?
    [ "$status" = 137 ] || { cat /run/out; fail "$point: exit status $status"; }
    refused 3 'no copy to resume' tidemark resume
    tidemark recover >/run/out 2>&1 || { cat /run/out; fail "recover after $point"; }
    echo "$point" >/mnt/data/after-kill
    rm -f $stores/killed.tdm
    copy data --since s1 $stores/killed.tdm --parent $stores/chain --store $stores
    tidemark verify $stores/killed.tdm --parent $stores/chain --quiet
done

note "a volume that was rolled back"
create back
copy data@back --since s1 $stores/chain/back.tdm
umount /mnt/data
tidemark snapshot rollback data@s1 --yes --store $stores >/run/out 2>&1 || { cat /run/out; fail "rollback"; }
settled() { ! dmsetup info 'data#merge' >/dev/null 2>&1; }
tidemark monitor 2>/dev/null &
monitor=$!
wait_until 60 settled
kill "$monitor"
wait "$monitor" || true
mount /dev/mapper/data /mnt/data
churn $((SEED + 500))
create again
wanted=$(digest /dev/mapper/data@again)
copy data@again --since back $stores/chain/again.tdm
tidemark restore $stores/chain/again.tdm $stores/out --quiet
assert_same "after a rollback" "$(digest $stores/out)" "$wanted"

end_of_snapshots
