# SIGKILL before and after every step of insertion and removal: the load continues, the watchdog resumes what was held,
# recover restores the exact table and leaves nothing, and a new stack works. The README promises: whatever happens to
# Tidemark, the origin keeps working.
. "$REPO/vm-tests/cases/lib_stack.sh"

make_origin
start_load
"$TIDEMARK" __stack /run/points points 1 </dev/null
[ "$(wc -l </run/points)" -ge 40 ] || fail "only $(wc -l </run/points) crash points"

some_under_emulation points 5 </run/points >/run/some
mv /run/some /run/points

# writes_within_seconds N: a write to the origin's filesystem completes within N seconds after the kill.
writes_within_seconds() { timeout "$1" dd if=/dev/zero of=/mnt/data/probe bs=4k count=1 conv=fsync status=none; }

crashes=0
while read -r point; do
    rm -f "$REPORT"
    status=0
    # stdin is empty, so the removal follows the insertion at once.
    TIDEMARK_CRASH_AT=$point "$TIDEMARK" __stack "$REPORT" data "$COW" 60000 true /mnt/data </dev/null 2>/run/err \
        || status=$?
    assert_same "exit status at $point" "$status" 137
    crashes=$((crashes + 1))
    writes_within_seconds 20 || fail "$point: the origin does not answer"
    load_goes_on
    "$TIDEMARK" recover || fail "$point: recover: exit status $?"
    assert_as_before
    # The second recover has nothing to do.
    "$TIDEMARK" recover || fail "$point: second recover"
    fresh_store
done </run/points
note "$crashes crashes"

# After all crashes a new stack works.
insert 20000 true
load_goes_on
remove_stack
grep -q 'status Active' "$REPORT" || fail "$(cat "$REPORT")"
assert_as_before
stop_load
umount /mnt/data
e2fsck -fn "$ORIGIN" || fail "the origin's filesystem is damaged"
