//! The map of free space, compared with the filesystems' own tools: it contains no space in use.

use crate::harness::Case;

/// The map's cases.
pub fn cases() -> Vec<Case> {
    vec![
        case("ext4").commands(&["dumpe2fs", "debugfs"]).disk_mib(160).disk_mib(160),
        case("xfs")
            .modules(&["xfs"])
            .commands(&["mkfs.xfs", "xfs_db", "xfs_bmap"])
            .disk_mib(400)
            .disk_mib(400),
    ]
}

fn case(filesystem: &str) -> Case {
    Case::new(format!("free_map_{filesystem}"), "free_map.sh")
        .modules(&["dm-mod", "dm-crypt", "loop", "ext4"])
        .commands(&["dmsetup", "losetup", "mkfs.ext4", "filefrag", "python3"])
        .variable("FS", filesystem)
        .limit_seconds(900)
}
