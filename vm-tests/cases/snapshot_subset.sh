# Kept snapshots of a subset: what is included is as at the instant, whatever becomes of it and of what is left out; what is
# left out reads as zeros and costs no copy-on-write, unless another snapshot needs it. Through deletions, clones, copies,
# a rollback of files, and a volume that is taken apart.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_subset.sh"

tidemark attach "$(disk 0)" --name data
tidemark attach "$(disk 2)" --name wal
origin=/dev/mapper/data
make_filesystem ext4 "$(disk 1)" /mnt/scratch
mkdir -p /run/sums /mnt/shown

say() { cat /run/out; fail "$*"; }
create() { # NAME OPTION...
    local name=$1
    shift
    SUMS=/run/sums/$name tidemark snapshot create data --name "$name" --store /mnt/scratch --store-size 64MiB --freeze-budget 20s \
        --hook-frozen "sh -e /run/sums.sh" "$@" >/run/out 2>&1 || say "create $name"
}
delete() { tidemark snapshot delete "$@" --yes >/run/out 2>&1 || say "delete $*"; }
used() { # NAME: bytes in use in the snapshot's store
    tidemark snapshot show "data@$1" --json | python3 -c 'import json, sys; print(json.loads(sys.stdin.readline())["report"]["used"])'
}
# lines: how many lines of the volume's table lead past what preserves
lines_past() { dmsetup table data | grep -c " $(dmsetup info -c --noheadings -o major,minor 'data#data' | tr -d ' ') " || true; }

prepare() { # FS
    make_sets "$1"
    head -c 8m /dev/urandom >/mnt/origin/drop/deep/staticbig
    head -c 2m /dev/urandom >/mnt/origin/keep/deep/big
    sync -f /mnt/origin
}

# holds FS DEVICE NAME WHAT: the image holds all that snapshot NAME has to hold, and nothing of what it leaves out.
# WHAT: "subset", or "whole"
holds() {
    local file nonzero=0 size
    # shellcheck disable=SC2046
    mount -t "$1" -o ro$(case "$1" in xfs) echo ,nouuid,norecovery ;; *) echo ,noload ;; esac) "$2" /mnt/shown || fail "mount of $2"
    if [ "$4" = whole ]; then
        (cd /mnt/shown && sha256sum --quiet -c "/run/sums/$3") || fail "$3: a file of the whole snapshot differs on $2"
    else
        grep -v ' ./drop/' "/run/sums/$3" >/run/sums.kept
        [ -s /run/sums.kept ] || fail "nothing was summed, which proves nothing"
        (cd /mnt/shown && sha256sum --quiet -c /run/sums.kept) || fail "$3: an included file differs on $2"
        for file in /mnt/shown/drop/deep/static*; do
            size=$(stat -c %s "$file")
            [ "$size" -gt 0 ] || fail "$file has no size"
            cmp -s -n "$size" "$file" /dev/zero || { nonzero=$((nonzero + 1)); note "$3: not zeros: $file"; }
        done
        [ "$nonzero" = 0 ] || fail "$3: $nonzero files that are left out are shown on $2"
    fi
    umount /mnt/shown
}
shows() { holds "$1" "/dev/mapper/data@$2" "$2" "$3"; } # FS NAME WHAT

# rewrite FILE: in place, 8 MiB at most
rewrite() { dd if=/dev/urandom of="$1" bs=256k count=$(($(stat -c %s "$1") / 262144)) conv=notrunc,fsync oflag=direct status=none; }

# costs FILE NAME: bytes of the store of NAME that rewriting the file costs
costs() {
    local before
    before=$(used "$2")
    rewrite "$1"
    echo $(($(used "$2") - before))
}

for fs in ext4 xfs; do
    export FS=$fs
    note "$fs: the first snapshot, and everything changes between the plan and the freeze"
    prepare "$fs"
    create s1 --exclude /mnt/origin/drop --hook-before "sh -e /run/between.sh"
    grep -q "renamed, linked or replaced" /run/out || say "no word about what changed"
    [ "$fs" != xfs ] || grep -q "share bytes" /run/out || say "no word about shared bytes"
    [ "$(lines_past)" -gt 0 ] || fail "nothing leads past what preserves: $(dmsetup table data)"
    shows "$fs" s1 subset
    tidemark snapshot list data >/run/list
    grep -q 'valid, a subset' /run/list || fail "the list does not say that it is a subset: $(cat /run/list)"
    tidemark snapshot show data@s1 >/run/shown
    grep -q 'left out (--exclude /mnt/origin/drop)' /run/shown || fail "no word of what it leaves out: $(cat /run/shown)"
    tidemark snapshot list data --json | python3 -c '
import json, sys
[view] = json.loads(sys.stdin.readline())["report"]
assert view["subset"]["exclude"] == ["/mnt/origin/drop"] and view["subset"]["left_out_bytes"] > 8 << 20, view'

    note "$fs: what is left out costs no copy-on-write, what is included does"
    out=$(costs /mnt/origin/drop/deep/staticbig s1) in=$(costs /mnt/origin/keep/deep/big s1)
    note "8 MiB left out: $out bytes of the store; 2 MiB included: $in"
    [ "$out" -lt 1048576 ] || fail "what is left out was preserved"
    [ "$in" -ge 2097152 ] || fail "what is included was not preserved, which proves nothing"
    shows "$fs" s1 subset

    note "$fs: a second subset, a whole one and a third subset, beside writers"
    python3 "$REPO/vm-tests/cases/copy_subset.py" /mnt/origin /run/stop >/run/load 2>&1 & load=$!
    create s2 --include /mnt/origin/keep
    out=$(costs /mnt/origin/drop/deep/staticbig s2)
    note "left out of both: $out bytes"
    [ "$out" -lt 4194304 ] || fail "what both leave out was preserved"
    create s3
    assert_same "lines past what preserves, under a whole snapshot" "$(lines_past)" 0
    create s4 --exclude /mnt/origin/drop
    assert_same "lines past, as an older snapshot needs all" "$(lines_past)" 0
    in=$(costs /mnt/origin/drop/deep/staticbig s4)
    [ "$in" -ge 8388608 ] || fail "what an older snapshot needs was not preserved: $in bytes"
    for at in s1 s2 s4; do shows "$fs" $at subset; done
    shows "$fs" s3 whole
    touch /run/stop
    wait "$load" || { cat /run/load; fail "the writers failed"; }
    rm /run/stop

    note "$fs: copies of a subset, and increments from and to it"
    tidemark copy data@s2 /mnt/scratch/s2.raw --yes >/run/out 2>&1 || say "copy of a subset"
    assert_identical /mnt/scratch/s2.raw /dev/mapper/data@s2
    loop=$(losetup -f --show -r /mnt/scratch/s2.raw)
    holds "$fs" "$loop" s2 subset
    losetup -d "$loop"
    tidemark copy data@s2 /mnt/scratch/s2.tdm --yes >/run/out 2>&1 || say "archive of a subset"
    tidemark inspect /mnt/scratch/s2.tdm --json | python3 -c '
import json, sys
assert json.loads(sys.stdin.readline())["report"]["map"]["absent_bytes"] > 8 << 20'
    for at in s3 s4; do
        tidemark copy data@$at /mnt/scratch/$at.tdm --since s2 --yes >/run/out 2>&1 || say "increment of $at"
    done
    tidemark copy data@s4 /mnt/scratch/s4b.tdm --since s3 --yes --parent /mnt/scratch/s3.tdm >/run/out 2>&1 || say "increment of s4"
    for at in s3:s3 s4:s4 s4b:s4; do
        tidemark restore "/mnt/scratch/${at%:*}.tdm" /mnt/scratch/out.raw --yes >/run/out 2>&1 || say "restore of $at"
        assert_identical /mnt/scratch/out.raw "/dev/mapper/data@${at#*:}"
        rm /mnt/scratch/out.raw
    done
    rm /mnt/scratch/*.tdm /mnt/scratch/s2.raw

    note "$fs: a copy of the volume beside its snapshots, and a clone"
    tidemark snapshot clone data@s2 --name c2 --store /mnt/scratch --store-size 64MiB >/run/out 2>&1 || say "clone"
    assert_identical /dev/mapper/data@c2 /dev/mapper/data@s2
    tidemark snapshot mount data@c2 /mnt/shown >/run/out 2>&1 || say "mount of the clone"
    cmp -s -n 100000 /mnt/shown/drop/deep/static3 /dev/zero || fail "the clone shows what its snapshot leaves out"
    head -c 100000 /dev/urandom >/mnt/shown/keep/of-the-clone
    umount /mnt/shown
    cp /run/sums/s2 /run/sums/c2
    shows "$fs" c2 subset

    note "$fs: the middle one that is whole goes, and the volume is taken apart"
    rewrite /mnt/origin/drop/deep/staticbig
    delete data@s3
    for at in s1 s2 s4 c2; do shows "$fs" $at subset; done
    umount /mnt/origin
    tidemark detach data --keep-snapshots >/run/out 2>&1 || say "detach"
    assert_same "devices of the detached volume" "$(dmsetup ls | grep -c '^data' || true)" 0
    tidemark attach "$(disk 0)" --name data >/run/out 2>&1 || say "attach"
    for at in s1 s2 s4 c2; do shows "$fs" $at subset; done
    [ "$(lines_past)" -gt 0 ] || fail "all that are left leave something out, and nothing leads past"
    mount "$origin" /mnt/origin
    out=$(costs /mnt/origin/drop/deep/staticbig s4)
    [ "$out" -lt 1048576 ] || fail "what all leave out was preserved: $out bytes"
    tidemark copy data /mnt/scratch/live.raw --store /mnt/scratch --yes --freeze-budget 20s >/run/out 2>&1 || say "a copy of the volume"
    loop=$(losetup -f --show /mnt/scratch/live.raw)
    filesystem_check "$fs" "$loop"
    losetup -d "$loop"
    rm /mnt/scratch/live.raw
    [ "$(lines_past)" -gt 0 ] || fail "the copy has not put the table back"

    note "$fs: a whole snapshot preserves again what led past, also for writers in full swing"
    (while [ ! -e /run/stop ]; do rewrite /mnt/origin/drop/deep/staticbig; done) & load=$!
    for round in 1 2; do
        create w$round
        assert_same "lines past" "$(lines_past)" 0
        sleep 0.3
        shows "$fs" w$round whole
        delete data@w$round
        create e$round --exclude /mnt/origin/drop
        # Relaxed by the first creation after the whole one has gone.
        [ "$(lines_past)" -gt 0 ] || fail "nothing leads past again"
        shows "$fs" e$round subset
        delete data@e$round
    done
    touch /run/stop
    wait "$load"
    rm /run/stop
    for at in s1 s2 s4 c2; do shows "$fs" $at subset; done

    note "$fs: files go back, if the snapshot holds them"
    sum=$(grep ' ./keep/deep/big$' /run/sums/s4 | cut -d' ' -f1)
    rewrite /mnt/origin/keep/deep/big
    tidemark snapshot rollback data@s4 --only /mnt/origin/keep/deep/big --yes >/run/out 2>&1 || say "rollback --only"
    assert_same "the file" "$(sha256sum /mnt/origin/keep/deep/big | cut -d' ' -f1)" "$sum"
    tidemark snapshot rollback data@s4 --only /mnt/origin/keep --yes >/run/out 2>&1 || say "rollback --only of a directory"
    refused 3 "drop/deep/static1 is left out of data@s4" tidemark snapshot rollback data@s4 --only /mnt/origin/drop/deep/static1 --yes
    refused 3 "is left out of data@s4" tidemark snapshot rollback data@s4 --only /mnt/origin/keep --only /mnt/origin/drop --yes
    umount /mnt/origin
    refused 3 "is a snapshot of a subset" tidemark snapshot rollback data@s4 --yes
    refused 3 "is a snapshot of a subset" tidemark snapshot rollback data@s4 --at-attach --yes
    for at in s1 s2 s4 c2; do shows "$fs" $at subset; done

    note "$fs: deletions from the middle"
    delete data@c2 data@s2
    for at in s1 s4; do shows "$fs" $at subset; done
    delete data@s4
    shows "$fs" s1 subset
    delete data@s1
    assert_same "the volume's table afterwards" "$(dmsetup table data | cut -d' ' -f3)" linear
    assert_same "devices left" "$(dmsetup ls | grep -c '^data[@#]' || true)" 0
done

note "ranges of a volume that is not mounted"
dd if=/dev/urandom of="$origin" bs=1M count=64 conv=fsync status=none
dd if="$origin" of=/mnt/scratch/before bs=1M iflag=direct status=none
FS=none
echo true >/run/sums.sh
create r1 --include bytes:8MiB+8MiB --exclude bytes:9MiB+4097
create r2 --exclude bytes:0+4MiB
dd if=/dev/urandom of="$origin" bs=1M count=64 conv=fsync status=none
python3 - /mnt/scratch/before "$(blockdev --getsize64 "$origin")" <<'PYTHON'
import sys
before, size = open(sys.argv[1], "rb").read(), int(sys.argv[2])
MIB = 1 << 20
only = bytearray(size)
only[8 * MIB : 16 * MIB] = before[8 * MIB : 16 * MIB]
only[9 * MIB : 9 * MIB + 4096] = bytes(4096)  # a chunk that is left out in part is held
rest = bytearray(before)
rest[: 4 * MIB] = bytes(4 * MIB)
for name, wanted in [("r1", only), ("r2", rest)]:
    found = open(f"/dev/mapper/data@{name}", "rb").read()
    assert found == wanted, name
PYTHON
refused 3 "is left out of data@r1" tidemark snapshot rollback data@r1 --only bytes:15MiB+2MiB --yes
tidemark snapshot rollback data@r1 --only bytes:12MiB+4MiB --yes >/run/out 2>&1 || say "bytes of a subset"
cmp -i 12582912 -n 4194304 "$origin" /mnt/scratch/before || fail "the range differs"
create all --exclude bytes:0+128MiB
cmp -n 134217728 /dev/mapper/data@all /dev/zero || fail "everything was left out, and something is shown"
delete data@r1 data@r2
dd if=/dev/urandom of="$origin" bs=1M count=1 conv=fsync status=none
tidemark snapshot list data | grep -q 'data@all *valid, a subset' || fail "the last one is lost: $(tidemark snapshot list data)"
delete data@all

note "several volumes, and what is refused"
mkfs.ext4 -q -F -b 4096 "$origin"; mkfs.ext4 -q -F -b 4096 /dev/mapper/wal
mkdir -p /mnt/wal
mount "$origin" /mnt/origin; mount /dev/mapper/wal /mnt/wal
for at in origin wal; do head -c 1m /dev/urandom >/mnt/$at/keep; head -c 1m /dev/urandom >/mnt/$at/drop.tmp; done
sync
group=(tidemark snapshot create data wal --name g --store /mnt/scratch --store-size 16MiB --freeze-budget 20s)
refused 2 "several volumes" "${group[@]}" --exclude bytes:0+4096
refused 3 "the snapshot of wal" "${group[@]}" --include /mnt/origin/keep
refused 3 "not on the origin" "${group[@]}" --exclude /mnt/scratch
"${group[@]}" --exclude /mnt/origin/drop.tmp >/run/out 2>&1 || say "a group"
tidemark snapshot list data | grep -q 'valid, a subset' || fail "the group's first member is no subset"
tidemark snapshot list wal | grep -q 'subset' && fail "nothing of wal was left out"
cp /mnt/origin/keep /run/keep; cp /mnt/wal/drop.tmp /run/waldrop
head -c 1m /dev/urandom >/mnt/origin/drop.tmp; head -c 1m /dev/urandom >/mnt/wal/drop.tmp; sync
for at in data:keep:/run/keep wal:drop.tmp:/run/waldrop data:drop.tmp:/dev/zero; do
    IFS=: read -r volume file wanted <<<"$at"
    tidemark snapshot mount "$volume@g" /mnt/shown >/run/out 2>&1 || say "mount"
    cmp -n 1048576 "/mnt/shown/$file" "$wanted" || fail "$volume@g: $file"
    umount /mnt/shown
done
delete data@g; delete wal@g
"${group[@]}" --exclude '*.tmp' >/run/out 2>&1 || say "a group by a name"
tidemark snapshot list wal | grep -q 'valid, a subset' || fail "nothing of wal was left out"
delete data@g; delete wal@g
refused 3 "cannot be examined" tidemark snapshot create data --exclude /mnt/origin/none --store /mnt/scratch
refused 3 "no file of the origin is" tidemark snapshot create data --include '*.none' --store /mnt/scratch
refused 2 "not on the origin" tidemark snapshot create data --exclude bytes:1MiB+1TiB --store /mnt/scratch
umount /mnt/origin /mnt/wal
refused 3 "no filesystem of the origin is mounted" tidemark snapshot create data --exclude /mnt/origin/x --store /mnt/scratch
tidemark detach data; tidemark detach wal
assert_no_tidemark_left
