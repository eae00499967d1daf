"""Access to the guest: commands with a time limit, device-mapper devices, disks whose faults come and go.

A command that exceeds its time limit is a failure; a list of blocked tasks goes to the kernel's log. The command is
killed, but not waited for, because a task that hangs in the kernel does not die.
"""

import errno
import fcntl
import os
import signal
import struct
import subprocess
import time
from pathlib import Path

SECONDS_MAX = 60
MIB = 1 << 20


class Failure(Exception):
    """Fails the seed."""


def now():
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Log:
    """The log of what was done and when, kept for a failed seed."""

    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(f"{now():9.3f} {text}")

    def clear(self):
        self.lines = []


LOG = Log()


def who_waits():
    """Makes the kernel log every blocked task."""
    with open("/proc/sysrq-trigger", "w") as trigger:
        trigger.write("w")


def run(*words, check=True, seconds=SECONDS_MAX, stdin=subprocess.DEVNULL, environment=None):
    """Runs a command; returns its exit status and output."""
    words = [str(word) for word in words]
    begin = now()
    process = subprocess.Popen(
        words, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        env=environment, start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        who_waits()
        os.killpg(process.pid, signal.SIGKILL)
        LOG.say(f"{' '.join(words)}: has not ended after {seconds} s")
        raise Failure(f"'{' '.join(words)}' has not ended after {seconds} s") from None
    LOG.say(f"{' '.join(words)}: {process.returncode} after {now() - begin:.2f} s; {output[-1000:].strip()}")
    if check and process.returncode != 0:
        raise Failure(f"'{' '.join(words)}' ended with {process.returncode}: {output.strip()[-1500:]}")
    return process.returncode, output


def ask(*words):
    return run(*words)[1].strip()


def wait_until(seconds, what, condition):
    end = now() + seconds
    while not condition():
        if now() > end:
            who_waits()
            raise Failure(f"{what}: not after {seconds} s")
        time.sleep(0.02)


def sectors_of(kernel_name):
    return int(Path(f"/sys/class/block/{kernel_name}/size").read_text())


# Device-mapper.


# From the kernel's linux/dm-ioctl.h. Time-critical calls must not wait for the start of dmsetup.
DM_VERSION, DM_HEADER = 4, struct.Struct("=3I3Ii3IQ128s129s7x")
DM_CREATE, DM_REMOVE, DM_SUSPEND, DM_LOAD, DM_MESSAGE = (0xC138FD00 + number for number in (3, 4, 6, 9, 14))
DM_SUSPEND_FLAG, DM_SKIP_LOCKFS_FLAG, DM_NOFLUSH_FLAG = 1 << 1, 1 << 10, 1 << 11


def dm_ioctl(request, name, flags=0, target_count=0, payload=b""):
    size = DM_HEADER.size + len(payload)
    header = DM_HEADER.pack(DM_VERSION, 0, 0, size, DM_HEADER.size, target_count, 0, flags, 0, 0, 0, name.encode(), b"")
    with open("/dev/mapper/control", "r+b", buffering=0) as control:
        fcntl.ioctl(control, request, bytearray(header + payload))


def dm_create(name, table):
    dm_ioctl(DM_CREATE, name)
    dm_load(name, table)
    dm_resume(name)
    return dm_node(name)


def dm_remove(name):
    """Retries for a while, because openers may still be about to close the device."""

    def removed():
        try:
            dm_ioctl(DM_REMOVE, name)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            return False
        return True

    wait_until(10, f"{name} is removed", removed)


def dm_load(name, table):
    payload = b""
    lines = [line.split(maxsplit=3) for line in table.splitlines()]
    for line in lines:
        start, length, target = int(line[0]), int(line[1]), line[2]
        words = (line[3] if len(line) > 3 else "").encode() + b"\0"
        words += b"\0" * (-len(words) % 8)
        payload += struct.pack("=QQiI16s", start, length, 0, 40 + len(words), target.encode()) + words
    dm_ioctl(DM_LOAD, name, target_count=len(lines), payload=payload)


def dm_suspend(name):
    dm_ioctl(DM_SUSPEND, name, DM_SUSPEND_FLAG | DM_SKIP_LOCKFS_FLAG | DM_NOFLUSH_FLAG)


def dm_resume(name):
    dm_ioctl(DM_SUSPEND, name)


def dm_message(name, words):
    text = words.encode() + b"\0"
    dm_ioctl(DM_MESSAGE, name, payload=struct.pack("=Q", 0) + text + b"\0" * (-len(text) % 8))


def dm_devices():
    """Returns what sysfs shows: by name, each device's node, UUID, and whether it is suspended."""
    found = {}
    for folder in Path("/sys/block").glob("dm-*/dm"):
        try:
            name, uuid, suspended = ((folder / file).read_text().strip() for file in ("name", "uuid", "suspended"))
        except FileNotFoundError:
            continue
        found[name] = (f"/dev/{folder.parent.name}", uuid, suspended == "1")
    return found


def dm_node(name):
    return dm_devices()[name][0]


def dm_table(name):
    return ask("dmsetup", "table", name)


def loop_devices():
    """Returns the loop devices in use and their backing files, by node."""
    found = {}
    for folder in Path("/sys/block").glob("loop*/loop"):
        try:
            found[f"/dev/{folder.parent.name}"] = (folder / "backing_file").read_text().strip()
        except FileNotFoundError:
            continue
    return found


# Disks.

# Each disk of the case, beneath the device that injects its faults.
DISKS = {"a": "ubda", "b": "ubdb", "secondary": "ubdc", "store": "ubdd"}
SCRATCH = "/dev/ubde"
FAULTS = "/sys/kernel/debug/fail_make_request"


class Disk:
    """A disk of the case beneath a device-mapper device, whose table selects its current behaviour."""

    def __init__(self, name, delay):
        LOG.say(f"disk {name}, delayed by {delay}")
        self.name = f"tidemark-test-{name}"
        self.kernel_name = DISKS[name]
        self.below = f"/dev/{self.kernel_name}"
        self.sectors = sectors_of(self.kernel_name)
        self.delay = delay
        self.node = dm_create(self.name, self.own_table())
        self.is_faulty = self.was_faulty = self.is_suspended = False

    def own_table(self):
        if self.delay is None:
            return f"0 {self.sectors} linear {self.below} 0"
        read, write, flush = self.delay
        return f"0 {self.sectors} delay {self.below} 0 {read} {self.below} 0 {write} {self.below} 0 {flush}"

    def reload(self, table):
        """Replaces the table; requests in flight end first."""
        dm_load(self.name, table)
        dm_suspend(self.name)
        dm_resume(self.name)

    def fail(self, way, percent, choices):
        """Makes `percent` of the blocks or requests fail from now on; `choices` selects the blocks."""
        self.is_faulty = self.was_faulty = True
        whole = f"0 {self.sectors}"
        if way == "error" and percent == 100:
            self.reload(f"{whole} error")
        elif way == "error":
            self.reload(self.holes(percent, choices))
        elif way == "flakey-writes":
            self.reload(f"{whole} flakey {self.below} 0 0 3600 1 error_writes")
        elif way == "flakey":
            # One second up, one second down.
            self.reload(f"{whole} flakey {self.below} 0 1 1")
        elif way == "forget-writes":
            self.reload(f"{whole} flakey {self.below} 0 0 3600 1 drop_writes")
        elif way == "dust":
            self.reload(f"{whole} dust {self.below} 0 4096")
            for block in {choices.number(0, self.sectors // 8 - 1) for _ in range(min(5000, self.sectors // 800 * percent))}:
                dm_message(self.name, f"addbadblock {block}")
            dm_message(self.name, "enable")
        elif way == "fail-make-request":
            # Times 10: most requests are large and few, so a low percentage would hit none.
            self.inject(min(100, percent * 10))
        else:
            raise ValueError(way)

    def holes(self, percent, choices):
        """A linear table with some failing pieces."""
        piece = 2048
        lines, begin, bad_before = [], 0, None
        for at in range(0, self.sectors + 1, piece):
            bad = at < self.sectors and choices.chance(percent)
            if at and (bad != bad_before or at >= self.sectors):
                end = min(at, self.sectors)
                target = "error" if bad_before else f"linear {self.below} {begin}"
                if end > begin:
                    lines.append(f"{begin} {end - begin} {target}")
                begin = end
            bad_before = bad
        if begin < self.sectors:
            target = "error" if bad_before else f"linear {self.below} {begin}"
            lines.append(f"{begin} {self.sectors - begin} {target}")
        return "\n".join(lines)

    def inject(self, percent):
        settings = {"probability": percent, "interval": 1, "times": -1, "space": 0, "verbose": 0}
        for name, value in settings.items():
            write(f"{FAULTS}/{name}", value)
        write(f"/sys/block/{self.kernel_name}/make-it-fail", 1)

    def suspend(self):
        self.is_suspended = True
        dm_suspend(self.name)

    def resume(self):
        if self.is_suspended:
            dm_resume(self.name)
            self.is_suspended = False

    def mend(self):
        """Restores the original behaviour."""
        self.resume()
        if self.is_faulty:
            write(f"/sys/block/{self.kernel_name}/make-it-fail", 0)
            write(f"{FAULTS}/probability", 0)
            self.reload(self.own_table())
            self.is_faulty = False

    def remove(self):
        self.mend()
        dm_remove(self.name)


def write(path, value):
    with open(path, "w") as file:
        file.write(str(value))


def old_data(device, kib, text):
    """Fills a device with old content, which must not show up in any copy; discards it if `text` is None."""
    if text is None:
        run("blkdiscard", "-f", device)
        return
    block = text.encode() * (MIB // len(text) + 1)
    with open(device, "r+b", buffering=0) as file:
        left = kib * 1024
        while left > 0:
            left -= file.write(block[: min(left, MIB)])
        os.fsync(file.fileno())
