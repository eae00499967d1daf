# A command stalls in its critical section: the watchdog resumes the origin within the budget, and the command, once it
# runs again, puts everything back. A hook that exceeds the budget, and a signal, end the same way.
. "$REPO/vm-tests/cases/lib_stack.sh"

make_origin
start_load

# Stall in seconds; budget and longest write in milliseconds. Under emulation everything takes longer. Only the stall
# must be longer than the longest write.
if [ "$MACHINE" = um ]; then stall=5 budget=1500 write_max=4000; else stall=10 budget=2500 write_max=8000; fi

for point in $(printf '%s\n' insert.freeze.before insert.freeze.after insert.suspend.after insert.instant.after \
    insert.switch.after insert.thaw.after restore.suspend.after | some_under_emulation stalls 1); do
    rm -f "$REPORT"
    TIDEMARK_STALL_AT=$point:$stall "$TIDEMARK" __stack "$REPORT" data "$COW" "$budget" true /mnt/data </dev/null &
    pid=$!
    # No write may wait as long as the stall, at any point.
    worst=0
    while kill -0 $pid 2>/dev/null; do
        start=${EPOCHREALTIME/./}
        dd if=/dev/zero of=/mnt/data/probe bs=4k count=1 conv=fsync,notrunc status=none
        took=$(((${EPOCHREALTIME/./} - start) / 1000))
        [ "$took" -le "$worst" ] || worst=$took
        sleep 0.1
    done
    status=0
    wait $pid || status=$?
    note "$point: exit status $status, slowest write $worst ms: $(tail -n 1 "$REPORT")"
    [ "$worst" -lt "$write_max" ] || fail "$point: a write took $worst ms"
    case "$point" in
        restore.*) assert_same "exit status at $point" "$status" 0 ;;
        *)
            assert_same "exit status at $point" "$status" 1
            grep -q 'freeze budget' "$REPORT" || fail "$point: $(cat "$REPORT")"
            ;;
    esac
    load_goes_on
    assert_as_before
    fresh_store
done

# A hook that exceeds the budget is killed, and the command puts everything back itself. The watchdog has the same
# deadline: both resume the origin at the same moment, and the second one finds it done.
for _ in 1 2 3; do
    rm -f "$REPORT"
    assert_status 1 "$TIDEMARK" __stack "$REPORT" data "$COW" 1000 'sleep 30' /mnt/data </dev/null
    grep -q '\[\]$' "$REPORT" || fail "not everything could be undone: $(cat "$REPORT")"
    load_goes_on
    assert_as_before
    fresh_store
done

# Command and watchdog are killed while everything is held: only recover resumes the origin and resets
# /sys/kernel/rcu_expedited. The watchdog is killed first, because it acts as soon as the command is dead.
rm -f "$REPORT"
"$TIDEMARK" __stack "$REPORT" data "$COW" 60000 'kill -KILL $(pgrep -f "__watchdo[g]") $PPID' /mnt/data </dev/null || true
assert_same "what is suspended" "$(suspended_devices)" data
assert_same "the kernel hurries" "$(kernel_hurries)" "$hurry_of_a_copy"
"$TIDEMARK" recover
load_goes_on
assert_as_before
fresh_store

# A signal at the instant interrupts the command, and everything is put back.
rm -f /run/started
"$TIDEMARK" __stack "$REPORT" data "$COW" 20000 'touch /run/started; sleep 30' /mnt/data </dev/null &
pid=$!
wait_until 20 test -e /run/started
kill -TERM $pid
status=0
wait $pid || status=$?
assert_same "exit status after SIGTERM" "$status" 130
load_goes_on
assert_as_before

# The watchdog logs to the kernel's log, so that its actions are known even if the command died.
dmesg | grep -q 'tidemark watchdog' || fail "the watchdog logged nothing"
stop_load
umount /mnt/data
e2fsck -fn "$ORIGIN" || fail "the origin's filesystem is damaged"
