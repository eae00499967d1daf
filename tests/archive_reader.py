#!/usr/bin/env python3
"""An independent reader of Tidemark archives, written from src/format/archive/FORMAT.md alone.

    archive_reader.py extract ARCHIVE OUT     check everything, write what the archive holds to OUT
    archive_reader.py extract ARCHIVE OUT PARENT...     the same of an increment, with the archives that it continues
    archive_reader.py extract --data-only ARCHIVE OUT   the same, without applying the originals to the data
    archive_reader.py check ARCHIVE           check everything

Standard library only, no code shared with Tidemark. Exit code 0: whole; 4: bad; 2: usage.
"""

import operator
import struct
import sys

BLOCK = 4096
SECTOR = 512
SUPER_MAGIC = b"TIDEMARK"
FRAME_MAGIC = b"TDMFRAME"
KINDS = {1: "data", 2: "originals", 3: "map"}
DATA, ORIGINALS, MAP = 1, 2, 3
PRESENT, ZERO, ABSENT, INHERITED = 1, 2, 3, 4
SEGMENTS_MAX = 4194304


class Bad(Exception):
    """The archive violates FORMAT.md."""


def need(condition, what):
    if not condition:
        raise Bad(what)


def crc_tables():
    """Eight tables, to process eight bytes at a time."""
    first = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
        first.append(value)
    tables = [first]
    for _ in range(7):
        last = tables[-1]
        tables.append([(value >> 8) ^ first[value & 0xFF] for value in last])
    return tables


TABLES = crc_tables()


def crc32c(data):
    t0, t1, t2, t3, t4, t5, t6, t7 = TABLES
    crc = 0xFFFFFFFF
    whole = len(data) // 8 * 8
    for low, high in struct.iter_unpack("<II", data[:whole]):
        low ^= crc
        crc = (
            t7[low & 0xFF] ^ t6[(low >> 8) & 0xFF] ^ t5[(low >> 16) & 0xFF] ^ t4[low >> 24]
            ^ t3[high & 0xFF] ^ t2[(high >> 8) & 0xFF] ^ t1[(high >> 16) & 0xFF] ^ t0[high >> 24]
        )
    for byte in data[whole:]:
        crc = (crc >> 8) ^ t0[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


assert crc32c(b"123456789") == 0xE3069283

M32, M64 = (1 << 32) - 1, (1 << 64) - 1
P32_1, P32_2, P32_3 = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D
P64_1, P64_2, P64_3 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
P64_4, P64_5 = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5
MIX_1, MIX_2 = 0x165667919E3779F9, 0x9FB21C651E98DF25
SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f"
    "cb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
    "3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364"
    "eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e"
    "2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)


def xxh3_64(data):
    """XXH3-64 with seed 0 and the default secret, after xxhash_spec.md of the xxHash project."""
    length = len(data)
    if length <= 16:
        return xxh3_small(data, length)
    if length <= 240:
        return xxh3_medium(data, length)
    return xxh3_long(data, length)


def s64(at):
    return u64(SECRET, at)


def fold(first, second):
    product = first * second
    return (product & M64) ^ (product >> 64)


def avalanche(value):
    value &= M64
    value = (value ^ (value >> 37)) * MIX_1 & M64
    return value ^ (value >> 32)


def avalanche_xxh64(value):
    value = (value ^ (value >> 33)) * P64_2 & M64
    value = (value ^ (value >> 29)) * P64_3 & M64
    return value ^ (value >> 32)


def rotate(value, count):
    return (value << count | value >> (64 - count)) & M64


def xxh3_small(data, length):
    if length == 0:
        return avalanche_xxh64(s64(56) ^ s64(64))
    if length <= 3:
        combined = data[0] << 16 | data[length >> 1] << 24 | data[-1] | length << 8
        return avalanche_xxh64(combined ^ u32(SECRET, 0) ^ u32(SECRET, 4))
    if length <= 8:
        value = (u32(data, length - 4) + (u32(data, 0) << 32)) ^ s64(8) ^ s64(16)
        value = (value ^ rotate(value, 49) ^ rotate(value, 24)) * MIX_2 & M64
        value = (value ^ ((value >> 35) + length)) * MIX_2 & M64
        return value ^ (value >> 28)
    low = u64(data, 0) ^ s64(24) ^ s64(32)
    high = u64(data, length - 8) ^ s64(40) ^ s64(48)
    swapped = int.from_bytes(low.to_bytes(8, "little"), "big")
    return avalanche(length + swapped + high + fold(low, high))


def xxh3_medium(data, length):
    def mix(at, secret):
        return fold(u64(data, at) ^ s64(secret), u64(data, at + 8) ^ s64(secret + 8))

    total = length * P64_1
    if length <= 128:
        for pair in range((length - 1) // 32 + 1):
            total += mix(16 * pair, 32 * pair) + mix(length - 16 * (pair + 1), 32 * pair + 16)
        return avalanche(total)
    total = avalanche(total + sum(mix(16 * at, 16 * at) for at in range(8)))
    total += sum(mix(16 * at, 16 * (at - 8) + 3) for at in range(8, length // 16))
    return avalanche(total + mix(length - 16, 136 - 17))


def xxh3_long(data, length):
    lanes = [P32_3, P64_1, P64_2, P64_3, P64_4, P32_2, P64_5, P32_1]
    keys = [s64(8 * (stripe + lane)) for stripe in range(16) for lane in range(8)]

    def accumulate(values, keys):
        mixed = list(map(operator.xor, values, keys))
        for lane in range(8):
            products = sum((value & M32) * (value >> 32) for value in mixed[lane::8])
            lanes[lane] = (lanes[lane] + products + sum(values[lane ^ 1 :: 8])) & M64

    blocks = (length - 1) // 1024
    for values in struct.iter_unpack("<128Q", data[: blocks * 1024]):
        accumulate(values, keys)
        for lane in range(8):
            value = lanes[lane]
            lanes[lane] = (value ^ (value >> 47) ^ s64(128 + 8 * lane)) * P32_1 & M64
    count = (length - 1 - blocks * 1024) // 64 * 8
    accumulate(struct.unpack_from("<%dQ" % count, data, blocks * 1024), keys[:count])
    last = 192 - 64 - 7
    accumulate(struct.unpack_from("<8Q", data, length - 64), [s64(last + 8 * lane) for lane in range(8)])
    pairs = range(0, 8, 2)
    merged_lanes = sum(fold(lanes[at] ^ s64(11 + 8 * at), lanes[at + 1] ^ s64(19 + 8 * at)) for at in pairs)
    return avalanche(length * P64_1 + merged_lanes)



def is_zero(data):
    return not any(data) if len(data) < 64 else data.count(0) == len(data)


def u32(block, at):
    return struct.unpack_from("<I", block, at)[0]


def u64(block, at):
    return struct.unpack_from("<Q", block, at)[0]


assert xxh3_64(b"123456789") == 0x72DCB18B67A17DFF


def check_crc(block, salt, what):
    need(u32(block, 4092) == crc32c(salt.encode() + bytes(block[:4092])), what + ": CRC")


def text(block, at, size, what):
    length = struct.unpack_from("<H", block, at)[0]
    need(length <= size - 2, what + ": length")
    need(is_zero(block[at + 2 + length : at + size]), what + ": padding")
    try:
        return bytes(block[at + 2 : at + 2 + length]).decode("utf-8")
    except UnicodeDecodeError as error:
        raise Bad(what + ": not UTF-8") from error


def power_of_two(value, low, high):
    return low <= value <= high and value & (value - 1) == 0


class Superblock:
    def __init__(self, block, role):
        name = "head" if role == 1 else "tail"
        what = name + " superblock"
        need(len(block) == BLOCK, what + ": cut off")
        need(block[:8] == SUPER_MAGIC, what + ": magic")
        check_crc(block, "tidemark superblock " + name, what)
        self.version = u32(block, 8)
        need(self.version in (1, 2, 3), what + ": version")
        need(u32(block, 12) == role, what + ": role")
        self.archive = bytes(block[16:32])
        self.parent, self.snapshot, self.base = (bytes(block[at : at + 16]) for at in (32, 144, 160))
        self.map_offset = u64(block, 176)
        self.increment = any(self.parent)
        need(any(self.base) == self.increment, what + ": snapshot of the parent")
        need((self.increment or any(self.snapshot)) == (self.version == 3), what + ": names")
        need(self.map_offset == 0 or (self.increment and role == 2), what + ": offset of the map")
        self.size = u64(block, 48)
        self.instant = u64(block, 56)
        self.chunk = u32(block, 64)
        self.segment = u32(block, 68)
        self.originals = u32(block, 72)
        need(power_of_two(self.chunk, 4096, 1 << 20), what + ": chunk size")
        need(power_of_two(self.segment, 65536, 1 << 24), what + ": segment size")
        need(self.originals <= 2 and not (self.increment and self.originals == 1), what + ": originals mode")
        need(-(-self.size // self.segment) <= SEGMENTS_MAX, what + ": origin size")
        for start, end in ((76, 80), (184, 192), (1536, 4092)):
            need(is_zero(block[start:end]), what + ": padding")
        if role == 1:
            need(is_zero(block[80:144]), what + ": totals")
        self.totals = struct.unpack_from("<8Q", block, 80)
        self.tool = text(block, 192, 64, what + ": program")
        self.name = text(block, 256, 256, what + ": name")
        self.path = text(block, 512, 1024, what + ": path")
        self.shared = bytes(block[8:12]) + bytes(block[16:80]) + bytes(block[144:176]) + bytes(block[184:4092])


def stored_payload(superblock, head):
    return -(-u64(head, 48) // BLOCK) * BLOCK if superblock.increment else superblock.segment


class Frame:
    def __init__(self, superblock, sequence, data):
        what = "frame %d" % sequence
        segment, stored = superblock.segment, stored_payload(superblock, data)
        head, payload, tail = data[:BLOCK], data[BLOCK : BLOCK + stored], data[BLOCK + stored :]
        need(len(tail) == BLOCK, what + ": cut off")
        self.kind = u32(head, 12)
        for block, side, name in ((head, 1, "head"), (tail, 2, "tail")):
            need(block[:8] == FRAME_MAGIC, what + ": magic of the " + name)
            need(u32(block, 12) in KINDS, what + ": kind")
            check_crc(block, "tidemark control %s %s" % (name, KINDS[u32(block, 12)]), what + ": " + name)
            need(u32(block, 8) == side, what + ": side")
            need(block[16:32] == superblock.archive, what + ": of another archive")
            need(u64(block, 32) == sequence, what + ": in the wrong place")
        need(head[12:4092] == tail[12:4092], what + ": torn")
        self.offset, length, count = u64(head, 40), u64(head, 48), u32(head, 60)
        need(self.offset < superblock.size, what + ": origin offset")
        need(1 <= length <= segment, what + ": payload length")
        need(count <= 500, what + ": extent count")
        need(is_zero(head[64 + 8 * count : 4064]), what + ": padding")
        need(is_zero(head[4072:4092]), what + ": padding")
        self.payload = payload[:length]
        self.check_payload(superblock.version, head, what)
        need(is_zero(payload[length:]), what + ": payload padding")
        self.extents = self.read_extents(superblock, head, count, what)
        self.check_kind(superblock, what)

    def check_payload(self, version, head, what):
        crc, xxh3 = u32(head, 56), u64(head, 4064)
        if version == 1:
            need(crc32c(self.payload) == crc, what + ": payload CRC")
            need(xxh3 == 0, what + ": padding")
        else:
            need(xxh3_64(self.payload) == xxh3, what + ": payload checksum")
            need(crc == 0, what + ": padding")

    def read_extents(self, superblock, head, count, what):
        extents, end = [], self.offset
        for packed in struct.unpack_from("<%dQ" % count, head, 64):
            start = self.offset + (packed & ((1 << 40) - 1)) * SECTOR
            stop = start + (packed >> 40) * SECTOR
            need(stop - superblock.size < SECTOR, what + ": extent beyond the origin's end")
            stop = min(stop, superblock.size)
            need(end <= start < stop, what + ": extent out of order")
            extents.append((start, stop))
            end = stop
        return extents

    def check_kind(self, superblock, what):
        length = len(self.payload)
        packed = self.kind == ORIGINALS or (self.kind == DATA and superblock.increment)
        if self.kind == ORIGINALS:
            need(superblock.originals == 2, what + ": originals in an archive that has none")
        if packed:
            need(self.offset % SECTOR == 0, what + ": origin offset")
            need(self.extents and self.extents[0][0] == self.offset, what + ": first extent")
            need(sum(end - start for start, end in self.extents) == length, what + ": payload length")
        elif self.kind == DATA:
            need(self.offset % superblock.segment == 0, what + ": origin offset")
            need(length == min(superblock.segment, superblock.size - self.offset), what + ": payload length")
            need(self.extents and self.extents[-1][1] <= self.offset + length, what + ": extents")
        else:
            need(not self.extents and length % 24 == 0, what + ": map payload")


class Archive:
    def __init__(self, stream, out, data_only=False):
        self.stream, self.out, self.data_only = stream, out, data_only
        self.head = Superblock(stream.read(BLOCK), 1)
        self.packed_end = 0
        self.map_at = 0
        self.cleared = []
        self.counts = {DATA: 0, ORIGINALS: 0, MAP: 0}
        self.originals_bytes = 0
        self.present = {}
        self.map = []
        self.map_end = 0

    def read(self):
        if self.out and not self.head.increment:
            self.out.truncate(self.head.size)
        sequence, last, offset = 0, DATA, BLOCK
        while True:
            block = self.stream.read(BLOCK)
            if block[:8] != FRAME_MAGIC:
                break
            need(len(block) == BLOCK, "frame %d: cut off" % sequence)
            length = stored_payload(self.head, block) + BLOCK
            need(length <= self.head.segment + BLOCK, "frame %d: payload length" % sequence)
            frame = Frame(self.head, sequence, block + self.stream.read(length))
            need(frame.kind >= last, "frame %d: kind out of order" % sequence)
            last = frame.kind
            if frame.kind == MAP and self.head.increment and self.map_at == 0:
                self.map_at = offset
            offset += BLOCK + length
            self.counts[frame.kind] += 1
            (None, self.data, self.original, self.map_frame)[frame.kind](frame)
            sequence += 1
        self.finish(Superblock(block, 2))

    def write(self, start, data):
        if self.out:
            self.out.seek(start)
            self.out.write(data)

    def data(self, frame):
        if self.head.increment:
            need(frame.offset >= self.packed_end, "data frame at %d: out of order" % frame.offset)
            self.present[frame.offset] = frame.extents
            self.packed_end = frame.extents[-1][1]
            at = 0
            for start, end in frame.extents:
                self.write(start, frame.payload[at : at + end - start])
                at += end - start
            return
        need(frame.offset not in self.present, "two data frames for %d" % frame.offset)
        self.present[frame.offset] = frame.extents
        for start, end in frame.extents:
            self.write(start, frame.payload[start - frame.offset : end - frame.offset])

    def original(self, frame):
        at = 0
        for start, end in frame.extents:
            if not self.data_only:
                self.write(start, frame.payload[at : at + end - start])
            at += end - start
        self.originals_bytes += at

    def map_frame(self, frame):
        need(frame.offset == self.map_end, "map frame: offset")
        for start, end, state, reserved in struct.iter_unpack("<QQII", frame.payload):
            need(start == self.map_end and start < end <= self.head.size, "map: order")
            states = (PRESENT, ZERO, ABSENT, INHERITED) if self.head.increment else (PRESENT, ZERO, ABSENT)
            need(state in states and reserved == 0, "map: state")
            if state in (ZERO, ABSENT):
                self.cleared.append((start, end))
            if state == PRESENT:
                self.map.append((start, end))
            self.map_end = end

    def finish(self, tail):
        need(self.stream.read(1) == b"", "bytes after the tail superblock")
        need(tail.shared == self.head.shared, "head and tail superblock differ")
        need(self.map_end == self.head.size, "map: end")
        frames = [extent for offset in sorted(self.present) for extent in self.present[offset]]
        need(merged(frames) == merged(self.map), "map and data frames differ")
        data, originals, maps = self.counts[DATA], self.counts[ORIGINALS], self.counts[MAP]
        present = sum(end - start for start, end in frames)
        expected = (data, originals, maps, data, data + originals, data + originals + maps,
                    present, self.originals_bytes)
        need(tail.totals == expected, "totals")
        need(tail.map_offset == self.map_at, "offset of the map")


def continues(child, parent):
    named = parent.archive == child.parent or (any(parent.snapshot) and parent.snapshot == child.base)
    return named and parent.size == child.size


def extract(path, out, parents, data_only):
    """Writes what the archive at `path` holds, with what it continues of `parents`."""
    with open(path, "rb") as stream:
        head = Superblock(stream.read(BLOCK), 1)
    if not head.increment:
        with open(path, "rb") as stream:
            return Archive(stream, out, data_only).read()
    for parent in parents:
        with open(parent, "rb") as stream:
            found = continues(head, Superblock(stream.read(BLOCK), 1))
        if found:
            extract(parent, out, parents, False)
            break
    else:
        raise Bad("the parent is missing")
    # The map is at the end: a first pass checks everything and reads it.
    with open(path, "rb") as stream:
        checked = Archive(stream, None, data_only)
        checked.read()
    for start, end in checked.cleared:
        out.seek(start)
        out.write(bytes(end - start))
    with open(path, "rb") as stream:
        Archive(stream, out, data_only).read()
    return None


def merged(extents):
    result = []
    for start, end in extents:
        if result and result[-1][1] == start:
            result[-1] = (result[-1][0], end)
        else:
            result.append((start, end))
    return result


def main(arguments):
    data_only = arguments[:2] == ["extract", "--data-only"]
    if data_only:
        arguments = ["extract"] + arguments[2:]
    extracts = len(arguments) >= 3 and arguments[0] == "extract"
    if not extracts and not (len(arguments) == 2 and arguments[0] == "check"):
        print(__doc__, file=sys.stderr)
        return 2
    try:
        if extracts:
            with open(arguments[2], "wb") as out:
                extract(arguments[1], out, arguments[3:], data_only)
        else:
            with open(arguments[1], "rb") as stream:
                Archive(stream, None).read()
    except Bad as error:
        print("bad archive: %s" % error, file=sys.stderr)
        return 4
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
