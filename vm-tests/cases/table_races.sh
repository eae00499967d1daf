# Another tool changes the volume's table with dmsetup while it is copied, on a slow disk: it suspends and resumes the
# volume, loads a longer table and activates it, or loads a table and drops it. In any order its changes stay: its table
# is not replaced, its suspension is not ended. A copy succeeds or says why it is void.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_load.sh"

make_filesystem ext4 "$(disk 1)" /mnt/scratch
sectors=$((24 * 2048))
own() { echo "0 $1 linear $(disk 0) 0"; }
dmsetup create data --table "$(own $sectors)"
dmsetup mknodes
origin=/dev/mapper/data
make_filesystem ext4 "$origin" /mnt/origin
head -c 4m /dev/urandom >/mnt/origin/kept
sum=$(sha256sum </mnt/origin/kept)
start_hot_load

# Suspended until the copy has finished reading and waits. Only this function may end it. (The kernel does not count
# suspensions: one that begins while a copy has the volume suspended ends with the copy's. So it begins between two
# changes.)
suspends() {
    dmsetup suspend data
    for _ in $(seq 10); do
        sleep 0.3
        dmsetup info data | grep -q 'State: *SUSPENDED' || fail "the copy ended another tool's suspension"
    done
    dmsetup resume data
}

# The sequence that lvm2 uses to enlarge a volume: load, suspend, resume.
enlarges() {
    sectors=$((sectors + 2048))
    dmsetup load data --table "$(own $sectors)"
    pause
    dmsetup suspend data
    pause
    dmsetup resume data
}

# A table of another tool stays in the inactive slot.
loads_and_drops() {
    dmsetup load data --table "$(own $((sectors + 4096)))"
    pause
    dmsetup table --inactive data | grep -q "^0 $((sectors + 4096)) linear" || fail "the copy dropped another tool's table"
    dmsetup clear data
}

copied=0 void=0
# round WHAT [END]: WHAT begins at a random moment of a copy, which may be killed or interrupted meanwhile.
round() {
    local status=0 what=$1 end=${2:-none} how='--region 256KiB --segment 64KiB --rate 16MiB'
    [ "$what" != suspends ] || how='--region 64MiB --rate 40MiB'
    rm -f /mnt/scratch/copy.raw
    # shellcheck disable=SC2086
    tidemark copy "$origin" /mnt/scratch/copy.raw --all --yes --store /mnt/scratch $how --freeze-budget 60s >/run/copy.out 2>/run/copy.err &
    local copy=$!
    if [ "$what" = suspends ]; then
        wait_until 30 is_preserved "$origin"
    elif [ $((RANDOM % 3)) != 0 ]; then
        wait_until 30 is_preserved "$origin" || true
    fi
    pause
    "$what"
    [ "$end" = none ] || kill "-$end" "$copy" 2>/dev/null || true
    wait "$copy" 2>/dev/null || status=$?
    case "$status" in
        0) copied=$((copied + 1)) ;;
        137 | 130 | 143) ;;
        *)
            void=$((void + 1))
            grep -q 'another tool replaced the table\|another tool is changing\|another tool resumed\|it is already frozen\|changed since the copy was planned' /run/copy.err ||
                fail "$what: the copy ended with $status: $(cat /run/copy.err)"
            ;;
    esac
    note "$what, $end: the copy ended with $status $(grep '^tidemark: ' /run/copy.err || true)"
    tidemark recover >/run/recover.out 2>&1 || fail "recover: $(cat /run/recover.out)"
    assert_same "$what: the table" "$(dmsetup table data)" "$(own $sectors | sed "s|$(disk 0)|$(stat -L -c '%Hr:%Lr' "$(disk 0)")|")"
    assert_same "$what: suspended devices" "$(suspended_devices)" ""
    assert_no_tidemark_left
}

for end in none TERM KILL; do
    round suspends "$end"
    round enlarges "$end"
    round loads_and_drops "$end"
done
round true
stop_hot_load
note "$copied copies, $void void"
[ "$copied" -gt 0 ] || fail "no copy succeeded"
[ "$void" -gt 0 ] || fail "no copy was disturbed: this proves nothing"
assert_same "the file, before" "$(sha256sum </mnt/origin/kept)" "$sum"
umount /mnt/origin
e2fsck -fn "$origin" || fail "the origin's filesystem is damaged"
mount "$origin" /mnt/origin
assert_same "the file, mounted anew" "$(sha256sum </mnt/origin/kept)" "$sum"
umount /mnt/origin
dmsetup remove data
