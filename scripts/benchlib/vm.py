"""Measures what copies of a live volume cost the applications beside them, in a virtual machine.

  scripts/bench vm [--rounds N] [--loads LIST] [--profile LIST] [--contenders LIST] [--variant NAME=OPTIONS]...
                   [--volume-mib N] [--disk separate|shared] [--clock tsc|hpet] [--quick] [--markdown] [--check]
                   [--from FILE]

One guest for each profile; in it, side by side: each load alone (none), beside dd of the live device (dd: the
upper bound, no copy of any instant), beside an LVM thick snapshot and dd of it (lvm), beside tidemark copy
(tidemark), in rounds whose order rotates. Everybody copies the same logical volume, whose ext4 is a third full, to
the same raw disk, and keeps originals on the same third disk: LVM in its copy-on-write volume with chunks of 4 KiB,
Tidemark in its store, RAM head included. Where --contenders asks for it, a further one (stream) reads what is in use
and writes it, both at once and with no snapshot: what overlapping costs. What is counted, and from when to when,
vm-tests/bench/rounds.py says.

Loads: uniform, skewed, append, pgbench; or a, b, c, d.

Profiles:
  normal   flushes are free, as on a disk with protection against power loss; LVM's store is a volume on the disk,
           Tidemark's too
  slow     a flush of the store's disk takes 50 ms (dm-delay); both stores are loop devices on files there

The guest's processors are emulated where there is no KVM, so figures mean something beside each other only. The
disks are throttled to an SSD in tenfold slow motion, so that they, and not the emulation, are what everybody waits
for; vm-tests/cases/bench.rs has the numbers, the reasons, and whom that favours; --disk shared makes reads and
writes take turns. The guest reads its clock from the TSC; with --clock hpet, as in the tests, from the emulated HPET,
which costs an exit and QEMU's lock each time, several times for an I/O. A share is that of the same load alone in
the same round; the table shows medians over rounds.

TIDEMARK_BENCH_OPTIONS holds options for every tidemark copy (for example '--store-ram 0'); a variant has more, or
others, of its own: --variant 'hot=--order hot'. TIDEMARK_VM_TIME_SCALE stretches the guest's time limit.

--from FILE makes the tables again from a stored target/bench/results.json and measures nothing.
--check exits with 1 where a goal is missed.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

from . import ROOT, figures

LETTERS = {"a": "uniform", "b": "skewed", "c": "append", "d": "pgbench"}
PROFILES = ("normal", "slow")
CONTENDERS = ("none", "dd", "lvm", "tidemark")
# And what is measured only where it is asked for.
PROBES = ("stream",)
# A slow run, a load's start and end included; and the stage: LVM, PostgreSQL, the volume's old data.
RUN_SECONDS_MAX = 90
STAGE_SECONDS_MAX = 600
ROUNDS_MAX = 100


def say(text):
    print(f"bench: {text}", file=sys.stderr, flush=True)


def names_of(known, letters=None):
    """An argparse type: a list of known names, by name or letter."""

    def parse(text):
        names = [(letters or {}).get(word, word) for word in text.split(",")]
        unknown = [name for name in names if name not in known]
        if unknown or len(set(names)) != len(names):
            raise argparse.ArgumentTypeError(f"{text}: different ones of {', '.join(known)} are wanted")
        return names

    return parse


def variant(text):
    name, equals, options = text.partition("=")
    if not re.fullmatch(r"[a-z][a-z0-9-]*", name) or name in CONTENDERS + PROBES or not equals or "," in options:
        raise argparse.ArgumentTypeError(f"{text}: NAME=OPTIONS is wanted, a new name of a-z, 0-9 and -, and no comma")
    return f"tidemark-{name}={options}"


def arguments(words):
    parser = argparse.ArgumentParser(
        prog="scripts/bench vm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    loads = list(LETTERS.values())
    parser.add_argument("--rounds", type=int, help="rounds (default 3)")
    parser.add_argument("--loads", type=names_of(loads, LETTERS), default=loads, help="default: all")
    parser.add_argument("--profile", type=names_of(PROFILES), default=list(PROFILES), help="default: both")
    names = names_of(CONTENDERS + PROBES)
    parser.add_argument("--contenders", type=names, default=list(CONTENDERS), help="default: all but stream")
    parser.add_argument("--variant", type=variant, action="append", default=[], help="one more tidemark, with options")
    parser.add_argument("--volume-mib", type=int, help="size of the volume (default 512)")
    disks = ("separate", "shared")
    parser.add_argument("--disk", choices=disks, default=disks[0], help="bandwidth of reads and writes (default: separate)")
    clocks = ("tsc", "hpet")
    parser.add_argument("--clock", choices=clocks, default=clocks[0], help="the guest's clock (default: tsc)")
    parser.add_argument("--quick", action="store_true", help="a smoke test: one round, 256 MiB; its figures say little")
    parser.add_argument("--markdown", action="store_true", help="print the tables in Markdown")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a goal is missed")
    parser.add_argument("--from", dest="stored", type=Path, metavar="FILE", help="tables of stored results")
    options = parser.parse_args(words)
    if options.rounds is None:
        options.rounds = 1 if options.quick else 3
    if options.volume_mib is None:
        options.volume_mib = 256 if options.quick else 512
    if not 1 <= options.rounds <= ROUNDS_MAX or options.volume_mib < 256 or options.volume_mib % 16:
        parser.error(f"1 to {ROUNDS_MAX} rounds, and a volume of at least 256 MiB in steps of 16")
    return options


def environment(options):
    contenders = options.contenders + options.variant
    runs = options.rounds * len(options.loads) * len(contenders)
    chosen = {
        "TIDEMARK_BENCH_ROUNDS": options.rounds,
        "TIDEMARK_BENCH_LOADS": ",".join(options.loads),
        "TIDEMARK_BENCH_CONTENDERS": ",".join(contenders),
        "TIDEMARK_BENCH_VOLUME_MIB": options.volume_mib,
        "TIDEMARK_BENCH_DISK": options.disk,
        "TIDEMARK_BENCH_CLOCK": options.clock,
        "TIDEMARK_BENCH_IDLE_SECONDS": 3 if options.quick else 6,
        "TIDEMARK_BENCH_LIMIT_SECONDS": STAGE_SECONDS_MAX + runs * RUN_SECONDS_MAX,
    }
    return {**os.environ, **{name: str(value) for name, value in chosen.items()}}


def measure(profile, options):
    """Boots the guest; its lines. None where it did not come to its end."""
    case = f"bench_{profile}"
    say(f"{case}: target/vm/run/{case}-6.12/case/output tells how far it is")
    command = ["cargo", "test", "--quiet", "--release", "--all-features", "--test", "vm", "--"]
    command += ["--bench", "--jobs", "1", case]
    done = subprocess.run(command, cwd=ROOT, env=environment(options), stdout=sys.stderr)
    if done.returncode != 0:
        say(f"{case} failed")
        return None
    lines = (ROOT / f"target/vm/run/{case}-6.12/case/artifacts/results.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def evaluate(lines):
    (setup,) = [line for line in lines if line["type"] == "setup"]
    runs = [line for line in lines if line["type"] == "run"]
    found = figures.summary(runs)
    return {"setup": setup, "medians": found, "goals": figures.goals(found), "raw": runs}


def show(profile, part, markdown):
    table = figures.markdown_table if markdown else figures.text_table
    print(f"{'### ' if markdown else ''}{profile}: {figures.conditions(part['setup'])}\n")
    print(table(figures.HEADS, figures.rows(part["medians"]), 2), end="\n\n")
    if part["goals"]:
        print(table(figures.GOAL_HEADS, figures.goal_rows(part["goals"]), 3), end="\n\n")


def main(words):
    """Measures; the results (None where they are stored ones), and whether all is well as --check sees it."""
    options = arguments(words)
    whole = True
    if options.stored:
        stored = json.loads(options.stored.read_text())["vm"]
        parts = {
            profile: evaluate([part["setup"], *part["raw"]]) for profile, part in stored["profiles"].items()
        }
    else:
        subprocess.run([ROOT / "scripts/setup"], check=True)
        load = os.getloadavg()
        if load[0] > 0.5:
            say(f"this machine is busy (load {load[0]:.1f}): the figures will be worth less")
        parts = {}
        for profile in options.profile:
            lines = measure(profile, options)
            if lines is None:
                whole = False
            else:
                parts[profile] = evaluate(lines)
    for profile, part in parts.items():
        show(profile, part, options.markdown)
    met = all(goal["met"] for part in parts.values() for goal in part["goals"])
    well = whole and (met or not options.check)
    if options.stored or not parts:
        return None, well
    machine = {"kernel": platform.release(), "cpus": os.cpu_count(), "load_before": load, "load_after": os.getloadavg()}
    return {"rounds": options.rounds, "quick": options.quick, "host": machine, "profiles": parts}, well
