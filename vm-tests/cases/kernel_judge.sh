# Compares with the kernel: its snapshot target, given the fuzzy copy as origin and the kept store as exception store,
# reads the same bytes as our overlay.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_load.sh"

origin_disk=$(disk 0)
scratch_disk=$(disk 1)
tidemark attach "$origin_disk" --name data
origin=/dev/mapper/data
make_filesystem ext4 "$origin" /mnt/origin
make_filesystem ext4 "$scratch_disk" /mnt/scratch
size=$(blockdev --getsize64 "$origin")

for chunk in $(printf '%s\n' 4KiB 16KiB | some_under_emulation chunks 1); do
    start_load /mnt/origin "$SEED"
    tidemark copy "$origin" /mnt/scratch/copy.tdm --originals append --chunk "$chunk" --rate 16MiB \
        --store /mnt/scratch/store --keep-store --yes
    stop_load
    # The archive stores fuzzy data and originals separately. This independent reader extracts the data alone.
    python3 "$REPO/tests/archive_reader.py" extract --data-only /mnt/scratch/copy.tdm /mnt/scratch/fuzzy
    tidemark restore /mnt/scratch/copy.tdm /mnt/scratch/ours --yes
    if cmp -s /mnt/scratch/fuzzy /mnt/scratch/ours; then
        fail "the load changed nothing during the copy: this proves nothing"
    fi
    fuzzy=$(losetup --find --show --read-only /mnt/scratch/fuzzy)
    store=$(losetup --find --show /mnt/scratch/store)
    dmsetup create judge --noudevsync --table "0 $((size / 512)) snapshot $fuzzy $store P $((${chunk%KiB} * 2))"
    dmsetup mknodes
    note "the kernel read the kept store: $(dmsetup status judge)"
    same_bytes /dev/mapper/judge /mnt/scratch/ours "$size"
    dmsetup remove --noudevsync judge
    losetup -d "$fuzzy" "$store"
    rm -f /mnt/scratch/copy.tdm /mnt/scratch/fuzzy /mnt/scratch/ours /mnt/scratch/store
    assert_no_tidemark_left data
done
umount /mnt/origin
