# A copy is killed under load. Another process adopts its store, enlarges it by a further tail, reads it and compares
# with the kernel's snapshot, and releases it: nothing is left. If the second process dies at any step, a third one
# continues.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_store.sh"

REPORT=/run/store-report
FILLER=/mnt/scratch/filler
INSTANT=/tmp/instant
COPY=/tmp/copy.raw
# The I/O depth of start_writes.
WRITES_IN_FLIGHT=8

# begin COPY-OPTION...: a copy that is killed once its store is in use. With ROOM, the store's filesystem has only that
# many free MiB for it until the copy is dead, beside the twentieth that is kept free.
begin() {
    local size free
    if [ -n "${ROOM:-}" ]; then
        size=$(($(stat -f -c '%b * %S' /mnt/scratch)))
        free=$(($(stat -f -c '%a * %S' /mnt/scratch)))
        fallocate -l $((free - size / 20 - (ROOM << 20))) "$FILLER"
    fi
    # With large chunks, few exceptions fill the store, and reading them one by one is quick.
    tidemark copy "$origin" "$COPY" --all --yes --chunk 64KiB --store /mnt/scratch --rate 1MiB --freeze-budget 120s \
        --hook-frozen "dd if=\$TIDEMARK_ORIGIN_BELOW of=$INSTANT bs=1M iflag=direct status=none" "$@" \
        >"$ARTIFACTS/copy" 2>&1 &
    local copy=$!
    if ! wait_for_exceptions; then
        cat "$ARTIFACTS/copy"
        fail "the store was not used"
    fi
    kill -KILL "$copy"
    wait "$copy" || true
    rm -f "$FILLER"
    ID=$(basename /run/tidemark/stores/*.json .json)
    SNAP=$(dmsetup info -c --noheadings -o name,uuid --separator ' ' | awk '$2 ~ /-snap-/ { print $1 }')
    STORE=$(dmsetup info -c --noheadings -o name,uuid --separator ' ' | awk '$2 ~ /-cow-/ { print $1 }')
    note "killed: $(dmsetup status "$SNAP"); $(dmsetup table "$STORE" | tr '\n' ';')"
}

wait_for_exceptions() {
    local try
    for try in $(seq 600); do
        if dmsetup status | grep -qE 'snapshot [0-9]{5,}/'; then return 0; fi
        sleep 0.1
    done
    return "$((try > 0))"
}

# adopt [CRASH-POINT]: starts a process that adopts the store; `ask` sends it orders.
adopt() {
    rm -f "$REPORT" /run/orders
    mkfifo /run/orders
    TIDEMARK_CRASH_AT="${1:-none}" "$TIDEMARK" __store "$REPORT" "$ID" "$SNAP" "$INSTANT" </run/orders &
    ADOPTER=$!
    exec 9>/run/orders
    if [ "$#" = 0 ]; then
        wait_until 30 test -s "$REPORT"
        grep -q '^adopted' "$REPORT" || fail "$(cat "$REPORT")"
        note "$(cat "$REPORT")"
    fi
}

# ask ORDER: sends an order; the reply is in ANSWER.
ask() {
    local lines
    lines=$(wc -l <"$REPORT")
    echo "$1" >&9
    wait_until 120 more_than "$lines"
    ANSWER=$(tail -n 1 "$REPORT")
    note "$1: $ANSWER"
    ! grep -q '^error' "$REPORT" || fail "$ANSWER"
}

more_than() { [ "$(wc -l <"$REPORT")" -gt "$1" ]; }

# word NAME: prints the number after NAME in ANSWER.
word() { sed -n "s/.*\<$1 \([0-9]*\).*/\1/p" <<<"$ANSWER"; }

# Every original in the store equals the snapshot's content and the origin's content at the instant.
store_is_right() {
    ask exceptions
    assert_same "originals that differ" "$(word different)" 0
    # Exceptions may be added between status and reading. At most the writes in flight may be missing: the status counts
    # a chunk when it is allocated, before its exception is committed.
    [ $(($(word exceptions) + WRITES_IN_FLIGHT)) -ge "$(word of)" ] || fail "exceptions are missing"
    [ "$(word exceptions)" -gt 50 ] || fail "too few exceptions: this proves nothing"
}

used_past() {
    ! dmsetup status "$SNAP" | grep -q Invalid || fail "the store was full before it was enlarged"
    [ "$(dmsetup status "$SNAP" | sed 's,.* \([0-9]*\)/.*,\1,')" -gt $(($1 / 512)) ]
}

# Further writes of the same kind, now that there is room.
hurry() {
    fio --name=hurry --filename="$origin" --rw=randwrite --bs=4k --blockalign=64k --direct=1 --rate_iops=100 \
        --time_based --runtime=600 --randseed="$((SEED + 1))" --output="$ARTIFACTS/fio-hurry" &
    HURRY=$!
}

no_hurry() {
    kill -INT "$HURRY"
    wait "$HURRY" || true
    ! grep -q 'err= *[1-9]\|error=' "$ARTIFACTS/fio-hurry" || fail "the writes saw an error: $(cat "$ARTIFACTS/fio-hurry")"
}

# grows_further PIECES: enlarges the store while it is in use, and checks that originals are written to the new part.
grows_further() {
    local before
    ask grow
    before=$(word mapped)
    assert_same "grown" "$(word grow)" 1
    [ "$(word mapped)" -gt "${MAPPED}" ] || fail "the store is not larger than $MAPPED"
    assert_same "pieces of the store" "$(dmsetup table "$STORE" | wc -l)" "$1"
    assert_same "the kernel's size" "$(blockdev --getsize64 "$(dm_node "$STORE")")" "$before"
    hurry
    wait_until 400 used_past $((MAPPED + (4 << 20)))
    no_hurry
    store_is_right
    [ "$(word farthest)" -gt "$MAPPED" ] || fail "no original is in the new piece: this proves nothing"
    ask follow
    [ "$(word follow)" -gt 50 ] || fail "the follower sees nothing"
    writes_go_on
}

# The adopter handles the store alone, so the stack is removed by hand.
stack_off() {
    local real preserve
    preserve=$(dmsetup info -c --noheadings -o name,uuid --separator ' ' | awk '$2 ~ /-preserve-/ { print $1 }')
    real=$(dmsetup info -c --noheadings -o name,uuid --separator ' ' | awk '$2 ~ /-real-/ { print $1 }')
    dmsetup load data --table "$TABLE_BEFORE"
    dmsetup suspend --noflush --nolockfs data
    dmsetup resume --noudevsync data
    dmsetup remove --noudevsync "$preserve"
    dmsetup remove --noudevsync "$SNAP"
    dmsetup remove --noudevsync "$real"
}

give_back() {
    stack_off
    ask "$1"
    wait "$ADOPTER" || fail "the store was not released: $ANSWER"
    exec 9>&-
    store_left_nothing
    writes_go_on
    # Removes the dead copy's record and partial file.
    tidemark recover
    volume_as_before
    rm -f /tmp/.*partial* /tmp/*partial* "$COPY" "$INSTANT"
}

make_volume
# Slow enough that the store does not fill before it is enlarged, also on a busy host.
start_writes --bs=4k --blockalign=64k --rate_iops=15

note "adopted with the head alone: the tail is gone, and a new one is added"
begin --store-ram 64MiB
assert_same "pieces of the store" "$(dmsetup table "$STORE" | wc -l)" 1
adopt
MAPPED=$((64 << 20))
store_is_right
# Only one of two processes gets the store, and a store in use is not a leftover.
assert_status 3 "$TIDEMARK" __store /run/second "$ID" "$SNAP" </dev/null
grep -q 'is in use' /run/second || fail "$(cat /run/second)"
grows_further 2
give_back release

note "adopted with head and tail: a further tail is added"
ROOM=28 begin --store-ram 2MiB
assert_same "pieces of the store" "$(dmsetup table "$STORE" | wc -l)" 2
adopt
MAPPED=$(blockdev --getsize64 "$(dm_node "$STORE")")
grows_further 3
give_back release

note "a store to be kept is enlarged in its file, and kept"
ROOM=28 begin --keep-store
adopt
MAPPED=$(blockdev --getsize64 "$(dm_node "$STORE")")
grows_further 1
give_back keep
kept=$(find /mnt/scratch -name '*.store')
assert_same "what was kept" "released $kept" "$ANSWER"
assert_same "its magic" "$(od -An -tx4 -N4 "$kept" | tr -d ' ')" 70416e53
rm "$kept"

note "the adopter dies at each step, and another process continues"
ROOM=40 begin --store-ram 2MiB
for at in store.adopt.locked store.adopt.cleared; do
    adopt "$at"
    exec 9>&-
    assert_status 137 wait "$ADOPTER"
done
for at in store.grow.made store.swap.loaded; do
    adopt
    exec 9>&-
    wait "$ADOPTER"
    adopt "$at"
    echo grow >&9
    assert_status 137 wait "$ADOPTER"
    exec 9>&-
    assert_same "pieces of the store" "$(dmsetup table "$STORE" | wc -l)" 2
done
adopt
MAPPED=$(blockdev --getsize64 "$(dm_node "$STORE")")
grows_further 3
kill -KILL "$ADOPTER"
wait "$ADOPTER" || true
exec 9>&-
note "recover removes an abandoned store"
tidemark recover
volume_as_before
writes_go_on
assert_status 3 "$TIDEMARK" __store /run/third "$ID" "$SNAP" </dev/null
grep -q 'no record' /run/third || fail "$(cat /run/third)"
stop_writes
