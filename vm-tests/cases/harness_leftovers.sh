# assert_no_tidemark_left must detect each kind of leftover.
must_complain() {
    if (assert_no_tidemark_left) >/tmp/complaint 2>&1; then fail "$1 was not seen"; fi
    grep -q "$1" /tmp/complaint || fail "the complaint does not name $1"
}
assert_no_tidemark_left
dmsetup create tidemark-test-a -u TIDEMARK-test-real-1 --table "0 8 zero" 2>/dev/null \
    || dmsetup create tidemark-test-a -u TIDEMARK-test-real-1 --table "0 8 error"
must_complain TIDEMARK-test-real-1
dmsetup remove tidemark-test-a
truncate -s 1M /tmp/tidemark-tail
loop=$(losetup -f --show /tmp/tidemark-tail)
must_complain tidemark-tail
losetup -d "$loop"
zram=/sys/block/zram0
[ -e "$zram" ] || cat /sys/class/zram-control/hot_add
echo 1M >"$zram/disksize"
must_complain zram0
echo 1 >"$zram/reset"
mkdir -p /run/tidemark/jobs
touch /run/tidemark/jobs/1
must_complain /run/tidemark/jobs/1
rm -r /run/tidemark
assert_no_tidemark_left
