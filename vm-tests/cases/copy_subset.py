"""Changes files until a file appears: copy_subset.py DIRECTORY STOP

Below keep/ and drop/: rewrites, truncations, holes, new files, deletions, renames and links between the two.
What is in drop/deep keeps its name and link count, and is only rewritten.
"""

import ctypes
import os
import random
import sys
from pathlib import Path

root, stop = Path(sys.argv[1]), Path(sys.argv[2])
libc = ctypes.CDLL(None, use_errno=True)
PUNCH_HOLE_KEEP_SIZE = 3


def rewrite(path):
    with open(path, "r+b") as file:
        size = max(4096, os.fstat(file.fileno()).st_size)
        file.seek(random.randrange(size) // 4096 * 4096)
        file.write(random.randbytes(random.choice([4096, 40960])))


def punch(path):
    with open(path, "r+b") as file:
        at = ctypes.c_long(random.randrange(32) * 4096)
        libc.fallocate(file.fileno(), PUNCH_HOLE_KEEP_SIZE, at, ctypes.c_long(16384))


def other(path):
    folder = root / random.choice(["keep", "drop"])
    return folder / f"{path.name[:8]}-{random.randrange(1000)}"


def link(path):
    if os.stat(path).st_nlink < 3:
        os.link(path, other(path))


DEEDS = [
    rewrite,
    rewrite,
    lambda path: os.truncate(path, random.randrange(200000)),
    punch,
    lambda path: other(path).write_bytes(random.randbytes(random.randrange(100000))),
    lambda path: os.unlink(path),
    lambda path: os.rename(path, other(path)),
    link,
]

done = 0
while not stop.exists():
    deep = list((root / "drop/deep").iterdir())
    rewrite(random.choice([path for path in deep if path.name.startswith("static")]))
    files = [path for folder in ["keep", "drop"] for path in (root / folder).iterdir() if path.is_file()]
    deed = random.choice(DEEDS[:6] if len(files) < 30 else DEEDS)
    if len(files) > 60:
        deed = os.unlink
    try:
        deed(random.choice(files))
    except (FileNotFoundError, FileExistsError):
        pass
    if done % 20 == 0:
        os.sync()
    done += 1
print(f"{done} changes")
