#!/usr/bin/env python3
"""Plays seeds in a guest, one after the other. scenario.py derives the scenario of a seed, play.py judges it.

  soak.py FIRST LAST SECONDS CASE-FOLDER

Plays the seeds FIRST to LAST, or as many of them as can be begun within SECONDS. CASE-FOLDER/results gets a line of
JSON for each, CASE-FOLDER/summary a table of all. The first seed that fails ends the run: its state is kept in
CASE-FOLDER/artifacts/seed-N. The guest may be in any state then and cannot be reused.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import summary
from machine import LOG, Failure, now, run, who_waits
from play import Copy
from scenario import scenario
from stage import MOUNTS, RUN, WORK, Stage, prepare_guest

SEED_SECONDS_MAX = 240
# LVM works in the group during copies.
LVM = os.environ.get("SOAK_LVM") == "1"
# Of this many copies at least one must have preserved an original; otherwise the run proves nothing.
COPIES_THAT_PROVE = 8
# Parts of log lines that an injected fault provokes: a buffer whose write has failed is written again.
PROVOKED = ("fs/buffer.c",)


class Guest:
    def __init__(self, folder):
        self.folder = Path(folder)
        self.complaints = (self.folder / "complaints").read_text().splitlines()
        self.file = open(self.folder / "results", "a")
        self.results = []

    def play(self, seed):
        """Plays one seed; returns True if it succeeded."""
        self.scenario, LOG.lines = scenario(seed, LVM), []
        begin = now()
        print(json.dumps(self.scenario), flush=True)
        with open("/dev/kmsg", "w") as log:
            log.write(f"tidemark-soak: seed {seed} begins\n")
        done = threading.Event()
        threading.Thread(target=self.watch, args=(seed, done), daemon=True).start()
        copies, why = [], None
        try:
            stage = Stage(self.scenario)
            stage.make()
            for number, spec in enumerate(self.scenario["copies"]):
                copies.append(Copy(stage, spec, number).play())
            stage.take_away()
            self.look_at_kernel()
        except Failure as failure:
            why = str(failure)
        except Exception:
            why = traceback.format_exc()
        done.set()
        self.tell(seed, copies, why, now() - begin)
        if why:
            self.keep_state(seed, why)
        return why is None

    def tell(self, seed, copies, why, seconds):
        result = {"seed": seed, "seconds": round(seconds, 1), "copies": copies, "failure": why}
        result["filesystem"] = self.scenario["filesystem"]["type"]
        result["origin"] = self.scenario["origin"]["kind"]
        self.results.append(result)
        self.file.write(json.dumps(result) + "\n")
        self.file.flush()
        with open(self.folder / "log", "a") as log:
            log.write(f"seed {seed}\n" + "\n".join(LOG.lines) + "\n")
        print(json.dumps({"seed": seed, "seconds": result["seconds"], "copies": copies}), flush=True)

    def sum_up(self, first):
        lines = [f"  seeds {first}..{self.results[-1]['seed']}:", *summary.table(self.results)]
        (self.folder / "summary").write_text("\n".join(lines) + "\n")
        copies = sum(len(result["copies"]) for result in self.results)
        if copies >= COPIES_THAT_PROVE and summary.originals(self.results) == 0:
            sys.exit(f"{copies} copies have preserved nothing: this proves nothing")

    def look_at_kernel(self):
        text = subprocess.run(["dmesg", "--read-clear"], capture_output=True, text=True, errors="replace").stdout
        LOG.say("the kernel's log of this seed:\n" + text)
        for line in text.splitlines():
            if any(part in line for part in self.complaints) and not any(part in line for part in PROVOKED):
                raise Failure(f"the kernel complains: {line}")

    def watch(self, seed, done):
        """Ends a seed that exceeds the time limit, whatever it does."""
        if not done.wait(SEED_SECONDS_MAX):
            who_waits()
            time.sleep(1)
            self.tell(seed, [], f"not done after {SEED_SECONDS_MAX} s", SEED_SECONDS_MAX)
            self.keep_state(seed, "it hangs")
            os._exit(1)

    def keep_state(self, seed, why):
        """Keeps everything that may explain the failure. Nothing here may hang."""
        folder = self.folder / "artifacts" / f"seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "scenario.json").write_text(json.dumps(self.scenario, indent=1) + "\n")
        (folder / "failure").write_text(why + "\n")
        (folder / "log").write_text("\n".join(LOG.lines) + "\n")
        shutil.copytree(f"{WORK}/out", folder / "out", dirs_exist_ok=True)
        if os.path.isdir(RUN):
            shutil.copytree(RUN, folder / "run-tidemark", dirs_exist_ok=True)
        for name in ("load.json", "load.log"):
            if os.path.exists(f"{WORK}/{name}"):
                shutil.copy(f"{WORK}/{name}", folder)
        for name, words in {
            "dm-tables": "dmsetup table", "dm-inactive": "dmsetup table --inactive", "dm-info": "dmsetup info", "dm-status": "dmsetup status --noflush",
            "loops": "losetup -a", "mounts": "cat /proc/mounts", "processes": "ps -eo pid,ppid,stat,wchan:32,etimes,args", "dmesg": "dmesg",
        }.items():
            with open(folder / name, "w") as file:
                try:
                    subprocess.run(words.split(), stdout=file, stderr=file, timeout=20)
                except subprocess.TimeoutExpired:
                    file.write("it hangs\n")
        print(f"FAILED: seed {seed}: {why[-3000:]}\nrepeat it: ./scripts/soak{' --lvm' if LVM else ''} --seed {seed}", flush=True)


def main():
    first, last, seconds, folder = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
    end = now() + seconds
    guest = Guest(folder)
    prepare_guest()
    os.makedirs(f"{WORK}/out", exist_ok=True)
    for seed in range(first, last + 1):
        if seed > first and now() >= end:
            break
        if not guest.play(seed):
            # A suspended device would make the guest hang at its shutdown.
            subprocess.run("dmsetup info -c --noheadings -o name | xargs -n 1 -r timeout 5 dmsetup resume", shell=True, timeout=60)
            sys.exit(1)
    guest.sum_up(first)


if __name__ == "__main__":
    main()
