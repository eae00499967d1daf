# Updates of raw secondaries that are killed at each point, of kept snapshots and of a volume in use, and then run again:
# to the same instant, an older and a newer one.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_since_raw.sh"

capture=(--hook-frozen "dd if=\$TIDEMARK_ORIGIN_BELOW of=$stores/instant bs=1M iflag=direct status=none" --freeze-budget 60s)

note "generation 0"
begin_raw

note "killed at every point, then run again to the same instant, to an older one, and to a newer one"
kills=(update.mark.before update.mark.after copy.segment.landed:1 copy.segment.landed:9 update.synced update.record.before
    update.record.after)
base=s0 round=0
for target in "${targets[@]}"; do
    for point in "${kills[@]}"; do
        round=$((round + 1)) before=$base
        churn $((SEED + 300 + round)); create a$round
        churn $((SEED + 400 + round)); create b$round
        start=$(shows "$target")
        status=0
        TIDEMARK_CRASH_AT=$point tidemark copy data@b$round --since $base "$target" --yes >/run/out 2>&1 || status=$?
        [ "$status" = 137 ] || { cat /run/out; fail "$point: exit status $status"; }
        tidemark recover >/run/out 2>&1 || { cat /run/out; fail "recover after $point"; }
        case $point in
            update.mark.before)
                assert_shows "before the mark" "$target" "$start"
                tidemark verify "$target" --quiet
                goal=a$round ;;
            update.record.after)
                assert_shows "after the end" "$target" "$(digest /dev/mapper/data@b$round)"
                tidemark verify "$target" --quiet
                refused 3 'it cannot be updated' tidemark copy data@b$round --since $base "$target" --yes
                base=b$round goal=c$round
                churn $((SEED + 500 + round)); create c$round ;;
            *)
                tidemark status | grep -q "is being updated from data@$base" || fail "$point: status does not tell: $(tidemark status)"
                tidemark inspect "$target" | grep -q 'is a copy of nothing' || fail "$point: inspect does not tell"
                refused 4 'is a copy of nothing' tidemark verify "$target"
                refused 3 'is a copy of nothing' tidemark copy data@b$round --since a$round "$target" --yes
                # The older one: what the killed attempt wrote beyond its changes must be written again.
                goal=a$round
                case $((round % 3)) in
                    0) goal=b$round ;;
                    1) goal=c$round; churn $((SEED + 500 + round)); create c$round ;;
                esac ;;
        esac
        if [ $((round % 5)) = 0 ]; then
            # The second attempt is killed as well.
            status=0
            TIDEMARK_CRASH_AT=copy.segment.landed:4 tidemark copy data@$goal --since $base "$target" --yes >/run/out 2>&1 || status=$?
            [ "$status" = 137 ] || { cat /run/out; fail "$point, again: exit status $status"; }
        fi
        copy data@$goal --since $base "$target" --yes
        assert_shows "$point, then $goal" "$target" "$(digest /dev/mapper/data@$goal)"
        tidemark verify "$target" --quiet
        tidemark status | grep -q 'being updated' && fail "$point: the mark stays"
        base=$goal
        # The other secondary continues from s0.
        for name in a$round b$round c$round "$([ "$before" = s0 ] || echo "$before")"; do
            [ -z "$name" ] || [ "$name" = "$base" ] || ! [ -e /dev/mapper/data@"$name" ] || delete data@"$name"
        done
    done
    [ "$target" != "$spare" ] || base=s0
done

note "an interrupted update, and what others write to it meanwhile"
base=$(state_of "$raw" 'it["base"]')
churn $((SEED + 600)); create last
wanted=$(digest /dev/mapper/data@last)
status=0
TIDEMARK_CRASH_AT=copy.segment.landed:2 tidemark copy data@last --since "$base" "$raw" --yes >/run/out 2>&1 || status=$?
[ "$status" = 137 ] || fail "exit status $status"
# In a segment that is written again as a whole, this vanishes; elsewhere it is noticed.
touched=$(python3 - /dev/mapper/"$base" /dev/mapper/data@last "$size" <<'PYTHON'
import sys
old, new, size, segment = open(sys.argv[1], "rb"), open(sys.argv[2], "rb"), int(sys.argv[3]), 262144
print(next(at for at in range(segment, size - segment, segment) if (old.seek(at), new.seek(at)) and old.read(segment) != new.read(segment)))
PYTHON
)
for at in $(seq 0 16384 245760); do poke "$raw" $((touched + at)) Q; done
copy data@last --since "$base" "$raw" --yes
assert_shows "the end" "$raw" "$wanted"

note "killed while the volume is in use"
create live
for point in copy.store.before copy.data.before update.mark.after copy.segment.landed:3 copy.originals.laid update.synced copy.data.after; do
    [ "$(state_of "$raw" 'it["base"]')" = data@live ] || copy data@live --since "$(state_of "$raw" 'it["base"]')" "$raw" --yes
    churn $((SEED + 700))
    status=0
    TIDEMARK_CRASH_AT=$point tidemark copy data --since live "$raw" --yes --store $stores --store-ram 0 >/run/out 2>&1 || status=$?
    [ "$status" = 137 ] || { cat /run/out; fail "$point: exit status $status"; }
    refused 3 'run it again\|no copy to resume' tidemark resume
    tidemark recover >/run/out 2>&1 || { cat /run/out; fail "recover after $point"; }
    churn $((SEED + 800))
    copy data --since live "$raw" --yes --all --store $stores --store-ram 0 "${capture[@]}"
    assert_shows "$point" "$raw" "$(digest $stores/instant)"
    tidemark verify "$raw" --quiet
done

stop_busy
end_of_snapshots
