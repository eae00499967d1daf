"""LVM, and a user of dmsetup, change the origin's volume group while copies run. Metadata and kernel must agree.

Deeds run one after the other, at times independent of the copy. What LVM reports as done is checked at once, in the
metadata and in the kernel. A deed that LVM refuses for a reason of its own must change nothing. play.py judges the
effect on the copy.
"""

import collections
import json
import os
import re
import subprocess
import threading
import time
from pathlib import Path

from machine import LOG, Failure, ask, dm_devices, dm_table, now, run

GROUP, OTHER_KIB = "soak", 8192
DATA, OTHER = f"{GROUP}/data", f"{GROUP}/other"
# The origin does not grow beyond this size, so that there is room to move it.
DATA_BYTES_MAX = 80 << 20
# Longer than a copy holds any lock.
SECONDS_MAX = 120
# Messages of LVM when it has no room or nothing to do.
NO_ROOM = re.compile(r"[Ii]nsufficient|suitable (for )?allocat|No data to move|not enough|[Nn]o extents|free space")


def lvm(*words, check=True):
    return run(*words, check=check, seconds=SECONDS_MAX)


def make_another():
    lvm("lvcreate", "-qq", "-y", "-Wn", "-Zn", "-L", f"{OTHER_KIB}k", "-n", "other", GROUP)


def volumes():
    """Returns by name the bytes, segment types and disks of each volume, according to the metadata."""
    text = subprocess.run(
        ["lvs", "--reportformat", "json", "--units", "b", "--nosuffix", "-a", "-o", "lv_name,lv_size,segtype,devices", GROUP],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=SECONDS_MAX,
    ).stdout
    try:
        rows = json.loads(text)["report"][0]["lv"]
    except (ValueError, LookupError):
        raise Failure(f"lvs says nothing of the group: {text}") from None
    found = {}
    for row in rows:
        size, kinds, disks = found.setdefault(row["lv_name"], (int(row["lv_size"]), set(), set()))
        kinds.add(row["segtype"])
        disks.update(number_of(device.split("(")[0]) for device in row["devices"].split(",") if device.startswith("/"))
    return found


def number_of(path):
    number = os.stat(path).st_rdev
    return f"{os.major(number)}:{os.minor(number)}"


def kernels(name):
    """Returns the sysfs folder of a volume. (Nodes below /dev/mapper may be stale.)"""
    found = dm_devices().get(f"{GROUP}-{name}")
    if not found:
        raise Failure(f"the kernel has no volume {name}: {sorted(dm_devices())}")
    return Path(f"/sys/class/block/{found[0].removeprefix('/dev/')}")


def mapped_bytes(name):
    return int((kernels(name) / "size").read_text()) * 512


def mapped_disks(name):
    return {(slave / "dev").read_text().strip() for slave in (kernels(name) / "slaves").iterdir()}


def agree(when):
    """Checks that the kernel maps what the metadata says, and that a refresh, which loads LVM's own table, changes nothing."""
    found = volumes()
    if set(found) != {"data", "other"}:
        raise Failure(f"{when}: volumes are left over or gone: {sorted(found)}")
    for name, (size, kinds, disks) in found.items():
        if mapped_bytes(name) != size:
            raise Failure(f"{when}: {name} has {size} bytes in LVM's metadata, {mapped_bytes(name)} in the kernel")
        if mapped_disks(name) != disks or not kinds <= {"linear", "striped"}:
            raise Failure(f"{when}: {name} lies on {disks} as {kinds} in LVM's metadata, on {mapped_disks(name)} in the kernel")
        if (loaded := ask("dmsetup", "info", "-c", "--noheadings", "-o", "tables_loaded", f"{GROUP}-{name}")) != "Live":
            raise Failure(f"{when}: {name} has a table that waits: {loaded}")
        before = dm_table(f"{GROUP}-{name}")
        lvm("lvchange", "--refresh", f"{GROUP}/{name}")
        if (after := dm_table(f"{GROUP}-{name}")) != before:
            raise Failure(f"{when}: the table of {name} is '{before}', LVM's own '{after}'")


class Neighbours(threading.Thread):
    """Runs the deeds of a copy until none is left or it is told to end."""

    def __init__(self, stage, deeds):
        super().__init__(daemon=True)
        self.stage, self.deeds = stage, deeds
        self.mounted = "origin" in stage.mounted
        self.disks = [stage.disks[name].node for name in "ab"]
        self.ending = threading.Event()
        self.failure, self.done, self.refused = None, collections.Counter(), collections.Counter()

    def run(self):
        try:
            for deed in self.deeds:
                if self.ending.wait(deed["pause_ms"] / 1000):
                    return
                self.do(deed["do"])
        except Failure as failure:
            self.failure = f"beside the copy: {failure}"
        except Exception as error:
            self.failure = f"beside the copy: {error!r}"

    def end(self):
        """Waits for the end of the current deed."""
        self.ending.set()
        self.join(SECONDS_MAX)
        if self.is_alive():
            raise Failure("a command beside the copy hangs")
        if self.failure:
            raise Failure(self.failure)

    def has_changed_the_table(self):
        return bool(set(self.done) - {"look", "remove in use", "make and remove", "extend another", "reduce another"})

    def do(self, deed):
        LOG.say(f"beside the copy: {deed}")
        is_done = getattr(self, deed.replace(" ", "_"))()
        (self.done if is_done else self.refused)[deed] += 1

    def asked(self, *words):
        """Returns True if it was done, False if LVM has no room for it."""
        status, output = lvm(*words, check=False)
        if status != 0 and not NO_ROOM.search(output):
            raise Failure(f"'{' '.join(words)}' ended with {status}: {output[-1500:]}")
        return status == 0

    def changes_size(self, name, way, by, *words):
        before = volumes()[name][0]
        if by > 0 and name == "data" and before + by > DATA_BYTES_MAX:
            return False
        done = self.asked(way, "-y", *words, "-L", f"{before + by}b", f"{GROUP}/{name}")
        expected = before + by if done else before
        said, mapped = volumes()[name][0], mapped_bytes(name)
        if (said, mapped) != (expected, expected):
            raise Failure(f"after {way}: {name} has {said} bytes in the metadata and {mapped} in the kernel, not {expected}")
        return done

    # The deeds.

    def extend(self):
        return self.changes_size("data", "lvextend", 1 << 20)

    def extend_with_its_file_system(self):
        before = os.statvfs("/mnt/origin")
        # One megabyte is too small for an allocation group of its own: xfs enlarges the last one.
        done = self.changes_size("data", "lvextend", 2 << 20, "-r")
        after = os.statvfs("/mnt/origin")
        if done and after.f_blocks * after.f_frsize <= before.f_blocks * before.f_frsize:
            raise Failure("lvextend -r has not enlarged the file system")
        return done

    def extend_another(self):
        return self.changes_size("other", "lvextend", 512 << 10)

    def reduce_another(self):
        return volumes()["other"][0] > 2 << 20 and self.changes_size("other", "lvreduce", -(512 << 10), "-f")

    def refresh(self):
        return self.asked("lvchange", "--refresh", DATA)

    def snapshot(self):
        if not self.asked("lvcreate", "-y", "-s", "-L", "4m", "-n", "theirs", DATA):
            return False
        if "theirs" not in volumes() or "snapshot" not in dm_table(f"{GROUP}-theirs"):
            raise Failure("lvcreate -s reports a snapshot that is not there")
        time.sleep(0.3)
        lvm("lvremove", "-y", f"{GROUP}/theirs")
        return True

    def rename(self):
        lvm("lvrename", GROUP, "data", "renamed")
        if "renamed" not in volumes() or f"{GROUP}-renamed" not in dm_devices():
            raise Failure("lvrename reports a name that is not there")
        time.sleep(0.2)
        lvm("lvrename", GROUP, "renamed", "data")
        return True

    def rename_the_group(self):
        for old, new in ((GROUP, "renamed"), ("renamed", GROUP)):
            lvm("vgrename", old, new)
            # LVM renames the devices of volumes in use only when they are refreshed.
            lvm("lvchange", "--refresh", f"{new}/data", f"{new}/other")
            time.sleep(0.2)
        return True

    def remove_in_use(self):
        status, output = lvm("lvremove", "-f", "-y", DATA, check=False)
        if status == 0 or "data" not in volumes():
            raise Failure(f"a volume in use was removed: {output}")
        return True

    def make_and_remove(self):
        if not self.asked("lvcreate", "-y", "-Wn", "-Zn", "-L", "2m", "-n", "passing", GROUP):
            return False
        lvm("lvremove", "-y", f"{GROUP}/passing")
        return True

    def look(self):
        for words in (["lvs"], ["pvs"], ["vgck", GROUP]):
            lvm(*words)
        return True

    def suspend_by_hand(self):
        """The kernel does not count suspensions: the first resume ends both."""
        status, _ = run("dmsetup", "suspend", f"{GROUP}-data", check=False)
        time.sleep(0.2)
        run("dmsetup", "resume", f"{GROUP}-data")
        return status == 0

    def move(self):
        before = volumes()["data"][2]
        at = self.disks[0] if number_of(self.disks[0]) in before else self.disks[1]
        to = self.disks[1] if at == self.disks[0] else self.disks[0]
        if not self.asked("pvmove", "-i", "1", "-n", "data", at, to):
            return False
        if (after := volumes()["data"][2]) != {number_of(to)} or mapped_disks("data") != after:
            raise Failure(f"pvmove reports a move to {to}; the metadata has {after}, the kernel {mapped_disks('data')}")
        return True

    def mirror(self):
        before = volumes()["data"][2]
        if len(before) > 1:
            return False
        if not self.asked("lvconvert", "-y", "-i", "1", "--type", "mirror", "--mirrorlog", "core", "-m", "1", DATA):
            return False
        if "mirror" not in dm_table(f"{GROUP}-data"):
            raise Failure(f"lvconvert reports a mirror; the table is {dm_table(f'{GROUP}-data')}")
        lvm("lvconvert", "-y", "-m", "0", DATA)
        return True


def wait_for_recover(command, seconds=30):
    """Retries recover: what it waits for is over soon."""
    end = now() + seconds
    while True:
        status, output = run(*command, check=False)
        if status == 0 or now() > end:
            return status, output
        time.sleep(0.5)
