# LVM and a copy change the table of the same volume at the same time, on a slow disk. What LVM reports as done is done,
# in its metadata and in the kernel. A copy succeeds or says why it is void. The files keep their content.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_load.sh"
. "$REPO/vm-tests/cases/lib_lvm.sh"

make_group 48
start_hot_load
for turn in 1 2; do
    round lvextend -q -L +1m tidetest/data
    round lvchange -q --refresh tidetest/data
    [ "$turn" = 2 ] || round pvmove -q -n data "$(disk 0)" "$(disk 1)"
done
round true
for turn in 1 2 3; do SCOPE=copy round lvextend -q -L +1m tidetest/data; done

# A copy that dies between a load and the resume leaves its table in the inactive slot. LVM takes any table in that slot
# for its own, loads none, and resumes with it. So the table must be gone before LVM looks.
for point in insert.load-origin.after release.swap.loaded:2 restore.load-own.after; do
    for scope in change copy; do
        rm -f /mnt/scratch/copy.raw
        TIDEMARK_CRASH_AT=$point tidemark copy "$origin" /mnt/scratch/copy.raw --all --yes --store /mnt/scratch --region 1MiB \
            --freeze-budget 60s --lvm-lock "$scope" >/run/copy.out 2>/run/copy.err &
        copy=$!
        # With scope "copy", LVM waits for the end of the copy; with "change", it runs after the kill.
        if [ "$scope" = copy ]; then
            until_preserved "$copy"
        else
            while kill -0 "$copy" 2>/dev/null; do sleep 0.01; done
        fi
        lvextend -q -L +1m tidetest/data
        assert_same "killed at $point, $scope: the size that the kernel maps" "$(blockdev --getsz "$origin")" \
            "$(lvs --noheadings --nosuffix --units s -o lv_size tidetest/data | tr -d ' ')"
        status=0
        wait "$copy" 2>/dev/null || status=$?
        assert_same "exit status at $point: $(cat /run/copy.err)" "$status" 137
        tidemark recover >/run/recover.out 2>&1 || fail "recover: $(cat /run/recover.out)"
        agree "killed at $point, $scope"
    done
done
stop_hot_load
note "$copied copies, $void void"
[ "$copied" -gt 0 ] || fail "no copy succeeded"
[ "$void" -gt 0 ] || fail "LVM interfered with no copy: this proves nothing"

# What LVM activates holds what was written.
assert_same "the file, before" "$(sha256sum </mnt/origin/kept)" "$sum"
umount /mnt/origin
lvchange -q -an tidetest/data
lvchange -q -ay tidetest/data
dmsetup mknodes
e2fsck -fn "$origin" || fail "the origin's filesystem is damaged"
mount "$origin" /mnt/origin
assert_same "the file, activated anew" "$(sha256sum </mnt/origin/kept)" "$sum"
umount /mnt/origin
