# Safety promises 2, 3, 4 and 6: SIGKILL before, during and at the end of a copy. The load continues, recover puts
# everything back, no file has the final name, no partial file is left, and a new copy succeeds. The same holds for a
# copy killed before it touches the origin, for a copy of an origin at rest, and for a restore.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_load.sh"

tidemark attach "$(disk 0)" --name data
origin=/dev/mapper/data
make_filesystem ext4 "$origin" /mnt/origin
make_filesystem ext4 "$(disk 1)" /mnt/scratch
table_before=$(dmsetup table "$origin")
start_load /mnt/origin "$SEED"

options=(--yes --store /mnt/scratch --store-ram 4MiB --freeze-budget 2s)

# Lists partial files.
hidden() { find /mnt/scratch -name '.*tidemark-partial*'; }
is_at_work() { [ -n "$(hidden)" ]; }
assert_nothing_hidden() { [ -z "$(hidden)" ] || fail "$1: partial files are left: $(hidden)"; }

# put_back WHAT: recovers, and checks that everything is as before the copy.
put_back() {
    timeout 30 dd if=/dev/zero of=/mnt/origin/probe bs=4k count=1 conv=fsync status=none ||
        fail "$1: the origin does not answer"
    load_is_alive
    tidemark recover || fail "$1: recover failed"
    [ "$(dmsetup table "$origin")" = "$table_before" ] || fail "$1: the table has changed: $(dmsetup table "$origin")"
    [ ! -e /mnt/scratch/copy.raw ] || fail "$1: a partial copy has the final name"
    assert_nothing_hidden "$1"
    assert_no_tidemark_left data
    load_is_alive
}

for point in copy.store.before copy.store.after copy.data.before copy.data.after copy.release.before copy.release.after; do
    status=0
    TIDEMARK_CRASH_AT=$point tidemark copy "$origin" /mnt/scratch/copy.raw "${options[@]}" 2>/run/err || status=$?
    assert_same "exit status at $point" "$status" 137
    case "$point" in
        # At these points the copy is already complete.
        copy.data.after | copy.release.*) mv /mnt/scratch/copy.raw /run/complete.raw && rm /run/complete.raw ;;
    esac
    put_back "$point"
done

for round in 1 2 3 4 5; do
    tidemark copy "$origin" /mnt/scratch/copy.raw "${options[@]}" --rate 4MiB 2>/run/err &
    copy=$!
    wait_until 60 is_preserved "$origin"
    sleep "0.$(rand "moment-$round" 0 9)"
    sleep "$(rand "second-$round" 0 3)"
    kill -KILL "$copy"
    wait "$copy" || true
    note "round $round: killed while copying"
    put_back "round $round"
done

# Kills a background process as soon as its partial file exists, then checks what is left.
kill_at_work() { # NAME PROCESS COMMAND
    wait_until 60 is_at_work
    sleep "0.$(rand "$1" 1 5)"
    tidemark status --json >/run/status
    kill -KILL "$2"
    wait "$2" || true
    is_at_work || fail "$1: it ended before it could be killed"
    grep -q "\"command\":\"$3\"" /run/status || fail "$1: status does not show the job: $(cat /run/status)"
    put_back "$1"
}

tidemark copy "$origin" /mnt/scratch/copy.raw "${options[@]}" --hook-before 'exec sleep 61.5' 2>/run/err &
kill_at_work "before the origin is touched" $! copy
pkill -f 'sleep 61.5' || true
dd if=/dev/urandom of=/mnt/scratch/rest bs=1M count=24 status=none
tidemark copy /mnt/scratch/rest /mnt/scratch/copy.raw --rate 2MiB 2>/run/err &
kill_at_work "an origin at rest" $! copy
tidemark copy /mnt/scratch/rest /mnt/scratch/rest.tdm
assert_no_tidemark_left data
mkfifo /run/slow
# The feeder sends the first third and then stalls.
(head -c 8M /mnt/scratch/rest.tdm && exec sleep 60) >/run/slow &
feeder=$!
tidemark restore - /mnt/scratch/copy.raw </run/slow 2>/run/err &
kill_at_work "a restore" $! restore
kill "$feeder" || true

# A copy that fails by itself leaves nothing either.
assert_status 1 tidemark copy /mnt/scratch/rest /mnt/scratch/copy.raw --hook-before false
assert_status 1 tidemark copy "$origin" /mnt/scratch/copy.raw "${options[@]}" --hook-before false
assert_status 1 tidemark copy "$origin" /mnt/scratch/copy.raw "${options[@]}" --hook-frozen false
# --hook-after ends what was begun.
for failing in before frozen; do
    rm -f /run/ended
    assert_status 1 tidemark copy "$origin" /mnt/scratch/copy.raw "${options[@]}" "--hook-$failing" false \
        --hook-after 'echo ended >>/run/ended'
    assert_same "--hook-after, once" "$(cat /run/ended)" ended
done
head -c 8M /mnt/scratch/rest.tdm >/mnt/scratch/cut.tdm
assert_status 4 tidemark restore /mnt/scratch/cut.tdm /mnt/scratch/copy.raw
assert_nothing_hidden "what has failed"
assert_no_tidemark_left data

tidemark copy "$origin" /mnt/scratch/copy.raw --all --yes --store /mnt/scratch --freeze-budget 120s \
    --hook-frozen "$(capture_hook /mnt/scratch/instant)"
assert_identical /mnt/scratch/copy.raw /mnt/scratch/instant
stop_load
umount /mnt/origin
filesystem_check ext4 "$origin"
assert_no_tidemark_left data
