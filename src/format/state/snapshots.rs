//! The record of the snapshots that are kept of a volume.

use serde::{Deserialize, Serialize};

use super::Record;

/// The snapshots of one volume: what its devices are made from, by whichever command or boot makes them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotSetRecord {
    /// Its id, as in the UUIDs of the devices below the volume.
    pub id: String,
    /// The volume's name.
    pub volume: String,
    /// The device below, by a path that stays the same from boot to boot.
    pub device: String,
    /// The volume's size in bytes.
    pub size_bytes: u64,
    /// Unit of copy-on-write of every store, bytes.
    pub chunk_bytes: u64,
    /// The oldest first.
    pub snapshots: Vec<SnapshotRecord>,
    /// The trace of mounts that was last seen on the device while the volume led to its snapshots; None if none was
    /// seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mounts: Option<String>,
    /// The rollback that is planned or in progress.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollback: Option<RollbackRecord>,
    /// What the volume held when it was detached; None while it is attached, and after a crash.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detached: Option<DetachedRecord>,
}

/// One snapshot, or a clone of one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotRecord {
    /// Its name: /dev/mapper/VOLUME@NAME.
    pub name: String,
    /// Its id, as in the UUIDs of its devices: 32 hexadecimal digits.
    pub id: String,
    /// The instant, UTC, in nanoseconds since 1970; 0 before it.
    pub instant_utc_ns: u64,
    /// The file with its COW store.
    pub store: String,
    /// Largest size of that file, bytes.
    pub store_bytes_max: u64,
    /// How far its creation or deletion has got.
    pub state: SnapshotState,
    /// Why it no longer shows its instant; None while it does, as far as the record knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lost: Option<String>,
    /// The id of the snapshot of which it is a writable clone; None for a snapshot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clone_of: Option<String>,
    /// The id of its group: snapshots of several volumes with one instant. None if it was created alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// What it leaves out of the volume; None if it shows all of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subset: Option<SubsetRecord>,
}

/// What a snapshot leaves out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SubsetRecord {
    /// What the user included, as typed.
    pub include: Vec<String>,
    /// What the user excluded, as typed.
    pub exclude: Vec<String>,
    /// The bytes that read as zeros: first byte and end of each range, in order, no two touching; whole chunks, and the
    /// volume's last one.
    pub left_out: Vec<(u64, u64)>,
}

/// How far the creation or the deletion of a snapshot has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SnapshotState {
    /// Its instant has not been recorded. A crash ends its creation.
    Creating,
    /// In use.
    Kept,
    /// Deleted, but the newest: its store still receives originals for the older ones.
    Retired,
    /// To be deleted: older ones may still read through it.
    Deleting,
    /// No other one reads through it. Only its store and its devices are left.
    Unlinked,
    /// Lost: it is no longer below the volume, and only its store is left.
    Detached,
}

/// A rollback of the whole volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RollbackRecord {
    /// The id of the snapshot.
    pub snapshot: String,
    /// How far it has got.
    pub state: RollbackState,
    /// Bytes of originals for which the newest store must have room before the merge begins; None: all that the volume
    /// can need.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reserve_bytes: Option<u64>,
    /// The directory for the files of the rollback.
    pub directory: String,
    /// The trace of mounts that the volume showed last while its device was being merged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mounts: Option<String>,
}

/// How far a rollback has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RollbackState {
    /// It begins when the volume is attached next.
    Planned,
    /// The volume shows the snapshot and what was written since, and its device is being merged.
    Merging,
    /// Its device holds everything.
    Merged,
}

/// Snapshots of several volumes with one instant. While this record exists, all of them do, whatever the records of the
/// volumes say of their creation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotGroupRecord {
    /// Its id, as in the records of its snapshots: 32 hexadecimal digits.
    pub id: String,
    /// The instant, UTC, in nanoseconds since 1970.
    pub instant_utc_ns: u64,
    /// The snapshots, as VOLUME@NAME; for people.
    pub snapshots: Vec<String>,
}

/// What a volume held when it was detached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DetachedRecord {
    /// When, UTC, in nanoseconds since 1970.
    pub at_utc_ns: u64,
    /// Seed of the sample's positions.
    pub seed: u64,
    /// SHA-256 of the parts that were read, in hexadecimal digits.
    pub digest: String,
}

impl SnapshotSetRecord {
    /// The snapshot or clone of this name that is neither deleted nor about to be.
    #[must_use]
    pub fn named(&self, name: &str) -> Option<&SnapshotRecord> {
        self.snapshots.iter().find(|snapshot| snapshot.name == name && snapshot.state.is_visible())
    }

    /// The clones of the snapshot with this id, whatever their state.
    pub fn clones_of<'a>(&'a self, id: &'a str) -> impl Iterator<Item = &'a SnapshotRecord> {
        self.snapshots.iter().filter(move |clone| clone.clone_of.as_deref() == Some(id))
    }

    /// Notes that nothing below the volume, and no clone, shows its instant any more.
    pub fn lose_all(&mut self, why: &str) {
        self.snapshots.iter_mut().filter(|snapshot| snapshot.state.is_linked()).for_each(|snapshot| {
            snapshot.lost.get_or_insert_with(|| why.to_owned());
        });
    }

    /// The rollback, if it has begun.
    #[must_use]
    pub fn rolling_back(&self) -> Option<&RollbackRecord> {
        self.rollback.as_ref().filter(|rollback| rollback.state != RollbackState::Planned)
    }

    /// All snapshots and clones, each before those that it is read through.
    #[must_use]
    pub fn top_down(&self) -> Vec<SnapshotRecord> {
        let (clones, snapshots): (Vec<_>, Vec<_>) =
            self.snapshots.iter().cloned().partition(|snapshot| snapshot.clone_of.is_some());
        clones.into_iter().chain(snapshots).collect()
    }
}

/// The name of the clone that a volume shows while it is rolled back; no user can choose it.
pub const ROLLBACK_NAME: &str = ".rollback";

impl SnapshotRecord {
    /// True for the clone that a volume shows while it is rolled back.
    #[must_use]
    pub fn is_of_rollback(&self) -> bool {
        self.clone_of.is_some() && self.name == ROLLBACK_NAME
    }

    /// A lost one that has no devices any more: it is listed until it is deleted.
    pub fn unlink_lost(&mut self) {
        let is_kept = self.state == SnapshotState::Kept;
        self.state = if is_kept { SnapshotState::Detached } else { SnapshotState::Unlinked };
    }
}

impl SnapshotState {
    /// True if users see it.
    #[must_use]
    pub fn is_visible(self) -> bool {
        matches!(self, Self::Kept | Self::Detached)
    }

    /// True if originals are in its store that older ones, or its own users, may need.
    #[must_use]
    pub fn is_linked(self) -> bool {
        matches!(self, Self::Kept | Self::Retired | Self::Deleting)
    }
}

impl Record for SnapshotSetRecord {
    const KIND: &'static str = "snapshots";
}

impl Record for SnapshotGroupRecord {
    const KIND: &'static str = "snapshot-group";
}
