//! Shows the COW store to the copier, and says whether it can still be believed.

use std::os::fd::OwnedFd;

use super::live::Live;
use crate::base::{Error, ErrorKind, Result};
use crate::copy::OriginalsProvider;
use crate::extent::Original;
use crate::store::{ExceptionReader, Monitor, StoreDevice};

/// The originals of a copy in progress.
pub struct StoreOriginals<'a> {
    live: &'a Live,
    monitor: &'a Monitor,
    reader: Option<ExceptionReader<'a, StoreDevice>>,
}

impl<'a> StoreOriginals<'a> {
    /// For the copy that `live` holds the origin for.
    pub fn new(live: &'a Live, monitor: &'a Monitor) -> Self {
        Self { live, monitor, reader: None }
    }
}

impl OriginalsProvider for StoreOriginals<'_> {
    /// The status is taken here, after the last read of the origin: every exception that matters is
    /// in the areas that it counts.
    fn open(&mut self) -> Result<(OwnedFd, String)> {
        self.check_valid()?;
        let store = self.live.store();
        let status = self.live.stack().snapshot_status(self.live.dm())?;
        // Two descriptors: the list of exceptions is read through one, the engine owns the other.
        self.reader = Some(store.exceptions(&status)?);
        Ok((store.open_direct()?, store.name().to_owned()))
    }

    fn next_batch(&mut self, max: usize) -> Result<Vec<Original>> {
        self.reader.as_mut().expect("the copier opens the store before it asks for originals").next_batch(max)
    }

    fn check_valid(&mut self) -> Result<()> {
        self.monitor.check()?;
        let status = self.live.stack().snapshot_status(self.live.dm())?;
        if !status.is_usable() {
            return Err(Error::new(ErrorKind::StoreInvalid, format!("the snapshot was lost ({status:?})"))
                .state("the origin is untouched and goes on; this copy is void")
                .next("copy again with a larger store (--store-size, --store)"));
        }
        self.live.stack().check_in_place(self.live.dm())
    }
}
