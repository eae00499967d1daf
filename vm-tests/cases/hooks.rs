//! The ready-made hooks that need a machine of their own: real filesystems that are frozen, a real systemd. Those for
//! servers alone are tested without a guest, by `tests/hooks.rs`.

use crate::harness::Case;

const MODULES: [&str; 4] = ["dm-snapshot", "dm-switch", "loop", "ext4"];

/// The cases of the hooks.
pub fn cases() -> Vec<Case> {
    let case = |name: &str, script: &str| {
        Case::new(name, script).modules(&MODULES).uses_folder("hooks").limit_seconds(300)
    };
    vec![
        case("hooks_systemd", "hooks_systemd.sh").commands(&[
            "systemctl",
            "systemd-run",
            "nsenter",
            "unshare",
        ]),
        case("hooks_guest", "hooks_guest.sh").commands(&["dumpe2fs", "fsfreeze", "python3"]).disk_mib(16),
        case("hooks_mariadb", "hooks_mariadb.sh")
            .commands(&["mariadbd", "mariadb", "mariadb-install-db"])
            .disk_mib(200)
            .disk_mib(200)
            .memory_mib(1536),
    ]
}
