#!/usr/bin/env python3
"""Writes new files in appends of 4 KiB, direct and synchronous (O_DIRECT, O_DSYNC), and deletes old ones.

append_load.py FOLDER LOG: runs until SIGTERM, then writes begin and end of every operation to LOG, in nanoseconds. An
operation is one append. The first append of a file includes its creation and the deletion of the oldest file, so that
every wait is measured.
"""

import mmap
import os
import signal
import sys
import time

BLOCK_BYTES = 4096
FILE_BLOCKS = 16
FILES_KEPT = 64
# Each operation takes two integers of memory: a load that is never stopped ends before memory is exhausted.
OPERATIONS_MAX = 2_000_000


def main():
    folder, log = sys.argv[1:]
    going = [True]
    signal.signal(signal.SIGTERM, lambda *_: going.clear())
    block = mmap.mmap(-1, BLOCK_BYTES)
    block.write(os.urandom(BLOCK_BYTES))
    now, write = time.time_ns, os.pwrite
    operations = []
    number = 0
    while going and len(operations) < OPERATIONS_MAX:
        begin = now()
        oldest = f"{folder}/{number - FILES_KEPT}"
        if number >= FILES_KEPT:
            os.unlink(oldest)
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_DIRECT | os.O_DSYNC
        file = os.open(f"{folder}/{number}", flags, 0o600)
        for index in range(FILE_BLOCKS):
            if write(file, block, index * BLOCK_BYTES) != BLOCK_BYTES:
                sys.exit("a short write: is the volume full?")
            end = now()
            operations.append((begin, end))
            begin = end
            if not going:
                break
        os.close(file)
        number += 1
    with open(log, "w") as out:
        out.writelines(f"{begin} {end}\n" for begin, end in operations)


if __name__ == "__main__":
    main()
