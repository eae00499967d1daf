# Sourced by the hooks: a keeper process that holds what --hook-before has begun, until --hook-after ends it.
#
# The keeper ends it also if the Tidemark that runs the hook is gone (TIDEMARK_PID; it may have been killed), and when
# the limit runs out. So nothing stays locked, whatever is killed:
# - Tidemark: the keeper notices within half a second;
# - the hook: the keeper is in a session of its own and keeps watching; Tidemark runs --hook-after in any case;
# - the keeper: what it holds is a connection, which the server ends, or --hook-after ends it itself.
#
# A hook defines these functions and calls `main "$@"`:
#   hook_open    begins; runs in the keeper. A failure ends the keeper, after hook_drop.
#   hook_alive   succeeds as long as what was begun lasts; runs in the keeper, some times a second.
#   hook_close   ends it, as --hook-after asks; runs in the keeper.
#   hook_drop    ends it, as nothing can ask any more; runs in the keeper.
#   hook_orphan  optional: ends what a killed keeper has left; runs in --hook-after.
#   hook_option  optional: takes an option of its own in $1 and its value in $2, or fails.
# hook_alive and hook_drop are defined here for a hook that holds the session of a client (open_client).
# A hook that holds nothing defines hook_once instead, which --hook-before runs without a keeper.
#
# Files of the state: `wanted` until --hook-after comes; `keeper`, its process; `open` when hook_open has succeeded;
# `closed` when hook_close has; `failed` if --hook-before has reported that the keeper failed; `log` of the keeper.
# shellcheck shell=sh

set -u
umask 077

say() { printf '%s: %s\n' "$hook" "$*" >&2; }
die() { say "$*"; exit 1; }

usage() {
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

# A directory that no other user can write to, with a directory for each session.
state_directory() {
    if [ "$(id -u)" = 0 ]; then
        states=/run/tidemark-hooks
    else
        states=${XDG_RUNTIME_DIR:-/tmp}/tidemark-hooks-$(id -u)
    fi
    [ -d "$states" ] || mkdir -m 0700 "$states" 2>/dev/null || [ -d "$states" ] || die "cannot create $states"
    [ ! -L "$states" ] && [ -O "$states" ] || die "$states belongs to another user: remove it"
    tidemark=$(started "$TIDEMARK_PID") || die "there is no process $TIDEMARK_PID"
    # Named after one process: its number may have been that of another one before.
    state=$states/$hook$name.$TIDEMARK_PID.$tidemark
}

# Removes the states of processes that are gone, with all of their keepers: everything was killed at once.
remove_old_states() {
    for old in "$states"/*; do
        process=${old##*/}
        start=${process##*.}
        process=${process%.*}
        process=${process##*.}
        # Only what has the form of a state, and no keeper that is still ending something.
        case "$process$start" in '' | *[!0-9]*) continue ;; esac
        [ "$(started "$process")" = "$start" ] || keeper_runs "$old" || rm -rf "$old"
    done
}

# The start time of a process, to recognize it; fails if it is gone, or a zombie.
started() {
    stat=''
    while read -r line || [ -n "$line" ]; do stat="$stat $line"; done 2>/dev/null <"/proc/$1/stat"
    # The command's name, in parentheses, may contain spaces and ends of lines. The state follows: field 3 in proc(5).
    stat=${stat##*) }
    set -f
    # shellcheck disable=SC2086
    set -- $stat
    set +f
    case "${1:-X}" in Z | X) return 1 ;; esac
    echo "${20}"
}

runs() { started "$1" >/dev/null; }

now() { read -r uptime _ </proc/uptime && echo "${uptime%%.*}"; }

# Starts a client that reads its statements from file descriptor 9. Only the keeper writes there, so the client ends
# with the keeper.
open_client() {
    mkfifo "$state/statements" || return 1
    # Open for both, so that neither side waits for the other: the keeper could be killed meanwhile.
    exec 9<>"$state/statements"
    # This shell opens the files: the client may be another user. `exec` keeps no duplicate of what it closes.
    (exec <"$state/statements" >"$state/answers" 2>&1 9>&- && exec "$@") &
    session=$!
}

# Waits for the end of the client, which has all of its statements.
client_ended() {
    while runs "$session"; do
        is_wanted || return 1
        sleep 0.05
    done
    wait "$session"
}

# Waits for a line of the client's output.
answered() {
    until grep -q -x "$1" "$state/answers"; do
        if ! hook_alive || ! is_wanted; then
            # It may have been the last that the client has said.
            ! grep -q -x "$1" "$state/answers" || return 0
            cat "$state/answers" >&2
            return 1
        fi
        sleep 0.05
    done
}

hook_alive() { runs "$session"; }

hook_drop() {
    exec 9>&-
    [ -z "${session:-}" ] || kill "$session" 2>/dev/null
}

has_tidemark() { [ "$(started "$TIDEMARK_PID")" = "$tidemark" ]; }

# While the hook waits for the server: whether that is still wanted.
is_wanted() {
    case "$phase" in
        once) has_tidemark && [ "$(now)" -lt "$deadline" ] ;;
        opening) [ -e "$state/wanted" ] && has_tidemark && [ "$(now)" -lt "$deadline" ] ;;
        closing) [ "$(now)" -lt "$deadline" ] ;;
    esac
}

keeper_runs() { # STATE
    [ -e "$1/keeper" ] || return 1
    read -r keeper_id keeper_start <"$1/keeper"
    [ "$(started "$keeper_id")" = "$keeper_start" ]
}

# Sets $deadline, in seconds of the machine's uptime. Seconds are cut off, so this is at least the time.
wait_at_most() { deadline=$(($(now) + $1 + 1)); }

# The body of the keeper. Its standard error is the log.
keep() {
    tidemark=${state##*.}
    { echo "$$ $(started $$)" >"$state/keeper.new" && mv "$state/keeper.new" "$state/keeper"; } || exit 1
    # --hook-after may have come already, because --hook-before was killed. It has removed `wanted`, and looks for
    # `keeper` only then.
    [ -e "$state/wanted" ] || exit 1
    wait_at_most "$limit"
    trap 'give_up "the keeper was asked to stop"' TERM INT HUP
    phase=opening
    hook_open || give_up "it could not be begun"
    echo open >"$state/open"
    while [ -e "$state/wanted" ]; do
        has_tidemark || give_up "Tidemark is gone"
        [ "$(now)" -lt "$deadline" ] || give_up "its limit of $limit s is over"
        hook_alive || give_up "it ended by itself before the instant was over"
        sleep 0.2
    done
    phase=closing
    wait_at_most 60
    hook_close || give_up "it could not be ended as asked"
    echo closed >"$state/closed"
    # If --hook-after was killed with Tidemark, it removes nothing any more.
    has_tidemark || rm -rf "$state"
    exit 0
}

give_up() {
    trap '' TERM INT HUP
    say "$1"
    hook_drop
    # Without Tidemark no --hook-after comes.
    has_tidemark || rm -rf "$state"
    exit 1
}

before() {
    remove_old_states
    mkdir "$state" 2>/dev/null || die "--hook-before was run twice: use --name for the second"
    : >"$state/wanted" && : >"$state/log" || die "cannot write to $state"
    # setsid: the keeper outlives a hook that is killed with its process group. Nothing of Tidemark's is inherited.
    HOOK_STATE=$state setsid "$0" keep "$@" </dev/null >>"$state/log" 2>&1 &
    keeper=$!
    while [ ! -e "$state/open" ]; do
        if ! runs "$keeper" && [ ! -e "$state/open" ]; then
            cat "$state/log" >&2
            touch "$state/failed"
            exit 1
        fi
        sleep 0.05
    done
}

after() {
    [ -d "$state" ] || die "nothing is to be ended: --hook-before of this process has not run"
    rm -f "$state/wanted"
    while keeper_runs "$state"; do sleep 0.05; done
    if [ -e "$state/closed" ] || [ -e "$state/failed" ]; then
        rm -rf "$state"
        return
    fi
    cat "$state/log" >&2
    ! command -v hook_orphan >/dev/null || hook_orphan
    rm -rf "$state"
    die "what --hook-before began did not last until the instant was over"
}

# Without a keeper.
once() {
    tidemark=$(started "$TIDEMARK_PID") || die "there is no process $TIDEMARK_PID"
    wait_at_most "$limit"
    phase=once
    hook_once
}

main() {
    action=${1:-}
    case "$action" in before | after | keep) shift ;; *) usage ;; esac
    [ -n "${TIDEMARK_PID:-}" ] || die "TIDEMARK_PID is not set: run this as --hook-before and --hook-after of Tidemark"
    options='' name=''
    while [ "$#" -gt 0 ]; do
        [ "$#" -ge 2 ] || usage
        case "$1" in
            --limit) limit=$2 ;;
            --name) name=.$2 ;;
            *) command -v hook_option >/dev/null && hook_option "$1" "$2" || usage ;;
        esac
        options="$options $(quoted "$1") $(quoted "$2")"
        shift 2
    done
    case "$name" in */*) die "--name takes a name without a slash" ;; esac
    case "$limit" in '' | *[!0-9]*) die "--limit takes a number of seconds" ;; esac
    if command -v hook_once >/dev/null; then
        [ "$action" != before ] || once
        return
    fi
    case "$action" in
        keep) state=$HOOK_STATE && keep ;;
        before) state_directory && eval "before $options" ;;
        after) state_directory && after ;;
    esac
}

quoted() { printf "'%s'" "$(printf '%s' "$1" | sed "s/'/'\\\\''/g")"; }
