# hooks/qemu-guest with the real agent: this guest's filesystem is frozen at the instant, and thawed whatever is killed.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_hooks.sh"

guest_disk=$(disk 0)
mkfs.ext4 -q "$guest_disk"
mkdir -p /mnt/guest
mount "$guest_disk" /mnt/guest
# ext4 has this flag on disk unless it is clean: a freeze writes back everything and takes it away.
is_held() { ! dumpe2fs -h "$guest_disk" 2>/dev/null | grep -q needs_recovery; }

cat >/run/fsfreeze-hook <<'END'
#!/bin/sh
echo "$1" >>/run/guest-hooks
[ "$1" != freeze ] || [ ! -e /run/slow ] || sleep 4
END
chmod +x /run/fsfreeze-hook
start_agent() {
    rm -f /run/agent
    "$REPO/target/servers/usr/sbin/qemu-ga" -m unix-listen -p /run/agent -t /run -F/run/fsfreeze-hook \
        -f /run/agent.pid 2>/run/agent.log &
    agent=$!
    wait_until 30 test -S /run/agent
}
start_agent
inside=()
install_hooks qemu-guest
before='--socket /run/agent'
is_held && fail "it is frozen before anything was done"
survives_failures
grep -q freeze /run/guest-hooks || fail "the guest's own hooks did not run"
echo "it works" >/mnt/guest/file

note "two at once: the second one neither freezes nor thaws"
begin "$before"
assert_status 1 "${inside[@]}" tidemark copy /run/origin /run/other.tdm --hook-before "$hook before $before" \
    --hook-after "$hook after $before" 2>/run/other.err
grep -q 'frozen already' /run/other.err || fail "it does not say why: $(cat /run/other.err)"
is_held || fail "the second one has thawed what the first has frozen"
kill -TERM "$copy"
ends 130 ""

note "the guest is thawed by another meanwhile"
begin "$before"
python3 -c '
import socket
agent = socket.socket(socket.AF_UNIX)
agent.connect("/run/agent")
agent.sendall(b"{\"execute\": \"guest-fsfreeze-thaw\"}\n")
assert b"return" in agent.recv(100)'
sleep 1
kill -TERM "$copy"
ends 130 "did not last"

note "a freeze that takes longer than the limit is undone"
touch /run/slow
assert_status 1 copy "$before --limit 1"
grep -q 'no answer within' /run/copy.err || fail "it does not say why"
rm /run/slow
nothing_left

note "the agent hangs"
kill -STOP "$agent"
assert_status 1 copy "$before --limit 2" --hook-timeout 1s
grep -q 'ran past --hook-timeout' /run/copy.err || fail "it does not say why"
kill -CONT "$agent"
nothing_left

note "no agent, and no socket"
kill -TERM "$agent"
wait "$agent" || true
for wrong in "$before" '--socket /run/none' ''; do
    assert_status 1 copy "$wrong"
    nothing_left
done
umount /mnt/guest
