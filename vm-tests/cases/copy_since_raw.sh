# Increments onto raw secondaries, in place: a device and a file follow a busy filesystem for generations; what others
# wrote is noticed, and what is refused.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_since_raw.sh"

note "generation 0: whole copies of a kept snapshot"
[ $((size % 1048576)) = 0 ] || fail "the volume has $size bytes"
begin_raw
# Past its end, the device is as it was.
rest() { dd if="$spare" bs=1M skip=$((size >> 20)) iflag=direct status=none | sha256sum; }
past=$(rest)

note "eight generations, in place"
for generation in $(seq 8); do
    before=$((generation - 1))
    churn $((SEED + generation))
    create s$generation
    wanted=$(digest /dev/mapper/data@s$generation)
    # The next generation has a snapshot in between, which stays or goes.
    case $((generation % 4)) in
        0) create extra; churn $((SEED + 1000 + generation)); delete data@extra ;;
        2) create kept$generation; churn $((SEED + 1000 + generation)) ;;
    esac
    options=()
    case $((generation % 3)) in
        0) options=(--verify --sample all) ;;
        1) options=(--sample 0.05 --rate 64MiB) ;;
    esac
    for target in "${targets[@]}"; do
        copy data@s$generation --since s$before "$target" --yes "${options[@]}"
        assert_shows "generation $generation" "$target" "$wanted"
        changed=$(report 'report["since"]["changed_bytes"]') moved=$(report 'report["since"]["moved_bytes"]')
        written=$(report 'report["written_bytes"]') read=$(report 'report["since"]["check"]["read"]')
        [ "$changed" -ge 1000000 ] || fail "only $changed bytes changed: this proves nothing about the ratio"
        [ $((moved * 100)) -le $((changed * 105)) ] || fail "$moved bytes were moved for $changed that changed"
        [ $((written * 100)) -le $((changed * 105)) ] || fail "$written bytes were written for $changed that changed"
        [ "${options[*]}" != "--verify --sample all" ] || [ "$read" = $((size >> 18)) ] || fail "only $read segments were read"
    done
    note "generation $generation: $changed bytes changed, $moved moved, $read segments read before"
    [ $((generation % 3)) != 0 ] || for old in $(seq $((generation - 3)) $before); do delete data@s"$old"; done
    kill -0 "$writer" || fail "the writer has ended"
done
assert_same "what is past the end" "$(rest)" "$past"
for target in "${targets[@]}"; do tidemark verify "$target" --quiet; done

note "a volume in use: several instants since one snapshot, and back to a kept one"
capture=(--hook-frozen "dd if=\$TIDEMARK_ORIGIN_BELOW of=$stores/instant bs=1M iflag=direct status=none" --freeze-budget 60s)
create middle
middle=$(digest /dev/mapper/data@middle)
for round in 1 2; do
    for target in "${targets[@]}"; do
        churn $((SEED + 100 + round))
        copy data --since s8 "$target" --yes --store $stores --store-ram 0 --region 1MiB "${capture[@]}"
        # Used space is as at the instant; all else that differs reads as zeros.
        python3 - "$target" $stores/instant "$(report 'report["skipped"]["bytes"]')" <<'PYTHON'
import sys
copy, instant, skipped = open(sys.argv[1], "rb"), open(sys.argv[2], "rb"), int(sys.argv[3])
different = 0
while block := instant.read(4096):
    found = copy.read(4096)
    if found != block:
        assert found == bytes(4096), "a block is neither as at the instant nor zero"
        different += 4096
assert 0 < different <= skipped, (different, skipped)
PYTHON
        moved=$(report 'report["since"]["moved_bytes"]') originals=$(report 'report["originals_count"]')
        note "live $round: $moved bytes moved, $originals originals"
        assert_same "the state" "$(state_of "$target" 'it["shown"], it["base"], it["is_updating"]')" "(None, 'data@s8', False)"
        copy data --since s8 "$target" --yes --all --store $stores --store-ram 0 "${capture[@]}"
        assert_shows "live $round, with free space" "$target" "$(digest $stores/instant)"
        copy data --since s8 "$target" --yes --store $stores --exclude /mnt/data/big "${capture[@]}"
        tidemark verify "$target" --quiet
    done
done
for target in "${targets[@]}"; do
    # Its instant is before those of the live copies, which have written more than had changed by then.
    copy data@middle --since s8 "$target" --yes
    assert_shows "back to a kept snapshot" "$target" "$middle"
done

note "what others wrote is noticed, and nothing is written"
churn $((SEED + 200))
create next
wanted=$(digest /dev/mapper/data@next)
# A chunk that has changed, and one whose whole segment has not, if there is any.
unchanged=$(python3 - "$spare" /dev/mapper/data@next "$size" <<'PYTHON'
import sys
old, new, size, segment = open(sys.argv[1], "rb"), open(sys.argv[2], "rb"), int(sys.argv[3]), 262144
same = [at for at in range(segment, size - segment, segment) if (old.seek(at), new.seek(at)) and old.read(segment) == new.read(segment)]
changed = [at for at in range(0, size, segment) if (old.seek(at), new.seek(at)) and old.read(segment) != new.read(segment)]
print(same[len(same) // 2], changed[len(changed) // 2])
PYTHON
)
touched=${unchanged#* } unchanged=${unchanged% *}
for target in "${targets[@]}"; do
    for at in 0 $((size - 1)) $((unchanged + 100000)) $((touched + 5)) $((touched + 262143)); do
        old=$(peek "$target" "$at")
        [ "$old" = 58 ] && new=Y || new=X
        poke "$target" "$at" $new
        marked=$(shows "$target")
        sample=0.000001
        # Any change is found if everything is read; one in what is always read is found with any sample.
        [ "$at" != $((unchanged + 100000)) ] || sample=all
        refused 4 'does not hold what was recorded' tidemark copy data@next --since middle "$target" --yes --sample $sample
        grep -q 'nothing was written' /run/out || fail "the error does not say that nothing was written"
        assert_shows "a refused update" "$target" "$marked"
        refused 4 'does not hold what was recorded' tidemark verify "$target"
        poke "$target" "$at" "\\x$old"
    done
    assert_same "the state" "$(state_of "$target" 'it["shown"], it["is_updating"]')" "('data@middle', False)"
    tidemark verify "$target" --quiet
done

note "what is refused"
refused 3 'is not older' tidemark copy data@middle --since next "$spare" --yes
refused 3 'it cannot be updated since data@s8' tidemark copy data@next --since s8 "$spare" --yes
refused 3 'it cannot be updated since data@s8' tidemark copy data --since s8 "$spare" --yes --store $stores
refused 3 'no record says' tidemark copy data@next --since middle "$(disk 1)" --yes
refused 3 'no record says' tidemark copy data@next --since middle $stores/absent.img --yes
cp $raw $stores/elsewhere.img
refused 3 'no record says' tidemark copy data@next --since middle $stores/elsewhere.img --yes
refused 2 'omit --segment' tidemark copy data@next --since middle "$spare" --yes --segment 1MiB
refused 2 'names archives' tidemark copy data@next --since middle "$spare" --yes --parent $stores/chain
refused 2 'is not a share' tidemark copy data@next --since middle "$spare" --yes --sample 2
refused 2 'omit --sample' tidemark copy data@next --since middle $stores/x.tdm --sample all
refused 2 'cannot go to standard output' tidemark copy data@next --since middle - --format raw
refused 3 'would be updated in place\|would overwrite\|--yes' tidemark copy data@next --since middle "$raw" </dev/null
# In use: mounted, written, read through a loop device.
loop=$(losetup --find --show "$raw")
refused 3 'loop' tidemark copy data@next --since middle "$raw" --yes
losetup --detach "$loop"
exec 9<>"$raw"
refused 3 'open for writing\|is written by\|opened for writing' tidemark copy data@next --since middle "$raw" --yes
exec 9>&-
# The origin itself, and a file on it.
refused 3 'no record says\|is the origin' tidemark copy data --since middle /dev/mapper/data --yes --store $stores
cp $raw $stores/keep.img
assert_same "the secondaries" "$(shows "$spare") $(shows "$raw")" "$middle $middle"
tidemark copy data@next --since middle "$spare" --yes --dry-run >/run/plan
grep -q 'read first' /run/plan || fail "the plan does not show the check: $(cat /run/plan)"
[ ! -e $stores/absent.img ] || fail "a refused copy left a file"

note "a file that was copied over its own name: everything is read"
mv $stores/elsewhere.img "$raw"
tidemark inspect "$raw" | grep -q 'only by its content' || fail "a file with another inode is taken for the recorded one"
poke "$raw" $((unchanged + 7)) Z
refused 4 'does not hold' tidemark copy data@next --since middle "$raw" --yes --sample 0.000001
mv $stores/keep.img "$raw"
copy data@next --since middle "$raw" --yes --sample 0.000001
[ "$(report 'report["since"]["check"]["read"]')" = $((size >> 18)) ] || fail "not all of a file with another inode was read"
assert_shows "the file that was copied" "$raw" "$wanted"
tidemark inspect "$raw" | grep -q 'by its own facts' || fail "its new identity was not recorded"
copy data@next --since middle "$spare" --yes

note "a secondary that Tidemark overwrites is not one any more"
tidemark restore $stores/chain/s0.tdm "$spare" --yes --quiet
refused 3 'no record says' tidemark copy data --since next "$spare" --yes --store $stores
rm "$raw"
tidemark restore $stores/chain/s0.tdm "$raw" --quiet
refused 3 'no record says' tidemark copy data --since next "$raw" --yes --store $stores
[ "$(find $records -name '*.copy' | wc -l)" = 0 ] || fail "records: $(ls $records)"
stop_busy
end_of_snapshots
