# A copy of a subset: included files are as at the instant, whatever happens to them and to those that are left out, also
# between the plan and the freeze. What is left out is absent, and costs no copy-on-write. The copy is a sound filesystem.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_subset.sh"

tidemark attach "$(disk 0)" --name data
origin=/dev/mapper/data
make_filesystem ext4 "$(disk 1)" /mnt/scratch
copy=(tidemark copy "$origin" /mnt/scratch/copy.raw --yes --store /mnt/scratch --freeze-budget 20s)

# Those of the included files.
export SUMS=/run/sums.instant PRUNE=drop

defragment() { # FS
    case "$1" in
        ext4) e4defrag /mnt/origin >/dev/null 2>&1 || true ;;
        xfs) find /mnt/origin -type f -exec xfs_fsr {} + >/dev/null 2>&1 || true ;;
    esac
}

prepare() { # FS
    make_sets "$1"
    head -c 300000 /dev/urandom >/mnt/origin/root-file
    head -c 200000 /dev/urandom >/mnt/origin/drop/linked-before
    ln /mnt/origin/drop/linked-before /mnt/origin/keep/linked-before
    head -c 100000 /dev/urandom >/mnt/origin/drop/swap-with-dir
    mkdir /mnt/origin/drop/directory
    head -c 200000 /dev/urandom >/mnt/origin/drop/directory/moved
    sync -f /mnt/origin
}

check_copy() { # FS: the copy at /mnt/scratch/copy.raw
    local loop
    loop=$(losetup -f --show /mnt/scratch/copy.raw)
    filesystem_check "$1" "$loop"
    mkdir -p /run/copy
    # shellcheck disable=SC2046
    mount -t "$1" -o ro$([ "$1" != xfs ] || echo ,nouuid) "$loop" /run/copy
    (cd /run/copy && sha256sum --quiet -c /run/sums.instant) || fail "an included file differs"
    local file nonzero=0
    for file in /run/copy/drop/deep/static*; do
        [ -s "$file" ] || fail "$file has no size"
        cmp -s -n "$(stat -c %s "$file")" "$file" /dev/zero || { nonzero=$((nonzero + 1)); note "not left out: $file"; }
    done
    [ "$nonzero" = 0 ] || { cat /run/out; fail "$nonzero files are in the copy"; }
    umount /run/copy
    losetup -d "$loop"
    rm -f /mnt/scratch/copy.raw
}

for fs in ext4 xfs; do
    export FS=$fs
    note "$fs: exclude a directory, and change everything between the plan and the freeze"
    prepare "$fs"
    "${copy[@]}" --exclude /mnt/origin/drop --hook-before "sh -e /run/between.sh" --hook-frozen "sh -e /run/sums.sh" \
        >/run/out 2>&1 || { cat /run/out; fail "the copy failed"; }
    grep -q "renamed, linked or replaced" /run/out || { cat /run/out; fail "no word about what changed"; }
    [ "$fs" != xfs ] || grep -q "share bytes" /run/out || { cat /run/out; fail "no word about shared bytes"; }
    check_copy "$fs"

    note "$fs: include, beside writers and a defragmentation"
    python3 "$REPO/vm-tests/cases/copy_subset.py" /mnt/origin /run/stop & load=$!
    defragment "$fs" & defragmentation=$!
    for form in "" "--all"; do
        # shellcheck disable=SC2086
        "${copy[@]}" $form --include /mnt/origin/keep --include '/mnt/origin/root-*' --hook-frozen "sh -e /run/sums.sh" \
            >/run/out 2>&1 || { cat /run/out; fail "the copy failed"; }
        check_copy "$fs"
    done
    wait "$defragmentation"
    defragment "$fs" & defragmentation=$!
    tidemark copy "$origin" /mnt/scratch/copy.tdm --yes --store /mnt/scratch --freeze-budget 20s --exclude /mnt/origin/drop \
        --hook-frozen "sh -e /run/sums.sh" >/run/out 2>&1 || { cat /run/out; fail "the copy failed"; }
    touch /run/stop
    wait "$load" || fail "the writers failed"
    rm /run/stop
    wait "$defragmentation"
    tidemark restore /mnt/scratch/copy.tdm /mnt/scratch/copy.raw --yes >/run/out 2>&1 || { cat /run/out; fail "the restore failed"; }
    check_copy "$fs"
    rm /mnt/scratch/copy.tdm

    note "$fs: what is left out costs no copy-on-write"
    fallocate -l 16m /mnt/origin/drop/big
    dd if=/dev/urandom of=/mnt/origin/drop/big bs=1M count=16 conv=notrunc,fsync status=none
    for option in --verify --exclude=/mnt/origin/drop --exclude=big --include=/mnt/origin/keep; do
        "${copy[@]}" "$option" --rate 4MiB --impact none --region 4MiB --order physical --json \
            --hook-after "dd if=/dev/urandom of=/mnt/origin/drop/big bs=1M count=16 conv=notrunc,fsync oflag=direct status=none" \
            >/run/copy.json 2>/run/out || { cat /run/out; fail "the copy failed"; }
        preserved=$(grep -o '"originals_count": *[0-9]*' /run/copy.json | tr -dc 0-9)
        note "$option: $preserved originals"
        case "$option" in
            --verify) [ "$preserved" -gt 1000 ] || fail "nothing was preserved, which proves nothing" ;;
            *) [ "$preserved" -lt 200 ] || fail "what is left out was preserved" ;;
        esac
        rm /mnt/scratch/copy.raw
    done
    umount /mnt/origin
done

note "ranges"
head -c 1m /dev/urandom >/mnt/scratch/cold
tidemark copy /mnt/scratch/cold /mnt/scratch/part --include bytes:64KiB+128KiB --exclude bytes:96KiB+4096 >/run/out 2>&1 ||
    { cat /run/out; fail "the copy of ranges failed"; }
head -c 1m /dev/zero >/mnt/scratch/expected
take() { dd if=/mnt/scratch/cold of=/mnt/scratch/expected bs=4k skip="$1" seek="$1" count="$2" conv=notrunc status=none; }
take 16 8
take 25 23
assert_identical /mnt/scratch/expected /mnt/scratch/part
rm /mnt/scratch/part
dd if=/dev/urandom of="$origin" bs=1M count=4 conv=fsync status=none
tidemark copy "$origin" /mnt/scratch/part --store /mnt/scratch --include bytes:1MiB+1MiB >/run/out 2>&1 || { cat /run/out; fail "ranges"; }
cmp -n 1048576 -i 1048576 "$origin" /mnt/scratch/part || fail "the range differs"
cmp -n 1048576 /mnt/scratch/part /dev/zero || fail "bytes outside of the range were copied"

note "refusals"
mkdir -p /mnt/origin
mkfs.ext4 -q -F "$origin"
mount "$origin" /mnt/origin
touch /mnt/origin/file
refused() { # STATUS WORDS OPTION...
    local status=$1 words=$2
    shift 2
    assert_status "$status" "${copy[@]}" "$@" >/run/out 2>&1 || { cat /run/out; fail "not refused: $*"; }
    grep -q -- "$words" /run/out || { cat /run/out; fail "no word of '$words': $*"; }
}
refused 3 "cannot be examined" --exclude /mnt/origin/none
refused 3 "not on the origin" --include /mnt/scratch/cold
refused 3 "no file of the origin is" --include '*.none'
refused 2 "neither an absolute path nor a file name" --exclude ./file
refused 2 "not a range" --exclude bytes:12
refused 2 "not on the origin" --exclude bytes:1MiB+1TiB
mount -o remount,ro "$origin" /mnt/origin
refused 3 "read-only" --exclude /mnt/origin/file
umount /mnt/origin
refused 3 "no filesystem of the origin is mounted" --exclude /mnt/origin/file
tidemark detach data
assert_no_tidemark_left
