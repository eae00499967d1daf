#!/usr/bin/env python3
"""Derives a scenario from a seed: an origin, a filesystem, a load, and one to four copies with their options and their
events.

  scenario.py [--lvm] SEED...     prints each seed's scenario, one line of JSON

With --lvm the origin is always a logical volume on slow disks, and neighbours.py works in its group while copies run.

The scenario depends on the seed alone, on every machine: of Python's generator only random() is used, whose sequence is
guaranteed for a seed. Times in a scenario say when an event should happen; the actual moment differs from run to run.

Nothing here runs anything. Every scenario must be possible: `tests/soak_scenarios.py` checks that of thousands.
"""

import json
import random
import sys

MIB = 1024  # in KiB, the unit of sizes here
REGIONS_MAX = 1024
# Lets mkfs.xfs make filesystems far below its usual minimum, as for its own tests.
XFS_KIB_MIN = 48 * MIB
# Points where the test binary can kill itself: every place of a copy that leaves another state. (The steps of
# insertion, restoration and removal are named in src/stack/plan.rs.)
INSERT_STEPS = (
    "create-real", "resume-real", "create-snap", "resume-snap", "create-preserve", "load-preserve", "resume-preserve",
    "guard", "freeze", "load-origin", "suspend", "instant", "switch", "thaw", "unguard", "expect",
)
RESTORE_STEPS = ("load-own", "guard", "suspend", "switch", "unguard", "expect")
CRASH_POINTS = (
    "copy.store.before", "store.create.record", "store.create.head", "store.create.tail", "copy.store.after",
    *(f"insert.{step}.{at}" for step in INSERT_STEPS for at in ("before", "after")),
    *("copy.data.before", "copy.data.after") * 4,
    *("release.swap.before", "release.swap.after", "release.swap.before:3", "release.swap.after:3") * 4,
    *("store.swap.loaded", "store.grow.made") * 2,
    *(f"restore.{step}.{at}" for step in RESTORE_STEPS for at in ("before", "after")),
    "copy.release.before", "store.release.device", "copy.release.after",
)


class Chooser:
    """The random choices of a seed."""

    def __init__(self, seed):
        self.random = random.Random(f"tidemark soak {seed}").random

    def number(self, low, high):
        """A number from low to high, both included."""
        return low + int(self.random() * (high - low + 1))

    def chance(self, percent):
        return self.random() * 100 < percent

    def pick(self, *choices):
        return choices[int(self.random() * len(choices))]

    def weighted(self, *pairs):
        """One choice of (weight, choice) pairs."""
        at = self.random() * sum(weight for weight, _ in pairs)
        for weight, choice in pairs:
            at -= weight
            if at < 0:
                return choice
        return pairs[-1][1]


# What LVM, or a user of dmsetup, does in the origin's group; see neighbours.py. The second row needs a volume on one
# disk.
DEEDS = (
    (14, "extend"), (8, "extend with its file system"), (10, "refresh"), (8, "snapshot"), (6, "rename"), (3, "rename the group"),
    (5, "remove in use"), (6, "extend another"), (6, "reduce another"), (5, "make and remove"), (6, "look"),
    (6, "suspend by hand"),
)
DEEDS_OF_LINEAR = ((10, "move"), (6, "mirror"))


def scenario(seed, lvm=False):
    choose = Chooser(f"{seed} among neighbours" if lvm else seed)
    filesystem = choose_filesystem(choose)
    origin = choose_origin(choose, filesystem["type"], lvm)
    # On fast disks, LVM's commands end before a copy can meet them.
    a, b = (choose_slow(choose), choose_slow(choose)) if lvm else (choose_delay(choose, 25), choose_delay(choose, 25))
    disks = {
        "a": a,
        "b": b,
        "secondary": choose_delay(choose, 20),
        "store": choose_delay(choose, 25),
    }
    count = choose.weighted((25, 1), (35, 2), (25, 3), (15, 4))
    copies = []
    for at in range(count):
        copies.append(choose_copy(choose, origin["kib"], filesystem["type"], at + 1 == count))
        if lvm:
            choose_neighbours(choose, copies[-1], origin, filesystem["type"])
    return {
        "seed": seed,
        "origin": origin,
        "filesystem": filesystem,
        "disks": disks,
        "load": choose_load(choose, origin["kib"], filesystem["type"]),
        "copies": copies,
    }


def choose_filesystem(choose):
    kind = choose.weighted((45, "ext4"), (30, "xfs"), (25, "none"))
    if kind == "ext4":
        mkfs = ["-b", choose.weighted((45, "4096"), (40, "1024"), (15, "2048"))]
        features = choose.weighted((70, ""), (10, "^has_journal"), (10, "^metadata_csum"), (10, "^flex_bg"))
        mkfs += ["-O", features] if features else []
        mkfs += ["-E", "lazy_itable_init=0,lazy_journal_init=0"] if choose.chance(50) else []
        mount = choose.weighted((60, ""), (20, "discard"), (20, "data=journal"))
        if mount == "data=journal" and features == "^has_journal":
            mount = ""
        return {"type": kind, "mkfs": mkfs, "mount": mount}
    if kind == "xfs":
        mkfs = ["-b", "size=" + choose.weighted((60, "4096"), (40, "1024"))]
        mkfs += ["-m", choose.pick("reflink=1,rmapbt=1", "reflink=1,rmapbt=0", "reflink=0,rmapbt=0")]
        return {"type": kind, "mkfs": mkfs, "mount": choose.weighted((70, ""), (30, "discard"))}
    return {"type": kind, "mkfs": [], "mount": ""}


def choose_origin(choose, filesystem, lvm=False):
    kind = choose.weighted((30, "volume"), (15, "linear"), (25, "striped"), (30, "segments"))
    is_lvm = kind == "linear" or kind == "striped" and choose.chance(40)
    low, high = (XFS_KIB_MIN, 96 * MIB) if filesystem == "xfs" else (32 * MIB, 96 * MIB)
    if lvm:
        # The volume grows, is moved and is mirrored within its two disks.
        kind, is_lvm, high = choose.weighted((75, "linear"), (25, "striped")), True, max(low, 64 * MIB)
    # LVM allocates extents, here of 64 KiB, and a stripe has one on each disk. The other origins may have any size that
    # a live origin can have.
    unit = {"volume": 4, "linear": 64, "striped": 128, "segments": 4}[kind]
    kib = choose.number(low // unit, high // unit) * unit
    origin = {"kind": kind, "lvm": is_lvm, "kib": kib, "old_data": choose.chance(70)}
    if kind == "striped":
        origin["stripe_kib"] = choose.pick(4, 16, 64)
    if kind == "segments":
        # KiB on disk a, then on disk b, and so on.
        lengths, left = [], kib
        for _ in range(choose.number(1, 4)):
            length = choose.number(1, max(1, left // 8)) * 4
            lengths.append(length)
            left -= length
        origin["segments_kib"] = [length for length in lengths + [left] if length > 0]
    return origin


def choose_delay(choose, percent):
    """Delays of a read, a write and a flush in ms; None for a fast disk."""
    if not choose.chance(percent):
        return None
    return [choose.pick(0, 1, 3), choose.pick(0, 1, 3, 8), choose.pick(0, 5, 20)]


def choose_slow(choose):
    """Delays of a disk with slow writes: from 50 ms on, dm-delay uses a timer."""
    return [choose.pick(0, 1), choose.pick(50, 80), choose.pick(0, 50)]


def choose_neighbours(choose, copy, origin, filesystem):
    deeds = DEEDS + (DEEDS_OF_LINEAR if origin["kind"] == "linear" else ())
    deeds = [(weight, deed) for weight, deed in deeds if filesystem != "none" or deed != "extend with its file system"]
    count = choose.number(2, 12)
    copy["neighbours"] = [{"pause_ms": choose.number(0, 900), "do": choose.weighted(*deeds)} for _ in range(count)]
    copy["lvm_lock"] = choose.weighted((70, "change"), (30, "copy"))
    # Disk faults are tested without LVM; here commands are killed, stopped and resumed.
    if copy["events"] and copy["events"][0]["do"] not in ("kill", "crash", "signal", "stop", "store-hang"):
        copy["events"] = choose_kills(choose, copy) if choose.chance(60) else []
        copy["store"]["size_kib"] = 0
        if copy["secondary"]["place"] == "small":
            copy["secondary"]["place"] = "own"
    copy["events"] = [event for event in copy["events"] if event["do"] != "store-fault"]


def choose_load(choose, kib, filesystem):
    """One to three parts of the load. The first always overwrites, otherwise little would be preserved."""
    share = kib // 1024
    parts = [choose_overwrite(choose, share)]
    others = ["overwrite", "mmap", "append", "churn", "punch", "trim"] if filesystem != "none" else ["overwrite", "trim"]
    for _ in range(choose.weighted((30, 0), (45, 1), (25, 2))):
        kind = choose.pick(*others)
        part = choose_overwrite(choose, share) if kind == "overwrite" else choose_other(choose, kind, share)
        parts.append(part)
    return parts


def choose_overwrite(choose, share):
    return {
        "kind": "overwrite",
        "mib": choose.number(max(2, share // 16), max(3, share // 5)),
        "block": choose.weighted((15, 512), (40, 4096), (20, 16384), (15, 65536), (10, 3072)),
        "depth": choose.pick(1, 2, 4, 8),
        "way": choose.weighted((40, "direct"), (25, "direct-dsync"), (15, "dsync"), (20, "buffered")),
        "skewed": choose.chance(30),
        "pace_us": choose.pick(0, 200, 1000, 4000),
    }


def choose_other(choose, kind, share):
    return {
        "kind": kind,
        "mib": choose.number(1, max(2, share // 12)),
        "block": choose.pick(512, 4096, 10000, 65536),
        "sync": choose.chance(40),
        "pace_us": choose.pick(500, 2000, 10000) if kind != "trim" else choose.pick(100_000, 400_000),
    }


def power(choose, low, high):
    """A power of two in KiB."""
    exponents = high.bit_length() - low.bit_length()
    return low << choose.number(0, exponents)


def choose_copy(choose, kib, filesystem, is_last):
    kind = choose.weighted((22, "raw-device"), (20, "raw-file"), (20, "overlay"), (23, "append"), (15, "pipe"))
    chunk = choose.weighted((40, 4), (45, power(choose, 4, 64)), (15, power(choose, 4, 1024)))
    segment = max(chunk, choose.weighted((70, power(choose, 64, 1024)), (30, power(choose, 64, 16384))))
    smallest = max(segment, -(-kib // REGIONS_MAX))
    region = choose.weighted((30, 0), (55, max(smallest, power(choose, 128, 8192))), (15, kib))
    seconds = choose.weighted((12, 0), (88, choose.number(500, 3500) / 1000))
    copy = {
        "secondary": {"kind": kind, "place": choose.pick("scratch", "own"), "garbage": choose.chance(70)},
        "chunk_kib": chunk,
        "segment_kib": segment,
        "region_kib": region,
        "order": choose.pick("physical", "hot"),
        "on_full": choose.weighted((60, "abort"), (40, "hold")),
        "hold_seconds": choose.pick(1, 5, 20),
        "impact": choose.pick("low", "medium", "none"),
        "rate_kib": int(kib / seconds) if seconds else 0,
        "verify": kind != "pipe" and choose.chance(35),
        "all": choose.chance(30),
        "store": choose_store(choose, chunk),
        "settle_ms": choose.number(0, 400),
    }
    copy["events"] = choose_events(choose, copy, kib, filesystem, is_last)
    return copy


def choose_store(choose, chunk):
    place = choose.weighted((45, "folder"), (35, "device"), (20, "file"))
    # A kept store has no RAM head.
    keep = place != "device" and choose.chance(10)
    ram_mib = 0 if keep else choose.weighted((35, 0), (25, 1), (20, 4), (20, 16))
    return {"place": place, "keep": keep, "ram_mib": ram_mib, "size_kib": 0}


def choose_events(choose, copy, kib, filesystem, is_last):
    kind, secondary = choose_event_kind(choose, copy, is_last), copy["secondary"]
    if kind == "nothing":
        return []
    if kind == "kill":
        return choose_kills(choose, copy)
    if kind == "crash":
        event = {"do": "crash", "point": choose.pick(*CRASH_POINTS), "then": choose.pick("resume", "resume", "recover")}
        return [event] + (choose_kills(choose, copy) if choose.chance(25) and event["then"] == "resume" else [])
    if kind == "overflow":
        choose_small_store(choose, copy, kib)
        return [{"do": "overflow"}]
    if kind == "no-space":
        secondary["place"] = "small"
        return [{"do": "no-space", "mib": choose.number(1, 8)}]
    event = {"do": kind, "at": choose_moment(choose, copy)}
    if kind == "signal":
        event["signal"] = choose.pick("TERM", "INT", "HUP")
    elif kind in ("store-fault", "secondary-fault"):
        choose_fault(choose, copy, event)
    elif kind in ("origin-reads", "origin-writes"):
        event["share"] = choose.pick(1, 5, 100)
        event["ms"] = choose.number(50, 2000)
    elif kind in ("store-hang", "stop"):
        event["ms"] = choose.number(100, 4000 if kind == "store-hang" else 2000)
    return [event]


def choose_small_store(choose, copy, kib):
    """A small store with large chunks, so that it overflows. The minimum is 4 MiB, or eight chunks."""
    copy["chunk_kib"] = choose.pick(16, 64, 256)
    copy["segment_kib"] = max(copy["segment_kib"], copy["chunk_kib"])
    # Late releases keep preserving for longer.
    copy["region_kib"] = choose.pick(kib, max(copy["region_kib"] or 8 * MIB, copy["segment_kib"]))
    copy["rate_kib"] = int(kib * 1000 / choose.number(2000, 4000))
    copy["store"]["size_kib"] = max(4 * MIB, 8 * copy["chunk_kib"])
    copy["store"]["ram_mib"] = choose.pick(0, 1)
    copy["store"]["keep"] = False


def choose_event_kind(choose, copy, is_last):
    kind = copy["secondary"]["kind"]
    weights = [
        (28, "nothing"), (24, "kill"), (8, "crash"), (7, "signal"), (10, "store-fault"), (6, "overflow"),
        (6, "store-hang"), (3, "stop"), (6 if kind == "raw-device" else 2, "secondary-fault"),
        (2 if kind not in ("raw-device", "pipe") else 0, "no-space"),
        # A copy that verifies detects a disk that drops writes.
        (12 if kind == "raw-device" and copy["verify"] else 0, "secondary-lies"),
        (10 if kind == "pipe" else 0, "reader-dies"),
        # The filesystem may be unusable afterwards, so only the last copy has these.
        (8 if is_last else 0, "origin-reads"), (4 if is_last else 0, "origin-writes"),
    ]
    return choose.weighted(*weights)


def choose_kills(choose, copy):
    events = []
    for _ in range(choose.weighted((50, 1), (30, 2), (20, 3))):
        then = choose.weighted((80, "resume"), (20, "recover"))
        wait = choose.weighted((70, 0), (30, choose.number(0, 1500)))
        events.append({"do": "kill", "at": choose_moment(choose, copy), "wait_ms": wait, "then": then})
        if then == "recover":
            return events
    if choose.chance(15):
        event = {"do": choose.pick("store-fault", "store-hang", "signal"), "at": choose_moment(choose, copy)}
        event["signal"] = "TERM"
        event["ms"] = choose.number(100, 2000)
        if event["do"] == "store-fault":
            choose_fault(choose, copy, event)
        events.append(event)
    return events


def choose_fault(choose, copy, event):
    event["way"] = choose.weighted(
        (30, "error"), (25, "flakey-writes"), (15, "flakey"), (10, "dust"), (20, "fail-make-request"))
    event["percent"] = choose.pick(10, 100, 100)
    event["ms"] = choose.number(200, 3000)
    if event["do"] == "store-fault":
        # A fault is not noticed while all originals are in RAM, or after the last write to the store.
        copy["store"]["ram_mib"] = 0
        if choose.chance(70):
            event["at"] = {"phase": "data", "percent": choose.number(0, 50), "ms": 0}
    else:
        copy["secondary"]["place"] = "own"


def choose_moment(choose, copy):
    """A moment: some ms after a phase has begun, or after a share of the data is copied."""
    phase = choose.weighted((5, "prepare"), (6, "instant"), (64, "data"), (17, "originals"), (8, "finish"))
    if phase != "data":
        return {"phase": phase, "ms": choose.weighted((50, 0), (50, choose.number(0, 300)))}
    return {"phase": phase, "percent": choose.number(0, 100), "ms": choose.weighted((60, 0), (40, choose.number(0, 200)))}


def main():
    lvm = "--lvm" in sys.argv
    for word in sys.argv[1:]:
        if word != "--lvm":
            print(json.dumps(scenario(int(word), lvm)))


if __name__ == "__main__":
    main()
