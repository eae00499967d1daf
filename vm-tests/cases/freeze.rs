//! The freeze: it covers the right filesystems, keeps its budget, and is undone however the command is stopped.

use crate::harness::Case;

/// The freeze's cases.
pub fn cases() -> Vec<Case> {
    let usual = |name, script| case(name, script).disk_mib(96).disk_mib(300).limit_seconds(240);
    vec![
        case("freeze_mounts", "freeze_mounts.sh").disk_mib(96).disk_mib(64).disk_mib(300).limit_seconds(180),
        usual("freeze_budget", "freeze_budget.sh").modules(&["dm-delay"]),
        usual("freeze_above", "freeze_above.sh").commands(&["sfdisk", "unshare"]),
        usual("freeze_frozen", "freeze_frozen.sh").commands(&["pkill"]),
        usual("copy_signals", "copy_signals.sh"),
        usual("copy_limits", "copy_limits.sh")
            .commands(&["setpriv"])
            .tolerate("Out of memory: Killed process")
            .tolerate("invoked oom-killer"),
        usual("copy_write_back", "copy_write_back.sh").modules(&["dm-delay"]).disk_mib(96),
    ]
}

fn case(name: &str, script: &str) -> Case {
    Case::new(name, script).modules(&["dm-snapshot", "dm-switch", "loop", "zram", "ext4"]).commands(&[
        "dmsetup",
        "losetup",
        "mkfs.ext4",
        "e2fsck",
    ])
}
