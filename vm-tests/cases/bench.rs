//! Measurements of the cost of a copy for the applications beside it. They are not tests: `scripts/bench live` and
//! `scripts/bench vm` start them with `--bench` and read their results.
//!
//! The scripts describe what they measure. This file describes the machines.
//!
//! `live`: a user-mode guest at native speed, one processor. The disks of origin and stores are `null_blk` in the
//! guest's memory, with mq-deadline, the I/O scheduler that Debian uses for a disk with one queue. Flushes are free, as
//! on a disk with power loss protection.
//!
//! - `bench_ssd`: each request takes 80 microseconds, 64 at once, 400 MiB/s. `null_blk` hands out bandwidth in slices
//!   of 20 ms, for reads and writes together: when a slice is used up, all requests wait for its end. So a reader that
//!   keeps the disk busy delays others by up to 20 ms. This includes `dd`.
//! - `bench_rotating`: one request at a time, 4 ms each, of 1 MiB at most: 250 random requests a second, or 250 MiB/s
//!   of large ones, like a disk with 10,000 revolutions a minute. Every request pays for a seek, even one that follows
//!   the last: small sequential requests are as slow as random ones, unless the scheduler merges them. This is
//!   realistic beside a load that moves the heads between them, but not without one.
//! - The secondary is a loop device in memory, because `null_blk` cannot drop zeroed ranges as disks do. So the origin
//!   is the bottleneck for every contender.
//!
//! `vm`: a stock kernel on two emulated processors. The disks of origin and stores are throttled, so that they and not
//! the emulated processor are the bottleneck: an SSD (some 500 MiB/s, 75,000 requests a second, latency of
//! 60 microseconds) in tenfold slow motion, which is about the slowdown of the latency by the emulation. Effects of
//! QEMU's throttle, and which contender they favour:
//!
//! - It is a leaky bucket that lets a tenth of a second's work through at once, so a reader with one request at
//!   a time gets nearly all of the bandwidth. That favours `dd`.
//! - Requests of one direction are served in order of arrival. The read that a first write needs to preserve its
//!   original waits for everything that the copy has requested before. So a copy pays for too much read-ahead.
//! - Reads and writes have separate bandwidths, as on a disk that buffers writes. With `--disk shared` they share one
//!   and are served in turn: beside any busy reader, `dd` included, a writer then gets a small part of the bandwidth
//!   that it has alone, which hides most of the cost of copy-on-write. Turns would be of 1 MiB, where a real disk
//!   interleaves transfers in frames of some KiB, so the guest splits its requests.
//! - The secondary's disk is not throttled: QEMU would charge zeroed ranges like written ones, where a disk drops them
//!   from its map. So the origin is the bottleneck for every contender.
//! - A flush costs nothing, as on a disk with power loss protection. The slow profile shows the cost of flushes with
//!   dm-delay.

use crate::harness::Case;
use crate::harness::case::{Clock, Throttle};

const DISK: Throttle = Throttle { bytes_per_second: 50 << 20, shared: false, requests_per_second: 7500 };

/// Limit on the size of the guest's requests, for a disk whose directions take turns.
const SHARED_REQUEST_KIB: u32 = 64;

/// 5 ms in the same slow motion. From 50 ms on, dm-delay uses a timer; below, it would spin on a processor.
const SLOW_FLUSH_MS: u32 = 50;

/// The `null_blk` attributes of a disk, in its configfs folder (`rotational`: in its queue). Timers complete requests
/// (irqmode 2).
const SSD: &str = "memory_backed=1 irqmode=2 completion_nsec=80000 hw_queue_depth=64 mbps=400";
const ROTATING: &str =
    "memory_backed=1 irqmode=2 completion_nsec=4000000 hw_queue_depth=1 max_sectors=2048 rotational=1";

/// The options of `scripts/bench` as it passes them on, with the defaults of those that it does not pass.
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
        kept("bench_snapshots").commands(&["fio", "lvcreate"]),
        kept("bench_group"),
        live("bench_ssd", SSD),
        live("bench_rotating", ROTATING),
        emulated("bench_normal").variable("TIDEMARK_BENCH_FLUSH_MS", "0"),
        emulated("bench_slow")
            .variable("TIDEMARK_BENCH_FLUSH_MS", SLOW_FLUSH_MS.to_string())
            .modules(&["dm-delay"]),
    ]
}

/// A measurement of kept snapshots.
fn kept(name: &str) -> Case {
    let rounds = std::env::var("TIDEMARK_BENCH_ROUNDS").unwrap_or_else(|_| "5".to_owned());
    Case::new(name, format!("{name}.sh"))
        .bench()
        .modules(&["dm-snapshot", "loop", "ext4"])
        .commands(&["python3", "mkfs.ext4"])
        .memory_mib(3072)
        .variable("TIDEMARK_BENCH_MODEL", SSD)
        .variable("TIDEMARK_BENCH_ROUNDS", rounds)
        .limit_seconds(1200)
}

fn live(name: &str, model: &str) -> Case {
    let volume_mib = volume_mib(1024);
    measurement(name, volume_mib)
        // For the volume, a copy of it in memory, the store's content, and PostgreSQL.
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
        // The volume with LVM's metadata; the secondary; and a store for each contender, for all chunks of the volume.
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

/// The settings that all measurements share.
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
