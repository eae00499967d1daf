# A copy that loses a disk, and the checks after that. Sourced after lib.sh. The case defines `unplug DISK`, which
# removes the disk.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_load.sh"

is_gone() { ! kill -0 "$process" 2>/dev/null; }

# copied_without DISK TARGET STORE OPTION...: copies /dev/mapper/data and unplugs DISK during the copy. The copy's error
# is in /run/copy.err.
copied_without() {
    local disk=$1 target=$2 store=$3 status=0 start
    # Slow enough to be met in its middle: on a busy machine it takes the kernel seconds to remove a disk.
    tidemark copy /dev/mapper/data "$target" --all --yes --store "$store" --store-ram 0 --rate 2MiB --freeze-budget 5s "${@:4}" \
        >/run/copy.out 2>/run/copy.err &
    process=$!
    wait_until 30 is_preserved data
    sleep 1
    kill -0 "$process" || fail "the copy ended before the disk was unplugged: $(cat /run/copy.err)"
    start=${EPOCHREALTIME/./}
    unplug "$disk"
    wait_until 60 is_gone
    wait "$process" || status=$?
    note "$disk unplugged: exit status $status after $(((${EPOCHREALTIME/./} - start) / 1000)) ms: $(
        grep -v '^copying\|^instant\|^prepar' /run/copy.err | head -n 3 | xargs -d '\n'
    )"
    assert_same "the exit status" "$status" 1
    assert_same "suspended devices" "$(suspended_devices)" ""
}

# fails_to_recover: each attempt says how to remove the volume whose disk is gone.
fails_to_recover() {
    for _ in 1 2; do
        assert_status 1 tidemark recover 2>/run/recover.err
        grep -q "remove it ('dmsetup remove data')" /run/recover.err || fail "no message says what to do: $(cat /run/recover.err)"
    done
    assert_same "suspended devices" "$(suspended_devices)" ""
}
