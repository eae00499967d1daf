//! The control block before and after each payload: it identifies the frame and describes its payload.
//!
//! Head and tail carry the same facts, each under its own salt. A frame that was torn, misplaced, or left
//! over from another archive is therefore detected.

use uuid::Uuid;

use super::map::ENTRY_BYTES;
use super::{ArchiveError, FrameKind, Layout, Side, Version};
use crate::base::checksum::crc32c_salted;
use crate::base::units::SECTOR_BYTES;
use crate::base::{Bytes, Extent};
use crate::format::bytes::{BLOCK_BYTES, get, get_u32, get_u64, is_zero, put, put_u32, put_u64};

const MAGIC: [u8; 8] = *b"TDMFRAME";
const SIDE_AT: usize = 8;
const FACTS_AT: usize = 12;
const EXTENTS_AT: usize = 64;
const EXTENTS_END: usize = EXTENTS_AT + EXTENTS_MAX * 8;
/// Of the payload's checksum in version 1 (4 bytes), and in later ones (8 bytes).
const CHECKSUM_V1_AT: usize = 56;
const CHECKSUM_V2_AT: usize = EXTENTS_END;
const CRC_AT: usize = BLOCK_BYTES - 4;

/// Most extents in one control block.
pub const EXTENTS_MAX: usize = 500;

/// Bits of an extent's start, in sectors; the upper 24 bits are its length. So an extent can start 512 TiB
/// past the frame's origin offset, further than any origin that [`SEGMENT_COUNT_MAX`] permits.
///
/// [`SEGMENT_COUNT_MAX`]: crate::base::limits::SEGMENT_COUNT_MAX
const START_BITS: u32 = 40;
const START_MAX: u64 = (1 << START_BITS) - 1;
const COUNT_MAX: u64 = (1 << 24) - 1;

/// A frame's facts, without its extents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameFacts {
    /// The frame's number, from 0.
    pub sequence: u64,
    /// The kind of payload.
    pub kind: FrameKind,
    /// Offset on the origin. Data: of the segment. Originals, and data of an increment: of the first extent. Map: of
    /// the first entry.
    pub origin_offset: Bytes,
    /// Bytes of the payload in use; zeros follow up to the segment size.
    pub payload_length: Bytes,
    /// The checksum of those bytes: [`Version::payload_checksum`].
    pub payload_checksum: u64,
}

/// A decoded control block; its extents stay in the block's memory.
#[derive(Clone, Copy, Debug)]
pub struct Control<'a> {
    /// Everything but the extents.
    pub facts: FrameFacts,
    extents: &'a [u8],
    base: u64,
    size: Bytes,
}

impl<'a> Control<'a> {
    /// The valid extents on the origin; sorted, disjoint, within the origin. Data: the parts of the segment
    /// that are present. Originals, and data of an increment: the ranges packed into the payload, in this order.
    /// Map: none.
    pub fn extents(&self) -> impl ExactSizeIterator<Item = Extent> + Clone + use<'a> {
        let (base, size) = (self.base, self.size);
        self.extents.chunks_exact(8).map(move |entry| {
            unpack(get_u64(entry, 0), base, size).expect("extents are checked when a block is decoded")
        })
    }
}

/// An extent from its packed form. An end less than a sector past the origin's end is cut there; None if it
/// is further.
fn unpack(packed: u64, base: u64, size: Bytes) -> Option<Extent> {
    let start = base.checked_add((packed & START_MAX).checked_mul(SECTOR_BYTES)?)?;
    let end = start.checked_add((packed >> START_BITS).checked_mul(SECTOR_BYTES)?)?;
    if end >= size.get().checked_add(SECTOR_BYTES)? {
        return None;
    }
    Extent::new(Bytes(start), Bytes(end.min(size.get())))
}

fn pack(extent: Extent, base: Bytes, size: Bytes) -> Option<u64> {
    let start = extent.start().checked_sub(base)?.get();
    let length = extent.length().get();
    let ends_whole = length.is_multiple_of(SECTOR_BYTES) || extent.end() == size;
    let (start_sectors, count) = (start / SECTOR_BYTES, length.div_ceil(SECTOR_BYTES));
    let fits = start.is_multiple_of(SECTOR_BYTES) && ends_whole;
    (fits && start_sectors <= START_MAX && count <= COUNT_MAX)
        .then_some(start_sectors | (count << START_BITS))
}

/// Encodes a control block into the first [`BLOCK_BYTES`] of `block`.
///
/// # Errors
/// Anything that would not decode: facts that do not fit the layout; extents that are unsorted, not disjoint,
/// out of bounds, or cut at anything but a multiple of 512 bytes or the origin's end.
pub fn encode(
    layout: &Layout,
    facts: &FrameFacts,
    extents: &[Extent],
    side: Side,
    block: &mut [u8],
) -> Result<(), ArchiveError> {
    let found = block.len();
    let block =
        block.get_mut(..BLOCK_BYTES).ok_or(ArchiveError::Truncated { found, expected: BLOCK_BYTES })?;
    let count = extents.len();
    if count > EXTENTS_MAX {
        return Err(ArchiveError::ExtentCount { count });
    }
    check_facts(layout, facts)?;
    check_extents(layout, facts, extents.iter().copied().map(Some))?;
    block.fill(0);
    put(block, 0, &MAGIC);
    put_u32(block, SIDE_AT, side.code());
    put_u32(block, FACTS_AT, facts.kind.code());
    put(block, 16, layout.archive.as_bytes());
    put_u64(block, 32, facts.sequence);
    put_u64(block, 40, facts.origin_offset.get());
    put_u64(block, 48, facts.payload_length.get());
    put_payload_checksum(layout.version, block, facts.payload_checksum)?;
    put_u32(block, 60, u32::try_from(count).expect("bounded by EXTENTS_MAX"));
    for (index, extent) in extents.iter().enumerate() {
        let packed =
            pack(*extent, facts.origin_offset, layout.origin_size).ok_or(ArchiveError::Extent { index })?;
        put_u64(block, EXTENTS_AT + index * 8, packed);
    }
    let crc = crc32c_salted(side.salt(facts.kind.code()), &block[..CRC_AT]);
    put_u32(block, CRC_AT, crc);
    Ok(())
}

/// Decodes a control block and checks every field against `layout`.
///
/// # Errors
/// The first fault found.
pub fn decode<'a>(layout: &Layout, side: Side, block: &'a [u8]) -> Result<Control<'a>, ArchiveError> {
    let what = ArchiveError::control(side);
    let block = block
        .get(..BLOCK_BYTES)
        .ok_or(ArchiveError::Truncated { found: block.len(), expected: BLOCK_BYTES })?;
    if block[..8] != MAGIC {
        return Err(ArchiveError::Magic { what });
    }
    // The kind selects the salt, so a changed kind fails the checksum.
    let code = get_u32(block, FACTS_AT);
    let computed = crc32c_salted(side.salt(code), &block[..CRC_AT]);
    let found = get_u32(block, CRC_AT);
    if found != computed {
        return Err(ArchiveError::BlockChecksum { what, found, computed });
    }
    let side_code = get_u32(block, SIDE_AT);
    if side_code != side.code() {
        return Err(ArchiveError::Field { field: "the control block's side", value: side_code.into() });
    }
    let archive = Uuid::from_bytes(get(block, 16));
    if archive != layout.archive {
        return Err(ArchiveError::Foreign { found: archive });
    }
    decode_checked(layout, code, block)
}

fn decode_checked<'a>(layout: &Layout, code: u32, block: &'a [u8]) -> Result<Control<'a>, ArchiveError> {
    let facts = FrameFacts {
        sequence: get_u64(block, 32),
        kind: match code {
            1 => FrameKind::Data,
            2 => FrameKind::Originals,
            3 => FrameKind::Map,
            other => return Err(ArchiveError::Field { field: "the frame's kind", value: other.into() }),
        },
        origin_offset: Bytes(get_u64(block, 40)),
        payload_length: Bytes(get_u64(block, 48)),
        payload_checksum: get_payload_checksum(layout.version, block)?,
    };
    check_facts(layout, &facts)?;
    let count = usize::try_from(get_u32(block, 60)).expect("32 bits fit usize on Linux");
    if count > EXTENTS_MAX {
        return Err(ArchiveError::ExtentCount { count });
    }
    let (extents, rest) = block[EXTENTS_AT..EXTENTS_END].split_at(count * 8);
    if !is_zero(rest) || !is_zero(&block[CHECKSUM_V2_AT + 8..CRC_AT]) {
        return Err(RESERVED);
    }
    let base = facts.origin_offset.get();
    let unpacked = extents.chunks_exact(8).map(|entry| unpack(get_u64(entry, 0), base, layout.origin_size));
    check_extents(layout, &facts, unpacked)?;
    Ok(Control { facts, extents, base, size: layout.origin_size })
}

const RESERVED: ArchiveError = ArchiveError::Padding { what: "the reserved part of a control block" };

/// # Errors
/// A checksum that the version has no room for.
fn put_payload_checksum(version: Version, block: &mut [u8], checksum: u64) -> Result<(), ArchiveError> {
    match version {
        Version::V1 => {
            let narrow = u32::try_from(checksum);
            let wide = |_| ArchiveError::Field { field: "the payload's CRC-32C", value: checksum };
            put_u32(block, CHECKSUM_V1_AT, narrow.map_err(wide)?);
        }
        Version::V2 | Version::V3 => put_u64(block, CHECKSUM_V2_AT, checksum),
    }
    Ok(())
}

/// # Errors
/// [`ArchiveError::Padding`] if the field of the other version is not zero.
fn get_payload_checksum(version: Version, block: &[u8]) -> Result<u64, ArchiveError> {
    let (narrow, wide) = (u64::from(get_u32(block, CHECKSUM_V1_AT)), get_u64(block, CHECKSUM_V2_AT));
    let (checksum, other) = match version {
        Version::V1 => (narrow, wide),
        Version::V2 | Version::V3 => (wide, narrow),
    };
    if other == 0 { Ok(checksum) } else { Err(RESERVED) }
}

/// True if `block` begins with the magic number of a control block. A reader of a pipe uses this to distinguish a
/// frame from the tail superblock. Checks nothing else.
#[must_use]
pub fn has_magic(block: &[u8]) -> bool {
    block.starts_with(&MAGIC)
}

/// True if two decoded control blocks, one of each side, have the same facts.
pub(super) fn same_facts(head: &[u8], tail: &[u8]) -> bool {
    head[FACTS_AT..CRC_AT] == tail[FACTS_AT..CRC_AT]
}

fn check_facts(layout: &Layout, facts: &FrameFacts) -> Result<(), ArchiveError> {
    let field = |field, value: Bytes| Err(ArchiveError::Field { field, value: value.get() });
    let (offset, length, segment) = (facts.origin_offset, facts.payload_length, layout.segment.bytes());
    if offset >= layout.origin_size {
        return field("the origin offset", offset);
    }
    if length == Bytes::ZERO || length > segment {
        return field("the payload length", length);
    }
    match facts.kind {
        kind if layout.is_packed(kind) && !offset.is_aligned(Bytes(SECTOR_BYTES)) => {
            field("the origin offset", offset)
        }
        kind if layout.is_packed(kind) => Ok(()),
        FrameKind::Data if !offset.is_aligned(segment) => field("the origin offset", offset),
        FrameKind::Data if length != segment.min(layout.origin_size - offset) => {
            field("the payload length", length)
        }
        FrameKind::Map if !length.is_aligned(Bytes::from_len(ENTRY_BYTES)) => {
            field("the payload length", length)
        }
        _ => Ok(()),
    }
}

/// Checks the extents of a control block. An extent that could not be unpacked is given as None.
fn check_extents(
    layout: &Layout,
    facts: &FrameFacts,
    extents: impl Iterator<Item = Option<Extent>>,
) -> Result<(), ArchiveError> {
    let is_packed = layout.is_packed(facts.kind);
    let limit = match facts.kind {
        FrameKind::Data if !is_packed => facts.origin_offset + facts.payload_length,
        _ => layout.origin_size,
    };
    let mut end = facts.origin_offset;
    let (mut count, mut total) = (0usize, Bytes::ZERO);
    for (index, extent) in extents.enumerate() {
        let extent = extent.ok_or(ArchiveError::Extent { index })?;
        if extent.start() < end || extent.end() > limit {
            return Err(ArchiveError::Extent { index });
        }
        if is_packed && index == 0 && extent.start() != facts.origin_offset {
            return Err(ArchiveError::Extent { index });
        }
        end = extent.end();
        total += extent.length();
        count += 1;
    }
    match facts.kind {
        FrameKind::Map if count > 0 => Err(ArchiveError::ExtentCount { count }),
        FrameKind::Data | FrameKind::Originals if count == 0 => Err(ArchiveError::ExtentCount { count }),
        _ if is_packed && total != facts.payload_length => {
            Err(ArchiveError::Field { field: "the payload length", value: facts.payload_length.get() })
        }
        _ => Ok(()),
    }
}
