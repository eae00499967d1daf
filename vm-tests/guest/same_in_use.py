#!/usr/bin/env python3
"""Compares a copy with the image of the instant wherever the filesystem had something in use.

  same_in_use.py ext4|xfs INSTANT COPY

The free space is what the filesystem's own tools report for the image, which is consistent because the filesystem was
frozen: dumpe2fs for ext4, xfs_db for xfs. Exits with 1 at the first difference, and if the tools report that everything
was free.
"""

import re
import subprocess
import sys

STEP = 1 << 20


def free_ext4(image):
    text = subprocess.run(["dumpe2fs", image], check=True, capture_output=True, text=True).stdout
    block = int(re.search(r"^Block size:\s+(\d+)", text, re.M).group(1))
    for ranges in re.findall(r"^  Free blocks: (.*)$", text, re.M):
        for item in filter(None, (part.strip() for part in ranges.split(","))):
            first, _, last = item.partition("-")
            yield int(first) * block, (int(last or first) + 1) * block


def free_xfs(image):
    def ask(*commands):
        words = [word for command in commands for word in ("-c", command)]
        return subprocess.run(["xfs_db", "-r", *words, image], check=True, capture_output=True, text=True).stdout

    facts = dict(re.findall(r"^(blocksize|agblocks) = (\d+)$", ask("sb 0", "p blocksize agblocks"), re.M))
    block, blocks = int(facts["blocksize"]), int(facts["agblocks"])
    for line in ask("freesp -d").splitlines():
        words = line.split()
        # "agno agbno length". The histogram that follows has other columns.
        if len(words) == 3 and all(word.isdigit() for word in words):
            group, start, length = map(int, words)
            first = (group * blocks + start) * block
            yield first, first + length * block
        elif words and words[0] == "from":
            break


def main():
    kind, instant, copy = sys.argv[1:]
    free = sorted({"ext4": free_ext4, "xfs": free_xfs}[kind](instant))
    compared = skipped = at = 0
    with open(instant, "rb") as one, open(copy, "rb") as other:
        size = one.seek(0, 2)
        for start, end in free + [(size, size)]:
            while at < start:
                length = min(STEP, start - at)
                one.seek(at)
                other.seek(at)
                if one.read(length) != other.read(length):
                    print(f"{copy} differs from the instant within {length} bytes at {at}, which were in use")
                    sys.exit(1)
                at += length
                compared += length
            skipped += max(0, end - max(at, start))
            at = max(at, end)
    print(f"{compared} bytes that were in use are equal, {skipped} were free")
    if compared == 0 or skipped == 0:
        sys.exit(1)


if __name__ == "__main__":
    main()
