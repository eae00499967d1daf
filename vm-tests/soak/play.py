"""One copy of a scenario: runs it with its events, resumes it or gives it up, and judges the result.

A copy that reports success is compared with the capture, whatever its events were. A copy that fails must end with an
exit code that its events explain, with no file under the final name, and with the origin as before. An event that comes
too late, because the copy has ended, is not a failure, but counted.
"""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import compare
import neighbours
from machine import LOG, Failure, now, old_data, run, who_waits
from stage import MOUNTS, TIDEMARK, WORK

COPY_SECONDS_MAX = 90
# What the pipe and the reader's buffer hold.
PIPE_BYTES = 1 << 20
# In memory: the origin is held until the capture is complete.
INSTANT = f"{WORK}/instant"
# No run may print these, whatever its events were.
NEVER_SAID = ("panicked", "this should not happen", "bug of Tidemark", "must not happen")
# The capture counts only if its command was alive until the end: the capture of a killed command keeps running.
CAPTURE = (
    f'dd if="$TIDEMARK_ORIGIN_BELOW" of={INSTANT}.new bs=1M iflag=direct status=none '
    f'&& grep -q "^State:.[RSD]" /proc/$PPID/status && mv {INSTANT}.new {INSTANT}'
)
# Messages of a copy that ended because another tool changed its origin.
MADE_WAY = (
    "another tool replaced", "another tool is changing", "is changing the volume group", "has been changing the volume group",
    "another tool resumed", "it is already frozen", "was changed since the copy was planned", "has changed since the copy was planned",
    "was removed or renamed",
)
EARLY_DEATHS = (-signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP)
PHASES = ("prepare", "instant", "data", "originals", "verify", "finish")


class Command:
    """A tidemark command in the background, and its output so far."""

    def __init__(self, number, words, environment, reader=None):
        self.path = f"{WORK}/out/{number:02}-{words[0]}.json"
        self.begin = now()
        self.seen, self.phases, self.percent = 0, {}, 0
        self.rest = b""
        self.reader, self.is_killed = None, False
        with open(self.path, "wb") as out:
            if reader:
                self.process = self.start(words, environment, subprocess.PIPE, out)
                # A separate process copies from the pipe to a file, so that it can be killed.
                with open(reader, "wb") as file:
                    self.reader = subprocess.Popen(["cat"], stdin=self.process.stdout, stdout=file, start_new_session=True)
                self.process.stdout.close()
            else:
                self.process = self.start(words, environment, out, subprocess.STDOUT)
        LOG.say(f"started {self.process.pid}: {' '.join(words)}")

    def start(self, words, environment, stdout, stderr):
        return subprocess.Popen(
            [TIDEMARK, *words], stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr,
            env={**os.environ, "TIDEMARK_LOG": "info", **environment}, start_new_session=True,
        )

    def look(self):
        """Reads new output; returns True while the command runs."""
        with open(self.path, "rb") as file:
            file.seek(self.seen)
            text = file.read()
        self.seen += len(text)
        *lines, self.rest = (self.rest + text).split(b"\n")
        for line in lines:
            self.take(line)
        return self.process.poll() is None

    def take(self, line):
        try:
            event = json.loads(line)
        except ValueError:
            return
        if event.get("type") != "progress":
            return
        if event.get("event") == "phase":
            self.phases.setdefault(event["phase"], now())
        elif event.get("event") == "progress" and event.get("phase") == "data" and event.get("total"):
            self.percent = max(self.percent, 100 * event["done"] // event["total"])

    def is_due(self, moment):
        """Whether the moment of the event has come."""
        begun = self.begin if moment["phase"] == "prepare" else None
        for phase in PHASES[PHASES.index(moment["phase"]) :]:
            begun = begun or self.phases.get(phase)
        if begun is None:
            return False
        if self.percent < moment.get("percent", 0) and not any(phase in self.phases for phase in PHASES[3:]):
            return False
        return now() >= begun + moment["ms"] / 1000

    def status(self):
        self.process.wait()
        self.look()
        if self.reader:
            self.reader.wait(timeout=30)
        text = self.text()
        for words in NEVER_SAID:
            if words in text:
                raise Failure(f"it says '{words}': {text[-2000:]}")
        return self.process.returncode

    def text(self):
        return Path(self.path).read_text(errors="replace")

    def of_type(self, kind):
        found = {}
        for line in self.text().splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if event.get("type") == kind:
                found = event
        return found


class Copy:
    def __init__(self, stage, spec, number):
        self.stage, self.spec, self.number = stage, spec, number
        self.events = list(spec["events"])
        self.fired, self.kills, self.commands = [], 0, 0
        self.mend_at = None
        self.is_given_up = self.is_complete = False
        self.result = {"outcome": None, "late": 0, "originals": 0, "events": []}
        self.beside = neighbours.Neighbours(stage, spec["neighbours"]) if "neighbours" in spec else None

    # Making the request.

    def prepare(self):
        shutil.rmtree(f"{WORK}/out", ignore_errors=True)
        os.makedirs(f"{WORK}/out")
        for path in Path(MOUNTS["scratch"]).glob("*"):
            if path.is_file():
                path.unlink()
        Path(INSTANT).unlink(missing_ok=True)
        secondary = self.spec["secondary"]
        kind, place = secondary["kind"], secondary["place"]
        if kind == "raw-device":
            self.target = self.stage.disks["secondary"].node
            self.stage.unmount("secondary")
            disk, kib = self.stage.disks["secondary"], self.stage.scenario["origin"]["kib"]
            old_data(disk.below, kib, "what the secondary held before " if secondary["garbage"] else None)
            return
        folder = MOUNTS["scratch"]
        if place == "small":
            folder = self.stage.small_filesystem(self.no_space()["mib"])
        elif place == "own" and kind != "pipe":
            folder = self.stage.own_filesystem("secondary")
        self.folder = Path(folder)
        self.target = f"{folder}/copy" + (".raw" if kind == "raw-file" else ".tdm")
        Path(self.target).unlink(missing_ok=True)

    def no_space(self):
        return next(event for event in self.events if event["do"] == "no-space")

    def words(self):
        spec, kind = self.spec, self.spec["secondary"]["kind"]
        words = ["copy", self.stage.origin, "-" if kind == "pipe" else self.target, "--yes", "--json"]
        words += ["--chunk", f"{spec['chunk_kib']}KiB", "--segment", f"{spec['segment_kib']}KiB"]
        words += ["--region", f"{spec['region_kib']}KiB"] if spec["region_kib"] else []
        words += ["--order", spec["order"], "--on-full", spec["on_full"], "--impact", spec["impact"]]
        words += ["--hold-budget", f"{spec['hold_seconds']}s"] if spec["on_full"] == "hold" else []
        words += ["--rate", f"{spec['rate_kib']}KiB"] if spec["rate_kib"] else []
        words += ["--verify"] if spec["verify"] else []
        words += ["--all"] if spec["all"] else []
        words += ["--lvm-lock", spec["lvm_lock"]] if self.beside else []
        words += ["--originals", kind] if kind in ("overlay", "append") else []
        return words + self.store_words() + ["--freeze-budget", "60s", "--hook-frozen", CAPTURE]

    def store_words(self):
        store = self.spec["store"]
        if store["place"] == "device":
            self.stage.unmount("store")
            place = self.stage.disks["store"].node
        else:
            place = self.stage.own_filesystem("store")
            if store["place"] == "file":
                place += "/store.cow"
                Path(place).unlink(missing_ok=True)
        words = ["--store", place, "--store-ram", f"{store['ram_mib']}MiB" if store["ram_mib"] else "0"]
        words += ["--store-size", f"{store['size_kib']}KiB"] if store["size_kib"] else []
        return words + (["--keep-store"] if store["keep"] else [])

    # Running the copy.

    def play(self):
        """Makes the copy, judges it, and returns the result."""
        self.stage.pause_load()
        self.prepare()
        words = self.words()
        self.stage.go_on_with_load()
        time.sleep(self.spec["settle_ms"] / 1000)
        environment = {}
        if self.events and self.events[0]["do"] == "crash":
            environment["TIDEMARK_CRASH_AT"] = self.events[0]["point"]
        for event in self.events:
            if event["do"] in ("overflow", "no-space"):
                self.fired.append(event)
        self.events = [event for event in self.events if event["do"] not in ("overflow", "no-space")]
        is_pipe = self.spec["secondary"]["kind"] == "pipe"
        command = self.command(words, environment, reader=self.target if is_pipe else None)
        if self.beside:
            self.beside.start()
        while True:
            self.follow(command)
            status = command.status()
            if status in EARLY_DEATHS and not command.phases:
                # Killed before the command could catch signals: as if it had never begun or resumed.
                self.give_up()
                break
            if status != -signal.SIGKILL:
                break
            then = self.killed()
            self.is_complete = self.is_finished(command)
            if then == "recover" or self.is_complete:
                self.give_up()
                break
            command = self.command(["resume", "--json"], {})
        self.mend()
        self.end_beside()
        self.result["events"] = [event["do"] for event in self.fired]
        self.result["late"] = len(self.events)
        self.judge(command, status)
        return self.result

    def end_beside(self):
        if self.beside:
            self.beside.end()
            self.result["beside"], self.result["beside, refused"] = dict(self.beside.done), dict(self.beside.refused)

    def command(self, words, environment, reader=None):
        self.commands += 1
        return Command(self.commands, words, environment, reader)

    def follow(self, command):
        """Triggers the events until the command has ended."""
        end = now() + COPY_SECONDS_MAX
        while command.look():
            self.mend_in_time()
            # A killed command may take a moment to die. It gets no further events.
            waits = self.events and self.events[0]["do"] != "crash" and not command.is_killed
            if waits and command.is_due(self.events[0]["at"]):
                self.happen(self.events.pop(0), command)
            if now() > end:
                who_waits()
                raise Failure(f"the command has not ended after {COPY_SECONDS_MAX} s: {command.text()[-1500:]}")
            time.sleep(0.005)

    def happen(self, event, command):
        LOG.say(f"event {event}, the data {command.percent} % copied")
        kind, disks = event["do"], self.stage.disks
        if command.process.poll() is not None:
            # The command ended before the event.
            self.events.insert(0, event)
            return
        self.fired.append(event)
        if kind == "kill":
            command.is_killed = True
            command.process.kill()
        elif kind == "signal":
            command.process.send_signal(getattr(signal, f"SIG{event['signal']}"))
        elif kind == "stop":
            command.process.send_signal(signal.SIGSTOP)
            time.sleep(event["ms"] / 1000)
            command.process.send_signal(signal.SIGCONT)
        elif kind == "reader-dies":
            command.reader.kill()
        elif kind == "store-hang":
            disks["store"].suspend()
            self.mend_at = now() + event["ms"] / 1000
        elif kind == "store-fault":
            disks["store"].fail(event["way"], event["percent"], self.stage.choices)
            self.mend_at = now() + event["ms"] / 1000
        elif kind == "secondary-fault":
            disks["secondary"].fail(event["way"], event["percent"], self.stage.choices)
            self.mend_at = now() + event["ms"] / 1000
        elif kind == "secondary-lies":
            disks["secondary"].fail("forget-writes", 100, self.stage.choices)
        else:
            # Errors of the application on a bad origin disk are expected.
            self.stage.is_origin_bad = True
            way = "dust" if kind == "origin-reads" else "flakey-writes"
            for name in "ab":
                disks[name].fail(way, event["share"], self.stage.choices)
            self.mend_at = now() + event["ms"] / 1000

    def mend_in_time(self):
        if self.mend_at is not None and now() >= self.mend_at:
            self.mend()

    def mend(self):
        self.mend_at = None
        for disk in self.stage.disks.values():
            disk.mend()

    def killed(self):
        """A command was killed by the last event, or by itself at a crash point. Returns what to do next."""
        if self.events and self.events[0]["do"] == "crash":
            event = self.events.pop(0)
            self.fired.append(event)
        elif not self.fired or self.fired[-1]["do"] != "kill":
            raise Failure("the command was killed, and not by us")
        event = self.fired[-1]
        self.kills += 1
        self.mend()
        self.stage.load_goes_on("after a kill")
        time.sleep(event.get("wait_ms", 0) / 1000)
        return event["then"]

    def is_finished(self, command):
        """Whether it was killed after its end: it has its final name or, without a name, the origin has its own table again."""
        if self.spec["secondary"]["kind"] not in ("raw-device", "pipe"):
            return Path(self.target).exists()
        was_hurt = any(event["do"].endswith(("-fault", "-reads", "-lies", "-dies")) for event in self.fired)
        return "finish" in command.phases and self.stage.has_own_table_again() and not was_hurt

    def give_up(self):
        self.is_given_up = True
        recover = (TIDEMARK, "recover")
        status, output = neighbours.wait_for_recover(recover) if self.beside else run(*recover, check=False)
        if status != 0:
            raise Failure(f"recover ended with {status}: {output}")

    # Judging the result.

    def judge(self, command, status):
        """Raises a Failure if anything is wrong, else notes the outcome."""
        error = command.of_type("error")
        LOG.say(f"status {status}, error {error}, fired {self.fired}, late {self.events}")
        if status == 3 and not self.is_given_up and not self.has_made_way(status, error):
            self.judge_refusal(error)
        faulty = [place for place in ("store", "secondary") if f"{place}-fault" in self.result["events"]]
        if status == 1 and faulty and self.stage.left_behind():
            self.put_away_later(error, faulty)
        has_made_way = self.has_made_way(status, error)
        if has_made_way and "tidemark recover" in f"{error}":
            self.give_up()
        self.stage.is_as_before("after the copy")
        self.stage.load_goes_on("after the copy")
        self.stage.pause_load()
        # A file with its final name is complete, even if the command failed later; so is an archive that verifies. A
        # writer cannot know which part of the data a dead reader had not read from the pipe.
        is_exact = status == 0 and "reader-dies" not in self.result["events"]
        if is_exact or self.is_complete or self.has_name() or self.is_whole_stream():
            self.compare()
            self.result["outcome"] = "exact" if status == 0 else "exact, failed after completion"
            self.note_originals(command)
        elif status == 0:
            written = command.of_type("result")["report"]["written_bytes"]
            missing = written - Path(self.target).stat().st_size
            if missing > PIPE_BYTES:
                raise Failure(f"it succeeded, but {missing} bytes of {written} were never read")
            self.result["outcome"] = "cut off: the reader died"
        elif has_made_way:
            self.result["outcome"] = "void: another tool changed the origin"
        elif self.is_given_up:
            self.result["outcome"] = "given up"
        else:
            self.judge_failure(command, status, error)
        if status == 4 and "secondary-lies" not in self.result["events"]:
            raise Failure(f"bad data without an event that explains it: {error}")
        self.no_part_is_left()
        if "small" in self.stage.mounted:
            self.stage.unmount("small")

    def has_made_way(self, status, error):
        """Whether it ended because another tool changed its origin. Fails if none did."""
        says_so = status in (1, 3) and any(words in f"{error}" for words in MADE_WAY)
        if says_so and not (self.beside and self.beside.has_changed_the_table()):
            raise Failure(f"it blames another tool, but none changed its origin: {error}")
        return says_so

    def has_name(self):
        return self.spec["secondary"]["kind"] not in ("raw-device", "pipe") and Path(self.target).exists()

    def is_whole_stream(self):
        if self.spec["secondary"]["kind"] != "pipe":
            return False
        status, output = run(TIDEMARK, "verify", self.target, check=False)
        if status not in (0, 4):
            raise Failure(f"verify of a stream that may have been cut ended with {status}: {output}")
        return status == 0

    def judge_refusal(self, error):
        """Only a resume may be refused, for a known reason. Then the copy is given up."""
        message = str(error.get("message"))
        reasons = {
            "there is no copy to resume": True,
            "died before the instant": True,
            "copied to a pipe": self.spec["secondary"]["kind"] == "pipe",
            "lost": True,
            # It was already being put back when killed, or another tool has the origin suspended.
            "there is no device": self.beside is not None,
            "is suspended": self.beside is not None,
        }
        if not self.kills or not any(words in message and holds for words, holds in reasons.items()):
            raise Failure(f"refused: {error}")
        self.give_up()

    def put_away_later(self, error, faulty):
        """After a fault of the store's or the secondary's disk, leftovers may remain. The error must say so and say what
        to do. The origin must not wait for them."""
        self.stage.has_own_table("something is left")
        if "tidemark recover" not in f"{error}":
            raise Failure(f"something is left, but the error does not say so: {self.stage.left_behind()}, {error}")
        status, output = run(TIDEMARK, "recover", check=False)
        if status != 0:
            LOG.say(f"recover ended with {status}: {output}")
            for place in faulty:
                self.stage.remount(place)
            self.give_up()
        self.result["put away later"] = True

    def judge_failure(self, command, status, error):
        allowed = {"signal": 130, "secondary-lies": 4}
        codes = {allowed.get(event["do"], 1) for event in self.fired if event["do"] not in ("kill", "crash", "store-hang")}
        if status not in codes:
            raise Failure(f"exit code {status}, where {sorted(codes)} can be: {error or command.text()[-1500:]}")
        if status == 1 and error.get("kind") in ("usage", "refused", "bad-data", "interrupted", None):
            raise Failure(f"an odd error: {error or command.text()[-1500:]}")
        kinds = {event["do"] for event in self.fired}
        self.result["outcome"] = "failed as it must: " + ", ".join(sorted(kinds - {"kill", "crash", "store-hang"}))

    def no_part_is_left(self):
        """Checks that no partial file is left. (On a failed filesystem it could not be removed.)"""
        if self.spec["secondary"]["kind"] in ("raw-device", "pipe") or "secondary-fault" in self.result["events"]:
            return
        left = [path.name for path in self.folder.iterdir() if "tidemark-partial" in path.name]
        if left:
            raise Failure(f"a part of the copy is left: {left}")

    def compare(self):
        if not Path(INSTANT).exists():
            raise Failure("it succeeded, and nothing was captured at its instant")
        kind, copy = self.spec["secondary"]["kind"], self.target
        if kind in ("overlay", "append", "pipe"):
            copy = f"{MOUNTS['scratch']}/restored"
            run(TIDEMARK, "verify", self.target)
            run(TIDEMARK, "restore", self.target, copy, "--yes")
        filesystem = self.stage.scenario["filesystem"]["type"]
        wrong, in_use = compare.differences(filesystem, INSTANT, copy, self.spec["all"])
        if "secondary-lies" in self.result["events"]:
            # A forgotten write of zeros to free space cannot be detected.
            wrong = [one for one in wrong if not one[2].startswith("free")]
        if wrong:
            raise Failure(f"not what was captured at the instant: {compare.told(wrong)}")
        if kind != "raw-device" and os.path.getsize(copy) != os.path.getsize(INSTANT):
            raise Failure(f"{copy} has {os.path.getsize(copy)} bytes")
        LOG.say(f"equal, {in_use} bytes were in use")

    def note_originals(self, command):
        report = command.of_type("result").get("report", {})
        self.result["originals"] = report.get("originals_count", 0)
