# Shared by the cases of increments onto raw secondaries: a device and a file. Sourced after lib.sh.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_since.sh"

raw=$stores/raw.img
targets=("$spare" "$raw")
size=$(blockdev --getsize64 "$(disk 0)")
records=/var/lib/tidemark/secondaries

# The SHA-256 of what a secondary shows, past the page cache.
shows() { dd if="$1" bs=1M count=$((size >> 20)) iflag=direct status=none | sha256sum | cut -d' ' -f1; }
assert_shows() { assert_same "$1 on $2" "$(shows "$2")" "$3"; } # WHAT TARGET DIGEST
state_of() { # TARGET EXPRESSION over `it`
    tidemark status --json | python3 -c '
import json, os, sys
report = json.loads(sys.stdin.readline())["report"]
for it in report["secondaries"]:
    if os.path.realpath(it["secondary"]) == os.path.realpath(sys.argv[1]):
        print(eval(sys.argv[2]))' "$1" "$2"
}
poke() { printf "$3" | dd of="$1" bs=1 seek="$2" conv=notrunc,fsync status=none; } # TARGET OFFSET BYTE
peek() { dd if="$1" bs=1 skip="$2" count=1 status=none | od -An -tx1 | tr -d ' \n'; }

# begin_raw: generation 0, whole copies of a kept snapshot.
begin_raw() {
    local target wanted
    fill "$spare" "$(blockdev --getsize64 "$spare")" before
    begin
    wanted=$(digest /dev/mapper/data@s0)
    for target in "${targets[@]}"; do
        refused 3 'no record says' tidemark copy data@s0 --since s0 "$target" --yes
        copy data@s0 "$target" --yes --segment 256KiB
        assert_shows "generation 0" "$target" "$wanted"
        assert_same "the state" "$(state_of "$target" 'it["shown"], it["base"], it["is_updating"]')" "('data@s0', 'data@s0', False)"
        tidemark verify "$target" | grep -q 'every segment is as recorded' || fail "verify $target"
        tidemark inspect "$target" | grep -q 'holds data@s0' || fail "inspect $target"
    done
}
