# Mounts, table and size of the origin change between the plan and the freeze. Any difference from the plan ends the
# copy before anything is frozen: no unrelated filesystem is frozen, and none of the origin's is missed.
. "$REPO/vm-tests/cases/lib_load.sh"

make_filesystem ext4 "$(disk 1)" /mnt/parent
make_filesystem ext4 "$(disk 2)" /mnt/scratch
tidemark attach "$(disk 0)" --name data
origin=/dev/mapper/data
make_filesystem ext4 "$origin" /mnt/parent/origin
mkdir -p /mnt/elsewhere

copied() { # HOOK: the exit status is in $got, what was frozen at the instant in /run/waited
    got=0
    : >/run/waited
    tidemark copy "$origin" /mnt/scratch/copy.raw --yes --store /mnt/scratch --hook-before "$1" --freeze-budget 20s \
        --hook-frozen 'for at in /mnt/parent /mnt/elsewhere; do timeout -s KILL 1 touch $at/probe || echo $at >>/run/waited; done' \
        >/run/copy.out 2>/run/copy.err || got=$?
    note "$1: exit status $got: $(grep '^tidemark: ' /run/copy.err || true), frozen: $(tr '\n' ' ' </run/waited)"
}

# changed PATTERN HOOK: runs HOOK as --hook-before; the copy is refused and no writer had to wait.
changed() {
    copied "$2"
    [ "$got" = 3 ] || fail "exit status $got, not 3, after: $2"
    grep -q "$1" /run/copy.err || fail "the refusal does not match '$1'"
    [ ! -s /run/waited ] || fail "frozen, after: $2: $(cat /run/waited)"
    [ ! -e /mnt/scratch/copy.raw ] || fail "a copy is there"
    assert_no_tidemark_left data
}

changed 'the mounts of' 'umount /mnt/parent/origin'
changed 'the mounts of' "mount $origin /mnt/parent/origin"

note "moved to another mount point: frozen there, and nothing at the old one"
copied "umount /mnt/parent/origin; mount $origin /mnt/elsewhere"
assert_same "the exit status" "$got" 0
assert_same "what is frozen" "$(cat /run/waited)" /mnt/elsewhere
rm /mnt/scratch/copy.raw
umount /mnt/elsewhere
mount "$origin" /mnt/parent/origin

note "one more mount of the same filesystem: no difference"
tidemark copy "$origin" /mnt/scratch/moved.raw --yes --store /mnt/scratch \
    --hook-before "mount --bind /mnt/parent/origin /mnt/elsewhere" || fail "the copy with one more bind mount"
rm /mnt/scratch/moved.raw
umount /mnt/elsewhere

note "table and size change"
sectors=$(blockdev --getsz "$origin")
dmsetup create --noudevsync more --table "0 2048 zero"
umount /mnt/parent/origin
table="$(dmsetup table data)
$sectors 2048 linear $(stat -L -c %Hr:%Lr "$(dm_node more)") 0"
changed 'table' "echo '$table' | dmsetup load data; dmsetup suspend data; dmsetup resume data"
dmsetup load data --table "$(dmsetup table data | head -n 1)"
dmsetup suspend data
dmsetup resume data
dmsetup remove --noudevsync more
tidemark detach data
