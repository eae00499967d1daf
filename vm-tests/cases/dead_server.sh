# The server of a filesystem (NFS, FUSE) is gone. Descriptors, loop devices, mounts and overlay layers on it do not
# answer any more. A copy that does not use that filesystem does not wait for it. A copy to or from it is refused in
# time.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_load.sh"

tidemark attach "$(disk 0)" --name vol
make_filesystem ext4 /dev/mapper/vol /mnt/vol
make_filesystem ext4 "$(disk 1)" /mnt/scratch
mkdir /mnt/dead /mnt/over /mnt/scratch/{upper,work,store}
head -c 20m /dev/urandom >/mnt/vol/file
head -c 5m /dev/urandom >/mnt/scratch/cold
sync
note "the server"

python3 "$REPO/vm-tests/cases/dead_server.py" /mnt/dead $((32 << 20)) &
server=$!
for _ in $(seq 100); do mountpoint -q /mnt/dead && break; sleep 0.1; done
mountpoint -q /mnt/dead || fail "the server has not mounted its file system"

note "writers"
# Writers, here and in another mount namespace. No later command may inherit these descriptors: it would close them at
# exit and wait for the server.
sleep 1000 7<>/mnt/dead/image 8<>/mnt/scratch/open &
writer=$!
unshare -m sleep 1000 9<>/mnt/dead/image 10<>/mnt/scratch/another &
sleeper=$!
loop=$(losetup -f --show /mnt/dead/image)
note "mounts"
# Mounts the origin beneath the dead server first, so that the mount found first is one that does not answer.
mount --bind /mnt/vol /mnt/dead/folder
mount -t overlay -o "lowerdir=/mnt/dead/lower:/mnt/vol,upperdir=/mnt/scratch/upper,workdir=/mnt/scratch/work" over /mnt/over ||
    fail "the overlay cannot be mounted"
note "the server stops"
kill -STOP "$server"
alive=1
(timeout -s KILL 1 stat /mnt/dead/image >/dev/null 2>&1) || alive=0
[ "$alive" = 0 ] || fail "the server still answers"

# in_time SECONDS STATUS COMMAND...
in_time() {
    local seconds=$1 status=$2 got=0 begin=$SECONDS
    shift 2
    timeout -s KILL "$seconds" "$@" >/run/out 2>&1 </dev/null || got=$?
    [ "$got" = "$status" ] || { cat /run/out; fail "exit status $got, expected $status: $*"; }
    note "$((SECONDS - begin)) s: $*"
}

for options in "" "--store-ram 0"; do
    # shellcheck disable=SC2086
    in_time 60 0 tidemark copy vol /mnt/scratch/live.raw --yes --store /mnt/scratch/store $options
    mkdir -p /run/copy
    copy=$(losetup -f --show -r /mnt/scratch/live.raw)
    mount -o ro,noload "$copy" /run/copy
    cmp /run/copy/file /mnt/vol/file || fail "the copy differs"
    umount /run/copy
    losetup -d "$copy"
    rm /mnt/scratch/live.raw
done
in_time 30 0 tidemark copy vol /mnt/scratch/live.raw --yes --store /mnt/scratch/store --dry-run
in_time 30 0 tidemark status
in_time 60 0 tidemark doctor
in_time 30 0 tidemark recover
in_time 60 0 tidemark copy /mnt/scratch/cold /mnt/scratch/cold.tdm --yes
in_time 60 0 tidemark restore /mnt/scratch/cold.tdm /mnt/scratch/back --yes
cmp /mnt/scratch/cold /mnt/scratch/back || fail "the restored file differs"
in_time 60 0 tidemark restore /mnt/scratch/cold.tdm "$(disk 2)" --yes
cmp -n $((5 << 20)) /mnt/scratch/cold "$(disk 2)" || fail "the restored device differs"
in_time 60 0 tidemark copy vol "$(disk 2)" --yes --store /mnt/scratch/store

note "what is in use is still found"
in_time 30 3 tidemark restore /mnt/scratch/cold.tdm /mnt/scratch/open --yes
grep -q "process $writer" /run/out || fail "a writer is not named"
in_time 30 3 tidemark restore /mnt/scratch/cold.tdm /mnt/scratch/another --yes
grep -q "process $sleeper" /run/out || { cat /run/out; fail "a writer in another namespace is not named"; }
used=$(losetup -f --show /mnt/scratch/cold)
in_time 30 3 tidemark restore /mnt/scratch/cold.tdm /mnt/scratch/cold --yes
grep -q "$used" /run/out || { cat /run/out; fail "a loop device is not named"; }
losetup -d "$used"

note "paths on the dead filesystem are refused in time"
refused_in_time() {
    local got=0
    timeout -s KILL 40 "$@" >/run/out 2>&1 </dev/null || got=$?
    case "$got" in 1 | 3) ;; *) cat /run/out; fail "exit status $got: $*" ;; esac
    note "$(grep -m 1 '^tidemark:' /run/out)"
    [ "$(dmsetup table vol)" = "$table" ] || fail "the origin's table was changed"
}
table=$(dmsetup table vol)
refused_in_time tidemark copy vol /mnt/scratch/x.raw --yes --store /mnt/dead --store-ram 0
refused_in_time tidemark copy vol /mnt/scratch/x.raw --yes --store "$loop" --store-ram 0
refused_in_time tidemark copy vol /mnt/dead/image --yes --store /mnt/scratch/store
refused_in_time tidemark restore /mnt/scratch/cold.tdm /mnt/dead/image --yes
refused_in_time tidemark copy "$loop" /mnt/scratch/x.raw --yes
refused_in_time tidemark copy vol "$loop" --yes --store /mnt/scratch/store

kill -CONT "$server"
kill "$writer" "$sleeper"
wait "$writer" "$sleeper" 2>/dev/null || true
umount /mnt/over /mnt/dead/folder
losetup -d "$loop"
for _ in $(seq 50); do umount /mnt/dead 2>/dev/null && break; sleep 0.1; done
wait "$server" || true
umount /mnt/vol
tidemark detach vol
