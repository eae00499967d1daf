"""Copies of several volumes from one instant, against writers whose later write depends on the earlier one.

Usage: copy_group.py DIRECTORY ROUNDS PAIR [OPTION...]: copies ROUNDS times the volumes of PAIR into DIRECTORY, and
reads what the copies hold. A PAIR is LOG=DIR:DATA=DIR, the volumes and the mount points of their filesystems. The writer
writes each number to the log, and then to the data; each write is durable before the next begins. So at any one instant
the log is at the number of the data, or one further.
"""

import json
import mmap
import os
import subprocess
import sys
import threading

BLOCK = 4096


class Failure(Exception):
    pass


class Writer(threading.Thread):
    def __init__(self, pair):
        super().__init__(daemon=True)
        self.sides = [side.split("=") for side in pair.split(":")]
        self.number, self.error = 0, None

    def run(self):
        try:
            self.write()
        except OSError as error:
            self.error = error

    def write(self):
        buffer = mmap.mmap(-1, BLOCK)
        files = [os.open(f"{at}/number", os.O_WRONLY | os.O_CREAT | os.O_DIRECT | os.O_SYNC) for _, at in self.sides]
        while True:
            number = self.number + 1
            buffer[:20] = b"%020d" % number
            for file in files:
                os.pwrite(file, buffer, 0)
            self.number = number


def read(image):
    at = "/run/copied"
    os.makedirs(at, exist_ok=True)
    # Not read-only: the filesystem replays its log, as after a power cut.
    kind = subprocess.run(["blkid", "-o", "value", "-s", "TYPE", image], capture_output=True, text=True).stdout.strip()
    options = "loop,nouuid" if kind == "xfs" else "loop"
    subprocess.run(["mount", "-t", kind, "-o", options, image, at], check=True)
    try:
        with open(f"{at}/number", "rb") as file:
            return int(file.read(20))
    finally:
        subprocess.run(["umount", at], check=True)


def copy(volumes, directory, options):
    words = ["tidemark", "copy", *volumes, directory, "--format", "raw", "--json", *options]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200)
    if done.returncode != 0:
        raise Failure(f"{words} returned {done.returncode}: {done.stderr}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def main(directory, rounds, pair, *options):
    writer = Writer(pair)
    writer.start()
    while writer.number < 10:
        if writer.error:
            raise Failure(str(writer.error))
    volumes, last, frozen = [volume for volume, _ in writer.sides], 0, []
    for round in range(int(rounds)):
        lines = copy(volumes, directory, options)
        report = next(line["report"] for line in lines if line["type"] == "result")
        origins = [f"/dev/mapper/{volume}" for volume in volumes]
        if [one["origin"] for one in report["origins"]] != origins or any(one["error"] for one in report["origins"]):
            raise Failure(f"the report: {report}")
        if {one["copy"]["instant"]["utc"] for one in report["origins"]} != {report["instant"]["utc"]}:
            raise Failure(f"instants: {report}")
        of_origin = {line.get("origin") for line in lines if line.get("event") == "phase" and line["phase"] == "data"}
        if of_origin != set(origins):
            raise Failure(f"progress of {of_origin}")
        frozen.append(report["instant"]["frozen_ms"])
        log, data = (read(f"{directory}/{volume}.img") for volume in volumes)
        if not data <= log <= data + 1:
            raise Failure(f"round {round}: {volumes} are at {log} and {data}: not one instant")
        if data <= last or writer.error:
            raise Failure(f"round {round}: the writer stands still at {data}: {writer.error}")
        last = data
    print(f"    {rounds} instants, the last at {last} of {writer.number}, frozen for {sorted(frozen)} ms")


try:
    main(*sys.argv[1:])
except Failure as failure:
    print(f"FAILED: {failure}", flush=True)
    sys.exit(1)
