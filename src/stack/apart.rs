//! How does the watchdog stay out of what happens to its command?
//!
//! A command is killed, stopped or frozen as one of a group: a session (the end of a login), a process group (Ctrl-C), a
//! control group (`systemctl stop`, `systemctl freeze`, `docker pause`, a limit on memory or processor time). The
//! watchdog leaves them all, as far as it may; what it may not leave it shares.
//!
//! Control groups: it moves to the root of each hierarchy that it sees. Where the root of version 2 takes no processes (in
//! a container whose root hands controllers on), it makes a group of its own beside the command's, [`GROUP`].

use std::fs;
use std::path::{Path, PathBuf};

use crate::sys::{process, signal};
use crate::topology::Topology;

/// The control group of watchdogs, where there has to be one.
const GROUP: &str = "tidemark-watchdog";

/// Leaves whatever can be left. Best effort: each step that fails leaves the watchdog as it was.
pub fn isolate() {
    // Not being allowed to means that we lead a group already, which is as good.
    let _ = nix::unistd::setsid();
    signal::ignore_all();
    // What the shell has left open, and where we stand, is kept from nobody.
    process::close_inherited();
    let _ = nix::unistd::chdir("/");
    // The last process that the kernel should kill for memory; without the right to say so we go on.
    let _ = fs::write("/proc/self/oom_score_adj", "-1000");
    for hierarchy in hierarchies(&Topology::default()) {
        leave(&hierarchy);
    }
}

/// Where control groups are mounted: version 2, and each of version 1.
fn hierarchies(topology: &Topology) -> Vec<PathBuf> {
    let is_one = |kind: &str| kind == "cgroup" || kind == "cgroup2";
    let mounts = topology.mounts().unwrap_or_default();
    mounts.into_iter().filter(|mount| is_one(&mount.kind)).map(|mount| mount.point).collect()
}

/// "0" is who writes it (cgroups(7)).
fn leave(hierarchy: &Path) {
    let join = |group: &Path| fs::write(group.join("cgroup.procs"), "0");
    if join(hierarchy).is_err() {
        let own = hierarchy.join(GROUP);
        // There already, by another watchdog: as good.
        let _ = fs::create_dir(&own);
        let _ = join(&own);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_hierarchy_is_found_and_where_the_root_takes_none_a_group_is_made() {
        let root = tempfile::tempdir().unwrap();
        let mounts = root.path().join("proc/self");
        fs::create_dir_all(&mounts).unwrap();
        let (first, second) = (root.path().join("one"), root.path().join("two"));
        let line =
            |point: &Path, kind: &str| format!("30 20 0:26 / {} rw - {kind} none rw\n", point.display());
        let text = line(&first, "cgroup2") + &line(&second, "cgroup") + &line(Path::new("/tmp"), "tmpfs");
        fs::write(mounts.join("mountinfo"), text).unwrap();
        assert_eq!(hierarchies(&Topology::at(root.path())), [first.clone(), second.clone()]);
        fs::create_dir(&first).unwrap();
        leave(&first);
        assert_eq!(fs::read(first.join("cgroup.procs")).unwrap(), b"0");
        fs::create_dir_all(second.join("cgroup.procs")).unwrap();
        leave(&second);
        assert_eq!(fs::read(second.join(GROUP).join("cgroup.procs")).unwrap(), b"0");
    }
}
