//! The codec of dm-snapshot's persistent store: where in the COW store the original of a chunk is.
//!
//! Invariants:
//! - whatever the bytes are, decoding returns an error or entries within the origin and the store;
//! - a new chunk is a data chunk: never the header, never a metadata area.
//!
//! Does no I/O and keeps no state; only the kernel writes a real store.
//!
#![doc = include_str!("FORMAT.md")]

#[cfg(test)]
mod tests;

use thiserror::Error;

use super::bytes::{get_u32, get_u64, put_u32, put_u64};
use crate::base::units::SECTOR_BYTES;
use crate::base::{Bytes, ChunkIx, ChunkSize, Error as BaseError, ErrorKind, Extent};

/// "SnAp" (`SNAP_MAGIC` of the kernel's dm-snap-persistent.c).
const MAGIC: u32 = 0x7041_6e53;
/// `SNAPSHOT_DISK_VERSION`.
const VERSION: u32 = 1;
/// Bytes of the header in use.
pub const HEADER_BYTES: usize = 16;
/// Bytes of an entry (`struct disk_exception`).
pub const ENTRY_BYTES: usize = 16;

/// What is wrong with a store's bytes.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[allow(missing_docs)] // the messages explain the fields
pub enum StoreError {
    /// There are fewer bytes than the structure needs.
    #[error("{found} bytes where {expected} are needed")]
    Short { found: usize, expected: usize },
    /// This is not a store.
    #[error("magic number {found:#010x} is not that of a snapshot store")]
    Magic { found: u32 },
    /// The version is unknown.
    #[error("the store's version is {found}; this program reads version 1")]
    Version { found: u32 },
    /// The valid field is neither 0 nor 1.
    #[error("the header's valid field is {found}")]
    Valid { found: u32 },
    /// The chunk size is out of range.
    #[error("a chunk size of {sectors} sectors is not supported")]
    ChunkSize { sectors: u32 },
    /// An entry is for a chunk that the origin does not have.
    #[error("entry {index}: chunk {old} is past the origin's end")]
    OldChunk { index: usize, old: u64 },
    /// The chunk that an entry names in the store cannot hold an original.
    #[error("entry {index}: chunk {new} of the store cannot hold an original")]
    NewChunk { index: usize, new: u64 },
}

impl From<StoreError> for BaseError {
    /// Kind [`StoreInvalid`](ErrorKind::StoreInvalid): a copy that needs the store is lost.
    fn from(error: StoreError) -> Self {
        Self::new(ErrorKind::StoreInvalid, "the content of the COW store is invalid").with_source(error)
    }
}

/// The store's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// False once the kernel has invalidated the snapshot.
    pub valid: bool,
    /// The unit of copy-on-write.
    pub chunk: ChunkSize,
}

impl Header {
    /// Decodes the header at the front of `block`.
    ///
    /// # Errors
    /// The first fault found. The header of an invalidated store decodes.
    pub fn decode(block: &[u8]) -> Result<Self, StoreError> {
        if block.len() < HEADER_BYTES {
            return Err(StoreError::Short { found: block.len(), expected: HEADER_BYTES });
        }
        let magic = get_u32(block, 0);
        if magic != MAGIC {
            return Err(StoreError::Magic { found: magic });
        }
        let version = get_u32(block, 8);
        if version != VERSION {
            return Err(StoreError::Version { found: version });
        }
        let valid = match get_u32(block, 4) {
            0 => false,
            1 => true,
            found => return Err(StoreError::Valid { found }),
        };
        let sectors = get_u32(block, 12);
        let chunk = ChunkSize::new(Bytes(u64::from(sectors) * SECTOR_BYTES))
            .map_err(|_| StoreError::ChunkSize { sectors })?;
        Ok(Self { valid, chunk })
    }

    /// Encodes the header into the front of `block`, as the kernel does.
    ///
    /// # Errors
    /// [`StoreError::Short`].
    pub fn encode(&self, block: &mut [u8]) -> Result<(), StoreError> {
        if block.len() < HEADER_BYTES {
            return Err(StoreError::Short { found: block.len(), expected: HEADER_BYTES });
        }
        let sectors = u32::try_from(self.chunk.sectors().get()).expect("a chunk is at most 1 MiB");
        put_u32(block, 0, MAGIC);
        put_u32(block, 4, u32::from(self.valid));
        put_u32(block, 8, VERSION);
        put_u32(block, 12, sectors);
        Ok(())
    }
}

/// Entries of one metadata area.
#[must_use]
pub fn entries_per_area(chunk: ChunkSize) -> u64 {
    chunk.bytes().get() / Bytes::from_len(ENTRY_BYTES).get()
}

/// The chunk that holds metadata area `area`, or None if it does not fit 64 bits.
#[must_use]
pub fn area_chunk(area: u64, chunk: ChunkSize) -> Option<ChunkIx> {
    area.checked_mul(entries_per_area(chunk) + 1)?.checked_add(1).map(ChunkIx)
}

/// Where metadata area `area` begins on the store, or None if it does not fit 64 bits.
#[must_use]
pub fn area_offset(area: u64, chunk: ChunkSize) -> Option<Bytes> {
    chunk.offset_of(area_chunk(area, chunk)?)
}

/// True for a chunk that can hold an original: neither the header nor a metadata area.
#[must_use]
pub fn is_data_chunk(index: ChunkIx, chunk: ChunkSize) -> bool {
    index.get() > 0 && index.get() % (entries_per_area(chunk) + 1) != 1
}

/// The bounds that entries must be within.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// The unit of copy-on-write.
    pub chunk: ChunkSize,
    /// Size of the origin; its last chunk may be cut short.
    pub origin_size: Bytes,
    /// Size of the store now; only whole chunks of it count.
    pub store_size: Bytes,
}

/// One exception.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Entry {
    /// The chunk of the origin.
    pub old: ChunkIx,
    /// The chunk of the store that holds its original.
    pub new: ChunkIx,
}

impl Entry {
    /// The extent of the origin, cut at the origin's end, and the original's offset in the store.
    /// None if the entry is not within `bounds`.
    #[must_use]
    pub fn place(self, bounds: &Bounds) -> Option<(Extent, Bytes)> {
        let chunk = bounds.chunk;
        let start = chunk.offset_of(self.old)?;
        let extent = Extent::new(start, start.checked_add(chunk.bytes())?.min(bounds.origin_size))?;
        let store_offset = chunk.offset_of(self.new)?;
        let fits = store_offset.checked_add(chunk.bytes())? <= bounds.store_size;
        (fits && is_data_chunk(self.new, chunk)).then_some((extent, store_offset))
    }

    fn check(self, index: usize, bounds: &Bounds) -> Result<(), StoreError> {
        if self.place(bounds).is_some() {
            return Ok(());
        }
        let origin_chunks = bounds.chunk.count_for(bounds.origin_size);
        if self.old.get() >= origin_chunks {
            Err(StoreError::OldChunk { index, old: self.old.get() })
        } else {
            Err(StoreError::NewChunk { index, new: self.new.get() })
        }
    }
}

/// The entries of one metadata area.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AreaEntries {
    /// The entries up to the first one that ends the list.
    pub entries: Vec<Entry>,
    /// True if no entry ends the list: it continues in the next area.
    pub full: bool,
}

/// Decodes one metadata area; `block` is a whole chunk. The first `skip` entries were read before and are
/// left out.
///
/// # Errors
/// [`StoreError::Short`] if `block` is not a whole chunk; an entry out of `bounds`.
pub fn decode_area(block: &[u8], skip: usize, bounds: &Bounds) -> Result<AreaEntries, StoreError> {
    let expected = bounds.chunk.bytes().as_len();
    let block = block.get(..expected).ok_or(StoreError::Short { found: block.len(), expected })?;
    let mut area = AreaEntries { entries: Vec::new(), full: true };
    for (index, slot) in block.chunks_exact(ENTRY_BYTES).enumerate().skip(skip) {
        let entry = Entry { old: ChunkIx(get_u64(slot, 0)), new: ChunkIx(get_u64(slot, 8)) };
        if entry.new == ChunkIx::ZERO {
            area.full = false;
            break;
        }
        entry.check(index, bounds)?;
        area.entries.push(entry);
    }
    Ok(area)
}

/// The entries of a metadata area up to the first one that ends the list. Nothing is checked, so they serve
/// as hints and for counting only.
pub fn listed_entries(block: &[u8]) -> impl Iterator<Item = Entry> + '_ {
    block
        .chunks_exact(ENTRY_BYTES)
        .map(|slot| Entry { old: ChunkIx(get_u64(slot, 0)), new: ChunkIx(get_u64(slot, 8)) })
        .take_while(|entry| entry.new != ChunkIx::ZERO)
}

/// Encodes a metadata area as the kernel does: `entries`, then zeros. For simulated stores.
///
/// # Errors
/// [`StoreError::Short`] if `entries` do not fit `block`.
pub fn encode_area(entries: &[Entry], block: &mut [u8]) -> Result<(), StoreError> {
    let expected = entries.len() * ENTRY_BYTES;
    if block.len() < expected {
        return Err(StoreError::Short { found: block.len(), expected });
    }
    block.fill(0);
    for (entry, slot) in entries.iter().zip(block.chunks_exact_mut(ENTRY_BYTES)) {
        put_u64(slot, 0, entry.old.get());
        put_u64(slot, 8, entry.new.get());
    }
    Ok(())
}
