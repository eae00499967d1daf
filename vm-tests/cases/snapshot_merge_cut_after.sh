# Power cut in a rollback, second boot: the volume shows the snapshot and what was written to it since, at once and when the
# merge has ended. The other snapshots show what they showed.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_slow.sh"

mkdir -p /mnt/stores /mnt/data /var/lib/tidemark
mount "$(disk 1)" /mnt/stores
mount --bind /mnt/stores/state /var/lib/tidemark

# views EXPRESSION: this expression of the list of the snapshots, as --json has it.
views() {
    tidemark snapshot list data --json | python3 -c '
import json, sys
views = [view for line in sys.stdin for view in json.loads(line)["report"]]
print(eval(sys.argv[1]))' "$1"
}
rolled_back() { views '[view["snapshot"] for view in views if view["rollback_percent"] is not None]'; }
has_ended() { tidemark recover >/dev/null && [ "$(rolled_back)" = '[]' ]; }
all_is_right() {
    (cd /mnt/data && sha256sum --quiet -c /mnt/stores/files.sum) || fail "the volume's files $1"
    [ ! -e /mnt/data/of3 ] || fail "a file that is younger than the snapshot"
    assert_same "the states $1" "$(views '[view["state"] for view in views]')" "['valid', 'valid', 'valid']"
    for i in 1 2 3; do
        assert_same "what s$i shows $1" "$(sha256sum </dev/mapper/data@s"$i")" "$(cat /mnt/stores/s"$i".sum)"
    done
}

assert_same "the rollback that the power cut interrupted" "$(rolled_back)" "['data@s2']"
make_slow "$(disk 0)"
tidemark attach /dev/mapper/tidetest-slow --name data
mount /dev/mapper/data /mnt/data
all_is_right "at once"
wait_until 200 has_ended
echo 3 >/proc/sys/vm/drop_caches
all_is_right "after the merge"
umount /mnt/data
e2fsck -fn /dev/mapper/data >/run/fsck 2>&1 || { cat /run/fsck; fail "the volume's filesystem"; }
tidemark snapshot delete data@s1 data@s2 data@s3 --yes
tidemark detach data
dmsetup remove tidetest-slow
umount /var/lib/tidemark /mnt/stores
assert_no_tidemark_left
