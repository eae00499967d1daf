"""Measures copies of a live volume on a stock kernel in an emulated machine: what scripts/bench live cannot show.

  scripts/bench vm [--rounds N] [--loads LIST] [--profile LIST] [--contenders LIST] [--variant NAME=OPTIONS]...
                   [--build NAME=PATH]... [--volume-mib N] [--disk separate|shared] [--clock tsc|hpet] [--quick]
                   [--markdown] [--check] [--from FILE]

That is: two processors, grace periods of RCU, and a store's disk whose flushes take long. Contenders, order, loads and
what is counted are those of `scripts/bench live`; by default two loads in two rounds.

Loads: uniform, skewed, append, pgbench; or a, b, c, d.

Profiles:
  normal   flushes are free, as on a disk with protection against power loss; LVM's store is a volume on the disk,
           Tidemark's too
  slow     a flush of the store's disk takes 50 ms (dm-delay); both stores are loop devices on files there

The guest's processors are emulated where there is no KVM, so figures mean something beside each other only. The
disks are throttled to an SSD in tenfold slow motion, so that they, and not the emulation, are what everybody waits
for; vm-tests/cases/bench.rs has the numbers, the reasons, and whom that favours; --disk shared makes reads and
writes take turns. The guest reads its clock from the TSC; with --clock hpet, as in the tests, from the emulated HPET,
which costs an exit and QEMU's lock each time, several times for an I/O. TIDEMARK_VM_TIME_SCALE stretches the guest's
time limit.

--from FILE makes the tables again from a stored target/bench/results.json and measures nothing.
--check exits with 1 where a goal is missed.
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
