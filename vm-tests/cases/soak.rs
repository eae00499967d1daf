//! Random copies by the hundred, each compared with what was captured at its instant; `vm-tests/soak` says what a seed
//! stands for. Among the tests two guests play the same seeds every time, for two minutes; `scripts/soak` plays new ones,
//! or those it is told.

use crate::harness::Case;

/// Guests among the tests.
const GUESTS: usize = 2;

/// How long new seeds are begun, in seconds.
const SECONDS: u64 = 120;

/// What the last seed may take, and the boot.
const LAST_SEED_SECONDS: u64 = 330;

/// Seeds that the guests of one run may play, each.
const SEEDS_APART: u64 = 1000;

/// One case for each guest.
pub fn cases() -> Vec<Case> {
    (0..number("TIDEMARK_SOAK_GUESTS").unwrap_or(GUESTS)).map(guest).collect()
}

fn guest(index: usize) -> Case {
    let seconds = number("TIDEMARK_SOAK_SECONDS").unwrap_or(SECONDS);
    let chosen = |name: &str| std::env::var(name).unwrap_or_default();
    let offset = SEEDS_APART * u64::try_from(index).expect("a guest's number is small");
    Case::new(format!("soak_{index}"), "soak.sh")
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
        // The origin's two, the secondary, the store, and one for everything else, which never fails.
        .disk_mib(112)
        .disk_mib(112)
        .disk_mib(256)
        .disk_mib(256)
        .disk_mib(512)
        .memory_mib(1024)
        .variable("SOAK_FIRST", chosen("TIDEMARK_SOAK_FIRST"))
        .variable("SOAK_LAST", chosen("TIDEMARK_SOAK_LAST"))
        .variable("SOAK_LVM", chosen("TIDEMARK_SOAK_LVM"))
        .variable("SOAK_OFFSET", offset.to_string())
        .variable("SOAK_SECONDS", seconds.to_string())
        .limit_seconds(seconds + LAST_SEED_SECONDS)
}

fn number<N: std::str::FromStr>(name: &str) -> Option<N> {
    std::env::var(name).ok()?.parse().ok()
}
