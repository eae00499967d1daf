//! The COW store: spilling, growing, failing, filling up, and what happens to it after a crash.

use crate::harness::Case;

/// The store's cases.
pub fn cases() -> Vec<Case> {
    vec![
        // Large enough that the store does not begin at its maximum size.
        case("store_grows").disk_mib(320).disk_mib(1280).memory_mib(1536).limit_seconds(900),
        case("store_fails")
            .disk_mib(64)
            .disk_mib(300)
            .disk_mib(80)
            .limit_seconds(900)
            .tolerate("Buffer I/O error")
            .tolerate("I/O error, dev dm-"),
        case("release_budget")
            .modules(&["dm-switch", "dm-delay"])
            .disk_mib(96)
            .disk_mib(300)
            .disk_mib(200)
            .limit_seconds(300),
        case("store_crash").disk_mib(64).disk_mib(300).limit_seconds(1200),
        case("store_swap")
            .modules(&["dm-switch"])
            .commands(&["mkswap", "swapon", "python3"])
            .disk_mib(160)
            .disk_mib(400)
            .disk_mib(200)
            .memory_mib(768)
            .limit_seconds(400),
        case("store_circles")
            .modules(&["dm-switch", "overlay"])
            .commands(&["unshare"])
            .disk_mib(64)
            .disk_mib(64)
            .disk_mib(300)
            .limit_seconds(300),
        case("dead_server")
            .modules(&["dm-switch", "overlay", "fuse"])
            .commands(&["unshare", "python3", "mountpoint"])
            .disk_mib(64)
            .disk_mib(300)
            .disk_mib(64)
            .limit_seconds(600),
        // The smallest head without its tail, and an origin that needs more than that. One process adopts the store of
        // another, which depends little on the kernel.
        base("store_adopt").disk_mib(80).disk_mib(480).memory_mib(1024).limit_seconds(1200),
    ]
}

fn case(name: &str) -> Case {
    base(name)
}

fn base(name: &str) -> Case {
    Case::new(name, format!("{name}.sh")).modules(&["dm-snapshot", "loop", "zram", "ext4"]).commands(&[
        "dmsetup",
        "losetup",
        "mkfs.ext4",
        "fio",
    ])
}
