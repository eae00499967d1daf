# The checks of resume before it changes anything. A dry run makes the same checks and changes nothing. An obstacle that
# appeared since the copy began is refused. A secondary that hangs blocks neither the resume nor the origin.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_resume.sh"

make_volume "$(disk 2)" 16
is_resumable() { [ -n "$(find /run/tidemark -name '*.segments' -size +400c)" ]; }

start_and_kill() { # TARGET
    begin "$1" --region 4MiB --segment 256KiB --rate 16MiB
    wait_until 60 is_resumable
    sleep 0.5
    kill_copy
}

# state FILE: saves everything that a dry run must not change.
state() {
    dmsetup table | sort
    dmsetup table --inactive | sort
    dmsetup info -c --noheadings -o name,suspended,open | sort
    find /run/tidemark /var/lib/tidemark -type f -printf '%p %s %T@\n' 2>/dev/null | sort
    find /mnt/scratch -printf '%p %s %T@\n' | sort
    digest "$1"
    pgrep -c tidemark || true
}

note "a dry run: a table that the dead process has loaded stays, and so does everything else"
start_and_kill /mnt/scratch/copy.raw
partial=$(find /mnt/scratch -name '*tidemark-partial*')
dmsetup table "$origin" | dmsetup load "$origin"
state "$partial" >/run/before
tidemark resume --dry-run
state "$partial" >/run/now
diff /run/before /run/now || fail "the dry run changed something"

note "a dry run refuses what the run refuses"
mv "$partial" /mnt/scratch/elsewhere
cp /mnt/scratch/elsewhere "$partial"
assert_status 3 tidemark resume --dry-run
assert_status 3 tidemark resume
rm "$partial"
mv /mnt/scratch/elsewhere "$partial"

note "the job records are now on the origin"
cp -a /run/tidemark /mnt/origin/records
mount --bind /mnt/origin/records /run/tidemark
for how in --dry-run ''; do
    # shellcheck disable=SC2086
    assert_status 3 tidemark resume $how 2>/run/err
    cat /run/err
    grep -q 'would wait for the origin' /run/err || fail "the refusal gives another reason"
    grep -q 'tidemark recover' /run/err || fail "the refusal does not say what to do"
done
umount /run/tidemark
rm -r /mnt/origin/records
goes_on /mnt/scratch/copy.raw
rm /mnt/scratch/copy.raw

# After recover has put the origin back, it may still wait for the secondary to remove the partial file.
put_back() {
    is_back && return
    tidemark recover >>/run/recover.out 2>&1 &
    sleep 1
    is_back
}

# With a hanging secondary, a resume ends at a signal or by itself, releases what it holds, and the origin is put back.
dmsetup create --noudevsync secondary --table "0 $(blockdev --getsz "$(disk 1)") linear $(disk 1) 0"
settle
mkfs.ext4 -q /dev/mapper/secondary
mkdir -p /mnt/target
for caches in warm cold; do
    for target in /mnt/target/copy.tdm /dev/mapper/secondary; do
        note "$target hangs, its caches $caches"
        [ "$target" = /dev/mapper/secondary ] || mount /dev/mapper/secondary /mnt/target
        start_and_kill "$target"
        if [ "$caches" = cold ]; then
            [ "$target" = /dev/mapper/secondary ] || { wait_until 20 umount /mnt/target; mount /dev/mapper/secondary /mnt/target; }
            echo 3 >/proc/sys/vm/drop_caches
        fi
        dmsetup suspend --noflush --nolockfs secondary
        tidemark resume >/run/resume.out 2>&1 &
        process=$!
        sleep 2
        kill -TERM "$process" 2>/dev/null || true
        # The resume puts the origin back itself if it had begun to copy; otherwise recover does.
        wait_until 15 put_back
        timeout 10 dd if=/dev/zero of=/mnt/origin/probe bs=4k count=16 conv=fsync status=none || fail "the origin cannot be written"
        dmsetup resume --noudevsync secondary
        wait_until 30 is_gone
        wait "$process" || true
        cat /run/resume.out
        tidemark recover
        is_back || fail "the origin's table changed"
        assert_no_tidemark_left data
        if mountpoint -q /mnt/target; then
            find /mnt/target -name '*tidemark-partial*' -delete
            umount /mnt/target
        fi
        rm -f /mnt/scratch/instant
    done
    mkfs.ext4 -q -F /dev/mapper/secondary
done
dmsetup remove --noudevsync secondary

umount /mnt/origin
filesystem_check ext4 "$origin"
