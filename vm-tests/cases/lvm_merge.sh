# While a volume is copied on a slow disk, LVM takes snapshots of it, merges and removes them, shrinks and grows another
# volume of the group, renames volume and group, and is asked to remove a volume in use. What LVM reports as done is
# done, in its metadata and in the kernel. A copy succeeds or says why it is void.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_load.sh"
. "$REPO/vm-tests/cases/lib_lvm.sh"

make_group 24
lvcreate -q -y -Wn -Zn -L 4m -n other tidetest "$(disk 1)"
# No udevd runs here, so LVM makes its device nodes itself.
mkdir -p /etc/lvm
echo 'activation { monitoring=0 udev_sync=0 udev_rules=0 verify_udev_operations=1 }' >>/etc/lvm/lvmlocal.conf
volumes() { lvs -a --noheadings -o lv_name tidetest | tr -d ' ' | sort | xargs; }

takes_and_removes() {
    lvcreate -q -y -s -L 4m -n theirs tidetest/data
    assert_same "volumes" "$(volumes)" "data other theirs"
    dmsetup table tidetest-theirs | grep -q ' snapshot ' || fail "lvcreate -s reports a snapshot that is not there"
    sleep "0.$((RANDOM % 9))"
    lvremove -q -y tidetest/theirs
    assert_same "volumes" "$(volumes)" "data other"
}
resizes_another() {
    local size
    for by in -1m +1m; do
        if [ "$by" = -1m ]; then lvreduce -q -f -L "$by" tidetest/other; else lvextend -q -L "$by" tidetest/other; fi
        size=$(lvs --noheadings --nosuffix --units s -o lv_size tidetest/other | tr -d ' ')
        assert_same "the size of the other volume" "$(blockdev --getsz /dev/mapper/tidetest-other)" "$size"
        sleep "0.$((RANDOM % 9))"
    done
}
removes_in_use() {
    ! lvremove -q -f -y tidetest/data || fail "a volume in use was removed"
    assert_same "volumes" "$(volumes)" "data other"
}
renames() {
    lvrename -q tidetest data renamed
    dmsetup info tidetest-renamed >/dev/null
    sleep "0.$((RANDOM % 9))"
    lvrename -q tidetest renamed data
}
renames_group() {
    local names
    for names in 'tidetest renamed' 'renamed tidetest'; do
        # shellcheck disable=SC2086
        vgrename -q $names
        # LVM renames the devices of volumes in use only when they are refreshed.
        lvchange -q --refresh "${names#* }/data" "${names#* }/other"
        dmsetup info "${names#* }-data" >/dev/null
        sleep "0.$((RANDOM % 9))"
    done
}

turns=1
[ "$DEPTH" != full ] || turns=4
start_hot_load
for _ in $(seq $turns); do
    for deed in takes_and_removes resizes_another removes_in_use renames renames_group; do
        round "$deed"
        dmsetup mknodes
    done
done
stop_hot_load
[ "$copied" -gt 0 ] || fail "no copy succeeded"
[ "$void" -gt 0 ] || fail "LVM interfered with no copy: this proves nothing"
assert_same "the file, before" "$(sha256sum </mnt/origin/kept)" "$sum"
umount /mnt/origin

# A merge begins at once if the volume is not open, and else at its next activation. It reverts all writes since LVM's
# snapshot, and nothing else. A release by the copy must not undo the merge.
at=8192
merges() { # CLOSED
    lvcreate -q -y -s -L 8m -n theirs tidetest/data
    dd if=/dev/urandom of="$origin" bs=64k count=16 seek=$((at / 128)) oflag=direct conv=notrunc status=none
    [ "$(digest "$origin")" != "$before" ] || fail "nothing was written"
    [ "$1" = open ] || exec 7>&-
    lvconvert -q -i 1 --merge tidetest/theirs
}
is_merged() { [ "$(volumes)" = "data other" ]; }
for how in closed open; do
    before=$(digest "$origin")
    exec 7<>"$origin"
    round_of_merge() { merges "$how"; }
    # While a merge runs, the full `agree` would fail: it is for a volume at rest.
    agree() { assert_same "$1: suspended devices" "$(suspended_devices)" "" && assert_no_tidemark_left; }
    round round_of_merge
    exec 7>&-
    grep -q 'next activation' /run/lvm.out && note "the merge waits for the next activation"
    lvchange -q -an tidetest/data
    lvchange -q -ay tidetest/data
    dmsetup mknodes
    wait_until 60 is_merged
    lvchange -q --refresh tidetest/data
    assert_same "the targets once it is merged" "$(dmsetup table tidetest-data | cut -d' ' -f3 | sort -u)" linear
    assert_same "the volume once it is merged" "$(digest "$origin")" "$before"
done
note "$copied copies, $void void"
e2fsck -fn "$origin" || fail "the origin's filesystem is damaged"
mount "$origin" /mnt/origin
assert_same "the file, merged and activated anew" "$(sha256sum </mnt/origin/kept)" "$sum"
umount /mnt/origin
