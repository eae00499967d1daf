# A disk that can be made slow while in use. Sourced after lib.sh.
# shellcheck shell=bash

# make_slow DEVICE: puts /dev/mapper/tidetest-slow on DEVICE, without delay until `slow` is called.
make_slow() {
    SLOW_ON=$1
    dmsetup create --noudevsync tidetest-slow --table "$(slow_table 0 0)"
    dmsetup mknodes
}

slow_table() { echo "0 $(blockdev --getsz "$SLOW_ON") delay $SLOW_ON 0 0 $SLOW_ON 0 $1 $SLOW_ON 0 $2"; }

# slow WRITE FLUSH: delays writes and flushes by these milliseconds from now on.
slow() {
    dmsetup load tidetest-slow --table "$(slow_table "$1" "$2")"
    dmsetup suspend --nolockfs --noflush tidetest-slow
    dmsetup resume --noudevsync tidetest-slow
}

# longest COMMAND...: repeats COMMAND while /run/measure exists; writes its longest time in ms to /run/longest.
longest() {
    local start took worst=0
    while [ -e /run/measure ]; do
        start=${EPOCHREALTIME/./}
        "$@" || { echo "failed: $*" >/run/longest; return 1; }
        took=$(((${EPOCHREALTIME/./} - start) / 1000))
        [ "$took" -le "$worst" ] || worst=$took
        echo "$worst" >/run/longest
        sleep 0.05
    done
}

measure() { touch /run/measure; longest "$@" & MEASURE=$!; }
# Ends the measurement; $WORST is the longest time.
measured() {
    rm -f /run/measure
    wait "$MEASURE" || fail "$(cat /run/longest)"
    WORST=$(cat /run/longest)
}
