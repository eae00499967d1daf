//! Snapshots that are kept.

use crate::harness::Case;

/// The cases of kept snapshots.
pub fn cases() -> Vec<Case> {
    vec![case("snapshot_chain", "snapshot_chain.sh").limit_seconds(900)]
}

fn case(name: &str, script: &str) -> Case {
    Case::new(name, script)
        .modules(&["dm-snapshot", "dm-switch", "loop", "zram", "ext4"])
        .commands(&["dmsetup", "losetup", "mkfs.ext4", "python3", "e2fsck"])
        .disk_mib(16)
        .disk_mib(600)
}
