//! The reading side of the archive format: whether an archive is complete, and what it holds.
//!
//! [`FrameChecker`] takes every frame in order, from any source, and the tail superblock at the end.
//! [`ArchiveFile`] is an archive that can be read at any offset.
//!
//! Invariants:
//! - no field is used before the checksum that covers it was found right;
//! - what [`FrameChecker::finish`] accepts is complete: every frame is in its place, none is missing or
//!   duplicated, the map agrees with the data frames, and the totals agree with both;
//! - memory: a bit for each segment, whatever the archive's size.
//!
//! This module does not know where the bytes go.

use std::fs::{File, OpenOptions};
use std::io::{Seek as _, SeekFrom};
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use crate::base::checksum::crc32c_append;
use crate::base::{Bytes, Error, Extent, Result, ResultExt as _, SegmentIx};
use crate::format::archive::map::MapCursor;
use crate::format::archive::{
    ArchiveError, BLOCK, BLOCK_BYTES, Block, Frame, FrameFacts, FrameKind, Layout, MapEntry, MapState,
    OriginalsMode, Superblock, Totals, frame, frame_offset,
};
use crate::sys::aligned::AlignedBuffer;
use crate::topology::check_answers;

/// One bit for each segment of the origin; the format bounds their number.
#[derive(Clone, Debug)]
pub struct SegmentBits {
    words: Vec<u64>,
    count: u64,
}

impl SegmentBits {
    /// `count` segments, none set.
    #[must_use]
    pub fn new(count: u64) -> Self {
        Self { words: vec![0; Bytes(count.div_ceil(64)).as_len()], count }
    }

    /// Sets a segment's bit; returns whether it was clear.
    ///
    /// # Panics
    /// If there is no such segment.
    pub fn set(&mut self, SegmentIx(ix): SegmentIx) -> bool {
        assert!(ix < self.count, "segment {ix} of {}", self.count);
        let word = &mut self.words[Bytes(ix / 64).as_len()];
        let clear = *word & (1 << (ix % 64)) == 0;
        *word |= 1 << (ix % 64);
        clear
    }

    /// True if the segment's bit is set; false past the last segment.
    #[must_use]
    pub fn get(&self, SegmentIx(ix): SegmentIx) -> bool {
        ix < self.count && self.words[Bytes(ix / 64).as_len()] & (1 << (ix % 64)) != 0
    }
}

/// The presence that the data frames, or the map, describe; two equal values mean the same extents.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Presence {
    bytes: Bytes,
    /// Sum over the segments of the CRC of each one's merged extents: independent of their order.
    digest: u64,
}

/// Accumulates the present extents of one segment at a time.
#[derive(Clone, Copy, Debug, Default)]
struct SegmentPresence {
    run: Option<Extent>,
    crc: u32,
    any: bool,
}

impl SegmentPresence {
    fn add(&mut self, total: &mut Presence, extent: Extent) {
        total.bytes += extent.length();
        self.any = true;
        match self.run {
            Some(run) if run.end() == extent.start() => self.run = Extent::new(run.start(), extent.end()),
            _ => {
                self.close();
                self.run = Some(extent);
            }
        }
    }

    fn close(&mut self) {
        if let Some(run) = self.run.take() {
            self.crc = crc32c_append(self.crc, &run.start().get().to_le_bytes());
            self.crc = crc32c_append(self.crc, &run.end().get().to_le_bytes());
        }
    }

    /// Ends the segment; returns whether any of it is present.
    fn finish(&mut self, total: &mut Presence) -> bool {
        self.close();
        if self.any {
            total.digest = total.digest.wrapping_add(u64::from(self.crc));
        }
        std::mem::take(self).any
    }
}

/// Checks an archive from its head superblock to its tail, frame by frame.
#[derive(Clone, Debug)]
pub struct FrameChecker {
    superblock: Superblock,
    layout: Layout,
    description: String,
    next: u64,
    /// Where the next frame begins.
    offset: Bytes,
    kind: FrameKind,
    seen: SegmentBits,
    frames: Presence,
    totals: Totals,
    map: MapCursor,
    map_presence: Presence,
    map_segment: SegmentPresence,
    /// The segment that `map_segment` accumulates.
    map_at: SegmentIx,
    /// Of an increment, whose data frames ascend: their extents so far, and the end of the last one.
    packed: SegmentPresence,
    packed_end: Bytes,
}

/// A frame that has been checked: its facts, and the extents that its payload belongs to.
#[derive(Clone, Debug)]
pub struct CheckedFrame {
    /// The facts.
    pub facts: FrameFacts,
    /// Data: the parts that are present. Originals: the ranges packed into the payload, in this order. Map:
    /// none.
    pub extents: Vec<Extent>,
    /// The payload consists of the extents, one after the other.
    pub is_packed: bool,
}

impl CheckedFrame {
    /// The extents, each with where its bytes begin in the payload.
    pub fn parts(&self) -> impl Iterator<Item = (Extent, Bytes)> + '_ {
        let mut packed = Bytes::ZERO;
        self.extents.iter().map(move |extent| {
            let at = if self.is_packed { packed } else { extent.start() - self.facts.origin_offset };
            packed += extent.length();
            (*extent, at)
        })
    }
}

impl FrameChecker {
    /// A checker for the archive that begins with `superblock`; `description` names it in errors.
    #[must_use]
    pub fn new(superblock: Superblock, description: &str) -> Self {
        let layout = superblock.layout();
        Self {
            layout,
            description: description.to_owned(),
            next: 0,
            offset: BLOCK,
            kind: FrameKind::Data,
            seen: SegmentBits::new(layout.segment.count_for(layout.origin_size)),
            frames: Presence::default(),
            totals: Totals::default(),
            map: MapCursor::new(layout.origin_size, layout.is_increment),
            map_presence: Presence::default(),
            map_segment: SegmentPresence::default(),
            map_at: SegmentIx::ZERO,
            packed: SegmentPresence::default(),
            packed_end: Bytes::ZERO,
            superblock,
        }
    }

    /// Offsets and lengths of everything in the archive.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The sequence of the next frame.
    #[must_use]
    pub fn next_sequence(&self) -> u64 {
        self.next
    }

    /// Where the next frame, or the tail superblock, begins.
    #[must_use]
    pub fn next_offset(&self) -> Bytes {
        self.offset
    }

    /// Bytes of the next frame, whose head control block is `head`.
    ///
    /// # Errors
    /// [`ErrorKind::BadData`](crate::base::ErrorKind::BadData).
    pub fn next_length(&self, head: &[u8]) -> Result<Bytes> {
        if !self.layout.is_increment {
            return Ok(self.layout.frame_bytes());
        }
        let control = frame::open_head(&self.layout, self.next, head).map_err(|error| self.fault(error))?;
        Ok(self.layout.stored_frame(control.facts.payload_length))
    }

    /// The segments whose data frames have been read. None of an increment, whose frames are not of segments.
    #[must_use]
    pub fn seen(&self) -> &SegmentBits {
        &self.seen
    }

    /// An archive error at the next frame's place.
    fn fault(&self, error: ArchiveError) -> Error {
        error.at(Block::Frame(self.next), self.offset, &self.description)
    }

    /// The error for input that ends in the middle of the next frame, after `found` bytes of it.
    #[must_use]
    pub fn truncated(&self, found: usize) -> Error {
        self.fault(ArchiveError::Truncated { found, expected: self.layout.frame_bytes().as_len() })
    }

    /// Checks the next frame, which is in `memory`. Entries of a map frame go to `map`.
    ///
    /// # Errors
    /// [`ErrorKind::BadData`](crate::base::ErrorKind::BadData), with the frame and its offset.
    pub fn accept(&mut self, memory: &[u8], map: &mut dyn FnMut(MapEntry)) -> Result<CheckedFrame> {
        let opened = frame::open(&self.layout, self.next, memory).map_err(|error| self.fault(error))?;
        self.follow(&opened, map).map_err(|error| self.fault(error))?;
        self.next += 1;
        self.offset += self.layout.stored_frame(opened.control.facts.payload_length);
        let facts = opened.control.facts;
        let is_packed = self.layout.is_packed(facts.kind);
        Ok(CheckedFrame { facts, extents: opened.control.extents().collect(), is_packed })
    }

    fn follow(&mut self, opened: &Frame<'_>, map: &mut dyn FnMut(MapEntry)) -> Result<(), ArchiveError> {
        let facts = opened.control.facts;
        if facts.kind < self.kind {
            return Err(ArchiveError::KindOrder { found: facts.kind, before: self.kind });
        }
        self.kind = facts.kind;
        match facts.kind {
            FrameKind::Data if self.layout.is_increment => {
                self.totals.data_frames += 1;
                self.follow_packed(opened)
            }
            FrameKind::Data => {
                self.totals.data_frames += 1;
                if !self.seen.set(self.layout.segment.index_of(facts.origin_offset)) {
                    return Err(ArchiveError::Duplicate { origin_offset: facts.origin_offset.get() });
                }
                let mut segment = SegmentPresence::default();
                opened.control.extents().for_each(|extent| segment.add(&mut self.frames, extent));
                segment.finish(&mut self.frames);
                Ok(())
            }
            FrameKind::Originals if self.superblock.originals != OriginalsMode::Append => {
                Err(ArchiveError::Field { field: "an originals frame, in this archive: the kind", value: 2 })
            }
            FrameKind::Originals => {
                self.totals.originals_frames += 1;
                self.totals.originals_bytes += facts.payload_length;
                Ok(())
            }
            FrameKind::Map => {
                if self.layout.is_increment && self.totals.map_frames == 0 {
                    self.totals.map_offset = self.offset;
                }
                self.totals.map_frames += 1;
                self.follow_map(facts.origin_offset, opened.payload, map)
            }
        }
    }

    fn follow_packed(&mut self, opened: &Frame<'_>) -> Result<(), ArchiveError> {
        for (index, extent) in opened.control.extents().enumerate() {
            if extent.start() < self.packed_end {
                return Err(ArchiveError::Extent { index });
            }
            self.packed_end = extent.end();
            self.packed.add(&mut self.frames, extent);
        }
        Ok(())
    }

    fn follow_map(
        &mut self,
        origin_offset: Bytes,
        payload: &[u8],
        map: &mut dyn FnMut(MapEntry),
    ) -> Result<(), ArchiveError> {
        let mut cursor = self.map;
        let mut fault = Ok(());
        cursor.read(origin_offset, payload, |entry| {
            if fault.is_ok() {
                fault = self.compare_map(entry);
                map(entry);
            }
        })?;
        self.map = cursor;
        fault
    }

    /// Adds an entry of the map, segment by segment.
    fn compare_map(&mut self, entry: MapEntry) -> Result<(), ArchiveError> {
        if self.layout.is_increment {
            if entry.state == MapState::Present {
                self.map_segment.add(&mut self.map_presence, entry.extent);
            }
            return Ok(());
        }
        let segment = self.layout.segment;
        let mut at = entry.extent.start();
        while at < entry.extent.end() {
            let ix = segment.index_of(at);
            if ix != self.map_at {
                self.finish_map_segment()?;
                self.map_at = ix;
            }
            let end = entry.extent.end().min(at.align_down(segment.bytes()) + segment.bytes());
            if entry.state == MapState::Present {
                let part = Extent::new(at, end).expect("the loop ends at the entry's end");
                self.map_segment.add(&mut self.map_presence, part);
            }
            at = end;
        }
        Ok(())
    }

    fn finish_map_segment(&mut self) -> Result<(), ArchiveError> {
        let present = self.map_segment.finish(&mut self.map_presence);
        if present == self.seen.get(self.map_at) {
            return Ok(());
        }
        let origin_offset = self.map_at.get().saturating_mul(self.layout.segment.bytes().get());
        Err(ArchiveError::MapMismatch { origin_offset, map: if present { "present" } else { "not present" } })
    }

    /// Checks the tail superblock after the last frame, and with it that the archive is complete.
    ///
    /// # Errors
    /// [`ErrorKind::BadData`](crate::base::ErrorKind::BadData).
    pub fn finish(&mut self, tail: &[u8]) -> Result<Totals> {
        let offset = self.offset;
        let fault = |error: ArchiveError| error.at(Block::TailSuperblock, offset, &self.description);
        let (superblock, totals) = Superblock::decode_tail(tail).map_err(fault)?;
        if superblock != self.superblock {
            return Err(fault(ArchiveError::Superblocks));
        }
        let description = self.description.clone();
        self.finish_map().map_err(|error| error.at(Block::TailSuperblock, offset, &description))?;
        self.totals.present_bytes = self.frames.bytes;
        compare_totals(&totals, &self.totals)
            .map_err(|error| error.at(Block::TailSuperblock, offset, &description))?;
        Ok(totals)
    }

    fn finish_map(&mut self) -> Result<(), ArchiveError> {
        self.map.finish()?;
        if self.layout.is_increment {
            self.packed.finish(&mut self.frames);
            self.map_segment.finish(&mut self.map_presence);
        } else if self.layout.origin_size > Bytes::ZERO {
            self.finish_map_segment()?;
        }
        if self.map_presence.bytes != self.frames.bytes {
            return Err(ArchiveError::Totals {
                field: "the map's count of present bytes",
                tail: self.map_presence.bytes.get(),
                seen: self.frames.bytes.get(),
            });
        }
        if self.map_presence == self.frames {
            Ok(())
        } else {
            Err(ArchiveError::MapMismatch { origin_offset: 0, map: "present in other places" })
        }
    }
}

fn compare_totals(tail: &Totals, seen: &Totals) -> Result<(), ArchiveError> {
    let fields = [
        ("the count of data frames", tail.data_frames, seen.data_frames),
        ("the count of originals frames", tail.originals_frames, seen.originals_frames),
        ("the count of map frames", tail.map_frames, seen.map_frames),
        ("the count of present bytes", tail.present_bytes.get(), seen.present_bytes.get()),
        ("the count of originals' bytes", tail.originals_bytes.get(), seen.originals_bytes.get()),
        ("the map's offset", tail.map_offset.get(), seen.map_offset.get()),
    ];
    match fields.into_iter().find(|(_, tail, seen)| tail != seen) {
        None => Ok(()),
        Some((field, tail, seen)) => Err(ArchiveError::Totals { field, tail, seen }),
    }
}

/// An archive that can be read at any offset: a regular file or a block device. Both superblocks have been
/// read, and its length is right.
#[derive(Debug)]
pub struct ArchiveFile {
    file: File,
    path: PathBuf,
    superblock: Superblock,
    totals: Totals,
    tail: Vec<u8>,
    tail_offset: Bytes,
    is_device: bool,
}

impl ArchiveFile {
    /// Opens an archive for reading, with direct I/O if the filesystem supports it.
    ///
    /// # Errors
    /// [`ErrorKind::BadData`](crate::base::ErrorKind::BadData) if it is not an archive or is truncated;
    /// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) if it is neither file nor device; I/O
    /// errors.
    pub fn open(path: &Path) -> Result<Self> {
        // Checked first: opening a pipe would wait for its writer.
        check_answers(path)?;
        let kind = std::fs::metadata(path).io_context(|| format!("stat of {}", path.display()))?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(Error::refused(format!("{} is neither a file nor a block device", path.display()))
                .next("name - as the archive, and connect the pipe to standard input"));
        }
        let file = open_direct_or_buffered(path)?;
        let length =
            (&file).seek(SeekFrom::End(0)).io_context(|| format!("find the size of {}", path.display()))?;
        let reader = Reader { file: &file, path, length: Bytes(length) };
        let shown = path.display().to_string();
        let head = reader.block(Bytes::ZERO, Block::HeadSuperblock)?;
        let superblock = Superblock::decode_head(&head)
            .map_err(|error| error.at(Block::HeadSuperblock, Bytes::ZERO, &shown))?;
        let layout = superblock.layout();
        let cut = |error: ArchiveError| {
            Error::bad_data(format!("{shown} is truncated, or data was appended to it"))
                .with_source(error)
                .next("fetch the archive from its source again, or make a new copy")
        };
        let (frames, offset) = if !kind.is_file() {
            let (frames, offset) = reader.count_frames(&layout)?;
            (Some(frames), offset)
        } else if layout.is_increment {
            // How many frames there are is known once they are read.
            (None, layout.tail_offset(Bytes(length)).map_err(cut)?)
        } else {
            let frames = layout.frame_count(Bytes(length)).map_err(cut)?;
            (Some(frames), frame_offset(frames, layout.segment).unwrap_or(Bytes(u64::MAX)))
        };
        let tail = reader.block(offset, Block::TailSuperblock)?;
        let fault = |error: ArchiveError| error.at(Block::TailSuperblock, offset, &shown);
        let (again, totals) = Superblock::decode_tail(&tail).map_err(fault)?;
        if again != superblock {
            return Err(fault(ArchiveError::Superblocks));
        }
        if let Some(seen) = frames.filter(|frames| *frames != totals.sequence_end()) {
            let (field, tail) = ("the count of frames", totals.sequence_end());
            return Err(fault(ArchiveError::Totals { field, tail, seen }));
        }
        let tail = tail.to_vec();
        Ok(Self {
            path: path.to_owned(),
            superblock,
            totals,
            tail,
            tail_offset: offset,
            is_device: !kind.is_file(),
            file,
        })
    }

    /// The superblock.
    #[must_use]
    pub fn superblock(&self) -> &Superblock {
        &self.superblock
    }

    /// The totals in the tail superblock; they are confirmed once [`FrameChecker::finish`] agrees.
    #[must_use]
    pub fn totals(&self) -> &Totals {
        &self.totals
    }

    /// The tail superblock, as stored in the file.
    #[must_use]
    pub fn tail(&self) -> &[u8] {
        &self.tail
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The open file.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Length of the whole archive.
    #[must_use]
    pub fn length(&self) -> Bytes {
        self.tail_offset + BLOCK
    }

    /// True if it is on a block device, which may be longer.
    #[must_use]
    pub fn is_device(&self) -> bool {
        self.is_device
    }

    /// Where the tail superblock begins.
    #[must_use]
    pub fn tail_offset(&self) -> Bytes {
        self.tail_offset
    }

    /// Where the first map frame begins.
    #[must_use]
    pub fn map_offset(&self) -> Bytes {
        if self.superblock.is_increment() {
            return self.totals.map_offset;
        }
        frame_offset(self.totals.first_map(), self.superblock.segment).unwrap_or(Bytes(u64::MAX))
    }

    /// Reads frame `sequence`, which begins at `offset`, to the front of `memory`. Returns its length; it is checked
    /// only as far as that needs.
    ///
    /// # Errors
    /// I/O errors, and [`ErrorKind::BadData`](crate::base::ErrorKind::BadData) for a bad head control block.
    pub fn read_frame(&self, sequence: u64, offset: Bytes, memory: &mut AlignedBuffer) -> Result<Bytes> {
        let layout = self.superblock.layout();
        let mut read = |part: std::ops::Range<usize>| {
            let at = offset + Bytes::from_len(part.start);
            self.file
                .read_exact_at(&mut memory[part], at.get())
                .io_context(|| format!("read frame {sequence} at {} of {}", at.get(), self.path.display()))
        };
        if !layout.is_increment {
            return read(0..layout.frame_bytes().as_len()).map(|()| layout.frame_bytes());
        }
        read(0..BLOCK_BYTES)?;
        let head = frame::open_head(&layout, sequence, memory);
        let head =
            head.map_err(|error| error.at(Block::Frame(sequence), offset, &self.path.display().to_string()))?;
        let length = layout.stored_frame(head.facts.payload_length);
        let mut read =
            |part: std::ops::Range<usize>| self.file.read_exact_at(&mut memory[part], (offset + BLOCK).get());
        read(BLOCK_BYTES..length.as_len())
            .io_context(|| format!("read frame {sequence} at {} of {}", offset.get(), self.path.display()))?;
        Ok(length)
    }
}

/// Reads single blocks while the layout of the archive is still unknown.
struct Reader<'a> {
    file: &'a File,
    path: &'a Path,
    length: Bytes,
}

impl Reader<'_> {
    fn block(&self, offset: Bytes, block: Block) -> Result<AlignedBuffer> {
        let left = self.length.saturating_sub(offset);
        if left < BLOCK {
            let error = ArchiveError::Truncated { found: left.as_len(), expected: BLOCK_BYTES };
            return Err(error.at(block, offset, &self.path.display().to_string()));
        }
        let mut memory = AlignedBuffer::zeroed(BLOCK_BYTES);
        self.file
            .read_exact_at(&mut memory, offset.get())
            .io_context(|| format!("read {block} at {} of {}", offset.get(), self.path.display()))?;
        Ok(memory)
    }

    /// A device is longer than its archive: follows the frames' head control blocks to the end. The device's
    /// size bounds the walk. Returns their number and where they end.
    fn count_frames(&self, layout: &Layout) -> Result<(u64, Bytes)> {
        let (mut sequence, mut offset) = (0, BLOCK);
        loop {
            let memory = self.block(offset, Block::Frame(sequence))?;
            match frame::open_head(layout, sequence, &memory) {
                Ok(head) => {
                    sequence += 1;
                    offset += layout.stored_frame(head.facts.payload_length);
                }
                Err(ArchiveError::Magic { .. }) => return Ok((sequence, offset)),
                Err(error) => {
                    return Err(error.at(Block::Frame(sequence), offset, &self.path.display().to_string()));
                }
            }
        }
    }
}

fn open_direct_or_buffered(path: &Path) -> Result<File> {
    let open = |flags: i32| OpenOptions::new().read(true).custom_flags(flags | libc::O_CLOEXEC).open(path);
    match open(libc::O_DIRECT) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => open(0),
        other => other,
    }
    .io_context(|| format!("open the archive {}", path.display()))
}
