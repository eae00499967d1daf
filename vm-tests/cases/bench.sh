# Sets the stage for the measurement and hands over to vm-tests/bench/rounds.py, which says what is measured.
#
# One logical volume is the origin for everybody. It held other data before its filesystem was made: free space that
# reads as zeros would be a gift to whoever skips zeros. The filesystem is a third full, the loads' files included.
# LVM's copy-on-write volume and Tidemark's store are on the same disk; where flushes are slow, each is a loop device
# on a file of that disk. What the disks are, vm-tests/cases/bench.rs says.
# shellcheck shell=bash

mib=$TIDEMARK_BENCH_VOLUME_MIB
# What a store needs for every chunk of the volume and the metadata of each, and a little.
store_mib=$((mib + mib / 64 + 16))

mkdir -p /etc/lvm /mnt/origin /mnt/store
# There is no udevd here: LVM makes its nodes itself. No daemon watches snapshots, and backups of LVM's metadata are no
# part of the measurement.
cat >/etc/lvm/lvmlocal.conf <<'END'
activation { monitoring = 0 udev_sync = 0 udev_rules = 0 }
backup { archive = 0 backup = 0 }
END

# A disk of null_blk, as TIDEMARK_BENCH_MODEL describes it. LVM does not take one as it is: a linear device is over it.
model_disk() { # NAME MIB
    local folder=/sys/kernel/config/nullb/$1 word
    mkdir "$folder"
    for word in $TIDEMARK_BENCH_MODEL "size=$2" power=1; do
        # Whether it has heads to move, only its queue can be told.
        [ "${word%%=*}" = rotational ] || echo "${word#*=}" >"$folder/${word%%=*}"
    done
    local queue=/sys/block/$1/queue
    [[ " $TIDEMARK_BENCH_MODEL " != *" rotational=1 "* ]] || echo 1 >"$queue/rotational"
    echo "$TIDEMARK_BENCH_SCHEDULER" >"$queue/scheduler"
    # A disk of few requests at once still has a queue to sort.
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
    # Written, not only allocated: its first writes are not to pay for the conversion of extents.
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

note "old data in all of the volume"
fill_mib=16
truncate -s "${fill_mib}M" /tmp/old
fill /tmp/old $((fill_mib << 20)) old
for ((at = 0; at < mib; at += fill_mib)); do
    dd if=/tmp/old of="$origin" bs=1M seek="$at" oflag=direct status=none
done
mkfs.ext4 -q -F -b 4096 -E nodiscard,lazy_itable_init=0,lazy_journal_init=0 "$origin"
mount "$origin" /mnt/origin

note "the files of the loads"
file_mib=$((mib / 10))
for ((at = 0; at < file_mib; at += fill_mib)); do
    dd if=/tmp/old of=/mnt/origin/file bs=1M seek="$at" conv=notrunc status=none
done
truncate -s "${file_mib}M" /mnt/origin/file
if [[ ,$TIDEMARK_BENCH_LOADS, == *,pgbench,* ]]; then
    pg_init /mnt/origin/pg
    # Whole pages follow every checkpoint into the log: with them a load's first seconds differ from its later
    # ones, and a short copy could not be compared with a long one.
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

# The programs are read from the host when they first run.
tidemark --version >/dev/null
lvs >/dev/null
note "measuring"
BENCH_STORE=$store BENCH_ORIGIN=$origin BENCH_SECONDARY=$secondary BENCH_STORE_PV=$store_pv BENCH_STORE_MIB=$store_mib \
    PG_CTL=$(command -v pg_ctl) python3 "$REPO/vm-tests/bench/rounds.py" "$ARTIFACTS/results.jsonl"
assert_no_tidemark_left
umount /mnt/origin
