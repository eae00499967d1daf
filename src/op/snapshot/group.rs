//! Snapshots of several volumes with one instant: all of them exist, or none.
//!
//! Each volume has a record of its own, and no filesystem replaces several files at once. So one further file decides for
//! all, the record of the group. The crash argument:
//! 1. the record of each volume has its snapshot as unfinished, with the id of the group;
//! 2. the instant is taken, for all volumes: each view receives originals;
//! 3. the record of the group is written and synced, as a whole: **from here on all of them exist, before none does**;
//! 4. the record of each volume has its snapshot as kept;
//! 5. the record of the group is removed.
//!
//! Only the command that creates the group does this, and it has the lock of each volume's record all the time. If it
//! dies, the locks are free, and the next process that takes one decides by the record of the group alone: if it exists,
//! the unfinished snapshot is recorded as kept ([`SnapshotSet`](super::set::SnapshotSet) does so before anything else looks
//! at the record); if not, it is removed, and no later process can write the record of that group. So the volumes may be
//! settled one after the other, by different commands and after further crashes, and the decision stays the same: the
//! record of the group is removed only when no volume has an unfinished snapshot of it.

use std::fs::{DirBuilder, File};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use crate::base::{Error, Result, ResultExt as _};
use crate::format::state::{SnapshotGroupRecord, SnapshotSetRecord, SnapshotState};
use crate::record;

/// The directory of the records of snapshots. It outlives a boot.
pub const SET_DIR: &str = "/var/lib/tidemark/snapshots";

/// The directory of the records of groups: on the filesystem of [`SET_DIR`], and no record of a volume's.
fn directory() -> PathBuf {
    Path::new(SET_DIR).join("groups")
}

/// How a group that could not be committed is left.
#[derive(Debug)]
pub enum Uncommitted {
    /// Its record does not exist: the snapshots are to be removed.
    No(Error),
    /// Its record may appear after a power cut: nothing may be done until that is known.
    Unknown(Error),
}

/// Step 3: from here on the snapshots exist.
///
/// # Errors
/// I/O errors, with what is known of the record.
pub fn commit(group: &SnapshotGroupRecord) -> Result<(), Uncommitted> {
    commit_in(&directory(), group)
}

fn commit_in(directory: &Path, group: &SnapshotGroupRecord) -> Result<(), Uncommitted> {
    make_directory(directory).map_err(Uncommitted::No)?;
    record::write(&record::path_of(directory, &group.id), group).map_err(|error| {
        let revoked = record::remove(directory, &group.id, &[]).and_then(|()| sync(directory));
        match revoked {
            Ok(()) => Uncommitted::No(error),
            Err(undo) => Uncommitted::Unknown(error.with_failed_undo(undo)),
        }
    })
}

/// Makes the directory, and makes it durable: without it the record of a group would be lost with it.
fn make_directory(directory: &Path) -> Result<()> {
    let what = || format!("creating the directory {}", directory.display());
    DirBuilder::new().recursive(true).mode(0o700).create(directory).io_context(what)?;
    directory.parent().map_or(Ok(()), sync)
}

fn sync(directory: &Path) -> Result<()> {
    let synced = File::open(directory).and_then(|directory| directory.sync_all());
    synced.io_context(|| format!("syncing the directory {}", directory.display()))
}

/// The unfinished snapshots in the record of a volume that exist nevertheless, as their group was committed: the id of
/// each, and its instant.
///
/// # Errors
/// I/O errors; [`ErrorKind::BadData`](crate::base::ErrorKind::BadData) for a record that cannot be read. Then it is not
/// known.
pub fn committed(set: &SnapshotSetRecord) -> Result<Vec<(String, u64)>> {
    committed_in(&directory(), set)
}

fn committed_in(directory: &Path, set: &SnapshotSetRecord) -> Result<Vec<(String, u64)>> {
    let unfinished = set.snapshots.iter().filter(|snapshot| snapshot.state == SnapshotState::Creating);
    let mut committed = Vec::new();
    for (snapshot, group) in unfinished.filter_map(|snapshot| Some((snapshot, snapshot.group.as_ref()?))) {
        match record::read::<SnapshotGroupRecord>(&record::path_of(directory, group)) {
            Ok(group) => committed.push((snapshot.id.clone(), group.instant_utc_ns)),
            Err(error) if error.errno() == Some(libc::ENOENT) => {}
            Err(error) => {
                return Err(error
                    .context(format!("whether {}@{} exists", set.volume, snapshot.name))
                    .state("nothing was changed: the record of its group decides that")
                    .next(
                        "make that file readable. If it is damaged, remove it: that gives up the snapshots of the group \
                         which 'tidemark snapshot list' shows as being created",
                    ));
            }
        }
    }
    Ok(committed)
}

/// Step 5, or the end of a group whose snapshots are recorded by themselves.
///
/// # Errors
/// I/O errors.
pub fn close(id: &str) -> Result<()> {
    record::remove(&directory(), id, &[])
}

/// The ids of all records of groups.
///
/// # Errors
/// I/O errors.
pub fn all() -> Result<Vec<String>> {
    record::ids(&directory())
}

/// Removes the records `groups` that decide nothing any more. `sets` are the records of all volumes, read after
/// `groups` were found: then a group that is being created shows in them.
///
/// # Errors
/// I/O errors.
pub fn forget(groups: &[String], sets: &[Result<SnapshotSetRecord>]) -> Result<()> {
    forget_in(&directory(), groups, sets)
}

fn forget_in(directory: &Path, groups: &[String], sets: &[Result<SnapshotSetRecord>]) -> Result<()> {
    // One that cannot be read may have an unfinished snapshot of any group.
    let Ok(sets) = sets.iter().map(Result::as_ref).collect::<Result<Vec<_>, _>>() else { return Ok(()) };
    for id in groups {
        let is_unfinished = sets
            .iter()
            .flat_map(|set| &set.snapshots)
            .any(|snapshot| snapshot.state == SnapshotState::Creating && snapshot.group.as_ref() == Some(id));
        if !is_unfinished {
            record::remove(directory, id, &[])?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::state::SnapshotRecord;

    fn set(state: SnapshotState, group: &str) -> SnapshotSetRecord {
        let snapshot = SnapshotRecord {
            name: "monday".to_owned(),
            id: "a".repeat(32),
            instant_utc_ns: 0,
            store: "/x".to_owned(),
            store_bytes_max: 1,
            state,
            lost: None,
            clone_of: None,
            group: Some(group.to_owned()),
            subset: None,
        };
        SnapshotSetRecord {
            id: "b".repeat(32),
            volume: "data".to_owned(),
            device: "/dev/x".to_owned(),
            size_bytes: 1 << 20,
            chunk_bytes: 4096,
            snapshots: vec![snapshot],
            mounts: None,
            rollback: None,
            detached: None,
        }
    }

    fn record(id: &str) -> SnapshotGroupRecord {
        SnapshotGroupRecord { id: id.to_owned(), instant_utc_ns: 7, snapshots: Vec::new() }
    }

    #[test]
    fn the_record_of_the_group_alone_decides() {
        let dir = tempfile::tempdir().unwrap();
        let groups = dir.path().join("groups");
        let (id, other) = ("1".repeat(32), "2".repeat(32));
        let committed = |set: &SnapshotSetRecord| committed_in(&groups, set);
        let unfinished = set(SnapshotState::Creating, &id);
        assert_eq!(committed(&unfinished).unwrap(), [], "there is not even a directory");
        commit_in(&groups, &record(&other)).unwrap();
        assert_eq!(committed(&unfinished).unwrap(), [], "another group");
        commit_in(&groups, &record(&id)).unwrap();
        assert_eq!(committed(&unfinished).unwrap(), [("a".repeat(32), 7)]);
        // One that was deleted meanwhile stays so.
        assert_eq!(committed(&set(SnapshotState::Deleting, &id)).unwrap(), []);
        // A record that cannot be read decides nothing, neither way.
        std::fs::write(record::path_of(&groups, &id), "rubbish").unwrap();
        assert_eq!(committed(&unfinished).unwrap_err().kind(), crate::base::ErrorKind::BadData);
    }

    #[test]
    fn a_group_is_forgotten_when_no_volume_needs_its_record() {
        let dir = tempfile::tempdir().unwrap();
        let (id, other) = ("1".repeat(32), "2".repeat(32));
        let forget = |sets: &[Result<SnapshotSetRecord>]| {
            forget_in(dir.path(), std::slice::from_ref(&id), sets).unwrap();
            record::ids(dir.path()).unwrap()
        };
        for id in [&id, &other] {
            commit_in(dir.path(), &record(id)).unwrap();
        }
        let unreadable = || Err(Error::new(crate::base::ErrorKind::BadData, "rubbish"));
        let both = [id.clone(), other.clone()];
        assert_eq!(forget(&[Ok(set(SnapshotState::Creating, &id))]), both);
        assert_eq!(forget(&[Ok(set(SnapshotState::Kept, &id)), unreadable()]), both);
        // The other was written after the list was made.
        let sets = [Ok(set(SnapshotState::Kept, &id)), Ok(set(SnapshotState::Creating, &other))];
        assert_eq!(forget(&sets), std::slice::from_ref(&other));
        std::fs::write(record::path_of(dir.path(), &id).with_extension("new"), "half").unwrap();
        assert_eq!(forget(&[]), [other], "what a command left that died while it wrote the record");
    }

    #[test]
    fn a_group_that_cannot_be_committed_says_what_is_known_of_its_record() {
        let dir = tempfile::tempdir().unwrap();
        let id = "1".repeat(32);
        let path = record::path_of(dir.path(), &id);
        // The record cannot take the place of a folder, and the folder cannot be removed as a file.
        std::fs::create_dir(&path).unwrap();
        assert!(matches!(commit_in(dir.path(), &record(&id)), Err(Uncommitted::Unknown(_))));
        let nowhere = dir.path().join("file");
        std::fs::write(&nowhere, "").unwrap();
        assert!(matches!(commit_in(&nowhere, &record(&id)), Err(Uncommitted::No(_))));
    }
}
