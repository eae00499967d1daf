# Prepares disks, volume and load files, then runs vm-tests/bench/rounds.py, which describes the measurement.
#
# One logical volume is the origin of every method. It held other data before its filesystem was made, because free
# space that reads as zeros would favour a method that skips zeros. The filesystem is a third full, load files included.
# LVM's snapshot volume and Tidemark's store are on the same disk. Where flushes are slow, each is a loop device on a
# file of that disk. vm-tests/cases/bench.rs describes the disks.
# shellcheck shell=bash

mib=$TIDEMARK_BENCH_VOLUME_MIB
# The store holds every chunk of the volume, the metadata of each chunk, and some slack.
store_mib=$((mib + mib / 64 + 16))

mkdir -p /etc/lvm /mnt/origin /mnt/store
# No udevd runs here, so LVM makes its device nodes itself. Monitoring of snapshots and backups of metadata are off:
# they would disturb the measurement.
cat >/etc/lvm/lvmlocal.conf <<'END'
activation { monitoring = 0 udev_sync = 0 udev_rules = 0 }
backup { archive = 0 backup = 0 }
END

# A null_blk disk with the attributes of TIDEMARK_BENCH_MODEL. LVM rejects null_blk, so a linear device is put on top.
model_disk() { # NAME MIB
    local folder=/sys/kernel/config/nullb/$1 word
    mkdir "$folder"
    for word in $TIDEMARK_BENCH_MODEL "size=$2" power=1; do
        # null_blk has no "rotational" attribute; it is set in the queue below.
        [ "${word%%=*}" = rotational ] || echo "${word#*=}" >"$folder/${word%%=*}"
    done
    local queue=/sys/block/$1/queue
    [[ " $TIDEMARK_BENCH_MODEL " != *" rotational=1 "* ]] || echo 1 >"$queue/rotational"
    echo "$TIDEMARK_BENCH_SCHEDULER" >"$queue/scheduler"
    # A disk with a short hardware queue still has a scheduler queue of usual length.
    [ "$TIDEMARK_BENCH_SCHEDULER" = none ] || echo 128 >"$queue/nr_requests"
    dmsetup create --noudevsync "disk-$1" --table "0 $(blockdev --getsz "/dev/$1") linear /dev/$1 0"
}

if [ -n "$TIDEMARK_BENCH_MODEL" ]; then
    [ "$MACHINE" = um ] || fail "there is no user-mode kernel here (run scripts/setup)"
    model_disk origin $((mib + 8))
    model_disk store $((2 * store_mib + 64))
    settle
    origin_disk=/dev/mapper/disk-origin store_disk=/dev/mapper/disk-store
    mkdir -p /mnt/memory
    mount -t tmpfs -o "size=$((mib + 16))m" memory /mnt/memory
    truncate -s "${mib}M" /mnt/memory/secondary
    secondary=$(losetup --find --show --direct-io=on /mnt/memory/secondary)
else
    origin_disk=$(disk 0) secondary=$(disk 1) store_disk=$(disk 2)
    for disk in $origin_disk $secondary $store_disk; do
        [ -z "$TIDEMARK_BENCH_REQUEST_KIB" ] \
            || echo "$TIDEMARK_BENCH_REQUEST_KIB" >"/sys/block/$(basename "$disk")/queue/max_sectors_kb"
    done
fi

if [ "$TIDEMARK_BENCH_FLUSH_MS" = 0 ]; then
    store_pv=$store_disk
else
    sectors=$(blockdev --getsz "$store_disk")
    dmsetup create --noudevsync slowdisk \
        --table "0 $sectors delay $store_disk 0 0 $store_disk 0 0 $store_disk 0 $TIDEMARK_BENCH_FLUSH_MS"
    settle
    mkfs.ext4 -q -b 4096 -m 0 -O ^resize_inode -E nodiscard,lazy_itable_init=0,lazy_journal_init=0 /dev/mapper/slowdisk
    mount /dev/mapper/slowdisk /mnt/store
    # Written, not only allocated: otherwise the first writes would pay for the conversion of unwritten extents.
    dd if=/dev/zero of=/mnt/store/lvm.img bs=1M count=$((store_mib + 8)) oflag=direct conv=fsync status=none
    store_pv=$(losetup --find --show --direct-io=on /mnt/store/lvm.img)
fi
pvcreate -q -y "$origin_disk"
pvcreate -q -y "$store_pv"
vgcreate -q bench "$origin_disk" "$store_pv"
lvcreate -q -y -Wn -Zn -L "${mib}m" -n data bench "$origin_disk"
store=/mnt/store
if [ "$TIDEMARK_BENCH_FLUSH_MS" = 0 ]; then
    lvcreate -q -y -Wn -Zn -L "${store_mib}m" -n store bench "$store_pv"
    store=/dev/mapper/bench-store
fi
settle
origin=/dev/mapper/bench-data

note "writing old data to the whole volume"
fill_mib=16
truncate -s "${fill_mib}M" /tmp/old
fill /tmp/old $((fill_mib << 20)) old
for ((at = 0; at < mib; at += fill_mib)); do
    dd if=/tmp/old of="$origin" bs=1M seek="$at" oflag=direct status=none
done
mkfs.ext4 -q -F -b 4096 -E nodiscard,lazy_itable_init=0,lazy_journal_init=0 "$origin"
mount "$origin" /mnt/origin

note "writing the files of the loads"
file_mib=$((mib / 10))
for ((at = 0; at < file_mib; at += fill_mib)); do
    dd if=/tmp/old of=/mnt/origin/file bs=1M seek="$at" conv=notrunc status=none
done
truncate -s "${file_mib}M" /mnt/origin/file
if [[ ,$TIDEMARK_BENCH_LOADS, == *,pgbench,* ]]; then
    pg_init /mnt/origin/pg
    # With full_page_writes, the first change of a page after each checkpoint logs the whole page. The first seconds of
    # a load would then differ from the later ones, and short copies could not be compared with long ones.
    printf '%s\n' "full_page_writes = off" "checkpoint_timeout = 1h" "min_wal_size = 32MB" "max_wal_size = 64MB" \
        "autovacuum = off" >>/mnt/origin/pg/postgresql.conf
    pg_start /mnt/origin/pg
    createdb -h /tmp -U postgres bench
    pgbench -h /tmp -U postgres -i -q -s 2 bench >/tmp/pgbench-init.log 2>&1 || fail "$(cat /tmp/pgbench-init.log)"
    pg_stop /mnt/origin/pg
fi
# shellcheck disable=SC2046
set -- $(df --output=used,size -k /mnt/origin | tail -n 1)
missing_kib=$(($2 / 3 - $1))
[ "$missing_kib" -le 0 ] || dd if=/dev/urandom of=/mnt/origin/filler bs=1K count="$missing_kib" status=none
rm /tmp/old
sync

# Warm up: the first run of a program reads it from the host.
tidemark --version >/dev/null
lvs >/dev/null
note "measuring"
BENCH_STORE=$store BENCH_ORIGIN=$origin BENCH_SECONDARY=$secondary BENCH_STORE_PV=$store_pv BENCH_STORE_MIB=$store_mib \
    PG_CTL=$(command -v pg_ctl) python3 "$REPO/vm-tests/bench/rounds.py" "$ARTIFACTS/results.jsonl"
assert_no_tidemark_left
umount /mnt/origin
