"""A random program of snapshots over a volume that is being written, against an oracle that knows every instant.

Usage: snapshots.py SEED STEPS DEVICE STORE-DIRECTORY, or "each" instead of a number of steps: then commands are
killed at every point, one after the other.

The volume is an array of blocks of 4 KiB. A thread writes numbered blocks, one after the other, each durable before the
next. So an image is right if and only if it is the state after the first m writes, for an m between those that were
done before the instant and those that had been begun after it. Everything that a snapshot may show follows from that:
the oracle finds m from the image itself once, and from then on the snapshot must show exactly that state, whatever is
written, created, deleted, killed, or taken apart. A snapshot of a subset shows zeros in the ranges that it leaves out, and
the same state elsewhere.
"""

import collections
import json
import mmap
import os
import random
import struct
import subprocess
import sys
import threading
import time

BLOCK = 4096
SEED, STEPS, DEVICE, STORES = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
VOLUME = "data"
PATH = f"/dev/mapper/{VOLUME}"
# Every point at which a command of snapshots can be killed.
POINTS = """
capture.create-view.after capture.load-view.after capture.guard.after capture.freeze.after capture.suspend.after
capture.activate.after capture.instant.after capture.resume.after capture.unguard.after capture.create-data.after
capture.resume-keep.after capture.load-volume.after capture.switch.after
snapshot.create.recorded snapshot.store.named snapshot.create.file snapshot.create.store snapshot.create.taken
snapshot.create.left-out snapshot.mask snapshot.create.kept snapshot.lead.alias snapshot.lead.loaded snapshot.lead.loaded:2 snapshot.lead.first
snapshot.lead.second snapshot.show snapshot.delete.recorded snapshot.delete.copying snapshot.delete.copying:5
snapshot.delete.copied snapshot.delete.led snapshot.delete.step snapshot.discard.devices snapshot.discard.store
snapshot.store.hidden snapshot.store.allocated snapshot.dissolve.before snapshot.dissolve.restored restore.switch.after
restore.suspend.after snapshot.clone.recorded snapshot.clone.file snapshot.clone.kept
""".split()
# Those at which the creation of a subset is killed, if one after the other is.
SUBSET_POINTS = """
capture.load-volume.after capture.suspend.after capture.instant.after capture.switch.after capture.unguard.after
snapshot.create.recorded snapshot.create.taken snapshot.create.left-out snapshot.create.kept snapshot.mask
""".split()
DETACH_POINTS = ["snapshot.detach.removed", "snapshot.detach.recorded"]
ATTACH_POINTS = ["snapshot.attach.assembled", "snapshot.show"]
ROLLBACK_POINTS = """
snapshot.rollback.removed snapshot.rollback.recorded snapshot.store.named snapshot.rollback.files snapshot.rollback.begun
snapshot.rollback.merge snapshot.rollback.made snapshot.rollback.merged restore.suspend.after restore.switch.after
snapshot.rollback.led snapshot.rollback.unmade snapshot.discard.devices snapshot.discard.store
""".split()
SNAPSHOTS_MAX, CLONES_MAX = 8, 3
# What is tested here is not how fast the machine is.
PATIENT = ["--freeze-budget", "20s"]
# First block and number of blocks of what snapshots leave out, alone or together.
RANGES = [(0, 1000), (1000, 700), (2500, 1), (3000, 1096)]
# Numbers of the blocks that are written to clones.
CLONE_NUMBERS = 1 << 40

rng = random.Random(SEED)


class Failure(Exception):
    pass


def block_of(index, number):
    return struct.pack("<QQ", index, number) * (BLOCK // 16)


class Writer(threading.Thread):
    """Writes the volume. `begun` and `done` count the writes; `log` has the block of each."""

    def __init__(self, blocks):
        super().__init__(daemon=True)
        self.blocks, self.log = blocks, []
        self.begun = self.done = 0
        self.resets = {}  # number of a write -> all blocks: a rollback, which counts as one write
        self.rng = random.Random(SEED + 1)
        self.paused, self.is_idle = threading.Event(), threading.Event()
        self.error = None
        self.hot = [self.rng.randrange(blocks) for _ in range(16)]

    def run(self):
        try:
            self.write()
        except OSError as error:
            self.error = error
            self.is_idle.set()

    def write(self):
        buffer = mmap.mmap(-1, BLOCK)
        file = None
        while True:
            if self.paused.is_set():
                if file is not None:
                    os.close(file)
                    file = None
                self.is_idle.set()
                threading.Event().wait(0.002)
                continue
            if file is None:
                file = os.open(PATH, os.O_WRONLY | os.O_DIRECT | os.O_DSYNC)
            index = self.rng.choice(self.hot) if self.rng.random() < 0.5 else self.rng.randrange(self.blocks)
            self.log.append(index)
            self.begun += 1
            buffer[:] = block_of(index, self.begun)
            if os.pwritev(file, [buffer], index * BLOCK) != BLOCK:
                raise OSError("a short write")
            self.done = self.begun
            if self.rng.random() < 0.05:
                threading.Event().wait(self.rng.random() * 0.01)

    def reset(self, numbers):
        """The volume was rolled back. Only while the writer is paused."""
        self.log.append(None)
        self.begun += 1
        self.resets[self.begun] = list(numbers)
        self.done = self.begun

    def pause(self):
        self.is_idle.clear()
        self.paused.set()
        self.is_idle.wait()
        self.check()

    def go_on(self):
        self.is_idle.clear()
        self.paused.clear()

    def check(self):
        if self.error is not None:
            raise Failure(f"a write to the volume failed: {self.error}")


def read_image(path):
    """The number in each block; a block must be whole."""
    numbers = []
    buffer = mmap.mmap(-1, 256 * BLOCK)
    file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        at = 0
        while True:
            count = os.preadv(file, [buffer], at)
            if count == 0:
                return numbers
            for offset in range(0, count, BLOCK):
                content = buffer[offset : offset + BLOCK]
                index, number = struct.unpack_from("<QQ", content)
                if number == 0 and content == bytes(BLOCK):
                    numbers.append(0)
                    continue
                if index != (at + offset) // BLOCK or content != block_of(index, number):
                    raise Failure(f"block {(at + offset) // BLOCK} of {path} holds something else")
                numbers.append(number)
            at += count
    finally:
        os.close(file)


class Oracle:
    def __init__(self, writer):
        self.writer = writer
        self.known = {}  # name -> the numbers of its blocks
        self.windows = {}  # name -> (done before, begun after) of one that was not read yet
        self.lost = set()  # names of those whose store, or that of a newer one, was full
        self.small = set()  # names of those whose store can fill
        self.clones = {}  # name -> [its snapshot, the numbers of its blocks]
        self.left_out = {}  # name -> the blocks that a snapshot of a subset leaves out
        self.written = CLONE_NUMBERS

    def state_after(self, count):
        numbers = [0] * self.writer.blocks
        for number, index in enumerate(self.writer.log[:count], 1):
            if index is None:
                numbers = list(self.writer.resets[number])
            else:
                numbers[index] = number
        return numbers

    def shown_by(self, name, numbers):
        """The numbers that the snapshot shows if the volume held these."""
        left_out = self.left_out.get(name, ())
        return [0 if at in left_out else number for at, number in enumerate(numbers)]

    def clones_of(self, names):
        return sorted(clone for clone, (snapshot, _) in self.clones.items() if snapshot in names)

    def write_to(self, clone):
        numbers, buffer = self.clones[clone][1], mmap.mmap(-1, BLOCK)
        file = os.open(f"/dev/mapper/{VOLUME}@{clone}", os.O_WRONLY | os.O_DIRECT | os.O_DSYNC)
        try:
            for _ in range(rng.randrange(1, 40)):
                self.written += 1
                index = rng.randrange(self.writer.blocks)
                buffer[:] = block_of(index, self.written)
                os.pwritev(file, [buffer], index * BLOCK)
                numbers[index] = self.written
        finally:
            os.close(file)

    def verify(self, name):
        found = read_image(f"/dev/mapper/{VOLUME}@{name}")
        expected = self.clones[name][1] if name in self.clones else self.known.get(name)
        if expected is None:
            first, last = self.windows[name]
            count = max(max(found), first)
            if count > last:
                raise Failure(f"{name} shows write {count}, which began after its instant ({first}..{last})")
            expected = self.shown_by(name, self.state_after(count))
            self.known[name] = expected
        if found != expected:
            wrong = [at for at, pair in enumerate(zip(found, expected)) if pair[0] != pair[1]]
            sample = [(at, found[at], expected[at]) for at in wrong[:5]]
            raise Failure(f"{name} is wrong in {len(wrong)} blocks: (block, found, expected) {sample}")


counts = collections.Counter()


def run(*words, point=None, expect=0):
    environment = dict(os.environ)
    if point is not None:
        environment["TIDEMARK_CRASH_AT"] = point
    done = subprocess.run(
        ["tidemark", *words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=120
    )
    if done.returncode == -9 and point is not None:
        print(f"    killed at {point}: {' '.join(words)}", flush=True)
        return None
    if expect is not None and done.returncode != expect:
        raise Failure(f"{words} returned {done.returncode}: {done.stderr}")
    return done


def listed():
    done = run("snapshot", "list", VOLUME, "--json")
    found = []
    for line in done.stdout.splitlines():
        found.extend(json.loads(line)["report"])
    return {view["snapshot"].split("@")[1]: view for view in found}


class Program:
    def __init__(self, writer):
        self.writer, self.oracle = writer, Oracle(writer)
        self.next = 1
        self.forced, self.unreached = None, []

    def names(self):
        return sorted(set(self.oracle.known) | set(self.oracle.windows))

    def order(self, name):
        return int(name[1:])

    def note_lost(self, listed):
        """A store that was full takes its snapshot and the older ones with it, and no newer one."""
        # One that is deleted and still receives loses the older ones as well.
        is_full = lambda view: view["state"] == "invalid" or view["state"] == "retired" and view["used"] is None
        full = [name for name, view in listed.items() if is_full(view) and name not in self.oracle.clones]
        for name in full:
            newer = [other for other in self.oracle.small if self.order(other) >= self.order(name)]
            if name not in self.oracle.lost and not newer:
                raise Failure(f"{name} is lost, and no store could have filled: {listed[name]}")
        for name, view in listed.items():
            if view["state"] not in ("invalid", "needs-lost") or name in self.oracle.lost:
                continue
            snapshot, _ = self.oracle.clones.get(name, (name, None))
            if name in self.oracle.clones:
                if listed[f"{snapshot}"]["state"] not in ("invalid", "needs-lost"):
                    raise Failure(f"the clone {name} is lost, and its snapshot is not: {listed}")
                self.oracle.lost.add(name)
                counts["lost: a clone with its snapshot"] += 1
            else:
                newest = max(map(self.order, full), default=-1)
                if self.order(name) > newest:
                    raise Failure(f"{name} is lost, although no newer store failed: {listed}")
                self.oracle.known.pop(name, None)
                self.oracle.windows.pop(name, None)
                self.oracle.lost.add(name)
                counts["lost: a store was full"] += 1

    def forget(self, name):
        self.oracle.lost.discard(name)
        self.oracle.known.pop(name, None)
        self.oracle.windows.pop(name, None)
        self.oracle.clones.pop(name, None)
        self.oracle.left_out.pop(name, None)

    def live_clones(self):
        return sorted(set(self.oracle.clones) - self.oracle.lost)

    def point(self, points):
        if STEPS == "each":
            return self.forced
        return rng.choice(points) if rng.random() < 0.4 else None

    def recover(self):
        counts["kill"] += 1
        # The watchdog may still be at work. A recovery can be killed as well.
        if rng.random() < 0.3 and run("recover", point=rng.choice(POINTS)) is None:
            counts["recover, killed"] += 1
        run("recover")

    def each_point(self):
        """Kills a rollback, the creation of the first and of a further snapshot, and the deletion of each, at every point."""
        for at in ROLLBACK_POINTS:
            while len(self.names()) < 3:
                self.create(is_whole=True)
                self.verify()
            self.forced, hit = at, counts["rollback, killed"]
            self.rollback()
            self.forced = None
            self.verify()
            self.end_rollback()
            self.verify()
            print(f"  {at}: killed {counts['rollback, killed'] - hit} times", flush=True)
        for name in self.names():
            self.delete([name])
        for at in POINTS:
            self.forced = at
            hit = counts["kill"]
            for _ in range(2):
                self.create()
            self.forced = None
            while len(self.names()) < 4:
                self.create()
                self.verify()
            self.forced = at
            self.clone()
            if self.live_clones():
                self.delete(self.live_clones())
            self.forced = None
            self.verify()
            for pick in (1, 0, -1, 0, 0):
                names = sorted(self.names(), key=self.order)
                if names:
                    self.forced = at
                    self.delete([names[pick]])
                    self.forced = None
                    self.verify()
            print(f"  {at}: killed {counts['kill'] - hit} times", flush=True)
            if counts["kill"] == hit:
                self.unreached.append(at)
            for name in self.live_clones() + self.names():
                self.delete([name])
        if self.unreached != ["snapshot.store.allocated"]:  # needs a small store; the random program has those
            raise Failure(f"no command passes {self.unreached}")

    def create(self, is_whole=False):
        if len(self.names()) + len(self.oracle.lost) >= SNAPSHOTS_MAX:
            return self.delete()
        self.end_rollback()
        name = f"s{self.next}"
        self.next += 1
        before, point = self.writer.done, self.point(POINTS)
        is_small = STEPS != "each" and rng.random() < 0.15
        size = "4MiB" if is_small else "32MiB"
        if is_small:
            self.oracle.small.add(name)
        if self.forced:
            is_whole |= self.forced not in SUBSET_POINTS
        else:
            is_whole |= rng.random() < 0.4
        ranges = [] if is_whole else rng.sample(RANGES, rng.randrange(1, len(RANGES)))
        words = [f"--exclude=bytes:{first * BLOCK}+{count * BLOCK}" for first, count in ranges]
        if ranges:
            counts["create: a subset"] += 1
            self.oracle.left_out[name] = {block for first, count in ranges for block in range(first, first + count)}
        words += ["--name", name, "--store", STORES, "--store-size", size]
        done = run("snapshot", "create", VOLUME, *words, *PATIENT, point=point)
        window = (before, self.writer.begun)
        if done is None:
            self.recover()
            view = listed().get(name)
            if view is None:
                counts["create, killed: gone"] += 1
                self.forget(name)
                return None
            counts["create, killed: kept"] += 1
            window = (before, self.writer.begun)
        self.oracle.windows[name] = window
        counts["create"] += 1
        return f"{name} without {ranges}" if ranges else name

    def clone(self):
        """Clones a snapshot, or writes to a clone."""
        clones = self.live_clones()
        if clones and (len(clones) >= CLONES_MAX or rng.random() < 0.5):
            clone = rng.choice(clones)
            self.oracle.write_to(clone)
            return f"{clone} written"
        if not self.oracle.known:
            return None
        snapshot, name = rng.choice(sorted(self.oracle.known)), f"c{self.next}"
        self.next += 1
        point = self.point(POINTS)
        words = ["snapshot", "clone", f"{VOLUME}@{snapshot}", "--name", name, "--store", STORES, "--store-size", "32MiB"]
        # It may have been lost since it was read.
        done = run(*words, point=point, expect=None)
        if done is None:
            self.recover()
        elif done.returncode != 0:
            self.note_lost(listed())
            if snapshot in self.oracle.known:
                raise Failure(f"cloning {snapshot} failed: {done.stderr}")
        if name not in listed():
            return None
        self.oracle.clones[name] = [snapshot, list(self.oracle.known[snapshot])]
        counts["clone"] += 1
        self.oracle.write_to(name)
        return f"{name} of {snapshot}"

    def delete(self, names=None):
        there = self.names() + sorted(self.oracle.lost) + sorted(self.oracle.clones)
        if not there:
            return None
        names = names or rng.sample(there, min(len(there), rng.choice([1, 1, 1, 2])))
        clones = [clone for clone in self.oracle.clones_of(names) if clone not in names]
        if clones and rng.random() < 0.2:
            run("snapshot", "delete", *[f"{VOLUME}@{name}" for name in names], "--yes", expect=3)
            counts["delete, refused: has clones"] += 1
        names = sorted(set(names) | set(clones))
        self.end_rollback()
        point = self.point(POINTS)
        done = run("snapshot", "delete", *[f"{VOLUME}@{name}" for name in names], "--yes", point=point)
        if done is None:
            self.recover()
            left = listed()
            gone = (None, "deleting", "retired")
            names = [name for name in names if left.get(name, {}).get("state") in gone]
            counts["delete, killed"] += 1
        for name in names:
            self.forget(name)
        counts["delete"] += len(names)
        return names

    def attach(self):
        run("attach", DEVICE, "--name", VOLUME)
        run("recover")

    def end_rollback(self):
        """Waits for the end of a merge. A store of it that is full is enlarged by `recover`."""
        limit = time.monotonic() + 60
        while any(view["rollback_percent"] is not None for view in listed().values()):
            if time.monotonic() > limit:
                raise Failure(f"a rollback does not end: {listed()}")
            run("recover", point=rng.choice(ROLLBACK_POINTS[-7:]) if rng.random() < 0.2 else None)
            time.sleep(0.05)

    def rollback(self):
        self.end_rollback()
        self.note_lost(listed())
        subsets = sorted(set(self.oracle.known) & set(self.oracle.left_out))
        if subsets and rng.random() < 0.2:
            # It may have been lost since it was read, which is refused as well.
            run("snapshot", "rollback", f"{VOLUME}@{rng.choice(subsets)}", "--yes", expect=3)
            counts["rollback, refused: a subset"] += 1
        whole = sorted(set(self.oracle.known) - set(subsets))
        if not whole:
            return None
        name, point = rng.choice(whole), self.point(ROLLBACK_POINTS)
        self.writer.pause()
        before, expected = self.oracle.state_after(self.writer.done), self.oracle.known[name]
        how = [] if self.forced else rng.choice([[], ["--no-wait"], ["--at-attach"]])
        words = ["snapshot", "rollback", f"{VOLUME}@{name}", "--yes", *how]
        done = run(*words, point=point, expect=None)
        if done is not None and done.returncode != 0:
            self.note_lost(listed())
            if name in self.oracle.known:
                raise Failure(f"{words} failed: {done.stderr}")
            self.writer.go_on()
            return None
        if done is None:
            counts["rollback, killed"] += 1
            time.sleep(0.1)
            self.attach()
        elif "--at-attach" in words:
            run("detach", VOLUME, "--keep-snapshots")
            self.attach()
        found = read_image(PATH)
        if found == expected:
            counts["rollback"] += 1
            self.writer.reset(expected)
        elif done is None and found == before:
            counts["rollback, killed: not begun"] += 1
            run("snapshot", "rollback", f"{VOLUME}@{name}", "--cancel", expect=None)
        else:
            wrong = [at for at, pair in enumerate(zip(found, expected)) if pair[0] != pair[1]]
            raise Failure(f"rolled back to {name}, the volume is wrong in {len(wrong)} blocks: {wrong[:5]}")
        self.writer.go_on()
        return " ".join(words[2:])

    def take_apart(self):
        """Detaches the volume and attaches it again."""
        self.writer.pause()
        try:
            point = self.point(DETACH_POINTS)
            done = run("detach", VOLUME, "--keep-snapshots", point=point)
            if done is None:
                counts["detach, killed"] += 1
            point = self.point(ATTACH_POINTS)
            if run("attach", DEVICE, "--name", VOLUME, point=point) is None:
                counts["attach, killed"] += 1
                run("attach", DEVICE, "--name", VOLUME)
            run("recover")
        finally:
            self.writer.go_on()
        counts["detach and attach"] += 1

    def copy(self):
        run("copy", VOLUME, f"{STORES}/copy", "--yes", "--format", "raw", "--store", STORES, "--impact", "none", *PATIENT)
        found = read_image(f"{STORES}/copy")
        count = max(found)
        if found != self.oracle.state_after(count):
            raise Failure("a copy of the volume shows no instant")
        os.unlink(f"{STORES}/copy")
        counts["copy"] += 1

    def verify(self):
        there = lambda: self.names() + self.live_clones()
        for name in there():
            self.note_lost(listed())
            try:
                if name in there():
                    self.oracle.verify(name)
            except OSError:
                # It may have been lost since it was listed.
                self.note_lost(listed())
                if name in there():
                    raise
        found = listed()
        self.note_lost(found)
        visible = {name for name, view in found.items() if view["state"] == "valid"}
        if visible != set(there()):
            raise Failure(f"listed as valid: {sorted(visible)}, and there should be: {there()}")
        self.writer.check()
        counts["verify"] += 1

    def step(self):
        deeds = [self.create] * 4 + [self.delete] * 3 + [self.clone] * 2 + [self.rollback] * 2 + [self.take_apart, self.copy]
        deed = rng.choice(deeds)
        began = time.monotonic()
        done = deed()
        took = time.monotonic() - began
        snapshots = f"{len(self.names())} snapshots, {len(self.live_clones())} clones, {self.writer.done} writes"
        print(f"  {took:5.1f} s {deed.__name__} {done or ''}: {snapshots}", flush=True)
        threading.Event().wait(rng.random() * 0.3)
        self.verify()


def main():
    size = int(subprocess.run(["blockdev", "--getsize64", PATH], capture_output=True, text=True, check=True).stdout)
    writer = Writer(size // BLOCK)
    writer.start()
    program = Program(writer)
    try:
        if STEPS == "each":
            program.each_point()
        else:
            for _ in range(int(STEPS)):
                program.step()
        program.end_rollback()
        for name in sorted(program.oracle.clones) + program.names() + sorted(program.oracle.lost):
            if name in listed():
                run("snapshot", "delete", f"{VOLUME}@{name}", "--yes")
            program.forget(name)
        writer.pause()
        if read_image(PATH) != program.oracle.state_after(writer.done):
            raise Failure("the volume does not hold what was written")
    except Failure as failure:
        print(f"seed {SEED}: {failure}", flush=True)
        sys.exit(1)
    for what, count in sorted(counts.items()):
        print(f"    {what:24} {count:5}")
    print("counts " + json.dumps(counts))


main()
