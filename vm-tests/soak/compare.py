"""Compares a copy with the capture of its instant.

Everything that was in use must be equal, byte for byte; with `--all` and without a filesystem, that is everything.
Space that was free according to the filesystem's own tools, run on the captured image, must be equal or zero: never
what the secondary held before.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "guest"))
from same_in_use import free_ext4, free_xfs

STEP = 1 << 20
PIECE = 1024
ZEROS = bytes(STEP)
DIFFERENCES_SHOWN = 40


def differences(kind, instant, copy, everything):
    """Returns the wrong ranges as (start, end, what), and how much was in use."""
    free = [] if everything or kind == "none" else sorted({"ext4": free_ext4, "xfs": free_xfs}[kind](instant))
    wrong, in_use, at = [], 0, 0
    with open(instant, "rb", buffering=0) as one, open(copy, "rb", buffering=0) as other:
        size = one.seek(0, 2)
        if other.seek(0, 2) < size:
            return [(0, size, f"the copy has {other.tell()} bytes, the origin {size}")], 0
        for start, end in [*free, (size, size)]:
            start, end = min(start, size), min(end, size)
            wrong += unequal(one, other, at, start, False)
            in_use += max(0, start - at)
            wrong += unequal(one, other, max(at, start), end, True)
            at = max(at, end)
    return wrong, in_use


def unequal(one, other, start, end, is_free):
    found = []
    for at in range(start, end, STEP):
        length = min(STEP, end - at)
        left, right = read(one, at, length), read(other, at, length)
        if left == right or is_free and right == ZEROS[:length]:
            continue
        for piece in range(0, length, PIECE):
            here, there = left[piece : piece + PIECE], right[piece : piece + PIECE]
            if here == there or is_free and there == ZEROS[: len(there)]:
                continue
            what = f"{'free' if is_free else 'in use'}: {here[:24].hex()}.. at the instant, {there[:24].hex()}.. in the copy"
            begin = at + piece
            if found and found[-1][1] == begin:
                found[-1] = (found[-1][0], begin + len(here), found[-1][2])
            else:
                found.append((begin, begin + len(here), what))
    return found


def read(file, at, length):
    file.seek(at)
    data = b""
    while len(data) < length:
        more = file.read(length - len(data))
        if not more:
            break
        data += more
    return data


def told(wrong):
    lines = [f"{start}..{end} {what}" for start, end, what in wrong[:DIFFERENCES_SHOWN]]
    total = sum(end - start for start, end, _ in wrong)
    return f"{len(wrong)} ranges of {total} bytes in all: " + "; ".join(lines)
