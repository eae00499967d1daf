"""A FUSE filesystem with two folders and a file, whose server can be stopped to simulate a dead one.

Usage: dead_server.py MOUNT-POINT BYTES

Speaks the kernel's protocol itself (Linux include/uapi/linux/fuse.h). A stopped process has the same effect as a dead
machine. All replies forbid caching, so that every access asks the server.
"""

import ctypes
import os
import stat
import struct
import sys

ROOT, IMAGE, FOLDER, LOWER = 1, 2, 3, 4
NAMES = {b"image": IMAGE, b"folder": FOLDER, b"lower": LOWER}

LOOKUP, GETATTR, SETATTR, OPEN, READ, WRITE, STATFS = 1, 3, 4, 14, 15, 16, 17
RELEASE, FSYNC, FLUSH, INIT, OPENDIR, READDIR, RELEASEDIR = 18, 20, 25, 26, 27, 28, 29
FORGET, INTERRUPT, BATCH_FORGET = 2, 36, 42


class Server:
    """Replies to the kernel's requests."""

    def __init__(self, size):
        self.content = bytearray(size)

    def attributes(self, node):
        """struct fuse_attr"""
        if node == IMAGE:
            mode, size = stat.S_IFREG | 0o666, len(self.content)
        else:
            mode, size = stat.S_IFDIR | 0o755, 4096
        return struct.pack("=6Q10I", node, size, size // 512, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)

    def answer(self, opcode, node, body):
        """Returns the reply's body, or a number for an errno."""
        if opcode == INIT:
            return struct.pack("=4I2H2I2H8I", 7, 31, 65536, 0, 12, 9, 65536, 1, 0, 0, *[0] * 8)
        if opcode == LOOKUP:
            found = NAMES.get(body.split(b"\0")[0]) if node == ROOT else None
            if found is None:
                return 2
            return struct.pack("=4Q2I", found, 0, 0, 0, 0, 0) + self.attributes(found)
        if opcode in (GETATTR, SETATTR):
            return struct.pack("=Q2I", 0, 0, 0) + self.attributes(node)
        if opcode in (OPEN, OPENDIR):
            return struct.pack("=Q2I", 0, 0, 0)
        if opcode == READ:
            _, offset, size = struct.unpack_from("=2QI", body)
            return bytes(self.content[offset : offset + size])
        if opcode == READDIR:
            return b""
        if opcode == WRITE:
            _, offset, size = struct.unpack_from("=2QI", body)
            self.content[offset : offset + size] = body[40 : 40 + size]
            return struct.pack("=2I", size, 0)
        if opcode == STATFS:
            return struct.pack("=5Q10I", 65536, 60000, 60000, 100, 90, 4096, 255, 4096, *[0] * 7)
        if opcode in (RELEASE, FSYNC, FLUSH, RELEASEDIR):
            return b""
        return 38


def main():
    point, size = sys.argv[1], int(sys.argv[2])
    channel = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={channel},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"/dev/nowhere", point.encode(), b"fuse.dead", 2, options) != 0:
        sys.exit(f"mount: errno {ctypes.get_errno()}")
    server = Server(size)
    while True:
        try:
            request = os.read(channel, 1 << 17)
        except OSError as error:
            if error.errno == 2:
                continue
            return
        _, opcode, unique, node = struct.unpack_from("=2I2Q", request)
        if opcode in (FORGET, BATCH_FORGET, INTERRUPT):
            continue
        reply = server.answer(opcode, node, request[40:])
        error, body = (-reply, b"") if isinstance(reply, int) else (0, reply)
        try:
            os.write(channel, struct.pack("=IiQ", 16 + len(body), error, unique) + body)
        except OSError as error:
            # The process that asked has gone.
            if error.errno != 2:
                raise


main()
