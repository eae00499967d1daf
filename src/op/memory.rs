//! Memory available to a copy. The kernel kills a process that exceeds the limit of its control group, while its stack
//! is in place.
//!
//! Available is a group's limit minus its unreclaimable memory; its page cache is reclaimable. The minimum over all
//! groups from the command's own up to the root counts, in both versions of control groups.

use std::fs;
use std::path::Path;

use crate::base::{Bytes, Error, Result, SegmentSize};
use crate::secondary::engine_config;
use crate::sys::process::LockedMemory;
use crate::topology::Topology;

/// Memory of a copy besides its buffers: the program, its threads' locked stacks, checksums, lists of originals.
/// Measured: 7 MiB for a small origin.
const BESIDE_BUFFERS: Bytes = Bytes::mib(12);

/// Memory of a live copy with the usual number of buffers, rounded up.
pub const USUAL: Bytes = Bytes::mib(32);

/// Available memory for the buffers of one of `copies` with segments of `segment`, at most `bytes_max` for all.
///
/// # Errors
/// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) if it is not enough for the minimum.
pub fn for_buffers(segment: SegmentSize, bytes_max: Bytes, copies: u64) -> Result<Bytes> {
    let bytes_max = Bytes(bytes_max.get() / copies.max(1));
    match left(&Topology::default(), Path::new("/")) {
        Some(left) => share(Bytes(left.get() / copies.max(1)), segment, bytes_max),
        None => Ok(bytes_max),
    }
}

/// The minimum memory of a copy, with the fewest buffers.
#[must_use]
pub fn least(segment: SegmentSize) -> Bytes {
    let fewest = engine_config(segment, Bytes::ZERO);
    BESIDE_BUFFERS + fewest.buffer_bytes * u64::from(fewest.buffer_count)
}

fn share(left: Bytes, segment: SegmentSize, bytes_max: Bytes) -> Result<Bytes> {
    if left >= least(segment) {
        return Ok((left - BESIDE_BUFFERS).min(bytes_max));
    }
    Err(Error::refused(format!(
        "the control group may use {left} more memory, and a copy with segments of {segment} needs {}",
        least(segment)
    ))
    .state("nothing was changed")
    .next("raise its limit (memory.max, systemd's MemoryMax=), or use smaller segments: --segment 64KiB"))
}

/// Locks the command in memory, because memory may wait for the origin.
///
/// # Errors
/// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) if the limits forbid it.
pub fn lock() -> Result<LockedMemory> {
    LockedMemory::lock().map_err(|source| {
        Error::refused("memory may wait for the origin (swap space), and the copy cannot be locked in memory")
            .with_source(source)
            .next("disable the swap space for the copy (swapoff), or raise the memlock limit (ulimit -l)")
    })
}

/// Memory available to this process's groups; None without a limit, or if the kernel does not report it.
#[must_use]
pub fn left(topology: &Topology, root: &Path) -> Option<Bytes> {
    let own = fs::read_to_string(root.join("proc/self/cgroup")).ok()?;
    let mounts = topology.mounts().ok()?;
    let mut least = None;
    for line in own.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next()) else {
            continue;
        };
        let (kind, is_it) = match controllers {
            "" => ("cgroup2", true),
            names => ("cgroup", names.split(',').any(|name| name == "memory")),
        };
        let points = mounts.iter().filter(|mount| is_it && mount.kind == kind).map(|mount| &mount.point);
        for point in points {
            let group = point.join(path.trim_start_matches('/'));
            let groups = group.ancestors().take_while(|group| group.starts_with(point));
            let of_group = groups.filter_map(left_of);
            least = least.into_iter().chain(of_group).min();
        }
    }
    least
}

/// Memory available to one group.
fn left_of(group: &Path) -> Option<Bytes> {
    let number = |name: &str| fs::read_to_string(group.join(name)).ok()?.trim().parse().ok().map(Bytes);
    let limit = number("memory.max").or_else(|| number("memory.limit_in_bytes"))?;
    let used = number("memory.current").or_else(|| number("memory.usage_in_bytes"))?;
    let stat = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
    let cached = stat.lines().filter_map(|line| line.split_once(' '));
    let cached = cached.filter(|(name, _)| *name == "active_file" || *name == "inactive_file");
    let cached: Bytes = cached.filter_map(|(_, count)| count.parse().ok().map(Bytes)).sum();
    Some(limit.saturating_sub(used.saturating_sub(cached)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::ErrorKind;

    #[test]
    fn the_least_of_all_groups_counts_without_what_they_can_give_back() {
        let root = tempfile::tempdir().unwrap();
        let point = root.path().join("groups");
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("proc/self/mountinfo", &format!("30 20 0:26 / {} rw - cgroup2 none rw\n", point.display()));
        write("proc/self/cgroup", "0::/a/b\n");
        let look = || left(&Topology::at(root.path()), root.path());
        assert_eq!(look(), None);
        write("groups/a/memory.max", "67108864\n");
        write("groups/a/memory.current", "50331648\n");
        write("groups/a/memory.stat", "anon 5\nactive_file 4194304\ninactive_file 4194304\nfile 1\n");
        write("groups/a/b/memory.max", "max\n");
        write("groups/a/b/memory.current", "5\n");
        assert_eq!(look(), Some(Bytes::mib(24)));
        write("groups/a/b/memory.max", "1048581\n");
        assert_eq!(look(), Some(Bytes::mib(1)));
    }

    #[test]
    fn less_memory_means_fewer_buffers_and_too_little_is_refused() {
        let segment = SegmentSize::default();
        let most = Bytes::mib(16);
        assert_eq!(share(Bytes::gib(1), segment, most).unwrap(), most);
        assert_eq!(share(Bytes::mib(24), segment, most).unwrap(), Bytes::mib(12));
        let error = share(Bytes::mib(8), segment, most).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Refused);
        assert!(share(Bytes::mib(14), SegmentSize::new(Bytes::kib(64)).unwrap(), most).is_ok());
    }
}
