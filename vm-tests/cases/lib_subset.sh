# Shared by the cases of subsets: a filesystem on $origin with wanted files in keep and others in drop, and two hooks.
# Sourced after lib.sh.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_load.sh"

# /run/sums.sh, at the instant: the sums of the files, read below the suspended volume, in the file $SUMS; without those in
# the directory $PRUNE, if that is set. Snapshots hold the device, so it cannot be mounted itself.
cat >/run/sums.sh <<'END_OF_HOOK'
mkdir -p /run/instant
case "$FS" in xfs) options=ro,norecovery,nouuid ;; *) options=ro,noload ;; esac
below=${TIDEMARK_ORIGIN_BELOW:-/dev/dm-$(dmsetup info -c --noheadings -o minor 'data#data' | tr -d ' ')}
loop=$(losetup -f --show -r --direct-io=on "$below")
mount -t "$FS" -o "$options" "$loop" /run/instant
cd /run/instant
find . -path "./${PRUNE:-.none}" -prune -o -type f -print0 | sort -z | xargs -0 sha256sum >"$SUMS"
cd /
umount /run/instant
losetup -d "$loop"
END_OF_HOOK

# /run/between.sh, between the plan and the freeze: what was to be left out becomes part of what is wanted.
cat >/run/between.sh <<'END_OF_HOOK'
cd /mnt/origin
mv drop/renamed keep/renamed
ln drop/file2 keep/linked-after
mv drop/deep/links keep/links
rm drop/removed drop/replaced
head -c 400000 /dev/urandom >keep/in-freed-space
mv keep/file1 drop/was-kept; mv drop/file3 keep/file1
[ ! -d drop/directory ] || mv drop/directory keep/directory
[ "$FS" != xfs ] || cp --reflink=always drop/file4 keep/reflink-after
head -c 200000 /dev/urandom >drop/new
sync -f .
END_OF_HOOK

make_sets() { # FS
    make_filesystem "$1" "$origin" /mnt/origin
    if [ "$1" = ext4 ]; then
        # Of a smaller block than a chunk, the rest of the chunk may be wanted; and nothing may be written lazily.
        umount /mnt/origin
        mkfs.ext4 -q -F -b 4096 -E lazy_itable_init=0,lazy_journal_init=0 "$origin"
        mount "$origin" /mnt/origin
    fi
    mkdir -p /mnt/origin/{keep/deep,drop/deep}
    local at
    for at in $(seq 12); do
        head -c $((100000 + at * 9000)) /dev/urandom >"/mnt/origin/keep/file$at"
        head -c $((100000 + at * 9000)) /dev/urandom >"/mnt/origin/drop/file$at"
        head -c $((100000 + at * 9000)) /dev/urandom >"/mnt/origin/drop/deep/static$at"
    done
    # Two files that grow in turns, so that they are fragmented.
    for at in $(seq 40); do
        head -c 20000 /dev/urandom >>/mnt/origin/keep/woven
        head -c 20000 /dev/urandom >>/mnt/origin/drop/deep/staticwoven
        sync -f /mnt/origin
    done
    for at in links renamed removed replaced; do head -c 200000 /dev/urandom >"/mnt/origin/drop/$at"; done
    ln /mnt/origin/drop/links /mnt/origin/drop/deep/links
    if [ "$1" = xfs ]; then cp --reflink=always /mnt/origin/drop/file1 /mnt/origin/keep/reflink; fi
}
