# Increments: twenty generations of a busy filesystem, every chain restored at every point, and what is refused.
# GENERATIONS archives continue each other; s0 is whole. Every digest is that of the kept snapshot itself.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_since.sh"

GENERATIONS=20

note "generation 0"
begin
assert_same "the snapshot that was copied" "$(report 'report["snapshot"]')" data@s0
assert_same "the instant" "$(report 'report["instant"]["utc"]')" \
    "$(tidemark snapshot show data@s0 --json | python3 -c 'import json, sys; print(json.loads(sys.stdin.readline())["report"]["instant"])')"
declare -A digests
digests[0]=$(digest /dev/mapper/data@s0)
tidemark copy data --since s0 $stores/chain/plan.tdm --store $stores --dry-run >/run/plan
grep -q 'chunks of 4 KiB have changed' /run/plan || fail "the plan does not show the changes: $(cat /run/plan)"

oldest=0
for generation in $(seq $GENERATIONS); do
    before=$((generation - 1))
    churn $((SEED + generation))
    create s$generation
    digests[$generation]=$(digest /dev/mapper/data@s$generation)
    # The next generation has a snapshot in between, which stays or goes: all stores together say what has changed.
    case $((generation % 4)) in
        0) create extra; churn $((SEED + 1000 + generation)); delete data@extra ;;
        2) create kept$generation; churn $((SEED + 1000 + generation)) ;;
    esac
    options=()
    [ $((generation % 3)) != 0 ] || options+=(--verify)
    [ $((generation % 5)) != 0 ] || options+=(--segment 256KiB --rate 64MiB)
    if [ $((generation % 7)) = 0 ]; then
        tidemark copy data@s$generation --since data@s$before - --parent $stores/chain >$stores/chain/s$generation.tdm 2>/run/copy.err ||
            { cat /run/copy.err; fail "copy to a pipe"; }
    else
        copy data@s$generation --since s$before $stores/chain/s$generation.tdm "${options[@]}"
        changed=$(report 'report["since"]["changed_bytes"]')
        [ "$changed" -ge 1000000 ] || fail "only $changed bytes changed: this proves nothing about the ratio"
        size=$(stat -c %s $stores/chain/s$generation.tdm)
        for moved in "$(report 'report["written_bytes"]')" "$size" "$(report 'report["since"]["moved_bytes"]')"; do
            [ $((moved * 100)) -le $((changed * 105)) ] || fail "$moved bytes were moved for $changed that changed"
        done
        note "generation $generation: $changed bytes changed, the archive has $size"
    fi
    # The base goes now, or later together with others.
    if [ $((generation % 3)) = 0 ]; then
        while [ $oldest -lt "$generation" ]; do delete data@s$oldest; oldest=$((oldest + 1)); done
    fi
    kill -0 "$writer" || fail "the writer has ended"
done
last=$GENERATIONS
stop_busy

note "every chain, restored at every point"
for generation in $(seq 0 $last); do
    rm -f $stores/out
    tidemark restore $stores/chain/s$generation.tdm $stores/out --quiet
    assert_same "generation $generation" "$(digest $stores/out)" "${digests[$generation]}"
done
tidemark verify $stores/chain/s$last.tdm --against $stores/out --quiet
tidemark inspect $stores/chain/s$last.tdm | grep -q "s$((last - 1)).tdm" || fail "inspect does not show the parent"

note "one archive of a chain, in the place of what it was made from"
tidemark archive merge $stores/chain/s10.tdm $stores/other/merged.tdm
rm -f $stores/out
tidemark restore $stores/other/merged.tdm $stores/out --quiet
assert_same "the merged archive" "$(digest $stores/out)" "${digests[10]}"
size=$(stat -c %s $stores/other/merged.tdm) all=$(cat $stores/chain/s{0,1,2,3,4,5,6,7,8,9,10}.tdm | wc -c)
[ "$size" -lt "$all" ] || fail "the merged archive has $size bytes, those of its chain $all"
mkdir $stores/short
cp $stores/chain/s11.tdm $stores/short
mv $stores/other/merged.tdm $stores/short
rm $stores/out
tidemark restore $stores/short/s11.tdm $stores/out --quiet
assert_same "what continues it" "$(digest $stores/out)" "${digests[11]}"
fill "$spare" "$(blockdev --getsize64 "$spare")" older
tidemark restore $stores/short/s11.tdm "$spare" --yes --quiet
assert_same "the same on a device" "$(head_digest "$spare")" "${digests[11]}"
rm -r $stores/short

note "onto a device that held something else, and by identity, whatever the names are"
fill "$spare" "$(blockdev --getsize64 "$spare")" old
mkdir $stores/renamed
for generation in $(seq 0 $last); do mv $stores/chain/s$generation.tdm "$stores/renamed/x$((generation * 7 % 23)) y.tdm"; done
tip="$stores/renamed/x$((last * 7 % 23)) y.tdm"
tidemark restore "$tip" "$spare" --yes --quiet
assert_same "the device" "$(head_digest "$spare")" "${digests[$last]}"
for generation in $(seq 0 $last); do mv "$stores/renamed/x$((generation * 7 % 23)) y.tdm" $stores/chain/s$generation.tdm; done

note "a parent that is missing, foreign, damaged, or is found elsewhere"
tip=$stores/chain/s$last.tdm middle=$stores/chain/s10.tdm
fill "$spare" 1048576 mark
marked=$(digest "$spare")
untouched() { # STATUS WHAT [OPTION...]
    local wanted=$1 what=$2
    shift 2
    refused "$wanted" "$what" tidemark restore "$tip" "$spare" --yes "$@"
    assert_same "the target of a refused restore" "$(digest "$spare")" "$marked"
    refused "$wanted" "$what" tidemark verify "$tip" "$@"
}
mv "$middle" $stores/other/
untouched 3 'was not found'
tidemark verify "$tip" --parent $stores/chain --parent $stores/other/s10.tdm --quiet
tidemark verify "$tip" --parent $stores/chain --parent $stores/other --quiet
untouched 3 'was not found' --parent $stores/other
# One of another chain under the same name.
cp $stores/chain/s9.tdm "$middle"
untouched 3 'was not found'
cp $stores/other/s10.tdm "$middle"
length=$(stat -c %s "$middle")
truncate -s $((length - 4096)) "$middle"
untouched 4 'bad\|truncated'
cp $stores/other/s10.tdm "$middle"
# The map, which is before the tail superblock.
printf 'x' | dd of="$middle" bs=1 seek=$((length - 4096 - 4096 - 4096 + 9)) conv=notrunc status=none
untouched 4 'bad'
cp $stores/other/s10.tdm "$middle"
# The data: found when it is read, and no file is left.
printf 'x' | dd of="$middle" bs=1 seek=$((4096 + 4096 + 5000)) conv=notrunc status=none
refused 4 'frame 0' tidemark verify "$tip"
rm -f $stores/out
refused 4 'frame 0' tidemark restore "$tip" $stores/out
[ ! -e $stores/out ] || fail "a bad chain left a file"
mv $stores/other/s10.tdm "$middle"
tidemark verify "$tip" --quiet

note "what is refused"
other=$stores/never.tdm
refused 3 'no snapshot' tidemark copy data --store $stores --since none $other --parent $stores/chain
refused 3 'of the volume other' tidemark copy data --store $stores --since other@s$last $other --parent $stores/chain
refused 3 'is not older' tidemark copy data@s$last --since s$last $other --parent $stores/chain
refused 3 "is not older" tidemark copy data@s$((last - 1)) --since s$last $other --parent $stores/chain
refused 3 'no archive of data@' tidemark copy data --store $stores --since s$last $other
refused 3 'has no kept snapshots' tidemark copy $stores/chain/s0.tdm --since s0 $other
refused 2 'needs --parent' tidemark copy data --store $stores --since s$last - --dry-run
refused 2 'overlay' tidemark copy data --store $stores --since s$last $other --originals overlay
tidemark snapshot clone data@s$last --name twin --store $stores >/dev/null
refused 3 'is a clone' tidemark copy data --store $stores --since twin $other --parent $stores/chain
refused 3 'is a clone' tidemark copy data@twin $other
delete data@twin
mkdir -p /mnt/kept
tidemark snapshot mount data@s$last /mnt/kept
copy data@s$last $stores/other/mounted.tdm
umount /mnt/kept
refused 2 'from a pipe' sh -c "tidemark restore - $stores/out <$tip"
[ ! -e $other ] || fail "a refused copy left a file"

end_of_snapshots
