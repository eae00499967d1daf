# Loads and captures shared by the cases that copy a busy volume. Sourced after lib.sh.
# shellcheck shell=bash

# make_filesystem TYPE DEVICE MOUNTPOINT
make_filesystem() {
    case "$1" in
        ext4) mkfs.ext4 -q -F "$2" ;;
        # mkfs.xfs refuses sizes below 300 MiB unless these variables of its own test suite are set (its
        # mkfs/xfs_mkfs.c).
        xfs) TEST_DIR=1 TEST_DEV=1 QA_CHECK_FS=1 mkfs.xfs -q -f "$2" ;;
        *) fail "no such filesystem: $1" ;;
    esac
    mkdir -p "$3"
    mount -t "$1" "$2" "$3"
}

# filesystem_check TYPE DEVICE: a read-only check after a mount, which replays the journal of the frozen filesystem, and
# an unmount. The check itself changes nothing.
filesystem_check() {
    local at=/run/fscheck.$RANDOM
    mkdir -p "$at"
    if [ "$1" = xfs ]; then mount -t xfs -o nouuid "$2" "$at"; else mount -t "$1" "$2" "$at"; fi
    umount "$at"
    rmdir "$at"
    case "$1" in
        ext4) e2fsck -fn "$2" ;;
        xfs) xfs_repair -n "$2" ;;
    esac >/run/fscheck.log 2>&1 || { cat /run/fscheck.log; fail "$1 check of $2"; }
}

LOAD_PIDS=()
LOAD_DIR=

# start_load DIR SEED: fio random writes with verify headers, a reader of the same file, and a churn of small files.
start_load() {
    LOAD_DIR=$1
    rm -f /run/load.stop /run/load.failed /run/load.pause
    mkdir -p "$1/churn"
    fio --name=warm --directory="$1" --filename=fio.dat --size=24m --rw=write --bs=64k --verify=crc32c \
        --do_verify=0 --randseed="$2" --minimal >/run/fio-warm.log 2>&1 || fail "fio warm-up"
    (
        round=0
        while [ ! -e /run/load.stop ]; do
            round=$((round + 1))
            load_waits
            fio --name=load --directory="$1" --filename=fio.dat --size=24m --rw=randwrite --bs=4k --direct=1 \
                --ioengine=libaio --iodepth=4 --verify=crc32c --verify_backlog=64 --randseed=$(($2 + round)) \
                --io_size=4m --minimal >/run/fio-load.log 2>&1 ||
                { { echo fio; tail -n 3 /run/fio-load.log; } >/run/load.failed; break; }
            echo "$round" >/run/load.fio-rounds
        done
    ) &
    LOAD_PIDS+=($!)
    (
        round=0
        while [ ! -e /run/load.stop ]; do
            round=$((round + 1))
            load_waits
            for i in 1 2 3 4 5 6 7 8; do
                head -c $((RANDOM * 4)) /dev/urandom >"$1/churn/f$i.new" || { echo churn >/run/load.failed; break 2; }
                mv "$1/churn/f$i.new" "$1/churn/f$i"
            done
            rm -f "$1/churn/f$((round % 8 + 1))"
            [ $((round % 5)) -ne 0 ] || sync -f "$1/churn"
            echo "$round" >/run/load.churn-rounds
        done
    ) &
    LOAD_PIDS+=($!)
    sleep 1
}

# pause_load lets the current rounds finish and starts no others until go_on_load: checks of a finished copy need no
# load beside them.
pause_load() { touch /run/load.pause; }
go_on_load() { rm -f /run/load.pause; }
load_waits() { while [ -e /run/load.pause ] && [ ! -e /run/load.stop ]; do sleep 0.05; done; }

# load_is_alive: fails if a load has ended or has seen an error.
load_is_alive() {
    [ ! -e /run/load.failed ] || fail "the load saw an error: $(cat /run/load.failed)"
    local pid
    for pid in "${LOAD_PIDS[@]}"; do
        kill -0 "$pid" 2>/dev/null || fail "load process $pid is gone"
    done
}

stop_load() {
    touch /run/load.stop
    wait "${LOAD_PIDS[@]}" || true
    LOAD_PIDS=()
    [ ! -e /run/load.failed ] || fail "the load saw an error: $(cat /run/load.failed)"
}

# capture_hook FILE: a command for --hook-frozen that saves the origin's content at the instant.
capture_hook() {
    # shellcheck disable=SC2016
    echo 'dd if="$TIDEMARK_ORIGIN_BELOW" of='"$1"' bs=1M iflag=direct conv=fsync status=none'
}

# same_bytes A B [SIZE]: A and B are equal byte for byte (in the first SIZE bytes).
same_bytes() {
    if [ $# -gt 2 ]; then cmp -n "$3" "$1" "$2"; else cmp "$1" "$2"; fi || fail "$1 and $2 differ"
}

# start_hot_load: process $LOAD writes a small file on /mnt/origin all the time, so that every suspension has I/O to
# wait for.
start_hot_load() {
    fio --name=hot --filename=/mnt/origin/hot --size=8m --rw=randwrite --bs=4k --direct=1 --sync=dsync --ioengine=libaio \
        --iodepth=8 --time_based --runtime=3600 --randseed="$SEED" >/run/hot.log 2>&1 &
    LOAD=$!
    wait_until 30 test -s /mnt/origin/hot
}
stop_hot_load() { kill -INT "$LOAD"; wait "$LOAD" || true; }

# until_preserved PID: waits until the copy of $origin by this process has its snapshot, or has ended.
until_preserved() {
    while kill -0 "$1" 2>/dev/null && ! is_preserved "$origin"; do sleep 0.1; done
}

# Sleeps for a random time of at most half a second.
pause() { sleep "0.$((RANDOM % 5))$((RANDOM % 9))"; }
