"""Compares a map of free space (see __free_map) with what the filesystem's own tools say.

    free_map_judge.py files DIRECTORY...          prints "START END" in bytes for each extent of each file below
    free_map_judge.py judge KIND DEVICE OFFSET REPORT USED GONE
        the filesystem of KIND (ext4, xfs) on DEVICE, whose byte 0 is byte OFFSET of the origin:
        nothing in the file USED (extents as above) is free, everything in GONE (- for none) is free, and within DEVICE
        the map equals the free-space structures on the disk. The journal is where the tools say that it is.
    free_map_judge.py within START END REPORT     prints how many bytes of that range are free
"""

import os
import re
import subprocess
import sys


def run(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def fail(message):
    print(f"free_map_judge: {message}")
    sys.exit(1)


def read_extents(path):
    with open(path, encoding="utf-8") as file:
        return sorted(tuple(map(int, line.split())) for line in file if line.strip())


def read_map(path, offset=0, size=None, kind="free"):
    extents = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            if line.startswith(f"{kind} "):
                start, end = (int(word) - offset for word in line.split()[1:])
                if size is not None:
                    start, end = max(start, 0), min(end, size)
                if start < end:
                    extents.append((start, end))
    return extents


def merge(extents):
    merged = []
    for start, end in sorted(extents):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def minus(left, right):
    """Returns the parts of `left` that are not in `right`."""
    rest, right = [], merge(right)
    for start, end in merge(left):
        for other_start, other_end in right:
            if other_end <= start or other_start >= end:
                continue
            if start < other_start:
                rest.append((start, other_start))
            start = max(start, other_end)
            if start >= end:
                break
        if start < end:
            rest.append((start, end))
    return rest


def total(extents):
    return sum(end - start for start, end in merge(extents))


def ranges(text):
    """Parses '1-3, 7' into half-open ranges of blocks."""
    for part in filter(None, (word.strip() for word in text.split(","))):
        first, _, last = part.partition("-")
        yield int(first), int(last or first) + 1


def ext4(device):
    """Returns the free extents of the bitmaps on the disk, and the metadata of each group."""
    text = run("dumpe2fs", device)
    block = int(re.search(r"^Block size:\s+(\d+)", text, re.M)[1])
    # With clusters, dumpe2fs prints the first block of the first and of the last free cluster.
    cluster = re.search(r"^Cluster size:\s+(\d+)", text, re.M)
    blocks = int(cluster[1]) // block if cluster else 1
    free, metadata = [], []
    for line in text.splitlines():
        if match := re.match(r"\s+Free blocks: (.*)", line):
            free += ((start, end + blocks - 1) for start, end in ranges(match[1]))
        for match in re.finditer(r"(?:superblock|descriptors|GDT blocks|itmap|table) at (\d+(?:-\d+)?)", line):
            metadata += ranges(match[1])
    if not metadata:
        fail("dumpe2fs shows no metadata")
    in_bytes = lambda blocks: [(start * block, end * block) for start, end in blocks]
    return in_bytes(free), in_bytes(metadata)


def xfs(device):
    """Returns the free extents of the free-space btrees on the disk."""
    run("blockdev", "--flushbufs", device)
    text = run("xfs_db", "-r", "-c", "sb 0", "-c", "print blocksize agblocks", device)
    block, per_group = (int(re.search(rf"^{name} = (\d+)", text, re.M)[1]) for name in ("blocksize", "agblocks"))
    free = []
    for line in run("xfs_db", "-r", "-c", "freesp -d", device).splitlines():
        words = line.split()
        if len(words) == 3 and all(word.isdigit() for word in words):
            group, start, length = map(int, words)
            start += group * per_group
            free.append((start * block, (start + length) * block))
    # Each group starts with superblock and headers, one sector each.
    groups = int(re.search(r"^agcount = (\d+)", run("xfs_db", "-r", "-c", "sb 0", "-c", "print agcount", device), re.M)[1])
    heads = [(group * per_group * block, group * per_group * block + 4 * 512) for group in range(groups)]
    return free, heads


def ext4_log(device):
    """Returns the journal inode's extents; none without a journal or with an external one."""
    if not re.search(r"^Journal inode:", run("dumpe2fs", "-h", device), re.M):
        return []
    block = int(re.search(r"^Block size:\s+(\d+)", run("dumpe2fs", "-h", device), re.M)[1])
    found = []
    for line in run("debugfs", "-R", "ex <8>", device).splitlines():
        # Level, entry, logical, physical, length. An index entry has no end.
        match = re.match(r"\s*(\d+)/\s*(\d+)\s+\d+/\s*\d+\s+\d+ -\s+\d+\s+(\d+) -\s+(\d+)\s", line)
        if match and match[1] == match[2]:
            found.append((int(match[3]) * block, (int(match[4]) + 1) * block))
    if not found:
        fail("debugfs shows no journal")
    return found


def xfs_log(device):
    text = run("xfs_db", "-r", "-c", "sb 0", "-c", "print logstart logblocks blocksize", device)
    start, blocks, block = (int(re.search(rf"^{name} = (\d+)", text, re.M)[1]) for name in ("logstart", "logblocks", "blocksize"))
    if start == 0:
        return []
    first = int(re.search(r"\((\d+)\)", run("xfs_db", "-r", "-c", f"convert fsblock {start} byte", device))[1])
    return [(first, first + blocks * block)]


def files(directories):
    """Returns the extents of every file according to FIEMAP."""
    walks = (walk for directory in directories for walk in os.walk(directory))
    paths = [os.path.join(folder, name) for folder, _, names in walks for name in names]
    text = run("filefrag", "-e", *paths)
    block = int(re.search(r"blocks? of (\d+) bytes", text)[1])
    for line in text.splitlines():
        match = re.match(r"\s*\d+:\s+\d+\.\.\s*\d+:\s+(\d+)\.\.\s*(\d+):", line)
        if match and "inline" not in line:
            print(int(match[1]) * block, (int(match[2]) + 1) * block)


def judge(kind, device, offset, report, used_path, gone_path):
    size = int(run("blockdev", "--getsize64", device))
    mapped = read_map(report, int(offset), size)
    free, metadata = {"ext4": ext4, "xfs": xfs}[kind](device)
    log = merge({"ext4": ext4_log, "xfs": xfs_log}[kind](device))
    if (told := merge(read_map(report, int(offset), size, "log"))) != log:
        fail(f"the log is at {log}, not at {told}")
    used = read_extents(used_path)
    gone = [] if gone_path == "-" else read_extents(gone_path)
    if not used or (gone_path != "-" and not gone):
        fail("nothing to judge by: no file in use, or none that is gone")
    if wrong := minus(mapped, free):
        fail(f"the map calls free what is not free on the disk: {wrong[:5]}")
    for what, extents in (("files", used), ("metadata", metadata)):
        if wrong := minus(extents, minus(extents, mapped)):
            fail(f"the map calls free what belongs to {what}: {wrong[:5]}")
    if wrong := minus(gone, mapped):
        fail(f"a deleted file's blocks are not free: {wrong[:5]}")
    missing = total(free) - total(mapped)
    print(f"{device}: a log of {total(log)} bytes; {total(mapped)} bytes in {len(mapped)} extents, {missing} missing, {len(used)} extents of files")
    # Space that the filesystem has reserved in memory (ext4 preallocations) or for itself (the AGFL of xfs) is free
    # only on the disk.
    if missing > max(total(free) // 50, 8 << 20):
        fail(f"{missing} of {total(free)} free bytes are not in the map")


def main():
    command, *words = sys.argv[1:]
    if command == "files":
        files(words)
    elif command == "judge":
        judge(*words)
    elif command == "within":
        start, end = int(words[0]), int(words[1])
        print(total(read_map(words[2], start, end - start)))
    else:
        fail(f"no such command: {command}")


main()
