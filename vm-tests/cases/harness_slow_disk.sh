# A disk with delays in the case's description is slow in each of the three ways; the other disk is not.
took_ms() {
    local start=${EPOCHREALTIME/./}
    "$@"
    echo $(((${EPOCHREALTIME/./} - start) / 1000))
}
read_one() { dd if="$1" of=/dev/null bs=4k count=1 iflag=direct status=none; }
write_one() { dd if=/dev/zero of="$1" bs=4k count=1 oflag=direct status=none; }
flush_one() { dd if=/dev/null of="$1" bs=4k count=0 conv=notrunc,fsync status=none; }

assert_same "the target over disk 0" "$(dmsetup table tidemark-test-disk0 | cut -d' ' -f3)" delay
assert_same "disk 0" "$(disk 0)" "$(dm_node tidemark-test-disk0)"
assert_same "disk 1" "$(disk 1)" "$(machine_disk 1)"
for way in "read_one 100" "write_one 200" "flush_one 300"; do
    read -r command least <<<"$way"
    slow=$(took_ms "$command" "$(disk 0)")
    note "$command: $slow ms"
    [ "$slow" -ge "$least" ] || fail "$command took $slow ms on the slow disk, not $least"
done
fast=$(took_ms write_one "$(disk 1)")
[ "$fast" -lt 200 ] || fail "a write took $fast ms on the fast disk"
