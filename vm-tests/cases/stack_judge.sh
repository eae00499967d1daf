# An independent judge, the crate devicemapper, reads every device's table, status and dependencies, and agrees with
# dmsetup: before a stack is inserted beneath a mounted ext4, while it is in place, and after its removal.
. "$REPO/vm-tests/cases/lib_stack.sh"
judge=/tidemark/bin/dm-judge

# reads WHEN: keeps the judge's report as an artifact, for comparison.
reads() {
    "$judge" agree >"$ARTIFACTS/$1" || fail "the judge, $1"
    note "$1: $(wc -l <"$ARTIFACTS/$1") facts"
}
# Only tables, status and dependencies are compared: event counters and open counts change over time.
lasting() { grep -v '^info ' "$ARTIFACTS/$1"; }

make_origin
reads before
assert_same "the judge on an origin without a stack" "$("$judge" stack data >/dev/null 2>&1 && echo good || echo bad)" bad

insert 20000 true
grep -q '^in place' "$REPORT" || fail "not in place: $(cat "$REPORT")"
assert_stack_is_over data
reads inserted
"$judge" stack data | tee "$ARTIFACTS/stack"
# Tidemark names its devices after the origin. All of them are in the chain below the origin, except the snapshot.
assert_same "the devices of Tidemark" "$(sed -n 's/^of Tidemark: //p' "$ARTIFACTS/stack" | tr ' ' '\n' | sort | xargs)" \
    "$(dmsetup info -c --noheadings -o name,uuid --separator ' ' | awk '$2 ~ /TIDEMARK-/ { print $1 }' | sort | xargs)"
# First writes preserve originals. Judge and dmsetup must agree on how much of the snapshot is in use.
dd if=/dev/urandom of=/mnt/data/file bs=64k count=20 oflag=direct status=none
sync
reads preserving
grep '^status data#snap: .* snapshot [0-9]*/' "$ARTIFACTS/preserving" || fail "no status of the snapshot"
! cmp -s "$ARTIFACTS/inserted" "$ARTIFACTS/preserving" || fail "nothing has changed: this proves nothing"
# The judge detects an inconsistent stack.
dmsetup suspend data#snap
! "$judge" stack data >/run/judged 2>&1 || fail "a suspended snapshot is not detected: $(cat /run/judged)"
grep 'data#snap is suspended' /run/judged || fail "the judge gives another reason: $(cat /run/judged)"
dmsetup resume data#snap
"$judge" stack data >/dev/null

remove_stack
assert_as_before
reads after
assert_same "what the judge reads" "$(lasting after)" "$(lasting before)"
umount /mnt/data
e2fsck -fn "$ORIGIN"
