# What stands on an origin stays on it. A volume group lies inside the volume, a file system is found by its label: while
# the volume is copied, LVM, blkid and mount find them where they are, though the devices of the copy show the same.
# What is written meanwhile is there afterwards. There is no udevd here: nothing but the devices themselves tells.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_load.sh"

make_filesystem ext4 "$(disk 2)" /mnt/scratch
tidemark attach "$(disk 0)" --name data >/dev/null
tidemark attach "$(disk 1)" --name plain >/dev/null
dmsetup mknodes
# As on a host whose disks are known by their volumes alone: LVM takes no part of a pair for the other then.
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

# A copy begins, and is in its middle when this returns; its devices are all there.
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
# Everything that LVM finds is on the volume, and it finds nothing twice.
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
kill -0 "$COPY" || fail "the copy was over before that: $(cat /run/copy.err)"
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
# The disk beneath is listed as well where it is not taken for a part of the volume; no device of the copy is.
for node in $found; do
    case "$(cat "/sys/class/block/$(basename "$node")/dm/uuid" 2>/dev/null)" in
        LVM-TIDEMARK-*) fail "blkid finds a device of the copy: $node" ;;
    esac
done
mount LABEL=tide-label /mnt/labelled
assert_same "what is mounted by its label" "$(readlink -f "$(findmnt -no SOURCE /mnt/labelled)")" "$(dm_node plain)"
echo "by its label" >/mnt/labelled/file
sync -f /mnt/labelled/file
kill -0 "$COPY" || fail "the copy was over before that: $(cat /run/copy.err)"
wait "$COPY" || fail "the copy failed: $(cat /run/copy.err)"
umount /mnt/labelled
mount /dev/mapper/plain /mnt/labelled
assert_same "the file that was written by the label" "$(cat /mnt/labelled/file)" "by its label"
umount /mnt/labelled
tidemark detach data >/dev/null
tidemark detach plain >/dev/null
assert_no_tidemark_left
