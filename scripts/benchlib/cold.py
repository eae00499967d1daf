"""Compares a cold copy of one file with the disk's own speed and with other tools.

  scripts/bench cold [--rounds N] [--size SIZE] [--dir DIR] [--tidemark PROGRAM] [--check]

Installs its peers (fio, qemu-utils, libnbd-bin), builds Tidemark, makes a file of random bytes, and
runs interleaved rounds of: fio reading it with io_uring, fio reading it and writing another file at
the same time, `tidemark copy` to a raw file and to an archive, dd, qemu-img convert, nbdcopy. All of them but
nbdcopy, which has no such mode, use direct I/O. Tidemark's time includes the sync of file and directory; dd and
nbdcopy do not sync.

Before each run the last result is deleted, the disk is left to settle, and the page cache is dropped
(as root). CPU seconds and memory are the kernel's own figures for the process (wait4). The files
made are removed at the end.

--check exits with 1 if a goal is missed.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from . import ROOT

PACKAGES = {"fio": "fio", "qemu-img": "qemu-utils", "nbdcopy": "libnbd-bin"}
MIB = 1 << 20
# Pause after a deletion: filesystems discard the space in the background.
SETTLE_SECONDS = 2.0
# A run that takes longer has failed.
RUN_SECONDS_MAX = 600

GOAL_OF_FIO = 0.90
GOAL_OF_PEER = 1.5
GOAL_RSS_MIB = 64.0


def say(text):
    print(f"bench: {text}", file=sys.stderr, flush=True)


def die(text):
    say(text)
    sys.exit(1)


def size_of(text):
    units = {"K": 10, "M": 20, "G": 30}
    shift = units.get(text[-1:].upper(), 0)
    return int(text[:-1] if shift else text) << shift


def install_peers():
    missing = sorted({package for tool, package in PACKAGES.items() if not shutil.which(tool)})
    if not missing:
        return
    say(f"installing {' '.join(missing)}")
    sudo = [] if os.geteuid() == 0 else ["sudo"]
    apt = sudo + ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq", "-y"]
    install = apt + ["--no-install-recommends", "install", *missing]
    if subprocess.run(install, stdout=sys.stderr).returncode == 0:
        return
    subprocess.run(apt + ["update"], stdout=sys.stderr, check=False)
    if subprocess.run(install, stdout=sys.stderr).returncode != 0:
        die(f"apt could not install {' '.join(missing)}")


def build():
    subprocess.run([ROOT / "scripts/setup", "--build"], check=True)
    say("building")
    subprocess.run(["cargo", "build", "--release", "--quiet"], cwd=ROOT, check=True)
    return ROOT / "target/release/tidemark"


def make_source(path, size):
    say(f"writing {size // MIB} MiB of random bytes")
    with open(path, "wb") as file:
        left = size
        while left > 0:
            left -= file.write(os.urandom(min(MIB, left)))
        file.flush()
        os.fsync(file.fileno())


def prepare(target):
    """Equal conditions for every run: no earlier result, an idle disk, a cold page cache."""
    for old in target.parent.glob("result.*"):
        old.unlink()
    os.sync()
    time.sleep(SETTLE_SECONDS)
    if os.geteuid() == 0:
        Path("/proc/sys/vm/drop_caches").write_text("3")


def run(command):
    """Runs a command; returns wall and CPU seconds, peak memory in MiB, and its stdout."""
    began = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        signal.alarm(RUN_SECONDS_MAX)
        try:
            # Waits directly, because a reader thread would delay the clock at the end of the child. The child's few
            # lines fit into the pipes.
            _, status, usage = os.wait4(child.pid, 0)
        finally:
            signal.alarm(0)
        wall = time.monotonic() - began
        child.returncode = os.waitstatus_to_exitcode(status)
        out, err = child.stdout.read(), child.stderr.read()
    if child.returncode != 0:
        die(f"{' '.join(map(str, command))} failed with {child.returncode}:\n{out}{err}")
    cpu = usage.ru_utime + usage.ru_stime
    return {"wall_s": wall, "cpu_s": cpu, "rss_mib": usage.ru_maxrss / 1024}, out


def run_fio(depth, *jobs):
    common = ["fio", "--bs=1M", "--ioengine=io_uring", "--direct=1", f"--iodepth={depth}"]
    figures, out = run(common + ["--output-format=json", *jobs])
    # fio may print notes before the JSON. Its own clock excludes the start of the program.
    ended = json.loads(out[out.index("{") :])["jobs"]
    figures["wall_s"] = max(job[way]["runtime"] for job in ended for way in ("read", "write")) / 1000
    return figures


def run_fio_read(source, _target, _program):
    return run_fio(32, "--name=read", f"--filename={source}", "--rw=read")


def run_fio_both(source, target, _program):
    """The disk's speed for reading one file and writing another at the same time."""
    write = ["--name=write", f"--filename={target}", "--rw=write", f"--size={source.stat().st_size}"]
    return run_fio(16, "--name=read", f"--filename={source}", "--rw=read", *write)


def run_tidemark(suffix):
    def contender(source, target, program):
        return run([program, "copy", source, target.with_suffix(suffix), "--yes"])[0]

    return contender


def run_dd(source, target, _program):
    return run(["dd", f"if={source}", f"of={target}", "bs=1M", "iflag=direct", "oflag=direct"])[0]


def run_qemu(source, target, _program):
    command = ["qemu-img", "convert", "-f", "raw", "-O", "raw", "-W", "-m", "16", "-t", "none", "-T", "none"]
    return run(command + [source, target])[0]


def run_nbdcopy(source, target, _program):
    return run(["nbdcopy", source, target])[0]


CONTENDERS = {
    "fio read": run_fio_read,
    "fio read + write": run_fio_both,
    "tidemark raw": run_tidemark(".img"),
    "tidemark archive": run_tidemark(".tdm"),
    "dd": run_dd,
    "qemu-img": run_qemu,
    "nbdcopy": run_nbdcopy,
}


def measure(rounds, source, folder, program):
    target = folder / "result.img"
    raw = {name: [] for name in CONTENDERS}
    names = list(CONTENDERS)
    for number in range(rounds):
        # Rotated, so that the run after the one that leaves the disk busy is not always the same.
        order = names[number % len(names) :] + names[: number % len(names)]
        for name in order:
            prepare(target)
            figures = CONTENDERS[name](source, target, program)
            raw[name].append(figures)
            if name == "tidemark raw" and number == 0:
                if subprocess.run(["cmp", source, target]).returncode != 0:
                    die("tidemark's copy differs from the file")
            say(f"round {number + 1}/{rounds}: {name}: {figures['wall_s']:.2f} s")
    return raw


def judge(medians):
    ours = medians["tidemark raw"]
    goals = []

    def goal(text, value, limit, met):
        goals.append({"goal": text, "value": round(value, 3), "limit": limit, "met": met})

    ratio = medians["fio read"]["wall_s"] / ours["wall_s"]
    goal("copy / fio read throughput, at least", ratio, GOAL_OF_FIO, ratio >= GOAL_OF_FIO)
    for peer in ("dd", "qemu-img"):
        ratio = medians[peer]["wall_s"] / ours["wall_s"]
        goal(f"times as fast as {peer}, at least", ratio, GOAL_OF_PEER, ratio >= GOAL_OF_PEER)
    limit = round(medians["nbdcopy"]["cpu_s"], 3)
    goal("CPU seconds, at most nbdcopy's", ours["cpu_s"], limit, ours["cpu_s"] <= limit)
    rss = max(ours["rss_mib"], medians["tidemark archive"]["rss_mib"])
    goal("MiB of memory, raw and archive, at most", rss, GOAL_RSS_MIB, rss <= GOAL_RSS_MIB)
    return goals


def table(medians, goals, size):
    print(f"{'median of':18} {'seconds':>8} {'MiB/s':>8} {'CPU s':>7} {'RSS MiB':>8}")
    for name, it in medians.items():
        rate = size / MIB / it["wall_s"]
        print(f"{name:18} {it['wall_s']:8.2f} {rate:8.0f} {it['cpu_s']:7.2f} {it['rss_mib']:8.1f}")
    print()
    for it in goals:
        verdict = "met" if it["met"] else "MISSED"
        print(f"{it['goal']:42} {it['value']:8.2f}  (goal {it['limit']:.2f})  {verdict}")
    # Not a goal but the bound: on a disk that serves one request at a time, a copy takes the sum of both.
    bound = medians["fio read + write"]["wall_s"]
    print(f"{'copy / what fio reads and writes at once':42} {bound / medians['tidemark raw']['wall_s']:8.2f}")


def arguments(words):
    parser = argparse.ArgumentParser(
        prog="scripts/bench cold", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds (default 5)")
    parser.add_argument("--size", type=size_of, default=2 << 30, help="size of the file (default 2G)")
    parser.add_argument("--dir", type=Path, default=ROOT / "target/bench", help="where the files are made")
    parser.add_argument("--tidemark", type=Path, help="measure this program instead of building one")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a goal is missed")
    options = parser.parse_args(words)
    if options.rounds < 1 or options.size < MIB or options.size % MIB:
        parser.error("at least one round, and a size in whole MiB")
    return options


def main(words):
    """Measures; returns the results, and whether all goals of --check are met."""
    options = arguments(words)
    install_peers()
    program = options.tidemark or build()
    folder = options.dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder).free < 3 * options.size:
        die(f"{folder} has not three times the file's size free: give another --dir or a smaller --size")
    if os.geteuid() != 0:
        say("not root: the page cache is not dropped between runs")
    load = os.getloadavg()
    if load[0] > 0.5:
        say(f"this machine is busy (load {load[0]:.1f}): the figures will be worth less")
    source = folder / "source.img"
    try:
        make_source(source, options.size)
        raw = measure(options.rounds, source, folder, program)
    finally:
        for path in [source, *folder.glob("result.*")]:
            path.unlink(missing_ok=True)
    keys = ("wall_s", "cpu_s", "rss_mib")
    medians = {
        name: {key: statistics.median(run[key] for run in runs) for key in keys} for name, runs in raw.items()
    }
    goals = judge(medians)
    results = {
        "size_bytes": options.size,
        "rounds": options.rounds,
        "kernel": platform.release(),
        "cpus": os.cpu_count(),
        "load_before": load,
        "load_after": os.getloadavg(),
        "medians": medians,
        "goals": goals,
        "raw": raw,
    }
    table(medians, goals, options.size)
    return results, not options.check or all(goal["met"] for goal in goals)
