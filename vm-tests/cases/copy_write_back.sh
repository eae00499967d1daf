# A copy of a volume that is not mounted writes back only the page cache of that volume, so hung storage elsewhere does
# not delay it. The wait for a slow disk ends at a signal.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_load.sh"
. "$REPO/vm-tests/cases/lib_slow.sh"

make_slow "$(disk 0)"
make_filesystem ext4 "$(disk 1)" /mnt/scratch
tidemark attach "$(disk 2)" --name data
origin=/dev/mapper/data
make_filesystem ext4 /dev/mapper/tidetest-slow /mnt/other
head -c 30000 /dev/urandom >/run/bytes

note "another filesystem's disk does not answer"
slow 20000 20000
cp /run/bytes /mnt/other/file
dd if=/run/bytes of="$origin" bs=1000 seek=100 conv=notrunc status=none
start=$SECONDS
timeout 60 tidemark copy "$origin" /mnt/scratch/copy.raw --yes --store /mnt/scratch || fail "the copy"
took=$((SECONDS - start))
note "it took $took s"
[ "$took" -lt 15 ] || fail "the copy waited for an unrelated disk"
cmp -n 30000 -i 100000:0 /mnt/scratch/copy.raw /run/bytes || fail "dirty pages of the origin are missing from the copy"
slow 0 0
umount /mnt/other
tidemark detach data

note "the origin's own disk is slow: the wait ends at a signal"
tidemark attach /dev/mapper/tidetest-slow --name data
for mounted in no yes; do
    if [ "$mounted" = yes ]; then mount "$origin" /mnt/other; fi
    slow 15000 15000
    if [ "$mounted" = yes ]; then cp /run/bytes /mnt/other/more; else dd if=/run/bytes of="$origin" bs=1000 seek=70000 conv=notrunc status=none; fi
    rm -f /mnt/scratch/copy.raw
    tidemark copy "$origin" /mnt/scratch/copy.raw --yes --store /mnt/scratch >/run/copy.out 2>/run/copy.err &
    process=$!
    wait_until 20 dmsetup info "data#real" >/dev/null
    sleep 1
    start=$SECONDS status=0
    kill -TERM "$process"
    wait "$process" || status=$?
    took=$((SECONDS - start))
    note "mounted: $mounted, exit status $status $took s after the signal"
    assert_same "the exit status: $(cat /run/copy.err)" "$status" 130
    [ "$took" -lt 6 ] || fail "the copy reacted to the signal only after $took s"
    assert_no_tidemark_left data
    slow 0 0
    sync
done
umount /mnt/other
tidemark detach data
dmsetup remove --noudevsync tidetest-slow
