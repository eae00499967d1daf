# Changes of files after the instant do not change the copy: delete, rewrite, extend, create, truncate, rename, in every
# combination and order of two, with the freed space reused at once. Meanwhile free space is neither copied nor
# preserved, and regions are released.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_load.sh"

tidemark attach "$(disk 0)" --name data
origin=/dev/mapper/data
make_filesystem ext4 "$(disk 1)" /mnt/scratch

operations=(delete rewrite extend create truncate rename nothing)

prepare() { # FS
    local first second file
    make_filesystem "$1" "$origin" /mnt/origin
    mkdir /mnt/origin/d
    for first in "${operations[@]}"; do
        for second in "${operations[@]}"; do
            file=/mnt/origin/d/$first-$second
            head -c $((20000 + $(rand "$file" 0 200000))) /dev/urandom >"$file"
        done
    done
    # Deleted before the instant: their space is free at the instant, and reused later.
    for file in 1 2 3 4; do head -c 3000000 /dev/urandom >"/mnt/origin/gone$file"; done
    sync -f /mnt/origin
    rm /mnt/origin/gone*
    sync -f /mnt/origin
    (cd /mnt/origin/d && sha256sum -- *) >/mnt/scratch/sums
}

apply() { # OPERATION FILE
    case "$1" in
        delete) rm -f "$2" ;;
        rewrite) [ ! -e "$2" ] || head -c 150000 /dev/urandom | dd of="$2" bs=4k conv=notrunc status=none ;;
        extend) head -c 300000 /dev/urandom >>"$2" ;;
        create) head -c 250000 /dev/urandom >"$2.new" && mv "$2.new" "$2" ;;
        truncate) [ ! -e "$2" ] || truncate -s 5000 "$2" ;;
        rename) [ ! -e "$2" ] || mv "$2" "$2.renamed" ;;
        nothing) ;;
    esac
}

everything() {
    local first second
    for first in "${operations[@]}"; do
        for second in "${operations[@]}"; do
            apply "$first" "/mnt/origin/d/$first-$second"
            [ $((RANDOM % 4)) -ne 0 ] || sync -f /mnt/origin
            apply "$second" "/mnt/origin/d/$first-$second"
        done
    done
    sync -f /mnt/origin
}

for order in physical hot; do
    note "order $order"
    prepare ext4
    tidemark copy "$origin" /mnt/scratch/copy.raw --yes --store /mnt/scratch --store-ram 0 --rate 512KiB --region 1MiB \
        --order "$order" --json >/run/copy.json 2>&1 &
    process=$!
    # Stops the copier in mid-copy, with some regions released and some not, until all operations are done.
    wait_until 60 grep -q '"event":"regions"' /run/copy.json
    kill -STOP "$process"
    is_preserved "$origin" || fail "everything is already released: this proves nothing"
    everything
    kill -CONT "$process"
    wait "$process" || { tail -n 3 /run/copy.json; fail "the copy"; }
    skipped=$(grep -o '"skipped":{"bytes":[0-9]*' /run/copy.json | grep -o '[0-9]*$')
    [ "$skipped" -gt $((32 << 20)) ] || fail "only $skipped bytes of free space were skipped"
    umount /mnt/origin
    loop=$(losetup --find --show /mnt/scratch/copy.raw)
    filesystem_check ext4 "$loop"
    mkdir -p /mnt/copy
    mount -o ro "$loop" /mnt/copy
    (cd /mnt/copy/d && sha256sum --quiet -c /mnt/scratch/sums) || fail "a file is not what it was at the instant"
    [ "$(find /mnt/copy/d -type f | wc -l)" = "$(wc -l </mnt/scratch/sums)" ] || fail "the copy has another number of files"
    umount /mnt/copy
    losetup -d "$loop"
    rm /mnt/scratch/copy.raw
    assert_no_tidemark_left data
done
