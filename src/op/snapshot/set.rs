//! The record of a volume's snapshots, held by one process at a time.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use super::group::{self, SET_DIR};
use crate::base::clock::Stopwatch;
use crate::base::{Bytes, ChunkSize, Error, Result, Sectors};
use crate::dm::DeviceIdentity;
use crate::dm::naming::{ROLE_LOG, ROLE_STORE, SnapshotNames, VolumeNames, new_id};
use crate::extent::{Extent, ExtentSet};
use crate::format::state::{SnapshotRecord, SnapshotSetRecord, SnapshotState};
use crate::record::{self, FoundRecord, LockedRecord};
use crate::store::PersistentStore;

/// Longest wait for another command that changes the snapshots of the same volume.
const OTHER_COMMAND_MAX: Duration = Duration::from_secs(60);

/// Interval between two attempts.
const OTHER_COMMAND_PAUSE: Duration = Duration::from_millis(50);

/// Longest name of a snapshot: "VOLUME@NAME#store" fits the kernel's 127 bytes.
const NAME_BYTES_MAX: usize = 32;

/// The snapshots of one volume, which no other process can change meanwhile.
#[derive(Debug)]
pub struct SnapshotSet {
    record: LockedRecord<SnapshotSetRecord>,
}

impl SnapshotSet {
    /// The set of `volume`; None if it has no snapshots. Waits for another command that changes it.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) if that command does not end; `interrupt`'s;
    /// [`ErrorKind::BadData`](crate::base::ErrorKind::BadData) for a record that cannot be read; I/O errors.
    pub fn find(volume: &str, interrupt: &dyn Fn() -> Result<()>) -> Result<Option<Self>> {
        let Some(id) = read_of(volume)?.map(|set| set.id) else { return Ok(None) };
        let watch = Stopwatch::start();
        loop {
            match record::find::<SnapshotSetRecord>(Path::new(SET_DIR), &id)? {
                None => return Ok(None),
                Some(found) if found.lock.is_some() => return Self::of(found).map(Some),
                Some(_) => {}
            }
            interrupt()?;
            if watch.elapsed() >= OTHER_COMMAND_MAX {
                return Err(Error::refused(format!("another command is changing the snapshots of {volume}"))
                    .state("nothing was changed")
                    .next("wait for its end ('tidemark status' shows it)"));
            }
            thread::sleep(OTHER_COMMAND_PAUSE);
        }
    }

    /// As [`SnapshotSet::find`], but does not wait: None also if another command changes the set.
    ///
    /// # Errors
    /// As [`SnapshotSet::find`].
    pub fn find_idle(id: &str) -> Result<Option<Self>> {
        let found = record::find::<SnapshotSetRecord>(Path::new(SET_DIR), id)?;
        found.filter(|found| found.lock.is_some()).map(Self::of).transpose()
    }

    /// The sets that no other process holds.
    ///
    /// # Errors
    /// I/O errors.
    pub fn find_all() -> Result<Vec<Result<Self>>> {
        let ids = record::ids(Path::new(SET_DIR))?;
        Ok(ids.iter().filter_map(|id| Self::find_idle(id).transpose()).collect())
    }

    fn of(found: FoundRecord<SnapshotSetRecord>) -> Result<Self> {
        if found.is_newer {
            return Err(Error::refused(format!(
                "the record of snapshots {} was written by a newer version of Tidemark",
                found.id
            ))
            .state("nothing was changed")
            .next("use that version"));
        }
        let mut set = Self { record: found.take_over()? };
        set.accept_committed()?;
        Ok(set)
    }

    /// Records snapshots as kept whose group was committed by a command that then died: see [`group`].
    ///
    /// # Errors
    /// I/O errors; then it is not decided whether they exist, and nothing may be done with them.
    pub fn accept_committed(&mut self) -> Result<()> {
        let committed = group::committed(self.record())?;
        if committed.is_empty() {
            return Ok(());
        }
        self.change(|record| {
            for snapshot in &mut record.snapshots {
                if let Some((_, instant)) = committed.iter().find(|(id, _)| *id == snapshot.id) {
                    snapshot.instant_utc_ns = *instant;
                    snapshot.state = SnapshotState::Kept;
                }
            }
        })
    }

    /// A set without snapshots.
    ///
    /// # Errors
    /// I/O errors.
    pub fn create(volume: &str, device: &str, size: Bytes, chunk: ChunkSize) -> Result<Self> {
        let id = new_id();
        let record = SnapshotSetRecord {
            id: id.clone(),
            volume: volume.to_owned(),
            device: device.to_owned(),
            size_bytes: size.get(),
            chunk_bytes: chunk.bytes().get(),
            snapshots: Vec::new(),
            mounts: None,
            rollback: None,
            detached: None,
        };
        Ok(Self { record: LockedRecord::create(Path::new(SET_DIR), &id, record)? })
    }

    /// The record.
    #[must_use]
    pub fn record(&self) -> &SnapshotSetRecord {
        self.record.record()
    }

    /// Changes the record, and returns once the change is on stable storage.
    ///
    /// # Errors
    /// I/O errors; the record on disk is the old or the new one.
    pub fn change(&mut self, change: impl FnOnce(&mut SnapshotSetRecord)) -> Result<()> {
        let before = self.record.record().clone();
        change(self.record.record_mut());
        self.record.save().inspect_err(|_| {
            // Whatever is done next must follow from what is on disk.
            let path = record::path_of(Path::new(SET_DIR), &before.id);
            *self.record.record_mut() = record::read(&path).unwrap_or(before);
        })
    }

    /// Changes the snapshot `id`, as [`SnapshotSet::change`].
    ///
    /// # Errors
    /// As [`SnapshotSet::change`].
    pub fn change_one(&mut self, id: &str, change: impl FnOnce(&mut SnapshotRecord)) -> Result<()> {
        self.change(|record| {
            if let Some(snapshot) = record.snapshots.iter_mut().find(|snapshot| snapshot.id == id) {
                change(snapshot);
            }
        })
    }

    /// Removes the record of a set that has no snapshots.
    ///
    /// # Errors
    /// I/O errors.
    pub fn remove(self) -> Result<()> {
        debug_assert!(self.record().snapshots.is_empty(), "a set with snapshots has a record");
        self.record.remove(&[])
    }
}

/// What follows from a record.
impl SnapshotSetRecord {
    /// Unit of copy-on-write.
    ///
    /// # Errors
    /// [`ErrorKind::BadData`](crate::base::ErrorKind::BadData) for a record with an impossible one.
    pub fn chunk(&self) -> Result<ChunkSize> {
        ChunkSize::new(Bytes(self.chunk_bytes))
    }

    /// The volume's size.
    ///
    /// # Errors
    /// [`ErrorKind::BadData`](crate::base::ErrorKind::BadData) if it is not a whole number of sectors.
    pub fn length(&self) -> Result<Sectors> {
        Bytes(self.size_bytes).to_sectors("the volume")
    }

    /// The devices below the volume.
    #[must_use]
    pub fn volume_names(&self) -> VolumeNames {
        VolumeNames::new(&self.volume, &self.id)
    }

    /// The devices of `snapshot`.
    #[must_use]
    pub fn names(&self, snapshot: &SnapshotRecord) -> SnapshotNames {
        SnapshotNames::new(&self.volume, &snapshot.name, &snapshot.id)
    }

    /// The identity of the device of `snapshot` with this role.
    #[must_use]
    pub fn identity(&self, role: &str, snapshot: &SnapshotRecord) -> DeviceIdentity {
        DeviceIdentity::new(&self.volume, role, &snapshot.id)
    }

    /// The store of `snapshot`.
    ///
    /// # Errors
    /// As [`SnapshotSetRecord::chunk`].
    pub fn store(&self, snapshot: &SnapshotRecord) -> Result<PersistentStore> {
        Ok(PersistentStore {
            device: self.names(snapshot).store,
            identity: self.identity(ROLE_STORE, snapshot),
            path: PathBuf::from(&snapshot.store),
            chunk: self.chunk()?,
            origin_bytes: Bytes(self.size_bytes),
        })
    }

    /// The snapshot or clone with this name, for a command that needs it.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) if there is none.
    pub fn existing(&self, name: &str) -> Result<&SnapshotRecord> {
        self.named(name).ok_or_else(|| no_snapshot(&format!("there is no snapshot {}@{name}", self.volume)))
    }

    /// The log of the merge for which the clone `clone` was made: a file beside its store.
    ///
    /// # Errors
    /// As [`SnapshotSetRecord::chunk`].
    pub fn log(&self, clone: &SnapshotRecord) -> Result<PersistentStore> {
        Ok(PersistentStore {
            device: self.volume_names().log,
            identity: DeviceIdentity::new(&self.volume, ROLE_LOG, &self.id),
            path: PathBuf::from(&clone.store).with_extension("log"),
            ..self.store(clone)?
        })
    }

    /// Refuses while the volume is being rolled back.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused).
    pub fn refuse_rollback(&self) -> Result<()> {
        if self.rolling_back().is_none() {
            return Ok(());
        }
        Err(Error::refused(format!("{} is being rolled back", self.volume))
            .state("nothing was changed")
            .next(format!("wait for its end: 'tidemark snapshot list {}' shows how far it is", self.volume)))
    }

    /// The snapshots that are below the volume, the oldest first.
    #[must_use]
    pub fn linked(&self) -> Vec<SnapshotRecord> {
        let is_linked =
            |snapshot: &&SnapshotRecord| snapshot.clone_of.is_none() && snapshot.state.is_linked();
        self.snapshots.iter().filter(is_linked).cloned().collect()
    }

    /// What all snapshots below the volume leave out; None if there are none. Of one that is deleted, only what older
    /// ones need is still needed.
    #[must_use]
    pub fn left_out_by_all(&self) -> Option<ExtentSet> {
        let kept = self.linked().into_iter().filter(|snapshot| snapshot.state == SnapshotState::Kept);
        let sets = kept.map(|snapshot| snapshot.left_out());
        sets.reduce(|all, one| all.intersection(&one))
    }

    /// The clones that have devices while the volume is attached.
    #[must_use]
    pub fn clones(&self) -> Vec<SnapshotRecord> {
        let is_in_use =
            |snapshot: &&SnapshotRecord| snapshot.clone_of.is_some() && snapshot.state.is_linked();
        self.snapshots.iter().filter(is_in_use).cloned().collect()
    }

    /// `snapshots` and their clones, each before those that it is read through.
    #[must_use]
    pub fn with_clones(&self, snapshots: &[SnapshotRecord]) -> Vec<SnapshotRecord> {
        let mut all: Vec<SnapshotRecord> =
            snapshots.iter().flat_map(|snapshot| self.clones_of(&snapshot.id)).cloned().collect();
        all.extend_from_slice(snapshots);
        all
    }
}

impl SnapshotRecord {
    /// The bytes that it leaves out, which read as zeros.
    #[must_use]
    pub fn left_out(&self) -> ExtentSet {
        let ranges = self.subset.iter().flat_map(|subset| &subset.left_out);
        ranges.filter_map(|(start, end)| Extent::new(Bytes(*start), Bytes(*end))).collect()
    }
}

/// All records, without a lock: for display.
///
/// # Errors
/// I/O errors of reading the directory.
pub fn read_all() -> Result<Vec<Result<SnapshotSetRecord>>> {
    let directory = Path::new(SET_DIR);
    let ids = record::ids(directory)?;
    let read = |id: &String| record::read::<SnapshotSetRecord>(&record::path_of(directory, id));
    // One that was removed meanwhile is left out.
    Ok(ids.iter().map(read).filter(|read| !is_gone(read)).collect())
}

/// The record of `volume`, without a lock; None if it has no snapshots.
///
/// # Errors
/// I/O errors; also for a record that cannot be read, as it may be that of the volume.
pub fn read_of(volume: &str) -> Result<Option<SnapshotSetRecord>> {
    let records = read_all()?.into_iter().collect::<Result<Vec<_>>>()?;
    Ok(records.into_iter().find(|record| record.volume == volume))
}

fn is_gone(read: &Result<SnapshotSetRecord>) -> bool {
    read.as_ref().is_err_and(|error| error.errno() == Some(libc::ENOENT))
}

/// Splits VOLUME@NAME.
///
/// # Errors
/// [`ErrorKind::Usage`](crate::base::ErrorKind::Usage) for anything else.
pub fn parse_name(text: &str) -> Result<(&str, &str)> {
    match text.rsplit_once('@') {
        Some((volume, name)) if !volume.is_empty() && check_name(name).is_ok() => Ok((volume, name)),
        _ => Err(Error::usage(format!("'{text}' is not the name of a snapshot"))
            .next("write VOLUME@NAME; 'tidemark snapshot list' shows them")),
    }
}

/// Allows letters, digits and `_.-`, with no dot or dash first.
///
/// # Errors
/// [`ErrorKind::Usage`](crate::base::ErrorKind::Usage) for any other name.
pub fn check_name(name: &str) -> Result<()> {
    let is_word = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte));
    if (1..=NAME_BYTES_MAX).contains(&name.len()) && is_word && !name.starts_with(['.', '-']) {
        return Ok(());
    }
    Err(Error::usage(format!("'{name}' cannot be a snapshot's name"))
        .next(format!("use 1 to {NAME_BYTES_MAX} letters, digits, '_', '.' and '-', such as --name monday")))
}

/// The set of `volume`, for a command that needs one.
///
/// # Errors
/// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) if there is none; as [`SnapshotSet::find`].
pub fn find_existing(volume: &str, interrupt: &dyn Fn() -> Result<()>) -> Result<SnapshotSet> {
    SnapshotSet::find(volume, interrupt)?.ok_or_else(|| none_of(volume))
}

/// The record of `volume`, without a lock, for a command that needs one.
///
/// # Errors
/// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) if there is none; as [`read_of`].
pub fn read_existing(volume: &str) -> Result<SnapshotSetRecord> {
    read_of(volume)?.ok_or_else(|| none_of(volume))
}

/// The refusal for a volume without snapshots.
pub fn none_of(volume: &str) -> Error {
    no_snapshot(&format!("{volume} has no snapshots"))
}

/// The refusal for a snapshot that does not exist.
pub fn no_snapshot(what: &str) -> Error {
    Error::refused(what.to_owned()).state("nothing was changed").next("'tidemark snapshot list' shows them")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::state::SubsetRecord;

    fn snapshot(state: SnapshotState, left_out: &[(u64, u64)]) -> SnapshotRecord {
        let subset = SubsetRecord { include: Vec::new(), exclude: Vec::new(), left_out: left_out.to_vec() };
        SnapshotRecord {
            name: "a".to_owned(),
            id: "a".repeat(32),
            instant_utc_ns: 1,
            store: "/x".to_owned(),
            store_bytes_max: 1,
            state,
            lost: None,
            clone_of: None,
            group: None,
            subset: Some(subset).filter(|subset| !subset.left_out.is_empty()),
        }
    }

    #[test]
    fn what_one_snapshot_needs_is_left_out_by_none() {
        use SnapshotState::{Creating, Deleting, Detached, Kept, Retired};
        let by_all = |snapshots: Vec<SnapshotRecord>| {
            let record = SnapshotSetRecord {
                id: "b".repeat(32),
                volume: "data".to_owned(),
                device: "/dev/x".to_owned(),
                size_bytes: 1 << 20,
                chunk_bytes: 4096,
                snapshots,
                mounts: None,
                rollback: None,
                detached: None,
            };
            record
                .left_out_by_all()
                .map(|all| all.iter().map(|it| (it.start().get(), it.end().get())).collect())
        };
        let one = || snapshot(Kept, &[(0, 8192), (16384, 32768)]);
        assert_eq!(by_all(vec![]), None);
        assert_eq!(by_all(vec![one()]), Some(vec![(0, 8192), (16384, 32768)]));
        let other = snapshot(Kept, &[(4096, 20480)]);
        assert_eq!(by_all(vec![one(), other]), Some(vec![(4096, 8192), (16384, 20480)]));
        // A whole one needs everything, wherever it is in the chain.
        for whole in [vec![snapshot(Kept, &[]), one()], vec![one(), snapshot(Kept, &[])]] {
            assert_eq!(by_all(whole), Some(Vec::new()));
        }
        // Those that users do not see need nothing for themselves.
        for state in [Creating, Deleting, Retired, Detached] {
            assert_eq!(by_all(vec![one(), snapshot(state, &[])]), by_all(vec![one()]), "{state:?}");
        }
        // A clone is not below the volume.
        let clone = SnapshotRecord { clone_of: Some("a".repeat(32)), ..snapshot(Kept, &[]) };
        assert_eq!(by_all(vec![one(), clone]), by_all(vec![one()]));
    }

    #[test]
    fn names_of_snapshots_are_split_and_checked() {
        assert_eq!(parse_name("data@monday").unwrap(), ("data", "monday"));
        assert_eq!(parse_name("a@b@1").unwrap(), ("a@b", "1"));
        for bad in
            ["data", "@x", "data@", "data@-x", "data@a b", "data@.x", &format!("data@{}", "x".repeat(33))]
        {
            assert!(parse_name(bad).is_err(), "{bad}");
        }
    }
}
