# cryptsetup works on a slow disk while volumes are copied: resize, suspend with the key wiped, resume, refresh, and
# attempts to close. LUKS is beneath the origin (an attached volume on LUKS) or above it (LUKS on a volume). Copies
# release regions, are held, interrupted, killed, recovered and resumed. What cryptsetup reports as done is done; a
# device in use is not closed; only cryptsetup's own resume ends its suspension; a copy that succeeds matches its
# instant.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_load.sh"

settle
make_filesystem ext4 "$(disk 1)" /mnt/scratch
crypt=tidetest-crypt
head -c 32 /dev/urandom >/run/key
# Size in sectors: at least that of the filesystem above, at most what the header leaves.
FEWEST=$((24 * 2048)) MOST=$((44 * 2048))
sectors=$FEWEST
# Fast key derivation and a small header.
format() {
    cryptsetup luksFormat -q --type luks2 --pbkdf pbkdf2 --pbkdf-force-iterations 1000 --luks2-metadata-size 16k \
        --luks2-keyslots-size 256k --key-file /run/key "$1"
}
opened() { cryptsetup open --disable-keyring --key-file /run/key "$1" "$2"; }
if [ "$WHERE" = beneath ]; then
    format "$(disk 0)"
    opened "$(disk 0)" $crypt
    cryptsetup resize --size $sectors --key-file /run/key $crypt
    settle
    make_filesystem ext4 /dev/mapper/$crypt /mnt/origin
    before=$(dmsetup table $crypt)
    # The table of a mounted crypt device belongs to cryptsetup, so a copy is refused. An attached volume on it has a
    # table of its own.
    assert_status 3 tidemark copy /dev/mapper/$crypt /mnt/scratch/copy.raw --yes --store /mnt/scratch
    assert_same "the table of a device that is refused" "$(dmsetup table $crypt)" "$before"
    umount /mnt/origin
    tidemark attach /dev/mapper/$crypt --name data
    settle
    mount /dev/mapper/data /mnt/origin
    volumes=data
else
    dmsetup create data --table "0 $(blockdev --getsz "$(disk 0)") linear $(disk 0) 0"
    settle
    format /dev/mapper/data
    opened /dev/mapper/data $crypt
    cryptsetup resize --size $sectors --key-file /run/key $crypt
    settle
    make_filesystem ext4 /dev/mapper/$crypt /mnt/origin
    volumes=
fi
origin=/dev/mapper/data
table=$(dmsetup table data)
head -c 4m /dev/urandom >/mnt/origin/kept
sum=$(sha256sum </mnt/origin/kept)
sync
start_hot_load

# Background jobs cannot fail the case; they note the failure for their round.
wrong() {
    echo "$*" >>/run/wrong
    exit 1
}
asked() { "$@" >/run/crypt.out 2>&1 || wrong "'$*' failed: $(cat /run/crypt.out)"; }

# What cryptsetup does.

resizes() {
    sectors=$((FEWEST + RANDOM % ((MOST - FEWEST) / 8) * 8))
    asked cryptsetup resize --size $sectors --key-file /run/key $crypt
    [ "$(blockdev --getsz /dev/mapper/$crypt)" = $sectors ] || wrong "resized, and the kernel has another size"
}
refreshes() {
    local flag=''
    [ $((RANDOM % 2)) = 0 ] || flag=--allow-discards
    # shellcheck disable=SC2086
    asked cryptsetup refresh --disable-keyring $flag --key-file /run/key $crypt
    case "$flag,$(dmsetup table $crypt)" in
        ,*allow_discards* | --allow-discards,*aes-xts-plain64\ *0\ *[0-9]) wrong "refreshed, and its flags are others: $(dmsetup table $crypt)" ;;
    esac
    # The refresh made the mapping cover the whole device again.
    sectors=$(blockdev --getsz /dev/mapper/$crypt)
}
suspends() {
    asked cryptsetup luksSuspend $crypt
    for _ in 1 2 3 4 5; do
        dmsetup info $crypt | grep -q 'State: *SUSPENDED' || wrong "another process ended the suspension of cryptsetup"
        sleep "0.0$((RANDOM % 9))"
    done
    asked cryptsetup luksResume --disable-keyring --key-file /run/key $crypt
    ! dmsetup info $crypt | grep -q 'State: *SUSPENDED' || wrong "resumed, and it is suspended"
}
closes() {
    ! cryptsetup close $crypt >/run/crypt.out 2>&1 || wrong "what is in use was closed"
    dmsetup info $crypt >/dev/null || wrong "what is in use is gone"
}
at_work() {
    while [ -e /run/at-work ]; do
        pause
        local deed
        deed=$(shuf -n 1 --random-source=/dev/urandom -e resizes refreshes suspends closes)
        "$deed"
        echo "$deed" >>/run/deeds
    done
    echo $sectors >/run/sectors
}

# Copies while cryptsetup works.

as_before() { # WHEN
    assert_same "$1: the table of the origin" "$(dmsetup table data)" "$table"
    assert_same "$1: suspended devices" "$(suspended_devices)" ""
    assert_same "$1: the size above" "$(blockdev --getsz /dev/mapper/$crypt)" "$sectors"
    # shellcheck disable=SC2086
    assert_no_tidemark_left $volumes
    kill -0 $LOAD || fail "$1: the application has died: $(cat /run/hot.log)"
}

copied=0 void=0
# round END OPTION...: a copy with cryptsetup at work until the copy is over and recovered or resumed.
round() {
    local status=0 end=$1
    shift
    rm -f /mnt/scratch/copy.raw /mnt/scratch/instant
    touch /run/at-work
    tidemark copy "$origin" /mnt/scratch/copy.raw --all --yes --store /mnt/scratch --region 256KiB --segment 64KiB --rate 16MiB \
        --freeze-budget 60s --hook-frozen "$(capture_hook /mnt/scratch/instant)" "$@" >/run/copy.out 2>/run/copy.err &
    local copy=$!
    # A suspended device cannot be frozen: without this wait, few copies would reach their instant.
    (
        [ $((RANDOM % 3)) = 0 ] || until_preserved "$copy"
        at_work
    ) &
    local worker=$!
    if [ "$end" != none ]; then
        # At any time, also before the instant.
        [ $((RANDOM % 4)) = 0 ] || until_preserved "$copy"
        sleep "$((RANDOM % 2)).$((RANDOM % 9))"
        kill "-${end%,*}" "$copy" 2>/dev/null || true
    fi
    wait "$copy" 2>/dev/null || status=$?
    note "$end $*: the copy ended with $status $(grep '^tidemark: ' /run/copy.err || true)"
    if [ "$status" = 137 ]; then
        if [ "$end" = KILL,resume ] && tidemark resume >/run/copy.out 2>/run/copy.err; then
            status=0
            note "resumed"
        else
            [ "$end" = KILL,recover ] || note "not resumed: $(cat /run/copy.err)"
            tidemark recover >/run/recover.out 2>&1 || fail "recover: $(cat /run/recover.out)"
        fi
    fi
    rm -f /run/at-work
    wait "$worker" || fail "cryptsetup, during the copy: $(cat /run/wrong)"
    sectors=$(cat /run/sectors)
    case "$status" in
        0)
            copied=$((copied + 1))
            assert_identical /mnt/scratch/copy.raw /mnt/scratch/instant
            mv /mnt/scratch/copy.raw /mnt/scratch/last.raw
            ;;
        137 | 130 | 143) [ "$end" != none ] || fail "the copy ended by a signal that was not sent: $(cat /run/copy.err)" ;;
        *)
            void=$((void + 1))
            grep -q 'it is already frozen' /run/copy.err || fail "the copy ended with $status: $(cat /run/copy.err)"
            ;;
    esac
    [ "$status" = 0 ] || [ ! -e /mnt/scratch/copy.raw ] || fail "a failed copy has the final name"
    as_before "$end $*"
}

holding=(--chunk 64KiB --store-ram 0 --store-size 4MiB --on-full hold --hold-budget 20s)
for end in none KILL,recover TERM KILL,resume; do
    round "$end"
    round "$end" "${holding[@]}"
done
round KILL,resume
# A copy that meets a suspension at its instant is void. Chance decides how many do.
for _ in 1 2 3 4 5 6 7 8; do
    [ "$copied" -lt 3 ] || break
    round none "${holding[@]}"
done
stop_hot_load
note "$copied copies, $void void; $(sort /run/deeds | uniq -c | xargs)"
[ "$copied" -ge 3 ] || fail "too few of the uninterrupted copies succeeded"
for deed in resizes refreshes suspends closes; do
    grep -q "^$deed" /run/deeds || fail "nothing $deed: this proves nothing"
done

# The data written before is still there.
assert_same "the file, before" "$(sha256sum </mnt/origin/kept)" "$sum"
umount /mnt/origin
if [ "$WHERE" = beneath ]; then
    tidemark detach data
    cryptsetup close $crypt
    opened "$(disk 0)" $crypt
    copy=/mnt/scratch/last.raw
else
    cryptsetup close $crypt
    opened /dev/mapper/data $crypt
    opened "$(losetup --find --show /mnt/scratch/last.raw)" tidetest-copy
    copy=/dev/mapper/tidetest-copy
fi
settle
for device in /dev/mapper/$crypt "$copy"; do
    # A mount replays the journal.
    filesystem_check ext4 "$device"
    mount "$device" /mnt/origin
    assert_same "the file on $device, mounted anew" "$(sha256sum </mnt/origin/kept)" "$sum"
    umount /mnt/origin
done
[ "$WHERE" = beneath ] || cryptsetup close tidetest-copy
losetup --detach-all
cryptsetup close $crypt
[ "$WHERE" = beneath ] || dmsetup remove data
