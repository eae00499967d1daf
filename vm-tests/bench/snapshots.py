"""Measures first writes and reads of volumes with snapshots; see vm-tests/cases/bench_snapshots.sh."""

import json
import os
import statistics
import subprocess
import sys

COUNTS = (1, 2, 4, 8, 16)
ROUNDS = int(os.environ.get("TIDEMARK_BENCH_ROUNDS") or 1)
WRITES, READS = 600, 2000
PART = 24 << 20


def run(*words):
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        sys.exit(f"{words}: {done.stdout}")


def rate(device, kind, part, seed):
    """Operations per second, one at a time. No block is touched twice."""
    words = ["fio", "--name=x", f"--filename={device}", f"--rw=rand{kind}", "--bs=4k", "--direct=1", "--ioengine=psync"]
    words += [f"--offset={part * PART}", f"--size={PART}", f"--number_ios={READS if kind == 'read' else WRITES}"]
    words += [f"--randseed={seed}", "--output-format=json"] + (["--sync=dsync"] if kind == "write" else [])
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0][kind]["iops"]


class Tidemark:
    name, origin = "tidemark", "/dev/mapper/data"

    def create(self, number):
        run("tidemark", "snapshot", "create", "data", "--name", f"s{number}", "--store", "/mnt/stores", "--store-size", "40MiB")

    def device(self, number):
        return f"/dev/mapper/data@s{number}"

    def clear(self, count):
        run("tidemark", "snapshot", "delete", *[f"data@s{number}" for number in range(1, count + 1)], "--yes")


class Lvm:
    name, origin = "lvm", "/dev/mapper/bench-data"

    def create(self, number):
        run("lvcreate", "-q", "-y", "-s", "-c", "4k", "-L", "40m", "-n", f"s{number}", "bench/data")

    def device(self, number):
        return f"/dev/mapper/bench-s{number}"

    def clear(self, count):
        for number in range(1, count + 1):
            run("lvremove", "-q", "-y", f"bench/s{number}")


def main():
    peers = [Tidemark(), Lvm()]
    writes, reads = {}, {}
    for round_number in range(ROUNDS):
        made = 0
        for part, count in enumerate(COUNTS):
            for peer in peers if round_number % 2 == 0 else peers[::-1]:
                for number in range(made + 1, count + 1):
                    peer.create(number)
                found = rate(peer.origin, "write", part, round_number)
                writes.setdefault(peer.name, {}).setdefault(count, []).append(found)
                if count == 8:
                    for which, number in (("newest", 8), ("oldest", 1)):
                        found = rate(peer.device(number), "read", 4, round_number)
                        reads.setdefault(peer.name, {}).setdefault(which, []).append(found)
            made = count
        for peer in peers:
            peer.clear(made)
        print(f"round {round_number + 1} of {ROUNDS}", flush=True)
    print("4 KiB synchronous first writes per second, one at a time; cost relative to one snapshot")
    for name, of_peer in writes.items():
        medians = {count: statistics.median(found) for count, found in of_peer.items()}
        cells = [f"{count}: {value:6.0f} ({medians[1] / value:4.2f})" for count, value in medians.items()]
        print(f"  {name:9} " + "   ".join(cells))
    print("4 KiB reads per second through snapshots, 8 of them")
    for name, of_peer in reads.items():
        newest, oldest = (statistics.median(of_peer[which]) for which in ("newest", "oldest"))
        print(f"  {name:9} newest {newest:6.0f}   oldest {oldest:6.0f}   share {oldest / newest:4.2f}")
    with open(sys.argv[1], "w") as file:
        json.dump({"writes": writes, "reads": reads}, file)


main()
