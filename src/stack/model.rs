//! The request for stacks, and what is known of a stack: plain values.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::base::{Bytes, ChunkSize, DeviceNumber, Error, Result};
use crate::dm::Table;
use crate::extent::Extent;
use crate::volume::FreezeSet;
use crate::volume::lvm_lock::LvmScope;
use crate::volume::subset::Omission;

/// Which stacks to insert at one instant.
#[derive(Clone, Debug)]
pub struct InsertRequest {
    /// One for each origin. No origin is on another one.
    pub stacks: Vec<StackRequest>,
    /// Mount points of every filesystem on the origins, one each, in the order of freezing.
    pub filesystems: Vec<PathBuf>,
    /// The filesystems on the origins as found by the plan, checked again before anything is done; None if
    /// there was no plan.
    pub planned: Option<FreezeSet>,
    /// Longest time that anything may be frozen or suspended.
    pub budget: Duration,
    /// How long lvm2 is locked out.
    pub lvm_lock: LvmScope,
}

/// Which stack to insert, over which origin.
#[derive(Clone, Debug)]
pub struct StackRequest {
    /// The origin's device-mapper name.
    pub origin: String,
    /// The COW store's device, its first chunk zeroed.
    pub cow: DeviceNumber,
    /// Unit of copy-on-write.
    pub chunk: ChunkSize,
    /// Let the suspension freeze what is mounted on the device itself: for mounts that are out of reach.
    pub lock_filesystem: bool,
    /// Preserve everything, including what filesystems do not use.
    pub all: bool,
    /// What the user leaves out.
    pub omission: Option<Arc<Omission>>,
    /// The origin's own table as found by the plan, checked again before anything is done; None if there was
    /// no plan.
    pub planned_table: Option<Table>,
}

impl InsertRequest {
    /// The request with the devices of the COW stores, in the order of the origins.
    ///
    /// # Panics
    /// If there is not one store for each origin: a broken invariant.
    #[must_use]
    pub fn with_stores(&self, cows: &[DeviceNumber]) -> Self {
        assert_eq!(cows.len(), self.stacks.len(), "one store for each origin");
        let stacks =
            self.stacks.iter().zip(cows).map(|(stack, cow)| StackRequest { cow: *cow, ..stack.clone() });
        Self { stacks: stacks.collect(), ..self.clone() }
    }

    /// The request, updated to the present: a filesystem may be mounted at another place now. `found` has the
    /// number and the own table of each origin.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) if an origin is no longer as planned.
    pub(super) fn recheck(&self, found: &[(DeviceNumber, Table)]) -> Result<Self> {
        for (stack, (_, table)) in self.stacks.iter().zip(found) {
            if stack.planned_table.as_ref().is_some_and(|planned| planned != table) {
                return Err(Error::refused(format!(
                    "the table of {} was changed since the copy was planned",
                    stack.origin
                ))
                .state("nothing was frozen, and the origin was not changed")
                .next("copy again, and do not resize or move the volume meanwhile"));
            }
        }
        let Some(planned) = &self.planned else { return Ok(self.clone()) };
        let numbers: Vec<DeviceNumber> = found.iter().map(|(number, _)| *number).collect();
        let frozen = planned.recheck(&numbers, "since the copy was planned")?;
        let stacks = self.stacks.iter().zip(&numbers).map(|(stack, number)| StackRequest {
            lock_filesystem: frozen.frozen_by_suspension.contains(number),
            ..stack.clone()
        });
        Ok(Self {
            stacks: stacks.collect(),
            filesystems: frozen.points.clone(),
            planned: Some(frozen),
            ..self.clone()
        })
    }
}

/// What the caller may use at the instant.
#[derive(Clone, Copy, Debug)]
pub struct InstantContext<'a> {
    /// The devices `real`, in the order of the origins: readable, and unchanged until the origins are resumed.
    pub below: &'a [PathBuf],
    /// When the budget ends.
    pub deadline: Instant,
}

/// How long the origins were held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HoldTimes {
    /// Syncing the filesystems, before anything is held.
    pub synced: Duration,
    /// From the first freeze to the last thaw.
    pub frozen: Duration,
    /// From the start of the first suspension to the end of the last resume.
    pub suspended: Duration,
    /// The instant, UTC, in nanoseconds since 1970: all origins were suspended.
    pub instant_utc_ns: u64,
}

/// What of an origin need not be preserved, as it was not in use at the instant, or the user leaves it out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Skipped {
    /// The ranges; sorted, disjoint.
    pub extents: Vec<Extent>,
    /// Which filesystems did not report what they use, and why; as text.
    pub notes: Vec<String>,
    /// The part of `extents` that the user leaves out; None if everything is wanted.
    pub omitted: Option<Bytes>,
    /// Why not more of it was left out; as text.
    pub omission_notes: Vec<String>,
}

/// The work to do at the instant.
pub type AtInstant<'a> = &'a mut dyn FnMut(&InstantContext<'_>) -> Result<()>;
