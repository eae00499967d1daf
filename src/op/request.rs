//! What the user asked for, resolved once by `cli`, as plain values.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::base::{Bytes, ChunkSize, SegmentSize};
use crate::copy::Impact;
use crate::copy::Order;
use crate::format::SecondaryForm;
use crate::restore::ArchiveSource;
use crate::secondary::SecondaryTarget;
use crate::volume::lvm_lock::LvmScope;

/// What happens with originals.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Originals {
    /// Written over the fuzzy data.
    Overlay,
    /// Put after the data, for restore to apply last (archives only).
    Append,
}

/// What happens where the store is about to fill and cannot grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnFull {
    /// The snapshot is lost, and with it the copy; the origin goes on.
    #[default]
    Abort,
    /// The origin is suspended in bounded slices until the copier has caught up.
    Hold,
}

/// Where the COW store's tail is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct StoreRequest {
    /// A directory (a file is made in it), a file to be made, or a block device; default
    /// /var/lib/tidemark.
    pub tail: Option<PathBuf>,
    /// Largest size the store may grow to, tail and head together; default: what the origin's size
    /// can need at most.
    pub size_max: Option<Bytes>,
    /// Size of the RAM head; zero for none; default from free memory.
    pub ram: Option<Bytes>,
    /// Keep the store (and the kernel's metadata in it) after the copy.
    pub keep: bool,
}

/// Commands run around the instant with `sh -c`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hooks {
    /// Before anything is frozen; a failure aborts the copy.
    pub before: Option<String>,
    /// At the instant; gets TIDEMARK_ORIGIN_BELOW; killed past the freeze budget.
    pub frozen: Option<String>,
    /// After the thaw; a failure is reported and does not undo the copy.
    pub after: Option<String>,
}

/// `tidemark copy`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CopyRequest {
    /// A volume's name, a device or a regular file.
    pub origin: PathBuf,
    /// Where to.
    pub secondary: SecondaryTarget,
    /// In which form.
    pub format: SecondaryForm,
    /// Where originals go.
    pub originals: Originals,
    /// The COW store.
    pub store: StoreRequest,
    /// Unit of copy-on-write.
    pub chunk: ChunkSize,
    /// Unit of copying and framing; None: 1 MiB, more for very large devices.
    pub segment: Option<SegmentSize>,
    /// Unit of release; None: from the origin's size.
    pub region: Option<Bytes>,
    /// The order of the regions; None: as suits the origin's disks.
    pub order: Option<Order>,
    /// Copy and preserve free space as well.
    pub all: bool,
    /// What happens where the store is about to fill.
    pub on_full: OnFull,
    /// Longest time that the origin may be suspended in all because of that.
    pub hold_budget: Duration,
    /// Bytes per second at most.
    pub rate: Option<Bytes>,
    /// How much the applications on a live origin may feel. (On one at rest there are none.)
    pub impact: Impact,
    /// Re-read the secondary and compare checksums.
    pub verify: bool,
    /// Longest time that filesystems may be frozen or the origin suspended.
    pub freeze_budget: Duration,
    /// For how long LVM's commands wait where the origin is LVM's.
    #[serde(default)]
    pub lvm_lock: LvmScope,
    /// Hooks.
    pub hooks: Hooks,
    /// A file in the way may be replaced, a device overwritten.
    pub replace: bool,
}

/// `tidemark attach`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct AttachRequest {
    /// The block device, not mounted.
    pub device: PathBuf,
    /// The volume's name: the device becomes /dev/mapper/NAME.
    pub name: String,
    /// Write and enable a systemd unit that attaches it at every boot.
    pub install_unit: bool,
}

/// `tidemark detach`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DetachRequest {
    /// The volume's name.
    pub name: String,
}

/// `tidemark restore`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RestoreRequest {
    /// The archive.
    pub archive: ArchiveSource,
    /// A block device or a file.
    pub target: PathBuf,
    /// A file in the way may be replaced, a device overwritten.
    pub replace: bool,
}

/// `tidemark verify`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct VerifyRequest {
    /// The archive.
    pub archive: ArchiveSource,
    /// A device or file whose content must equal the archive's.
    pub against: Option<PathBuf>,
}

/// `tidemark inspect`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct InspectRequest {
    /// The archive.
    pub archive: PathBuf,
}
