# With swap space on the origin, memory may wait for the origin. A store in a file or a RAM head is refused; a copy with
# a block device as store continues under memory pressure.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_load.sh"

tidemark attach "$(disk 0)" --name data
make_filesystem ext4 /dev/mapper/data /mnt/data
make_filesystem ext4 "$(disk 1)" /mnt/scratch
dd if=/dev/zero of=/mnt/data/swap bs=1M count=48 conv=fsync status=none
chmod 600 /mnt/data/swap
mkswap -q /mnt/data/swap

refused() {
    local pattern=$1 got=0
    shift
    timeout -s KILL 60 tidemark copy data /mnt/scratch/copy.raw --yes "$@" >/run/refused 2>&1 || got=$?
    [ "$got" = 3 ] || { cat /run/refused; fail "exit code $got, expected 3: $*"; }
    grep -q "$pattern" /run/refused || { cat /run/refused; fail "the refusal does not match '$pattern': $*"; }
    grep -q 'swapoff' /run/refused || fail "the refusal does not say what to do: $*"
    note "$(grep -m 1 '^tidemark:' /run/refused)"
}

tidemark copy data /mnt/scratch/copy.raw --yes --store /mnt/scratch --dry-run | grep -q 'locked in memory' &&
    fail "the plan locks memory although no swap is on the origin"
swapon /mnt/data/swap
refused 'memory -> the ext4 at /mnt/data' --store /mnt/scratch
refused 'memory -> the ext4 at /mnt/data' --store /mnt/scratch --store-ram 0
refused 'memory -> the ext4 at /mnt/data' --store "$(disk 2)" --store-ram 16MiB

note "swap space appears on the origin after the copy was killed: the store's file would wait for the origin"
swapoff /mnt/data/swap
tidemark copy data /mnt/scratch/copy.raw --yes --store /mnt/scratch --store-ram 0 --rate 4MiB --freeze-budget 30s >/run/copy 2>&1 &
copy=$!
wait_until 60 is_preserved data
sleep 1
kill -KILL "$copy"
wait "$copy" || true
swapon /mnt/data/swap
for how in --dry-run ''; do
    got=0
    # shellcheck disable=SC2086
    tidemark resume $how >/run/refused 2>&1 || got=$?
    [ "$got" = 3 ] || { cat /run/refused; fail "exit code $got, expected 3: resume $how"; }
    grep -q 'memory -> the ext4 at /mnt/data' /run/refused || { cat /run/refused; fail "the refusal gives another reason"; }
done
tidemark recover

note "a block device as store, no RAM head by default; under pressure, memory is swapped out to the origin"
pages() { awk '/^pswpout/ { print $2 }' /proc/vmstat; }
before=$(pages)
tidemark copy data /mnt/scratch/copy.raw --yes --store "$(disk 2)" --rate 4MiB --freeze-budget 30s >/run/copy 2>&1 &
copy=$!
wait_until 60 is_preserved data
echo +memory >/sys/fs/cgroup/cgroup.subtree_control
mkdir /sys/fs/cgroup/hog
echo 32M >/sys/fs/cgroup/hog/memory.max
timeout -s KILL 120 sh -c 'echo 0 >/sys/fs/cgroup/hog/cgroup.procs; exec python3 -c "
import os
hog = [os.urandom(1 << 20) for _ in range(60)]
assert sum(map(len, hog)) == 60 << 20"' || fail "the pressure on memory ended with $?"
note "swapped out: $(($(pages) - before)) pages"
[ "$(pages)" -gt "$before" ] || fail "nothing was swapped out: this proves nothing"
wait "$copy" || { cat /run/copy; fail "the copy"; }
grep -q 'memory may wait' /run/copy || { cat /run/copy; fail "the copy does not say why there is no RAM head"; }
swapoff /mnt/data/swap
umount /mnt/data
tidemark detach data
assert_no_tidemark_left
