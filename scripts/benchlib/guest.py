"""Shared by the measurements in a guest: options, the guest's run, its result lines, the tables.

A measurement is a `Guest`: its kernel, its profiles (one VM case each), and what it adds to options and environment.
vm-tests/cases/bench.rs describes the machines, vm-tests/bench/rounds.py measures in them.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

from . import ROOT, figures

LETTERS = {"a": "uniform", "b": "skewed", "c": "append", "d": "pgbench"}
LOADS = list(LETTERS.values())
CONTENDERS = ("none", "dd", "lvm", "tidemark")
# Measured only on request.
PROBES = ("stream",)
# Upper bounds: a slow run with start and end of its load; and the preparation with LVM, PostgreSQL and old data.
RUN_SECONDS_MAX = 90
STAGE_SECONDS_MAX = 600
ROUNDS_MAX = 100
# The guest has its own folders here, so programs of the host in them are not visible.
GUEST_FOLDERS = ("/tmp", "/run", "/dev", "/proc", "/sys")


def say(text):
    print(f"bench: {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Guest:
    """A measurement. `seconds` are for the load alone, its warm-up, and the pause before it."""

    name: str
    about: str
    kernel: str
    profiles: tuple
    loads: list
    rounds: int
    volume_mib: int
    seconds: tuple
    add_options: Callable
    environment: Callable
    goals: Callable


def names_of(known, letters=None):
    """An argparse type: a list of known names, by name or letter."""

    def parse(text):
        names = [(letters or {}).get(word, word) for word in text.split(",")]
        unknown = [name for name in names if name not in known]
        if unknown or len(set(names)) != len(names):
            raise argparse.ArgumentTypeError(f"{text}: different ones of {', '.join(known)} are wanted")
        return names

    return parse


def named(text, what):
    """Parses NAME=VALUE, where NAME is a new contender."""
    name, equals, value = text.partition("=")
    if not re.fullmatch(r"[a-z][a-z0-9-]*", name) or name in CONTENDERS + PROBES or not equals or "," in value:
        raise argparse.ArgumentTypeError(f"{text}: NAME={what} is wanted, a new name of a-z, 0-9 and -, and no comma")
    return f"tidemark-{name}", value


def variant(text):
    return "=".join(named(text, "OPTIONS"))


def build(text):
    name, path = named(text, "PATH")
    program = Path(path).resolve()
    if not os.access(program, os.X_OK) or not program.is_file():
        raise argparse.ArgumentTypeError(f"{path} is no program")
    if any(program.is_relative_to(folder) for folder in GUEST_FOLDERS):
        raise argparse.ArgumentTypeError(f"{path}: a guest has {', '.join(GUEST_FOLDERS)} of its own; put it elsewhere")
    return f"{name}={program}"


def arguments(guest, words):
    parser = argparse.ArgumentParser(
        prog=f"scripts/bench {guest.name}",
        description=guest.about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    loads, profiles = ",".join(guest.loads), ",".join(guest.profiles)
    parser.add_argument("--rounds", type=int, help=f"rounds (default {guest.rounds})")
    parser.add_argument("--loads", type=names_of(LOADS, LETTERS), default=guest.loads, help=f"default: {loads}")
    parser.add_argument("--profile", type=names_of(guest.profiles), default=list(guest.profiles), help=f"default: {profiles}")
    names = names_of(CONTENDERS + PROBES)
    parser.add_argument("--contenders", type=names, default=list(CONTENDERS), help="default: all but stream")
    parser.add_argument("--variant", type=variant, action="append", default=[], help="one more tidemark, with options")
    parser.add_argument("--build", type=build, action="append", default=[], help="one more tidemark: another program")
    parser.add_argument("--volume-mib", type=int, help=f"size of the volume (default {guest.volume_mib})")
    guest.add_options(parser)
    parser.add_argument("--quick", action="store_true", help="a smoke test: one round, 256 MiB; its figures say little")
    parser.add_argument("--markdown", action="store_true", help="print the tables in Markdown")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a goal is missed")
    parser.add_argument("--from", dest="stored", type=Path, metavar="FILE", help="tables of stored results")
    options = parser.parse_args(words)
    if options.rounds is None:
        options.rounds = 1 if options.quick else guest.rounds
    if options.volume_mib is None:
        options.volume_mib = 256 if options.quick else guest.volume_mib
    if not 1 <= options.rounds <= ROUNDS_MAX or options.volume_mib < 256 or options.volume_mib % 16:
        parser.error(f"1 to {ROUNDS_MAX} rounds, and a volume of at least 256 MiB in steps of 16")
    further = [word.partition("=")[0] for word in options.variant + options.build]
    if len(set(further)) != len(further):
        parser.error("each variant and build needs a name of its own")
    return options


def environment(guest, options):
    contenders = options.contenders + options.variant + [word.partition("=")[0] for word in options.build]
    runs = options.rounds * len(options.loads) * len(contenders)
    idle, warm, settle = guest.seconds
    chosen = {
        "ROUNDS": options.rounds,
        "LOADS": ",".join(options.loads),
        "CONTENDERS": ",".join(contenders),
        "BUILDS": ",".join(options.build),
        "VOLUME_MIB": options.volume_mib,
        "IDLE_SECONDS": idle / 2 if options.quick else idle,
        "WARM_SECONDS": warm,
        "SETTLE_SECONDS": settle,
        "LIMIT_SECONDS": STAGE_SECONDS_MAX + runs * RUN_SECONDS_MAX,
        **guest.environment(options),
    }
    return {**os.environ, **{f"TIDEMARK_BENCH_{name}": str(value) for name, value in chosen.items()}}


def measure(guest, profile, options):
    """Boots the guest and returns its result lines, or None if it did not finish."""
    case = f"bench_{profile}"
    folder = f"target/vm/run/{case}-{guest.kernel}/case"
    say(f"{case}: {folder}/output tells how far it is")
    command = ["cargo", "test", "--quiet", "--release", "--all-features", "--test", "vm", "--"]
    command += ["--bench", "--jobs", "1", "--kernel", guest.kernel, case]
    done = subprocess.run(command, cwd=ROOT, env=environment(guest, options), stdout=sys.stderr)
    if done.returncode != 0:
        say(f"{case} failed")
        return None
    lines = (ROOT / folder / "artifacts/results.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def evaluate(guest, profile, lines):
    (setup,) = [line for line in lines if line["type"] == "setup"]
    runs = [line for line in lines if line["type"] == "run"]
    limits = [line for line in lines if line["type"] == "limit"]
    found = figures.summary(runs)
    goals = guest.goals(profile, found, figures.limit_seconds(limits))
    return {"setup": setup, "medians": found, "goals": goals, "limits": limits, "raw": runs}


def show(profile, part, markdown):
    table = figures.markdown_table if markdown else figures.text_table
    print(f"{'### ' if markdown else ''}{profile}: {figures.conditions(part['setup'])}\n")
    if part["limits"]:
        seconds, mib = figures.limit_seconds(part["limits"]), part["limits"][0]["bytes"] / figures.MIB
        print(f"Reading the {mib:.0f} MiB in use and writing as much, both at once and alone: {seconds:.2f} s\n")
    print(table(figures.HEADS, figures.rows(part["medians"]), 2), end="\n\n")
    if part["goals"]:
        print(table(figures.GOAL_HEADS, figures.goal_rows(part["goals"]), 3), end="\n\n")


def stored_parts(guest, path):
    stored = json.loads(path.read_text())[guest.name]
    return {
        profile: evaluate(guest, profile, [part["setup"], *part.get("limits", []), *part["raw"]])
        for profile, part in stored["profiles"].items()
    }


def main(guest, words):
    """Measures; returns the results (None if they were loaded), and whether all goals of --check are met."""
    options = arguments(guest, words)
    whole = True
    if options.stored:
        parts = stored_parts(guest, options.stored)
    else:
        subprocess.run([ROOT / "scripts/setup"], check=True)
        load = os.getloadavg()
        if load[0] > 0.5:
            say(f"this machine is busy (load {load[0]:.1f}): the figures will be worth less")
        parts = {}
        for profile in options.profile:
            lines = measure(guest, profile, options)
            if lines is None:
                whole = False
            else:
                parts[profile] = evaluate(guest, profile, lines)
    for profile, part in parts.items():
        show(profile, part, options.markdown)
    met = all(goal["met"] for part in parts.values() for goal in part["goals"])
    well = whole and (met or not options.check)
    if options.stored or not parts:
        return None, well
    machine = {"kernel": platform.release(), "cpus": os.cpu_count(), "load_before": load, "load_after": os.getloadavg()}
    return {"rounds": options.rounds, "quick": options.quick, "host": machine, "profiles": parts}, well
