# LVM and a copy change the same volume's table at the same time, on a slow disk: what LVM reports done is done, in its
# metadata and in the kernel; a copy succeeds or says why it is void; the files are as they were written.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_load.sh"
. "$REPO/vm-tests/cases/lib_lvm.sh"

make_group 48
writes
for turn in 1 2; do
    round lvextend -q -L +1m tidetest/data
    round lvchange -q --refresh tidetest/data
    [ "$turn" = 2 ] || round pvmove -q -n data "$(disk 0)" "$(disk 1)"
done
round true
for turn in 1 2 3; do SCOPE=copy round lvextend -q -L +1m tidetest/data; done
ends
note "$copied copies, $void void"
[ "$copied" -gt 0 ] || fail "a copy that nobody disturbs fails"
[ "$void" -gt 0 ] || fail "nothing of LVM's came between: this proves nothing"

# What the kernel wrote to is what LVM activates.
assert_same "the file, before" "$(sha256sum </mnt/origin/kept)" "$sum"
umount /mnt/origin
lvchange -q -an tidetest/data
lvchange -q -ay tidetest/data
dmsetup mknodes
e2fsck -fn "$origin" || fail "the origin's filesystem is damaged"
mount "$origin" /mnt/origin
assert_same "the file, activated anew" "$(sha256sum </mnt/origin/kept)" "$sum"
umount /mnt/origin
