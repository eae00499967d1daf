# Safety promise 8: what cannot be done safely is refused before anything is changed, with exit code 3, the reason, and
# what to do instead.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_load.sh"

a=$(disk 0)
b=$(disk 1)
small=$(disk 2)

state_of_kernel() { dmsetup table --target '' 2>/dev/null; dmsetup table | sort; losetup -n -O NAME,BACK-FILE | sort; }

refused() {
    local pattern=$1 got=0 before after
    shift
    before=$(state_of_kernel)
    "$@" >/run/refused.out 2>/run/refused.err || got=$?
    after=$(state_of_kernel)
    cat /run/refused.err
    [ "$got" = 3 ] || fail "exit code $got, expected 3: $*"
    grep -qiE "$pattern" /run/refused.err || fail "the refusal does not match '$pattern': $*"
    grep -q 'next:' /run/refused.err || fail "the refusal does not say what to do instead: $*"
    [ "$before" = "$after" ] || fail "the refusal changed the kernel's state: $*"
}

note "mounted raw device"
make_filesystem ext4 "$a" /mnt/a
refused 'mounted' tidemark copy "$a" "$b" --yes
refused 'attach' tidemark copy "$a" "$b" --yes
refused 'mounted' tidemark attach "$a" --name data
umount /mnt/a

note "whole disk with a mounted partition"
wipefs -qa "$a"
printf 'label: gpt\nsize=20MiB\nsize=20MiB\n' | sfdisk -q "$a"
blockdev --rereadpt "$a" 2>/dev/null || true
part=
for candidate in "${a}1" "${a}p1"; do
    if [ -b "$candidate" ]; then part=$candidate; fi
done
[ -n "$part" ] || fail "the kernel found no partition on $a"
make_filesystem ext4 "$part" /mnt/a
refused 'partition|mounted' tidemark copy "$a" "$b" --yes
refused 'mounted' tidemark copy "$part" "$b" --yes
umount /mnt/a
wipefs -qa "$a"
blockdev --rereadpt "$a" 2>/dev/null || true

note "the volume for the remaining refusals"
tidemark attach "$a" --name data
origin=/dev/mapper/data
make_filesystem ext4 "$origin" /mnt/origin

note "store on the origin's own filesystem"
make_filesystem ext4 "$b" /mnt/b
mkdir /mnt/origin/store
refused 'store' tidemark copy "$origin" /mnt/b/copy.raw --yes --store /mnt/origin/store
refused 'origin' tidemark copy "$origin" /mnt/origin/copy.raw --yes --store /mnt/b
[ -z "$(ls -A /mnt/origin/store)" ] || fail "a refused store left a file"

note "secondary smaller than the origin, mounted, part of the origin's stack"
refused 'small' tidemark copy "$origin" "$small" --yes --store /mnt/b
refused 'mounted' tidemark copy "$origin" "$b" --yes --store /mnt/b
refused 'in use|origin|stack' tidemark copy "$origin" "$a" --yes --store /mnt/b
refused 'origin|mounted|in use' tidemark copy "$origin" "$origin" --yes --store /mnt/b

note "existing file without --yes"
echo precious >/mnt/b/precious.raw
refused 'exists|replace|--yes' tidemark copy "$origin" /mnt/b/precious.raw --store /mnt/b </dev/null
[ "$(cat /mnt/b/precious.raw)" = precious ] || fail "a refused copy changed an existing file"

note "unsupported stacks, by name"
dmsetup create --noudevsync snapbase --table "0 65536 linear $small 0"
dmsetup create --noudevsync snapstore --table "0 16384 linear $small 65536"
dmsetup mknodes
dd if=/dev/zero of=/dev/mapper/snapstore bs=4k count=1 status=none oflag=direct
dmsetup create --noudevsync stacked --table "0 65536 snapshot /dev/mapper/snapbase /dev/mapper/snapstore P 8"
dmsetup mknodes
make_filesystem ext4 /dev/mapper/stacked /mnt/stacked
refused 'snapshot' tidemark copy /dev/mapper/stacked /mnt/b/copy.raw --yes --store /mnt/b
umount /mnt/stacked
dmsetup remove --noudevsync stacked
dmsetup remove --noudevsync snapstore
dmsetup remove --noudevsync snapbase

note "a volume group that other machines share"
dmsetup create --noudevsync shared-data --uuid LVM-tidetestgroup-data --table "0 16384 linear $small 0"
dmsetup create --noudevsync shared-lvmlock --uuid LVM-tidetestgroup-lock --table "0 8192 linear $small 16384"
dmsetup mknodes
refused 'shared with other machines' tidemark copy /dev/mapper/shared-data /mnt/b/copy.raw --yes --store /mnt/b
dmsetup remove --noudevsync shared-lvmlock
tidemark copy /dev/mapper/shared-data /mnt/b/copy.raw --yes --store /mnt/b --dry-run
dmsetup remove --noudevsync shared-data

note "not root"
cp "$TIDEMARK" /run/tidemark-as-nobody && chmod 755 /run/tidemark-as-nobody
refused 'root' setpriv --reuid=65534 --regid=65534 --clear-groups /run/tidemark-as-nobody copy "$origin" /mnt/b/x.raw --yes
refused 'root' setpriv --reuid=65534 --regid=65534 --clear-groups /run/tidemark-as-nobody attach "$small" --name other

note "detach while mounted"
refused 'mounted|in use|open' tidemark detach data
umount /mnt/origin
tidemark detach data
assert_no_tidemark_left
