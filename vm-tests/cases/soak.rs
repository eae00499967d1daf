//! Random copies by the hundred, each compared with the capture of its instant. `vm-tests/soak` derives scenarios from
//! seeds. As tests, two guests play the same seeds every time, for two minutes, and one more plays a few of the seeds
//! with LVM at work beside the copies. `scripts/soak` plays new seeds, or those that it is given.

use crate::harness::Case;

/// Guests in a test run.
const GUESTS: usize = 2;

/// Time in which new seeds are begun, in seconds.
const SECONDS: u64 = 120;

/// Additional time for the boot and the last seed.
const LAST_SEED_SECONDS: u64 = 330;

/// Distance between the first seeds of two guests in a run.
const SEEDS_APART: u64 = 1000;

/// Time in which a test run begins new programs of snapshots, in seconds.
const SNAPSHOT_SECONDS: u64 = 45;

/// Seeds with LVM at work: the first, and how many. They cover most of LVM's deeds, and killed copies.
const LVM_FIRST: u64 = 130;
const LVM_SEEDS: u64 = 3;

/// Time limit for them, in seconds.
const LVM_SECONDS: u64 = 240;

/// One case for each guest.
pub fn cases() -> Vec<Case> {
    let guests = number("TIDEMARK_SOAK_GUESTS").unwrap_or(GUESTS);
    let mut cases: Vec<Case> = (0..guests).map(guest).collect();
    cases.push(
        play("soak_lvm", LVM_SECONDS)
            .variable("SOAK_FIRST", "")
            .variable("SOAK_LAST", "")
            .variable("SOAK_COUNT", LVM_SEEDS.to_string())
            .variable("SOAK_LVM", "1")
            .variable("SOAK_OFFSET", LVM_FIRST.to_string()),
    );
    let guests = number("TIDEMARK_SOAK_SNAPSHOTS").unwrap_or(1);
    cases.extend((0..guests).map(snapshots));
    cases
}

/// A guest that plays programs of kept snapshots: in a test run the same ones every time.
fn snapshots(index: usize) -> Case {
    let chosen = |name: &str| std::env::var(name).unwrap_or_default();
    Case::new(format!("soak_snapshots_{index}"), "snapshot_soak.sh")
        .modules(&["dm-snapshot", "dm-switch", "loop", "zram", "ext4"])
        .commands(&["dmsetup", "losetup", "mkfs.ext4", "python3", "e2fsck"])
        .disk_mib(16)
        .disk_mib(600)
        .variable("SOAK_FIRST", chosen("TIDEMARK_SOAK_FIRST"))
        .variable("SOAK_LAST", chosen("TIDEMARK_SOAK_LAST"))
        .variable("SOAK_SECONDS", number("TIDEMARK_SOAK_SECONDS").unwrap_or(SNAPSHOT_SECONDS).to_string())
        .variable("SOAK_STEPS", "24")
        .limit_seconds(SECONDS + LAST_SEED_SECONDS + 240)
}

fn guest(index: usize) -> Case {
    let seconds = number("TIDEMARK_SOAK_SECONDS").unwrap_or(SECONDS);
    let chosen = |name: &str| std::env::var(name).unwrap_or_default();
    let offset = SEEDS_APART * u64::try_from(index).expect("a guest's number is small");
    play(format!("soak_{index}"), seconds)
        .variable("SOAK_FIRST", chosen("TIDEMARK_SOAK_FIRST"))
        .variable("SOAK_LAST", chosen("TIDEMARK_SOAK_LAST"))
        .variable("SOAK_LVM", chosen("TIDEMARK_SOAK_LVM"))
        .variable("SOAK_OFFSET", offset.to_string())
}

/// A guest that begins new seeds for `seconds`.
fn play(name: impl Into<String>, seconds: u64) -> Case {
    Case::new(name, "soak.sh")
        .modules(&[
            "dm-snapshot",
            "dm-switch",
            "dm-delay",
            "dm-dust",
            "dm-flakey",
            "dm-mirror",
            "loop",
            "zram",
            "ext4",
            "xfs",
        ])
        .commands(&["dmsetup", "lvcreate", "mkfs.ext4", "e2fsck", "dumpe2fs", "python3"])
        .commands(&["mkfs.xfs", "xfs_repair", "xfs_db"])
        .uses_folder("vm-tests/soak")
        // Two disks for the origin, the secondary, the store, and one for everything else, which never fails.
        .disk_mib(112)
        .disk_mib(112)
        .disk_mib(256)
        .disk_mib(256)
        .disk_mib(512)
        .memory_mib(1024)
        .variable("SOAK_SECONDS", seconds.to_string())
        .limit_seconds(seconds + LAST_SEED_SECONDS)
}

fn number<N: std::str::FromStr>(name: &str) -> Option<N> {
    std::env::var(name).ok()?.parse().ok()
}
