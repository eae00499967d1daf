//! The store itself: created, grown, settled, released or kept.
//!
//! One device-mapper device of `linear` lines: the RAM head, then the tail. The tail is one piece, or several
//! if a process has taken the store over from another ([`adopt`](super::adopt)). While the store fits in the
//! head, the tail is attached and allocated but not in the table: the kernel flushes every device of the
//! table with each batch of exceptions, and a flush of the tail's file costs more than the head saves. The
//! tail joins as the head fills ([`size::should_join`]).
//!
//! To change the table, it is loaded, and the device is resumed *while in use*: the kernel then suspends,
//! swaps and resumes within that one call. So a crash of this process can never leave the store, and the
//! origin's first writes with it, suspended.
//!
//! Order of creation, the crash argument (see also [`record`](super::record)):
//! 1. the record, before the head: so the head can always be released;
//! 2. the tail: an unnamed file attached to an autoclear loop device that we hold open. A file that is to be
//!    kept has a name, which is in the record too;
//! 3. the device-mapper device with its UUID: from here on `recover` finds it by that;
//! 4. a zeroed first chunk: the kernel takes a store with a zeroed first chunk for a new one, and would
//!    continue with the exceptions of an old store if it found any.

use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::Serialize;

use crate::base::limits::DIRECT_IO_ALIGN;
use crate::base::units::SECTOR_BYTES;
use crate::base::{Bytes, ChunkSize, DeviceNumber, Error, Result, ResultExt, Sectors};
use crate::dm::naming::{self, DeviceIdentity, ROLE_COW};
use crate::dm::{Dm, SnapshotStatus, Table, Target, Udev};
use crate::sys::aligned::AlignedBuffer;
use crate::sys::process::crash_point;

use super::exceptions::{self, ExceptionReader, StoreDevice, StoreWriter};
use super::follow::Follower;
use super::head::Head;
use super::place::TailPlace;
use super::plan::{StoreConfig, StorePlan};
use super::record::{About, HeadRecord, RECORD_DIR, Record};
use super::size::{self, FillRate};
use super::tail::Tail;

/// Attempts to swap the table, as signals may interrupt the kernel's wait for writes in flight.
const SWAP_ATTEMPTS: u32 = 20;

/// The result of a growth.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Grown {
    /// Size before, in bytes.
    pub from: Bytes,
    /// Size now, in bytes.
    pub to: Bytes,
}

/// A store that was kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct KeptStore {
    /// The file or block device that holds it, starting at the first byte.
    pub path: PathBuf,
    /// Its unit of copy-on-write, in bytes.
    pub chunk: ChunkSize,
}

/// A COW store in use. All methods may be called from any thread.
pub struct CowStore {
    name: String,
    number: DeviceNumber,
    origin_bytes: Bytes,
    plan: StorePlan,
    warnings: Vec<String>,
    parts: Mutex<Parts>,
}

/// Invariant: the device's table is the head, followed by no tail or by all of them, each whole. Space that
/// was added to the last tail but not mapped lies after everything that is mapped.
pub(super) struct Parts {
    pub(super) dm: Dm,
    pub(super) head: Option<Head>,
    pub(super) tails: Vec<Tail>,
    /// True if the tails are in the table.
    pub(super) tails_joined: bool,
    /// Length of the device's table.
    pub(super) mapped: Bytes,
    pub(super) record: Record,
}

impl CowStore {
    /// Creates the store that `config` describes.
    ///
    /// # Errors
    /// As [`StoreConfig::plan`], and I/O and kernel errors. Whatever was created is released.
    pub fn create(config: &StoreConfig) -> Result<Self> {
        let plan = config.plan()?;
        let uuid = DeviceIdentity::new(&config.volume, ROLE_COW, &config.job).uuid();
        let name = naming::stack_device_name(&config.origin_name, ROLE_COW, &config.job);
        let dm = Dm::open()?;
        let mut warnings = Vec::new();
        let about = About {
            uuid: uuid.clone(),
            device: name.clone(),
            origin_bytes: config.origin_bytes,
            plan: plan.clone(),
        };
        let mut record = Record::create(Path::new(RECORD_DIR), &config.id, about)?;
        crash_point("store.create.record");
        let head = match make_head(&plan, &mut record, &mut warnings) {
            Ok(head) => head,
            Err(error) => return Err(undo_creation(None, None, record, error)),
        };
        crash_point("store.create.head");
        // If there is no head, the tail's planned size alone counts.
        let keep_as = plan.keep.then(|| format!("{name}-{}.store", config.id));
        let made = Tail::make(&plan.place, plan.tail_bytes, keep_as.as_deref(), &mut record, &mut warnings);
        let tail = match made {
            Ok(tail) => tail,
            Err(error) => return Err(undo_creation(head, None, record, error)),
        };
        crash_point("store.create.tail");
        let tails_joined =
            head.is_none() || size::should_join(plan.head_bytes, Bytes::ZERO, &FillRate::default());
        let in_table = if tails_joined { std::slice::from_ref(&tail) } else { &[] };
        let made = table_of(head.as_ref(), in_table)
            .and_then(|table| make_device(&dm, &name, &uuid, &table, plan.chunk).map(|made| (made, table)));
        match made {
            Ok((number, table)) => {
                let mapped = table.length().bytes();
                let parts = Parts { dm, head, tails: vec![tail], tails_joined, mapped, record };
                let origin_bytes = config.origin_bytes;
                Ok(Self { name, number, origin_bytes, plan, warnings, parts: Mutex::new(parts) })
            }
            Err(error) => Err(undo_creation(head, Some(tail), record, error)),
        }
    }

    /// A store that another process created, as found by [`adopt`](super::adopt).
    pub(super) fn from_parts(number: DeviceNumber, parts: Parts) -> Self {
        let About { device, origin_bytes, plan, .. } = parts.record.facts().about.clone();
        Self { name: device, number, origin_bytes, plan, warnings: Vec::new(), parts: Mutex::new(parts) }
    }

    /// Name of its device.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Number of its device.
    #[must_use]
    pub fn number(&self) -> DeviceNumber {
        self.number
    }

    /// Its plan.
    #[must_use]
    pub fn plan(&self) -> &StorePlan {
        &self.plan
    }

    /// Warnings about its creation, for the user.
    #[must_use]
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Its devices: its own, and every part, including those that are not in the table yet.
    #[must_use]
    pub fn devices(&self) -> Vec<DeviceNumber> {
        let parts = self.lock();
        let head = parts.head.iter().map(|head| head.number);
        head.chain(parts.tails.iter().map(|tail| tail.number)).chain([self.number]).collect()
    }

    /// Size of its RAM head; zero if there is none.
    #[must_use]
    pub fn ram_bytes(&self) -> Bytes {
        self.lock().head_bytes()
    }

    /// Head and tail together, whether the tail has joined or not.
    #[must_use]
    pub fn total_bytes(&self) -> Bytes {
        self.lock().total()
    }

    /// Size of its table: the head alone, or head and tail.
    #[must_use]
    pub fn mapped_bytes(&self) -> Bytes {
        self.lock().mapped
    }

    /// Opens its device for direct reading.
    ///
    /// # Errors
    /// I/O errors with the path.
    pub fn open_direct(&self) -> Result<OwnedFd> {
        Ok(self.lock().dm.open_device(self.number, false, libc::O_DIRECT)?.into())
    }

    /// Enlarges the store if the free space would not last (see [`size`]), given that `used` bytes are in use
    /// and it fills at `rate`. None if nothing had to be done.
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`](crate::base::ErrorKind::NoSpace) if the tail's place is full; the store remains
    /// usable.
    pub fn grow_ahead(&self, used: Bytes, rate: &FillRate) -> Result<Option<Grown>> {
        let mut parts = self.lock();
        let from = parts.mapped;
        let join = parts.tails_joined || size::should_join(parts.head_bytes(), used, rate);
        // Allocation takes longest, so a head that is about to fill gets the existing tail first.
        if join && !parts.tails_joined && !parts.tails.is_empty() {
            parts.load(&self.name, true)?;
        }
        let next = size::next_total(parts.total(), used, self.plan.total_bytes_max, rate);
        if let (Some(next), Some(directory)) = (next, self.plan.place.directory())
            && !parts.tail_is_fixed()
        {
            parts.enlarge(&directory, next)?;
            crash_point("store.grow.made");
        }
        // Also maps what an earlier growth could not: space that is not mapped is of no use.
        if join && parts.mapped < parts.total() {
            parts.load(&self.name, true)?;
        }
        let to = parts.mapped;
        Ok((to != from).then_some(Grown { from, to }))
    }

    /// Returns once every write to the store that was in flight has completed. It swaps the table for the
    /// same table, and the kernel completes writes in flight before it does that.
    ///
    /// # Errors
    /// The kernel's; the store remains usable.
    pub fn settle(&self) -> Result<()> {
        let mut parts = self.lock();
        let with_tails = parts.tails_joined;
        parts.load(&self.name, with_tails)
    }

    /// Reads its originals while the snapshot is active. The caller got `status` after the last read of the
    /// origin had completed (see [`exceptions`]).
    ///
    /// # Errors
    /// As [`StoreWriter::from_status`] and [`ExceptionReader::open`].
    pub fn exceptions(&self, status: &SnapshotStatus) -> Result<ExceptionReader<'_, StoreDevice>> {
        let writer = StoreWriter::from_status(status, self.plan.chunk, || self.settle())?;
        ExceptionReader::open(self.device_to_read()?, self.plan.chunk, self.origin_bytes, writer)
    }

    /// Follows the exceptions as they appear: a hint for the order of copying, see [`follow`](super::follow).
    /// The follower holds the device open: drop it before [`CowStore::release`].
    ///
    /// # Errors
    /// As [`CowStore::open_direct`].
    pub fn follower(&self) -> Result<Follower> {
        Ok(Follower::new(self.device_to_read()?, self.plan.chunk, self.origin_bytes))
    }

    /// True if the kernel has marked the store invalid; see [`exceptions::is_marked_invalid`].
    ///
    /// # Errors
    /// As that function, and as [`CowStore::open_direct`].
    pub fn is_marked_invalid(&self) -> Result<bool> {
        exceptions::is_marked_invalid(&self.device_to_read()?, self.plan.chunk)
    }

    /// The store may grow while it is read, so the size is the maximum; a read past the present end fails.
    fn device_to_read(&self) -> Result<StoreDevice> {
        let size = self.plan.total_bytes_max.max(self.mapped_bytes());
        Ok(StoreDevice::new(self.open_direct()?, size, &format!("the COW store {}", self.name)))
    }

    /// True if the store cannot become larger.
    #[must_use]
    pub fn is_at_its_largest(&self) -> bool {
        let parts = self.lock();
        let fixed = self.plan.place.directory().is_none() || parts.tail_is_fixed();
        parts.tails_joined && (fixed || parts.total() >= self.plan.total_bytes_max)
    }

    /// False if the store has room for every chunk of the origin, so that it never runs out.
    #[must_use]
    pub fn can_fill_up(&self) -> bool {
        size::worst_case(self.origin_bytes, self.plan.chunk).is_ok_and(|worst| self.mapped_bytes() < worst)
    }

    /// Releases everything, once no snapshot uses the store any more. With `keep`, a store that was created
    /// to be kept stays, synced; otherwise its file is removed.
    ///
    /// A file to be kept belongs to the user once the record no longer names it. That is recorded when the
    /// file and its name are synced and the device is removed. A crash before that leaves a file that
    /// `recover` removes, as it was never reported as kept; a crash after that leaves a complete store.
    ///
    /// # Errors
    /// The first failure, with the others as failed undos; [`release_leftovers`] retries.
    ///
    /// [`release_leftovers`]: super::release_leftovers
    pub fn release(self, keep: bool) -> Result<Option<KeptStore>> {
        let mut parts = self.parts.into_inner().unwrap_or_else(PoisonError::into_inner);
        parts.dm.remove(&self.name, Udev::Internal).map_err(|error| {
            error.state("the COW store remains").next("run 'tidemark recover', which removes it")
        })?;
        crash_point("store.release.device");
        let keep = keep && self.plan.keep;
        let mut path = match &self.plan.place {
            TailPlace::Device { path, .. } if keep => Some(path.clone()),
            _ => None,
        };
        let mut errors = Vec::new();
        for tail in std::mem::take(&mut parts.tails) {
            match tail.release(keep, &mut parts.record) {
                Ok(file) => path = file.or(path),
                Err(error) => errors.push(error),
            }
        }
        let tails_released = errors.is_empty();
        match parts.head.as_ref().map_or(Ok(()), Head::release) {
            Err(error) => errors.push(error),
            // The record remains as long as something could not be released: recover retries.
            Ok(()) if tails_released => errors.extend(parts.record.close().err()),
            Ok(()) => errors.extend(parts.record.note(HeadRecord::Nothing).err()),
        }
        Error::first_of(errors).map(|()| path.map(|path| KeptStore { path, chunk: self.plan.chunk })).map_err(
            |error| {
                error
                    .state("a part of the COW store remains")
                    .next("run 'tidemark recover', which removes it")
            },
        )
    }

    fn lock(&self) -> MutexGuard<'_, Parts> {
        // Usable after a panic: after each step the parts agree with the kernel.
        self.parts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Parts {
    fn head_bytes(&self) -> Bytes {
        self.head.as_ref().map_or(Bytes::ZERO, |head| head.bytes)
    }

    fn total(&self) -> Bytes {
        self.tails.iter().fold(self.head_bytes(), |sum, tail| sum + tail.bytes.align_down(DIRECT_IO_ALIGN))
    }

    /// True if the last tail cannot be enlarged and no further one can be made.
    fn tail_is_fixed(&self) -> bool {
        let enlargeable = self.tails.last().is_some_and(Tail::can_grow);
        !enlargeable && self.tails.len() >= size::TAIL_COUNT_MAX
    }

    /// Allocates more space, up to `next` in all if available. It is not in the table yet.
    fn enlarge(&mut self, directory: &Path, next: Bytes) -> Result<()> {
        let missing = next.saturating_sub(self.total());
        match self.tails.last_mut().filter(|tail| tail.can_grow()) {
            Some(last) => {
                last.grow(last.bytes + missing)?;
            }
            None => self.tails.push(Tail::make_further(directory, missing, &mut self.record)?),
        }
        Ok(())
    }

    /// Loads the table, then resumes the device while in use, which swaps the tables in one call.
    fn load(&mut self, name: &str, with_tails: bool) -> Result<()> {
        let table = table_of(self.head.as_ref(), if with_tails { &self.tails } else { &[] })?;
        self.dm.load(name, &table)?;
        crash_point("store.swap.loaded");
        let mut attempt = 1;
        loop {
            match self.dm.resume(name, Udev::None) {
                Err(error) if error.errno() == Some(libc::EINTR) && attempt < SWAP_ATTEMPTS => attempt += 1,
                Err(error) => {
                    // The kernel suspends first, and leaves the device suspended if the tables cannot be
                    // swapped.
                    return Err(match self.dm.clear(name).and_then(|()| self.dm.resume_if_suspended(name)) {
                        Ok(()) => error.state("the store remains usable with the table it had"),
                        Err(undo) => error.with_failed_undo(undo),
                    });
                }
                Ok(()) => {
                    self.tails_joined = with_tails;
                    self.mapped = table.length().bytes();
                    return Ok(());
                }
            }
        }
    }
}

fn make_head(plan: &StorePlan, record: &mut Record, warnings: &mut Vec<String>) -> Result<Option<Head>> {
    if plan.head_bytes == Bytes::ZERO {
        return Ok(None);
    }
    match Head::make(plan.head_bytes, record)? {
        Ok(head) => Ok(Some(head)),
        Err(why) => {
            warnings.push(format!("the store has no RAM head: {why}; all originals go to disk"));
            Ok(None)
        }
    }
}

fn table_of(head: Option<&Head>, tails: &[Tail]) -> Result<Table> {
    let head = head.map(|head| (head.number, head.bytes));
    let tails = tails.iter().map(|tail| (tail.number, tail.bytes));
    let parts = head.into_iter().chain(tails).map(|(device, bytes)| {
        let length = bytes.align_down(DIRECT_IO_ALIGN).to_sectors("a part of the store")?;
        Ok((length, Target::Linear { device, offset: Sectors::ZERO }))
    });
    Table::concatenated(parts.collect::<Result<Vec<_>>>()?)
}

fn make_device(dm: &Dm, name: &str, uuid: &str, table: &Table, chunk: ChunkSize) -> Result<DeviceNumber> {
    let number = dm.create_active(name, uuid, table, Udev::Internal)?;
    match zero_first_chunk(dm, number, chunk) {
        Ok(()) => Ok(number),
        Err(error) => Err(error.after_undo(dm.remove(name, Udev::Internal))),
    }
}

fn zero_first_chunk(dm: &Dm, number: DeviceNumber, chunk: ChunkSize) -> Result<()> {
    let device = dm.open_device(number, true, libc::O_DIRECT)?;
    let zeros = AlignedBuffer::zeroed(chunk.bytes().as_len());
    device
        .write_all_at(&zeros, 0)
        .and_then(|()| device.sync_all())
        .io_context(|| format!("zeroing the first chunk of the store (device {number})"))
}

/// After a failed creation: releases the parts. Returns `error`, with what could not be released.
fn undo_creation(head: Option<Head>, tail: Option<Tail>, record: Record, error: Error) -> Error {
    let (mut error, mut record) = (error, record);
    let mut all_given = true;
    if let Some(tail) = tail
        && let Err(undo) = tail.release(false, &mut record)
    {
        all_given = false;
        error = error.with_failed_undo(undo);
    }
    let given = match head.as_ref().map_or(Ok(()), Head::release) {
        // The record remains as long as something could not be released: recover retries.
        Err(undo) => Err(undo),
        Ok(()) if all_given => record.close(),
        Ok(()) => record.note(HeadRecord::Nothing),
    };
    error.after_undo(given)
}

const _: () = assert!(DIRECT_IO_ALIGN.get().is_multiple_of(SECTOR_BYTES));
