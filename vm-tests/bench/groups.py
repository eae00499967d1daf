"""Measures the freeze of snapshots of 1, 2, 4 and 8 volumes, in rounds. Usage: groups.py ROUNDS RESULT."""

import json
import os
import statistics
import subprocess
import sys
import threading

SIZES = [1, 2, 4, 8]
MOST = 3.0


def append(volume):
    """A program that makes 4 KiB durable a hundred times a second."""
    file = os.open(f"/mnt/{volume}/log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    while True:
        os.pwrite(file, bytes(4096), 0)
        os.fdatasync(file)
        threading.Event().wait(0.01)


def tidemark(*words):
    return subprocess.run(["tidemark", *words], check=True, capture_output=True, text=True).stdout


def frozen_ms(volumes, name):
    words = ["--name", name, "--store", "/mnt/stores", "--store-size", "4MiB", "--freeze-budget", "10s", "--json"]
    lines = [json.loads(line) for line in tidemark("snapshot", "create", *volumes, *words).splitlines()]
    for volume in volumes:
        tidemark("snapshot", "delete", f"{volume}@{name}", "--yes")
    return next(line["report"]["frozen_ms"] for line in lines if line["type"] == "result")


def main():
    rounds, result = int(sys.argv[1]), sys.argv[2]
    volumes = [f"v{number}" for number in range(1, max(SIZES) + 1)]
    for volume in volumes:
        threading.Thread(target=append, args=(volume,), daemon=True).start()
    times = {size: [] for size in SIZES}
    for round in range(rounds):
        for size in SIZES:
            times[size].append(frozen_ms(volumes[:size], f"r{round}"))
    medians = {size: statistics.median(times[size]) for size in SIZES}
    for size in SIZES:
        print(f"    {size} volumes: frozen for {medians[size]} ms ({min(times[size])} to {max(times[size])})")
    ratio = medians[max(SIZES)] / max(medians[1], 1)
    print(f"    {max(SIZES)} volumes: {ratio:.1f} times as long as one")
    with open(result, "w", encoding="utf-8") as file:
        json.dump({"frozen_ms": times, "ratio": ratio}, file)
    if ratio > MOST:
        sys.exit(f"more than {MOST} times")


main()
