//! The superblocks at both ends of an archive: identity, origin, instant and sizes; the tail adds totals.

use serde::Serialize;
use uuid::Uuid;

use super::{ArchiveError, Layout, Version};
use crate::base::checksum::crc32c_salted;
use crate::base::limits::SEGMENT_COUNT_MAX;
use crate::base::{Bytes, ChunkSize, SegmentSize};
use crate::format::bytes::{
    BLOCK_BYTES, get, get_u16, get_u32, get_u64, is_zero, put, put_u16, put_u32, put_u64,
};

const MAGIC: [u8; 8] = *b"TIDEMARK";
const CRC_AT: usize = BLOCK_BYTES - 4;
const TOTALS_AT: usize = 80;
const TOTALS_END: usize = 144;
const SNAPSHOT_AT: usize = 144;
const BASE_AT: usize = 160;
const MAP_OFFSET_AT: usize = 176;
const NAMING_END: usize = 184;

/// Longest tool version, in bytes.
pub const TOOL_MAX: usize = 62;
/// Longest origin name, in bytes.
pub const NAME_MAX: usize = 254;
/// Longest origin path, in bytes.
pub const PATH_MAX: usize = 1022;

/// A text field: the offset of its length (the text follows), the longest text, the name.
#[derive(Clone, Copy)]
struct TextField(usize, usize, &'static str);

const TOOL: TextField = TextField(192, TOOL_MAX, "the tool version");
const NAME: TextField = TextField(256, NAME_MAX, "the origin's name");
const PATH: TextField = TextField(512, PATH_MAX, "the origin's path");
const RESERVED_AT: usize = 1536;

/// The end of the archive that a superblock is for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    Head,
    Tail,
}

impl Role {
    fn code(self) -> u32 {
        match self {
            Self::Head => 1,
            Self::Tail => 2,
        }
    }
    fn salt(self) -> &'static [u8] {
        match self {
            Self::Head => b"tidemark superblock head",
            Self::Tail => b"tidemark superblock tail",
        }
    }
    fn what(self) -> &'static str {
        match self {
            Self::Head => "the head superblock",
            Self::Tail => "the tail superblock",
        }
    }
}

/// Where the originals of an archive are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum OriginalsMode {
    /// The origin was quiet, so there are none.
    None,
    /// They were applied to the data before the archive was complete.
    Overlay,
    /// They follow the data; a restore applies them last.
    Append,
}

impl OriginalsMode {
    fn code(self) -> u32 {
        match self {
            Self::None => 0,
            Self::Overlay => 1,
            Self::Append => 2,
        }
    }
}

/// The facts that both superblocks carry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Superblock {
    /// The format's version.
    pub version: Version,
    /// The archive's own identity.
    pub archive: Uuid,
    /// The archive that this one, an increment, continues; nil for a whole copy. Readers of versions 1 and 2, which
    /// have whole copies only, refuse an increment by its version.
    pub parent: Uuid,
    /// The id of the kept snapshot that the archive shows; nil if it shows none.
    pub snapshot: Uuid,
    /// The id of the kept snapshot that the parent of an increment shows; nil for a whole copy.
    pub base: Uuid,
    /// The origin's name, cut to [`NAME_MAX`] bytes.
    pub origin_name: String,
    /// The origin's path, cut to [`PATH_MAX`] bytes.
    pub origin_path: String,
    /// The origin's size.
    pub origin_size: Bytes,
    /// The instant that the archive shows: UTC, nanoseconds since 1970.
    pub instant_utc_ns: u64,
    /// Unit of copy-on-write.
    pub chunk: ChunkSize,
    /// Bytes of a frame's payload.
    pub segment: SegmentSize,
    /// Where originals are.
    pub originals: OriginalsMode,
    /// The program that wrote the archive, cut to [`TOOL_MAX`] bytes: "tidemark 0.1.0".
    pub tool: String,
}

/// The totals, which only the tail superblock has. Frames are ordered by kind: data, originals, map.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Totals {
    /// Data frames: sequences from 0.
    pub data_frames: u64,
    /// Originals frames, after the data frames.
    pub originals_frames: u64,
    /// Map frames, after the originals frames.
    pub map_frames: u64,
    /// Bytes of the origin that the map marks as present.
    pub present_bytes: Bytes,
    /// Bytes of originals in originals frames.
    pub originals_bytes: Bytes,
    /// Where the first map frame of an increment begins; zero in a whole copy, where it follows from the counts.
    pub map_offset: Bytes,
}

impl Totals {
    /// The sequence of the first originals frame, or where it would be.
    #[must_use]
    pub fn first_originals(&self) -> u64 {
        self.data_frames
    }
    /// The sequence of the first map frame. Saturates; decoded totals stay below that.
    #[must_use]
    pub fn first_map(&self) -> u64 {
        self.data_frames.saturating_add(self.originals_frames)
    }
    /// The sequence after the last frame. Saturates; decoded totals stay below that.
    #[must_use]
    pub fn sequence_end(&self) -> u64 {
        self.first_map().saturating_add(self.map_frames)
    }
}

impl Superblock {
    /// True if the archive continues another one, and cannot be restored without it.
    #[must_use]
    pub fn is_increment(&self) -> bool {
        !self.parent.is_nil()
    }

    /// The facts that determine all offsets in the archive.
    #[must_use]
    pub fn layout(&self) -> Layout {
        Layout {
            version: self.version,
            archive: self.archive,
            origin_size: self.origin_size,
            segment: self.segment,
            is_increment: self.is_increment(),
        }
    }

    /// Encodes the head superblock into the first [`BLOCK_BYTES`] of `block`.
    ///
    /// # Errors
    /// [`ArchiveError::Field`] if the origin has more segments than the format allows;
    /// [`ArchiveError::Truncated`] if `block` is too short.
    pub fn encode_head(&self, block: &mut [u8]) -> Result<(), ArchiveError> {
        let block = self.encode_facts(Role::Head, block)?;
        sign(Role::Head, block);
        Ok(())
    }

    /// Encodes the tail superblock into the first [`BLOCK_BYTES`] of `block`.
    ///
    /// # Errors
    /// As [`Superblock::encode_head`].
    pub fn encode_tail(&self, totals: &Totals, block: &mut [u8]) -> Result<(), ArchiveError> {
        let block = self.encode_facts(Role::Tail, block)?;
        let fields = [
            totals.data_frames,
            totals.originals_frames,
            totals.map_frames,
            totals.first_originals(),
            totals.first_map(),
            totals.sequence_end(),
            totals.present_bytes.get(),
            totals.originals_bytes.get(),
        ];
        for (index, value) in fields.into_iter().enumerate() {
            put_u64(block, TOTALS_AT + index * 8, value);
        }
        put_u64(block, MAP_OFFSET_AT, totals.map_offset.get());
        sign(Role::Tail, block);
        Ok(())
    }

    /// Decodes a head superblock.
    ///
    /// # Errors
    /// The first fault found.
    pub fn decode_head(block: &[u8]) -> Result<Self, ArchiveError> {
        let block = check(Role::Head, block)?;
        if !is_zero(&block[TOTALS_AT..TOTALS_END]) || get_u64(block, MAP_OFFSET_AT) != 0 {
            return Err(ArchiveError::Padding { what: "the totals of the head superblock" });
        }
        Self::decode_facts(block)
    }

    /// Decodes a tail superblock.
    ///
    /// # Errors
    /// The first fault found.
    pub fn decode_tail(block: &[u8]) -> Result<(Self, Totals), ArchiveError> {
        let block = check(Role::Tail, block)?;
        let facts = Self::decode_facts(block)?;
        let totals = decode_totals(block, &facts)?;
        Ok((facts, totals))
    }

    fn encode_facts<'a>(&self, role: Role, block: &'a mut [u8]) -> Result<&'a mut [u8], ArchiveError> {
        let found = block.len();
        let block =
            block.get_mut(..BLOCK_BYTES).ok_or(ArchiveError::Truncated { found, expected: BLOCK_BYTES })?;
        check_origin_size(self.origin_size, self.segment)?;
        block.fill(0);
        put(block, 0, &MAGIC);
        put_u32(block, 8, self.version.number());
        put_u32(block, 12, role.code());
        put(block, 16, self.archive.as_bytes());
        put(block, 32, self.parent.as_bytes());
        put(block, SNAPSHOT_AT, self.snapshot.as_bytes());
        put(block, BASE_AT, self.base.as_bytes());
        put_u64(block, 48, self.origin_size.get());
        put_u64(block, 56, self.instant_utc_ns);
        put_u32(block, 64, u32::try_from(u64::from(self.chunk)).expect("a chunk is at most 1 MiB"));
        put_u32(block, 68, u32::try_from(u64::from(self.segment)).expect("a segment is at most 16 MiB"));
        put_u32(block, 72, self.originals.code());
        put_text(block, TOOL, &self.tool);
        put_text(block, NAME, &self.origin_name);
        put_text(block, PATH, &self.origin_path);
        Ok(block)
    }

    fn decode_facts(block: &[u8]) -> Result<Self, ArchiveError> {
        let found = get_u32(block, 8);
        let version = Version::from_number(found).ok_or(ArchiveError::Version { found })?;
        let reserved = [&block[76..TOTALS_AT], &block[NAMING_END..TOOL.0], &block[RESERVED_AT..CRC_AT]];
        if !reserved.into_iter().all(is_zero) {
            return Err(ArchiveError::Padding { what: "the reserved part of a superblock" });
        }
        let parent = Uuid::from_bytes(get(block, 32));
        let (snapshot, base) =
            (Uuid::from_bytes(get(block, SNAPSHOT_AT)), Uuid::from_bytes(get(block, BASE_AT)));
        check_names(version, (parent, snapshot, base), get_u64(block, MAP_OFFSET_AT))?;
        let chunk = u64::from(get_u32(block, 64));
        let segment = u64::from(get_u32(block, 68));
        let segment = SegmentSize::new(Bytes(segment))
            .map_err(|_| ArchiveError::Field { field: "the segment size", value: segment })?;
        let origin_size = Bytes(get_u64(block, 48));
        check_origin_size(origin_size, segment)?;
        Ok(Self {
            version,
            archive: Uuid::from_bytes(get(block, 16)),
            parent,
            snapshot,
            base,
            origin_name: get_text(block, NAME)?,
            origin_path: get_text(block, PATH)?,
            origin_size,
            instant_utc_ns: get_u64(block, 56),
            chunk: ChunkSize::new(Bytes(chunk))
                .map_err(|_| ArchiveError::Field { field: "the chunk size", value: chunk })?,
            segment,
            originals: match get_u32(block, 72) {
                0 => OriginalsMode::None,
                // They cannot be applied to packed data.
                1 if parent.is_nil() => OriginalsMode::Overlay,
                2 => OriginalsMode::Append,
                other => {
                    return Err(ArchiveError::Field { field: "the originals mode", value: other.into() });
                }
            },
            tool: get_text(block, TOOL)?,
        })
    }
}

/// Checks that an archive names what its version permits. `map_offset` is that of the tail.
fn check_names(
    version: Version,
    (parent, snapshot, base): (Uuid, Uuid, Uuid),
    map_offset: u64,
) -> Result<(), ArchiveError> {
    let names_none = parent.is_nil() && snapshot.is_nil();
    if version != Version::NAMING && !(names_none && base.is_nil()) {
        return Err(ArchiveError::Padding { what: "the parent in a superblock" });
    }
    if version == Version::NAMING && names_none {
        return Err(ArchiveError::Field { field: "the snapshot and the parent", value: 0 });
    }
    if parent.is_nil() != base.is_nil() {
        return Err(ArchiveError::Field { field: "the snapshot of the parent", value: 0 });
    }
    if parent.is_nil() && map_offset != 0 {
        return Err(ArchiveError::Padding { what: "the map's offset in a superblock" });
    }
    Ok(())
}

fn check_origin_size(size: Bytes, segment: SegmentSize) -> Result<(), ArchiveError> {
    if segment.count_for(size) <= SEGMENT_COUNT_MAX {
        Ok(())
    } else {
        Err(ArchiveError::Field { field: "the origin's size", value: size.get() })
    }
}

fn decode_totals(block: &[u8], facts: &Superblock) -> Result<Totals, ArchiveError> {
    let field = |index: usize| get_u64(block, TOTALS_AT + index * 8);
    let totals = Totals {
        data_frames: field(0),
        originals_frames: field(1),
        map_frames: field(2),
        present_bytes: Bytes(field(6)),
        originals_bytes: Bytes(field(7)),
        map_offset: Bytes(get_u64(block, MAP_OFFSET_AT)),
    };
    if !facts.is_increment() && totals.data_frames > facts.segment.count_for(facts.origin_size) {
        return Err(ArchiveError::Field { field: "the data frame count", value: totals.data_frames });
    }
    // Bounds the other two counts: the end of the archive must have an offset.
    let end = totals
        .data_frames
        .checked_add(totals.originals_frames)
        .and_then(|sum| sum.checked_add(totals.map_frames))
        .filter(|end| super::frame_offset(*end, facts.segment).is_some())
        .ok_or(ArchiveError::Field { field: "the frame count", value: u64::MAX })?;
    let expected = [totals.first_originals(), totals.first_map(), end];
    let names = ["the first originals frame", "the first map frame", "the sequence end"];
    for (index, (expected, name)) in expected.into_iter().zip(names).enumerate() {
        let value = field(3 + index);
        if value != expected {
            return Err(ArchiveError::Field { field: name, value });
        }
    }
    if totals.present_bytes > facts.origin_size {
        return Err(ArchiveError::Field { field: "the present bytes", value: totals.present_bytes.get() });
    }
    Ok(totals)
}

fn sign(role: Role, block: &mut [u8]) {
    let crc = crc32c_salted(role.salt(), &block[..CRC_AT]);
    put_u32(block, CRC_AT, crc);
}

/// Checks magic, checksum and role; after that the fields are those that were written.
fn check(role: Role, block: &[u8]) -> Result<&[u8], ArchiveError> {
    let what = role.what();
    let block = block
        .get(..BLOCK_BYTES)
        .ok_or(ArchiveError::Truncated { found: block.len(), expected: BLOCK_BYTES })?;
    if block[..8] != MAGIC {
        return Err(ArchiveError::Magic { what });
    }
    let computed = crc32c_salted(role.salt(), &block[..CRC_AT]);
    let found = get_u32(block, CRC_AT);
    if found != computed {
        return Err(ArchiveError::BlockChecksum { what, found, computed });
    }
    let code = get_u32(block, 12);
    if code != role.code() {
        return Err(ArchiveError::Field { field: "the superblock's role", value: code.into() });
    }
    Ok(block)
}

/// Writes `text`, cut at a character boundary if it is too long.
fn put_text(block: &mut [u8], TextField(at, max, _): TextField, text: &str) {
    let mut length = text.len().min(max);
    while !text.is_char_boundary(length) {
        length -= 1;
    }
    put_u16(block, at, u16::try_from(length).expect("text fields are shorter than 64 KiB"));
    put(block, at + 2, &text.as_bytes()[..length]);
}

fn get_text(block: &[u8], TextField(at, max, field): TextField) -> Result<String, ArchiveError> {
    let length = usize::from(get_u16(block, at));
    let whole = &block[at + 2..at + 2 + max];
    let (text, rest) = whole.split_at_checked(length).ok_or(ArchiveError::Text { field })?;
    if !is_zero(rest) {
        return Err(ArchiveError::Padding { what: field });
    }
    match std::str::from_utf8(text) {
        Ok(text) => Ok(text.to_owned()),
        Err(_) => Err(ArchiveError::Text { field }),
    }
}
