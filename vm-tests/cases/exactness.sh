# Safety promise 1: the copy equals, byte for byte, what --hook-frozen captured at the instant.
# Environment: FS (ext4, xfs), ORIGIN (volume, lvm), MECHANISMS (on, off). Five secondaries; chunk, segment and store
# sizes are random, from the printed seed. With mechanisms off, everything is copied (--all) in one region. With
# mechanisms on, free space is neither copied nor preserved, regions are released in any order, and the comparison
# covers every byte that was in use.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_load.sh"

origin_disk=$(disk 0)
raw_disk=$(disk 1)
scratch_disk=$(disk 2)

case "$ORIGIN" in
    volume)
        tidemark attach "$origin_disk" --name data
        origin=/dev/mapper/data
        ;;
    lvm)
        pvcreate -q -y "$origin_disk"
        vgcreate -q tidetest "$origin_disk"
        lvcreate -q -y -Wn -Zn -l 100%FREE -n data tidetest
        dmsetup mknodes
        origin=/dev/mapper/tidetest-data
        ;;
esac
pace=$(if [ "$MACHINE" = um ]; then echo 2; else echo 1; fi)
table_before=$(dmsetup table "$origin")
size=$(blockdev --getsize64 "$origin")
make_filesystem "$FS" "$origin" /mnt/origin
make_filesystem ext4 "$scratch_disk" /mnt/scratch

# Copies without any preserved original prove little, so the load must overwrite data before it is copied. A single copy
# may be faster than its writers, especially when the most written regions are copied first.
preserved=0
count_preserved() {
    local count
    count=$(grep -o '"originals_count":[0-9]*' /run/copy.json | cut -d: -f2 | tail -n 1)
    note "originals: $count"
    preserved=$((preserved + count))
}

one_copy() {
    local kind=$1 chunk segment ram target=
    chunk=$(pick "$kind-chunk" 4KiB 8KiB 16KiB 64KiB)
    segment=$(pick "$kind-segment" 64KiB 256KiB 1MiB 4MiB)
    ram=$(pick "$kind-ram" 0 1MiB 8MiB)
    local -a options=(--chunk "$chunk" --segment "$segment" --store /mnt/scratch --store-ram "$ram" --yes
        --freeze-budget 120s --hook-frozen "$(capture_hook /mnt/scratch/instant)")
    # A small volume is copied in a moment. The rate limit keeps the load running beside the copy for some seconds;
    # fewer where the load runs at native speed.
    if [ "$MECHANISMS" = on ]; then
        options+=(--rate "$(($(pick "$kind-rate" 8 16 32) * pace))MiB")
        options+=(--order "$(pick "$kind-order" physical hot)" --region "$(pick "$kind-region" 1MiB 4MiB 16MiB)"
            --on-full "$(pick "$kind-full" abort hold)")
    else
        options+=(--rate "$((size * pace * pace / $(pick "$kind-rate" 3 6 12)))")
        options+=(--all --region "$(((size >> 20) + 1))MiB")
    fi
    [ "$(pick "$kind-verify" 0 1)" = 0 ] || [ "$kind" = pipe ] || options+=(--verify)
    note "copy: $kind ${options[*]}"
    rm -f /mnt/scratch/instant /mnt/scratch/copy*
    copy() { tidemark copy "$origin" "$@" "${options[@]}" --json >/run/copy.json || { tail -n 3 /run/copy.json; fail "the copy"; }; }
    case "$kind" in
        raw-device) target=$raw_disk && copy "$raw_disk" ;;
        raw-file) target=/mnt/scratch/copy.raw && copy "$target" ;;
        overlay) copy /mnt/scratch/copy.tdm --originals overlay ;;
        append) copy /mnt/scratch/copy.tdm --originals append ;;
        pipe) tidemark copy "$origin" - "${options[@]}" --json >/mnt/scratch/copy.tdm 2>/run/copy.json ;;
    esac
    load_is_alive
    pause_load
    if [ -z "$target" ]; then
        target=/mnt/scratch/copy.restored
        tidemark verify /mnt/scratch/copy.tdm
        if [ "$kind" = pipe ]; then
            tidemark restore - "$target" --yes </mnt/scratch/copy.tdm
        else
            tidemark restore /mnt/scratch/copy.tdm "$target" --yes
        fi
        tidemark verify /mnt/scratch/copy.tdm --against "$target"
    fi
    count_preserved
    compare "$target"
    [ "$(dmsetup table "$origin")" = "$table_before" ] || fail "the origin's table changed: $(dmsetup table "$origin")"
    assert_no_tidemark_left data
    if [ -b "$target" ]; then
        filesystem_check "$FS" "$target"
    else
        local loop
        loop=$(losetup --find --show "$target")
        filesystem_check "$FS" "$loop"
        losetup -d "$loop"
    fi
    go_on_load
}

compare() {
    if [ "$MECHANISMS" = on ]; then
        python3 "$REPO/vm-tests/guest/same_in_use.py" "$FS" /mnt/scratch/instant "$1" || fail "$1 differs"
    else
        same_bytes /mnt/scratch/instant "$1" "$size"
    fi
}

start_load /mnt/origin "$SEED"
for kind in $(printf '%s\n' raw-device raw-file overlay append pipe | some_under_emulation kinds 1); do
    one_copy "$kind"
done
# With random options, every copy may outrun its writers. The next round has other options.
for round in 1 2 3; do
    [ "$preserved" = 0 ] || break
    SEED=$((SEED + round)) one_copy append
done
[ "$preserved" -gt 0 ] || fail "no copy preserved any original"
stop_load
umount /mnt/origin
filesystem_check "$FS" "$origin"
