# While a volume is copied, whatever uses it keeps using it. With a volume group inside the volume, or a filesystem
# found by its label, LVM, blkid and mount find it on the volume, although the copy's devices show the same content.
# Data written meanwhile is there afterwards. No udevd runs here: only the devices themselves tell the tools what to
# skip. shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_load.sh"

make_filesystem ext4 "$(disk 2)" /mnt/scratch
tidemark attach "$(disk 0)" --name data >/dev/null
tidemark attach "$(disk 1)" --name plain >/dev/null
dmsetup mknodes
# As on a host that shows LVM the volumes alone: LVM then does not take one device of a pair for a component of the
# other.
export LVM_SYSTEM_DIR=/run/lvm-above
mkdir -p "$LVM_SYSTEM_DIR"
printf 'devices {\n global_filter = [ "r|^%s$|" ]\n}\n' "$(disk 0)" >"$LVM_SYSTEM_DIR/lvm.conf"
pvcreate -q -y /dev/mapper/data
vgcreate -q -s 1m tideinner /dev/mapper/data
lvcreate -q -y -Wn -Zn -L 12m -n files tideinner
dmsetup mknodes
make_filesystem ext4 /dev/mapper/tideinner-files /mnt/inner
mkfs.ext4 -q -F -L tide-label /dev/mapper/plain
mkdir -p /mnt/labelled

# begin NAME: returns when the copy is under way and all of its devices exist.
begin() { # NAME
    rm -f "/mnt/scratch/$1.raw"
    tidemark copy "/dev/mapper/$1" "/mnt/scratch/$1.raw" --all --yes --store /mnt/scratch --rate 4MiB \
        >/run/copy.out 2>/run/copy.err &
    COPY=$!
    wait_until 30 is_preserved "$1"
    dmsetup mknodes
    [ "$(dmsetup ls | grep -c "^$1#")" -ge 3 ] || fail "the devices of the copy have other names: $(dmsetup ls)"
}

begin data
# LVM finds everything on the volume, and finds nothing twice.
pvs --noheadings -o pv_name >/run/pvs 2>/run/pvs.err || fail "pvs: $(cat /run/pvs.err)"
assert_same "the physical volume of the inner group" "$(tr -d ' ' </run/pvs)" /dev/mapper/data
[ ! -s /run/pvs.err ] || fail "LVM complains: $(cat /run/pvs.err)"
lies_on() { dmsetup deps -o devname "$1" | sed -n 's/.*(\([^)]*\)).*/\1/p'; }
umount /mnt/inner
vgchange -q -an tideinner
vgchange -q -ay tideinner
dmsetup mknodes
assert_same "what the inner volume lies on, activated anew" "$(lies_on tideinner-files)" data
lvextend -q -L +4m tideinner/files >/dev/null
assert_same "what the inner volume lies on, enlarged" "$(lies_on tideinner-files)" data
mount /dev/mapper/tideinner-files /mnt/inner
echo "written in mid-copy" >/mnt/inner/file
sync -f /mnt/inner/file
kill -0 "$COPY" || fail "the copy ended too early: $(cat /run/copy.err)"
wait "$COPY" || fail "the copy failed: $(cat /run/copy.err)"
umount /mnt/inner
vgchange -q -an tideinner
vgchange -q -ay tideinner
dmsetup mknodes
mount /dev/mapper/tideinner-files /mnt/inner
assert_same "the file that was written in mid-copy" "$(cat /mnt/inner/file)" "written in mid-copy"
umount /mnt/inner
vgchange -q -an tideinner

mount /dev/mapper/plain /mnt/labelled
begin plain
umount /mnt/labelled
found=$(blkid -c /dev/null | sed -n 's/^\(.*\): .*LABEL="tide-label".*/\1/p' | xargs -r -n1 readlink -f | sort -u)
# blkid may also list the disk beneath, which it does not recognize as part of the volume; but no device of the copy.
for node in $found; do
    case "$(cat "/sys/class/block/$(basename "$node")/dm/uuid" 2>/dev/null)" in
        LVM-TIDEMARK-*) fail "blkid finds a device of the copy: $node" ;;
    esac
done
mount LABEL=tide-label /mnt/labelled
assert_same "what is mounted by its label" "$(readlink -f "$(findmnt -no SOURCE /mnt/labelled)")" "$(dm_node plain)"
echo "by its label" >/mnt/labelled/file
sync -f /mnt/labelled/file
kill -0 "$COPY" || fail "the copy ended too early: $(cat /run/copy.err)"
wait "$COPY" || fail "the copy failed: $(cat /run/copy.err)"
umount /mnt/labelled
mount /dev/mapper/plain /mnt/labelled
assert_same "the file that was written by the label" "$(cat /mnt/labelled/file)" "by its label"
umount /mnt/labelled
tidemark detach data >/dev/null
tidemark detach plain >/dev/null
assert_no_tidemark_left
