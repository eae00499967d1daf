# Data synced before the power cut must survive it. The writer is not shut down cleanly.
mkfs.ext4 -q "$(disk 0)"
mkdir -p /mnt/a
mount "$(disk 0)" /mnt/a
fill /mnt/a/synced 4194304 synced
sync
(while :; do echo more >>/mnt/a/growing; done) &
marker written
sleep 600
