//! The stores of snapshots that are kept: files that outlive a boot.
//!
//! A store is a file, shown by a loop device with direct I/O, below a device-mapper device of one `linear` line.
//! Invariants:
//! - The file has all its space allocated before a device shows it: a full filesystem makes an enlargement fail, never
//!   a write to the store.
//! - The loop device has the autoclear flag, so it ends with the device-mapper device.
//! - A file is created only under a name that is recorded already, and never replaces another file.
//!
//! Exceptions are read by [`exceptions`](super::exceptions). A store that no snapshot receives into any more is at
//! rest.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::PathBuf;

use nix::sys::statvfs::fstatvfs;

use crate::base::limits::{DIRECT_IO_ALIGN, EXCEPTION_BATCH_MAX};
use crate::base::units::SECTOR_BYTES;
use crate::base::{
    Bytes, ChunkSize, DeviceNumber, Error, ErrorKind, Result, ResultExt as _, Sectors, directory_of,
};
use crate::dm::{DeviceIdentity, Dm, SnapshotStatus, Table, Target, Udev};
use crate::extent::Extent;
use crate::sys::aligned::AlignedBuffer;
use crate::sys::loop_device;
use crate::sys::process::crash_point;

use super::exceptions::{ExceptionReader, StoreDevice, StoreWriter};
use super::place::{device_bytes, free_beyond_reserve};
use super::size;
use super::tail::{allocate, attach, extend, loop_path, refresh_loop};

/// Chunks of an origin whose exceptions are compared at once: one bit each, 32 MiB, 1 TiB with chunks of 4 KiB.
const WINDOW_CHUNKS: u64 = 1 << 28;

/// Logical block of the loop device. A snapshot's device has the largest block of those below it, and a filesystem
/// whose sectors are smaller than that cannot be mounted from it.
const BLOCK: Bytes = Bytes(SECTOR_BYTES);

/// The file of a store, and the device that shows it.
#[derive(Clone, Debug)]
pub struct PersistentStore {
    /// The device's name.
    pub device: String,
    /// Its identity.
    pub identity: DeviceIdentity,
    /// The file.
    pub path: PathBuf,
    /// Unit of copy-on-write.
    pub chunk: ChunkSize,
    /// The size of the volume.
    pub origin_bytes: Bytes,
}

/// The exceptions of a store, in numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Overlap {
    /// Chunks in the store.
    pub chunks: u64,
    /// Of these, chunks that the other store has as well.
    pub shared: u64,
}

impl PersistentStore {
    /// Creates the file, empty and with all its space.
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`]; EEXIST; I/O errors. Nothing is left then.
    pub fn create_file(&self, bytes: Bytes) -> Result<()> {
        let what = || format!("making the store {}", self.path.display());
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&self.path);
        let file = file.io_context(what)?;
        crash_point("snapshot.store.named");
        let filled = self.fill_file(&file, bytes);
        filled.map_err(|error| {
            let undo = fs::remove_file(&self.path).io_context(|| format!("removing {}", self.path.display()));
            error.after_undo(undo)
        })
    }

    fn fill_file(&self, file: &File, bytes: Bytes) -> Result<()> {
        let what = || format!("allocating {bytes} for the store {}", self.path.display());
        let space = fstatvfs(file).io_context(what)?;
        let free = free_beyond_reserve(&space);
        if free < bytes {
            return Err(Error::new(ErrorKind::NoSpace, format!("{}: only {free} is free", what()))
                .next("name another directory with --store, or a smaller --store-size"));
        }
        allocate(file, Bytes::ZERO, bytes).io_context(what)?;
        // The kernel takes a store with a zeroed first chunk for a new one.
        let zeros = vec![0u8; self.chunk.bytes().as_len()];
        file.write_all_at(&zeros, 0).and_then(|()| file.sync_all()).io_context(what)?;
        File::open(directory_of(&self.path)).and_then(|directory| directory.sync_all()).io_context(what)
    }

    /// The device's number; makes the device if there is none.
    ///
    /// # Errors
    /// I/O errors; the kernel's.
    pub fn show(&self, dm: &Dm) -> Result<DeviceNumber> {
        if let Some(info) = dm.info(self.device.as_str())? {
            if info.uuid != self.identity.uuid() {
                return Err(Error::refused(format!("the device {} is not the store's", self.device)));
            }
            if info.has_active {
                return Ok(info.number);
            }
            // Its creation was not completed.
            dm.remove(&self.device, Udev::Internal)?;
        }
        let file = self.open_file()?;
        let (device, number) = attach(&file, BLOCK, &self.path.display().to_string(), &mut Vec::new())?;
        let table = table_of(number)?;
        let made = dm.create_active(&self.device, &self.identity.uuid(), &table, Udev::Internal);
        // From here on the device-mapper device keeps it attached.
        drop(device);
        made
    }

    fn open_file(&self) -> Result<File> {
        let what = || format!("opening the store {}", self.path.display());
        OpenOptions::new().read(true).write(true).open(&self.path).io_context(what)
    }

    /// The size of the file.
    ///
    /// # Errors
    /// I/O errors.
    pub fn file_bytes(&self) -> Result<Bytes> {
        let what = || format!("examining the store {}", self.path.display());
        Ok(Bytes(fs::metadata(&self.path).io_context(what)?.len()))
    }

    /// What its filesystem has free beyond the reserve.
    ///
    /// # Errors
    /// I/O errors.
    pub fn free_beyond_reserve(&self) -> Result<Bytes> {
        let what = || format!("examining the filesystem of {}", self.path.display());
        Ok(free_beyond_reserve(&fstatvfs(&self.open_file()?).io_context(what)?))
    }

    /// The number of its filesystem.
    ///
    /// # Errors
    /// I/O errors.
    pub fn filesystem(&self) -> Result<DeviceNumber> {
        let what = || format!("examining the store {}", self.path.display());
        Ok(DeviceNumber::from_dev(fs::metadata(&self.path).io_context(what)?.dev()))
    }

    /// The error of an enlargement for which there is no space.
    #[must_use]
    pub fn no_space(&self) -> Error {
        Error::new(
            ErrorKind::NoSpace,
            format!("the filesystem of the store {} has no space beyond its reserve", self.path.display()),
        )
        .state("the store keeps its size")
        .next("make space there, or delete the oldest snapshot")
    }

    /// Enlarges file and device to at least `wanted` bytes, in whole units.
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`]: nothing has changed; I/O errors; the kernel's.
    pub fn enlarge(&self, dm: &Dm, wanted: Bytes) -> Result<()> {
        let what = || format!("enlarging the store {} to {wanted}", self.path.display());
        // Another process must not replace the device's table by one for an earlier size.
        let (file, loop_number) = self.lock(dm)?;
        let from = Bytes(file.metadata().io_context(what)?.size());
        let to = wanted.align_up(size::STORE_UNIT);
        if to > from {
            let space = fstatvfs(&file).io_context(what)?;
            if free_beyond_reserve(&space) < to - from {
                return Err(self.no_space().context(what()));
            }
            extend(&file, from, to, what)?;
            file.sync_all().io_context(what)?;
        }
        crash_point("snapshot.store.allocated");
        refresh_loop(loop_number).io_context(what)?;
        if device_bytes(loop_number)? < to {
            return Err(Error::new(ErrorKind::Kernel, format!("{}: its loop device did not grow", what())));
        }
        let table = table_of(loop_number)?;
        dm.load(self.device.as_str(), &table)?;
        dm.swap_or_resume(self.device.as_str())
    }

    /// Opens and locks the file, which must be the one that the device shows. Returns the loop device's number too.
    fn lock(&self, dm: &Dm) -> Result<(File, DeviceNumber)> {
        let what = || format!("locking the store {}", self.path.display());
        let file = self.open_file()?;
        file.lock().io_context(what)?;
        let table = dm.active_table(&self.device)?;
        let [number] = table.devices()[..] else {
            return Err(Error::refused(format!(
                "the device {} does not have the store's table",
                self.device
            )));
        };
        let shown = loop_device::status(&loop_path(number)?).io_context(what)?;
        let metadata = file.metadata().io_context(what)?;
        let is_shown = shown.is_some_and(|shown| {
            (shown.backing_dev, shown.backing_inode) == (metadata.dev(), metadata.ino())
        });
        if !is_shown {
            return Err(Error::refused(format!(
                "{} was replaced: it is not the store's file",
                self.path.display()
            ))
            .state("the store keeps its size"));
        }
        Ok((file, number))
    }

    /// Removes the device, if there is one, and then the file.
    ///
    /// # Errors
    /// I/O errors; the kernel's.
    pub fn remove(&self, dm: &Dm) -> Result<()> {
        self.hide(dm)?;
        crash_point("snapshot.store.hidden");
        let what = || format!("removing the store {}", self.path.display());
        match fs::remove_file(&self.path) {
            // Not mounted is not removed.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                fs::metadata(directory_of(&self.path)).io_context(what).map(drop)
            }
            removed => removed.io_context(what),
        }
    }

    /// Removes the device, if there is one. The file stays.
    ///
    /// # Errors
    /// The kernel's.
    pub fn hide(&self, dm: &Dm) -> Result<()> {
        dm.remove_if_it_is(&self.device, &self.identity)
    }

    /// Reads the exceptions. `status`: that of the snapshot that receives into the store; None if it is at rest.
    fn exceptions<'a>(
        &'a self,
        dm: &'a Dm,
        status: Option<&SnapshotStatus>,
    ) -> Result<ExceptionReader<'a, StoreDevice>> {
        let number = dm.info_of(self.device.as_str())?.number;
        let device: OwnedFd = dm.open_device(number, false, libc::O_DIRECT)?.into();
        let device = StoreDevice::new(device, device_bytes(number)?, &format!("the store {}", self.device));
        let writer = match status {
            Some(status) => StoreWriter::from_status(status, self.chunk, || self.settle(dm))?,
            None => StoreWriter::None,
        };
        ExceptionReader::open(device, self.chunk, self.origin_bytes, writer)
    }

    /// Returns once every write in flight is done: a table is replaced only then.
    fn settle(&self, dm: &Dm) -> Result<()> {
        let _lock = self.lock(dm)?;
        let table = dm.active_table(&self.device)?;
        dm.load(self.device.as_str(), &table)?;
        dm.swap_or_resume(self.device.as_str())
    }

    /// Counts the exceptions, and those that `other`, which is at rest, has too.
    ///
    /// # Errors
    /// As [`PersistentStore::missing`].
    pub fn overlap(
        &self,
        dm: &Dm,
        status: Option<&SnapshotStatus>,
        other: Option<&Self>,
        interrupt: &dyn Fn() -> Result<()>,
    ) -> Result<Overlap> {
        let mut overlap = Overlap::default();
        let Some(other) = other else {
            self.each(dm, status, interrupt, &mut |_| overlap.chunks += 1)?;
            return Ok(overlap);
        };
        self.each_window(dm, (status, other), interrupt, &mut |_, is_shared| {
            overlap.chunks += 1;
            overlap.shared += u64::from(is_shared);
            Ok(())
        })?;
        Ok(overlap)
    }

    /// Calls `each` for the extent of each exception, in no order.
    ///
    /// # Errors
    /// As [`PersistentStore::missing`].
    pub fn each(
        &self,
        dm: &Dm,
        status: Option<&SnapshotStatus>,
        interrupt: &dyn Fn() -> Result<()>,
        each: &mut dyn FnMut(Extent),
    ) -> Result<()> {
        let mut reader = self.exceptions(dm, status)?;
        loop {
            interrupt()?;
            let batch = reader.next_batch(EXCEPTION_BATCH_MAX)?;
            if batch.is_empty() {
                return Ok(());
            }
            batch.iter().for_each(|original| each(original.extent));
        }
    }

    /// The extents that this store has and `other` has not, sorted within each window of the volume, merged up to
    /// `longest`. Both are at rest. Memory is bounded whatever their size.
    ///
    /// # Errors
    /// [`ErrorKind::StoreInvalid`] if the kernel has marked one invalid, [`ErrorKind::BadData`], I/O errors, those of
    /// `each` and `interrupt`.
    pub fn missing(
        &self,
        dm: &Dm,
        other: &Self,
        longest: Bytes,
        interrupt: &dyn Fn() -> Result<()>,
        each: &mut dyn FnMut(Extent) -> Result<()>,
    ) -> Result<()> {
        let mut batch: Vec<Extent> = Vec::new();
        self.each_window(dm, (None, other), interrupt, &mut |extent, is_shared| {
            if !is_shared {
                batch.push(extent);
            }
            if batch.len() >= EXCEPTION_BATCH_MAX { flush(&mut batch, longest, each) } else { Ok(()) }
        })?;
        flush(&mut batch, longest, each)
    }

    /// Calls `each` for each chunk of this store, with whether `other` has it too.
    fn each_window(
        &self,
        dm: &Dm,
        (status, other): (Option<&SnapshotStatus>, &Self),
        interrupt: &dyn Fn() -> Result<()>,
        each: &mut dyn FnMut(Extent, bool) -> Result<()>,
    ) -> Result<()> {
        let chunks = self.chunk.count_for(self.origin_bytes);
        let mut first = 0;
        while first < chunks {
            let window = first..(first + WINDOW_CHUNKS).min(chunks);
            let chunk_of = |extent: Extent| extent.start().get() / self.chunk.bytes().get();
            let mut bits = vec![0u64; Bytes((window.end - window.start).div_ceil(64)).as_len()];
            let place = |chunk: u64| {
                (Bytes((chunk - window.start) / 64).as_len(), 1u64 << ((chunk - window.start) % 64))
            };
            other.each(dm, None, interrupt, &mut |extent| {
                let chunk = chunk_of(extent);
                if window.contains(&chunk) {
                    let (word, bit) = place(chunk);
                    bits[word] |= bit;
                }
            })?;
            let mut reader = self.exceptions(dm, status)?;
            loop {
                interrupt()?;
                let batch = reader.next_batch(EXCEPTION_BATCH_MAX)?;
                if batch.is_empty() {
                    break;
                }
                for extent in batch.iter().map(|original| original.extent) {
                    let chunk = chunk_of(extent);
                    if window.contains(&chunk) {
                        let (word, bit) = place(chunk);
                        each(extent, bits[word] & bit != 0)?;
                    }
                }
            }
            first = window.end;
        }
        Ok(())
    }
}

/// Passes on what `batch` has, sorted and merged, and empties it.
fn flush(batch: &mut Vec<Extent>, longest: Bytes, each: &mut dyn FnMut(Extent) -> Result<()>) -> Result<()> {
    batch.sort_unstable();
    let mut run: Option<Extent> = None;
    for extent in batch.drain(..) {
        run = match run {
            Some(open) if open.end() == extent.start() && extent.end() - open.start() <= longest => {
                Extent::new(open.start(), extent.end())
            }
            Some(open) => {
                each(open)?;
                Some(extent)
            }
            None => Some(extent),
        };
    }
    run.map_or(Ok(()), each)
}

/// Copies `extents` of `device` onto themselves: through a snapshot, this gives it exceptions of its own.
///
/// # Errors
/// I/O errors.
pub fn rewrite(device: &File, extent: Extent, buffer: &mut AlignedBuffer) -> Result<()> {
    let what = || format!("copying up {extent}");
    let part = &mut buffer[..extent.length().as_len()];
    device.read_exact_at(part, extent.start().get()).io_context(what)?;
    device.write_all_at(part, extent.start().get()).io_context(what)
}

fn table_of(number: DeviceNumber) -> Result<Table> {
    let length = device_bytes(number)?.align_down(DIRECT_IO_ALIGN).to_sectors("the store")?;
    Table::single(length, Target::Linear { device: number, offset: Sectors::ZERO })
}
