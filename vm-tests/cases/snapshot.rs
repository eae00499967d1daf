//! Snapshots that are kept.

use crate::harness::Case;
use crate::harness::case::{Cache, Disk};

/// The cases of kept snapshots.
pub fn cases() -> Vec<Case> {
    vec![
        chain("snapshot_chain", "random"),
        chain("snapshot_kills", "each"),
        group("snapshot_group", "snapshot_group.sh"),
        group("snapshot_group_kills", "snapshot_group_kills.sh"),
        case("snapshot_power_cut", "snapshot_cut_before.sh")
            .commands(&["fio"])
            .disk(Disk { cache: Cache::Writeback, ..Disk::fast_mib(64) })
            .disk(Disk { cache: Cache::Writeback, ..Disk::fast_mib(500) })
            .power_cut_at("busy", 500)
            .then("snapshot_cut_after.sh")
            .limit_seconds(400),
        case("snapshot_merge_cut", "snapshot_merge_cut_before.sh")
            .modules(&["dm-delay"])
            .disk(Disk { cache: Cache::Writeback, ..Disk::fast_mib(96) })
            .disk(Disk { cache: Cache::Writeback, ..Disk::fast_mib(900) })
            .power_cut_at("merging", 1500)
            .then("snapshot_merge_cut_after.sh")
            .limit_seconds(400),
        case("snapshot_udev", "snapshot_udev.sh")
            .modules(&["xfs"])
            .commands(&["lvcreate", "udevadm", "mkfs.xfs", "dbus-daemon", "udisksctl"])
            .disk_mib(32)
            .disk_mib(400)
            .disk_mib(700)
            .limit_seconds(400),
        case("snapshot_postgresql", "snapshot_postgresql.sh")
            .commands(&["pg_ctlcluster", "setpriv"])
            .disk_mib(300)
            .disk_mib(200)
            .disk_mib(1200)
            .memory_mib(1536)
            .limit_seconds(600),
        case("snapshot_only", "snapshot_only.sh")
            .commands(&["python3"])
            .disk_mib(96)
            .disk_mib(600)
            .limit_seconds(300),
        case("snapshot_subset", "snapshot_subset.sh")
            .modules(&["xfs"])
            .commands(&["mkfs.xfs", "python3"])
            .disk_mib(128)
            .disk_mib(900)
            .disk_mib(64)
            .limit_seconds(900),
        case("snapshot_use", "snapshot_use.sh")
            .commands(&["pvcreate", "vgcreate", "lvcreate", "vgchange", "vgremove", "wipefs", "blkid"])
            .disk_mib(40)
            .disk_mib(300)
            .disk_mib(40)
            .limit_seconds(300),
        since("copy_since", "copy_since.sh"),
        since("copy_since_live", "copy_since_live.sh"),
        since("copy_since_raw", "copy_since_raw.sh"),
        since("copy_since_raw_kills", "copy_since_raw_kills.sh"),
        case("snapshot_filesystems", "snapshot_filesystems.sh")
            .modules(&["xfs"])
            .commands(&["mkfs.xfs", "fio", "wipefs"])
            .disk_mib(64)
            .disk_mib(600)
            .limit_seconds(300),
    ]
}

/// Four volumes, and a disk for their stores.
fn group(name: &str, script: &str) -> Case {
    let volumes = (0..4).fold(case(name, script), |case, _| case.disk_mib(16));
    volumes.disk_mib(400).commands(&["fsfreeze", "setsid"]).limit_seconds(900)
}

/// A program of snapshots against the oracle.
fn chain(name: &str, program: &str) -> Case {
    case(name, "snapshot_chain.sh")
        .variable("SNAPSHOT_PROGRAM", program)
        .disk_mib(16)
        .disk_mib(600)
        .limit_seconds(900)
}

/// A volume, a disk for its stores and archives, and a larger disk to restore to.
fn since(name: &str, script: &str) -> Case {
    case(name, script).disk_mib(64).disk_mib(1200).disk_mib(96).limit_seconds(900)
}

fn case(name: &str, script: &str) -> Case {
    Case::new(name, script)
        .modules(&["dm-snapshot", "dm-mirror", "dm-switch", "loop", "zram", "ext4"])
        .commands(&["dmsetup", "losetup", "mkfs.ext4", "python3", "e2fsck"])
}
