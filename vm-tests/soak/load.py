#!/usr/bin/env python3
"""An application: several kinds of writes at once, to a filesystem or a bare device, until it is told to stop.

  load.py PARTS TARGET SIZE SEED STATUS

PARTS is the `load` of a scenario, as JSON. TARGET is a directory, or a device of SIZE bytes. STATUS is written ten
times a second, with counts and the first error. On SIGTERM, the program reads back and compares everything that its
overwriting parts have written: each block holds its number and its write count, so that lost or misdirected writes are
detected. Then STATUS says "done".

A full filesystem and an unsupported discard are not errors: applications must cope with both.
"""

import ctypes
import errno
import fcntl
import json
import mmap
import os
import random
import signal
import struct
import sys
import threading
import time

STOP = threading.Event()
EXPECTED = (errno.ENOSPC, errno.EOPNOTSUPP, errno.ENOTTY)
FITRIM = 0xC0185879
BLKDISCARD = 0x1277
PUNCH_HOLE, ZERO_RANGE, KEEP_SIZE = 2, 16, 1
LIBC = ctypes.CDLL(None, use_errno=True)
# Time limit for the final comparison: a slow disk has too much to read.
LAST_LOOK_SECONDS = 3
NOISE = random.Random(7).randbytes(1 << 20)


class Part(threading.Thread):
    """One kind of writes. `self.ops` counts them."""

    def __init__(self, number, spec, target, seed):
        super().__init__(daemon=True)
        self.name = f"{spec['kind']}-{number}"
        self.spec, self.target = spec, target
        self.choices = random.Random(f"load {seed} {self.name}")
        self.ops, self.error = 0, None
        self.is_device = not os.path.isdir(target)

    def run(self):
        try:
            while not STOP.is_set():
                try:
                    self.once()
                except OSError as error:
                    if error.errno not in EXPECTED:
                        raise
                    self.make_room()
                self.ops += 1
                if self.spec["pace_us"]:
                    # pace_us on average.
                    STOP.wait(self.spec["pace_us"] * 2e-6 * self.choices.random())
        except Exception as error:
            self.error = f"{self.name}: {type(error).__name__}: {error}"

    def prepare(self):
        os.makedirs(f"{self.target}/{self.name}", exist_ok=True)

    def path(self, name):
        return f"{self.target}/{self.name}/{name}"

    def bytes(self):
        return self.spec["mib"] << 20

    def make_room(self):
        pass

    def noise(self, length):
        at = self.choices.randrange(len(NOISE) - length)
        return NOISE[at : at + length]


class Overwrite(Part):
    """Overwrites blocks of one file, or of a range of the device; `depth` threads share them."""

    def __init__(self, number, spec, target, seed, begin):
        super().__init__(number, spec, target, seed)
        self.begin = begin if self.is_device else 0
        self.count = self.bytes() // spec["block"]
        # Write count of each block; a write counts when it is issued.
        self.written = [0] * self.count
        self.others, self.lock = [], threading.Lock()

    def flags(self):
        way = self.spec["way"]
        flags = os.O_RDWR | os.O_CREAT
        # Direct I/O needs whole sectors.
        if way.startswith("direct"):
            flags |= os.O_DIRECT
        return flags | (os.O_DSYNC if way.endswith("dsync") else 0)

    def prepare(self):
        path = self.target
        if not self.is_device:
            super().prepare()
            path = self.path("data")
            with open(path, "wb") as file:
                file.write(b"\0" * self.bytes())
        self.descriptor = os.open(path, self.flags())
        self.memory = self.memory_of_its_own()

    def start(self):
        super().start()
        for number in range(1, self.spec["depth"]):
            thread = threading.Thread(target=self.work, args=(number,), daemon=True)
            thread.start()
            self.others.append(thread)

    def memory_of_its_own(self):
        # Page-aligned for direct I/O.
        return mmap.mmap(-1, max(mmap.PAGESIZE, -(-self.spec["block"] // 4096) * 4096))

    def work(self, number):
        choices = random.Random(f"{self.name} {number}")
        memory = self.memory_of_its_own()
        try:
            while not STOP.is_set():
                self.write_one(number, choices, memory)
                if self.spec["pace_us"]:
                    STOP.wait(self.spec["pace_us"] * 2e-6 * choices.random())
        except Exception as error:
            self.error = f"{self.name}: {type(error).__name__}: {error}"

    def once(self):
        self.write_one(0, self.choices, self.memory)
        if self.spec["way"] == "buffered" and self.choices.random() < 0.02:
            os.fdatasync(self.descriptor)

    def write_one(self, number, choices, memory):
        """Writes one of this thread's own blocks, and sometimes reads one back."""
        mine = (self.count - number - 1) // self.spec["depth"] + 1
        if mine <= 0:
            STOP.wait(0.1)
            return
        at = choices.random()
        at = int((at**4 if self.spec["skewed"] else at) * mine) * self.spec["depth"] + number
        self.written[at] += 1
        block = self.spec["block"]
        memory[:block] = self.content(at)
        done = os.pwrite(self.descriptor, memoryview(memory)[:block], self.begin + at * block)
        if done != block:
            raise OSError(errno.EIO, f"a write of {block} bytes wrote {done}")
        with self.lock:
            self.ops += number > 0
        if choices.random() < 0.03:
            self.check(at, memory)

    def content(self, at):
        block, count = self.spec["block"], self.written[at]
        where = (at * 7919 + count * 104729) % (len(NOISE) - block)
        return struct.pack("<QQ", at, count) + NOISE[where : where + block - 16]

    def check(self, at, memory):
        block = self.spec["block"]
        view = memoryview(memory)[:block]
        done = os.preadv(self.descriptor, [view], self.begin + at * block)
        if done != block or view != self.content(at):
            found = struct.unpack("<QQ", view[:16])
            raise ValueError(f"block {at} holds write {found[1]} of block {found[0]}, not its write {self.written[at]}")

    def check_all(self):
        """Compares as many blocks as time permits, in random order."""
        written = [at for at in range(self.count) if self.written[at]]
        self.choices.shuffle(written)
        end = time.monotonic() + LAST_LOOK_SECONDS
        for at in written:
            if time.monotonic() > end:
                break
            self.check(at, self.memory)


class Mmap(Part):
    """Writes through a memory mapping."""

    def prepare(self):
        super().prepare()
        with open(self.path("data"), "w+b") as file:
            file.write(b"\0" * self.bytes())
            file.flush()
            os.fsync(file.fileno())
            self.map = mmap.mmap(file.fileno(), self.bytes())

    def once(self):
        length = self.choices.randrange(1, self.spec["block"])
        at = self.choices.randrange(self.bytes() - length)
        self.map[at : at + length] = self.noise(length)
        if self.spec["sync"] and self.choices.random() < 0.1:
            page = at // mmap.PAGESIZE * mmap.PAGESIZE
            self.map.flush(page, min(65536, self.bytes() - page))


class Append(Part):
    """Appends to new files; deletes the oldest of three."""

    def prepare(self):
        super().prepare()
        self.round, self.descriptor, self.left = 0, None, 0

    def next_file(self):
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None
        self.round += 1
        old = self.path(self.round - 3)
        if os.path.exists(old):
            os.unlink(old)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | (os.O_DSYNC if self.spec["sync"] else 0)
        self.descriptor = os.open(self.path(self.round), flags, 0o644)
        self.left = self.bytes() // 3

    def once(self):
        if self.left <= 0:
            self.next_file()
        self.left -= os.write(self.descriptor, self.noise(self.spec["block"]))

    def make_room(self):
        for name in os.listdir(self.path("")):
            os.unlink(self.path(name))
        self.left = 0
        STOP.wait(0.05)


class Churn(Part):
    """Creates, renames, truncates and deletes small files, with an occasional sync."""

    def once(self):
        name, what = self.path(self.choices.randrange(24)), self.choices.random()
        if what < 0.55:
            with open(name + ".new", "wb") as file:
                file.write(self.noise(self.choices.randrange(1, self.bytes() // 24)))
                if self.spec["sync"]:
                    file.flush()
                    os.fsync(file.fileno())
            os.rename(name + ".new", name)
        elif not os.path.exists(name):
            return
        elif what < 0.75:
            os.unlink(name)
        elif what < 0.95:
            os.truncate(name, self.choices.randrange(os.path.getsize(name) + 1))
        else:
            descriptor = os.open(os.path.dirname(name), os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)

    def make_room(self):
        for name in os.listdir(self.path("")):
            os.unlink(self.path(name))


class Punch(Part):
    """Allocates, writes, zeroes and punches blocks of a file."""

    def prepare(self):
        super().prepare()
        self.descriptor = os.open(self.path("data"), os.O_RDWR | os.O_CREAT, 0o644)

    def once(self):
        length = self.choices.randrange(1, 1 << 17)
        at, what = self.choices.randrange(self.bytes()), self.choices.random()
        if what < 0.5:
            os.pwrite(self.descriptor, self.noise(min(length, 65536)), at)
        elif what < 0.7:
            self.fallocate(PUNCH_HOLE | KEEP_SIZE, at, length)
        elif what < 0.8:
            self.fallocate(ZERO_RANGE, at, length)
        elif what < 0.95:
            self.fallocate(KEEP_SIZE, at, length)
        else:
            os.ftruncate(self.descriptor, self.choices.randrange(self.bytes()))
        if self.spec["sync"] and self.choices.random() < 0.1:
            os.fsync(self.descriptor)

    def fallocate(self, mode, at, length):
        if LIBC.fallocate(self.descriptor, mode, ctypes.c_long(at), ctypes.c_long(length)) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))


class Trim(Part):
    """fstrim; on a bare device, discards in a range of its own."""

    def __init__(self, number, spec, target, seed, begin):
        super().__init__(number, spec, target, seed)
        self.begin = begin

    def prepare(self):
        flags = os.O_RDWR if self.is_device else os.O_RDONLY
        self.descriptor = os.open(self.target, flags)

    def once(self):
        if not self.is_device:
            fcntl.ioctl(self.descriptor, FITRIM, struct.pack("<QQQ", 0, 1 << 62, 0))
            return
        at = self.begin + self.choices.randrange(self.bytes() // 4096) * 4096
        if self.choices.random() < 0.5:
            os.pwrite(self.descriptor, self.noise(4096), at)
        else:
            fcntl.ioctl(self.descriptor, BLKDISCARD, struct.pack("<QQ", at, 4096))


def parts_of(specs, target, size, seed):
    kinds = {"mmap": Mmap, "append": Append, "churn": Churn, "punch": Punch}
    begin, parts = 0, []
    for number, spec in enumerate(specs):
        if spec["kind"] == "overwrite":
            parts.append(Overwrite(number, spec, target, seed, begin))
        elif spec["kind"] == "trim":
            parts.append(Trim(number, spec, target, seed, begin))
        else:
            parts.append(kinds[spec["kind"]](number, spec, target, seed))
        # On a bare device, each part has a range of its own; the ranges are spread over the device.
        begin += max(spec["mib"] << 20, size // 4 >> 20 << 20)
    return parts


def tell(path, parts, done, lost=None):
    errors = [part.error for part in parts if part.error] + ([lost] if lost else [])
    status = {"ops": sum(part.ops for part in parts), "errors": errors, "done": done}
    status["parts"] = {part.name: part.ops for part in parts}
    with open(path + ".new", "w") as file:
        json.dump(status, file)
    os.rename(path + ".new", path)


def main():
    specs, target, size, seed, status = sys.argv[1:]
    # A signal handler runs in the main thread, so it must not take a lock that this thread may hold.
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    parts = parts_of(json.loads(specs), target, int(size), seed)
    # All parts allocate their space before any part may fill the filesystem.
    for part in parts:
        part.prepare()
    for part in parts:
        part.start()
    while not asked:
        tell(status, parts, False)
        time.sleep(0.1)
    STOP.set()
    for part in parts:
        for thread in [part, *getattr(part, "others", [])]:
            thread.join()
    lost = None
    try:
        for part in parts:
            if isinstance(part, Overwrite) and not part.error:
                part.check_all()
    except (OSError, ValueError) as error:
        lost = f"at the end: {type(error).__name__}: {error}"
    tell(status, parts, True, lost)


main()
