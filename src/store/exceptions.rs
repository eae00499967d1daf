//! Finds the originals in the store.
//!
//! Reads the exceptions of a store in dm-snapshot's persistent format, while the kernel may be adding to it
//! or when nothing writes it any more. Facts from Linux `drivers/md/dm-snap-persistent.c`:
//!
//! 1. `persistent_commit_exception` appends entries to the current area's buffer in memory, writes the whole
//!    area with one flushed write, waits for it, and only then releases the writes to the origin that the new
//!    entries cover. One commit at a time.
//! 2. When an area is full, the next one is zeroed before the full one is written. `current_area`, from which
//!    the status line's metadata count is computed, advances only after that write has completed. A full area
//!    is never written again.
//! 3. The first area of a new store is zeroed before the snapshot exists.
//!
//! # Why the result is right while the kernel keeps writing
//!
//! Needed are the exceptions committed before the reading began (the copier's argument: every chunk that it
//! read wrongly was committed before its read ended). Let C be the `current_area` of a status taken after
//! that moment.
//!
//! - Areas before C: full and written (2), never touched again. One read is exact.
//! - Areas after C: all their entries were committed after the status, so they are not needed and not read.
//!   So old data on a reused disk is never taken for an area: C itself was zeroed (2, 3) before its first
//!   entry.
//! - Area C may be read during a write. Bytes of entries committed earlier are overwritten with the same
//!   bytes, and read correctly at any time (1). Of an entry that is being written a read may see any part: on
//!   a RAM disk or a virtual disk a write is a memory copy, which can be seen half done. The writing
//!   processor may pause in it, so that two reads see the same half. An entry with its store chunk but not
//!   yet its origin chunk would name chunk 0, and reading twice and comparing would not find that. So between
//!   two reads all writes in flight are waited for (`settle`): an entry of which the first read saw any part
//!   was being written by then, so the second read sees it whole. The number of entries is taken from the
//!   first read, their content from the second.
//!
//! Invariants: decoding never panics; every field is bounds-checked before use; memory holds at most one
//! area, and one bit per chunk for a bounded number of origin chunks.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use crate::base::limits::EXCEPTION_BATCH_MAX;
use crate::base::{Bytes, ChunkIx, ChunkSize, Error, ErrorKind, Result, ResultExt, Sectors};
use crate::dm::SnapshotStatus;
use crate::extent::Original;
use crate::format::exception_store::{
    Bounds, ENTRY_BYTES, Entry, Header, StoreError, area_offset, decode_area, listed_entries,
};
use crate::io::BlockRead;
use crate::sys::aligned::AlignedBuffer;

/// Largest number of origin chunks for which any duplicate is found: one bit each, 8 MiB in all, an origin of
/// 256 GiB with chunks of 4 KiB. For larger origins a duplicate is found only within a batch.
const DUPLICATE_CHUNKS_MAX: u64 = 64 * 1024 * 1024;

/// What may write the store while it is read.
pub enum StoreWriter<'a> {
    /// Nothing: the list ends at its first empty entry.
    None,
    /// The kernel. Then the current area is read twice, with `settle` in between.
    Kernel {
        /// The `current_area` of a status taken after the last needed exception was committed.
        current_area: u64,
        /// Returns once every write in flight is done.
        settle: Box<dyn FnMut() -> Result<()> + 'a>,
    },
}

impl<'a> StoreWriter<'a> {
    /// For a snapshot whose status was taken after the last needed exception was committed.
    ///
    /// # Errors
    /// [`ErrorKind::StoreInvalid`] if the snapshot is lost, [`ErrorKind::Kernel`] if a store with this chunk
    /// cannot have this status.
    pub fn from_status(
        status: &SnapshotStatus,
        chunk: ChunkSize,
        settle: impl FnMut() -> Result<()> + 'a,
    ) -> Result<Self> {
        let SnapshotStatus::Active { metadata, .. } = status else {
            return Err(Error::new(ErrorKind::StoreInvalid, "the snapshot is no longer valid"));
        };
        match current_area(*metadata, chunk) {
            Some(current_area) => Ok(Self::Kernel { current_area, settle: Box::new(settle) }),
            None => Err(Error::new(
                ErrorKind::Kernel,
                format!(
                    "the snapshot's status reports {metadata} of metadata, which chunks of {chunk} cannot give"
                ),
            )),
        }
    }
}

/// The area that the kernel is filling, computed from the metadata count of a status: that counts the header
/// and all areas up to the current one. None for a count that a store with this chunk cannot have.
pub(super) fn current_area(metadata: Sectors, chunk: ChunkSize) -> Option<u64> {
    let unit = chunk.sectors().get();
    (metadata.get() / unit).checked_sub(2).filter(|_| metadata.get().is_multiple_of(unit))
}

/// Reads the exceptions area by area, in the order in which they were committed.
pub struct ExceptionReader<'a, R> {
    device: R,
    bounds: Bounds,
    writer: StoreWriter<'a>,
    area: u64,
    done: bool,
    buffer: AlignedBuffer,
    /// Decoded, not yet returned; the last one is next.
    pending: Vec<Original>,
    seen: Seen,
}

impl<'a, R: BlockRead> ExceptionReader<'a, R> {
    /// Reads the header of the store on `device`. To be called after the last needed exception was committed.
    ///
    /// # Errors
    /// [`ErrorKind::StoreInvalid`] for a store that the kernel has marked invalid, [`ErrorKind::BadData`] for
    /// something that is no store or has another chunk size, I/O errors.
    pub fn open(device: R, chunk: ChunkSize, origin_bytes: Bytes, writer: StoreWriter<'a>) -> Result<Self> {
        let mut buffer = AlignedBuffer::zeroed(chunk.bytes().as_len());
        device.read_at(&mut buffer, Bytes::ZERO)?;
        let header = Header::decode(&buffer).map_err(bad_store)?;
        if !header.valid {
            return Err(Error::new(ErrorKind::StoreInvalid, "the kernel has marked the COW store invalid"));
        }
        if header.chunk != chunk {
            return Err(Error::bad_data(format!(
                "the COW store has chunks of {} instead of {chunk}",
                header.chunk
            )));
        }
        let bounds = Bounds { chunk, origin_size: origin_bytes, store_size: device.size() };
        Ok(Self {
            device,
            bounds,
            writer,
            area: 0,
            done: false,
            buffer,
            pending: Vec::new(),
            seen: Seen::new(chunk.count_for(origin_bytes)),
        })
    }

    /// At most `max` further originals, clipped at the origin's end; empty at the end.
    ///
    /// # Errors
    /// [`ErrorKind::BadData`] for an impossible exception, I/O errors.
    pub fn next_batch(&mut self, max: usize) -> Result<Vec<Original>> {
        let max = max.clamp(1, EXCEPTION_BATCH_MAX);
        let mut batch = Vec::new();
        while batch.len() < max {
            if let Some(original) = self.pending.pop() {
                batch.push(original);
            } else if self.done {
                break;
            } else {
                self.read_area()?;
            }
        }
        self.seen.check_batch(&batch)?;
        Ok(batch)
    }

    /// Decodes the next area into `pending`. Terminates: each area has a higher offset, up to the store's
    /// end.
    fn read_area(&mut self) -> Result<()> {
        self.fill_buffer()?;
        let area = decode_area(&self.buffer, 0, &self.bounds)
            .map_err(|error| bad_store(error).context(format!("metadata area {}", self.area)))?;
        for (index, entry) in area.entries.iter().enumerate().rev() {
            let original = self.original(index, *entry)?;
            self.pending.push(original);
        }
        self.done = match &self.writer {
            StoreWriter::None => !area.full,
            StoreWriter::Kernel { current_area, .. } if self.area < *current_area => {
                if !area.full {
                    let count = area.entries.len();
                    return Err(self.bad(&format!("only {count} entries, although it is not the last")));
                }
                false
            }
            StoreWriter::Kernel { .. } => true,
        };
        self.area += 1;
        Ok(())
    }

    /// Reads the next area. Entries that do not count are zeroed.
    fn fill_buffer(&mut self) -> Result<()> {
        let chunk = self.bounds.chunk;
        let offset = area_offset(self.area, chunk)
            .filter(|offset| {
                offset.checked_add(chunk.bytes()).is_some_and(|end| end <= self.bounds.store_size)
            })
            .ok_or_else(|| self.bad(&format!("past the store's end at {}", self.bounds.store_size.get())))?;
        self.device.read_at(&mut self.buffer, offset)?;
        let StoreWriter::Kernel { current_area, settle } = &mut self.writer else { return Ok(()) };
        if *current_area != self.area {
            return Ok(());
        }
        // The one area that may be changing during the read. The order of these three lines is the argument
        // at the head of this module.
        let count = listed_entries(&self.buffer).count();
        settle()?;
        self.device.read_at(&mut self.buffer, offset)?;
        if listed_entries(&self.buffer).count() < count {
            return Err(self.bad("entries have disappeared"));
        }
        self.buffer[count * ENTRY_BYTES..].fill(0);
        Ok(())
    }

    fn original(&mut self, index: usize, entry: Entry) -> Result<Original> {
        let Some((extent, store_offset)) = entry.place(&self.bounds) else {
            return Err(self.bad(&format!("entry {index} is outside the origin or the store")));
        };
        if !self.seen.insert(entry.old) {
            return Err(
                self.bad(&format!("entry {index}: origin chunk {} for the second time", entry.old.get()))
            );
        }
        Ok(Original { extent, store_offset })
    }

    fn bad(&self, what: &str) -> Error {
        Error::bad_data(format!("metadata area {} of the COW store: {what}", self.area))
    }
}

fn bad_store(error: StoreError) -> Error {
    Error::from(error).with_kind(ErrorKind::BadData)
}

/// True if the kernel has marked the store on `device` invalid. It writes the mark when it gives up the
/// snapshot, before a status reports that (`__invalidate_snapshot`): a store with the mark was still writable
/// then.
///
/// # Errors
/// I/O errors, [`ErrorKind::BadData`] for something that is no store.
pub fn is_marked_invalid(device: &impl BlockRead, chunk: ChunkSize) -> Result<bool> {
    let mut buffer = AlignedBuffer::zeroed(chunk.bytes().as_len());
    device.read_at(&mut buffer, Bytes::ZERO)?;
    Ok(!Header::decode(&buffer).map_err(bad_store)?.valid)
}

/// The origin chunks seen so far.
struct Seen {
    bits: Option<Vec<u64>>,
}

impl Seen {
    fn new(chunks: u64) -> Self {
        let words =
            usize::try_from(chunks.min(DUPLICATE_CHUNKS_MAX).div_ceil(64)).expect("at most 2^20 words");
        Self { bits: (chunks <= DUPLICATE_CHUNKS_MAX).then(|| vec![0; words]) }
    }

    /// False if it was in the set already. `chunk` must be on the origin.
    fn insert(&mut self, chunk: ChunkIx) -> bool {
        let Some(bits) = &mut self.bits else { return true };
        let word = usize::try_from(chunk.get() / 64).expect("the chunk is within the map");
        let bit = 1 << (chunk.get() % 64);
        let new = bits[word] & bit == 0;
        bits[word] |= bit;
        new
    }

    fn check_batch(&self, batch: &[Original]) -> Result<()> {
        if self.bits.is_some() {
            return Ok(());
        }
        let mut starts: Vec<Bytes> = batch.iter().map(|original| original.extent.start()).collect();
        starts.sort_unstable();
        match starts.windows(2).find(|pair| pair[0] == pair[1]) {
            None => Ok(()),
            Some(pair) => Err(Error::bad_data(format!(
                "the COW store names the origin's chunk at {} twice",
                pair[0].get()
            ))),
        }
    }
}

/// The device or file of a store, opened for (direct) reading by [`ExceptionReader`].
pub struct StoreDevice {
    file: File,
    size: Bytes,
    description: String,
}

impl StoreDevice {
    /// A store of `size` bytes; `description` names it in errors.
    #[must_use]
    pub fn new(fd: OwnedFd, size: Bytes, description: &str) -> Self {
        Self { file: fd.into(), size, description: description.to_owned() }
    }
}

impl BlockRead for StoreDevice {
    fn size(&self) -> Bytes {
        self.size
    }
    fn read_at(&self, buffer: &mut [u8], offset: Bytes) -> Result<()> {
        self.file.read_exact_at(buffer, offset.get()).io_context(|| {
            format!("read of {} bytes at {} of {}", buffer.len(), offset.get(), self.description)
        })
    }
}

#[cfg(test)]
#[path = "exceptions_tests.rs"]
mod tests;
