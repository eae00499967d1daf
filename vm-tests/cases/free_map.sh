# The map of free space of a frozen origin, for every supported FS, on the origin itself and on partitions of it. What
# the map calls free is also free according to the filesystem's own tools, and it is nearly all of it. Bytes that
# another user of the device may use, and those of a read-only filesystem, are not in the map.
judge=(python3 "$REPO/vm-tests/cases/free_map_judge.py")
REPORT=/run/free-map

sectors=$(blockdev --getsz "$(disk 0)")
dmsetup create data <<TABLE
0 $((sectors / 2)) linear $(disk 0) 0
$((sectors / 2)) $((sectors / 2)) linear $(disk 0) $((sectors / 2))
TABLE
settle
ORIGIN=$(dm_node data)
NUMBER=$(dmsetup info -c --noheadings --separator ' ' -o major,minor data | awk '{ print $1 ":" $2 }')
mkdir -p /mnt/a /mnt/b

# make KIND DEVICE MOUNTPOINT [MKFS-OPTION...]: a filesystem with many holes, files of every sort, and one file that is
# unlinked while open.
make() {
    local kind=$1 device=$2 at=$3 i
    shift 3
    case "$kind" in
        ext4)
            mkfs.ext4 -q -F "$@" "$device"
            mount -t ext4 "$device" "$at"
            ;;
        xfs)
            mkfs.xfs -q -f "$@" "$device"
            case "$*" in
                *logdev=*) mount -t xfs -o "logdev=$(disk 1)" "$device" "$at" ;;
                *) mount -t xfs "$device" "$at" ;;
            esac
            ;;
    esac
    mkdir -p "$at/files"
    for i in $(seq 60); do head -c $((RANDOM * 9 + 1)) /dev/zero >"$at/files/f$i"; done
    sync -f "$at"
    for i in $(seq 1 3 60); do rm "$at/files/f$i"; done
    fallocate -l 300000 "$at/files/unwritten"
    truncate -s 9M "$at/files/sparse"
    dd if=/dev/zero of="$at/files/sparse" bs=4096 count=3 seek=700 conv=notrunc status=none
    head -c 700000 /dev/zero >"$at/files/gone"
    head -c 500000 /dev/zero >"$at/files/unlinked"
    sync -f "$at"
    for i in $(seq 2 3 30); do rm "$at/files/f$i"; done
    # Shared blocks, where supported: several files have them, then one of the files is removed.
    if cp --reflink=always "$at/files/f60" "$at/files/clone" 2>/dev/null; then
        head -c 100000 /dev/zero >>"$at/files/clone"
        cp --reflink=always "$at/files/clone" "$at/files/clone2"
        rm "$at/files/clone"
    fi
}

# map HOOK MOUNTPOINT...: freezes and maps; the filesystems stay frozen until thaw.
map() {
    rm -f "$REPORT" /run/hold
    mkfifo /run/hold
    "$TIDEMARK" __free_map "$REPORT" "$NUMBER" "$@" </run/hold &
    MAPPER=$!
    exec 9>/run/hold
    wait_until 60 test -s "$REPORT"
    ! grep '^error' "$REPORT" || fail "no map"
    grep -v '^free' "$REPORT" || true
}

thaw() {
    exec 9>&-
    wait "$MAPPER" || fail "mapping: exit status $?, $(cat "$REPORT")"
}

# list_files MOUNTPOINT: writes the blocks of all files to /run/used, and those of file "gone", which HOOK deletes, to
# /run/gone. Opens file "unlinked", so that its blocks stay in use when HOOK deletes it.
list_files() {
    sync -f "$1"
    exec 7<"$1/files/unlinked"
    rm -rf /run/one
    mkdir -p /run/one
    ln -s "$1/files/gone" /run/one/gone
    "${judge[@]}" files /run/one >/run/gone
    "${judge[@]}" files "$1/files" | grep -vxFf /run/gone >/run/used
}

# Deletes and writes just before the freeze, without a sync.
HOOK='rm "$AT/files/unlinked" "$AT/files/gone"; head -c 2000000 /dev/zero >"$AT/files/late"'
is_free() { "${judge[@]}" within "$1" "$2" "$REPORT"; }
size_of() { blockdev --getsize64 "$1"; }
assert_nothing_free() { assert_same "free bytes in $1..$2" "$(is_free "$1" "$2")" 0; }
assert_something_free() { [ "$(is_free "$1" "$2")" -gt 1000000 ] || fail "too little is free in $1..$2"; }

# close_to_statfs MOUNTPOINT BYTES: BYTES matches what statfs calls free, up to what the filesystem reserves.
close_to_statfs() {
    local free
    free=$(($(stat -f -c '%f * %S' "$1")))
    note "statfs says $free, the map $2"
    local apart=$((free > $2 ? free - $2 : $2 - free))
    [ "$apart" -le $((free / 20 + (8 << 20))) ] || fail "statfs and the map are $apart bytes apart"
}

# whole MKFS-OPTION...: the filesystem on the origin itself.
whole() {
    note "$FS on the origin: $*"
    make "$FS" "$ORIGIN" /mnt/a "$@"
    list_files /mnt/a
    AT=/mnt/a map "$HOOK" /mnt/a
    "${judge[@]}" files /mnt/a/files >>/run/used
    "${judge[@]}" judge "$FS" "$ORIGIN" 0 "$REPORT" /run/used /run/gone
    close_to_statfs /mnt/a "$(is_free 0 "$(size_of "$ORIGIN")")"
    thaw
    exec 7<&-
    umount /mnt/a
}

case "$FS" in
    ext4)
        whole -b 4096
        whole -b 1024
        whole -b 2048 -O ^metadata_csum,^flex_bg,^sparse_super,^resize_inode
        whole -O bigalloc -C 16384
        whole -O ^has_journal
        whole -O meta_bg,^resize_inode -E lazy_itable_init=1
        ;;
    xfs)
        whole
        whole -m rmapbt=1,reflink=1
        whole -m rmapbt=0,reflink=0
        whole -b size=1024
        whole -l "logdev=$(disk 1),size=64m"
        ;;
esac

# Partitions: one of FS, one of ext4, with gaps before, between and after them; a third that is not mounted.
note "partitions"
mib=2048
a_start=$mib a_length=$(($([ "$FS" = xfs ] && echo 310 || echo 80) * mib))
b_start=$((a_start + a_length + mib + 8)) b_length=$((30 * mib))
c_start=$((b_start + b_length)) c_length=$((10 * mib))
bytes() { echo $(($1 * 512)); }
dmsetup create part-a --table "0 $a_length linear $ORIGIN $a_start"
dmsetup create part-b --table "0 $b_length linear $ORIGIN $b_start"
dmsetup create part-c --table "0 $c_length linear $ORIGIN $c_start"
settle
make "$FS" "$(dm_node part-a)" /mnt/a
make ext4 "$(dm_node part-b)" /mnt/b
list_files /mnt/a
AT=/mnt/a map "$HOOK" /mnt/a /mnt/b
"${judge[@]}" files /mnt/a/files >>/run/used
"${judge[@]}" judge "$FS" "$(dm_node part-a)" "$(bytes "$a_start")" "$REPORT" /run/used /run/gone
"${judge[@]}" files /mnt/b/files >/run/used
assert_something_free "$(bytes "$b_start")" "$(bytes $((b_start + b_length)))"
"${judge[@]}" judge ext4 "$(dm_node part-b)" "$(bytes "$b_start")" "$REPORT" /run/used -
assert_nothing_free 0 "$(bytes "$a_start")"
assert_nothing_free "$(bytes $((a_start + a_length)))" "$(bytes "$b_start")"
assert_nothing_free "$(bytes "$c_start")" "$(size_of "$ORIGIN")"
thaw
exec 7<&-

a_bytes=$(bytes "$a_start") a_end=$(bytes $((a_start + a_length)))
# The second half of the largest free extent of the first partition: free unless another device uses it. (The middle of
# the filesystem would not do: a journal may be there.)
map true /mnt/a /mnt/b
span=$(awk -v from="$a_bytes" -v to="$a_end" '
    $1 == "free" && $2 >= from && $3 <= to && $3 - $2 > most { most = $3 - $2; end = $3 }
    END { length_sectors = int(most / 1024); print end / 512 - length_sectors, length_sectors }' "$REPORT")
middle=${span% *} middle_length=${span#* }
assert_same "free bytes without another user" "$(is_free "$(bytes "$middle")" "$(bytes $((middle + middle_length)))")" \
    "$(bytes "$middle_length")"
[ "$middle_length" -gt "$mib" ] || fail "the largest free extent has only $middle_length sectors"
thaw

# others WHAT START END COMMAND...: after COMMAND has put another user there, nothing of that range is free.
others() {
    local what=$1 begin=$2 end=$3
    shift 3
    note "$what"
    "$@"
    settle
    map true /mnt/a /mnt/b
    assert_nothing_free "$begin" "$end"
    thaw
}
others "a device over a part of a partition" "$(bytes $middle)" "$(bytes $((middle + middle_length)))" \
    dmsetup create over --table "0 $middle_length linear $ORIGIN $middle"
assert_something_free "$a_bytes" "$(bytes $middle)"
dmsetup remove over
over_a() {
    dmsetup create over --table "0 $middle_length crypt aes-xts-plain64 $(printf '%064d' 7) 0 $ORIGIN $middle"
}
others "a target that is not linear" 0 "$(size_of "$ORIGIN")" over_a
grep -q "note .*'crypt' target" "$REPORT" || fail "no note of the crypt device"
dmsetup remove over
LOOP=$(losetup --find)
others "a loop device over a part" "$(bytes $middle)" "$(bytes $((middle + middle_length)))" \
    losetup --offset "$(bytes $middle)" --sizelimit "$(bytes $middle_length)" "$LOOP" "$ORIGIN"
assert_something_free "$a_bytes" "$(bytes $middle)"
losetup -d "$LOOP"

note "a device that appears between the two scans"
map "dmsetup create over --table '0 8 linear $ORIGIN 0'" /mnt/a /mnt/b
assert_nothing_free 0 "$(size_of "$ORIGIN")"
grep -q '^changed$' "$REPORT" || fail "no note of the change"
thaw
dmsetup remove over

note "read-only, from before the freeze or just before it"
map "mount -o remount,ro /mnt/a" /mnt/a /mnt/b
assert_nothing_free "$a_bytes" "$a_end"
assert_something_free "$(bytes "$b_start")" "$(bytes $((b_start + b_length)))"
grep -q 'note /mnt/a: it is read-only' "$REPORT" || fail "no note of the read-only filesystem"
thaw
umount /mnt/a

note "a filesystem on a mapping that is not linear"
dmsetup create crypted --table "0 $a_length crypt aes-xts-plain64 $(printf '%064d' 7) 0 $(dm_node part-a) 0"
settle
mkfs.ext4 -q -F "$(dm_node crypted)"
mount -t ext4 "$(dm_node crypted)" /mnt/a
map true /mnt/a /mnt/b
assert_nothing_free "$a_bytes" "$a_end"
assert_something_free "$(bytes "$b_start")" "$(bytes $((b_start + b_length)))"
grep -q 'note /mnt/a: it is on .*not mapped' "$REPORT" || fail "no note of the encrypted filesystem"
thaw
umount /mnt/a /mnt/b
