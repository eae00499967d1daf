# An independent judge, the crate devicemapper, reads every device's table, status and dependencies as dmsetup does:
# before a stack goes under a mounted ext4, while it is there, and when it is gone again.
. "$REPO/vm-tests/cases/lib_stack.sh"
judge=/tidemark/bin/dm-judge

# reads WHEN: the judge's reading, kept for a look and a comparison.
reads() {
    "$judge" agree >"$ARTIFACTS/$1" || fail "the judge, $1"
    note "$1: $(wc -l <"$ARTIFACTS/$1") facts"
}
# Events are counted for ever, and who has a device open changes: tables and what they stand on are what comes back.
lasting() { grep -v '^info ' "$ARTIFACTS/$1"; }

make_origin
reads before
assert_same "the judge on an origin without a stack" "$("$judge" stack data >/dev/null 2>&1 && echo good || echo bad)" bad

insert 20000 true
grep -q '^in place' "$REPORT" || fail "not in place: $(cat "$REPORT")"
assert_stack_is_over data
reads inserted
"$judge" stack data | tee "$ARTIFACTS/stack"
# Tidemark names its devices after the origin: all of them lie on the way down, the snapshot above it aside.
assert_same "the devices of Tidemark" "$(sed -n 's/^of Tidemark: //p' "$ARTIFACTS/stack" | tr ' ' '\n' | sort | xargs)" \
    "$(dmsetup info -c --noheadings -o name,uuid --separator ' ' | awk '$2 ~ /TIDEMARK-/ { print $1 }' | sort | xargs)"
# First writes are preserved: what the snapshot has in use is what both see, whatever it is by then.
dd if=/dev/urandom of=/mnt/data/file bs=64k count=20 oflag=direct status=none
sync
reads preserving
grep '^status data#snap: .* snapshot [0-9]*/' "$ARTIFACTS/preserving" || fail "no status of the snapshot"
! cmp -s "$ARTIFACTS/inserted" "$ARTIFACTS/preserving" || fail "nothing has changed: this proves nothing"
# What no longer fits together is seen.
dmsetup suspend data#snap
! "$judge" stack data >/run/judged 2>&1 || fail "a suspended snapshot is not seen: $(cat /run/judged)"
grep 'data#snap is suspended' /run/judged || fail "another reason: $(cat /run/judged)"
dmsetup resume data#snap
"$judge" stack data >/dev/null

remove_stack
assert_as_before
reads after
assert_same "what the judge reads" "$(lasting after)" "$(lasting before)"
umount /mnt/data
e2fsck -fn "$ORIGIN"
