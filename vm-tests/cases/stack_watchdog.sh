# A command that stalls in its critical section: the watchdog lets the origin go on within the budget, and the command,
# awake again, puts everything back. A hook past the budget and a signal end the same way.
. "$REPO/vm-tests/cases/lib_stack.sh"

make_origin
start_load

# A stall in seconds, the budget and the longest that a write may take in milliseconds: under emulation all of it takes
# longer, and only the stall is to be longer than what a write may take.
if [ "$MACHINE" = um ]; then stall=5 budget=1500 write_max=4000; else stall=10 budget=2500 write_max=8000; fi

for point in $(printf '%s\n' insert.freeze.before insert.freeze.after insert.suspend.after insert.instant.after \
    insert.switch.after insert.thaw.after restore.suspend.after | some_under_emulation stalls 1); do
    rm -f "$REPORT"
    TIDEMARK_STALL_AT=$point:$stall "$TIDEMARK" __stack "$REPORT" data "$COW" "$budget" true /mnt/data </dev/null &
    pid=$!
    # Wherever it stalls, no write may wait for as long as the stall lasts.
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

# A hook that overstays is killed, and everything is put back by the command itself. Its deadline is the watchdog's too:
# both let the origin go on at the same moment, and whoever comes second finds that done.
for _ in 1 2 3; do
    rm -f "$REPORT"
    assert_status 1 "$TIDEMARK" __stack "$REPORT" data "$COW" 1000 'sleep 30' /mnt/data </dev/null
    grep -q '\[\]$' "$REPORT" || fail "not all of it could be taken back: $(cat "$REPORT")"
    load_goes_on
    assert_as_before
    fresh_store
done

# Command and watchdog killed while everything is held: nobody lets go until recover does, the kernel's hurry included.
# The watchdog first: it acts as soon as the command is dead.
rm -f "$REPORT"
"$TIDEMARK" __stack "$REPORT" data "$COW" 60000 'kill -KILL $(pgrep -f "__watchdo[g]") $PPID' /mnt/data </dev/null || true
assert_same "what is suspended" "$(suspended_devices)" data
assert_same "the kernel hurries" "$(kernel_hurries)" "$hurry_of_a_copy"
"$TIDEMARK" recover
load_goes_on
assert_as_before
fresh_store

# A signal at the instant: interrupted, and everything put back.
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

# Whoever died in it, the kernel's log says what the watchdog did.
dmesg | grep -q 'tidemark watchdog' || fail "the watchdog said nothing"
stop_load
umount /mnt/data
e2fsck -fn "$ORIGIN" || fail "the origin's filesystem is damaged"
