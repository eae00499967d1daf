# `snapshot rollback --only`: files and directories of a mounted volume go back, the rest goes on, other snapshots stay
# right, and a command that is killed leaves the former or the new one.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_load.sh"

tidemark attach "$(disk 0)" --name data
origin=/dev/mapper/data
make_filesystem ext4 "$(disk 1)" /mnt/scratch
store=(--store /mnt/scratch --store-size 64MiB)

state_of() { python3 "$REPO/vm-tests/cases/snapshot_only.py" "$1"; }

# is_as_before: shows what differs
is_as_before() {
    state_of /mnt/origin/a >/run/now
    diff /run/before /run/now
}

prepare() {
    mkdir -p /mnt/origin/{a/deep/er,other}
    local at
    for at in $(seq 20); do head -c $((at * 3000)) /dev/urandom >"/mnt/origin/a/deep/f$at"; done
    head -c 3000000 /dev/urandom >/mnt/origin/a/large
    truncate -s 5m /mnt/origin/a/sparse
    ln /mnt/origin/a/deep/f1 /mnt/origin/a/deep/er/f1
    ln -s /mnt/origin/other/x /mnt/origin/a/deep/absolute
    ln -s nowhere /mnt/origin/a/link
    mkfifo /mnt/origin/a/fifo
    chown 12:34 /mnt/origin/a/deep/f2
    chmod 4711 /mnt/origin/a/deep/f3
    python3 -c 'import os, sys; [os.setxattr(sys.argv[1], key, b"text") for key in ("user.note", "trusted.note")]' /mnt/origin/a/deep/f4
    touch -d 2001-02-03 /mnt/origin/a/deep/f5
    echo x >/mnt/origin/other/x
    echo "a name" >"/mnt/origin/with space"
    sync -f /mnt/origin
}

change() {
    rm -rf /mnt/origin/a/deep/er /mnt/origin/a/deep/f1
    head -c 100000 /dev/urandom >/mnt/origin/a/deep/f6
    echo new >/mnt/origin/a/deep/new
    rm /mnt/origin/a/link
    mkdir /mnt/origin/a/link
    chmod 600 /mnt/origin/a/deep/f3
    head -c 5000000 /dev/urandom >/mnt/origin/a/large
    echo y >/mnt/origin/other/x
    rm "/mnt/origin/with space"
    sync -f /mnt/origin
}

for fs in ext4 xfs; do
    note "$fs"
    make_filesystem "$fs" "$origin" /mnt/origin
    prepare
    state_of /mnt/origin/a >/run/before
    times=$(stat -c %y /mnt/origin/a /mnt/origin/a/deep)
    tidemark snapshot create data --name s1 "${store[@]}" >/run/out 2>&1 || { cat /run/out; fail "create"; }
    change
    tidemark snapshot create data --name s2 "${store[@]}" >/run/out 2>&1 || { cat /run/out; fail "create"; }
    digest /dev/mapper/data@s1 >/run/s1; digest /dev/mapper/data@s2 >/run/s2
    (while [ ! -e /run/stop ]; do head -c 20000 /dev/urandom >/mnt/origin/other/busy; sync -f /mnt/origin; done) & writer=$!

    sleep 1000 3</mnt/origin/a/large & holder=$!
    tidemark snapshot rollback data@s1 --only /mnt/origin/a --dry-run >/run/out
    grep -q "replaced: /mnt/origin/a" /run/out || fail "the plan does not name the directory"
    is_as_before >/dev/null && fail "a dry run changed something"
    tidemark snapshot rollback data@s1 --only /mnt/origin/a --only "/mnt/origin/with space" --yes >/run/out 2>&1 ||
        { cat /run/out; fail "rollback --only"; }
    is_as_before || fail "the directory is not as it was"
    assert_same "the times" "$times" "$(stat -c %y /mnt/origin/a /mnt/origin/a/deep)"
    assert_same "the file" "a name" "$(cat "/mnt/origin/with space")"
    assert_same "another file" y "$(cat /mnt/origin/other/x)"
    assert_same "what is open" 5000000 "$(stat -Lc %s "/proc/$holder/fd/3")"
    kill "$holder"; wait "$holder" 2>/dev/null || true

    note "$fs: one file, a link, a file in another place of the tree"
    head -c 10000 /dev/urandom >/mnt/origin/a/deep/f7
    tidemark snapshot rollback data@s1 --only /mnt/origin/a/deep/f7 --only /mnt/origin/a/link --yes >/run/out 2>&1 ||
        { cat /run/out; fail "rollback of files"; }
    is_as_before || fail "the files are not as they were"
    tidemark snapshot rollback data@s2 --only /mnt/origin/a/deep/new --yes >/run/out 2>&1 || { cat /run/out; fail "a file of s2"; }
    assert_same "the new file" new "$(cat /mnt/origin/a/deep/new)"
    rm /mnt/origin/a/deep/new

    note "$fs: a directory is bind-mounted elsewhere"
    mkdir -p /mnt/bound
    mount --bind /mnt/origin/a/deep /mnt/bound
    echo changed >/mnt/bound/f8
    refused 3 "is not on a filesystem" tidemark snapshot rollback data@s1 --only /mnt/bound --yes
    tidemark snapshot rollback data@s1 --only /mnt/bound/f8 --yes >/run/out 2>&1 || { cat /run/out; fail "through a bind mount"; }
    umount /mnt/bound
    is_as_before || fail "the file was not put back through the bind mount"

    note "$fs: killed"
    for point in snapshot.only.copied snapshot.only.exchanged; do
        echo later >/mnt/origin/a/later
        TIDEMARK_CRASH_AT=$point tidemark snapshot rollback data@s1 --only /mnt/origin/a --yes >/run/out 2>&1 && fail "$point was not passed"
        case "$point" in
            *copied) [ -e /mnt/origin/a/later ] || fail "the former directory is gone" ;;
            *) is_as_before || fail "the new directory is not whole" ;;
        esac
        [ -d /mnt/origin/.tidemark-rollback ] || fail "nothing was left, which proves nothing"
        tidemark snapshot rollback data@s1 --only /mnt/origin/a --yes >/run/out 2>&1 || { cat /run/out; fail "after $point"; }
        is_as_before || fail "after $point the directory is not as it was"
        [ ! -e /mnt/origin/.tidemark-rollback ] || fail "something was left"
    done

    note "$fs: refusals"
    refused 3 "is not in data@s1" tidemark snapshot rollback data@s1 --only /mnt/origin/none --only /mnt/origin/a --yes
    refused 3 "is not on a filesystem" tidemark snapshot rollback data@s1 --only /mnt/scratch/none --yes
    refused 3 "cannot be examined" tidemark snapshot rollback data@s1 --only /mnt/origin/none/none --yes
    refused 2 "a name is not enough" tidemark snapshot rollback data@s1 --only '*.db' --yes
    refused 2 "is not on data" tidemark snapshot rollback data@s1 --only bytes:0+1TiB --yes
    refused 3 "is mounted" tidemark snapshot rollback data@s1 --only bytes:0+4096 --yes
    refused 3 "does not show its instant\|no snapshot" tidemark snapshot rollback data@none --only /mnt/origin/a --yes
    mkdir -m 755 /mnt/origin/.tidemark-rollback
    chown 12 /mnt/origin/.tidemark-rollback
    refused 3 "other users" tidemark snapshot rollback data@s1 --only /mnt/origin/a --yes
    rmdir /mnt/origin/.tidemark-rollback
    mkdir -p /mnt/origin/a/point
    mount -t tmpfs none /mnt/origin/a/point
    refused 3 "a filesystem is mounted at" tidemark snapshot rollback data@s1 --only /mnt/origin/a --yes
    umount /mnt/origin/a/point
    rmdir /mnt/origin/a/point
    is_as_before || fail "a refused command changed something"

    touch /run/stop; wait "$writer"; rm /run/stop
    umount /mnt/origin
    assert_same "data@s1" "$(cat /run/s1)" "$(digest /dev/mapper/data@s1)"
    assert_same "data@s2" "$(cat /run/s2)" "$(digest /dev/mapper/data@s2)"

    note "$fs: bytes"
    dd if=/dev/urandom of="$origin" bs=1M count=8 conv=fsync status=none
    tidemark snapshot rollback data@s1 --only bytes:2MiB+3MiB --only bytes:4096+512 --yes >/run/out 2>&1 || { cat /run/out; fail "bytes"; }
    cmp -i 2097152 -n 3145728 "$origin" /dev/mapper/data@s1 || fail "the range differs"
    cmp -i 4096 -n 512 "$origin" /dev/mapper/data@s1 || fail "the sector differs"
    cmp -s -i 4608 -n 1048576 "$origin" /dev/mapper/data@s1 && fail "more was put back"
    assert_same "data@s2" "$(cat /run/s2)" "$(digest /dev/mapper/data@s2)"
    tidemark snapshot delete data@s1 data@s2 --yes >/run/out 2>&1 || { cat /run/out; fail "delete"; }
done
tidemark detach data
assert_no_tidemark_left
