# Shared by the store cases: a linear device "data" on disk 0 with raw writes, and a filesystem for everything else on
# disk 1.
# shellcheck shell=bash

origin=/dev/mapper/data

make_volume() {
    fill "$(disk 0)" "$(blockdev --getsize64 "$(disk 0)")" origin
    dmsetup create --noudevsync data --table "0 $(blockdev --getsz "$(disk 0)") linear $(disk 0) 0"
    settle
    mkfs.ext4 -q "$(disk 1)"
    mkdir -p /mnt/scratch
    mount "$(disk 1)" /mnt/scratch
    TABLE_BEFORE=$(dmsetup table data)
}

# start_writes FIO-OPTION...: random writes to the volume until stop_writes. Each lap writes every block once before the
# next lap begins.
start_writes() {
    fio --name=writes --filename="$origin" --rw=randwrite --bs=4k --direct=1 --ioengine=libaio --iodepth=8 \
        --time_based --runtime=600 --randseed="$SEED" --output="$ARTIFACTS/fio" "$@" &
    WRITES=$!
}

writes_go_on() {
    local before after
    kill -0 "$WRITES" 2>/dev/null || fail "the writes have ended: $(cat "$ARTIFACTS/fio")"
    before=$(awk '{ print $7 }' "/sys/class/block/$(basename "$(readlink -f "$(disk 0)")")/stat")
    sleep 1
    after=$(awk '{ print $7 }' "/sys/class/block/$(basename "$(readlink -f "$(disk 0)")")/stat")
    [ "$after" -gt "$before" ] || fail "the writes have stalled"
}

stop_writes() {
    kill -INT "$WRITES"
    wait "$WRITES" || true
    ! grep -q 'err= *[1-9]\|error=' "$ARTIFACTS/fio" || fail "the writes saw an error: $(cat "$ARTIFACTS/fio")"
}

volume_as_before() {
    assert_same "the table of data" "$(dmsetup table data)" "$TABLE_BEFORE"
    assert_same "suspended devices" "$(suspended_devices)" ""
    store_left_nothing
}

# No part of a store is left: no device, loop device, RAM disk with memory, or record.
store_left_nothing() {
    local left
    left=$(dmsetup info -c --noheadings -o uuid | grep -E 'TIDEMARK-.*-(cow|snap|real|preserve)-' || true)
    [ -z "$left" ] || fail "devices are left: $left"
    # The kernel frees a loop device shortly after its last close.
    wait_until 10 no_store_is_attached
    for left in /sys/block/zram*/disksize; do
        [ ! -e "$left" ] || [ "$(cat "$left")" = 0 ] || fail "a RAM head is left: $left"
    done
    left=$(find /run/tidemark/stores -type f 2>/dev/null || true)
    [ -z "$left" ] || fail "records are left: $left"
}

no_store_is_attached() { ! losetup --noheadings -O BACK-FILE -a | grep -v '/small.img$' | grep -q .; }

uptime_now() { cut -d' ' -f1 /proc/uptime; }
