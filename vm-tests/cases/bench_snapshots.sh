# What kept snapshots cost: 4 KiB synchronous first writes to a volume with 1, 2, 4, 8 and 16 of them, beside LVM's thick
# snapshots of a logical volume, in rounds; and reads through the oldest and the newest of 8. The disks are modelled by
# null_blk, as in bench.sh.
# shellcheck shell=bash
[ "$MACHINE" = um ] || fail "there is no user-mode kernel here (run scripts/setup)"

mkdir -p /etc/lvm /mnt/stores
cat >/etc/lvm/lvmlocal.conf <<'END'
activation { monitoring = 0 udev_sync = 0 udev_rules = 0 }
backup { archive = 0 backup = 0 }
END
model_disk() { # NAME MIB
    local folder=/sys/kernel/config/nullb/$1 word
    mkdir "$folder"
    for word in $TIDEMARK_BENCH_MODEL "size=$2" power=1; do echo "${word#*=}" >"$folder/${word%%=*}"; done
}
model_disk origin 128
model_disk stores 900
model_disk lvm 1100
dmsetup create --noudevsync disk-lvm --table "0 $(blockdev --getsz /dev/lvm) linear /dev/lvm 0"
settle
mkfs.ext4 -q -m 0 /dev/stores
mount /dev/stores /mnt/stores
pvcreate -q -y /dev/mapper/disk-lvm
vgcreate -q bench /dev/mapper/disk-lvm
lvcreate -q -y -Wn -Zn -L 128m -n data bench
tidemark attach /dev/origin --name data
settle
python3 "$REPO/vm-tests/bench/snapshots.py" "$ARTIFACTS/snapshots.json"
tidemark detach data
