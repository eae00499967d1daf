//! Which originals does the store hold?
//!
//! Reads the exceptions of a store in dm-snapshot's persistent format while the kernel may be adding
//! to it, or when nobody writes it any more. Facts from Linux `drivers/md/dm-snap-persistent.c`:
//!
//! 1. `persistent_commit_exception` puts entries into the current area's buffer in memory, only ever
//!    behind those already there, writes the whole area with one flushed write, waits for it, and only
//!    then lets the writes to the origin go whose originals it names. One commit at a time.
//! 2. When an area is full, the next one is zeroed before the full one is written; `current_area`,
//!    from which the status line's metadata count is made, moves on only after that write is done. A
//!    full area is never written again.
//! 3. A new store's first area is zeroed before the snapshot exists.
//!
//! # Why what is read is right, though the kernel goes on writing
//!
//! Needed are the exceptions committed before the reading began (the copier's argument: every chunk
//! that it read wrongly was committed before its read ended). Let C be the `current_area` of a status
//! taken after that moment.
//!
//! - Areas before C: full and written (2), never again touched. One read is exact.
//! - Areas behind C: whatever they hold was committed after the status: not needed, not read. So
//!   nobody's old data on a reused disk can be taken for an area either: C itself was zeroed (2, 3)
//!   before its first entry.
//! - Area C may be in the middle of a write while it is read. Bytes of entries committed earlier are
//!   written over with themselves and read right at any time (1). But of an entry being written a
//!   read may see any part: on a RAM disk or a virtual one a write is a memory copy, which can be seen
//!   half done, and the writing processor may pause there, so that two reads agree on the same
//!   half. A half-written entry with its store chunk but not yet its origin chunk would name chunk 0:
//!   reading twice and comparing does not help. So between two reads all writes in flight are waited
//!   for (`settle`): an entry that the first read saw in any part was being written before it, so the
//!   second read sees it whole. How many entries there are is taken from the first read, what
//!   they say from the second.
//!
//! Invariants: decoding never panics; every field is bounded before it is used; at most one area and
//! one bit per chunk of a bounded number of origin chunks are in memory.

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

/// Origin chunks among which one named twice is found wherever it is: one bit each, 8 MiB in all, an
/// origin of 256 GiB with chunks of 4 KiB. Beyond that it is found within a batch.
const DUPLICATE_CHUNKS_MAX: u64 = 64 * 1024 * 1024;

/// Who may be writing the store while it is read.
pub enum Writing<'a> {
    /// Nobody: the list ends where it ends.
    Nobody,
    /// The kernel. See the module's head.
    Kernel {
        /// `current_area` by a status taken after the last needed exception was committed.
        current_area: u64,
        /// Returns once every write in flight is done.
        settle: Box<dyn FnMut() -> Result<()> + 'a>,
    },
}

impl<'a> Writing<'a> {
    /// For a snapshot whose status was taken after the last needed exception was committed.
    ///
    /// # Errors
    /// [`ErrorKind::StoreInvalid`] where the snapshot is lost, [`ErrorKind::Kernel`] where the status
    /// cannot be one of a store with this chunk.
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
                format!("the snapshot's status speaks of {metadata} of metadata with chunks of {chunk}"),
            )),
        }
    }
}

/// The area that the kernel is filling, from its count of metadata: the header and all areas up to that
/// one. None for a count that cannot be one of a store with this chunk.
pub(super) fn current_area(metadata: Sectors, chunk: ChunkSize) -> Option<u64> {
    let unit = chunk.sectors().get();
    (metadata.get() / unit).checked_sub(2).filter(|_| metadata.get().is_multiple_of(unit))
}

/// Reads exceptions, area by area. See the module's head.
pub struct ExceptionReader<'a, R> {
    device: R,
    bounds: Bounds,
    writing: Writing<'a>,
    area: u64,
    done: bool,
    buffer: AlignedBuffer,
    /// Decoded, not yet handed out; the last one is next.
    pending: Vec<Original>,
    seen: Seen,
}

impl<'a, R: BlockRead> ExceptionReader<'a, R> {
    /// Reads the header of the store on `device`. Call it after the last needed exception was
    /// committed.
    ///
    /// # Errors
    /// [`ErrorKind::StoreInvalid`] for a store that the kernel has given up, [`ErrorKind::BadData`]
    /// for one that is no store or has another chunk, I/O errors.
    pub fn open(device: R, chunk: ChunkSize, origin_bytes: Bytes, writing: Writing<'a>) -> Result<Self> {
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
            writing,
            area: 0,
            done: false,
            buffer,
            pending: Vec::new(),
            seen: Seen::new(chunk.count_for(origin_bytes)),
        })
    }

    /// At most `max` further originals, clipped at the origin's end; none at the end.
    ///
    /// # Errors
    /// [`ErrorKind::BadData`] for an exception that cannot be, I/O errors.
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

    /// Decodes the next area into `pending`. Ends at the latest at the store's end: every area is
    /// further behind.
    fn read_area(&mut self) -> Result<()> {
        self.fill_buffer()?;
        let area = decode_area(&self.buffer, 0, &self.bounds)
            .map_err(|error| bad_store(error).context(format!("metadata area {}", self.area)))?;
        for (index, entry) in area.entries.iter().enumerate().rev() {
            let original = self.original(index, *entry)?;
            self.pending.push(original);
        }
        self.done = match &self.writing {
            Writing::Nobody => !area.full,
            Writing::Kernel { current_area, .. } if self.area < *current_area => {
                if !area.full {
                    let count = area.entries.len();
                    return Err(self.bad(&format!("{count} entries, though it is not the last")));
                }
                false
            }
            Writing::Kernel { .. } => true,
        };
        self.area += 1;
        Ok(())
    }

    /// Reads the next area; what does not count of it is zero.
    fn fill_buffer(&mut self) -> Result<()> {
        let chunk = self.bounds.chunk;
        let offset = area_offset(self.area, chunk)
            .filter(|offset| {
                offset.checked_add(chunk.bytes()).is_some_and(|end| end <= self.bounds.store_size)
            })
            .ok_or_else(|| {
                self.bad(&format!("behind the store's end at {}", self.bounds.store_size.get()))
            })?;
        self.device.read_at(&mut self.buffer, offset)?;
        let Writing::Kernel { current_area, settle } = &mut self.writing else { return Ok(()) };
        if *current_area != self.area {
            return Ok(());
        }
        // The one area that may be being written: see the module's head. The order of these three
        // lines is the argument.
        let count = listed_entries(&self.buffer).count();
        settle()?;
        self.device.read_at(&mut self.buffer, offset)?;
        if listed_entries(&self.buffer).count() < count {
            return Err(self.bad("entries that were there have gone"));
        }
        self.buffer[count * ENTRY_BYTES..].fill(0);
        Ok(())
    }

    fn original(&mut self, index: usize, entry: Entry) -> Result<Original> {
        let Some((extent, store_offset)) = entry.place(&self.bounds) else {
            return Err(self.bad(&format!("entry {index} is not within origin and store")));
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

/// True where the kernel has marked the store on `device` invalid. It does so, with one write, when it
/// gives the snapshot up and before a status says that (`__invalidate_snapshot`): a store that bears the
/// mark could still be written then.
///
/// # Errors
/// I/O errors, [`ErrorKind::BadData`] for what is no store.
pub fn is_marked_invalid(device: &impl BlockRead, chunk: ChunkSize) -> Result<bool> {
    let mut buffer = AlignedBuffer::zeroed(chunk.bytes().as_len());
    device.read_at(&mut buffer, Bytes::ZERO)?;
    Ok(!Header::decode(&buffer).map_err(bad_store)?.valid)
}

/// Which origin chunks have been named.
struct Seen {
    bits: Option<Vec<u64>>,
}

impl Seen {
    fn new(chunks: u64) -> Self {
        let words =
            usize::try_from(chunks.min(DUPLICATE_CHUNKS_MAX).div_ceil(64)).expect("at most 2^20 words");
        Self { bits: (chunks <= DUPLICATE_CHUNKS_MAX).then(|| vec![0; words]) }
    }

    /// False where it was there. `chunk` is on the origin.
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

/// A store's device or file, opened for (direct) reading, as [`ExceptionReader`] takes it.
pub struct StoreDevice {
    file: File,
    size: Bytes,
    description: String,
}

impl StoreDevice {
    /// For a store of `size` bytes; `description` names it in errors.
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
