# hooks/systemd-unit with a real systemd, in namespaces of its own: units do not run at the instant, and run again
# whatever is killed.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_hooks.sh"

note "a systemd whose only units are these"
mkdir -p /run/units
printf '[Service]\nExecStart=/bin/sleep infinity\nExecStop=%s\n' "/bin/sh -c 'echo clean >>/run/ends'" \
    >/run/units/app.service
printf '[Unit]\nRequires=app.service\nAfter=app.service\n[Service]\nExecStart=/bin/sleep infinity\n' \
    >/run/units/web.service
printf '[Unit]\nBindsTo=web.service\nAfter=web.service\n[Service]\nExecStart=/bin/sleep infinity\n' \
    >'/run/units/log-x\x2dy.service'
printf '[Unit]\nPartOf=app.service\n[Service]\nExecStart=/bin/sleep infinity\n' >/run/units/idle.service
for target in test sysinit basic shutdown timers; do
    printf '[Unit]\nDescription=%s\n' $target >/run/units/$target.target
done
unshare --fork --pid --mount --mount-proc --kill-child env container=tidemark SYSTEMD_UNIT_PATH=/run/units \
    SYSTEMD_LOG_TARGET=console /lib/systemd/systemd --unit=test.target --log-level=warning >/run/systemd.log 2>&1 &
wait_until 30 pgrep -f '^/lib/systemd/systemd --unit'
inside=(nsenter --pid --mount --target "$(pgrep -f '^/lib/systemd/systemd --unit')")
unit() { "${inside[@]}" systemctl "$@"; }
wait_until 30 unit --quiet is-active test.target
unit start web.service 'log-x\x2dy.service'

state() { unit show --property=ActiveState --value "$@" | xargs; }
states() { state app.service web.service 'log-x\x2dy.service' idle.service; }
assert_same "units" "$(states)" "active active active inactive"

install_hooks systemd-unit
before='--unit app.service'
is_held() { [ "$(state app.service)" != active ]; }
survives_failures
assert_same "timers that are left" "$(unit list-timers --all --legend=no 'tidemark-*')" ""
assert_same "units that ran before, all of them and no other" "$(states)" "active active active inactive"
assert_same "a clean end each time" "$(sort -u /run/ends)" clean

note "a unit that does not run is not started"
copy '--unit idle.service' || fail "the copy failed"
assert_same "idle" "$(state idle.service)" inactive

note "a unit that does not exist, and none"
for wrong in '--unit none.service' '' '--unit -x' --unit; do
    assert_status 1 copy "$wrong"
done
assert_same "units" "$(states)" "active active active inactive"

note "something starts the unit meanwhile"
begin "$before"
assert_same "all that the unit takes with it is stopped" "$(states)" "inactive inactive inactive inactive"
unit start app.service
sleep 1
kill -TERM "$copy"
ends 130 "ended by itself"
assert_same "units" "$(states)" "active active active inactive"

note "the keeper and Tidemark are killed: systemd starts the units soon after the limit"
begin "$before --limit 3"
kill -KILL "$copy" "$(keeper)"
wait_until 60 unit --quiet is-active app.service web.service 'log-x\x2dy.service'
# The next one removes what they have left.
copy "$before" || fail "the copy failed"
nothing_left
