# How long writers wait for a snapshot of 1, 2, 4 and 8 ext4 volumes at one instant: from the first freeze to the last
# thaw. Each volume has a disk of its own, modelled by null_blk as in bench.sh, and a program that appends to a file.
# shellcheck shell=bash
[ "$MACHINE" = um ] || fail "there is no user-mode kernel here (run scripts/setup)"

mkdir -p /mnt/stores
model_disk() { # NAME MIB
    local folder=/sys/kernel/config/nullb/$1 word
    mkdir "$folder"
    for word in $TIDEMARK_BENCH_MODEL "size=$2" power=1; do echo "${word#*=}" >"$folder/${word%%=*}"; done
}
model_disk stores 400
mkfs.ext4 -q -m 0 /dev/stores
mount /dev/stores /mnt/stores
for number in 1 2 3 4 5 6 7 8; do
    model_disk "disk$number" 64
    tidemark attach "/dev/disk$number" --name "v$number" >/dev/null
    settle
    mkfs.ext4 -q "/dev/mapper/v$number"
    mkdir -p "/mnt/v$number"
    mount "/dev/mapper/v$number" "/mnt/v$number"
done
python3 "$REPO/vm-tests/bench/groups.py" "$TIDEMARK_BENCH_ROUNDS" "$ARTIFACTS/groups.json"
for number in 1 2 3 4 5 6 7 8; do
    umount "/mnt/v$number"
    tidemark detach "v$number" >/dev/null
done
