# A copy is killed, and its secondary stops answering. `resume`, its dry run and `recover` still end; resume and its dry
# run change nothing, and the job stays unlocked. When the secondary answers again, the copy continues. The same holds
# while resume waits for LVM.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_resume.sh"
. "$REPO/vm-tests/cases/lib_lvm.sh"

make_volume "$(disk 2)" 16
dmsetup create --noudevsync secondary --table "0 $(blockdev --getsz "$(disk 1)") linear $(disk 1) 0"
settle
mkdir -p /mnt/target

start_and_kill() { # TARGET
    begin "$1" --region 4MiB --segment 256KiB --rate 16MiB
    wait_until 60 has_placed 8
    sleep 0.5
    kill_copy
}

# Unmounts, so that the kernel has nothing of the filesystem in its caches.
forget() {
    wait_until 20 umount /mnt/target
    mount /dev/mapper/secondary /mnt/target
    echo 3 >/proc/sys/vm/drop_caches
}

hang() { dmsetup suspend --noflush --nolockfs secondary; }
come_back() { dmsetup resume --noudevsync secondary; }

# ends SECONDS STATUS COMMAND...: COMMAND ends in time, and is not stuck in the kernel, where SIGKILL has no effect.
ends() {
    local seconds=$1 want=$2 got=0 begin=$SECONDS
    shift 2
    "$@" >/run/ends.out 2>&1 &
    process=$!
    wait_until "$seconds" is_gone
    wait "$process" || got=$?
    cat /run/ends.out
    note "$((SECONDS - begin)) s: $*"
    assert_same "the exit status of $*" "$got" "$want"
}

says() { grep -q "$1" /run/ends.out || fail "no message says '$1'"; }

# The kernel's devices and the job's files. A process that waits for the secondary has it open.
state() {
    dmsetup table | sort
    dmsetup table --inactive | sort
    dmsetup info -c --noheadings -o name,suspended,open | grep -v '^secondary:' | sort
    find /run/tidemark -type f -printf '%p %s %T@\n' | sort
}

# interrupted: a signal ends $process at once.
interrupted() {
    local status=0
    kill -TERM "$process"
    wait_until 3 is_gone
    wait "$process" || status=$?
    assert_same "the exit status ($(cat /run/ends.out))" "$status" 130
    says 'the copy stays as it was'
}

is_at_file() { [[ "$1" = /mnt/* ]]; }

for case in "/dev/mapper/secondary warm" "/mnt/target/copy.raw cold" "/mnt/target/copy.tdm warm"; do
    read -r target caches <<<"$case"
    note "$target hangs, its caches $caches"
    if is_at_file "$target"; then
        mkfs.ext4 -q -F /dev/mapper/secondary
        mount /dev/mapper/secondary /mnt/target
    fi
    start_and_kill "$target"
    [ "$caches" = warm ] || forget
    state >/run/before
    hang
    for how in "" --dry-run; do
        # shellcheck disable=SC2086
        ends 40 3 tidemark resume $how
        says 'has not answered for 20 s'
        says "$(if is_at_file "$target"; then echo /mnt/target/; else echo "$target"; fi)"
        says 'the copy stays as it was'
        says 'tidemark recover'
        state >/run/now
        diff /run/before /run/now || fail "the refused resume changed something"
    done
    timeout 10 dd if=/dev/zero of=/mnt/origin/probe bs=4k count=16 conv=fsync status=none || fail "the origin cannot be written"
    note "a signal while it waits"
    tidemark resume >/run/ends.out 2>&1 &
    process=$!
    sleep 3
    ! is_gone || { cat /run/ends.out; fail "resume did not wait"; }
    interrupted
    come_back
    goes_on "$target"
    rm -f /mnt/target/copy.*

    note "$target hangs for recover"
    start_and_kill "$target"
    rm /mnt/scratch/instant
    [ "$caches" = warm ] || forget
    hang
    if is_at_file "$target"; then
        ends 40 1 tidemark recover
        says 'has not answered for 20 s'
        says 'the origin has its own table again'
        says "run 'tidemark recover' again"
        is_back || fail "the origin does not have its own table"
        # The job is still listed, but can no longer be resumed.
        tidemark status | grep -q 'recover' || fail "status does not show the job: $(tidemark status)"
        come_back
        [ -n "$(find /mnt/target -name '*tidemark-partial*')" ] || fail "no partial file is left"
        assert_status 3 tidemark resume
        tidemark recover
        [ -z "$(find /mnt/target -name '*tidemark-partial*')" ] || fail "a partial file is left"
    else
        ends 15 0 tidemark recover
        come_back
    fi
    is_back || fail "the origin's table changed"
    assert_no_tidemark_left data
    ! is_at_file "$target" || umount /mnt/target
done
dmsetup remove --noudevsync secondary
umount /mnt/origin /mnt/scratch
filesystem_check ext4 "$origin"
tidemark detach data

note "LVM changes the group"
wipefs -q -a "$(disk 0)" "$(disk 1)"
make_group 32
TABLE_BEFORE=$(dmsetup table "$origin")
start_and_kill /mnt/scratch/copy.raw
# The job's record names the last process, so it is left out of the comparison.
state | grep -v /run/tidemark/ >/run/before
flock /run/lock/lvm/V_tidetest sleep 1000 &
lvm=$!
wait_until 10 sh -c '! flock --nonblock /run/lock/lvm/V_tidetest true'
tidemark resume >/run/ends.out 2>&1 &
process=$!
sleep 3
! is_gone || { cat /run/ends.out; fail "resume did not wait for LVM"; }
interrupted
state | grep -v /run/tidemark/ >/run/now
diff /run/before /run/now || fail "the interrupted resume changed something"
pkill -P "$lvm"
wait "$lvm" || true
goes_on /mnt/scratch/copy.raw
umount /mnt/origin
filesystem_check ext4 "$origin"
