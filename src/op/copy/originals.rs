//! Gives the copier access to the COW store, and checks that the store is still valid.

use std::os::fd::OwnedFd;

use super::live::Live;
use crate::base::{Bytes, Error, ErrorKind, Result};
use crate::copy::{OriginalsProvider, Releases};
use crate::extent::{Extent, Original};
use crate::stack::gate::Gate;
use crate::store::{ExceptionReader, Follower, Monitor, StoreDevice};

/// Most new exceptions read for one decision about the order: a hint needs no more.
const RECENT_MAX: usize = 65_536;

/// The originals of a copy in progress.
pub struct StoreOriginals<'a> {
    live: &'a Live,
    monitor: &'a Monitor,
    gate: &'a Gate,
    reader: Option<ExceptionReader<'a, StoreDevice>>,
}

impl<'a> StoreOriginals<'a> {
    /// The originals of the copy for which `live` holds the origin.
    pub fn new(live: &'a Live, monitor: &'a Monitor, gate: &'a Gate) -> Self {
        Self { live, monitor, gate, reader: None }
    }
}

impl OriginalsProvider for StoreOriginals<'_> {
    /// Reads the status here, after the last read of the origin: the areas that it counts hold every exception that
    /// matters.
    fn open(&mut self) -> Result<(OwnedFd, String)> {
        self.check_valid()?;
        let store = self.live.store();
        let status = self.live.stack().snapshot_status(self.live.dm())?;
        // Two descriptors: one to read the list of exceptions, one for the engine.
        self.reader = Some(store.exceptions(&status)?);
        Ok((store.open_direct()?, store.name().to_owned()))
    }

    fn next_batch(&mut self, max: usize) -> Result<Vec<Original>> {
        self.reader.as_mut().expect("the copier opens the store before it asks for originals").next_batch(max)
    }

    fn check_valid(&mut self) -> Result<()> {
        self.monitor.check()?;
        self.gate.check()?;
        let status = self.live.stack().snapshot_status(self.live.dm())?;
        if !status.is_usable() {
            return Err(Error::new(ErrorKind::StoreInvalid, format!("the snapshot was lost ({status:?})"))
                .state("the origin stays in use and is unaffected; this copy is lost")
                .next("copy again with a larger store (--store-size, --store)"));
        }
        self.live.stack().check_in_place(self.live.dm())
    }
}

/// Passes regions to the gate, and finds where new exceptions appear.
pub struct StoreReleases<'a> {
    live: &'a Live,
    gate: &'a Gate,
    /// None if the order does not depend on exceptions, or the store cannot be followed: then no region is hot.
    follower: Option<Follower>,
}

impl<'a> StoreReleases<'a> {
    /// For the copy for which `live` holds the origin. `hot`: the order depends on new exceptions.
    pub fn new(live: &'a Live, gate: &'a Gate, hot: bool) -> Self {
        let follow = || match live.store().follower() {
            Ok(follower) => Some(follower),
            Err(error) => {
                tracing::warn!("which regions are written most is unknown: {error}");
                None
            }
        };
        Self { live, gate, follower: if hot { follow() } else { None } }
    }
}

impl Releases for StoreReleases<'_> {
    fn release(&mut self, region: Extent) -> Result<()> {
        self.gate.check()?;
        self.gate.release(region);
        Ok(())
    }

    fn recent(&mut self) -> Vec<Bytes> {
        let Some(follower) = &mut self.follower else { return Vec::new() };
        let status = self.live.stack().snapshot_status(self.live.dm());
        // The monitor reports a lost snapshot.
        status.and_then(|status| follower.poll(&status, RECENT_MAX)).unwrap_or_default()
    }

    fn was_slow(&mut self) -> bool {
        self.gate.take_slow()
    }
}
