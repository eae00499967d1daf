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
#   hook_alive   succeeds as long as what was begun lasts; runs in the keeper, twice a second.
#   hook_close   ends it, as --hook-after asks; runs in the keeper.
#   hook_drop    ends it, as nobody can ask any more; runs in the keeper.
#   hook_orphan  optional: ends what a killed keeper has left; runs in --hook-after.
#   hook_option  optional: takes an option of its own in $1 and its value in $2, or fails.
# shellcheck shell=sh

set -u
umask 077

say() { printf '%s: %s\n' "$hook" "$*" >&2; }
die() { say "$*"; exit 1; }

usage() {
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

# A directory that no other user can write to.
state_directory() {
    if [ "$(id -u)" = 0 ]; then
        state=/run/tidemark-hooks
    else
        state=${XDG_RUNTIME_DIR:-/tmp}/tidemark-hooks-$(id -u)
    fi
    [ -d "$state" ] || mkdir -m 0700 "$state" 2>/dev/null || [ -d "$state" ] || die "cannot create $state"
    [ ! -L "$state" ] && [ -O "$state" ] || die "$state belongs to another user: remove it"
    # Named after one process: its number may have been that of another one before.
    state=$state/$hook$name.$TIDEMARK_PID.$(started "$TIDEMARK_PID")
}

# The start time of a process, to recognize it; fails if it is gone, or a zombie.
started() {
    # The command's name, in parentheses, may contain spaces; the state follows.
    sed -n 's/.*) \([^ZX] .*\)/\1/p' "/proc/$1/stat" 2>/dev/null | cut -d ' ' -f 20 | grep .
}

now() { cut -d . -f 1 /proc/uptime; }

has_tidemark() { [ "$(started "$TIDEMARK_PID")" = "$tidemark" ]; }

# While the keeper waits for the server: whether that is still wanted.
is_wanted() {
    case "$phase" in
        opening) [ ! -e "$state/close" ] && has_tidemark && [ "$(now)" -lt "$deadline" ] ;;
        closing) [ "$(now)" -lt "$deadline" ] ;;
    esac
}

keeper_runs() {
    [ -e "$state/keeper" ] || return 1
    read -r keeper_id keeper_start <"$state/keeper"
    [ "$(started "$keeper_id")" = "$keeper_start" ]
}

# The body of the keeper. Its standard error is the log.
keep() {
    tidemark=$(started "$TIDEMARK_PID") || exit 1
    # Fails if --hook-after has come already, because --hook-before was killed.
    { echo "$$ $(started $$)" >"$state/keeper.new" && mv "$state/keeper.new" "$state/keeper"; } || exit 1
    deadline=$(($(now) + limit))
    trap 'give_up "the keeper was asked to stop"' TERM INT HUP
    phase=opening
    hook_open || give_up "it could not be begun"
    echo open >"$state/open"
    while [ ! -e "$state/close" ]; do
        hook_alive || give_up "it ended by itself before the instant was over"
        has_tidemark || give_up "Tidemark is gone"
        [ "$(now)" -lt "$deadline" ] || give_up "its limit of $limit s is over"
        sleep 0.2
    done
    phase=closing
    deadline=$(($(now) + 60))
    hook_close || give_up "it could not be ended as asked"
    echo closed >"$state/closed"
    exit 0
}

give_up() {
    say "$1"
    hook_drop
    # Without Tidemark no --hook-after comes.
    has_tidemark || rm -rf "$state"
    exit 1
}

before() {
    mkdir "$state" 2>/dev/null || die "--hook-before was run twice: use --name for the second"
    : >"$state/log"
    # setsid: the keeper outlives a hook that is killed with its process group. Nothing of Tidemark's is inherited.
    HOOK_STATE=$state setsid "$0" keep "$@" </dev/null >>"$state/log" 2>&1 &
    keeper=$!
    while [ ! -e "$state/open" ]; do
        if ! kill -0 "$keeper" 2>/dev/null; then
            cat "$state/log" >&2
            touch "$state/failed"
            exit 1
        fi
        sleep 0.05
    done
}

after() {
    [ -d "$state" ] || die "nothing is to be ended: --hook-before of this process has not run"
    touch "$state/close"
    while keeper_runs; do sleep 0.05; done
    if [ -e "$state/closed" ] || [ -e "$state/failed" ]; then
        rm -rf "$state"
        return
    fi
    cat "$state/log" >&2
    ! command -v hook_orphan >/dev/null || hook_orphan
    rm -rf "$state"
    die "what --hook-before began did not last until the instant was over"
}

main() {
    action=${1:-}
    [ "$#" = 0 ] || shift
    [ -n "${TIDEMARK_PID:-}" ] || die "TIDEMARK_PID is not set: run this as --hook-before and --hook-after of Tidemark"
    options='' name=''
    while [ "$#" -gt 0 ]; do
        case "$1" in
            --limit) limit=${2:-} ;;
            --name) name=.${2:-} ;;
            *) command -v hook_option >/dev/null && hook_option "$1" "${2:-}" || usage ;;
        esac
        [ "$#" -ge 2 ] || usage
        options="$options $(quoted "$1") $(quoted "$2")"
        shift 2
    done
    case "$name" in */*) die "--name takes a name without a slash" ;; esac
    case "$limit" in '' | *[!0-9]*) die "--limit takes a number of seconds" ;; esac
    case "$action" in
        keep) state=$HOOK_STATE && keep ;;
        before) state_directory && eval "before $options" ;;
        after) state_directory && after ;;
        *) usage ;;
    esac
}

quoted() { printf "'%s'" "$(printf '%s' "$1" | sed "s/'/'\\\\''/g")"; }
