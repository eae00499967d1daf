# A store that is full and cannot grow, or whose disk fails: the copy notices at once and ends with a clear error and no
# file under the final name. Writes to the origin never see the failure.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_store.sh"

make_volume
start_writes

# fails_with PATTERN COPY-OPTION...: the copy notices soon, and ends with 1 and a matching error.
fails_with() {
    local pattern=$1 status=0 lost='' noticed='' begin
    shift
    begin=$(uptime_now)
    TIDEMARK_LOG=info tidemark copy "$origin" /mnt/scratch/copy.raw --all --yes --rate 1MiB "$@" >"$ARTIFACTS/out" 2>&1 &
    local copy=$!
    while kill -0 "$copy" 2>/dev/null; do
        if [ -z "$noticed" ] && grep -q 'the snapshot is lost' "$ARTIFACTS/out"; then noticed=$(uptime_now); fi
        sleep 0.05
    done
    wait "$copy" || status=$?
    # The copy may end right after it has reported the loss.
    if [ -z "$noticed" ] && grep -q 'the snapshot is lost' "$ARTIFACTS/out"; then noticed=$(uptime_now); fi
    # The time at which the kernel invalidated the snapshot.
    lost=$(dmesg | sed -n 's/^\[ *\([0-9.]*\)\].*Invalidating snapshot.*/\1/p' | tail -n 1)
    note "status $status; lost at ${lost:-?}, noticed at ${noticed:-?}"
    cat "$ARTIFACTS/out"
    assert_same "the exit status" "$status" 1
    grep -qiE "$pattern" "$ARTIFACTS/out" || fail "the error does not match '$pattern'"
    awk "BEGIN { exit !(${lost:-0} > $begin) }" || fail "the snapshot was not lost: this proves nothing"
    # About a second on an idle processor; an emulated guest on a busy machine may take ten times as long.
    awk "BEGIN { exit !(${noticed:-999999} - $lost < 10) }" || fail "the loss was not noticed in time"
    [ -z "$(find /mnt/scratch -name 'copy*' -o -name '*partial*')" ] || fail "left: $(ls -la /mnt/scratch)"
    writes_go_on
    volume_as_before
}

note "full: the store has its maximum size"
fails_with 'store is full.*--store-size|store is full' --store /mnt/scratch --store-size 6MiB --store-ram 0
note "full: with a RAM head"
fails_with 'store is full' --store /mnt/scratch --store-size 6MiB --store-ram 2MiB
note "full: the store's filesystem has no more space"
mkdir -p /mnt/small
truncate -s 28M /mnt/scratch/small.img
mkfs.ext4 -q /mnt/scratch/small.img
mount -o loop /mnt/scratch/small.img /mnt/small
fails_with 'store is full.*(no space|reserve)' --store /mnt/small --store-ram 0 --chunk 64KiB
umount /mnt/small
rm /mnt/scratch/small.img
note "full: a block device"
fails_with 'store is full' --store "$(disk 2)" --store-size 5MiB --store-ram 0

note "broken: the store's disk fails"
sectors=$(blockdev --getsz "$(disk 2)")
dmsetup create --noudevsync tidemark-test-store --table "0 $sectors linear $(disk 2) 0"
settle
store=$(dm_node tidemark-test-store)
(
    wait_until 60 sh -c "dmsetup status | grep -qE 'snapshot [0-9]{3,}/'"
    dmsetup suspend --noflush tidemark-test-store
    dmsetup load tidemark-test-store --table "0 $sectors error"
    dmsetup resume tidemark-test-store
) &
fails_with 'store failed' --store "$store" --store-ram 0
dmsetup remove --noudevsync tidemark-test-store

note "not the store: a bad sector of the origin"
# The last block of a device that is never mounted. dm-dust fails reads of it and allows writes.
dmsetup create --noudevsync tidemark-test-dust --table "0 32768 dust $(disk 2) 0 4096"
settle
dmsetup create --noudevsync tidemark-test-bad --table "0 32768 linear /dev/mapper/tidemark-test-dust 0"
settle
bad=$(dm_node tidemark-test-bad)
exec 9<>"$bad"
status=0
tidemark copy "$bad" /mnt/scratch/bad.raw --all --yes --rate 1MiB --order physical --store /mnt/scratch \
    --hook-frozen "dmsetup message tidemark-test-dust 0 addbadblock 4095 && dmsetup message tidemark-test-dust 0 enable" \
    >"$ARTIFACTS/out" 2>&1 &
copy=$!
wait_until 30 is_preserved "$bad"
dd if=/dev/zero of="$bad" bs=4k seek=4095 count=1 oflag=direct conv=notrunc status=none || fail "a write to the origin fails"
wait "$copy" || status=$?
exec 9>&-
cat "$ARTIFACTS/out"
assert_same "the exit status" "$status" 1
grep -q 'could not be read from the origin' "$ARTIFACTS/out" || fail "the store is blamed for a bad sector of the origin"
dmsetup remove --noudevsync tidemark-test-bad
dmsetup remove --noudevsync tidemark-test-dust

note "refused: on the origin itself"
assert_status 3 tidemark copy "$origin" /mnt/scratch/copy.raw --yes --store "$origin"

note "a copy succeeds after all failures"
tidemark copy "$origin" /mnt/scratch/copy.raw --yes --store /mnt/scratch
volume_as_before
stop_writes
