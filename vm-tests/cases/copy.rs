//! The main task: a copy of a busy device is exact, and failures harm nothing.

use crate::harness::Case;
use crate::harness::case::{Cache, Delay, Disk};

const MODULES: [&str; 4] = ["dm-snapshot", "loop", "zram", "ext4"];
const COMMANDS: [&str; 5] = ["dmsetup", "losetup", "mkfs.ext4", "e2fsck", "fio"];

/// The cases that run `tidemark copy`.
pub fn cases() -> Vec<Case> {
    let mut cases = exactness();
    cases.extend(resumes());
    cases.extend(several());
    cases.extend([crypt_races("beneath"), crypt_races("above")]);
    cases.extend(hardware());
    cases.extend([lvm_races(), lvm_merge(), lvm_names(), lvm_above(), table_races(), targets(), queue()]);
    cases.extend([
        main_job("demo", "demo.sh")
            .commands(&["python3", "sqlite3"])
            .disk_mib(256)
            .disk_mib(256)
            .disk_mib(1200)
            .limit_seconds(600),
        main_job("copy_kernel_judge", "kernel_judge.sh")
            .commands(&["python3"])
            .disk_mib(96)
            .disk_mib(900)
            .limit_seconds(600),
        main_job("copy_postgresql", "postgresql.sh")
            .commands(&["pg_ctlcluster", "setpriv"])
            .disk_mib(400)
            .disk_mib(400)
            .disk_mib(600)
            .memory_mib(1536)
            .limit_seconds(900),
        main_job("copy_lvm_udev", "lvm_udev.sh")
            .commands(&["lvcreate", "udevadm"])
            .disk_mib(160)
            .disk_mib(700)
            .limit_seconds(600),
        main_job("copy_killed", "copy_killed.sh").disk_mib(96).disk_mib(700).limit_seconds(600),
        main_job("copy_hold", "hold.sh")
            .commands(&["dumpe2fs", "python3"])
            .delayed_disk_mib(96, SLOW)
            .disk_mib(700)
            .limit_seconds(600),
        without_switch("copy_files_after", "files_after.sh").disk_mib(160).disk_mib(900).limit_seconds(600),
        main_job("copy_subset", "copy_subset.sh")
            .commands(&["python3", "e4defrag", "xfs_fsr"])
            .disk_mib(160)
            .disk_mib(700)
            .limit_seconds(600),
        main_job("copy_across_disks", "across_disks.sh")
            .disk_mib(140)
            .disk_mib(140)
            .disk_mib(300)
            .limit_seconds(300),
        main_job("copy_faults", "faults.sh")
            .disk_mib(96)
            .disk_mib(700)
            .disk_mib(104)
            .limit_seconds(900)
            .tolerate("Buffer I/O error")
            .tolerate("I/O error, dev dm-"),
        main_job("copy_refusals", "refusals.sh")
            .commands(&["sfdisk", "wipefs", "setpriv"])
            .disk_mib(96)
            .disk_mib(300)
            .disk_mib(48)
            .limit_seconds(300),
        main_job("copy_power_cut", "power_cut_before.sh")
            .disk(Disk { cache: Cache::Writeback, ..Disk::fast_mib(96) })
            .disk(Disk { cache: Cache::Writeback, ..Disk::fast_mib(700) })
            .power_cut_at("copying", 500)
            .then("power_cut_after.sh")
            .limit_seconds(300),
    ]);
    cases
}

/// Copies that are killed and resumed, or that lose their secondary.
fn resumes() -> [Case; 9] {
    [
        main_job("copy_vanish", "copy_vanish.sh")
            .disk_mib(300)
            .limit_seconds(300)
            .tolerate("Buffer I/O error")
            .tolerate("I/O error, dev usb")
            .tolerate("I/O error, dev dm-")
            .tolerate("device dm-"),
        main_job("copy_secondary_hangs", "secondary_hangs.sh")
            .disk_mib(64)
            .disk_mib(80)
            .disk_mib(300)
            .limit_seconds(600)
            .tolerate("Buffer I/O error")
            .tolerate("I/O error, dev usb")
            .tolerate("I/O error while writing superblock")
            .tolerate("device dm-")
            .tolerate("(dm-")
            .tolerate("blocked for more than"),
        main_job("copy_resume", "resume.sh")
            .commands(&["dumpe2fs", "python3"])
            .disk_mib(96)
            .disk_mib(104)
            .disk_mib(900)
            .limit_seconds(1200),
        main_job("copy_resume_target", "resume_target.sh")
            .disk_mib(64)
            .disk_mib(80)
            .disk_mib(700)
            .limit_seconds(600),
        main_job("copy_resume_identity", "resume_identity.sh")
            .modules(&["xfs"])
            .commands(&["mkfs.xfs"])
            .disk_mib(64)
            .disk_mib(400)
            .disk_mib(700)
            .limit_seconds(600),
        main_job("copy_resume_checks", "resume_checks.sh")
            .commands(&["mountpoint", "pgrep"])
            .disk_mib(64)
            .disk_mib(80)
            .disk_mib(700)
            .limit_seconds(600)
            .tolerate("blocked for more than"),
        main_job("copy_resume_hangs", "resume_hangs.sh")
            .commands(&["lvcreate", "wipefs", "flock"])
            .disk_mib(64)
            .disk_mib(80)
            .disk_mib(300)
            .limit_seconds(900)
            .tolerate("blocked for more than"),
        main_job("copy_resume_circles", "resume_circles.sh").disk_mib(96).disk_mib(300).limit_seconds(300),
        main_job("copy_resume_lost", "resume_lost.sh")
            .disk_mib(64)
            .disk_mib(400)
            .limit_seconds(600)
            .tolerate("Buffer I/O error")
            .tolerate("I/O error, dev usb")
            .tolerate("I/O error while writing superblock")
            .tolerate("device dm-")
            .tolerate("(dm-"),
    ]
}

/// Disks that are removed, machines that are suspended, disks with several paths.
fn hardware() -> [Case; 3] {
    [
        main_job("copy_hot_remove", "hot_remove.sh")
            .disk_mib(64)
            .disk_mib(64)
            .disk_mib(72)
            .disk_mib(300)
            .limit_seconds(900)
            .tolerate("Buffer I/O error")
            .tolerate("I/O error, dev vd")
            .tolerate("I/O error, dev dm-")
            .tolerate("device dm-")
            .tolerate("(dm-"),
        main_job("copy_suspend", "suspend.sh")
            .modules(&["dm-delay"])
            .disk_mib(40)
            .disk_mib(128)
            .disk_mib(300)
            .limit_seconds(900),
        main_job("copy_multipath", "multipath.sh")
            .modules(&["dm-multipath", "dm-round-robin", "sd_mod", "scsi_debug"])
            .commands(&["lvcreate"])
            .disk_mib(400)
            .disk_mib(48)
            .limit_seconds(900),
    ]
}

/// On disks with slow writes, LVM's suspensions last long enough for a copy to meet them.
fn lvm_races() -> Case {
    main_job("copy_lvm_races", "lvm_races.sh")
        .modules(&["dm-mirror"])
        .commands(&["lvcreate", "lvextend", "pvmove"])
        .delayed_disk_mib(72, SLOW)
        .delayed_disk_mib(72, SLOW)
        .disk_mib(300)
        .limit_seconds(600)
}

fn crypt_races(place: &str) -> Case {
    main_job(&format!("copy_crypt_races_{place}"), "crypt_races.sh")
        .modules(&["dm-crypt", "xts"])
        .commands(&["cryptsetup"])
        .variable("WHERE", place)
        .delayed_disk_mib(48, SLOW)
        .disk_mib(300)
        .limit_seconds(600)
}

fn table_races() -> Case {
    main_job("copy_table_races", "table_races.sh").delayed_disk_mib(64, SLOW).disk_mib(300).limit_seconds(300)
}

fn lvm_merge() -> Case {
    main_job("copy_lvm_merge", "lvm_merge.sh")
        .commands(&["lvcreate", "lvconvert", "vgrename"])
        .delayed_disk_mib(64, SLOW)
        .delayed_disk_mib(32, SLOW)
        .disk_mib(300)
        .limit_seconds(600)
}

fn lvm_names() -> Case {
    main_job("copy_lvm_names", "lvm_names.sh")
        .commands(&["lvcreate", "lvrename", "vgrename"])
        .disk_mib(64)
        .disk_mib(300)
        .disk_mib(16)
        .limit_seconds(300)
}

fn lvm_above() -> Case {
    main_job("copy_lvm_above", "lvm_above.sh")
        .commands(&["lvcreate", "lvextend", "blkid"])
        .disk_mib(32)
        .disk_mib(32)
        .disk_mib(300)
        .limit_seconds(300)
}

fn queue() -> Case {
    main_job("copy_queue", "copy_queue.sh")
        .commands(&["python3"])
        .disk_mib(48)
        .disk_mib(300)
        .limit_seconds(240)
}

fn targets() -> Case {
    main_job("copy_targets", "targets.sh")
        .commands(&["python3", "mkswap"])
        .disk_mib(40)
        .disk_mib(400)
        .disk_mib(32)
        .disk_mib(40)
        .limit_seconds(300)
}

/// Each twice: with everything copied, and with the mechanisms that reduce the load on applications. One more on disks
/// with slow writes, where events between a write and its end are likely.
fn exactness() -> Vec<Case> {
    let mut cases = Vec::new();
    for filesystem in ["ext4", "xfs"] {
        for origin in ["volume", "lvm"] {
            for (suffix, mechanisms) in [("", "off"), ("_released", "on")] {
                let name = format!("copy_exactness_{filesystem}_{origin}{suffix}");
                let case = exact(&name, filesystem, origin, mechanisms);
                cases.push(case.disk_mib(96).disk_mib(104).disk_mib(800));
            }
        }
    }
    let slow = exact("copy_exactness_slow", "ext4", "lvm", "on");
    cases.push(slow.delayed_disk_mib(96, SLOW).disk_mib(104).disk_mib(800));
    cases
}

/// From 50 ms on, dm-delay uses a timer; below, it would spin on a processor.
const SLOW: Delay = Delay { read_ms: 1, write_ms: 50, flush_ms: 50 };

fn exact(name: &str, filesystem: &str, origin: &str, mechanisms: &str) -> Case {
    main_job(name, "exactness.sh")
        .modules(&["xfs"])
        .commands(&["mkfs.xfs", "xfs_repair", "xfs_db", "dumpe2fs", "lvcreate", "python3"])
        .variable("FS", filesystem)
        .variable("ORIGIN", origin)
        .variable("MECHANISMS", mechanisms)
        .limit_seconds(900)
}

/// Copies of several origins, and copies that take turns.
fn several() -> [Case; 2] {
    [
        main_job("copy_group", "copy_group.sh")
            .modules(&["xfs"])
            .commands(&["python3", "mkfs.xfs", "xfs_repair", "blkid", "fsfreeze"])
            .disk_mib(96)
            .disk_mib(160)
            .disk_mib(900)
            .disk_mib(16)
            .limit_seconds(1800),
        main_job("copy_disk_queue", "copy_disk_queue.sh")
            .commands(&["python3"])
            .disk_mib(64)
            .disk_mib(64)
            .disk_mib(400)
            .limit_seconds(600),
    ]
}

fn main_job(name: &str, script: &str) -> Case {
    without_switch(name, script).modules(&["dm-switch"])
}

/// As on a kernel without dm-switch: every line of an origin's table forwards every flush.
fn without_switch(name: &str, script: &str) -> Case {
    Case::new(name, script).modules(&MODULES).commands(&COMMANDS)
}
