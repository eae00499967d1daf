# A store that waits for the origin, through whatever chain of devices, would block the origin forever. Each such chain
# is refused before anything is changed, and the message names it and says what to do. Chains that only look similar are
# accepted.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_load.sh"

home=$(disk 0) root=$(disk 1)
tidemark attach "$home" --name home
tidemark attach "$root" --name root
make_filesystem ext4 /dev/mapper/home /mnt/home
make_filesystem ext4 /dev/mapper/root /mnt/root
make_filesystem ext4 "$(disk 2)" /mnt/scratch
head -c 8m /dev/urandom >/mnt/home/file
head -c 8m /dev/urandom >/mnt/root/file
sync

# The table of root is left out: a copy of root is in progress and releases parts of it meanwhile.
kernel_state() { dmsetup table | grep -v '^root: ' | sort; losetup -n -O NAME,BACK-INO | sort; }

# refused PATTERN OPTION...: a copy of home with these options is refused and leaves nothing.
refused() {
    local pattern=$1 got=0 before
    shift
    before=$(kernel_state)
    timeout -s KILL 30 tidemark copy home /mnt/scratch/refused.raw --yes --store-ram 0 "$@" >/run/refused 2>&1 || got=$?
    [ "$got" = 3 ] || { cat /run/refused; fail "exit code $got, expected 3: $*"; }
    grep -q "$pattern" /run/refused || { cat /run/refused; fail "the refusal does not match '$pattern': $*"; }
    grep -q 'next:' /run/refused || fail "the refusal does not say what to do instead: $*"
    note "$(grep -m 1 '^tidemark:' /run/refused)"
    assert_same "the kernel's state" "$(kernel_state)" "$before"
    assert_same "files left" "$(find /mnt/scratch -name '*refused*')" ""
}

accepted() {
    tidemark copy home /mnt/scratch/accepted.raw --yes --store-ram 0 --dry-run "$@" >/run/accepted 2>&1 ||
        { cat /run/accepted; fail "not accepted: $*"; }
}

image() { truncate -s 40m "$1"; }
shown() { losetup -f --show "$1"; }

note "the origin's own file system, a loop device on it, and a file system on that"
mkdir /mnt/home/store
refused 'the ext4 at /mnt/home' --store /mnt/home/store
image /mnt/home/image
loop=$(shown /mnt/home/image)
refused 'itself' --store "$loop"
make_filesystem ext4 "$loop" /mnt/above
refused "$loop -> the ext4 at /mnt/home" --store /mnt/above
umount /mnt/above

note "the loop device's backing file is deleted"
rm /mnt/home/image
refused 'itself' --store "$loop"
losetup -d "$loop"

note "the backing file is on an overlay over the origin"
mkdir /mnt/home/{lower,upper,work} /mnt/overlay
mount -t overlay -o lowerdir=/mnt/home/lower,upperdir=/mnt/home/upper,workdir=/mnt/home/work overlay /mnt/overlay
image /mnt/overlay/image
loop=$(shown /mnt/overlay/image)
refused 'overlay at /mnt/overlay' --store "$loop"
refused 'overlay at /mnt/overlay' --store /mnt/overlay
rm /mnt/overlay/image
refused 'itself' --store "$loop"
losetup -d "$loop"

note "the layers' paths now lead elsewhere"
mkdir /mnt/hidden
mkdir /mnt/scratch/hides
for layer in lower upper work; do mount --bind /mnt/scratch/hides "/mnt/home/$layer"; done
image /mnt/overlay/image
loop=$(shown /mnt/overlay/image)
refused 'cannot be determined' --store "$loop"
losetup -d "$loop"
umount /mnt/home/{lower,upper,work}
umount /mnt/overlay
rmdir /mnt/scratch/hides

note "the filesystem is mounted only in another mount namespace"
umount /mnt/home
mkfifo /run/go
# shellcheck disable=SC2016
unshare -m sh -c 'mount --make-rprivate / && mount /dev/mapper/home /mnt/hidden &&
    truncate -s 40m /mnt/hidden/image && losetup -f --show /mnt/hidden/image >/run/loop && read -r _ </run/go' &
other=$!
wait_until 10 test -s /run/loop
loop=$(cat /run/loop)
refused 'itself' --store "$loop"
losetup -d "$loop"
echo >/run/go
wait "$other"
mount /dev/mapper/home /mnt/home
rm -f /mnt/home/image /run/loop

note "a network filesystem, under any name"
refused 'another machine' --store "$ARTIFACTS"

note "chains without a circle are accepted"
mkdir /mnt/scratch/{lower,upper,work}
mount -t overlay -o lowerdir=/mnt/scratch/lower,upperdir=/mnt/scratch/upper,workdir=/mnt/scratch/work overlay /mnt/overlay

note "a secondary whose devices cannot be determined is accepted, unless writers would be held for it"
for layer in lower upper work; do mount --bind /run "/mnt/scratch/$layer"; done
tidemark copy home /mnt/overlay/accepted.raw --yes --store /mnt/scratch --dry-run >/run/hidden 2>&1 || { cat /run/hidden; fail "refused"; }
got=0
tidemark copy home /mnt/overlay/refused.raw --yes --store /mnt/scratch --on-full hold --dry-run >/run/hidden 2>&1 || got=$?
[ "$got" = 3 ] && grep -q 'cannot be determined' /run/hidden || { cat /run/hidden; fail "exit code $got with writers held"; }
umount /mnt/scratch/{lower,upper,work}

image /mnt/overlay/image
loop=$(shown /mnt/overlay/image)
accepted --store "$loop"
accepted --store /mnt/overlay
losetup -d "$loop"
umount /mnt/overlay
rm -rf /mnt/scratch/{lower,upper,work}
accepted --store /mnt/scratch
accepted --store /mnt/root
image /mnt/root/image
loop=$(shown /mnt/root/image)
accepted --store "$loop"

note "a copy of root has its store on home: the store of home must not be on root, nor on a loop device on it"
tidemark copy root /mnt/scratch/root.raw --yes --store /mnt/home --store-ram 0 --rate 1MiB >/run/root.out 2>&1 &
first=$!
wait_until 30 is_preserved root
refused 'root' --store /mnt/root
refused 'root' --store "$loop"
losetup -d "$loop"
note "nor the secondary of home"
got=0
timeout -s KILL 30 tidemark copy home /mnt/root/copy.raw --yes --store /mnt/scratch >/run/secondary 2>&1 || got=$?
[ "$got" = 3 ] || { cat /run/secondary; fail "exit code $got of a copy whose secondary waits for its origin"; }
# Meanwhile both volumes accept writes.
for where in home root; do
    timeout -s KILL 20 dd if=/dev/urandom of=/mnt/$where/file bs=64k count=32 conv=notrunc,fsync status=none ||
        fail "writes to $where hang"
done
kill -INT "$first"
wait "$first" || true
assert_no_tidemark_left home root

note "two copies start at once"
for turn in 1 2 3; do
    rm -f /mnt/scratch/*.raw
    tidemark copy root /mnt/scratch/root.raw --yes --store /mnt/home --store-ram 0 --rate 8MiB >/run/root.out 2>&1 &
    first=$!
    tidemark copy home /mnt/scratch/home.raw --yes --store /mnt/root --store-ram 0 --rate 8MiB >/run/home.out 2>&1 &
    second=$!
    timeout -s KILL 20 dd if=/dev/urandom of=/mnt/home/file bs=64k count=32 conv=notrunc,fsync status=none || fail "writes to home hang"
    timeout -s KILL 20 dd if=/dev/urandom of=/mnt/root/file bs=64k count=32 conv=notrunc,fsync status=none || fail "writes to root hang"
    one=0 two=0
    wait "$first" || one=$?
    wait "$second" || two=$?
    note "turn $turn: root's ended with $one, home's with $two"
    assert_same "both together" "$((one + two))" 3
    assert_no_tidemark_left home root
done

umount /mnt/home /mnt/root
filesystem_check ext4 /dev/mapper/home
filesystem_check ext4 /dev/mapper/root
tidemark detach home
tidemark detach root
