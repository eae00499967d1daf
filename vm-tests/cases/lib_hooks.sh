# A hook with a keeper, and a copy of a file around which it runs: the hook cannot tell it from one of a device. A
# script sets
#   inside   the command that runs another one where the hook is to run (an array)
#   hook     the hook's path, as the shell reads it
#   before   the arguments of both actions
# and defines is_held, which succeeds while what the hook has begun lasts.
# shellcheck shell=bash

# The path has a space, as a user's may.
install_hooks() { # NAME
    mkdir -p '/run/my hooks'
    cp "$REPO"/hooks/* '/run/my hooks'
    hook="'/run/my hooks/$1'"
    head -c 4M /dev/urandom >/run/origin
}

copy() { # BEFORE [OPTION...]
    local arguments=$1
    shift
    "${inside[@]}" tidemark copy /run/origin /run/copy.tdm --yes --hook-before "$hook before $arguments" \
        --hook-after "$hook after $arguments" "$@" 2>/run/copy.err
}

# Starts a copy that takes long, and waits until the hook has begun. Sets $copy.
begin() { # BEFORE
    copy "$1" --rate 64KiB --segment 64KiB &
    wait_until 30 has_begun
    copy=$(pgrep -f '^tidemark copy /run/origin')
    # A slow machine may have reached a short limit by now.
    [[ $1 == *--limit* ]] || is_held || fail "the hook has begun, and nothing is held"
}
has_begun() { [ -n "$(find /run/tidemark-hooks -name open)" ]; }
keeper() { pgrep -o -f "^/bin/sh /run/my hooks/.* keep"; }

# The copy ends with this status and says this (or nothing, if empty), and nothing is held any more.
ends() { # STATUS WORDS
    local status=0
    wait %% || status=$?
    assert_same "status of the copy" "$status" "$1"
    if [ -n "$2" ]; then
        grep -q "$2" /run/copy.err || fail "the copy does not say '$2'"
    else
        ! grep -q 'hook-after' /run/copy.err || fail "the copy complains about the hook"
    fi
    nothing_left
}
is_free() { ! is_held; }
no_state() { [ -z "$(find /run/tidemark-hooks -mindepth 1)" ]; }
nothing_left() {
    wait_until 30 is_free
    wait_until 30 no_state
    [ -z "$(keeper)" ] || fail "a keeper is left"
}

# Whatever is killed between --hook-before and --hook-after. (tests/hooks.rs has further failures, which depend less on
# the hook.)
survives_failures() {
    note "a copy that succeeds"
    copy "$before" || fail "the copy failed"
    ! grep -q 'hook' /run/copy.err || fail "the copy complains about the hook"
    nothing_left

    note "a signal"
    begin "$before"
    kill -TERM "$copy"
    ends 130 ""

    note "Tidemark is killed"
    begin "$before"
    kill -KILL "$copy"
    ends 137 ""

    note "the keeper is killed"
    begin "$before"
    kill -KILL "$(keeper)"
    kill -TERM "$copy"
    ends 130 "did not last"

    note "the limit"
    begin "$before --limit 3"
    wait_until 30 is_free
    kill -TERM "$copy"
    ends 130 "its limit of 3 s is over"

    note "--hook-after without --hook-before"
    assert_status 0 "${inside[@]}" tidemark copy /run/origin /run/copy.tdm --yes \
        --hook-after "$hook after $before" 2>/run/copy.err
    grep -q 'nothing is to be ended' /run/copy.err || fail "it did something"
    nothing_left
}
