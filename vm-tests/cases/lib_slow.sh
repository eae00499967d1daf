# A disk that can be made slow while it is in use. Sourced after lib.sh.
# shellcheck shell=bash

# make_slow DEVICE: /dev/mapper/tidetest-slow over it, fast until `slow` says otherwise.
make_slow() {
    SLOW_ON=$1
    dmsetup create --noudevsync tidetest-slow --table "$(slow_table 0 0)"
    dmsetup mknodes
}

slow_table() { echo "0 $(blockdev --getsz "$SLOW_ON") delay $SLOW_ON 0 0 $SLOW_ON 0 $1 $SLOW_ON 0 $2"; }

# slow WRITE FLUSH: from now on these take so many milliseconds.
slow() {
    dmsetup load tidetest-slow --table "$(slow_table "$1" "$2")"
    dmsetup suspend --nolockfs --noflush tidetest-slow
    dmsetup resume --noudevsync tidetest-slow
}

# longest COMMAND...: again and again while /run/measure is there; the slowest in milliseconds goes to /run/longest.
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
# The slowest is in $WORST then.
measured() {
    rm -f /run/measure
    wait "$MEASURE" || fail "$(cat /run/longest)"
    WORST=$(cat /run/longest)
}
