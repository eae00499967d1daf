# Shared by the cases of increments: a busy ext4 on the volume "data", and a disk for stores and archives.
# Sourced after lib.sh.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_load.sh"

stores=/mnt/stores
make_filesystem ext4 "$(disk 1)" $stores
mkdir -p $stores/chain $stores/other
spare=$(disk 2)
tidemark attach "$(disk 0)" --name data
make_filesystem ext4 /dev/mapper/data /mnt/data

create() { tidemark snapshot create data --store $stores --store-size 32MiB --name "$1" >/run/created 2>&1 || fail "create: $(cat /run/created)"; }
delete() { tidemark snapshot delete "$@" --yes >/run/deleted 2>&1 || fail "delete: $(cat /run/deleted)"; }
copy() { tidemark copy "$@" --json >/run/copy.json 2>/run/copy.err || { cat /run/copy.err; fail "copy $*"; }; }
report() { # EXPRESSION over `report`, of the last copy
    python3 -c '
import json, sys
report = [json.loads(line) for line in open("/run/copy.json")][-1]["report"]
print(eval(sys.argv[1]))' "$1"
}

# The SHA-256 of as much of a larger device as the volume has.
head_digest() { dd if="$1" bs=1M count=64 iflag=direct status=none | sha256sum | cut -d' ' -f1; }

# churn SEED: a few MiB of scattered overwrites, new files, and removed ones.
churn() {
    python3 - "$1" <<'PYTHON'
import os, random, sys
rng = random.Random(int(sys.argv[1]))
with open("/mnt/data/big", "r+b") as file:
    for _ in range(rng.randrange(300, 500)):
        file.seek(rng.randrange(20 << 8) << 12)
        file.write(rng.randbytes(4096))
    os.fsync(file.fileno())
for _ in range(6):
    name = "/mnt/data/f%d" % rng.randrange(12)
    if os.path.exists(name) and rng.random() < 0.5:
        os.unlink(name)
    else:
        with open(name, "wb") as file:
            file.write(rng.randbytes(rng.randrange(1, 200_000)))
PYTHON
}

# A writer that never pauses, so that every snapshot and every copy is taken while the volume changes.
busy() {
    local round=0
    while [ ! -e /run/busy.stop ]; do
        round=$((round + 1))
        dd if=/dev/urandom of=/mnt/data/busy bs=4k count=4 seek=$((RANDOM % 250)) conv=notrunc,fsync status=none || return 1
        sleep 0.02
    done
}

start_busy() {
    rm -f /run/busy.stop
    busy &
    writer=$!
}
stop_busy() {
    touch /run/busy.stop
    wait "$writer" || fail "the writer failed"
}

# begin: generation 0.
begin() {
    dd if=/dev/urandom of=/mnt/data/big bs=1M count=20 conv=fsync status=none
    dd if=/dev/urandom of=/mnt/data/busy bs=1M count=1 conv=fsync status=none
    start_busy
    create s0
    copy data@s0 $stores/chain/s0.tdm
}

# end_of_snapshots: deletes all, and detaches the volume.
end_of_snapshots() {
    umount /mnt/data
    # Not those that are deleted, and whose stores still receive originals.
    tidemark snapshot list data --json | python3 -c '
import json, sys
views = [view for line in sys.stdin for view in json.loads(line)["report"]]
print("\n".join(view["snapshot"] for view in views if view["state"] != "retired"))' |
        xargs tidemark snapshot delete --yes >/run/deleted 2>&1 || { cat /run/deleted; fail "the last deletions"; }
    tidemark detach data
    assert_no_tidemark_left
}
