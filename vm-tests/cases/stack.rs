//! The snapshot stack on its own: inserted, removed, killed at every step, held too long.

use crate::harness::Case;

/// The stack's cases.
pub fn cases() -> Vec<Case> {
    vec![case("stack_insert").limit_seconds(180)]
}

fn case(name: &str) -> Case {
    Case::new(name, format!("{name}.sh"))
        .on_both_kernels()
        .modules(&["dm-snapshot", "ext4"])
        .commands(&["dmsetup", "mkfs.ext4", "fio", "e2fsck"])
        .disk_mib(40)
        .disk_mib(128)
}
