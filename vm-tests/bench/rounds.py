#!/usr/bin/env python3
"""Measures, in the guest, the cost of copies for the applications beside them. Called by vm-tests/cases/bench.sh.

rounds.py RESULTS: writes one JSON line of raw figures for each run; scripts/bench turns them into tables.

Loads: one application each, which waits until every write is durable.
  uniform   4 KiB direct O_DSYNC overwrites at random positions of a file (fio)
  skewed    the same, 90 % of the writes to 5 % of the file (fio)
  append    new files in appends of 4 KiB, direct O_DSYNC, old ones deleted (append_load.py)
  pgbench   PostgreSQL with pgbench, two clients

Contenders, in an order that rotates from round to round:
  none      the load alone
  dd        dd of the live device: not a copy of an instant, but the minimum cost of reading and writing it
  stream    fio reads as much of the live device as is in use, in requests of 128 KiB (1 MiB on a rotating disk), one at
            a time and at 85 % of the limit's rate, and writes as much to the secondary, both at once: the cost of
            reading and writing without copy-on-write, at a rate that does not saturate the disk
  lvm       a thick LVM snapshot with chunks of 4 KiB, dd of it, and its removal
  tidemark  tidemark copy, with TIDEMARK_BENCH_OPTIONS; NAME=OPTIONS are further variants of it, and
            TIDEMARK_BENCH_BUILDS (NAME=PATH, ...) holds other programs for some of them

Before the loads, three lines of type `limit`: the time in which fio reads as much as is in use and writes as much, both
at once, in deep queues and without a load. No copy can be faster.

A load runs for a while before the copy begins, and until after its end. Its operations are counted only between two
moments: before the first command of the copy, and when the secondary is complete and synced. Tidemark's window also
includes putting the origin back, which is part of its command. LVM's window ends before lvremove, whose time is
reported separately. The bytes preserved are what the kernel reports as used in the store, metadata included, for both.
"""

import glob
import json
import os
import resource
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.dont_write_bytecode = True
import window

ENV = os.environ
WARM_SECONDS = float(ENV["TIDEMARK_BENCH_WARM_SECONDS"])
SETTLE_SECONDS = float(ENV["TIDEMARK_BENCH_SETTLE_SECONDS"])
COOL_SECONDS = SETTLE_SECONDS
# The end of the warm-up is measured too: it shows whether the load had reached a steady rate.
WARM_SKIPPED_SECONDS = WARM_SECONDS / 5
LIMIT_RUNS = 3
# Measured times in seconds.
LIMITS = []
# Rate of the stream as a share of the limit's rate.
STREAM_SHARE = 0.85
# A load counts as begun after this many writes to the origin.
WRITES_BEGUN = 50
STEP_SECONDS_MAX = 600
SECTOR_BYTES = 512

ORIGIN, SECONDARY = ENV["BENCH_ORIGIN"], ENV["BENCH_SECONDARY"]
MOUNT = "/mnt/origin"


def note(text):
    print(f"{time.monotonic():8.2f} {text}", flush=True)


def run(command):
    """Runs a command and returns its stdout. A failure ends the measurement."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=STEP_SECONDS_MAX)
    if done.returncode != 0:
        sys.exit(f"{shlex.join(command)} failed with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


class Load:
    """An application. start() returns at once; stop() returns its operations."""

    log = "/tmp/load.log"

    def prepare(self):
        """Runs once, before the first round."""

    def make_ready(self):
        """Runs before each start; its writes are not counted."""

    def finish(self):
        """Runs once, after the last round."""

    def spawn(self, command):
        self.messages = open("/tmp/load.out", "w+")
        self.child = subprocess.Popen(command, stdout=self.messages, stderr=subprocess.STDOUT)

    def check_alive(self):
        if self.child.poll() is not None:
            sys.exit(f"the load has ended: {Path('/tmp/load.out').read_text()[-2000:]}")

    def end(self, send, status=0):
        self.check_alive()
        send()
        got = self.child.wait(timeout=STEP_SECONDS_MAX)
        if got != status:
            sys.exit(f"the load ended with {got}: {Path('/tmp/load.out').read_text()[-2000:]}")


class Overwrites(Load):
    def __init__(self, *options):
        self.options = options

    def make_ready(self):
        for old in glob.glob("/tmp/fio_*.log"):
            os.unlink(old)

    def start(self):
        self.spawn(
            ["fio", "--name=load", f"--filename={MOUNT}/file", "--rw=randwrite", "--bs=4k", "--direct=1"]
            + ["--sync=dsync", "--ioengine=psync", "--norandommap", "--time_based", "--runtime=3600"]
            + ["--clocksource=clock_gettime", "--thread", "--write_lat_log=/tmp/fio", "--log_unix_epoch=1"]
            + ["--disable_clat=1", "--disable_slat=1", f"--randseed={ENV['TIDEMARK_SEED']}", *self.options]
        )

    def stop(self):
        # On SIGINT fio writes its results, but reports an error of its own.
        self.end(lambda: self.child.send_signal(signal.SIGINT), status=128)
        (log,) = glob.glob("/tmp/fio_lat.*.log")
        return window.fio_log(Path(log).read_text())


class Appends(Load):
    def make_ready(self):
        shutil.rmtree(f"{MOUNT}/new", ignore_errors=True)
        os.mkdir(f"{MOUNT}/new")

    def start(self):
        script = Path(__file__).with_name("append_load.py")
        self.spawn([sys.executable, str(script), f"{MOUNT}/new", self.log])

    def stop(self):
        self.end(self.child.terminate)
        return window.plain_log(Path(self.log).read_text())


class Pgbench(Load):
    def server(self, action):
        user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        log = [f"--log={MOUNT}/pg/server.log"] if action == "start" else ["--mode=fast"]
        command = [ENV["PG_CTL"], f"--pgdata={MOUNT}/pg", "--wait", "--timeout=120", *log, action]
        # No pipes: the server inherits them and would keep them open.
        done = subprocess.run(user + command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if done.returncode != 0:
            sys.exit(f"pg_ctl {action} failed: {Path(MOUNT, 'pg/server.log').read_text()[-2000:]}")

    def sql(self, statement):
        return run(["psql", "-h", "/tmp", "-U", "postgres", "-Atqc", statement, "bench"])

    def prepare(self):
        self.server("start")

    def finish(self):
        self.server("stop")

    def make_ready(self):
        for old in glob.glob("/tmp/pgbench.*"):
            os.unlink(old)
        # Every run begins with the same free space in the log.
        self.sql("checkpoint")

    def start(self):
        common = ["pgbench", "-h", "/tmp", "-U", "postgres", "-n", "-c", "2", "-j", "1", "-T", "3600"]
        self.spawn(common + ["-l", "--log-prefix=/tmp/pgbench", "bench"])

    def stop(self):
        # A killed pgbench loses buffered parts of its log. When the server closes its connections, it writes the log
        # and exits with 2.
        hang_up = "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'pgbench'"
        self.end(lambda: self.sql(hang_up), status=2)
        (log,) = glob.glob("/tmp/pgbench.*")
        return window.pgbench_log(Path(log).read_text())


LOADS = {
    "uniform": Overwrites(),
    "skewed": Overwrites("--random_distribution=zoned:90/5:10/95"),
    "append": Appends(),
    "pgbench": Pgbench(),
}


def copy_none(_options):
    start = time.time()
    time.sleep(float(ENV["TIDEMARK_BENCH_IDLE_SECONDS"]))
    return {"start": start, "end": time.time()}


def run_dd(source):
    direct = ["bs=1M", "iflag=direct", "oflag=direct", "conv=fsync", "status=none"]
    run(["dd", f"if={source}", f"of={SECONDARY}", *direct])


def copy_dd(_options):
    start = time.time()
    run_dd(ORIGIN)
    return {"start": start, "end": time.time()}


def used_bytes():
    """Returns how much a copy has to read: all but the free blocks. The filesystem's metadata is included."""
    found = os.statvfs(MOUNT)
    return (int(ENV["TIDEMARK_BENCH_VOLUME_MIB"]) << 20) - found.f_bfree * found.f_frsize


def run_stream(block_kib, depth, more=()):
    """Reads as much as is in use and writes as much, both at once; returns seconds by fio's clock, without its start."""
    both = ["--direct=1", "--ioengine=io_uring", f"--iodepth={depth}", f"--size={used_bytes() >> 12 << 12}"]
    reader = ["--name=read", f"--filename={ORIGIN}", "--rw=read", f"--bs={block_kib}k"]
    writer = ["--name=write", f"--filename={SECONDARY}", "--rw=write", "--bs=1M", "--end_fsync=1"]
    out = run(["fio", "--thread", "--output-format=json", *both, *more, *reader, *writer])
    # fio may print notes before the JSON.
    jobs = json.loads(out[out.index("{") :])["jobs"]
    return max(job[way]["runtime"] for job in jobs for way in ("read", "write")) / 1000


def copy_stream(_options):
    start = time.time()
    paced = int(STREAM_SHARE * used_bytes() / statistics.median(LIMITS))
    is_rotating = "rotational=1" in ENV["TIDEMARK_BENCH_MODEL"].split()
    run_stream(1024 if is_rotating else 128, 1, [f"--rate={paced},{paced}"])
    return {"start": start, "end": time.time()}


def copy_lvm(_options):
    start = time.time()
    run(
        ["lvcreate", "-q", "-y", "-s", "-c", "4k", "-L", f"{ENV['BENCH_STORE_MIB']}m", "-n", "snap"]
        + ["bench/data", ENV["BENCH_STORE_PV"]]
    )
    run(["dmsetup", "mknodes"])
    created = time.time()
    run_dd("/dev/mapper/bench-snap")
    end = time.time()
    # START LENGTH snapshot USED/TOTAL METADATA, in sectors; or "Invalid" for an invalid snapshot.
    status = run(["dmsetup", "status", "bench-snap"]).split()
    if "/" not in status[3]:
        sys.exit(f"LVM's snapshot is void: {status}")
    used, metadata = int(status[3].split("/")[0]), int(status[4])
    removing = time.time()
    run(["lvremove", "-q", "-y", "bench/snap"])
    return {
        "start": start,
        "end": end,
        "create_seconds": created - start,
        "remove_seconds": time.time() - removing,
        "preserved_bytes": used * SECTOR_BYTES,
        "metadata_bytes": metadata * SECTOR_BYTES,
    }


def copy_tidemark(options, program="tidemark"):
    command = [program, "copy", ORIGIN, SECONDARY, "--yes", "--json", "--store", ENV["BENCH_STORE"]]
    if ENV["TIDEMARK_MACHINE"] == "qemu":
        # A large budget, because the emulation is slow.
        command += ["--freeze-budget", "30s"]
    command += shlex.split(options)
    start = time.time()
    out = run(command)
    end = time.time()
    lines = [json.loads(line) for line in out.splitlines()]
    (report,) = [line["report"] for line in lines if line["type"] == "result"]
    return {
        "start": start,
        "end": end,
        "preserved_bytes": report["store"]["used_bytes"],
        "report": report,
    }


BUILDS = dict(word.split("=", 1) for word in ENV["TIDEMARK_BENCH_BUILDS"].split(",") if word)
COPIES = {"none": copy_none, "dd": copy_dd, "stream": copy_stream, "lvm": copy_lvm}
# Contenders that leave no filesystem on the secondary, or none of one instant.
UNCHECKED = ("none", "dd", "stream")


def copy(name, options):
    if name in COPIES:
        return COPIES[name](options)
    return copy_tidemark(options, BUILDS.get(name, "tidemark"))


def cpu_seconds():
    """CPU time of ended child processes. The load is still running and not included."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return children.ru_utime + children.ru_stime


def ticks():
    """Busy and total ticks of all processors."""
    found = [int(word) for word in Path("/proc/stat").read_text().split(maxsplit=9)[1:9]]
    # user, nice, system, idle, iowait, irq, softirq, steal.
    return sum(found) - found[3] - found[4], sum(found)


def writes_seen():
    number = os.stat(ORIGIN).st_rdev
    stat = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/stat").read_text()
    # Fields: reads, reads merged, sectors read, ms; writes.
    return int(stat.split()[4])


def begin(load):
    before = writes_seen()
    load.start()
    given_up = time.monotonic() + STEP_SECONDS_MAX
    while writes_seen() < before + WRITES_BEGUN:
        load.check_alive()
        if time.monotonic() > given_up:
            sys.exit("the load writes nothing")
        time.sleep(0.05)
    time.sleep(WARM_SECONDS)


def check_secondary():
    """Checks that the copy of an instant holds a consistent filesystem once its journal is replayed."""
    os.makedirs("/mnt/check", exist_ok=True)
    run(["mount", "-t", "ext4", SECONDARY, "/mnt/check"])
    run(["umount", "/mnt/check"])
    run(["e2fsck", "-fn", SECONDARY])


def measure(load, name, options, checked):
    load.make_ready()
    os.sync()
    time.sleep(SETTLE_SECONDS)
    begin(load)
    before, (busy, all_ticks) = cpu_seconds(), ticks()
    copied = copy(name, options)
    spent, (busy_after, all_after) = cpu_seconds() - before, ticks()
    time.sleep(COOL_SECONDS)
    operations = load.stop()
    start, end = copied.pop("start"), copied.pop("end")
    if checked and name not in UNCHECKED:
        check_secondary()
    return {
        **copied,
        "cpu_seconds": spent,
        "busy_share": round((busy_after - busy) / max(all_after - all_ticks, 1), 3),
        **window.figures(operations, start, end),
        "warm": window.figures(operations, start - WARM_SECONDS + WARM_SKIPPED_SECONDS, start),
    }


def contenders(text, base):
    """`none,dd,NAME=OPTIONS,...`; options must not contain a comma."""
    found = []
    for word in text.split(","):
        name, _, options = word.partition("=")
        found.append((name, f"{base} {options}".strip() if name not in COPIES else ""))
    return found


def disks():
    if model := ENV["TIDEMARK_BENCH_MODEL"]:
        words = dict(word.split("=") for word in model.split())
        return {"model": {key: int(value) for key, value in words.items()}, "scheduler": ENV["TIDEMARK_BENCH_SCHEDULER"]}
    return {
        "disk": ENV["TIDEMARK_BENCH_DISK"],
        "disk_bytes_per_second": int(ENV["TIDEMARK_BENCH_DISK_BYTES_PER_SECOND"]),
        "disk_requests_per_second": int(ENV["TIDEMARK_BENCH_DISK_REQUESTS_PER_SECOND"]),
        "clock": ENV["TIDEMARK_BENCH_CLOCK"],
    }


def setup(names):
    version = lambda *command: run(list(command)).splitlines()[0].strip()
    used, total = run(["df", "--output=used,size", "-k", MOUNT]).splitlines()[1].split()
    return {
        "type": "setup",
        "version": 1,
        "kernel": os.uname().release,
        "cpus": os.cpu_count(),
        "volume_mib": int(ENV["TIDEMARK_BENCH_VOLUME_MIB"]),
        "used_share": round(int(used) / int(total), 3),
        **disks(),
        "flush_ms": int(ENV["TIDEMARK_BENCH_FLUSH_MS"]),
        "store": ENV["BENCH_STORE"],
        "seed": int(ENV["TIDEMARK_SEED"]),
        "contenders": dict(names),
        "builds": BUILDS,
        "versions": {
            "tidemark": version("tidemark", "--version"),
            "lvm": version("lvm", "version"),
            "fio": version("fio", "--version"),
            "pgbench": version("pgbench", "--version"),
        },
    }


def main():
    (results,) = sys.argv[1:]
    names = contenders(ENV["TIDEMARK_BENCH_CONTENDERS"], ENV["TIDEMARK_BENCH_OPTIONS"])
    with open(results, "w", buffering=1) as out:
        out.write(json.dumps(setup(names)) + "\n")
        for _ in range(LIMIT_RUNS):
            os.sync()
            time.sleep(SETTLE_SECONDS)
            line = {"type": "limit", "bytes": used_bytes(), "seconds": run_stream(1024, 16)}
            note(f"read and written at once, with no load: {line['bytes'] >> 20} MiB in {line['seconds']:.2f} s")
            LIMITS.append(line["seconds"])
            out.write(json.dumps(line) + "\n")
        for load_name in ENV["TIDEMARK_BENCH_LOADS"].split(","):
            load = LOADS[load_name]
            load.prepare()
            for number in range(int(ENV["TIDEMARK_BENCH_ROUNDS"])):
                turn = number % len(names)
                for name, options in names[turn:] + names[:turn]:
                    figures = measure(load, name, options, checked=number == 0)
                    note(
                        f"{load_name}, round {number + 1}: {name}: {figures['operations_per_second']:.0f} operations/s, "
                        f"slowest {figures['slowest_ms']:.0f} ms, {figures['seconds']:.1f} s"
                    )
                    line = {"type": "run", "load": load_name, "round": number, "contender": name}
                    out.write(json.dumps({**line, "options": options, **figures}) + "\n")
            load.finish()


if __name__ == "__main__":
    main()
