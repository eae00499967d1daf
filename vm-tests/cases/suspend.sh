# The machine is suspended to RAM while a volume is copied. pm_test ends the suspend once all processes are frozen. It
# succeeds, or fails by the kernel's own rules. Nothing hangs. The copy is exact, or lost with the origin as before.
# The kernel cannot freeze a process that waits for a frozen filesystem or a suspended device: it gives up after
# pm_freeze_timeout and thaws all processes.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_stack.sh"
. "$REPO/vm-tests/cases/lib_slow.sh"

echo freezer >/sys/power/pm_test
echo 1 >/sys/module/suspend/parameters/pm_test_delay
freeze_timeout=/sys/power/pm_freeze_timeout
echo 8000 >$freeze_timeout
# A sync before the processes are frozen would wait until writers continue, and so avoid what is tested here.
echo 0 >/sys/power/sync_on_suspend

# falls_asleep: suspends; $SLEEP is ok if all processes were frozen, else the error; $SLEPT is the time in ms.
falls_asleep() {
    local start=${EPOCHREALTIME/./}
    SLEEP=ok
    echo mem 2>/run/sleep.err >/sys/power/state || SLEEP=$(sed 's/.*: //' /run/sleep.err)
    SLEPT=$(((${EPOCHREALTIME/./} - start) / 1000))
    note "sleep: $SLEEP after $SLEPT ms"
}

# shellcheck disable=SC2016
capture='dd if="$TIDEMARK_ORIGIN_BELOW" of=/run/instant bs=4M iflag=direct status=none'
begin() { # BUDGET OPTION...
    rm -f /mnt/scratch/copy.raw /run/instant
    tidemark copy "$ORIGIN" /mnt/scratch/copy.raw --all --yes --store /mnt/scratch --store-ram 0 --segment 256KiB \
        --freeze-budget "$1" --hook-frozen "$capture" "${@:2}" >/run/copy.out 2>/run/copy.err &
    process=$!
}

# waits_in FUNCTION: a thread of the copy waits in this kernel function.
waits_in() { cat "/proc/$process/task/"*/stack 2>/dev/null | grep -q "$1"; }
has_said() { kill -0 "$process" && grep -q "$1" /run/copy.err; }
is_held() { suspended_devices | grep -qx data; }
# The load waits for the thaw of the filesystem.
is_frozen() { grep -q percpu_rwsem "/proc/$(pgrep -P "$LOAD" fio | head -n 1)/stack"; }

# ends STATUS [PATTERN]: the copy ends so, with a matching error, and the origin is as before.
ends() { ends_either "$1" "$1" "${2-}"; }
ends_either() { # STATUS STATUS PATTERN
    local status=0
    wait "$process" || status=$?
    note "the copy: $status $(grep '^tidemark: ' /run/copy.err || true)"
    [ "$status" = "$1" ] || [ "$status" = "$2" ] || fail "exit status $status: $(cat /run/copy.err)"
    if [ "$status" = 0 ]; then
        assert_identical /mnt/scratch/copy.raw /run/instant
    else
        [ ! -e /mnt/scratch/copy.raw ] || fail "a failed copy has the final name"
        grep -q "$3" /run/copy.err || fail "the copy gives another error: $(cat /run/copy.err)"
    fi
    assert_as_before
}

make_slow "$(machine_disk 0)"
disk() { if [ "$1" = 0 ]; then echo /dev/mapper/tidetest-slow; else machine_disk "$1"; fi; }
make_origin
start_load
mkfs.ext4 -q -F "$(disk 2)" && mkdir -p /mnt/scratch && mount "$(disk 2)" /mnt/scratch
falls_asleep
assert_same "sleep without a copy" "$SLEEP" ok

note "in mid-copy"
begin 30s --region 1MiB --rate 8MiB
wait_until 30 is_preserved data
for _ in 1 2 3; do
    falls_asleep
    sleep 0.2
done
ends 0
load_goes_on

# stays_awake: the kernel cannot freeze waiting writers and gives up the suspend. Then their wait ends.
stays_awake() {
    falls_asleep
    assert_same "sleep" "$SLEEP" "Device or resource busy"
    load_goes_on
}

note "while the filesystem is frozen, within the budget"
TIDEMARK_STALL_AT=insert.freeze.after:6 begin 60s
wait_until 30 is_frozen
stays_awake
ends 0

note "while the filesystem is frozen, beyond the budget"
TIDEMARK_STALL_AT=insert.freeze.after:12 begin 6s
wait_until 30 is_frozen
stays_awake
ends 1 'freeze budget'

note "while the origin is suspended"
TIDEMARK_STALL_AT=insert.instant.before:12 begin 6s
wait_until 30 is_frozen
wait_until 30 is_held
stays_awake
ends 1 'freeze budget'

note "while the origin's table is put back"
TIDEMARK_STALL_AT=restore.suspend.after:12 begin 60s --region 64MiB
wait_until 60 has_said copying
wait_until 60 is_held
stays_awake
ends 0

note "while writers are held"
begin 30s --region 1MiB --chunk 64KiB --store-size 4MiB --on-full hold --hold-budget 60s --rate 4MiB
wait_until 60 has_said 'are held'
sleep 0.3
falls_asleep
# The watchdog has ended the hold. The writers may then fill the store.
ends_either 0 1 'COW store is full'
load_goes_on

note "while a release waits for slow I/O"
begin 60s --region 1MiB --rate 4MiB
wait_until 60 is_preserved data
slow 1500 0
wait_until 60 waits_in dm_suspend
falls_asleep
slow 0 0
ends 0
load_goes_on

note "while the suspension for the instant waits for slow I/O"
stop_load
umount /mnt/data
slow 5000 0
(while [ ! -e /run/no-writes ]; do dd if=/dev/zero of="$ORIGIN" bs=4k count=1 seek=9000 oflag=direct conv=notrunc status=none; done) &
writer=$!
begin 60s
wait_until 60 waits_in dm_suspend
# Older kernels interrupt the wait like this signal does when they suspend; newer ones restart it themselves.
kill -URG "$process"
falls_asleep
assert_same "sleep" "$SLEEP" ok
touch /run/no-writes
slow 0 0
wait "$writer"
ends 0
