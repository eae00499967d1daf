# A stack is inserted beneath a mounted, busy ext4 and removed again. The snapshot shows the instant, the load never
# stops, and the table afterwards is textually the same as before.
. "$REPO/vm-tests/cases/lib_stack.sh"

make_origin
start_load
for round in 1 2; do
    # The digest of the device beneath, at the instant, is the reference for the snapshot.
    insert 20000 'cat /sys/kernel/rcu_expedited 2>/dev/null >/run/expedited || echo 0 >/run/expedited; dd if=$TIDEMARK_ORIGIN_BELOW bs=1M iflag=direct status=none | sha256sum >/run/digest'
    note "round $round: $(cat "$REPORT")"
    grep -q '^in place' "$REPORT" || fail "not in place: $(cat "$REPORT")"
    assert_stack_is_over data
    assert_same "the kernel hurries while writers wait" "$(cat /run/expedited)" "$hurry_of_a_copy"
    assert_same "the kernel hurries afterwards" "$(kernel_hurries)" 0
    load_goes_on
    assert_same "the snapshot" "$(digest "$(dm_node data#snap)")" "$(cut -d' ' -f1 /run/digest)"
    remove_stack
    grep -q 'status Active' "$REPORT" || fail "$(cat "$REPORT")"
    assert_as_before
    load_goes_on
    fresh_store
done
stop_load
umount /mnt/data
e2fsck -fn "$ORIGIN" || fail "the origin's filesystem is damaged"

# While a stack is in place, another copy of the same origin is refused.
mount "$ORIGIN" /mnt/data
insert 20000 true
assert_status 3 "$TIDEMARK" __stack /run/second data "$COW" 2000 true /mnt/data </dev/null
grep -q 'refused' /run/second || fail "$(cat /run/second)"
remove_stack
assert_as_before
