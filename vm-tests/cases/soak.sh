# Random copies from seeds, compared with the capture of their instants: see vm-tests/soak/soak.py. Unless seeds are
# given, each guest plays the same ones every time, so that a change of the result comes from the code. A full run,
# before a release, plays new seeds that start at the run's seed.
# shellcheck shell=bash
begin=0
if [ "$DEPTH" = full ]; then begin=$SEED; fi
first=${SOAK_FIRST:-$((begin + SOAK_OFFSET))}
export SOAK_LVM
exec python3 "$REPO/vm-tests/soak/soak.py" "$first" "${SOAK_LAST:-$((first + ${SOAK_COUNT:-1000} - 1))}" "$SOAK_SECONDS" /case
