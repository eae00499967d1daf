//! The table of cases and kernels: each case runs on the cheapest kernel that can make it fail, and one representative
//! of each promise runs on the most realistic kernel.
//!
//! The user-mode kernel is the cheapest. It has one processor and no RCU grace periods; its disks are in the host's
//! page cache and have 512-byte blocks. Cases that need more run on the stock 6.12 under QEMU.

use crate::harness::Case;
use crate::harness::case::Depth;
use crate::harness::kernel::Kernel;

/// When a case runs on one kernel.
#[derive(Clone, Copy, PartialEq, Eq)]
enum When {
    /// In every run.
    Always,
    /// With `--full` only.
    Full,
    /// Never: it cannot run there, or would prove nothing.
    Never,
}

use When::{Always as A, Full as F, Never as N};

/// The case; when it runs on the user-mode kernel, the stock 6.12 and the stock 6.1; and why, if that is not obvious.
const TABLE: &[(&str, When, When, When, &str)] = &[
    ("harness_boot", A, A, F, "the guests themselves"),
    ("harness_services", A, F, F, ""),
    ("harness_missing_module", A, F, F, ""),
    ("harness_missing_command", A, F, F, ""),
    ("harness_script_failure", A, F, F, ""),
    ("harness_kernel_complaint", A, F, F, ""),
    ("harness_kernel_panic", A, A, F, "each machine ends in its own way"),
    ("harness_hang", A, F, F, ""),
    ("harness_power_cut", N, A, F, "a user-mode kernel's disks outlive it in the host's page cache"),
    ("harness_killed_fork", A, F, F, ""),
    ("harness_slow_disk", A, F, F, ""),
    ("harness_leftovers", A, F, F, ""),
    ("golden_exception_store_8x0", A, F, F, ""),
    ("golden_exception_store_8x256", A, F, F, ""),
    ("golden_exception_store_8x600", A, A, A, "the format as the stock kernels write it"),
    ("golden_exception_store_16x540", A, F, F, ""),
    ("copy_exactness_ext4_volume", A, F, F, ""),
    ("copy_exactness_ext4_volume_released", A, A, F, "exactness on ext4, two processors"),
    ("copy_exactness_ext4_lvm", A, F, F, ""),
    ("copy_exactness_ext4_lvm_released", A, F, A, "exactness on the oldest kernel"),
    ("copy_exactness_xfs_volume", A, F, F, ""),
    ("copy_exactness_xfs_volume_released", A, F, F, ""),
    ("copy_exactness_xfs_lvm", A, F, F, ""),
    ("copy_exactness_xfs_lvm_released", A, A, F, "exactness on xfs, two processors"),
    ("copy_exactness_slow", A, F, F, "races that show on slow disks only"),
    ("demo", A, F, F, ""),
    ("copy_kernel_judge", A, A, F, "the kernel merges the originals itself, two processors"),
    ("copy_postgresql", A, F, F, ""),
    ("copy_lvm_udev", A, A, F, "udev and LVM on a stock kernel"),
    ("copy_lvm_races", A, F, F, ""),
    ("copy_table_races", A, F, F, ""),
    ("copy_crypt_races_beneath", A, F, F, ""),
    ("copy_crypt_races_above", A, F, F, ""),
    ("copy_lvm_merge", A, F, F, ""),
    ("copy_lvm_names", A, F, F, ""),
    ("copy_lvm_above", A, F, F, ""),
    ("copy_killed", A, F, F, ""),
    ("copy_resume", A, A, F, "resume, two processors"),
    ("copy_resume_target", A, F, F, ""),
    ("copy_resume_identity", A, N, N, "the unplugged disk is a null_blk of the user-mode kernel"),
    ("copy_resume_checks", A, F, F, ""),
    ("copy_resume_hangs", A, F, F, ""),
    ("copy_resume_circles", A, F, F, ""),
    ("copy_resume_lost", A, N, N, "the disk that loses its cache is a null_blk of the user-mode kernel"),
    ("copy_secondary_hangs", A, N, N, "the disk that goes away is a null_blk of the user-mode kernel"),
    ("copy_vanish", A, N, N, "the disk that goes away is a null_blk of the user-mode kernel"),
    ("copy_hot_remove", N, A, F, "virtio disks that are removed from the machine"),
    ("copy_suspend", N, A, F, "the user-mode kernel is never suspended"),
    ("copy_multipath", N, A, F, "the user-mode kernel has neither dm-multipath nor SCSI disks"),
    ("copy_hold", A, F, F, ""),
    ("copy_files_after", A, F, F, ""),
    ("copy_subset", A, F, F, ""),
    ("copy_group", A, F, F, ""),
    ("copy_disk_queue", A, F, F, ""),
    ("copy_across_disks", A, F, F, ""),
    ("copy_faults", A, F, F, ""),
    ("copy_refusals", A, F, F, ""),
    ("copy_targets", A, F, F, ""),
    ("copy_queue", A, F, F, ""),
    ("copy_power_cut", N, A, F, "a user-mode kernel's disks outlive it in the host's page cache"),
    ("free_map_ext4", A, F, F, ""),
    ("free_map_xfs", A, F, F, ""),
    ("freeze_mounts", A, F, F, ""),
    ("freeze_budget", A, F, F, "on a disk that becomes slow"),
    ("freeze_above", A, F, F, ""),
    ("freeze_frozen", A, F, F, ""),
    ("copy_signals", A, F, F, ""),
    ("copy_limits", A, F, F, ""),
    ("copy_write_back", A, F, F, "on a disk that becomes slow"),
    ("stack_insert", A, F, A, "the oldest kernel's tables"),
    ("stack_crash", A, A, F, "a crash at every step, two processors"),
    ("stack_group", A, F, F, ""),
    ("stack_watchdog", A, A, F, "command and watchdog at the same moment, two processors"),
    ("stack_stopped", A, F, F, "on a slow disk"),
    ("stack_flush", A, A, F, "flushes on virtio disks"),
    ("stack_judge", A, F, F, ""),
    ("stack_volume", A, F, F, ""),
    ("store_grows", A, F, F, ""),
    ("release_budget", A, F, F, "on a store that becomes slow"),
    ("store_fails", A, F, F, ""),
    ("store_crash", A, F, F, ""),
    ("store_adopt", A, F, F, ""),
    ("store_circles", A, F, F, ""),
    ("dead_server", A, F, F, ""),
    ("snapshot_chain", A, F, F, ""),
    ("snapshot_kills", A, F, F, "a kill at each point"),
    ("snapshot_group", A, F, F, ""),
    ("snapshot_group_kills", A, F, F, "a kill at each point"),
    ("snapshot_power_cut", N, A, F, "a user-mode kernel's disks outlive it in the host's page cache"),
    ("snapshot_merge_cut", N, A, F, "as above"),
    ("snapshot_udev", A, F, F, ""),
    ("snapshot_use", A, F, F, ""),
    ("snapshot_only", A, F, F, ""),
    ("snapshot_subset", A, F, F, ""),
    ("snapshot_postgresql", A, F, F, ""),
    ("snapshot_filesystems", A, F, F, ""),
    ("hooks_systemd", A, F, F, ""),
    ("hooks_guest", A, F, F, ""),
    ("hooks_mariadb", A, F, F, ""),
    ("copy_since", A, F, F, "twenty generations"),
    ("copy_since_live", A, F, F, ""),
    ("copy_since_raw", A, F, F, ""),
    ("copy_since_raw_kills", A, F, F, ""),
    ("store_swap", N, A, F, "the user-mode kernel has no swap space"),
    ("soak", A, N, N, "many short copies, and faults that stock kernels cannot inject"),
    ("soak_snapshots", A, N, N, "random programs, killed and taken apart"),
    ("soak_lvm", A, N, N, "many short copies while LVM works"),
    ("bench_snapshots", A, N, N, "a measurement at native speed"),
    ("bench_group", A, N, N, "a measurement at native speed"),
    ("bench_fixed", A, N, N, "a measurement at native speed"),
    ("bench_ssd", A, N, N, "a measurement at native speed"),
    ("bench_rotating", A, N, N, "a measurement at native speed"),
    ("bench_normal", N, A, N, "a measurement of the stock kernel"),
    ("bench_slow", N, A, N, "a measurement of the stock kernel"),
];

/// Fills in when each case runs on which kernel. A case without a row, or a row without a case, is an error here.
pub fn place(cases: &mut [Case]) {
    for (row, ..) in TABLE {
        assert!(
            cases.iter().any(|case| is_of(&case.name, row)),
            "the table names a case {row}, which is not there"
        );
    }
    for case in cases {
        let row = TABLE.iter().find(|(row, ..)| is_of(&case.name, row));
        let (_, user_mode, main, oldest, why) =
            row.unwrap_or_else(|| panic!("the table has no row for {}", case.name));
        let kernels = Kernel::ALL.into_iter().zip([user_mode, main, oldest]);
        case.kernels = kernels.filter_map(|(kernel, when)| Some((kernel, depth(*when)?))).collect();
        case.why = why;
    }
}

/// Whether the row is for this case, or for several cases that differ only in a number.
fn is_of(case: &str, row: &str) -> bool {
    let number = case.strip_prefix(row).and_then(|rest| rest.strip_prefix('_'));
    case == row || number.is_some_and(|number| number.bytes().all(|byte| byte.is_ascii_digit()))
}

fn depth(when: When) -> Option<Depth> {
    match when {
        A => Some(Depth::Routine),
        F => Some(Depth::Full),
        N => None,
    }
}
