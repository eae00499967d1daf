# The command is stopped while it holds writers: by the cgroup freezer (versions 1 and 2), by SIGSTOP, by the end of its
# session. The watchdog is not stopped with it, and lets the writers continue.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_load.sh"

make_filesystem ext4 "$(disk 1)" /mnt/scratch
tidemark attach "$(disk 0)" --name data
origin=/dev/mapper/data
make_filesystem ext4 "$origin" /mnt/origin
table_before=$(dmsetup table data)
# Upper bound for one write, at a budget of 1 s.
if [ "$MACHINE" = um ]; then write_max=3000; else write_max=8000; fi

# held FREEZE GO_ON BEGIN...: BEGIN starts the command; while it holds writers, FREEZE stops it; GO_ON continues it.
held() {
    local freeze=$1 go_on=$2 start took status=0
    shift 2
    rm -f /run/held /mnt/scratch/copy.raw
    "$@" "$TIDEMARK" copy "$origin" /mnt/scratch/copy.raw --yes --store /mnt/scratch --freeze-budget 1s \
        --hook-frozen 'touch /run/held; sleep 30' >/run/copy.out 2>/run/copy.err &
    local process=$!
    wait_until 20 test -e /run/held
    eval "$freeze"
    start=${EPOCHREALTIME/./}
    timeout 30 dd if=/dev/zero of=/mnt/origin/probe bs=4k count=1 conv=fsync status=none || fail "$freeze: writers stay held"
    took=$(((${EPOCHREALTIME/./} - start) / 1000))
    eval "$go_on"
    wait "$process" || status=$?
    note "$freeze: a write took $took ms; exit status $status: $(grep '^tidemark: ' /run/copy.err | head -n 1)"
    [ "$took" -lt "$write_max" ] || fail "$freeze: a write took $took ms at a budget of 1 s"
    assert_same "the exit status" "$status" 1
    assert_same "the table" "$(dmsetup table data)" "$table_before"
    assert_no_tidemark_left data
}

note "cgroup freezer, version 2"
mkdir -p /run/cgroup2
mount -t cgroup2 none /run/cgroup2
mkdir -p /run/cgroup2/slice/job
in_group() { sh -c 'echo $$ >"$0" && exec "$@"' "$@"; }
held 'echo 1 >/run/cgroup2/slice/job/cgroup.freeze' 'echo 0 >/run/cgroup2/slice/job/cgroup.freeze' in_group /run/cgroup2/slice/job/cgroup.procs
held 'echo 1 >/run/cgroup2/slice/cgroup.freeze' 'echo 0 >/run/cgroup2/slice/cgroup.freeze' in_group /run/cgroup2/slice/job/cgroup.procs

if grep -q freezer /proc/cgroups; then
    note "cgroup freezer, version 1"
    mkdir -p /run/freezer
    if mount -t cgroup -o freezer none /run/freezer 2>/dev/null; then
        mkdir /run/freezer/job
        held 'echo FROZEN >/run/freezer/job/freezer.state' 'echo THAWED >/run/freezer/job/freezer.state' in_group /run/freezer/job/cgroup.procs
        rmdir /run/freezer/job
        umount /run/freezer
    fi
fi

note "SIGSTOP"
held 'kill -STOP $process; pkill -HUP -f "__watchdo[g]"; pkill -QUIT -f "__watchdo[g]"; pkill -USR1 -f "__watchdo[g]"; pkill -RTMIN -f "__watchdo[g]"' \
    'kill -CONT $process' env
note "the whole control group is killed: the watchdog has left it"
rm -f /run/held
in_group /run/cgroup2/slice/job/cgroup.procs "$TIDEMARK" copy "$origin" /mnt/scratch/copy.raw --yes --store /mnt/scratch \
    --freeze-budget 60s --hook-frozen 'touch /run/held; sleep 30' >/run/copy.out 2>/run/copy.err &
process=$!
wait_until 20 test -e /run/held
echo 1 >/run/cgroup2/slice/cgroup.kill
timeout 10 dd if=/dev/zero of=/mnt/origin/probe bs=4k count=1 conv=fsync status=none || fail "writers stay held"
wait "$process" || true
tidemark recover
assert_same "the table" "$(dmsetup table data)" "$table_before"
assert_no_tidemark_left data
rmdir /run/cgroup2/slice/job /run/cgroup2/slice
umount /run/cgroup2
umount /mnt/origin
tidemark detach data
