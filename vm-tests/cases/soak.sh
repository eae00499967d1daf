# Random copies from seeds, compared with what was captured at their instants: see vm-tests/soak/soak.py.
# Without seeds of its own a guest plays the same ones every time, so that a run's result is that of what it tests; a full
# run, which is before a release, plays new ones, that begin with the run's seed.
# shellcheck shell=bash
begin=0
if [ "$DEPTH" = full ]; then begin=$SEED; fi
first=${SOAK_FIRST:-$((begin + SOAK_OFFSET))}
export SOAK_LVM
exec python3 "$REPO/vm-tests/soak/soak.py" "$first" "${SOAK_LAST:-$((first + ${SOAK_COUNT:-1000} - 1))}" "$SOAK_SECONDS" /case
