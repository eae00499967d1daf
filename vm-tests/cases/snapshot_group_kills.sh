# The creation of a snapshot of two volumes is killed at every point: both volumes have it afterwards, or none, whichever
# command looks first, and after the point of decision both have it. The same after a reboot.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_load.sh"

make_filesystem ext4 "$(disk 4)" /mnt/stores
tidemark attach "$(disk 0)" --name wal
tidemark attach "$(disk 1)" --name data
timeout -s KILL 700 python3 "$REPO/vm-tests/cases/snapshot_group.py" kills /mnt/stores wal:data || fail "the kills"

note "a reboot after the kill"
tidemark attach "$(disk 2)" --name first
tidemark attach "$(disk 3)" --name second
for volume in first second; do
    make_filesystem ext4 "/dev/mapper/$volume" "/mnt/$volume"
    umount "/mnt/$volume"
done
# What a reboot leaves: the records and the files, and nothing in the kernel.
forget() {
    dmsetup remove first second
    for _ in 1 2 3 4 5 6; do
        dmsetup ls | awk '/^(first|second)[@#]/ { print $1 }' | xargs -r -n 1 dmsetup remove 2>/dev/null || true
    done
    assert_same "devices left" "$(dmsetup ls | grep -cE '^(first|second)' || true)" 0
}
states() { tidemark snapshot list --json | python3 -c '
import json, sys
views = [view for line in sys.stdin for view in json.loads(line)["report"] if view["state"] != "retired"]
print(*sorted(view["snapshot"] + " " + view["state"] for view in views), sep=", ")'; }
# The record of each volume knows what ext4 notes of its mounts.
tidemark snapshot create first second --name old --store /mnt/stores --store-size 4MiB
round=0
for point in snapshot.create.taken record.written snapshot.group.committed snapshot.create.kept; do
    status=0 round=$((round + 1))
    TIDEMARK_CRASH_AT=$point tidemark snapshot create first second --name "new$round" --store /mnt/stores --store-size 4MiB ||
        status=$?
    assert_same "exit status at $point" "$status" 137
    forget
    tidemark attach "$(disk 2)" --name first
    tidemark attach "$(disk 3)" --name second
    tidemark recover
    expected="first@old valid, second@old valid"
    case $point in
        snapshot.group.committed | snapshot.create.kept)
            expected="first@new$round valid, first@old valid, second@new$round valid, second@old valid" ;;
    esac
    assert_same "after $point" "$(states)" "$expected"
    case $expected in *new*) for volume in first second; do tidemark snapshot delete "$volume@new$round" --yes; done ;; esac
    assert_same "records of groups" "$(find /var/lib/tidemark/snapshots/groups -type f)" ""
done
tidemark snapshot delete first@old --yes
tidemark snapshot delete second@old --yes
for volume in wal data first second; do
    assert_same "the table of $volume" "$(dmsetup table "$volume" | cut -d' ' -f3)" linear
    tidemark detach "$volume"
done
assert_same "stores left" "$(find /mnt/stores -name '*.store')" ""
assert_same "records left" "$(find /var/lib/tidemark/snapshots -name '*.json')" ""
assert_no_tidemark_left
