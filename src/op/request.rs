//! What the user asked for, resolved once by `cli`, as plain values.

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::base::{Bytes, ChunkSize, SegmentSize};
use crate::copy::Impact;
use crate::copy::Order;
use crate::copy::sample::Sample;
use crate::format::SecondaryForm;
use crate::restore::ArchiveSource;
use crate::secondary::SecondaryTarget;
use crate::stack::hooks::AroundInstant;
use crate::volume::lvm_lock::LvmScope;
use crate::volume::subset::Subset;

/// How originals get into the copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Originals {
    /// Written over the fuzzy data.
    Overlay,
    /// Written after the data, to be applied by restore (archives only).
    Append,
}

/// What happens if the store is about to fill and cannot grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnFull {
    /// The copy fails with its snapshot; the origin stays in use.
    #[default]
    Abort,
    /// The origin is suspended repeatedly, for a bounded time, until the copier has caught up.
    Hold,
}

/// Where the COW store's tail is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct StoreRequest {
    /// A directory (in which a file is created), a file to be created, or a block device; default /var/lib/tidemark.
    pub tail: Option<PathBuf>,
    /// Largest size to which the store may grow, head and tail together; default: what the origin needs in the worst
    /// case.
    pub size_max: Option<Bytes>,
    /// Size of the RAM head, zero for none; the default depends on the available memory.
    pub ram: Option<Bytes>,
    /// Keep the store, including the kernel's metadata in it, after the copy.
    pub keep: bool,
}

/// Commands that are run around the instant with `sh -c`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hooks {
    /// Runs before anything is frozen; a failure aborts the copy.
    pub before: Option<String>,
    /// Runs at the instant, with TIDEMARK_ORIGIN_BELOW set; killed when the freeze budget is exceeded.
    pub frozen: Option<String>,
    /// Runs after the thaw, and also if `before` or the instant failed; a failure is reported and does not undo the
    /// copy.
    pub after: Option<String>,
    /// Longest time for `before`, and for `after`.
    #[serde(default = "hook_timeout")]
    pub timeout: Duration,
}

/// [`Hooks::timeout`], unless the user says otherwise.
pub const HOOK_TIMEOUT: Duration = Duration::from_secs(300);

/// For the record of a copy by a program that had no such option.
fn is_true() -> bool {
    true
}

/// For the record of a copy by a program that had no such option.
fn hook_timeout() -> Duration {
    HOOK_TIMEOUT
}

impl Default for Hooks {
    fn default() -> Self {
        Self { before: None, frozen: None, after: None, timeout: HOOK_TIMEOUT }
    }
}

impl Hooks {
    /// Those around an instant of `origin`.
    #[must_use]
    pub fn around<'a>(&'a self, origin: &'a Path) -> AroundInstant<'a> {
        AroundInstant {
            before: self.before.as_deref(),
            after: self.after.as_deref(),
            origin,
            variables: &[],
            timeout: self.timeout,
            is_due: Cell::new(false),
        }
    }
}

/// The arguments of `tidemark copy`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CopyRequest {
    /// A volume's name, a device or a regular file.
    pub origin: PathBuf,
    /// The secondary.
    pub secondary: SecondaryTarget,
    /// Its form.
    pub format: SecondaryForm,
    /// How originals get into the copy.
    pub originals: Originals,
    /// The COW store.
    pub store: StoreRequest,
    /// Unit of copy-on-write.
    pub chunk: ChunkSize,
    /// Unit of copying and framing; None: 1 MiB, more for very large origins.
    pub segment: Option<SegmentSize>,
    /// Unit of release; None: derived from the origin's size.
    pub region: Option<Bytes>,
    /// The order of the regions; None: hot for a live origin, else physical.
    pub order: Option<Order>,
    /// Also copy and preserve free space.
    pub all: bool,
    /// What of the origin is copied.
    #[serde(default)]
    pub subset: Subset,
    /// What happens if the store is about to fill and cannot grow.
    pub on_full: OnFull,
    /// Longest total time for which the origin may be suspended because of that.
    pub hold_budget: Duration,
    /// Most bytes per second.
    pub rate: Option<Bytes>,
    /// How much the copy may slow down the applications on a live origin. (A cold origin has none.)
    pub impact: Impact,
    /// Re-read the secondary and compare checksums.
    pub verify: bool,
    /// Wait while another copy reads from a rotating disk of the origin.
    #[serde(default = "is_true")]
    pub waits_for_disks: bool,
    /// Longest time for which filesystems may be frozen or the origin suspended.
    pub freeze_budget: Duration,
    /// How long LVM commands have to wait if the origin is an LVM volume.
    #[serde(default)]
    pub lvm_lock: LvmScope,
    /// Copy only what changed since this kept snapshot.
    #[serde(default)]
    pub since: Option<String>,
    /// Files and directories in which the parent is looked for; none: the directory of the secondary.
    #[serde(default)]
    pub parents: Vec<PathBuf>,
    /// How much of a raw secondary is read before it is updated; None: the usual share.
    #[serde(default)]
    pub sample: Option<Sample>,
    /// The hooks.
    pub hooks: Hooks,
    /// An existing file may be replaced, a device overwritten.
    pub replace: bool,
}

/// The arguments of `tidemark attach`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct AttachRequest {
    /// The block device, not mounted.
    pub device: PathBuf,
    /// The volume's name: the device becomes /dev/mapper/NAME.
    pub name: String,
    /// Write and enable a systemd unit that attaches the device at every boot.
    pub install_unit: bool,
}

/// The arguments of `tidemark detach`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DetachRequest {
    /// The volume's name.
    pub name: String,
    /// Its snapshots stay recorded.
    pub keep_snapshots: bool,
    /// Its unit and its record stay.
    pub keep_unit: bool,
}

/// The arguments of `tidemark restore`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RestoreRequest {
    /// The archive.
    pub archive: ArchiveSource,
    /// A block device or a file.
    pub target: PathBuf,
    /// Files and directories in which the parents of an increment are looked for; none: the archive's directory.
    pub parents: Vec<PathBuf>,
    /// An existing file may be replaced, a device overwritten.
    pub replace: bool,
}

/// The arguments of `tidemark verify`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct VerifyRequest {
    /// The archive.
    pub archive: ArchiveSource,
    /// A device or file whose content must equal the archive's.
    pub against: Option<PathBuf>,
    /// Files and directories in which the parents of an increment are looked for; none: the archive's directory.
    pub parents: Vec<PathBuf>,
}

/// The arguments of `tidemark archive merge`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MergeRequest {
    /// The increment.
    pub archive: PathBuf,
    /// The new archive.
    pub merged: PathBuf,
    /// Files and directories in which the parents are looked for; none: the increment's directory.
    pub parents: Vec<PathBuf>,
    /// An existing file may be replaced.
    pub replace: bool,
}

/// The arguments of `tidemark inspect`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct InspectRequest {
    /// The archive.
    pub archive: PathBuf,
}
