# Shared by the stack cases: an origin under load, and a stack that is inserted without a copy.
# shellcheck shell=bash

REPORT=/run/stack-report

# make_origin: creates "data", a linear device on disk 0 with an ext4 on /mnt/data. Disk 1 is the COW store.
make_origin() {
    local sectors
    sectors=$(blockdev --getsz "$(disk 0)")
    # Two lines, so that the comparison of the restored table means something.
    dmsetup create data <<TABLE
0 $((sectors / 2)) linear $(disk 0) 0
$((sectors / 2)) $((sectors / 2)) linear $(disk 0) $((sectors / 2))
TABLE
    settle
    TABLE_BEFORE=$(dmsetup table data)
    ORIGIN=$(dm_node data)
    mkfs.ext4 -q "$ORIGIN"
    mkdir -p /mnt/data
    mount "$ORIGIN" /mnt/data
    COW=$(stat -L -c '%Hr:%Lr' "$(disk 1)")
    fresh_store
}

fresh_store() { dd if=/dev/zero of="$(disk 1)" bs=1M count=1 oflag=direct status=none; }

# start_load: random writes with verify headers, until stop_load. The file is allocated in advance: blocks allocated
# after an instant were free at the instant, and free blocks are not preserved.
start_load() {
    dd if=/dev/zero of=/mnt/data/load.0.0 bs=1M count=12 oflag=direct conv=fsync status=none
    fio --name=load --directory=/mnt/data --size=12m --rw=randwrite --bs=4k --ioengine=psync --direct=1 \
        --verify=crc32c --do_verify=0 --rate_iops=150 --time_based --runtime=3600 --randseed="$SEED" --fallocate=none \
        >"$ARTIFACTS/fio" 2>&1 &
    LOAD=$!
    wait_until 30 load_runs
    load_goes_on
}

load_runs() { pgrep -P "$LOAD" fio >/dev/null; }

load_written() { awk '/^write_bytes/ { print $2 }' "/proc/$(pgrep -P "$LOAD" fio | head -n 1)/io"; }

load_has_written_since() { [ "$(load_written)" -gt "$1" ]; }

# On a busy host the guest itself can stall for seconds, but a held origin would never continue.
load_goes_on() {
    kill -0 "$LOAD" 2>/dev/null || fail "the load has died"
    wait_until 20 load_has_written_since "$(load_written)"
}

stop_load() {
    kill -INT "$LOAD"
    wait "$LOAD" || true
    ! grep -q 'error=\|err=[^ ]*[1-9]' "$ARTIFACTS/fio" || fail "the load saw an error: $(grep 'err' "$ARTIFACTS/fio")"
}

# insert BUDGET_MS HOOK: inserts a stack and keeps it until remove_stack; fails if the insertion fails.
insert() {
    rm -f "$REPORT" /run/hold
    mkfifo /run/hold
    "$TIDEMARK" __stack "$REPORT" data "$COW" "$1" "$2" /mnt/data </run/hold &
    HOLDER=$!
    exec 9>/run/hold
    wait_until 30 test -s "$REPORT"
}

# Space in use is mapped to the preserving device; space that the filesystem calls free is not.
assert_stack_is_over() { # ORIGIN
    assert_same "the target of $1#preserve" "$(dmsetup table "$1#preserve" | cut -d' ' -f3)" snapshot-origin
    # One linear line takes the flush.
    assert_same "the targets of $1" "$(dmsetup table "$1" | cut -d' ' -f3 | sort | uniq -c | awk '{ print ($2 == "linear" ? $1 " " : "") $2 }' | xargs)" "1 linear switch"
    is_preserved "$1" || fail "no part of $1 is preserved"
    [ "$(dmsetup table "$1" | wc -l)" -gt 2 ] || fail "all of $1 is preserved: $(dmsetup table "$1")"
}

remove_stack() {
    exec 9>&-
    wait "$HOLDER" || fail "removal: exit status $?, $(cat "$REPORT")"
}

assert_as_before() {
    assert_same "the table of data" "$(dmsetup table data)" "$TABLE_BEFORE"
    assert_same "suspended devices" "$(suspended_devices)" ""
    assert_no_tidemark_left
}
