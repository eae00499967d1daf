# SIGSTOP at every step of a stack's insertion, restoration and removal, and in a copy's releases and holds, on a slow
# disk. No writer waits longer than the budget plus the disk's own time, because the watchdog resumes the origin. After
# SIGCONT the command ends with a copy of its instant, or with no copy and everything as before.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_stack.sh"
. "$REPO/vm-tests/cases/lib_slow.sh"

make_origin
start_load
make_scratch() { mkfs.ext4 -q -F "$(disk 2)" && mkdir -p /mnt/scratch && mount "$(disk 2)" /mnt/scratch; }
make_scratch

# The budget, and the longest time that a write may take: twice the budget, because the stopped command may hold writers
# again once it continues, and several times the latency of the disk, whose queue is full by then.
if [ "$MACHINE" = um ]; then budget=2000 write_max=8000; else budget=4000 write_max=12000; fi

is_stopped() { grep -q '^State:.T' "/proc/$1/status" 2>/dev/null; }
is_over() { ! grep -q '^State:.[^Z]' "/proc/$1/status" 2>/dev/null; }
probe() { dd if=/dev/zero of=/mnt/data/probe bs=4k count=1 conv=fsync,notrunc status=none; }

# is_guarded POINT: the watchdog's clock runs at this point.
is_guarded() {
    case "$1" in
        insert.guard.after | insert.freeze.* | insert.load-origin.* | insert.suspend.* | insert.instant.*) ;;
        insert.switch.* | insert.thaw.* | insert.unguard.before) ;;
        restore.guard.after | restore.suspend.* | restore.switch.* | restore.unguard.before | hold.*) ;;
        *) return 1 ;;
    esac
}

# stopped POINT COMMAND...: the command stops at POINT and is continued after the budget. STATUS is its exit status.
stopped() {
    local point=$1 pid attempt=0
    shift
    measure probe
    while :; do
        rm -f "$REPORT" /run/copy.err
        TIDEMARK_STOP_AT=$point "$@" </dev/null &
        pid=$!
        until is_stopped "$pid" || is_over "$pid"; do sleep 0.02; done
        ! is_stopped "$pid" || break
        # On a busy machine, the estimate for the freeze may exceed the budget. Then the command is refused unfrozen.
        wait "$pid" || true
        cat "$REPORT" /run/copy.err >/run/said 2>/dev/null || true
        grep -q 'the freeze would hold writers' /run/said && [ $((attempt += 1)) -lt 10 ] ||
            fail "$point: the command did not reach this point: $(cat /run/said)"
        sleep 1
    done
    # Wait until the budget is over and the watchdog has acted.
    if is_guarded "$point"; then sleep $((budget / 1000 + 1)); else sleep 0.2; fi
    # No writer waits for a stopped command, however long it is stopped.
    timeout 20 dd if=/dev/zero of=/mnt/data/probe bs=4k count=1 conv=fsync,notrunc status=none || fail "$point: writers wait for a stopped command"
    kill -CONT "$pid"
    STATUS=0
    wait "$pid" || STATUS=$?
    measured
    [ "$WORST" -lt "$write_max" ] || fail "$point: a write took $WORST ms"
}

"$TIDEMARK" __stack /run/points points 1 </dev/null
[ "$(wc -l </run/points)" -ge 40 ] || fail "only $(wc -l </run/points) points"
# Where nothing is held, a stop has the same effect as a crash; a routine run takes a sample of these points.
while read -r point; do
    if is_guarded "$point"; then echo "$point" >>/run/guarded; else echo "$point" >>/run/idle; fi
done </run/points
if [ "$DEPTH" = full ]; then cat /run/idle; else some_of idle 3 </run/idle; fi >/run/some
some_under_emulation points 4 </run/guarded >>/run/some
given_up=0 worst=0
while read -r point <&8; do
    stopped "$point" "$TIDEMARK" __stack "$REPORT" data "$COW" "$budget" true /mnt/data 8<&-
    case "$STATUS" in
        0) ;;
        1)
            grep -q 'freeze budget' "$REPORT" || fail "$point: $(cat "$REPORT")"
            given_up=$((given_up + 1))
            ;;
        *) fail "$point: exit status $STATUS" ;;
    esac
    case "$point" in
        # The watchdog ended the hold of the instant, so the insertion fails.
        insert.*) ! is_guarded "$point" || assert_same "exit status at $point" "$STATUS" 1 ;;
        *) assert_same "exit status at $point: $(cat "$REPORT")" "$STATUS" 0 ;;
    esac
    [ "$WORST" -le "$worst" ] || worst=$WORST
    note "$point: exit status $STATUS, slowest write $WORST ms"
    load_goes_on
    assert_as_before
    fresh_store
done 8</run/some
note "$given_up of $(wc -l </run/some) commands failed, the slowest write took $worst ms"
[ "$given_up" -gt 0 ] || [ "$MACHINE" != um ] || fail "the watchdog never acted: this proves nothing"

# With a copy. The capture goes to memory, because the origin is held until the capture is complete.
# shellcheck disable=SC2016
capture='dd if="$TIDEMARK_ORIGIN_BELOW" of=/run/instant bs=4M iflag=direct status=none'
copied() { # OPTION...
    exec "$TIDEMARK" copy "$ORIGIN" /mnt/scratch/copy.raw --all --yes --store /mnt/scratch --store-ram 0 \
        --freeze-budget ${budget}ms --hook-frozen "$capture" "$@" >/run/copy.out 2>/run/copy.err
}
good=0
for point in copy.store.before insert.instant.after insert.switch.after copy.data.before \
    hold.suspend.before hold.suspend.after release.swap.before:3 release.swap.after:3 copy.originals.laid copy.data.after \
    restore.suspend.after restore.switch.after copy.release.before; do
    options=(--region 1MiB --segment 256KiB)
    case "$point" in hold.*) options+=(--chunk 64KiB --store-size 4MiB --on-full hold --hold-budget 60s --rate 6MiB) ;; *) options+=(--rate 16MiB) ;; esac
    rm -f /mnt/scratch/copy.raw /run/instant
    stopped "$point" copied "${options[@]}"
    note "$point: exit status $STATUS, slowest write $WORST ms: $(grep '^tidemark: ' /run/copy.err || true)"
    case "$STATUS" in
        0)
            good=$((good + 1))
            assert_identical /mnt/scratch/copy.raw /run/instant
            ;;
        1)
            case "$point" in
                # A stopped command cannot hold writers, so they may fill the store meanwhile.
                hold.*) grep -Eq 'freeze budget|the COW store is full' /run/copy.err || fail "$point: $(cat /run/copy.err)" ;;
                *) grep -q 'freeze budget' /run/copy.err || fail "$point: $(cat /run/copy.err)" ;;
            esac
            [ ! -e /mnt/scratch/copy.raw ] || fail "$point: a failed copy has the final name"
            ;;
        *) fail "$point: exit status $STATUS: $(cat /run/copy.err)" ;;
    esac
    load_goes_on
    assert_as_before
done
[ "$good" -ge 8 ] || fail "only $good copies were good"
stop_load
umount /mnt/data
e2fsck -fn "$ORIGIN" || fail "the origin's filesystem is damaged"
