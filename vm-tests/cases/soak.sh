# Random copies from seeds, compared with what was captured at their instants: see vm-tests/soak/soak.py.
# Without seeds of its own a guest plays those that begin with the run's.
# shellcheck shell=bash
first=${SOAK_FIRST:-$((SEED + SOAK_OFFSET))}
exec python3 "$REPO/vm-tests/soak/soak.py" "$first" "${SOAK_LAST:-$((first + 999))}" "$SOAK_SECONDS" /case
