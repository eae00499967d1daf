//! What does a copy cost the applications beside it? The measurements that `scripts/bench live` and `scripts/bench vm`
//! start and read: no tests, they run only where `--bench` asks for them.
//!
//! The script says what it measures; here are the machines it measures on.
//!
//! `live`: a user-mode guest at native speed, one processor. The origin's disk and the stores' are `null_blk` in the
//! guest's memory, with the I/O scheduler that Debian gives a disk of one queue, mq-deadline. Flushes are free, as on
//! a disk with protection against power loss.
//!
//! - `bench_ssd`: each request takes 80 microseconds, 64 at once, 400 MiB/s. `null_blk` hands the bandwidth out in
//!   slices of 20 ms, reads and writes together: whoever uses a slice up, in a moment, stops everybody for the rest
//!   of it. A reader that keeps the disk busy so costs others up to 20 ms, `dd` as well.
//! - `bench_rotating`: one request at a time, 4 ms each, of 1 MiB at most: 250 random requests a second, or 250 MiB/s
//!   of large ones, as a disk of 10,000 revolutions a minute. Each request pays for a seek, also one that follows on
//!   the last: small sequential requests are as slow as random ones, unless the scheduler merges them. Beside a load
//!   that moves the heads between them they are; alone they would not be.
//! - The secondary is a loop device over memory: `null_blk` cannot drop ranges that are made zero, as disks do. So
//!   the origin is the bottleneck, for everybody.
//!
//! `vm`: a stock kernel on two emulated processors. The origin's disk and the stores' are throttled, so that they are
//! the bottleneck and not the emulated processor: an SSD (some 500 MiB/s, 75,000 requests a second, a first answer
//! within 60 microseconds) in tenfold slow motion, which is about what the emulation makes of the answer. What QEMU's
//! throttle makes of that, and whom it favours:
//!
//! - It is a leaky bucket that lets a tenth of a second's work through at once, so a reader with one request at
//!   a time gets nearly all of the bandwidth. That favours `dd`.
//! - Requests of one direction are served in the order of arrival. The read that a first write needs to
//!   preserve its original waits for everything that the copy has asked for before: whoever reads ahead too
//!   much pays for it there.
//! - Reads and writes have a bandwidth each, as on a disk whose writes go to its buffer. With
//!   `--disk shared` they share one and are served in turn: the disk then gives a writer beside any busy reader,
//!   `dd` too, a small part of what it gives him alone, and hides most of what copy-on-write costs. The turns
//!   would be of 1 MiB, where a disk interleaves transfers in frames of some KiB; so the guest cuts its requests.
//! - The secondary's disk is not throttled: its throttle would charge ranges that are made zero as if they were
//!   written, where a disk drops them from its map. So the origin is the bottleneck, for everybody.
//! - A flush costs nothing, as on a disk with protection against power loss; what it costs elsewhere the slow
//!   profile shows, with dm-delay.

use crate::harness::Case;
use crate::harness::case::{Clock, Throttle};

const DISK: Throttle = Throttle { bytes_per_second: 50 << 20, shared: false, requests_per_second: 7500 };

/// The largest request that the guest makes of a disk whose directions take turns.
const SHARED_REQUEST_KIB: u32 = 64;

/// 5 ms in the same slow motion. From 50 ms on dm-delay sleeps on a timer; below, it would spin on a processor.
const SLOW_FLUSH_MS: u32 = 50;

/// What `null_blk` is told of a disk: attributes of its folder in configfs (`rotational`: of its queue). Timers complete requests (irqmode 2).
const SSD: &str = "memory_backed=1 irqmode=2 completion_nsec=80000 hw_queue_depth=64 mbps=400";
const ROTATING: &str =
    "memory_backed=1 irqmode=2 completion_nsec=4000000 hw_queue_depth=1 max_sectors=2048 rotational=1";

/// The options of `scripts/bench`, as it passes them on, and what stands for each that it does not.
const PASSED_ON: [(&str, &str); 10] = [
    ("TIDEMARK_BENCH_CLOCK", "tsc"),
    ("TIDEMARK_BENCH_ROUNDS", "1"),
    ("TIDEMARK_BENCH_LOADS", "uniform,skewed,append,pgbench"),
    ("TIDEMARK_BENCH_CONTENDERS", "none,dd,lvm,tidemark"),
    ("TIDEMARK_BENCH_BUILDS", ""),
    ("TIDEMARK_BENCH_OPTIONS", ""),
    ("TIDEMARK_BENCH_IDLE_SECONDS", "6"),
    ("TIDEMARK_BENCH_WARM_SECONDS", "2.5"),
    ("TIDEMARK_BENCH_SETTLE_SECONDS", "1"),
    ("TIDEMARK_BENCH_SCHEDULER", "mq-deadline"),
];

/// The measurements.
pub fn cases() -> Vec<Case> {
    vec![
        Case::new("bench_fixed", "bench_fixed.sh")
            .bench()
            .modules(&["dm-snapshot", "dm-switch", "loop", "zram", "ext4"])
            .commands(&["python3", "mkfs.ext4", "fio"])
            .disk_mib(64)
            .disk_mib(400),
        live("bench_ssd", SSD),
        live("bench_rotating", ROTATING),
        emulated("bench_normal").variable("TIDEMARK_BENCH_FLUSH_MS", "0"),
        emulated("bench_slow")
            .variable("TIDEMARK_BENCH_FLUSH_MS", SLOW_FLUSH_MS.to_string())
            .modules(&["dm-delay"]),
    ]
}

fn live(name: &str, model: &str) -> Case {
    let volume_mib = volume_mib(1024);
    measurement(name, volume_mib)
        // The volume and a copy of it in memory, what a store comes to hold, and PostgreSQL.
        .memory_mib(
            u32::try_from(2 * volume_mib + volume_mib / 2 + 1024).expect("a volume is 64 GiB at most"),
        )
        .variable("TIDEMARK_BENCH_FLUSH_MS", "0")
        .variable("TIDEMARK_BENCH_MODEL", model)
}

fn emulated(name: &str) -> Case {
    let volume_mib = volume_mib(512);
    let shared = std::env::var("TIDEMARK_BENCH_DISK").is_ok_and(|kind| kind == "shared");
    let disk = Throttle { shared, ..DISK };
    let is_hpet = std::env::var("TIDEMARK_BENCH_CLOCK").is_ok_and(|clock| clock == "hpet");
    measurement(name, volume_mib)
        .clock(if is_hpet { Clock::Hpet } else { Clock::Tsc })
        // The volume and LVM's own records; the secondary; one store for each, of the whole volume's chunks.
        .throttled_disk_mib(volume_mib + 8, disk)
        .disk_mib(volume_mib)
        .throttled_disk_mib(2 * (volume_mib + volume_mib / 64) + 96, disk)
        .memory_mib(1536)
        .variable("TIDEMARK_BENCH_MODEL", "")
        .variable(
            "TIDEMARK_BENCH_REQUEST_KIB",
            if shared { SHARED_REQUEST_KIB.to_string() } else { String::new() },
        )
        .variable("TIDEMARK_BENCH_DISK", if shared { "shared" } else { "separate" })
        .variable("TIDEMARK_BENCH_DISK_BYTES_PER_SECOND", DISK.bytes_per_second.to_string())
        .variable("TIDEMARK_BENCH_DISK_REQUESTS_PER_SECOND", DISK.requests_per_second.to_string())
}

/// What all measurements have in common.
fn measurement(name: &str, volume_mib: u64) -> Case {
    let mut case = Case::new(name, "bench.sh")
        .bench()
        .modules(&["dm-snapshot", "dm-switch", "loop", "zram", "ext4"])
        .commands(&["fio", "lvcreate", "python3", "pgbench", "initdb", "e2fsck"])
        .limit_seconds(number("TIDEMARK_BENCH_LIMIT_SECONDS").unwrap_or(3600))
        .variable("TIDEMARK_BENCH_VOLUME_MIB", volume_mib.to_string());
    for (name, otherwise) in PASSED_ON {
        case = case.variable(name, std::env::var(name).unwrap_or_else(|_| otherwise.to_owned()));
    }
    case
}

fn volume_mib(otherwise: u64) -> u64 {
    number("TIDEMARK_BENCH_VOLUME_MIB").unwrap_or(otherwise).clamp(256, 1 << 16)
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}
