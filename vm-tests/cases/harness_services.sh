# The services that larger cases need work in the guest: udevd with its rules, LVM, PostgreSQL, fio, SQLite.
start_udevd
[ "$MACHINE" = um ] || [ -e "/dev/disk/by-id/virtio-disk0" ] || fail "udevd created no link for a disk"

vgcreate -y tidemark-test "$(disk 0)"
lvcreate -y -n data -L 200M tidemark-test
settle
[ -b /dev/tidemark-test/data ] || fail "udevd created no link for a logical volume"
assert_same "lvs" "$(lvs --noheadings -o lv_name tidemark-test | tr -d ' ')" data
mkfs.ext4 -q /dev/tidemark-test/data
udevadm settle --timeout=60
blkid -p /dev/tidemark-test/data | grep -q ext4 || fail "blkid does not find the filesystem"
mkdir -p /mnt/data
mount /dev/tidemark-test/data /mnt/data

note "PostgreSQL"
pg_init /mnt/data/pg
pg_start /mnt/data/pg
pgbench -h /tmp -U postgres -i -s 1 -q postgres
pgbench -h /tmp -U postgres -c 2 -t 20 postgres
psql -h /tmp -U postgres -q -c 'create extension amcheck' postgres
pg_amcheck -h /tmp -U postgres postgres
pg_stop /mnt/data/pg

note "fio and SQLite"
fio --name=w --filename=/mnt/data/f --size=4M --rw=randwrite --bs=4k --direct=1 --ioengine=io_uring --iodepth=8 \
    --verify=crc32c --randseed="$SEED" --output=/tmp/fio.log || { cat /tmp/fio.log; fail "fio"; }
sqlite3 /mnt/data/db 'create table t (x); insert into t values (1); pragma integrity_check;' | grep -qx ok || fail "SQLite"

umount /mnt/data
vgchange -an tidemark-test
assert_no_tidemark_left
