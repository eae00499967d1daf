"""Measures copies of a live volume on a stock kernel in an emulated machine: what scripts/bench live cannot show.

  scripts/bench vm [--rounds N] [--loads LIST] [--profile LIST] [--contenders LIST] [--variant NAME=OPTIONS]...
                   [--build NAME=PATH]... [--volume-mib N] [--disk separate|shared] [--clock tsc|hpet] [--quick]
                   [--markdown] [--check] [--from FILE]

That is: two processors, RCU grace periods, and a store's disk with slow flushes. Contenders, order, loads and counting
are those of `scripts/bench live`; by default two loads in two rounds.

Loads: uniform, skewed, append, pgbench; or a, b, c, d.

Profiles:
  normal   flushes are free, as on a disk with power loss protection; the stores of LVM and Tidemark are volumes on the
           disk
  slow     a flush of the store's disk takes 50 ms (dm-delay); both stores are loop devices on files there

Without KVM the guest's processors are emulated, so figures are comparable only with each other. The disks are throttled
to a tenth of the speed of an SSD, so that they, and not the emulation, are the bottleneck. vm-tests/cases/bench.rs has
the numbers, the reasons, and which contender that favours. With --disk shared, reads and writes take turns. The guest
reads its clock from the TSC; with --clock hpet, as in the tests, from the emulated HPET, which costs an exit and QEMU's
lock each time, several times per I/O. TIDEMARK_VM_TIME_SCALE multiplies the guest's time limit.

--from FILE makes the tables again from a stored target/bench/results.json and measures nothing.
--check exits with 1 if a goal is missed.
"""

from . import figures, guest

DISKS = ("separate", "shared")
CLOCKS = ("tsc", "hpet")


def add_options(parser):
    parser.add_argument("--disk", choices=DISKS, default=DISKS[0], help="bandwidth of reads and writes (default: separate)")
    parser.add_argument("--clock", choices=CLOCKS, default=CLOCKS[0], help="the guest's clock (default: tsc)")


def environment(options):
    return {"DISK": options.disk, "CLOCK": options.clock}


GUEST = guest.Guest(
    name="vm",
    about=__doc__,
    kernel="6.12",
    profiles=("normal", "slow"),
    loads=["skewed", "append"],
    rounds=2,
    volume_mib=512,
    seconds=(6, 2.5, 1),
    add_options=add_options,
    environment=environment,
    goals=lambda _profile, found, _limit: figures.goals(found),
)


def main(words):
    return guest.main(GUEST, words)
