# Safety promise 9: a killed copy continues where it stopped, at the same instant, with the result of an uninterrupted
# copy. SIGKILL at random moments, up to three times per copy. A copy that cannot continue is refused, with the reason.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_load.sh"

tidemark attach "$(disk 0)" --name data
origin=/dev/mapper/data
raw_disk=$(disk 1)
make_filesystem ext4 "$origin" /mnt/origin
make_filesystem ext4 "$(disk 2)" /mnt/scratch
table_before=$(dmsetup table "$origin")
size=$(blockdev --getsize64 "$origin")
start_load /mnt/origin "$SEED"

pace=$(if [ "$MACHINE" = um ]; then echo 2; else echo 1; fi)

is_resumable() { tidemark status --json | grep -q '"copy"' && [ -n "$(find /run/tidemark -name '*.segments')" ]; }

# One copy with random options, killed and resumed until it is done.
one_copy() { # ROUND
    local round=$1 kind kills=0 moment_max moment target rate whole
    kind=$(pick "kind-$round" raw-device raw-file overlay append)
    # At native speed the load writes as much in half of the time.
    rate=$(($(pick "rate-$round" 4 8 16) * pace))
    # Minimum time in ms to copy the 36 MiB in use at that rate.
    whole=$((36000 / rate))
    local -a options=(--yes --store /mnt/scratch --store-ram "$(pick "ram-$round" 0 1MiB 16MiB)" --freeze-budget 120s
        --rate "${rate}MiB" --segment "$(pick "segment-$round" 64KiB 256KiB 1MiB)"
        --region "$(pick "region-$round" 1MiB 4MiB)"
        --order "$(pick "order-$round" physical hot)" --hook-frozen "$(capture_hook /mnt/scratch/instant)")
    [ "$(pick "verify-$round" 0 1)" = 0 ] || options+=(--verify)
    case "$kind" in
        raw-device) target=$raw_disk ;;
        raw-file) target=/mnt/scratch/copy.raw ;;
        *) target=/mnt/scratch/copy.tdm && options+=(--originals "$kind") ;;
    esac
    rm -f /mnt/scratch/instant /mnt/scratch/copy.*
    note "round $round: $kind ${options[*]}"
    tidemark copy "$origin" "$target" "${options[@]}" --json >/run/copy.json 2>&1 &
    local process=$!
    wait_until 120 is_resumable
    while :; do
        # The first kill comes early, so that a copy is killed more than once; later kills also hit the phase that
        # applies the originals. The bound follows from the rate: a first kill after the end of the copy proves nothing.
        moment_max=$((whole / 2))
        [ "$kills" = 0 ] || moment_max=$(pick "late-$round-$kills" $((whole / 8)) $((whole / 8)) "$whole")
        moment=$(rand "moment-$round-$kills" 0 "$moment_max")
        sleep "$((moment / 1000)).$(printf '%03d' $((moment % 1000)))"
        if [ "$kills" = 3 ] || ! kill -KILL "$process" 2>/dev/null; then
            break
        fi
        local status=0
        wait "$process" || status=$?
        [ "$status" = 137 ] || break
        kills=$((kills + 1))
        load_is_alive
        if [ -f "$target" ] || { [ "$kind" = raw-device ] && [ "$(dmsetup table "$origin")" = "$table_before" ]; }; then
            # The file has its final name, or the origin its own table: the copy was complete and was killed during its
            # cleanup. The comparison below confirms this.
            note "round $round: killed after its end"
            tidemark recover
            process=
            break
        fi
        tidemark status --json >/run/status.json
        tidemark resume --json >/run/copy.json 2>&1 &
        process=$!
        # Kill again only when the resumed process has taken the job over.
        wait_until 60 sh -c "grep -q '\"phase\":\"data\"' /run/copy.json || ! kill -0 $process"
    done
    status=0
    [ -z "$process" ] || wait "$process" || status=$?
    [ "$status" = 0 ] || { tail -n 5 /run/copy.json; fail "round $round: exit status $status"; }
    note "round $round: killed $kills times; $(grep -o '"resumed_segment_count":[0-9]*' /run/copy.json || echo 'complete when killed')"
    echo "$kills" >>/run/kills
    pause_load
    case "$target" in
        *.tdm)
            tidemark verify "$target"
            tidemark restore "$target" /mnt/scratch/copy.raw --yes
            target=/mnt/scratch/copy.raw
            ;;
    esac
    python3 "$REPO/vm-tests/guest/same_in_use.py" ext4 /mnt/scratch/instant "$target" || fail "round $round: $kind"
    [ "$(dmsetup table "$origin")" = "$table_before" ] || fail "the origin's table changed"
    assert_no_tidemark_left data
    [ -z "$(find /mnt/scratch -name '*tidemark-partial*')" ] || fail "a partial file is left"
    go_on_load
    load_is_alive
}

for round in $(seq 10 | some_under_emulation rounds 1); do
    one_copy "$round"
done
# On average once per round, because few rounds scatter more than many.
rounds=$(wc -l </run/kills)
[ "$(awk '{ n += $1 } END { print n }' /run/kills)" -ge "$rounds" ] || fail "too few copies were killed: this proves nothing"

# Copies that cannot be resumed.
refused() { # WORDS ARGUMENTS...
    local words=$1
    shift
    assert_status 3 tidemark resume "$@" 2>/run/err
    grep -q "$words" /run/err || { cat /run/err; fail "resume does not say '$words'"; }
}
refused 'no copy to resume'
slow=(--yes --store /mnt/scratch --store-ram 1MiB --rate 2MiB)

# A separate file: the load verifies what it wrote to fio.dat, so nothing else may write there.
dd if=/dev/urandom of=/mnt/origin/after.dat bs=1M count=4 conv=fsync status=none
tidemark copy "$origin" /mnt/scratch/copy.raw "${slow[@]}" 2>/dev/null &
process=$!
wait_until 120 is_resumable
job=$(basename "$(find /run/tidemark -name '*.segments')" .segments)
refused 'is running' "$job"
kill -KILL "$process"
wait "$process" || true
# The snapshot is lost while no copy runs: the store's device fails.
cow=$(dmsetup ls | awk '/#cow/ { print $1 }')
dmsetup load "$cow" --table "0 $(blockdev --getsz "/dev/mapper/$cow" 2>/dev/null || dmsetup table "$cow" | awk '{ n += $2 } END { print n }') error"
dmsetup resume "$cow"
fio --name=after --directory=/mnt/origin --filename=after.dat --size=4m --rw=randwrite --bs=4k --direct=1 --io_size=2m \
    --minimal >/dev/null || fail "the application saw the store's loss"
refused 'lost' "$job"
[ -n "$(find /mnt/scratch -name '*tidemark-partial*')" ] || fail "a refused resume removed the partial file"
tidemark recover
[ -z "$(find /mnt/scratch -name '*tidemark-partial*')" ] || fail "recover left the partial file"
refused 'no copy to resume'
assert_no_tidemark_left data

# The reader of the pipe is gone.
tidemark copy "$origin" - "${slow[@]}" 2>/dev/null >/dev/null &
process=$!
wait_until 120 is_preserved "$origin"
sleep 1
kill -KILL "$process"
wait "$process" || true
job=$(basename "$(find /run/tidemark -maxdepth 1 -name '*.lock')" .lock)
refused 'pipe' "$job"
tidemark recover
assert_no_tidemark_left data

stop_load
umount /mnt/origin
filesystem_check ext4 "$origin"
[ "$size" = "$(blockdev --getsize64 "$origin")" ]
