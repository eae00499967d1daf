# Low limits: little memory in the control group, or a low memlock limit without the right to raise it. The copy runs
# with less memory or is refused in advance. It is never killed while its stack is in place.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_load.sh"

make_filesystem ext4 "$(disk 1)" /mnt/scratch
tidemark attach "$(disk 0)" --name data
origin=/dev/mapper/data
make_filesystem ext4 "$origin" /mnt/origin
head -c 40m /dev/urandom >/mnt/origin/some
sync
table_before=$(dmsetup table data)
ended() { # WHAT STATUS WANTED...
    local what=$1 status=$2
    shift 2
    note "$what: exit status $status: $(grep -v '^copying\|^instant\|^prepar' /run/copy.err | head -n 3 | xargs -d '\n')"
    case " $* " in *" $status "*) ;; *) fail "$what: exit status $status: $(cat /run/copy.err)" ;; esac
    assert_same "the table" "$(dmsetup table data)" "$table_before"
    assert_no_tidemark_left data
    rm -f /mnt/scratch/copy.*
}

note "control group with a memory limit"
mkdir -p /run/cgroup2
mount -t cgroup2 none /run/cgroup2
echo +memory >/run/cgroup2/cgroup.subtree_control
mkdir /run/cgroup2/job
for limit in 48 24 8; do
    echo "${limit}M" >/run/cgroup2/job/memory.max
    status=0
    sh -c 'echo $$ >"$0" && exec "$@"' /run/cgroup2/job/cgroup.procs "$TIDEMARK" copy "$origin" /mnt/scratch/copy.raw \
        --yes --store /mnt/scratch >/run/copy.out 2>/run/copy.err || status=$?
    if [ "$limit" = 48 ]; then ended "$limit MiB" "$status" 0; else ended "$limit MiB" "$status" 0 3; fi
done

note "killed by the OOM killer: the watchdog puts everything back"
echo 200M >/run/cgroup2/job/memory.max
sh -c 'echo $$ >"$0" && exec "$@"' /run/cgroup2/job/cgroup.procs "$TIDEMARK" copy "$origin" /mnt/scratch/copy.raw \
    --yes --store /mnt/scratch --rate 2MiB >/run/copy.out 2>/run/copy.err &
process=$!
wait_until 20 is_preserved "$origin"
echo 1M >/run/cgroup2/job/memory.max
status=0
wait "$process" || status=$?
wait_until 20 sh -c 'dmesg | grep -q "because it ran out of memory; what its copy left was put back"'
ended "killed" "$status" 137
assert_same "records" "$(find /run/tidemark -type f ! -path "*/origins/*")" ""
assert_same "files" "$(find /mnt/scratch -type f)" ""
rmdir /run/cgroup2/job
umount /run/cgroup2

note "low memlock limit, and no right to raise it"
for limit in 8192 64; do
    status=0
    (ulimit -l "$limit"; exec setpriv --bounding-set -ipc_lock,-sys_resource --inh-caps -ipc_lock,-sys_resource \
        "$TIDEMARK" copy "$origin" /mnt/scratch/copy.raw --yes --store /mnt/scratch) >/run/copy.out 2>/run/copy.err || status=$?
    ended "$limit KiB" "$status" 0
done
(ulimit -l 64; exec setpriv --bounding-set -ipc_lock,-sys_resource --inh-caps -ipc_lock,-sys_resource "$TIDEMARK" doctor) >/run/doctor 2>&1 || true
grep -A 3 memlock /run/doctor
grep -E 'warn.*memlock|memlock.*(warn|64)' /run/doctor || fail "doctor does not report the limit: $(cat /run/doctor)"
umount /mnt/origin
tidemark detach data
