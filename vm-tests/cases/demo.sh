# Runs scripts/demo on the disks of a guest.
# shellcheck shell=bash
mkfs.ext4 -q -F "$(disk 2)"
mkdir -p /mnt/demo
mount "$(disk 2)" /mnt/demo
"$REPO/scripts/demo-proof" "$(disk 0)" "$(disk 1)" /mnt/demo
assert_no_tidemark_left
