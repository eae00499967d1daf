# Shared by the cases in which LVM changes a volume while it is copied on slow disks: the volume, and the checks after
# each round. Sourced after lib_load.sh.
# shellcheck shell=bash

# make_group MIB: creates volume "data" of this size on disk 0 in group "tidetest", with a mounted ext4 and a file whose
# checksum is $sum.
make_group() {
    make_filesystem ext4 "$(disk 2)" /mnt/scratch
    pvcreate -q -y "$(disk 0)" "$(disk 1)"
    vgcreate -q -s 1m tidetest "$(disk 0)" "$(disk 1)"
    lvcreate -q -y -Wn -Zn -L "$1m" -n data tidetest "$(disk 0)"
    dmsetup mknodes
    origin=/dev/mapper/tidetest-data
    make_filesystem ext4 "$origin" /mnt/origin
    head -c 4m /dev/urandom >/mnt/origin/kept
    sum=$(sha256sum </mnt/origin/kept)
    sync
}

# LVM's metadata and the kernel agree on the size of the volume and on the disks beneath it.
agree() { # WHEN
    local says maps
    says=$(lvs --noheadings --nosuffix --units s -o lv_size tidetest/data | tr -d ' ')
    maps=$(blockdev --getsz "$origin")
    assert_same "$1: the size that the kernel maps" "$maps" "$says"
    says=$(lvs --noheadings -o devices tidetest/data | tr -d ' ' | tr ',' '\n' | sed 's/(.*//' | sort -u |
        xargs stat -L -c %Hr:%Lr | sort | xargs)
    maps=$(dmsetup deps -o devno tidetest-data | grep -oE '[0-9]+, [0-9]+' | sed 's/, /:/' | sort | xargs)
    assert_same "$1: the disks that the kernel maps" "$maps" "$says"
    assert_same "$1: suspended devices" "$(suspended_devices)" ""
    assert_no_tidemark_left
}

# A copy may fail only because of a command of LVM.
accounted_for() { # STATUS
    [ "$1" = 0 ] || grep -q 'another tool replaced the table\|another tool is changing\|an LVM command\|changed since the copy was planned' /run/copy.err ||
        fail "the copy ended with $1: $(cat /run/copy.err)"
}

copied=0 void=0
# round COMMAND...: runs COMMAND at a random moment of a copy with many releases. File descriptor 7 of the script is not
# passed to the copy.
round() {
    local status=0 scope=${SCOPE:-change}
    rm -f /mnt/scratch/copy.raw
    tidemark copy "$origin" /mnt/scratch/copy.raw --yes --store /mnt/scratch --region 256KiB --segment 64KiB \
        --rate 12MiB --freeze-budget 60s --lvm-lock "$scope" >/run/copy.out 2>/run/copy.err 7>&- &
    local copy=$!
    sleep "0.$((RANDOM % 9))$((RANDOM % 9))"
    [ $((RANDOM % 2)) = 0 ] || wait_until 30 is_preserved "$origin" || true
    if [ "$scope" = copy ]; then
        wait_until 30 sh -c "tidemark status --json | grep -q '\"keeps_lvm_away\":true'"
        tidemark status | grep -q 'LVM' || fail "status does not say that LVM waits: $(tidemark status)"
    fi
    "$@" >/run/lvm.out 2>&1 || fail "'$*' failed: $(cat /run/lvm.out)"
    wait "$copy" || status=$?
    accounted_for "$status"
    [ "$scope" = change ] || assert_same "the copy that LVM waited for" "$status" 0
    if [ "$status" = 0 ]; then copied=$((copied + 1)); else void=$((void + 1)); fi
    note "$*: the copy ended with $status $(grep '^tidemark: ' /run/copy.err || true)"
    tidemark recover >/run/recover.out 2>&1 || fail "recover: $(cat /run/recover.out)"
    agree "$*"
}
