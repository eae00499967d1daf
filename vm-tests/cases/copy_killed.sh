# Safety promises 2, 3, 4 and 6: SIGKILL around and in the middle of a whole copy. The load goes on, recover
# puts everything back, nothing stands under the final name, and a new copy works.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_load.sh"

tidemark attach "$(disk 0)" --name data
origin=/dev/mapper/data
make_filesystem ext4 "$origin" /mnt/origin
make_filesystem ext4 "$(disk 1)" /mnt/scratch
table_before=$(dmsetup table "$origin")
start_load /mnt/origin "$SEED"

options=(--yes --store /mnt/scratch --store-ram 4MiB --freeze-budget 2s)

# As it was before: asked after every kill.
put_back() {
    timeout 30 dd if=/dev/zero of=/mnt/origin/probe bs=4k count=1 conv=fsync status=none ||
        fail "$1: the origin does not answer"
    load_is_alive
    tidemark recover || fail "$1: recover failed"
    [ "$(dmsetup table "$origin")" = "$table_before" ] || fail "$1: the table is another: $(dmsetup table "$origin")"
    [ ! -e /mnt/scratch/copy.raw ] || fail "$1: a partial copy stands under the final name"
    rm -f /mnt/scratch/.copy.raw*
    assert_no_tidemark_left data
    load_is_alive
}

for point in copy.store.before copy.store.after copy.data.before copy.data.after copy.release.before copy.release.after; do
    status=0
    TIDEMARK_CRASH_AT=$point tidemark copy "$origin" /mnt/scratch/copy.raw "${options[@]}" 2>/run/err || status=$?
    assert_same "exit status at $point" "$status" 137
    case "$point" in
        # By then the copy is complete.
        copy.data.after | copy.release.*) mv /mnt/scratch/copy.raw /run/complete.raw && rm /run/complete.raw ;;
    esac
    put_back "$point"
done

for round in 1 2 3 4 5; do
    tidemark copy "$origin" /mnt/scratch/copy.raw "${options[@]}" --rate 4MiB 2>/run/err &
    copy=$!
    wait_until 60 sh -c "dmsetup table $origin | grep -q snapshot-origin"
    sleep "0.$(rand "moment-$round" 0 9)"
    sleep "$(rand "second-$round" 0 3)"
    kill -KILL "$copy"
    wait "$copy" || true
    note "round $round: killed while copying"
    put_back "round $round"
done

tidemark copy "$origin" /mnt/scratch/copy.raw --all --yes --store /mnt/scratch --freeze-budget 120s \
    --hook-frozen "$(capture_hook /mnt/scratch/instant)"
assert_identical /mnt/scratch/copy.raw /mnt/scratch/instant
stop_load
umount /mnt/origin
filesystem_check ext4 "$origin"
assert_no_tidemark_left data
