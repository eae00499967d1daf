//! The snapshot stack without a copy: inserted, removed, killed at every step, held too long.

use crate::harness::Case;
use crate::harness::case::Delay;

/// The stack's cases.
pub fn cases() -> Vec<Case> {
    vec![
        case("stack_insert", "stack_insert.sh").limit_seconds(480),
        case("stack_crash", "stack_crash.sh").limit_seconds(1500),
        case("stack_group", "stack_group.sh")
            .commands(&["python3", "fsfreeze", "pvcreate", "vgcreate", "lvcreate", "lvchange", "vgchange"])
            .disk_mib(40)
            .disk_mib(128)
            .limit_seconds(600),
        case("stack_watchdog", "stack_watchdog.sh").limit_seconds(600),
        // Slow writes, so that requests are in flight when the command is stopped.
        Case::new("stack_stopped", "stack_stopped.sh")
            .modules(&["dm-snapshot", "dm-switch", "loop", "zram", "ext4"])
            .commands(&["dmsetup", "losetup", "mkfs.ext4", "fio", "e2fsck"])
            .delayed_disk_mib(40, Delay { read_ms: 1, write_ms: 50, flush_ms: 50 })
            .disk_mib(128)
            .disk_mib(300)
            .limit_seconds(1200),
        case("stack_flush", "stack_flush.sh")
            .modules(&["loop", "zram"])
            .commands(&["python3", "filefrag"])
            .disk_mib(40)
            .limit_seconds(180),
        case("stack_judge", "stack_judge.sh").tool("dm-judge", "judge").limit_seconds(180),
        case("stack_volume", "stack_volume.sh").commands(&["pvcreate", "lvs"]).limit_seconds(300),
    ]
}

fn case(name: &str, script: &str) -> Case {
    Case::new(name, script)
        .modules(&["dm-snapshot", "dm-switch", "ext4"])
        .commands(&["dmsetup", "mkfs.ext4", "fio", "e2fsck"])
        .disk_mib(40)
        .disk_mib(128)
}
