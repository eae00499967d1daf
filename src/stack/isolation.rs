//! Isolates the watchdog from what happens to its command.
//!
//! A command is killed, stopped or frozen as a member of a group: a session (end of a login), a process group
//! (Ctrl-C), a control group (`systemctl stop`, `systemctl freeze`, `docker pause`, a limit on memory or
//! processor time). The watchdog leaves every group that it has the right to leave; whatever happens to the other
//! groups also happens to the watchdog.
//!
//! Control groups: it moves to the root of each hierarchy that it can see. If the root of version 2 accepts no
//! processes (in a container whose root delegates controllers), it creates the group [`GROUP`] next to the
//! command's.

use std::fs;
use std::path::{Path, PathBuf};

use crate::sys::{process, signal};
use crate::topology::Topology;

/// The control group that watchdogs create if the root accepts no processes.
const GROUP: &str = "tidemark-watchdog";

/// Leaves every group that can be left. Best effort: a step that fails changes nothing.
pub fn isolate() {
    // Fails if this process already leads a group, which serves as well.
    let _ = nix::unistd::setsid();
    signal::ignore_all();
    // Keep no inherited file and no working directory busy.
    process::close_inherited();
    let _ = nix::unistd::chdir("/");
    // Make this the last process that the OOM killer chooses. Continue if that is not permitted.
    let _ = fs::write("/proc/self/oom_score_adj", "-1000");
    for hierarchy in hierarchies(&Topology::default()) {
        leave(&hierarchy);
    }
}

/// The mount points of control groups: version 2, and each hierarchy of version 1.
fn hierarchies(topology: &Topology) -> Vec<PathBuf> {
    let is_one = |kind: &str| kind == "cgroup" || kind == "cgroup2";
    let mounts = topology.mounts().unwrap_or_default();
    mounts.into_iter().filter(|mount| is_one(&mount.kind)).map(|mount| mount.point).collect()
}

/// Moves this process: "0" means the writer (cgroups(7)).
fn leave(hierarchy: &Path) {
    let join = |group: &Path| fs::write(group.join("cgroup.procs"), "0");
    if join(hierarchy).is_err() {
        let own = hierarchy.join(GROUP);
        // Another watchdog may have created it already.
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
