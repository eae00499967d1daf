# After a copy was killed, a filesystem on the origin is mounted over the directory where the store may grow. A store
# that grew there would wait for the origin. Resume refuses until the mount is gone. A store that cannot grow is not
# affected.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_resume.sh"

make_volume "$(disk 1)" 16
store=/mnt/scratch/store
mkdir "$store" /mnt/origin/store
truncate -s 40m /mnt/origin/image
loop=$(losetup -f --show /mnt/origin/image)
mkfs.ext4 -q "$loop"

# start_and_kill RAM: starts a copy with this --store-ram and kills it.
start_and_kill() {
    tidemark copy "$origin" /mnt/scratch/copy.raw --all --yes --store "$store" --store-ram "$1" --freeze-budget 120s \
        --hook-frozen "$(capture_hook /mnt/scratch/instant)" --region 4MiB --segment 256KiB --rate 16MiB \
        >/run/copy.out 2>&1 &
    process=$!
    wait_until 60 has_placed 8
    sleep 0.5
    kill_copy
}

state() {
    dmsetup table | sort
    dmsetup info -c --noheadings -o name,suspended,open | sort
    find /mnt/scratch -xdev -printf '%p %s %T@\n' | sort
}

# refused_with CHAIN: resume is refused and names this chain of devices.
refused_with() {
    state >/run/before
    for how in --dry-run ''; do
        # shellcheck disable=SC2086
        assert_status 3 tidemark resume $how 2>/run/err
        cat /run/err
        grep -q "the store at $store would wait for the origin itself: $1" /run/err || fail "the refusal gives another reason"
        grep -q 'the copy stays as it was' /run/err || fail "the refusal does not describe the state"
        grep -q 'tidemark recover' /run/err || fail "the refusal does not say what to do"
        state >/run/now
        diff /run/before /run/now || fail "the refused resume changed something"
    done
}

# A store that fills in a burst, as just after a thaw on a loaded machine, grows ahead at once: such a copy is given up.
start_without_tail() {
    for _ in 1 2 3 4 5; do
        start_and_kill 64MiB
        [ -n "$(find "$store" -type f)" ] || return 0
        tidemark recover
        rm /mnt/scratch/copy.raw*
    done
    fail "the store grew in each of five copies"
}

note "the tail does not exist yet, and its directory is now on the origin"
start_without_tail
mount --bind /mnt/origin/store "$store"
refused_with 'the ext4 at /mnt/origin'
umount "$store"
note "through a loop device"
mount "$loop" "$store"
refused_with "the ext4 at $store -> $loop -> the ext4 at /mnt/origin"
umount "$store"
goes_on /mnt/scratch/copy.raw
rm /mnt/scratch/copy.raw

note "a store at its maximum size"
start_and_kill 0
mount --bind /mnt/origin/store "$store"
goes_on /mnt/scratch/copy.raw
umount "$store"

losetup -d "$loop"
umount /mnt/origin
filesystem_check ext4 "$origin"
