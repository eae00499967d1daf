# A program of kept snapshots over a volume that is being written, random or with a kill at each point: created, deleted
# in any order, killed, taken apart and put together, with copies in between. Every snapshot shows its instant at any
# time.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_load.sh"

make_filesystem ext4 "$(disk 1)" /mnt/stores
tidemark attach "$(disk 0)" --name data
case "$SNAPSHOT_PROGRAM" in
    each) steps=each ;;
    *) if [ "$DEPTH" = routine ]; then steps=24; else steps=100; fi ;;
esac
timeout -s KILL 800 python3 "$REPO/vm-tests/cases/snapshots.py" "$SEED" "$steps" "$(disk 0)" /mnt/stores ||
    fail "the program of snapshots"
assert_same "the volume's table afterwards" "$(dmsetup table data | cut -d' ' -f3)" linear
assert_same "devices left" "$(dmsetup ls | grep -vc '^data' || true)" 0
assert_same "stores left" "$(find /mnt/stores -name '*.store')" ""
assert_same "records left" "$(find /var/lib/tidemark/snapshots -name '*.json' 2>/dev/null)" ""
tidemark detach data
assert_no_tidemark_left
