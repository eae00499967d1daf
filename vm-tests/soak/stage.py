"""The environment of a seed: disks, the origin with a filesystem and a load, and places for copies and stores.

Built from the scenario and taken down again. Anything that cannot be taken down, or is damaged, is a failure.
"""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import neighbours
from machine import (
    DISKS, LOG, SCRATCH, Disk, Failure, ask, dm_create, dm_devices, dm_remove, dm_table, loop_devices, now, old_data, run,
    wait_until,
)
from scenario import Chooser

HERE = Path(__file__).resolve().parent
TIDEMARK = os.environ["TIDEMARK_BINARY"]
RUN = "/run/tidemark"
WORK = "/run/soak"
MOUNTS = {"origin": "/mnt/origin", "scratch": "/mnt/scratch", "secondary": "/mnt/secondary", "store": "/mnt/store", "small": "/mnt/small"}
# How long an application may stall in a guest that shares its processor with other work of the host.
STILL_SECONDS_MAX = 30
# mkfs.xfs makes small filesystems only for its own tests.
XFS_MAY_BE_SMALL = {"TEST_DIR": "1", "TEST_DEV": "1", "QA_CHECK_FS": "1"}


def prepare_guest():
    """Prepares what all seeds of this boot share."""
    for place in MOUNTS.values():
        os.makedirs(place, exist_ok=True)
    os.makedirs(WORK, exist_ok=True)
    os.makedirs("/etc/lvm", exist_ok=True)
    # No udevd runs here, metadata backups are not needed, and LVM must use disks through their devices.
    settings = (
        'devices { global_filter = [ "r|^/dev/ubd|", "a|.*|" ] }',
        "activation { monitoring = 0 udev_sync = 0 udev_rules = 0 }",
        "backup { archive = 0 backup = 0 }",
    )
    Path("/etc/lvm/lvmlocal.conf").write_text("\n".join(settings) + "\n")
    run("mkfs.ext4", "-q", "-F", "-O", "^has_journal", "-m", "0", SCRATCH)
    run("mount", SCRATCH, MOUNTS["scratch"])


class Stage:
    def __init__(self, scenario):
        self.scenario = scenario
        self.choices = Chooser(f"{scenario['seed']} faults")
        self.disks, self.mounted, self.load = {}, set(), None
        self.is_origin_bad = False
        self.has_group = self.is_attached = False
        self.loop = None
        # LVM works in the group during the copies of this scenario.
        self.has_neighbours = any("neighbours" in copy for copy in scenario["copies"])

    # Building.

    def make(self):
        for name in DISKS:
            self.disks[name] = Disk(name, self.scenario["disks"][name])
        self.make_origin()
        filesystem = self.scenario["filesystem"]
        if filesystem["type"] != "none":
            self.make_filesystem(filesystem["type"], filesystem["mkfs"], self.origin)
            self.mount("origin", filesystem["type"], self.origin, filesystem["mount"])
        self.start_load()

    def make_origin(self):
        origin = self.scenario["origin"]
        kib, kind = origin["kib"], origin["kind"]
        for name in "ab":
            held = f"old data of seed {self.scenario['seed']} " if origin["old_data"] else None
            old_data(self.disks[name].below, self.disks[name].sectors // 2, held)
        if kind == "volume":
            # LVM volumes and other device-mapper devices need no attach.
            self.loop = ask("losetup", "--find", "--show", "--direct-io=on", "--sizelimit", kib * 1024, self.disks["a"].node)
            run(TIDEMARK, "attach", self.loop, "--name", "data")
            self.is_attached = True
            self.name = "data"
        elif not origin["lvm"]:
            self.name = "data"
            dm_create(self.name, self.table_by_hand(origin))
        else:
            self.make_logical_volume(origin)
        run("dmsetup", "mknodes")
        self.origin = f"/dev/mapper/{self.name}"
        self.table = dm_table(self.name)
        self.number = neighbours.number_of(self.origin)

    def table_by_hand(self, origin):
        if origin["kind"] == "striped":
            disks = f"{self.disks['a'].node} 0 {self.disks['b'].node} 0"
            return f"0 {origin['kib'] * 2} striped 2 {origin['stripe_kib'] * 2} {disks}"
        lines, begin, used = [], 0, {"a": 0, "b": 8}
        for at, kib in enumerate(origin["segments_kib"]):
            disk = "ab"[at % 2]
            lines.append(f"{begin} {kib * 2} linear {self.disks[disk].node} {used[disk]}")
            begin += kib * 2
            used[disk] += kib * 2
        return "\n".join(lines)

    def make_logical_volume(self, origin):
        has_both = origin["kind"] == "striped" or self.has_neighbours
        disks = [self.disks["a"].node] + ([self.disks["b"].node] if has_both else [])
        for disk in disks:
            run("pvcreate", "-qq", "-y", "--dataalignment", "64k", disk)
        self.has_group = True
        run("vgcreate", "-qq", "-s", "64k", "soak", *disks)
        options = ["-i", "2", "-I", f"{origin['stripe_kib']}k"] if origin["kind"] == "striped" else []
        run("lvcreate", "-qq", "-y", "-Wn", "-Zn", *options, "-L", f"{origin['kib']}k", "-n", "data", "soak",
            *(disks if origin["kind"] == "striped" else disks[:1]))
        if self.has_neighbours:
            neighbours.make_another()
        self.name = "soak-data"

    def make_filesystem(self, kind, options, device):
        if kind == "ext4":
            run("mkfs.ext4", "-q", "-F", *options, device)
        else:
            run("mkfs.xfs", "-q", "-f", *options, device, environment={**os.environ, **XFS_MAY_BE_SMALL})

    def mount(self, place, kind, device, options=""):
        run("mount", "-t", kind, *(["-o", options] if options else []), device, MOUNTS[place])
        self.mounted.add(place)

    def unmount(self, place):
        if place in self.mounted:
            # Waits for processes that still write there.
            wait_until(10, f"{place} is unmounted", lambda: run("umount", MOUNTS[place], check=False)[0] == 0)
            self.mounted.discard(place)

    def remount(self, place):
        """A filesystem that has seen errors accepts writes only after a remount."""
        if place in self.mounted:
            self.unmount(place)
            self.mount(place, "ext4", self.disks[place].node)

    def own_filesystem(self, place):
        """Returns the mount point of a filesystem on this disk, made at first use and again after each fault."""
        disk = self.disks[place]
        if disk.was_faulty:
            # A filesystem that has seen errors accepts no writes.
            self.unmount(place)
            disk.was_faulty = False
        if place not in self.mounted:
            run("mkfs.ext4", "-q", "-F", "-m", "0", "-N", "64", "-E", "nodiscard", self.disks[place].node)
            self.mount(place, "ext4", self.disks[place].node)
        return MOUNTS[place]

    def small_filesystem(self, mib):
        self.mount("small", "tmpfs", "none", f"size={mib}m")
        return MOUNTS["small"]

    # The load.

    def start_load(self):
        self.status = f"{WORK}/load.json"
        Path(self.status).unlink(missing_ok=True)
        scenario = self.scenario
        target = MOUNTS["origin"] if "origin" in self.mounted else self.origin
        words = [json.dumps(scenario["load"]), target, scenario["origin"]["kib"] * 1024, scenario["seed"], self.status]
        self.load = subprocess.Popen(
            ["python3", HERE / "load.py", *map(str, words)], stdout=open(f"{WORK}/load.log", "w"),
            stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
        )
        parts = len(scenario["load"])
        works = lambda: sum(ops > 1 for ops in self.load_status()["parts"].values()) == parts
        wait_until(STILL_SECONDS_MAX, "the load works", lambda: works() or self.load_errors())
        if self.load_errors():
            raise Failure(f"the load: {self.load_errors()}")

    def load_status(self):
        try:
            return json.loads(Path(self.status).read_text())
        except FileNotFoundError:
            return {"ops": 0, "errors": [], "done": False, "parts": {}}

    def pause_load(self):
        """Outside a copy the writes would prove nothing, and take CPU time."""
        os.kill(self.load.pid, signal.SIGSTOP)

    def go_on_with_load(self):
        os.kill(self.load.pid, signal.SIGCONT)

    def load_goes_on(self, when):
        """Checks that the load writes and has seen no error. Errors are expected if the origin's disk was made to fail."""
        if self.is_origin_bad:
            return
        before = self.load_status()["ops"]
        wait_until(STILL_SECONDS_MAX, f"{when}: the load goes on", lambda: self.load_status()["ops"] > before or self.load_errors())
        if self.load_errors():
            raise Failure(f"{when}: the load saw an error: {self.load_errors()}")

    def load_errors(self):
        errors = self.load_status()["errors"]
        if not errors and self.load.poll() is not None:
            return [f"it has ended with {self.load.returncode}: {Path(f'{WORK}/load.log').read_text()[-500:]}"]
        return errors

    def stop_load(self):
        self.load.terminate()
        try:
            self.load.wait(timeout=120)
        except subprocess.TimeoutExpired:
            raise Failure("the load does not end: it hangs in the kernel") from None
        status = self.load_status()
        LOG.say(f"the load: {status}")
        if self.is_origin_bad:
            return
        if status["errors"] or not status["done"]:
            raise Failure(f"the load: {status} {Path(f'{WORK}/load.log').read_text()[-500:]}")

    # Checks between copies.

    def has_own_table(self, when):
        if self.has_neighbours:
            neighbours.agree(when)
            self.table = dm_table(self.name)
        table = dm_table(self.name)
        if table != self.table:
            raise Failure(f"{when}: the origin's table has changed: '{table}', not '{self.table}'")

    def has_own_table_again(self):
        """Looks in sysfs by number, which cannot block and is independent of the name: no device of ours is beneath the origin."""
        slaves = Path(f"/sys/dev/block/{self.number}/slaves").glob("*/dm/uuid")
        return not any("TIDEMARK-" in uuid.read_text() for uuid in slaves)

    def is_as_before(self, when):
        """Checks that the origin has its own table, nothing is suspended, and nothing of a copy is left."""
        self.has_own_table(when)
        suspended = [name for name, (_, _, is_suspended) in dm_devices().items() if is_suspended]
        if suspended:
            raise Failure(f"{when}: suspended: {suspended}")
        end = now() + 10
        # The kernel frees a loop device shortly after its last close.
        while (left := self.left_behind()) and now() < end:
            time.sleep(0.05)
        if left:
            raise Failure(f"{when}: something is left: {left}")

    def left_behind(self):
        """Returns what is left of Tidemark except an attached volume."""
        volume = self.name if self.is_attached else None
        found = [
            f"device {name} ({uuid})"
            for name, (_, uuid, _) in dm_devices().items()
            if "TIDEMARK-" in uuid and not (name == volume and uuid.startswith(f"TIDEMARK-{volume}-volume-"))
        ]
        found += [f"{loop} of {file}" for loop, file in loop_devices().items() if loop != self.loop]
        for size in Path("/sys/block").glob("zram*/disksize"):
            if size.read_text().strip() != "0":
                found.append(f"RAM head {size}")
        found += [str(path) for path in Path(RUN).rglob("*") if path.is_file() and path.suffix != ".lock"]
        return found

    # The end.

    def take_away(self):
        """Takes down everything that make() built, and checks the filesystem."""
        self.go_on_with_load()
        self.stop_load()
        filesystem = self.scenario["filesystem"]["type"]
        for place in ("origin", "secondary", "store", "small"):
            self.unmount(place)
        if filesystem != "none" and not self.is_origin_bad:
            check = ("e2fsck", "-fn") if filesystem == "ext4" else ("xfs_repair", "-n")
            status, output = run(*check, self.origin, check=False, seconds=120)
            if status != 0:
                raise Failure(f"the origin's file system is damaged: {output[-1500:]}")
        if self.is_attached:
            run(TIDEMARK, "detach", "data")
            run("losetup", "-d", self.loop)
        elif self.has_group:
            run("vgremove", "-qq", "-f", "soak")
        else:
            dm_remove(self.name)
        for disk in self.disks.values():
            disk.remove()
        if dm_devices():
            raise Failure(f"devices are left at the end: {dm_devices()}")
