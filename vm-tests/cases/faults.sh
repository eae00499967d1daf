# Safety promises 2 and 5 under faults: a clear error, the right exit code, an unharmed origin, and no partial result
# under the final name.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_load.sh"

origin_disk=$(disk 0)
scratch_disk=$(disk 1)
fault_disk=$(disk 2)
tidemark attach "$origin_disk" --name data
origin=/dev/mapper/data
make_filesystem ext4 "$origin" /mnt/origin
make_filesystem ext4 "$scratch_disk" /mnt/scratch
table_before=$(dmsetup table "$origin")
sectors=$(blockdev --getsz "$fault_disk")
start_load /mnt/origin "$SEED"

# expect_failure CODE PATTERN COMMAND...
expect_failure() {
    local want=$1 pattern=$2 got=0
    shift 2
    "$@" >/run/fault.out 2>/run/fault.err || got=$?
    cat /run/fault.err
    [ "$got" = "$want" ] || fail "exit code $got, expected $want: $*"
    grep -qiE "$pattern" /run/fault.err || fail "the error does not match '$pattern': $*"
    load_is_alive
    [ "$(dmsetup table "$origin")" = "$table_before" ] || fail "the origin's table changed after: $*"
    assert_no_tidemark_left data
    [ -z "$(find /mnt/scratch /mnt/small -name '*.raw' -o -name '*.tdm' -o -name '*partial*' 2>/dev/null)" ] ||
        fail "partial files are left after: $* ($(ls -la /mnt/scratch))"
}

note "secondary full: a small filesystem"
mkdir -p /mnt/small
mount -t tmpfs -o size=8m none /mnt/small
expect_failure 1 'space' tidemark copy "$origin" /mnt/small/copy.raw --yes --store /mnt/scratch --store-ram 0
expect_failure 1 'space' tidemark copy "$origin" /mnt/small/copy.tdm --yes --store /mnt/scratch
umount /mnt/small

note "secondary I/O error in the middle"
dmsetup create --noudevsync faulty --table "0 32768 linear $fault_disk 0
32768 8 error
32776 $((sectors - 32776)) linear $fault_disk 32776"
dmsetup mknodes
expect_failure 1 'faulty.*(error|EIO)|(error|EIO).*faulty' tidemark copy "$origin" /dev/mapper/faulty --yes --store /mnt/scratch
dmsetup remove --noudevsync faulty

note "a new device on the origin while it is frozen: it may use space that the filesystem calls free"
expect_failure 1 'devices on .* were changed while' tidemark copy "$origin" /mnt/scratch/over.raw --yes --store /mnt/scratch \
    --hook-frozen "losetup --read-only /dev/loop7 $origin"
losetup -d /dev/loop7

note "/run fills up in mid-copy: the copy succeeds, but could not be resumed"
mkdir -p /mnt/run /run/tidemark
full_run() { # WHAT
    wait_until 60 has_spilled
    if [ "$1" = space ]; then
        dd if=/dev/zero of=/mnt/run/fill bs=4k status=none 2>/dev/null || true
    else
        for i in $(seq 400); do : >"/mnt/run/fill.$i" || break; done 2>/dev/null
    fi
    touch /run/is-full
}
# Preserved data has reached the tail's disk, so its file was noted in the record after the instant.
has_spilled() { is_preserved "$origin" && losetup -a | grep -q /mnt/scratch; }
# begin_full WHAT FILE OPTION...: starts a copy to FILE and fills /run; the process is in $copy.
begin_full() {
    rm -f /run/is-full
    mount -t tmpfs -o size=2m,nr_inodes=200 none /mnt/run
    mkdir /mnt/run/tidemark
    mount --bind /mnt/run/tidemark /run/tidemark
    tidemark copy "$origin" "$2" --yes --store /mnt/scratch --store-ram 1MiB --segment 64KiB --rate 20MiB \
        "${@:3}" >/run/fault.out 2>/run/fault.err &
    copy=$!
    full_run "$1"
    kill -0 "$copy" || fail "the copy ended before /run was full: $(cat /run/fault.err)"
}
is_as_before() {
    load_is_alive
    [ "$(dmsetup table "$origin")" = "$table_before" ] || fail "the origin's table changed: $1"
    assert_no_tidemark_left data
    umount /run/tidemark
    umount /mnt/run
}
for what in space inodes; do
    begin_full "$what" /mnt/scratch/full.raw --all --freeze-budget 120s --hook-frozen "$(capture_hook /mnt/scratch/instant)"
    wait "$copy" || fail "a full /run ($what) ends a copy: $(cat /run/fault.err)"
    cat /run/fault.err
    [ "$what" = inodes ] || grep -q 'cannot resume it' /run/fault.err || fail "no message says that the copy cannot be resumed"
    ! grep -q 'not undone\|could not be' /run/fault.err || fail "a message says that something could not be undone"
    assert_identical /mnt/scratch/full.raw /mnt/scratch/instant
    rm /mnt/scratch/full.raw /mnt/scratch/instant
    is_as_before "$what"
done
note "the same, interrupted and killed: resume refuses, recover puts everything back"
begin_full space /mnt/scratch/full.raw
kill -TERM "$copy"
status=0
wait "$copy" || status=$?
cat /run/fault.err
assert_same "the exit status" "$status" 130
! grep -q 'not undone\|could not be' /run/fault.err || fail "a message says that something could not be undone"
is_as_before interrupted
begin_full space /mnt/scratch/full.raw
wait_until 20 grep -q 'cannot resume it' /run/fault.err
kill -KILL "$copy"
wait "$copy" 2>/dev/null || true
assert_status 3 tidemark resume
tidemark status | grep -q 'tidemark recover' || fail "status does not say what to do: $(tidemark status)"
! tidemark status | grep -q 'tidemark resume' || fail "status suggests resume: $(tidemark status)"
tidemark recover
is_as_before killed

note "pipe whose reader goes away"
pipe_copy() { tidemark copy "$origin" - --yes --store /mnt/scratch | head -c 5000000 >/dev/null; return "${PIPESTATUS[0]}"; }
expect_failure 1 'pipe' pipe_copy

note "origin read error"
dmsetup create --noudevsync badbelow --table "0 32768 linear $fault_disk 0
32768 8 error
32776 $((sectors - 32776)) linear $fault_disk 32776"
dmsetup mknodes
dmsetup create --noudevsync badorigin --table "0 $sectors linear /dev/mapper/badbelow 0"
dmsetup mknodes
expect_failure 1 'read' tidemark copy /dev/mapper/badorigin /mnt/scratch/bad.raw --all --yes --store /mnt/scratch
dmsetup remove --noudevsync badorigin
dmsetup remove --noudevsync badbelow

note "interrupted: SIGINT and SIGTERM put everything back"
for signal in INT TERM; do
    interrupted() {
        # Bash makes background jobs ignore SIGINT, and children inherit that; --default-signal undoes it.
        env --default-signal=INT tidemark copy "$origin" /mnt/scratch/copy.raw --yes --store /mnt/scratch --rate 4MiB &
        local pid=$! status=0
        sleep 4
        kill -"$signal" "$pid"
        wait "$pid" || status=$?
        return "$status"
    }
    expect_failure 130 'interrupt' interrupted
done

note "a copy succeeds after all faults"
tidemark copy "$origin" /mnt/scratch/copy.raw --all --yes --store /mnt/scratch --freeze-budget 120s \
    --hook-frozen "$(capture_hook /mnt/scratch/instant)"
assert_identical /mnt/scratch/copy.raw /mnt/scratch/instant
stop_load
umount /mnt/origin
filesystem_check ext4 "$origin"
