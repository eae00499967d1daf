#![doc = include_str!("FORMAT.md")]
//!
//! # Codec
//!
//! Pure: bytes in, values out. Invariants: decoding never panics, uses a field only after the check that covers it was
//! found right, and bounds it before use; what is encoded decodes to the same value.

#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::bytes::{get, get_u32, get_u64, is_zero, put, put_u32, put_u64};
use super::state::TargetRecord;
use crate::base::checksum::{crc32c, crc32c_append, crc32c_salted};
use crate::base::limits::SEGMENT_COUNT_MAX;
use crate::base::{Bytes, Error, Extent, Result, SegmentSize};

/// The version that is written, and the only one that is read.
pub const VERSION: u32 = 1;

/// Bytes of the header.
pub const HEADER_BYTES: usize = 160;

/// Longest description.
pub const DESCRIPTION_BYTES_MAX: usize = 1 << 20;

/// Most absent ranges: far more than one copy leaves out, because those of interrupted updates are added.
pub const ABSENT_RANGES_MAX: usize = 1 << 20;

/// No record is longer.
pub const FILE_BYTES_MAX: u64 = 64 << 20;

const MAGIC: [u8; 8] = *b"TDMRAWCP";
const HEADER_SALT: &[u8] = b"tidemark raw copy header";
const BODY_SALT: &[u8] = b"tidemark raw copy body";
const HEADER_CRC_AT: usize = HEADER_BYTES - 4;
const CRC_BYTES: usize = 4;

/// The record of a raw secondary.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawCopy {
    /// Its id.
    pub id: Uuid,
    /// Whether the secondary is a copy now.
    pub state: RawCopyState,
    /// The kept snapshot from which it differs only in absent ranges and in chunks that have changed since then.
    pub base: Uuid,
    /// What it shows; while it is being updated, what it is to show.
    pub shown: Shown,
    /// Bytes of the copy.
    pub size: Bytes,
    /// The unit of the checksums.
    pub segment: SegmentSize,
    /// What people and the search for the secondary need.
    pub description: Description,
    /// Ranges that are not copied, and read as zeros once the copy is complete; sorted, neither overlapping nor
    /// touching.
    pub absent: Vec<Extent>,
    /// The XXH3-64 of each segment on the secondary.
    pub checksums: Vec<u64>,
}

/// Whether a secondary is a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RawCopyState {
    /// It holds what it shows.
    Complete,
    /// It holds parts of several instants.
    Updating,
}

/// An instant that a secondary shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shown {
    /// The kept snapshot; None if the instant is that of no kept snapshot.
    pub snapshot: Option<Uuid>,
    /// UTC, nanoseconds since 1970.
    pub instant_ns: u64,
}

/// The part of a record that is text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    /// Where the secondary was.
    pub path: String,
    /// The base, as VOLUME@NAME.
    pub base: String,
    /// The snapshot that is shown, as VOLUME@NAME.
    pub shown: Option<String>,
    /// The facts that identify the device or file.
    pub target: TargetRecord,
}

fn bad(what: impl std::fmt::Display) -> Error {
    Error::bad_data(format!("not a record of a raw copy: {what}"))
}

/// The CRC of a body; the header's fields are part of the salt, so that no body passes for that of another record.
/// Without the header's own CRC: what ends with its own CRC adds the same value to any CRC over it.
fn body_crc(header: &[u8], body: &[u8]) -> u32 {
    crc32c_append(crc32c_append(crc32c(BODY_SALT), &header[..HEADER_CRC_AT]), body)
}

impl RawCopy {
    /// Segments of the copy.
    #[must_use]
    pub fn segment_count(&self) -> u64 {
        self.segment.count_for(self.size)
    }

    /// The record's bytes.
    ///
    /// # Errors
    /// [`ErrorKind::BadData`](crate::base::ErrorKind::BadData) for invalid values.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let description = serde_json::to_vec(&self.description)
            .map_err(|source| bad("its description cannot be encoded").with_source(source))?;
        let length = |count: usize, most: usize, what: &str| {
            let fits = u32::try_from(count).ok().filter(|_| count <= most);
            fits.ok_or_else(|| bad(format!("{count} {what}, more than {most}")))
        };
        let segments_max = usize::try_from(SEGMENT_COUNT_MAX).expect("4 Mi fits usize");
        let mut bytes = vec![0; HEADER_BYTES];
        put(&mut bytes, 0, &MAGIC);
        put_u32(&mut bytes, 8, VERSION);
        let state = match self.state {
            RawCopyState::Complete => 1,
            RawCopyState::Updating => 2,
        };
        put_u32(&mut bytes, 12, state);
        put(&mut bytes, 16, self.id.as_bytes());
        put(&mut bytes, 32, self.base.as_bytes());
        put(&mut bytes, 48, self.shown.snapshot.unwrap_or_default().as_bytes());
        put_u64(&mut bytes, 64, self.shown.instant_ns);
        put_u64(&mut bytes, 72, self.size.get());
        let segment = u32::try_from(self.segment.bytes().get()).expect("a segment has at most 16 MiB");
        put_u32(&mut bytes, 80, segment);
        put_u32(&mut bytes, 84, length(description.len(), DESCRIPTION_BYTES_MAX, "bytes of description")?);
        put_u32(&mut bytes, 88, length(self.absent.len(), ABSENT_RANGES_MAX, "absent ranges")?);
        put_u32(&mut bytes, 92, length(self.checksums.len(), segments_max, "checksums")?);
        let crc = crc32c_salted(HEADER_SALT, &bytes[..HEADER_CRC_AT]);
        put_u32(&mut bytes, HEADER_CRC_AT, crc);
        bytes.extend(description);
        for extent in &self.absent {
            bytes.extend(extent.start().get().to_le_bytes());
            bytes.extend(extent.end().get().to_le_bytes());
        }
        bytes.extend(self.checksums.iter().flat_map(|checksum| checksum.to_le_bytes()));
        let (header, body) = bytes.split_at(HEADER_BYTES);
        let crc = body_crc(header, body);
        bytes.extend(crc.to_le_bytes());
        // One place knows which values are valid.
        if Self::decode(&bytes)? != *self {
            return Err(bad("values that it cannot express"));
        }
        Ok(bytes)
    }

    /// The record in `bytes`.
    ///
    /// # Errors
    /// [`ErrorKind::BadData`](crate::base::ErrorKind::BadData) naming the first fault.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let Some((block, rest)) = bytes.split_at_checked(HEADER_BYTES) else {
            return Err(bad(format!("its header is truncated after {} bytes", bytes.len())));
        };
        let lengths = check_header(block)?;
        let [description, absent, checksums] = lengths;
        let expected = description + absent * 16 + checksums * 8 + CRC_BYTES;
        if rest.len() != expected {
            return Err(bad(format!("its body has {} bytes, not {expected}", rest.len())));
        }
        let (body, crc) = rest.split_at(expected - CRC_BYTES);
        if get_u32(crc, 0) != body_crc(block, body) {
            return Err(bad("its body's checksum is wrong"));
        }
        let (text, body) = body.split_at(description);
        let (ranges, sums) = body.split_at(absent * 16);
        let size = Bytes(get_u64(block, 72));
        let optional = |id: Uuid| (!id.is_nil()).then_some(id);
        let id_at = |at| optional(Uuid::from_bytes(get(block, at)));
        let segment = SegmentSize::new(Bytes(u64::from(get_u32(block, 80))))
            .map_err(|error| bad("its segment size is invalid").with_source(error))?;
        if size == Bytes::ZERO || segment.count_for(size) != Bytes::from_len(checksums).get() {
            return Err(bad(format!(
                "{checksums} checksums for {} bytes in segments of {segment}",
                size.get()
            )));
        }
        Ok(Self {
            id: id_at(16).ok_or_else(|| bad("it has no id"))?,
            state: match get_u32(block, 12) {
                1 => RawCopyState::Complete,
                2 => RawCopyState::Updating,
                other => return Err(bad(format!("its state is {other}"))),
            },
            base: id_at(32).ok_or_else(|| bad("it has no base"))?,
            shown: Shown { snapshot: id_at(48), instant_ns: get_u64(block, 64) },
            size,
            segment,
            description: serde_json::from_slice(text)
                .map_err(|source| bad("its description cannot be read").with_source(source))?,
            absent: decode_ranges(ranges, size)?,
            checksums: sums.chunks_exact(8).map(|sum| get_u64(sum, 0)).collect(),
        })
    }
}

/// Checks the header; returns the lengths of the description, of the list of ranges, and of that of checksums.
fn check_header(block: &[u8]) -> Result<[usize; 3]> {
    if block[..8] != MAGIC {
        return Err(bad("it has no magic number"));
    }
    if get_u32(block, HEADER_CRC_AT) != crc32c_salted(HEADER_SALT, &block[..HEADER_CRC_AT]) {
        return Err(bad("its header's checksum is wrong"));
    }
    let version = get_u32(block, 8);
    if version != VERSION {
        return Err(bad(format!("its version is {version}; this program reads {VERSION}")));
    }
    if !is_zero(&block[96..HEADER_CRC_AT]) {
        return Err(bad("its header's padding is not zero"));
    }
    let length = |at, most: usize, what: &str| {
        let found = usize::try_from(get_u32(block, at)).ok().filter(|found| *found <= most);
        found.ok_or_else(|| bad(format!("more than {most} {what}")))
    };
    let segments_max = usize::try_from(SEGMENT_COUNT_MAX).expect("4 Mi fits usize");
    Ok([
        length(84, DESCRIPTION_BYTES_MAX, "bytes of description")?,
        length(88, ABSENT_RANGES_MAX, "absent ranges")?,
        length(92, segments_max, "checksums")?,
    ])
}

fn decode_ranges(bytes: &[u8], size: Bytes) -> Result<Vec<Extent>> {
    let mut ranges: Vec<Extent> = Vec::new();
    for range in bytes.chunks_exact(16) {
        let extent = Extent::new(Bytes(get_u64(range, 0)), Bytes(get_u64(range, 8)));
        let last = ranges.last().map(|last| last.end());
        let next =
            extent.filter(|extent| extent.end() <= size && last.is_none_or(|last| last < extent.start()));
        ranges.push(next.ok_or_else(|| bad("an absent range is empty, out of order, or past the end"))?);
    }
    Ok(ranges)
}
