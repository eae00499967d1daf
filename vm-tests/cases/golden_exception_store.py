"""Prepares an origin and a store, overwrites the origin, and dumps the store as text.

Used in the guest by golden_exception_store.sh; tests/golden/exception_store/README.md describes the files.
"""

import hashlib
import mmap
import os
import sys

PAGE = 4096
BLOCK = 1 << 20
UNIT = 16
# Origin chunks are overwritten in the order (i * STEP) mod chunks, so that no two exceptions are consecutive.
STEP = 7


def page(word, number):
    """A page of one 16-byte unit: four letters and the page's number in twelve digits."""
    unit = b"%s%012d" % (word, number)
    assert len(unit) == UNIT
    return unit * (PAGE // UNIT)


class Device:
    """A block device, read and written with direct I/O."""

    def __init__(self, path):
        self.fd = os.open(path, os.O_RDWR | os.O_DIRECT)
        self.bytes = os.lseek(self.fd, 0, os.SEEK_END)
        self.buffer = mmap.mmap(-1, BLOCK)

    def read(self, offset, length):
        view = memoryview(self.buffer)[:length]
        assert os.preadv(self.fd, [view], offset) == length
        return bytes(view)

    def write(self, offset, data):
        view = memoryview(self.buffer)[: len(data)]
        view[:] = data
        assert os.pwritev(self.fd, [view], offset) == len(data)

    def fill(self, word):
        for offset in range(0, self.bytes, BLOCK):
            first = offset // PAGE
            self.write(offset, b"".join(page(word, first + n) for n in range(BLOCK // PAGE)))


def prepare(origin, store):
    origin, store = Device(origin), Device(store)
    origin.fill(b"orig")
    # A used disk: only the part that the kernel reads as "no store yet" is clean.
    store.fill(b"junk")
    store.write(0, bytes(PAGE))


def digest(path):
    device = Device(path)
    total = hashlib.sha256()
    for offset in range(0, device.bytes, BLOCK):
        total.update(device.read(offset, BLOCK))
    print(total.hexdigest())


def touched(origin_bytes, chunk_bytes, exceptions):
    chunks = origin_bytes // chunk_bytes
    assert exceptions <= chunks and chunks % STEP != 0
    return [index * STEP % chunks for index in range(exceptions)]


def overwrite(data, chunk_sectors, exceptions):
    device = Device(data)
    chunk_bytes = int(chunk_sectors) * 512
    for chunk in touched(device.bytes, chunk_bytes, int(exceptions)):
        # Overwrites only the last page of the chunk; the original must still be the whole chunk.
        offset = (chunk + 1) * chunk_bytes - PAGE
        device.write(offset, page(b"newr", offset // PAGE))


def write_down(store, chunk_sectors, exceptions, status, target):
    device = Device(store)
    chunk_bytes = int(chunk_sectors) * 512
    used_sectors = int(status.split("/")[0])
    # Includes two chunks after the used part: the disk's old content there must not be read as part of the store.
    end = used_sectors * 512 + 2 * chunk_bytes
    image = b"".join(device.read(offset, PAGE) for offset in range(0, end, PAGE))
    with open(target + ".cow", "w", encoding="ascii") as text:
        text.write("bytes %d\n" % len(image))
        offset = 0
        while offset < len(image):
            unit = image[offset : offset + UNIT]
            count = 1
            while True:
                end = offset + count * UNIT
                if end % PAGE == 0 and image[end : end + PAGE] == unit * (PAGE // UNIT):
                    count += PAGE // UNIT
                elif image[end : end + UNIT] == unit:
                    # Within a page, counts the rest of the page at once if it is uniform.
                    rest = PAGE - end % PAGE
                    count += rest // UNIT if image[end : end + rest] == unit * (rest // UNIT) else 1
                else:
                    break
            if unit.strip(b"\0"):
                text.write("%d %d %s\n" % (offset, count, unit.hex()))
            offset += count * UNIT
    origin_bytes = 8 << 20
    with open(target + ".expect", "w", encoding="ascii") as text:
        text.write("chunk_sectors %s\norigin_bytes %d\nstatus %s\n" % (chunk_sectors, origin_bytes, status))
        for chunk in touched(origin_bytes, chunk_bytes, int(exceptions)):
            text.write("%d\n" % chunk)


COMMANDS = {"prepare": prepare, "digest": digest, "overwrite": overwrite, "write-down": write_down}
COMMANDS[sys.argv[1]](*sys.argv[2:])
