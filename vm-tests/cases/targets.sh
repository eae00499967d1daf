# Safety promise 8, for targets: a target in use is refused, whatever uses it and under any name; --dry-run says what
# the run would say; a name means the same for a target as for an origin; of two jobs with one target, the loser is told
# which job has it.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_load.sh"

origin_disk=$(disk 0)
scratch_disk=$(disk 1)
target=$(disk 2)
small=$(disk 3)
make_filesystem ext4 "$scratch_disk" /mnt/s
cd /mnt/s || exit
fill small.img $((8 << 20)) small
tidemark copy small.img d.tdm --quiet
stranger=0123456789abcdef
before=$(digest "$target")

# refused PATTERN ARGUMENTS...: the run and its --dry-run exit with 3 and the reason, and create nothing.
refused() {
    local pattern=$1 got how files
    shift
    files=$(find /mnt/s -maxdepth 1 | sort)
    for how in '' --dry-run; do
        got=0
        # shellcheck disable=SC2086
        tidemark "$@" --yes $how >/run/refused.out 2>/run/refused.err || got=$?
        cat /run/refused.err
        [ "$got" = 3 ] || fail "exit code $got, expected 3: $* $how"
        grep -qiE "$pattern" /run/refused.err || fail "the refusal does not match '$pattern': $* $how"
        grep -q 'next:' /run/refused.err || fail "the refusal does not say what to do instead: $*"
    done
    assert_same "the files, after $*" "$(find /mnt/s -maxdepth 1 | sort)" "$files"
}
# Both commands that overwrite a target refuse it.
both_refused() { # PATTERN TARGET
    refused "$1" restore d.tdm "$2"
    refused "$1" copy small.img "$2" --format raw
}

note "a device that a process holds open for writing, through another node"
mknod /run/node b "$(stat -L -c '%Hr' "$target")" "$(stat -L -c '%Lr' "$target")"
sleep 1000 8<>/run/node &
both_refused "open for writing by sleep .process $!" "$target"
kill $!
assert_same "the device" "$(digest "$target")" "$before"

note "a device beneath a loop device"
losetup /dev/loop5 "$target"
both_refused 'loop5' "$target"
losetup -d /dev/loop5

note "the backing file of a mounted loop device, under all of its names; another loop device on it"
truncate -s 24M vm.img
mkfs.ext4 -q -F vm.img
ln vm.img other-name.img
losetup /dev/loop5 vm.img
mkdir -p /mnt/vm
mount /dev/loop5 /mnt/vm
echo "$stranger" >/mnt/vm/file
both_refused 'loop5' vm.img
both_refused 'loop5' other-name.img
losetup /dev/loop6 vm.img
both_refused 'loop5' /dev/loop6
losetup /dev/loop4 /dev/loop5
both_refused 'mounted' /dev/loop4
losetup -d /dev/loop4
losetup -d /dev/loop6
# Now the path in sysfs leads to another file.
mv vm.img moved.img
cp small.img vm.img
both_refused 'loop5' moved.img
mv moved.img vm.img
umount /mnt/vm
losetup -d /dev/loop5

note "a file that a process has open for writing or mapped; an active swap file"
cp small.img open.img
sleep 1000 8<>open.img &
both_refused "open for writing by sleep .process $!" open.img
kill $!
python3 -c '
import mmap, os, time
f = os.open("open.img", os.O_RDWR); m = mmap.mmap(f, 4096); os.close(f); open("/run/mapped", "w").close(); time.sleep(1000)' &
wait_until 20 test -e /run/mapped
both_refused 'open for writing' open.img
kill $!
dd if=/dev/zero of=swapfile bs=1M count=8 status=none
chmod 600 swapfile
mkswap -q swapfile
if swapon swapfile; then
    both_refused 'swap' swapfile
    swapoff swapfile
fi

note "the file of a read-only loop device is replaced; a file that becomes used during the copy is not"
losetup --read-only /dev/loop5 vm.img
mount -o ro /dev/loop5 /mnt/vm
tidemark copy small.img vm.img --format raw --yes
assert_same "what the loop device shows" "$(cat /mnt/vm/file)" "$stranger"
umount /mnt/vm
losetup -d /dev/loop5
cmp small.img vm.img
is_begun() { compgen -G "/mnt/s/.$1.tidemark-partial.*" >/dev/null; }
# kept CONTENT TARGET COMMAND...: a loop device is put on TARGET while COMMAND runs; TARGET is refused, the copy is
# kept.
kept() {
    local content=$1 target=$2 got=0 complete process
    shift 2
    before=$(digest "$target")
    "$@" >/run/kept.out 2>/run/kept.err &
    process=$!
    wait_until 20 is_begun "$target"
    losetup /dev/loop5 "$target"
    wait "$process" || got=$?
    cat /run/kept.err
    [ "$got" = 3 ] || fail "exit code $got, expected 3: $*"
    assert_same "$target" "$(digest "$target")" "$before"
    complete=$(compgen -G "/mnt/s/$target.tidemark-complete.*") || fail "the copy is lost"
    grep -q "next:.*mv .*$complete" /run/kept.err || fail "no message says what to do with the copy"
    cmp "$content" "$complete"
    rm "$complete"
    losetup -d /dev/loop5
}
kept small.img vm.img tidemark copy small.img vm.img --format raw --yes --rate 4MiB
tidemark attach "$origin_disk" --name data
dd if=small.img of=/dev/mapper/data bs=1M oflag=direct status=none
dd if=/dev/mapper/data of=live.img bs=1M status=none
kept live.img vm.img tidemark copy data vm.img --format raw --yes --store /mnt/s --rate 20MiB
rm live.img
assert_no_tidemark_left data
tidemark detach data

note "the origin's own backing file, and a store's device that is open for writing"
truncate -s 32M backing.img
losetup /dev/loop5 backing.img
dmsetup create spare --table "0 65536 linear /dev/loop5 0"
dmsetup mknodes
refused 'loop5' copy /dev/mapper/spare backing.img --store "$small"
sleep 1000 8<>"$small" &
refused 'sleep' copy /dev/mapper/spare x.raw --store "$small"
kill $!

note "names: a plain word names the same device as for an origin"
refused 'identical|itself|origin' copy spare spare
tidemark restore d.tdm spare --yes
[ ! -e spare ] || fail "a file was created instead of writing the volume"
assert_same "the volume" "$(head -c 8388608 /dev/mapper/spare | sha256sum)" "$(sha256sum <small.img)"
tidemark verify d.tdm --against spare
tidemark copy small.img spare --format raw --yes
echo precious >spare
refused 'both' restore d.tdm spare
refused 'both' copy small.img spare
rm spare
dmsetup remove spare
losetup -d /dev/loop5
tidemark attach "$small" --name away
tidemark detach away
assert_same "files" "$(find . -name away)" ""

note "--dry-run refuses the same as the run, and says what will be lost"
make_filesystem ext4 "$target" /mnt/t
both_refused 'mounted' "$target"
umount /mnt/t
blockdev --setro "$target"
both_refused 'read-only' "$target"
blockdev --setrw "$target"
fill big.img $((40 << 20)) big
tidemark copy big.img big.tdm --quiet
refused 'too small' copy big.img "$target"
refused 'too small' restore big.tdm "$target"
refused 'archive itself' restore d.tdm d.tdm
refused 'directory' restore d.tdm nowhere/x
refused 'regular file' restore d.tdm /mnt/s
cp small.img there.img
tidemark restore d.tdm there.img --dry-run >/run/plan
grep -q 'overwrites.*there.img will be replaced' /run/plan || fail "$(cat /run/plan)"
tidemark copy small.img "$target" --dry-run >/run/plan
grep -q "everything on the device $target will be overwritten" /run/plan || fail "$(cat /run/plan)"
mkdir -p /mnt/full
mount -t tmpfs -o size=4m none /mnt/full
tidemark restore d.tdm /mnt/full/x.img --dry-run >/run/plan
grep -q 'warning.*of free space' /run/plan || fail "$(cat /run/plan)"
mount -o remount,ro /mnt/full
refused 'Read-only' restore d.tdm /mnt/full/x.img
umount /mnt/full

note "two copies to one file, to one device, or of one origin"
loser() { # PATTERN COMMAND...
    local pattern=$1 got=0
    shift
    "$@" >/run/loser.out 2>/run/loser.err || got=$?
    cat /run/loser.err
    [ "$got" = 3 ] || fail "exit code $got, expected 3: $*"
    grep -qE "$pattern" /run/loser.err || fail "the refusal does not name the other job: $*"
}
find_partial() { compgen -G '/mnt/s/.one.raw.tidemark-partial.*' >/dev/null; }
has_job() { grep -qs "\"process\": *$1" /run/tidemark/*.json; }
tidemark copy big.img one.raw --rate 20MiB --quiet --yes &
first=$!
wait_until 20 find_partial
loser "job [0-9a-f]{8,} .process $first" tidemark copy small.img one.raw --yes
loser "job [0-9a-f]{8,} .process $first" tidemark restore d.tdm one.raw --yes
loser "job [0-9a-f]{8,} .process $first" tidemark restore d.tdm one.raw --yes --dry-run
wait "$first" || fail "the first failed: $?"
cmp one.raw big.img
tidemark copy small.img "$target" --rate 4MiB --yes --quiet &
first=$!
wait_until 20 has_job "$first"
loser "job [0-9a-f]{8,} .process $first" tidemark restore d.tdm "$target" --yes
loser "job [0-9a-f]{8,} .process $first" tidemark restore d.tdm "$target" --yes --dry-run
wait "$first" || fail "the first failed: $?"
cmp -n $((8 << 20)) small.img "$target"

tidemark attach "$origin_disk" --name data
for turn in 1 2 3; do
    for n in 1 2 3; do
        tidemark copy data "twin$n.raw" --yes --quiet --store /mnt/s 2>"/run/twin$n.err" &
        twin[n]=$!
        sleep "0.0$((RANDOM % 9))"
    done
    ended=
    for n in 1 2 3; do
        status=0
        wait "${twin[n]}" || status=$?
        ended+=" $status"
        if [ "$status" != 0 ]; then
            [ "$status" = 3 ] || fail "turn $turn: a loser ended with $status: $(cat "/run/twin$n.err")"
            grep -qE 'is being copied' "/run/twin$n.err" || fail "turn $turn: $(cat "/run/twin$n.err")"
        fi
    done
    note "turn $turn:$ended"
    grep -q ' 0' <<<"$ended" || fail "turn $turn: no copy won: $ended"
    assert_no_tidemark_left data
done
tidemark detach data
cd / || exit
umount /mnt/s
assert_no_tidemark_left
