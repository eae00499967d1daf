"""Snapshots of several volumes at one instant, against writers whose later write depends on the earlier one.

Usage: snapshot_group.py instants COUNT STORE-DIRECTORY PAIR... | snapshot_group.py kills STORE-DIRECTORY PAIR

A PAIR is LOG:DATA, two volumes with nothing mounted, or LOG=DIR:DATA=DIR with the mount points of their filesystems. A
writer writes each number to the log, and then to the data; each write is durable before the next begins. So at any one
instant the log is at the number of the data, or one further.
"""

import itertools
import json
import mmap
import os
import random
import subprocess
import sys
import threading
import time

BLOCK = 4096
# The points of a group of two volumes, at each of which its creation is killed. The first volume has a snapshot already,
# the second has none, and then the other way round.
STEPS = """
own create-data load-data resume-data create-view load-view resume-view create-keep load-keep resume-keep guard
load-volume freeze suspend activate instant switch resume thaw unguard expect
""".split()
ONCE = ["guard", "freeze", "instant", "thaw", "unguard"]
CAPTURE = [
    f"capture.{step}{number}.{at}"
    for step in STEPS
    for number in (["", "-2"] if step not in ONCE else [""])
    for at in ("before", "after")
]
BEFORE = """
snapshot.create.recorded snapshot.create.recorded:2 snapshot.store.named snapshot.store.named:2 snapshot.create.file
snapshot.create.file:2 snapshot.create.store snapshot.create.store:2
""".split()
UNDECIDED = ["snapshot.create.taken", "record.written"]
DECIDED = """
snapshot.group.committed snapshot.create.kept snapshot.create.kept:2 snapshot.group.closed snapshot.lead.alias
snapshot.lead.first snapshot.lead.second snapshot.show snapshot.show:2
""".split()


numbers = itertools.count()


class Failure(Exception):
    pass


class Writer(threading.Thread):
    def __init__(self, pair):
        super().__init__(daemon=True)
        self.sides = [side.partition("=")[::2] for side in pair.split(":")]
        self.number, self.error = 0, None

    def volumes(self):
        return [volume for volume, _ in self.sides]

    def run(self):
        try:
            self.write()
        except OSError as error:
            self.error = error

    def write(self):
        sides, buffer = [], mmap.mmap(-1, BLOCK)
        for volume, directory in self.sides:
            path = f"{directory}/number" if directory else f"/dev/mapper/{volume}"
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT | os.O_SYNC)
            sides.append((file, 0 if directory else os.lseek(file, 0, os.SEEK_END) - BLOCK))
        while True:
            number = self.number + 1
            buffer[:20] = b"%020d" % number
            for file, at in sides:
                os.pwrite(file, buffer, at)
            self.number = number

    def check(self, name):
        """The numbers in the snapshots of this name: one instant, and none before the last one that was seen."""
        log, data = (self.read(volume, directory, name) for volume, directory in self.sides)
        if not data <= log <= data + 1:
            raise Failure(f"{name}: {self.volumes()} are at {log} and {data}: not one instant")
        if self.error is not None:
            raise Failure(f"the writer of {self.volumes()} saw an error: {self.error}")
        return data

    def read(self, volume, directory, name):
        device = f"/dev/mapper/{volume}@{name}"
        if not directory:
            with open(device, "rb", buffering=0) as file:
                file.seek(-BLOCK, os.SEEK_END)
                return int(file.read(20).rstrip(b"\0") or b"0")
        at = f"/run/{volume}"
        os.makedirs(at, exist_ok=True)
        tidemark("snapshot", "mount", f"{volume}@{name}", at)
        try:
            with open(f"{at}/number", "rb") as file:
                return int(file.read(20))
        finally:
            subprocess.run(["umount", at], check=True)


def tidemark(*words, point=None, expect=0):
    environment = dict(os.environ)
    if point is not None:
        environment["TIDEMARK_CRASH_AT"] = point
    done = subprocess.run(["tidemark", *words], env=environment, capture_output=True, text=True, timeout=120)
    if done.returncode == -9 and point is not None:
        return None
    if done.returncode != expect:
        raise Failure(f"{words} returned {done.returncode}: {done.stderr}")
    return done.stdout


def create(volumes, name, stores, point=None):
    words = ["snapshot", "create", *volumes, "--name", name, "--store", stores, "--store-size", "4MiB", "--json"]
    return tidemark(*words, "--freeze-budget", "30s", point=point)


def listed():
    found = [json.loads(line)["report"] for line in tidemark("snapshot", "list", "--json").splitlines()]
    return {view["snapshot"]: view for views in found for view in views}


def instants(count, stores, pairs):
    writers = [Writer(pair) for pair in pairs]
    volumes = [volume for writer in writers for volume in writer.volumes()]
    for writer in writers:
        writer.start()
    last, kept, frozen = [0] * len(writers), [], []
    for round in range(int(count)):
        name = f"g{round}"
        created = [json.loads(line) for line in create(volumes, name, stores).splitlines()]
        report = next(line["report"] for line in created if line["type"] == "result")
        if [one["snapshot"] for one in report["snapshots"]] != [f"{volume}@{name}" for volume in volumes]:
            raise Failure(f"the report: {report}")
        frozen.append(report["frozen_ms"])
        now = [writer.check(name) for writer in writers]
        if any(one <= before for one, before in zip(now, last)):
            raise Failure(f"{name}: the writers do not advance: {last}, {now}")
        last = now
        views = listed()
        groups = {views[f"{volume}@{name}"]["group"] for volume in volumes}
        if groups != {report["group"]}:
            raise Failure(f"{name}: groups {groups}, not {report['group']}")
        shown = json.loads(tidemark("snapshot", "show", f"{volumes[0]}@{name}", "--json"))["report"]
        if shown["group_snapshots"] != sorted(f"{volume}@{name}" for volume in volumes):
            raise Failure(f"show: {shown}")
        kept.append(name)
        # First snapshots and further ones; never two at a time of one volume, as its stores are small.
        for old in kept if round % 5 == 4 else kept[:-1]:
            for volume in volumes:
                tidemark("snapshot", "delete", f"{volume}@{old}", "--yes")
        kept = [] if round % 5 == 4 else kept[-1:]
    for old in kept:
        for volume in volumes:
            tidemark("snapshot", "delete", f"{volume}@{old}", "--yes")
    print(f"    {count} instants of {len(volumes)} volumes, the last at {last}, frozen for {sorted(frozen)} ms")


def kill(writer, volumes, point, stores, rng):
    """Returns None if the command does not pass the point, else whether the snapshots exist."""
    # A snapshot that is deleted may keep its name until there is a newer one.
    name, probe = f"killed{next(numbers)}", f"probe{next(numbers)}"
    if create(volumes, name, stores, point=point) is not None:
        for volume in volumes:
            tidemark("snapshot", "delete", f"{volume}@{name}", "--yes")
        return None
    # The watchdog releases what is held: the writer goes on without a recovery.
    number, end = writer.number, time.monotonic() + 60
    while writer.number <= number + 2:
        if time.monotonic() > end or writer.error:
            raise Failure(f"{point}: the writer stands still: {writer.error}")
        time.sleep(0.01)
    way = rng.choice(["recover", "recover, killed", "one volume first"])
    if way == "recover, killed":
        tidemark("recover", point=rng.choice(["snapshot.discard.devices", "snapshot.discard.store", "snapshot.show"]))
    if way == "one volume first":
        # Another command settles one volume only. What it finds decided must stay so for the other one.
        one = rng.choice(volumes)
        while "INACTIVE" in subprocess.run(["dmsetup", "info", *volumes], capture_output=True, text=True).stdout:
            time.sleep(0.01)  # the watchdog drops it
        tidemark("snapshot", "create", one, "--name", probe, "--store", stores, "--store-size", "4MiB")
        exists = f"{one}@{name}" in listed()
        tidemark("snapshot", "delete", f"{one}@{probe}", "--yes")
    tidemark("recover")
    views = listed()
    there = [f"{volume}@{name}" in views for volume in volumes]
    if there not in ([True, True], [False, False]) or way == "one volume first" and exists != there[0]:
        raise Failure(f"{point}, {way}: {volumes}: {there}")
    if there[0]:
        for volume in volumes:
            if views[f"{volume}@{name}"]["state"] != "valid":
                raise Failure(f"{point}: {views}")
        writer.check(name)
        for volume in volumes:
            tidemark("snapshot", "delete", f"{volume}@{name}", "--yes")
    left = [file for _, _, files in os.walk("/var/lib/tidemark/snapshots/groups") for file in files]
    if left:
        raise Failure(f"{point}: records of groups are left: {left}")
    return there[0]


def kills(stores, pair):
    writer, rng = Writer(pair), random.Random(int(os.environ["TIDEMARK_SEED"]))
    writer.start()
    unreached, count = set(BEFORE + CAPTURE + UNDECIDED + DECIDED), 0
    for at in (0, 1):
        volumes = writer.volumes()
        create([volumes[at]], f"old{at}", stores)
        for point in BEFORE + CAPTURE + UNDECIDED + DECIDED:
            exists = kill(writer, volumes, point, stores, rng)
            if exists is None:
                continue
            count += 1
            unreached.discard(point)
            if exists != (point in DECIDED):
                raise Failure(f"killed at {point}, and the snapshots {'exist' if exists else 'do not exist'}")
        tidemark("snapshot", "delete", f"{volumes[at]}@old{at}", "--yes")
    print(f"    {count} kills, the writer at {writer.number}")
    if unreached:
        raise Failure(f"no command passes {sorted(unreached)}")


try:
    {"instants": lambda count, stores, *pairs: instants(count, stores, pairs), "kills": kills}[sys.argv[1]](*sys.argv[2:])
except Failure as failure:
    print(f"FAILED: {failure}", flush=True)
    sys.exit(1)
