# The second boot sees the disks of the first one, and mounting replays the journal.
[ "$PHASE" = 1 ] || fail "phase $PHASE"
[ -e /case/marker.written ] || fail "the first boot did not reach its marker"
[ ! -e /case/status.0 ] || fail "the first boot ended by itself"
mkdir -p /mnt/a
dumpe2fs -h "$(disk 0)" 2>/dev/null | grep -q 'Filesystem features:.*needs_recovery' || fail "the file system was unmounted cleanly"
mount "$(disk 0)" /mnt/a
fill /tmp/synced 4194304 synced
assert_identical /tmp/synced /mnt/a/synced
umount /mnt/a
e2fsck -fn "$(disk 0)"
