//! The request for a stack, and what is known of a stack: plain values.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::base::{ChunkSize, DeviceNumber, Error, Result};
use crate::dm::Table;
use crate::extent::Extent;
use crate::volume::FreezeSet;
use crate::volume::lvm_lock::LvmScope;

/// Which stack to insert, over which origin.
#[derive(Clone, Debug)]
pub struct StackRequest {
    /// The origin's device-mapper name.
    pub origin: String,
    /// The COW store's device, its first chunk zeroed.
    pub cow: DeviceNumber,
    /// Unit of copy-on-write.
    pub chunk: ChunkSize,
    /// Mount points of every filesystem on the origin, one each, in the order of freezing.
    pub filesystems: Vec<PathBuf>,
    /// Let the suspension freeze what is mounted on the device itself: for mounts that are out of reach.
    pub lock_filesystem: bool,
    /// Longest time that anything may be frozen or suspended.
    pub budget: Duration,
    /// Preserve everything, including what filesystems do not use.
    pub all: bool,
    /// What the plan was based on, checked again before anything is done; None if there was no plan.
    pub planned: Option<Planned>,
    /// How long lvm2 is locked out.
    pub lvm_lock: LvmScope,
}

/// What must not have changed since a copy was planned.
#[derive(Clone, Debug)]
pub struct Planned {
    /// The filesystems on the origin.
    pub frozen: FreezeSet,
    /// The origin's own table.
    pub table: Table,
}

impl StackRequest {
    /// The request, updated to the present: a filesystem may be mounted at another place now.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) if the origin is no longer as planned.
    pub(super) fn recheck(&self, number: DeviceNumber, own_table: &Table) -> Result<Self> {
        let Some(planned) = &self.planned else { return Ok(self.clone()) };
        if *own_table != planned.table {
            return Err(Error::refused(format!(
                "the table of {} was changed since the copy was planned",
                self.origin
            ))
            .state("nothing was frozen or inserted")
            .next("copy again, and do not resize or move the volume meanwhile"));
        }
        let frozen = planned.frozen.recheck(number, "since the copy was planned")?;
        let planned = Planned { frozen: frozen.clone(), table: own_table.clone() };
        Ok(Self {
            filesystems: frozen.points,
            lock_filesystem: frozen.lock_filesystem,
            planned: Some(planned),
            ..self.clone()
        })
    }
}

/// What the caller may use at the instant.
#[derive(Clone, Copy, Debug)]
pub struct InstantContext<'a> {
    /// The device `real`: readable, and unchanged until the origin is resumed.
    pub below: &'a Path,
    /// The instant, UTC, in nanoseconds since 1970.
    pub utc_ns: u64,
    /// When the budget ends.
    pub deadline: Instant,
}

/// How long the origin was held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HoldTimes {
    /// Syncing the filesystems, before anything is held.
    pub synced: Duration,
    /// From the first freeze to the last thaw.
    pub frozen: Duration,
    /// From the start of the suspension to the end of the resume.
    pub suspended: Duration,
    /// The instant, UTC, in nanoseconds since 1970.
    pub instant_utc_ns: u64,
}

/// What of the origin need not be preserved, as it was not in use at the instant.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Skipped {
    /// The ranges; sorted, disjoint.
    pub extents: Vec<Extent>,
    /// Which filesystems did not report what they use, and why; as text.
    pub notes: Vec<String>,
}

/// The work to do at the instant.
pub type AtInstant<'a> = &'a mut dyn FnMut(&InstantContext<'_>) -> Result<()>;
