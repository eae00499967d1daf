# Shared by the cases of copies that are killed or lose their secondary: a volume, one such copy, and the checks after
# it. Sourced after lib.sh.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_load.sh"

origin=/dev/mapper/data

# make_volume DEVICE MIB: attaches disk 0 as volume "data" with an ext4 on /mnt/origin that holds MIB MiB of data, and
# makes an ext4 on DEVICE at /mnt/scratch for everything else.
make_volume() {
    tidemark attach "$(disk 0)" --name data
    make_filesystem ext4 "$origin" /mnt/origin
    make_filesystem ext4 "$1" /mnt/scratch
    dd if=/dev/urandom of=/mnt/origin/content bs=1M count="$2" status=none
    sync -f /mnt/origin
    TABLE_BEFORE=$(dmsetup table "$origin")
}

# begin TARGET OPTION...: starts a copy in process $process, and saves the origin at the instant in
# /mnt/scratch/instant.
begin() {
    tidemark copy "$origin" "$1" --all --yes --store /mnt/scratch --store-ram 1MiB --freeze-budget 120s \
        --hook-frozen "$(capture_hook /mnt/scratch/instant)" "${@:2}" >/run/copy.out 2>&1 &
    process=$!
}

# kill_copy: kills the copy, then writes to the origin.
kill_copy() {
    kill -KILL "$process"
    wait "$process" || true
    dd if=/dev/urandom of=/mnt/origin/after bs=64k count=8 conv=fsync status=none
}

# Number of segments in the copy's segment log.
placed() { find /run/tidemark -name '*.segments' -printf '%s\n' | awk '{ n += int(($1 - 128) / 20) } END { print n + 0 }'; }
has_placed() { [ "$(placed)" -gt "$1" ]; }
is_gone() { ! kill -0 "$process" 2>/dev/null; }
is_back() { [ "$(dmsetup table "$origin")" = "$TABLE_BEFORE" ]; }

# is_right TARGET: TARGET equals the origin at the instant, and nothing else is left of the copy.
is_right() {
    local target=$1
    if [[ "$target" = *.tdm ]]; then
        tidemark verify "$target"
        tidemark restore "$target" /mnt/scratch/restored --yes
        target=/mnt/scratch/restored
    fi
    same_bytes /mnt/scratch/instant "$target" "$(blockdev --getsize64 "$origin")"
    is_back || fail "the origin's table changed"
    assert_no_tidemark_left data
    rm -f /mnt/scratch/restored /mnt/scratch/instant
}

# goes_on TARGET: resumes the copy to its end and checks it.
goes_on() {
    tidemark resume >/run/resume.out 2>&1 || { cat /run/resume.out; fail "the resume"; }
    is_right "$1"
}
