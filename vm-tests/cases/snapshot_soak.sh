# Random programs of kept snapshots, one for each seed: see snapshots.py.
# shellcheck shell=bash
. "$REPO/vm-tests/cases/lib_load.sh"

make_filesystem ext4 "$(disk 1)" /mnt/stores
first=${SOAK_FIRST:-1} last=${SOAK_LAST:-1000}
for seed in $(seq "$first" "$last"); do
    [ "$SECONDS" -lt "$SOAK_SECONDS" ] || break
    dd if=/dev/zero of="$(disk 0)" bs=1M oflag=direct status=none 2>/dev/null || true
    tidemark attach "$(disk 0)" --name data >/dev/null
    echo "{\"seed\": $seed, \"origin\": \"data\"}"
    if ! timeout -s KILL 300 python3 "$REPO/vm-tests/cases/snapshots.py" "$seed" "$SOAK_STEPS" "$(disk 0)" /mnt/stores >/run/program; then
        cat /run/program
        python3 -c 'import json, sys; print(json.dumps({"seed": int(sys.argv[1]), "copies": [], "failure": sys.stdin.read()[-900:]}))' \
            "$seed" </run/program >>/case/results
        exit 1
    fi
    assert_same "devices left" "$(dmsetup ls | grep -c '^data[@#]' || true)" 0
    assert_same "stores left" "$(find /mnt/stores -name '*.store')" ""
    tidemark detach data >/dev/null
    counts=$(sed -n 's/^counts //p' /run/program)
    echo "{\"seed\": $seed, \"copies\": [], \"counts\": $counts, \"failure\": \"\"}" >>/case/results
done
