# Power cut, second boot: the snapshots are put together again, and show what they showed. If the device is mounted without
# them, they are lost.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_load.sh"

mkdir -p /mnt/stores /mnt/data /var/lib/tidemark
mount "$(disk 1)" /mnt/stores
mount --bind /mnt/stores/state /var/lib/tidemark
state() { tidemark snapshot list data --json | python3 -c '
import json, sys
views = {view["snapshot"]: view["state"] for line in sys.stdin for view in json.loads(line)["report"]}
print(views.get(sys.argv[1], "gone"))' "$1"; }

tidemark attach "$(disk 0)" --name data
for i in 1 2 3; do
    assert_same "the state of s$i" "$(state "data@s$i")" valid
    assert_same "what s$i shows" "$(sha256sum </dev/mapper/data@s"$i")" "$(cat /mnt/stores/s"$i".sum)"
done
mount /dev/mapper/data /mnt/data
head -c 4m /dev/urandom >/mnt/data/more
sync -f /mnt/data
tidemark snapshot create data --name s4 --store /mnt/stores --store-size 60MiB --freeze-budget 60s
tidemark snapshot delete data@s2 --yes
for i in 1 3; do
    assert_same "what s$i shows after writes" "$(sha256sum </dev/mapper/data@s"$i")" "$(cat /mnt/stores/s"$i".sum)"
done
umount /mnt/data
e2fsck -fn /dev/mapper/data >/run/fsck 2>&1 || { cat /run/fsck; fail "the volume's filesystem"; }
tidemark detach data --keep-snapshots
mount "$(disk 0)" /mnt/data
umount /mnt/data
tidemark attach "$(disk 0)" --name data
assert_same "the state after a mount without them" "$(state data@s1)" invalid
tidemark snapshot delete data@s1 data@s3 data@s4 --yes
tidemark detach data
umount /var/lib/tidemark /mnt/stores
assert_no_tidemark_left
