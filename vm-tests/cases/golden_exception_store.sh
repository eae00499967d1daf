# Writes an exception store with the kernel's persistent dm-snapshot, dumps it as text, and compares both with the
# committed golden files. tests/golden/exception_store/README.md describes the dump and the write pattern.
origin=$(disk 0)
store=$(disk 1)
tool="python3 $REPO/vm-tests/cases/golden_exception_store.py"
sectors=$(blockdev --getsz "$origin")

$tool prepare "$origin" "$store"
dmsetup create tidemark-test-snap --table "0 $sectors snapshot $origin $store PO $CHUNK_SECTORS"
dmsetup create tidemark-test-data --table "0 $sectors snapshot-origin $origin"
settle
before=$($tool digest "$origin")
$tool overwrite "$(dm_node tidemark-test-data)" "$CHUNK_SECTORS" "$EXCEPTIONS"
status=$(dmsetup status tidemark-test-snap | cut -d' ' -f4-)
note "status: $status"
# The kernel's snapshot shows the origin's old content.
assert_same "what the snapshot shows" "$(digest "$(dm_node tidemark-test-snap)")" "$before"
dmsetup remove tidemark-test-data
dmsetup remove tidemark-test-snap

name=$KERNEL-${CHUNK_SECTORS}x$EXCEPTIONS
$tool write-down "$store" "$CHUNK_SECTORS" "$EXCEPTIONS" "$status" "$ARTIFACTS/$name"
ls -l "$ARTIFACTS"
golden=$REPO/tests/golden/exception_store/$name
for part in cow expect; do
    [ -e "$golden.$part" ] || fail "golden file $name.$part is missing: the new one is an artifact of this run"
    assert_identical "$golden.$part" "$ARTIFACTS/$name.$part"
done
