# During a copy, the queue of a volume may offer less than before: no RWF_NOWAIT, other limits, other settings than the
# administrator chose. Afterwards all are as before. Raw users of the volume notice such changes most.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_load.sh"

make_filesystem ext4 "$(disk 1)" /mnt/scratch
dmsetup create --noudevsync data --table "0 $(blockdev --getsz "$(disk 0)") linear $(disk 0) 0"
settle
origin=$(dm_node data)
queue=/sys/block/${origin#/dev/}/queue
table_before=$(dmsetup table data)

# Keeps one descriptor open from before the copy. For every input line it tries one RWF_NOWAIT read and prints the
# result.
cat >/run/nowait.py <<'PYTHON'
import errno, mmap, os, sys
file = os.open(sys.argv[1], os.O_RDWR | os.O_DIRECT)
page = mmap.mmap(-1, 4096)
for line in sys.stdin:
    try:
        os.preadv(file, [page], 8 << 20, os.RWF_NOWAIT)
        answer = "well"
    except OSError as error:
        answer = "well" if error.errno == errno.EAGAIN else errno.errorcode[error.errno]
    os.preadv(file, [page], 8 << 20)
    print(answer, flush=True)
PYTHON
mkfifo /run/ask /run/answer
python3 /run/nowait.py "$origin" </run/ask >/run/answer &
exec 8>/run/ask 9</run/answer
nowait() {
    local answer
    echo >&8
    read -r -t 20 answer <&9 || fail "no answer"
    echo "$answer"
}

limits() { for file in read_ahead_kb max_sectors_kb discard_max_bytes write_cache rotational nr_requests; do [ ! -e "$queue/$file" ] || echo "$file=$(cat "$queue/$file")"; done | xargs; }
atomic() { cat "$queue/atomic_write_unit_max_bytes" 2>/dev/null || echo 0; }
note "as the kernel has it: $(limits) atomic=$(atomic)"
echo 4096 >"$queue/read_ahead_kb"
echo 64 >"$queue/max_sectors_kb"
echo "write through" >"$queue/write_cache"
echo 1048576 >"$queue/discard_max_bytes" || true
limits_before=$(limits)
note "as an administrator sets it: $limits_before"

assert_same "a read that must not wait, before" "$(nowait)" well
fio --name=ring --filename="$origin" --rw=randrw --bs=4k --direct=1 --ioengine=io_uring --iodepth=8 --time_based --runtime=600 \
    --rate_iops=400 --randseed="$SEED" --output=/run/fio.log &
ring=$!
sleep 1
tidemark copy "$origin" /mnt/scratch/copy.raw --all --yes --store /mnt/scratch --rate 12MiB >/run/copy.out 2>/run/copy.err &
copy=$!
wait_until 20 is_preserved "$origin"
during=$(nowait)
note "in the middle of the copy: $during; $(limits) atomic=$(atomic)"
# The README states this limitation. If this assertion fails one day, update the README.
assert_same "a read that must not wait, during the copy" "$during" ENOTSUP
assert_same "the read-ahead and the largest request, during the copy" "$(limits | cut -d' ' -f1,2)" "$(cut -d' ' -f1,2 <<<"$limits_before")"
wait "$copy" || fail "the copy: $(cat /run/copy.err)"
assert_same "a read that must not wait, after" "$(nowait)" well
kill -0 "$ring" || fail "io_uring saw an error: $(cat /run/fio.log)"
kill -INT "$ring"
wait "$ring" || true
grep -q 'err= 0' /run/fio.log || fail "io_uring saw an error: $(cat /run/fio.log)"
assert_same "the settings" "$(limits)" "$limits_before"
assert_same "the table" "$(dmsetup table data)" "$table_before"

as_before() {
    assert_same "$1: the settings" "$(limits)" "$limits_before"
    assert_same "$1: the table" "$(dmsetup table data)" "$table_before"
    assert_no_tidemark_left
}
# killed_at POINT: a copy that is killed at this crash point.
killed_at() {
    local status=0
    rm -f /mnt/scratch/copy.raw
    TIDEMARK_CRASH_AT=$1 tidemark copy "$origin" /mnt/scratch/copy.raw --all --yes --store /mnt/scratch --region 8MiB \
        --segment 1MiB >/run/copy.out 2>/run/copy.err || status=$?
    assert_same "exit status at $1: $(cat /run/copy.err)" "$status" 137
    note "killed at $1: $(limits)"
}

# After a kill, recover and resume put the settings back together with the table. At the last of these points the origin
# already has its own table again, and only the settings are missing.
for point in insert.switch.before insert.switch.after copy.data.before release.swap.after:2 restore.suspend.after restore.switch.after; do
    killed_at "$point"
    tidemark recover >/run/recover.out 2>&1 || fail "recover: $(cat /run/recover.out)"
    as_before "killed at $point, and given up"
done
killed_at copy.data.before
tidemark resume >/run/resume.out 2>&1 || fail "resume: $(cat /run/resume.out)"
as_before "killed, and resumed"

# A setting that the administrator changes during the copy is kept.
tidemark copy "$origin" /mnt/scratch/copy.raw --all --yes --store /mnt/scratch --region 8MiB --rate 24MiB >/run/copy.out 2>/run/copy.err &
copy=$!
wait_until 20 is_preserved "$origin"
echo 2048 >"$queue/read_ahead_kb"
wait "$copy" || fail "the copy: $(cat /run/copy.err)"
limits_before=${limits_before/read_ahead_kb=4096/read_ahead_kb=2048}
as_before "set in mid-copy"
exec 8>&- 9<&-
assert_no_tidemark_left
dmsetup remove --noudevsync data
