# Helpers for the case scripts. Sourced by vm-tests/guest/run. Every script runs as root, with `set -euo pipefail`, in a
# guest of its own.
#
#   $TIDEMARK         the binary under test (also first in PATH)   $SEED     the case's random seed
#   $ARTIFACTS        a folder that the host keeps                  $PHASE    0, 1, ...: the number of this boot
#   $KERNEL           the series, 6.12 or 6.1                       $REPO     the project's folder
#   $MACHINE          um (a user-mode kernel) or qemu               $DEPTH    routine or full: how thorough the case is

TIDEMARK=$TIDEMARK_BINARY
SEED=$TIDEMARK_SEED PHASE=$TIDEMARK_PHASE KERNEL=$TIDEMARK_KERNEL REPO=$TIDEMARK_REPO ARTIFACTS=/case/artifacts
MACHINE=$TIDEMARK_MACHINE DEPTH=$TIDEMARK_DEPTH
PATH="$(dirname "$TIDEMARK"):$PATH"
for folder in /usr/lib/postgresql/*/bin /usr/lib/systemd; do PATH="$PATH:$folder"; done
RANDOM=$((SEED % 32768))
trap 'echo "line $LINENO of ${BASH_SOURCE[0]##*/}: \"$BASH_COMMAND\" failed with status $?"' ERR
set -E

note() { printf '%8.2f %s\n' "$(cut -d' ' -f1 /proc/uptime)" "$*"; }

# Also prints the last output of the case's commands.
fail() {
    local said
    note "FAIL: $*"
    trap - ERR
    for said in /run/copy /run/copy.err /run/resume.out; do
        [ ! -s "$said" ] || sed "s|^|${said##*/}: |" "$said" | tail -n 6
    done
    exit 1
}

# rand LABEL MIN MAX: a number from MIN to MAX; equal seed and label give the same number.
rand() {
    local digits
    digits=$(printf '%s-%s' "$SEED" "$1" | sha256sum | cut -c1-8)
    echo $(($2 + 0x$digits % ($3 - $2 + 1)))
}

# pick LABEL WORD...: one of the words, chosen by the seed.
pick() {
    local label=$1
    shift
    local index
    index=$(rand "$label" 1 $#)
    echo "${!index}"
}

# some_under_emulation LABEL COUNT: passes on all lines of stdin. In a routine run under emulation, only COUNT of them,
# chosen by the seed: the user-mode kernel runs all of them.
some_under_emulation() {
    if [ "$MACHINE" = um ] || [ "$DEPTH" = full ]; then cat; else some_of "$1" "$2"; fi
}

# some_of LABEL COUNT: passes on COUNT lines of stdin in their order, chosen by the seed.
some_of() {
    awk -v seed="$(rand "$1" 0 65535)" -v want="$2" '
        { line[NR] = $0 }
        END { srand(seed); for (i = 1; i <= NR; i++) if (rand() * (NR - i + 1) < want) { print line[i]; want-- } }'
}

# The case's Nth disk (from 0) as the machine provides it, independent of the order in which the kernel found the disks.
machine_disk() {
    local block
    if [ "$MACHINE" = um ]; then
        local letters=abcdefgh
        echo "/dev/ubd${letters:$1:1}"
        return
    fi
    for block in /sys/block/vd*; do
        if [ "$(cat "$block/serial")" = "disk$1" ]; then
            echo "/dev/${block##*/}"
            return
        fi
    done
    fail "there is no disk $1"
}

# The case's Nth disk. If the case delays it, the delaying device on top.
disk() {
    if dmsetup info "tidemark-test-disk$1" >/dev/null 2>&1; then
        dm_node "tidemark-test-disk$1"
    else
        machine_disk "$1"
    fi
}

# Puts dm-delay on the disks that the case's description delays: "NUMBER:READ:WRITE:FLUSH ...", in milliseconds.
delay_disks() {
    local word number read write flush device hidden=
    for word in $TIDEMARK_DELAYS; do
        IFS=: read -r number read write flush <<<"$word"
        device=$(machine_disk "$number")
        dmsetup create --noudevsync "tidemark-test-disk$number" \
            --table "0 $(blockdev --getsz "$device") delay $device 0 $read $device 0 $write $device 0 $flush"
        hidden+="\"r|^$device\$|\" "
    done
    # LVM finds its label on both devices and must use the slow one.
    [ -z "$hidden" ] || mkdir -p /etc/lvm
    [ -z "$hidden" ] || echo "devices { global_filter = [ ${hidden// /, } \"a|.*|\" ] }" >/etc/lvm/lvmlocal.conf
}

# Creates a marker for the host. At its marker, a phase that ends in a power cut loses power.
marker() { : >"/case/marker.$1"; }

# Asks the host for the power cut, and waits for it.
cut_here() {
    marker "$1"
    sleep 600
    fail "the power was not cut"
}

# Updates the nodes below /dev/mapper. No udevd runs here unless the case starts it.
settle() {
    if [ -e /run/udev/control ]; then
        udevadm settle --timeout=60
    else
        dmsetup mknodes
    fi
}

# dm_node NAME: the /dev/dm-N of a device-mapper device.
dm_node() { echo "/dev/dm-$(dmsetup info -c --noheadings -o minor "$1" | tr -d ' ')"; }

# is_preserved ORIGIN: a copy is in progress, and still preserves originals of some ranges.
is_preserved() {
    local name number
    name=$(dmsetup info -c --noheadings -o name "$1")
    number=$(dmsetup info -c --noheadings -o major,minor "$name#preserve" 2>/dev/null) || return 1
    dmsetup table "$name" | grep -q " $number "
}

# The SHA-256 of a file or device, read with direct I/O if possible.
digest() {
    local bytes
    if [ -b "$1" ]; then
        dd if="$1" bs=1M iflag=direct status=none | sha256sum | cut -d' ' -f1
    else
        sha256sum "$1" | cut -d' ' -f1
    fi
}

assert_same() { # WHAT LEFT RIGHT: two values
    [ "$2" = "$3" ] || fail "$1: '$2' is not '$3'"
}

assert_identical() { # LEFT RIGHT: two files or devices, byte for byte
    cmp "$1" "$2" || fail "$1 and $2 differ"
}

# assert_status STATUS COMMAND...: runs COMMAND with its output in the log, and checks its exit status.
assert_status() {
    local want=$1 got=0
    shift
    "$@" || got=$?
    [ "$got" = "$want" ] || fail "exit status $got, not $want, of: $*"
}

# refused STATUS WORDS COMMAND...: COMMAND fails with this status, and its output, which is in /run/out, has these words.
refused() {
    local wanted=$1 words=$2 status=0
    shift 2
    "$@" >/run/out 2>&1 || status=$?
    [ "$status" = "$wanted" ] || { cat /run/out; fail "exit status $status, expected $wanted: $*"; }
    grep -q -- "$words" /run/out || { cat /run/out; fail "no message says '$words': $*"; }
}

# wait_until SECONDS COMMAND...: repeats COMMAND until it succeeds.
wait_until() {
    local end=$((SECONDS + $1))
    shift
    until "$@"; do
        [ "$SECONDS" -lt "$end" ] || fail "gave up waiting for: $*"
        sleep 0.1
    done
}

# assert_no_tidemark_left [VOLUME...]: nothing of Tidemark is left: no device except the named attached volumes, no loop
# device, no zram, no job record.
assert_no_tidemark_left() {
    local left volume
    left=$(dmsetup info -c --noheadings -o uuid,name 2>/dev/null | grep 'TIDEMARK-' || true)
    for volume in "$@"; do
        left=$(printf '%s' "$left" | grep -v "^TIDEMARK-$volume-volume-[0-9a-f]*:$volume\$" || true)
    done
    [ -z "$left" ] || fail "device-mapper devices are left: $left"
    left=$(losetup -a | grep -i tidemark || true)
    [ -z "$left" ] || fail "loop devices are left: $left"
    for left in /sys/block/zram*/disksize; do
        [ ! -e "$left" ] || [ "$(cat "$left")" = 0 ] || fail "a RAM head is left: $left"
    done
    [ "$(kernel_hurries)" = 0 ] || fail "RCU grace periods are still expedited: /sys/kernel/rcu_expedited"
    left=$(find /run/tidemark -type f ! -name '*.lock' 2>/dev/null | head -n 5 || true)
    [ -z "$left" ] || fail "jobs are left: $left"
}

# The value of /sys/kernel/rcu_expedited now (0: normal grace periods), and while a copy holds writers. A kernel for one
# processor does not have this file.
hurry_of_a_copy=$(if [ -e /sys/kernel/rcu_expedited ]; then echo 21581; else echo 0; fi)
kernel_hurries() { cat /sys/kernel/rcu_expedited 2>/dev/null || echo 0; }

# The names of suspended device-mapper devices.
suspended_devices() { dmsetup info -c --noheadings -o name,suspended | awk -F: '$2 == "Suspended" { print $1 }'; }

# fill TARGET BYTES LABEL: fills a file or device from the seed. Equal arguments give equal bytes.
fill() {
    openssl enc -aes-128-ctr -nosalt -pbkdf2 -pass "pass:$SEED-$3" -in /dev/zero 2>/dev/null \
        | dd of="$1" bs=1M count="$2" iflag=count_bytes,fullblock conv=notrunc,fsync status=none || true
}

# A real udevd, with the rules of device-mapper and LVM, as on a host.
start_udevd() {
    systemd-udevd --daemon
    udevadm trigger --action=add --type=subsystems
    udevadm trigger --action=add --type=devices
    udevadm settle --timeout=60
}

# PostgreSQL runs as its own user: pg_init FOLDER, pg_start FOLDER, pg_stop FOLDER; then psql -h /tmp -U postgres.
as_postgres() { setpriv --reuid=postgres --regid=postgres --clear-groups env HOME=/tmp LC_ALL=C.UTF-8 PATH="$PATH" "$@"; }
pg_init() {
    mkdir -p "$1"
    chown postgres:postgres "$1"
    as_postgres initdb --pgdata="$1" --username=postgres --auth=trust --no-instructions --data-checksums >/tmp/initdb.log 2>&1 \
        || { cat /tmp/initdb.log; fail "initdb failed"; }
    printf '%s\n' "listen_addresses = ''" "unix_socket_directories = '/tmp'" "shared_buffers = 32MB" \
        "max_connections = 20" >>"$1/postgresql.conf"
}
pg_start() { as_postgres pg_ctl --pgdata="$1" --wait --timeout=120 --log="$1/server.log" start >/dev/null || { cat "$1/server.log"; fail "PostgreSQL failed to start"; }; }
pg_stop() { as_postgres pg_ctl --pgdata="$1" --wait --timeout=120 --mode=fast stop >/dev/null; }
