"""Measures the cost of copies of a live volume for the applications beside them, at native speed.

  scripts/bench live [--rounds N] [--loads LIST] [--profile LIST] [--contenders LIST] [--variant NAME=OPTIONS]...
                     [--build NAME=PATH]... [--volume-mib N] [--scheduler NAME] [--quick] [--markdown] [--check]
                     [--from FILE]

One user-mode guest for each profile, its disks modelled by null_blk. It measures each load alone (none), beside dd of
the live device (dd: not a copy of an instant), beside an LVM thick snapshot and dd of it (lvm), and beside tidemark
copy with its default options (tidemark), in rounds whose order rotates. All copy the same logical volume, whose ext4 is
a third full, to the same secondary, and keep originals on the same third disk: LVM in its copy-on-write volume with
chunks of 4 KiB, Tidemark in its store, RAM head included. With --contenders, a further one (stream) reads what is in
use and writes it, both at once and without a snapshot: the cost of overlapping reads and writes.
vm-tests/bench/rounds.py describes what is counted.

Loads: uniform, skewed, append, pgbench; or a, b, c, d.

Profiles (vm-tests/cases/bench.rs describes the models in full, and which contenders they favour):
  ssd        80 us for each request, 64 at once, 400 MiB/s
  rotating   4 ms for each request of at most 1 MiB, one at a time: 250 random requests/s, 250 MiB/s of large ones

The guest has one processor, shared by load, copy and disk models: CPU in the table is the share of time it was busy.
Figures are min / median / max of the rounds. A share is relative to the same load alone in the same round. The limit
for a copy's time is fio reading what is in use and writing as much, both at once, without a load.

--variant 'hot=--order hot' adds a tidemark with options, --build old=PATH adds one of another program. Options for all
of them are in TIDEMARK_BENCH_OPTIONS. Run nothing else on the machine meanwhile.

--from FILE makes the tables again from a stored target/bench/results.json and measures nothing.
--check exits with 1 if a goal is missed.
"""

from . import figures, guest

SCHEDULERS = ("mq-deadline", "bfq", "none")


def add_options(parser):
    parser.add_argument("--scheduler", choices=SCHEDULERS, default=SCHEDULERS[0], help="the disks' (default: mq-deadline)")


def environment(options):
    return {"SCHEDULER": options.scheduler}


GUEST = guest.Guest(
    name="live",
    about=__doc__,
    kernel="um",
    profiles=("ssd", "rotating"),
    loads=guest.LOADS,
    rounds=3,
    volume_mib=1024,
    seconds=(3, 1, 0.5),
    add_options=add_options,
    environment=environment,
    goals=figures.live_goals,
)


def main(words):
    return guest.main(GUEST, words)
