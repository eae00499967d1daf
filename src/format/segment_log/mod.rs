#![doc = include_str!("FORMAT.md")]
//!
//! # Codec
//!
//! Pure: bytes in, values out. Invariants: decoding never panics, uses a field only after the check that
//! covers it was found right, and bounds it before use; what is encoded decodes to the same value.

#[cfg(test)]
mod tests;

use uuid::Uuid;

use super::bytes::{get, get_u32, get_u64, is_zero, put, put_u32, put_u64};
use super::secondary::SecondaryForm;
use crate::base::checksum::{crc32c, crc32c_append, crc32c_salted};
use crate::base::limits::SEGMENT_COUNT_MAX;
use crate::base::{Bytes, Error, Result, SegmentIx, SegmentSize};

/// The version that is written, and the only one that is read. Version 1 had CRC-32C as the payloads' checksum, which
/// does not show whether a filesystem's metadata is old: a copy must not be resumed from it.
pub const VERSION: u32 = 2;

/// Bytes of the header.
pub const HEADER_BYTES: usize = 128;

/// Bytes of a record.
pub const RECORD_BYTES: usize = 20;

/// Most records in one file. A copy may be killed and resumed, and place its last segments again each time.
/// Four times the largest count of segments is 320 MiB, which no copy comes near.
pub const RECORD_COUNT_MAX: u64 = 4 * SEGMENT_COUNT_MAX;

const MAGIC: [u8; 8] = *b"TDMPROGR";
const HEADER_SALT: &[u8] = b"tidemark progress header";
const RECORD_SALT: &[u8] = b"tidemark progress record";
const HEADER_CRC_AT: usize = HEADER_BYTES - 4;
const RECORD_CHECK_AT: usize = RECORD_BYTES - 4;

/// Segment index and frame number have 24 bits; SEGMENT_COUNT_MAX is 2^22.
const NUMBER_MAX: u32 = (1 << 24) - 1;
const _: () = assert!(SEGMENT_COUNT_MAX <= 1 << 24);

const FLAG_FRAME: u32 = 1;
const FLAG_CHECKSUM: u32 = 2;

const KIND_DATA: u32 = 1;
const KIND_ZERO: u32 = 2;
const KIND_ORIGINALS: u32 = 3;

/// Identifies the copy that the file belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The job's id, as in its devices' UUIDs.
    pub job: Uuid,
    /// The form of the secondary.
    pub form: SecondaryForm,
    /// The archive's identity; None for a raw secondary.
    pub archive: Option<Uuid>,
    /// Size of the origin.
    pub origin_size: Bytes,
    /// Unit of copying.
    pub segment: SegmentSize,
    /// The instant: UTC, nanoseconds since 1970.
    pub instant_ns: u64,
}

/// One record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Record {
    /// A segment is on the secondary's medium.
    Placed(PlacedSegment),
    /// Originals may have been applied to the data from here on.
    OriginalsBegun,
}

/// Where a segment was placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlacedSegment {
    /// The segment.
    pub ix: SegmentIx,
    /// Its data frame's sequence; None if it has none (a raw secondary, a segment of zeros).
    pub frame: Option<u64>,
    /// XXH3-64 of its payload, if one was kept.
    pub checksum: Option<u64>,
    /// The payload was all zero.
    pub zero: bool,
}

fn bad(what: impl std::fmt::Display) -> Error {
    Error::bad_data(format!("not a segment log: {what}"))
}

/// Why a log of version 1 is refused, although it could be read: a record with a CRC-32C does not show that its segment
/// lost a write of a filesystem's metadata.
fn made_by_an_older_program() -> Error {
    Error::refused(
        "its version is 1: an older Tidemark made this copy, with checksums (CRC-32C) that do not show whether its \
         target has lost a write of ext4's metadata",
    )
}

impl Header {
    /// Segments of the origin.
    #[must_use]
    pub fn segment_count(&self) -> u64 {
        self.segment.count_for(self.origin_size)
    }

    fn check(&self) -> Result<()> {
        if self.segment_count() > SEGMENT_COUNT_MAX {
            return Err(bad(format!("an origin of {} has too many segments", self.origin_size)));
        }
        match (self.form, self.archive) {
            (SecondaryForm::Raw, None) => Ok(()),
            (SecondaryForm::Archive, Some(archive)) if !archive.is_nil() => Ok(()),
            _ => Err(bad("only an archive has an identity, and it must have one")),
        }
    }

    /// The header's bytes.
    ///
    /// # Errors
    /// [`ErrorKind::BadData`](crate::base::ErrorKind::BadData) for invalid values.
    pub fn encode(&self) -> Result<[u8; HEADER_BYTES]> {
        self.check()?;
        let mut block = [0; HEADER_BYTES];
        put(&mut block, 0, &MAGIC);
        put_u32(&mut block, 8, VERSION);
        let form = match self.form {
            SecondaryForm::Raw => 1,
            SecondaryForm::Archive => 2,
        };
        put_u32(&mut block, 12, form);
        put(&mut block, 16, self.job.as_bytes());
        put(&mut block, 32, self.archive.unwrap_or_default().as_bytes());
        put_u64(&mut block, 48, self.origin_size.get());
        put_u64(&mut block, 56, self.instant_ns);
        let segment = u32::try_from(self.segment.bytes().get()).expect("a segment has at most 16 MiB");
        put_u32(&mut block, 64, segment);
        let crc = crc32c_salted(HEADER_SALT, &block[..HEADER_CRC_AT]);
        put_u32(&mut block, HEADER_CRC_AT, crc);
        Ok(block)
    }

    /// The header in `bytes`.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) for version 1;
    /// [`ErrorKind::BadData`](crate::base::ErrorKind::BadData) naming the first fault.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let Some(block) = bytes.get(..HEADER_BYTES) else {
            return Err(bad(format!("its header is truncated after {} bytes", bytes.len())));
        };
        if block[..8] != MAGIC {
            return Err(bad("it has no magic number"));
        }
        if get_u32(block, HEADER_CRC_AT) != crc32c_salted(HEADER_SALT, &block[..HEADER_CRC_AT]) {
            return Err(bad("its header's checksum is wrong"));
        }
        match get_u32(block, 8) {
            VERSION => {}
            1 => return Err(made_by_an_older_program()),
            other => return Err(bad(format!("its version is {other}; this program reads {VERSION}"))),
        }
        if !is_zero(&block[68..HEADER_CRC_AT]) {
            return Err(bad("its header's padding is not zero"));
        }
        let archive = Uuid::from_bytes(get(block, 32));
        let header = Self {
            job: Uuid::from_bytes(get(block, 16)),
            form: match get_u32(block, 12) {
                1 => SecondaryForm::Raw,
                2 => SecondaryForm::Archive,
                other => return Err(bad(format!("the secondary's form is {other}"))),
            },
            archive: (!archive.is_nil()).then_some(archive),
            origin_size: Bytes(get_u64(block, 48)),
            segment: SegmentSize::new(Bytes(u64::from(get_u32(block, 64))))
                .map_err(|error| bad("its segment size is invalid").with_source(error))?,
            instant_ns: get_u64(block, 56),
        };
        header.check()?;
        Ok(header)
    }

    /// The bytes of record number `number`.
    ///
    /// # Errors
    /// [`ErrorKind::BadData`](crate::base::ErrorKind::BadData) for invalid values.
    pub fn encode_record(&self, number: u64, record: &Record) -> Result<[u8; RECORD_BYTES]> {
        let mut block = [0; RECORD_BYTES];
        match record {
            Record::OriginalsBegun => put_u32(&mut block, 0, KIND_ORIGINALS << 24),
            Record::Placed(placed) => {
                self.check_placed(placed)?;
                let kind = if placed.zero { KIND_ZERO } else { KIND_DATA };
                let flags = if placed.frame.is_some() { FLAG_FRAME } else { 0 }
                    | if placed.checksum.is_some() { FLAG_CHECKSUM } else { 0 };
                let bits = |value: u64| u32::try_from(value).expect("it is below SEGMENT_COUNT_MAX");
                put_u32(&mut block, 0, bits(placed.ix.get()) | kind << 24);
                put_u32(&mut block, 4, bits(placed.frame.unwrap_or(0)) | flags << 24);
                put_u64(&mut block, 8, placed.checksum.unwrap_or(0));
            }
        }
        let check = self.record_check(number, &block);
        put_u32(&mut block, RECORD_CHECK_AT, check);
        Ok(block)
    }

    fn record_check(&self, number: u64, block: &[u8]) -> u32 {
        let salt = crc32c_append(crc32c(RECORD_SALT), self.job.as_bytes());
        let salt = crc32c_append(salt, &number.to_le_bytes());
        crc32c_append(salt, &block[..RECORD_CHECK_AT])
    }

    fn check_placed(&self, placed: &PlacedSegment) -> Result<()> {
        let count = self.segment_count();
        if placed.ix.get() >= count {
            return Err(bad(format!("segment {} of {count}", placed.ix.get())));
        }
        match (self.form, placed.frame) {
            (_, Some(frame)) if frame >= count => Err(bad(format!("frame {frame} of {count} segments"))),
            (SecondaryForm::Raw, Some(_)) => Err(bad("a raw secondary has no frames")),
            (SecondaryForm::Archive, None) if !placed.zero => {
                Err(bad(format!("no frame for segment {}, which is not zero", placed.ix.get())))
            }
            _ => Ok(()),
        }
    }

    /// The record in `block`, whose check has been found right.
    fn decode_checked(&self, block: &[u8; RECORD_BYTES]) -> Result<Record> {
        let (first, second, checksum) = (get_u32(block, 0), get_u32(block, 4), get_u64(block, 8));
        let (kind, flags) = (first >> 24, second >> 24);
        if kind == KIND_ORIGINALS {
            let clear = first & NUMBER_MAX == 0 && second == 0 && checksum == 0;
            return if clear {
                Ok(Record::OriginalsBegun)
            } else {
                Err(bad("a mark with other fields than the kind"))
            };
        }
        if kind != KIND_DATA && kind != KIND_ZERO {
            return Err(bad(format!("a record of kind {kind}")));
        }
        let (has_frame, has_checksum) = (flags & FLAG_FRAME != 0, flags & FLAG_CHECKSUM != 0);
        if flags & !(FLAG_FRAME | FLAG_CHECKSUM) != 0
            || (!has_frame && second & NUMBER_MAX != 0)
            || (!has_checksum && checksum != 0)
        {
            return Err(bad(format!("flags {flags} of a record")));
        }
        let placed = PlacedSegment {
            ix: SegmentIx(u64::from(first & NUMBER_MAX)),
            frame: has_frame.then_some(u64::from(second & NUMBER_MAX)),
            checksum: has_checksum.then_some(checksum),
            zero: kind == KIND_ZERO,
        };
        self.check_placed(&placed)?;
        Ok(Record::Placed(placed))
    }
}

/// Reads the records of one file, in order, and distinguishes a torn end from damage.
#[derive(Clone, Debug)]
pub struct Follower<'a> {
    header: &'a Header,
    /// Good records so far; also the number of the next one.
    good: u64,
    /// Why the record after the good ones is bad. Nothing may follow it.
    torn: Option<String>,
    originals_begun: bool,
}

impl<'a> Follower<'a> {
    /// A reader before the first record.
    #[must_use]
    pub fn new(header: &'a Header) -> Self {
        Self { header, good: 0, torn: None, originals_begun: false }
    }

    /// Takes the next whole record. None: the record is bad, and must be the last one.
    ///
    /// # Errors
    /// [`ErrorKind::BadData`](crate::base::ErrorKind::BadData) for what truncation cannot cause: a record
    /// after a bad one, a record with a right check and invalid fields, or too many records.
    pub fn take(&mut self, block: &[u8; RECORD_BYTES]) -> Result<Option<Record>> {
        self.check_last()?;
        if self.good >= RECORD_COUNT_MAX {
            return Err(bad(format!("more than {RECORD_COUNT_MAX} records")));
        }
        let (found, computed) = (get_u32(block, RECORD_CHECK_AT), self.header.record_check(self.good, block));
        if found != computed {
            self.torn = Some(format!("its check is {found:08x}, computed {computed:08x}"));
            return Ok(None);
        }
        let record = self
            .header
            .decode_checked(block)
            .map_err(|error| error.context(format!("record {}", self.good)))?;
        match record {
            Record::OriginalsBegun => self.originals_begun = true,
            Record::Placed(placed) if self.originals_begun => {
                let ix = placed.ix.get();
                return Err(bad(format!("segment {ix} was placed after the originals had begun")));
            }
            Record::Placed(_) => {}
        }
        self.good += 1;
        Ok(Some(record))
    }

    /// Takes the rest of the file, which is less than a record.
    ///
    /// # Errors
    /// As [`Follower::take`].
    pub fn end(&self, rest: &[u8]) -> Result<()> {
        if rest.is_empty() { Ok(()) } else { self.check_last() }
    }

    fn check_last(&self) -> Result<()> {
        match &self.torn {
            None => Ok(()),
            Some(why) => Err(bad(format!("record {} is bad and not the last one: {why}", self.good))),
        }
    }

    /// Good records so far.
    #[must_use]
    pub fn good(&self) -> u64 {
        self.good
    }

    /// True if the originals-begun mark has been read.
    #[must_use]
    pub fn originals_begun(&self) -> bool {
        self.originals_begun
    }
}

/// A whole file: its header, its good records, and how many bytes they take. Bytes past those are torn.
///
/// # Errors
/// As [`Header::decode`] and [`Follower::take`].
pub fn decode(bytes: &[u8]) -> Result<(Header, Vec<Record>, usize)> {
    let header = Header::decode(bytes)?;
    let mut follower = Follower::new(&header);
    let mut records = Vec::new();
    let blocks = bytes[HEADER_BYTES..].chunks_exact(RECORD_BYTES);
    let rest = blocks.remainder();
    for block in blocks {
        let block = block.try_into().expect("chunks_exact gives whole records");
        records.extend(follower.take(block)?);
    }
    follower.end(rest)?;
    let length = HEADER_BYTES + records.len() * RECORD_BYTES;
    Ok((header, records, length))
}
