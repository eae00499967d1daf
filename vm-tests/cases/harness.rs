//! The harness tests itself: each case provokes a failure that the harness must report correctly.

use crate::harness::Case;
use crate::harness::case::{Cache, Delay, Disk, Expect};

/// The harness's own cases.
pub fn cases() -> Vec<Case> {
    vec![
        Case::new("harness_boot", "harness_boot.sh")
            .modules(&["dm-snapshot", "loop", "zram", "ext4", "xfs"])
            .commands(&["dmsetup", "mkfs.ext4", "mkfs.xfs", "losetup"])
            .disk_mib(64)
            .disk(Disk { cache: Cache::Writeback, block_bytes: 4096, ..Disk::fast_mib(96) }),
        Case::new("harness_services", "harness_services.sh")
            .modules(&["dm-mod", "dm-snapshot", "ext4"])
            .commands(&[
                "lvs",
                "systemd-udevd",
                "udevadm",
                "postgres",
                "initdb",
                "pgbench",
                "pg_amcheck",
                "fio",
                "sqlite3",
            ])
            .disk_mib(256)
            .disk_mib(64)
            .memory_mib(1024)
            .limit_seconds(240),
        Case::new("harness_missing_module", "harness_script_failure.sh")
            .modules(&["no-such-module"])
            .expect(Expect::Skip)
            .without_binary(),
        Case::new("harness_missing_command", "harness_script_failure.sh")
            .commands(&["no-such-command"])
            .expect(Expect::Skip)
            .without_binary(),
        Case::new("harness_script_failure", "harness_script_failure.sh")
            .expect(Expect::ScriptFailure(1))
            .without_binary(),
        Case::new("harness_kernel_complaint", "harness_kernel_complaint.sh")
            .expect(Expect::KernelComplaint)
            .without_binary(),
        Case::new("harness_kernel_panic", "harness_kernel_panic.sh")
            .expect(Expect::KernelComplaint)
            .without_binary(),
        Case::new("harness_hang", "harness_hang.sh").expect(Expect::Hang).limit_seconds(20).without_binary(),
        Case::new("harness_power_cut", "harness_power_cut_write.sh")
            .modules(&["ext4"])
            .commands(&["mkfs.ext4"])
            .disk(Disk { cache: Cache::Writeback, ..Disk::fast_mib(64) })
            .power_cut_at("written", 50)
            .then("harness_power_cut_check.sh")
            .without_binary(),
        Case::new("harness_killed_fork", "harness_killed_fork.sh").commands(&["python3"]).without_binary(),
        Case::new("harness_slow_disk", "harness_slow_disk.sh")
            .commands(&["dmsetup"])
            .delayed_disk_mib(16, Delay { read_ms: 100, write_ms: 200, flush_ms: 300 })
            .disk_mib(16)
            .without_binary(),
        Case::new("harness_leftovers", "harness_leftovers.sh")
            .modules(&["dm-mod", "zram", "loop"])
            .commands(&["dmsetup", "losetup"])
            .without_binary(),
    ]
}
