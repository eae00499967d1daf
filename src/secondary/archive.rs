//! An archive in a file or a pipe: framed segments (see [`crate::format::archive`]).
//!
//! Invariants:
//! - data frames are numbered in the order in which their segments are placed, which may be any order
//!   ([`frames`](super::frames)). A segment of zeros has no frame, with two exceptions: an original changes
//!   it later (its frame then follows the other data frames), or it fills a number that a killed copy left
//!   unused;
//! - a changed frame is rewritten as a whole at its place, with both its control blocks;
//! - the tail superblock is written last: an archive without it is incomplete, whatever happened to its
//!   writer;
//! - an archive file gets its name only when it is complete. A pipe has no such protection; its reader has to
//!   look for the tail superblock.
//!
//! [`Archive::reopen`] resumes a copy that was killed: it keeps the identity, the instant and the data frames
//! in their places, and writes everything after them (originals, map, tail superblock) again.
//!
//! Memory: four bytes for each segment.

use std::fs::File;
use std::io::IsTerminal as _;
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use uuid::Uuid;

use super::archive_read::SegmentBits;
use super::frames::Frames;
use super::identity::Recognition;
use super::packed::PackedFrames;
use super::partial::PartialFile;
use super::raw::forget_cache;
use super::{
    Lineage, OriginalsMode, PAYLOAD_OFFSET, Placement, Resumed, Secondary, SecondaryRequest, SecondaryTarget,
    Segment,
};
use crate::base::{Bytes, DeviceNumber, Error, Result, ResultExt as _, SegmentIx, directory_of};
use crate::extent::Extent;
use crate::format::archive::{
    ArchiveError, BLOCK, Block, FrameFacts, FrameKind, Layout, Superblock, Totals, Version, control, frame,
    frame_offset, map,
};
use crate::format::state::TargetRecord;
use crate::io::{Engine, FileIx, Piece, Place};
use crate::sys::stdio::stdout_was_closed;
use crate::topology::Topology;

#[derive(Debug)]
enum Out {
    File(PartialFile),
    Pipe(File),
}

/// The next block to write after the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Closing {
    /// A map frame; the number of entries already written.
    Map(usize),
    Tail,
    Done,
}

/// An archive that is being written.
#[derive(Debug)]
pub struct Archive {
    out: Out,
    description: String,
    superblock: Superblock,
    layout: Layout,
    block_list: Vec<Extent>,
    frames: Frames,
    /// The frames of an increment; `frames` has none then.
    packed: Option<PackedFrames>,
    /// The totals so far, except the data frames, which `frames` counts.
    other_totals: Totals,
    /// Set if a process died while it applied originals to the data: a data frame that has originals may be
    /// torn, unless this process has rewritten it since.
    rewritten: Option<SegmentBits>,
    head_written: bool,
    closing: Closing,
}

impl Archive {
    /// Opens and checks the target. An archive file exists under its partial name afterwards.
    ///
    /// # Errors
    /// Refusals (see [`guard`](super::guard)), also of a terminal as standard output; I/O errors.
    pub fn open(request: &SecondaryRequest) -> Result<Self> {
        match &request.target {
            SecondaryTarget::Pipe => Ok(Self::over_stream(open_pipe(request)?, "standard output", request)),
            SecondaryTarget::Path(path) => {
                let out = Out::File(open_file(path, request)?);
                Ok(Self::new(out, path.display().to_string(), request))
            }
        }
    }

    /// The checks of [`Archive::open`], without creating anything. Standard output is checked only when it is
    /// opened.
    ///
    /// # Errors
    /// As [`Archive::open`].
    pub fn check(request: &SecondaryRequest) -> Result<()> {
        let SecondaryTarget::Path(path) = &request.target else { return Ok(()) };
        check_place(path, request)?;
        PartialFile::check(path, request.replace)
    }

    /// Writes to an open stream: standard output, or a pipe of the caller.
    #[must_use]
    pub fn over_stream(stream: File, description: &str, request: &SecondaryRequest) -> Self {
        Self::new(Out::Pipe(stream), description.to_owned(), request)
    }

    fn new(out: Out, description: String, request: &SecondaryRequest) -> Self {
        let lineage = request.lineage;
        let superblock = Superblock {
            version: if lineage == Lineage::default() { Version::CURRENT } else { Version::NAMING },
            archive: Uuid::new_v4(),
            parent: lineage.parent,
            snapshot: lineage.snapshot,
            base: lineage.base,
            origin_name: request.origin.name.clone(),
            origin_path: request.origin.path.clone(),
            origin_size: request.origin.size,
            instant_utc_ns: 0,
            chunk: request.chunk,
            segment: request.segment,
            originals: request.originals,
            tool: concat!("tidemark ", env!("CARGO_PKG_VERSION")).to_owned(),
        };
        let count = request.segment.count_for(request.origin.size);
        Self {
            out,
            description,
            layout: superblock.layout(),
            superblock,
            block_list: request.block_list.clone(),
            frames: Frames::new(count),
            packed: (!lineage.parent.is_nil()).then(PackedFrames::default),
            other_totals: Totals::default(),
            rewritten: None,
            head_written: false,
            closing: Closing::Map(0),
        }
    }

    /// Opens the file of a copy that was killed, to resume it.
    ///
    /// # Errors
    /// Refusals, also if the partial file is missing or was not created by Tidemark; a pipe, which cannot
    /// be resumed; [`ErrorKind::BadData`](crate::base::ErrorKind::BadData) if `state` does not fit the
    /// request.
    pub fn reopen(request: &SecondaryRequest, state: &Resumed) -> Result<Self> {
        let (SecondaryTarget::Path(path), Some(archive)) = (&request.target, state.archive) else {
            return Err(Error::refused("a copy to standard output cannot be resumed")
                .state("nothing was written")
                .next("run 'tidemark recover', and copy again"));
        };
        let count = request.segment.count_for(request.origin.size);
        let frames = Frames::rebuilt(count, &state.placed)?;
        let present = |ix: SegmentIx| {
            let start = request.segment.offset_of(ix).expect("a segment is within the origin");
            let end = request.origin.size.min(start + request.segment.bytes());
            let extent = Extent::new(start, end).expect("a segment is never empty");
            let at = request.block_list.partition_point(|listed| listed.end() <= start);
            let parts = request.block_list[at..].iter().map_while(move |part| part.intersection(extent));
            parts.map(Extent::length).sum::<Bytes>()
        };
        let framed = state.placed.iter().filter(|segment| segment.frame.is_some());
        let present_bytes = framed.map(|segment| present(segment.ix)).sum();
        Topology::default().check_file(directory_of(path), &request.forbidden)?;
        // Last, so that any refusal before this leaves the partial file for a later attempt.
        let mut partial =
            PartialFile::reopen(state.partial.as_deref(), path, request.replace, state.target.as_ref())?;
        let end = frame_offset(frames.end(), request.segment)
            .expect("an origin of at most SEGMENT_COUNT_MAX segments gives offsets below 2^63");
        let needed = if frames.end() == 0 { Bytes::ZERO } else { end };
        if let Err(error) = partial.check_length(needed) {
            partial.leave();
            return Err(error);
        }
        let mut reopened = Self::new(Out::File(partial), path.display().to_string(), request);
        reopened.superblock.archive = archive;
        reopened.superblock.instant_utc_ns = state.instant_ns;
        // The head superblock is written again with the same bytes, whether the killed process wrote it or
        // not.
        reopened.layout = reopened.superblock.layout();
        reopened.frames = frames;
        reopened.other_totals.present_bytes = present_bytes;
        let is_overlaid = state.originals_begun && request.originals == OriginalsMode::Overlay;
        reopened.rewritten = is_overlaid.then(|| SegmentBits::new(count));
        Ok(reopened)
    }

    /// The totals so far.
    fn totals(&self) -> Totals {
        let data_frames = self.packed.as_ref().map_or(self.frames.end(), |packed| packed.data);
        Totals { data_frames, ..self.other_totals }
    }

    /// Nothing may follow the data while a data frame is missing.
    fn check_data_is_whole(&self) -> Result<()> {
        match self.frames.gap_count() {
            0 => Ok(()),
            gaps => Err(Error::bad_data(format!(
                "{} lacks {gaps} data frames: the segment log belongs to another copy",
                self.description
            ))
            .next("run 'tidemark recover', and copy again")),
        }
    }

    /// Extends the file to its greatest possible length, because a direct write past the end of a file waits
    /// for all other writes, and one within it does not. [`Secondary::seal`] truncates it. A failure is
    /// ignored: a filesystem that refuses this length may still have room for what is really written.
    fn lengthen(&self, file: &File) {
        if self.packed.is_some() {
            return;
        }
        let length = self.frame_at(self.frames.segment_count()) + BLOCK;
        if let Err(error) = file.set_len(length.get()) {
            tracing::debug!(%error, "the archive's file grows as it is written");
        }
    }

    fn place_at(&self, offset: Bytes) -> Place {
        match self.out {
            Out::File(_) => Place::At(offset),
            Out::Pipe(_) => Place::Stream,
        }
    }

    fn frame_at(&self, sequence: u64) -> Bytes {
        if let Some(packed) = &self.packed {
            return packed.offset_of(sequence);
        }
        frame_offset(sequence, self.layout.segment)
            .expect("an origin of at most SEGMENT_COUNT_MAX segments gives offsets below 2^63")
    }

    fn frame_piece(&self, sequence: u64) -> Piece {
        let packed = self.packed.as_ref().and_then(|packed| packed.get(sequence));
        let length = packed.map_or(self.layout.frame_bytes(), |packed| packed.length);
        Piece { range: 0..length.as_len(), place: self.place_at(self.frame_at(sequence)) }
    }

    /// A block of 4 KiB at the front of a buffer.
    fn block(&self, offset: Bytes) -> Placement {
        Placement {
            pieces: vec![Piece { range: 0..BLOCK.as_len(), place: self.place_at(offset) }],
            zeros: vec![],
        }
    }

    /// An encoder's refusal: the format cannot express these values.
    fn unfit(&self, error: ArchiveError) -> Error {
        Error::usage(format!("the format of {} cannot represent this copy", self.description))
            .with_source(error)
            .next("choose a smaller --segment, or --format raw")
    }

    /// Frames the payload in `memory`.
    fn frame(
        &mut self,
        kind: FrameKind,
        sequence: u64,
        extents: &[Extent],
        facts: (Bytes, Bytes, u64),
        memory: &mut [u8],
    ) -> Result<Placement> {
        let (origin_offset, payload_length, payload_checksum) = facts;
        let facts = FrameFacts { sequence, kind, origin_offset, payload_length, payload_checksum };
        frame::seal(&self.layout, &facts, extents, memory).map_err(|error| self.unfit(error))?;
        if let Some(packed) = &mut self.packed {
            packed.add(self.layout.stored_frame(payload_length), payload_checksum);
        }
        Ok(Placement { pieces: vec![self.frame_piece(sequence)], zeros: vec![] })
    }

    /// Frames extents that are packed one after the other; returns their bytes too.
    fn packed_frame(
        &mut self,
        kind: FrameKind,
        sequence: u64,
        extents: &[Extent],
        memory: &mut [u8],
    ) -> Result<(Placement, Bytes)> {
        let bytes: Bytes = extents.iter().map(|extent| extent.length()).sum();
        let start = extents.first().expect("a packed frame holds one extent at least").start();
        let checksum = self.layout.version.payload_checksum(&memory[PAYLOAD_OFFSET..][..bytes.as_len()]);
        Ok((self.frame(kind, sequence, extents, (start, bytes, checksum), memory)?, bytes))
    }

    fn data_frame(&mut self, sequence: u64, segment: &Segment<'_>, memory: &mut [u8]) -> Result<Placement> {
        let checksum =
            segment.checksum.expect("an archive says that it is framed: checksums are computed for it");
        let facts = (segment.extent.start(), segment.extent.length(), checksum);
        self.frame(FrameKind::Data, sequence, segment.valid, facts, memory)
    }

    /// The next data frame, for a segment that has none.
    fn new_data_frame(&mut self, segment: &Segment<'_>, memory: &mut [u8]) -> Result<Placement> {
        let placement = self.data_frame(self.frames.next_number(), segment, memory)?;
        self.frames.assign(segment.ix);
        self.other_totals.present_bytes += segment.valid.iter().map(|extent| extent.length()).sum();
        Ok(placement)
    }

    /// The first frame that [`Secondary::extra`] reads: data frames of segments are read as such.
    fn first_extra(&self) -> u64 {
        if self.packed.is_some() { 0 } else { self.totals().data_frames }
    }

    fn map_frame(&mut self, skip: usize, memory: &mut [u8]) -> Result<Option<Placement>> {
        let payload = &mut memory[PAYLOAD_OFFSET..][..self.layout.segment.bytes().as_len()];
        // Each frame starts from the first entry again. That is cheap: a map frame holds thousands of
        // entries, so an archive has few of them.
        let filled = match &self.packed {
            Some(packed) => {
                let (size, inherited) = (self.layout.origin_size, &packed.inherited);
                map::fill(&mut map::increment_entries(size, &self.block_list, inherited).skip(skip), payload)
            }
            None => {
                let has_frame = |ix| self.frames.get(ix).is_some();
                map::fill(&mut map::entries(&self.layout, &self.block_list, has_frame).skip(skip), payload)
            }
        };
        let Some((start, used)) = filled else { return Ok(None) };
        let checksum = self.layout.version.payload_checksum(&memory[PAYLOAD_OFFSET..][..used.as_len()]);
        let sequence = self.totals().sequence_end();
        if self.packed.is_some() && self.other_totals.map_frames == 0 {
            self.other_totals.map_offset = self.frame_at(sequence);
        }
        let placement = self.frame(FrameKind::Map, sequence, &[], (start, used, checksum), memory)?;
        self.other_totals.map_frames += 1;
        self.closing = Closing::Map(skip + used.as_len() / map::ENTRY_BYTES);
        Ok(Some(placement))
    }

    fn check_frame<'m>(&self, sequence: u64, memory: &'m [u8]) -> Result<frame::Frame<'m>> {
        frame::open(&self.layout, sequence, memory).map_err(|error| self.bad(sequence, error))
    }

    fn bad(&self, sequence: u64, error: ArchiveError) -> Error {
        error.at(Block::Frame(sequence), self.frame_at(sequence), &self.description)
    }

    /// Compares a superblock that was read back with the one that was written.
    fn check_superblock(&self, tail: bool, memory: &[u8]) -> Result<()> {
        let block = &memory[..BLOCK.as_len()];
        let (which, offset) = if tail {
            (Block::TailSuperblock, self.frame_at(self.totals().sequence_end()))
        } else {
            (Block::HeadSuperblock, Bytes::ZERO)
        };
        let same = if tail {
            Superblock::decode_tail(block)
                .map(|(superblock, totals)| superblock == self.superblock && totals == self.totals())
        } else {
            Superblock::decode_head(block).map(|superblock| superblock == self.superblock)
        };
        match same {
            Ok(true) => Ok(()),
            Ok(false) => Err(ArchiveError::Superblocks.at(which, offset, &self.description)),
            Err(error) => Err(error.at(which, offset, &self.description)),
        }
    }
}

fn open_file(path: &Path, request: &SecondaryRequest) -> Result<PartialFile> {
    check_place(path, request)?;
    PartialFile::create(path, request.replace)
}

fn check_place(path: &Path, request: &SecondaryRequest) -> Result<()> {
    let found = std::fs::metadata(path);
    if found.is_ok_and(|metadata| metadata.file_type().is_block_device()) {
        return Err(Error::refused(format!("{} is a block device; an archive is a file", path.display()))
            .state("it was not touched")
            .next("use --format raw for a device, or name a file for the archive"));
    }
    Topology::default().check_file(directory_of(path), &request.forbidden)
}

/// True for a fault that a mixture of two versions of the same frame can show.
fn is_mixture(error: &ArchiveError) -> bool {
    matches!(
        error,
        ArchiveError::BlockChecksum { .. } | ArchiveError::Torn | ArchiveError::PayloadChecksum { .. }
    )
}

fn open_pipe(request: &SecondaryRequest) -> Result<File> {
    if request.verify {
        return Err(Error::usage("an archive sent to standard output cannot be read back")
            .next("omit --verify, and run 'tidemark verify' where the archive is stored"));
    }
    if request.originals == OriginalsMode::Overlay {
        return Err(Error::usage(
            "originals cannot be applied to data that was already sent to standard output",
        )
        .next("use --originals append, the default for -"));
    }
    if stdout_was_closed() {
        return Err(Error::usage("standard output, where the archive would be written, is closed")
            .next("redirect standard output to a file or a pipe, or name the archive"));
    }
    let stdout = std::io::stdout();
    if stdout.is_terminal() {
        return Err(Error::usage("standard output, where the archive would be written, is a terminal")
            .next("redirect standard output to a file or a pipe, or name the archive"));
    }
    let file = stdout
        .as_fd()
        .try_clone_to_owned()
        .map(File::from)
        .io_context(|| "duplicate the handle of standard output".to_owned())?;
    check_redirection(&file, &request.forbidden)?;
    Ok(file)
}

/// Standard output may be redirected to a file or device to which a copy must not be written.
fn check_redirection(file: &File, forbidden: &[DeviceNumber]) -> Result<()> {
    let metadata = file.metadata().io_context(|| "stat of standard output".to_owned())?;
    let topology = Topology::default();
    if metadata.file_type().is_block_device() {
        let device = DeviceNumber::from_dev(metadata.rdev());
        return topology.check_device(device, Path::new("standard output"), forbidden);
    }
    if metadata.is_file() {
        return topology.check_filesystem(
            DeviceNumber::from_dev(metadata.dev()),
            "standard output",
            forbidden,
        );
    }
    Ok(())
}

impl Secondary for Archive {
    fn description(&self) -> &str {
        &self.description
    }

    fn is_ordered(&self) -> bool {
        true
    }

    fn is_stream(&self) -> bool {
        matches!(self.out, Out::Pipe(_))
    }

    fn appends(&self) -> bool {
        self.superblock.originals == OriginalsMode::Append
    }

    fn is_framed(&self) -> bool {
        true
    }

    fn set_instant(&mut self, instant_ns: u64) {
        self.superblock.instant_utc_ns = instant_ns;
    }

    fn restrict(&mut self, block_list: &[Extent]) {
        self.block_list = block_list.to_vec();
    }

    fn inherit(&mut self, inherited: &[Extent]) {
        if let Some(packed) = &mut self.packed {
            packed.inherited = inherited.to_vec();
        }
    }

    fn is_packed(&self) -> bool {
        self.packed.is_some()
    }

    fn place_packed(&mut self, extents: &[Extent], memory: &mut [u8]) -> Result<Placement> {
        let sequence = self.totals().data_frames;
        let (placement, bytes) = self.packed_frame(FrameKind::Data, sequence, extents, memory)?;
        if let Some(packed) = &mut self.packed {
            packed.data += 1;
        }
        self.other_totals.present_bytes += bytes;
        Ok(placement)
    }

    fn attach(&mut self, engine: &mut dyn Engine) -> Result<FileIx> {
        let file = match &self.out {
            Out::File(partial) => {
                self.lengthen(partial.file());
                partial.file()
            }
            Out::Pipe(file) => file,
        };
        let file = file.try_clone().io_context(|| format!("duplicate the handle of {}", self.description))?;
        engine.add_file(file.into(), &self.description)
    }

    fn opening(&mut self, memory: &mut [u8]) -> Result<Option<Placement>> {
        if self.head_written {
            return Ok(None);
        }
        self.superblock.encode_head(memory).map_err(|error| self.unfit(error))?;
        self.head_written = true;
        Ok(Some(self.block(Bytes::ZERO)))
    }

    fn place(&mut self, segment: &Segment<'_>, memory: &mut [u8]) -> Result<Placement> {
        let needs_none = segment.zero && !self.frames.must_fill_gap();
        if needs_none { Ok(Placement::default()) } else { self.new_data_frame(segment, memory) }
    }

    fn frame_number(&self, ix: SegmentIx) -> Option<u64> {
        self.frames.get(ix)
    }

    fn stored(&self, segment: &Segment<'_>) -> Option<Vec<Piece>> {
        self.frames.get(segment.ix).map(|sequence| vec![self.frame_piece(sequence)])
    }

    /// If a process died while it applied originals to the data, a frame may be torn: some of its blocks
    /// are the old ones, others the new ones. Such a frame is accepted, and all its originals are applied to
    /// it again. Why that gives the right payload: the two versions differ in their control blocks, which are
    /// rewritten, and in the payload only within extents of originals. The store has kept every original, and
    /// each is applied again in this run. So each byte in which the two versions differ is set to its value
    /// at the instant; every other byte is the same in both. A frame that this process has rewritten is not
    /// accepted torn any more; a fault that no such mixture can show (another magic number, sequence or
    /// archive) is never accepted.
    fn check_stored(&self, segment: &Segment<'_>, memory: &[u8], may_be_torn: bool) -> Result<()> {
        let Some(sequence) = self.frames.get(segment.ix) else { return Ok(()) };
        let is_rewritten = |rewritten: &SegmentBits| rewritten.get(segment.ix);
        let may_be_torn = may_be_torn && self.rewritten.as_ref().is_some_and(|bits| !is_rewritten(bits));
        let frame = match frame::open(&self.layout, sequence, memory) {
            Err(error) if may_be_torn && is_mixture(&error) => {
                tracing::info!(sequence, %error, "a data frame is torn: applying its originals again");
                return Ok(());
            }
            opened => opened.map_err(|error| self.bad(sequence, error))?,
        };
        let facts = frame.control.facts;
        if facts.kind != FrameKind::Data || facts.origin_offset != segment.extent.start() {
            let error = ArchiveError::Field { field: "the origin offset", value: facts.origin_offset.get() };
            return Err(self.bad(sequence, error));
        }
        if !frame.control.extents().eq(segment.valid.iter().copied()) {
            return Err(self.bad(sequence, ArchiveError::Extent { index: 0 }));
        }
        Ok(())
    }

    fn overlay(
        &mut self,
        segment: &Segment<'_>,
        _changed: &[Extent],
        memory: &mut [u8],
    ) -> Result<Placement> {
        if let Some(rewritten) = &mut self.rewritten {
            rewritten.set(segment.ix);
        }
        match self.frames.get(segment.ix) {
            Some(sequence) => self.data_frame(sequence, segment, memory),
            None if segment.zero => Ok(Placement::default()),
            None => self.new_data_frame(segment, memory),
        }
    }

    fn append_extents_max(&self) -> usize {
        control::EXTENTS_MAX
    }

    fn append(&mut self, originals: &[Extent], memory: &mut [u8]) -> Result<Placement> {
        self.check_data_is_whole()?;
        let sequence = self.totals().first_map();
        let (placement, bytes) = self.packed_frame(FrameKind::Originals, sequence, originals, memory)?;
        self.other_totals.originals_frames += 1;
        self.other_totals.originals_bytes += bytes;
        Ok(placement)
    }

    fn closing(&mut self, memory: &mut [u8]) -> Result<Option<Placement>> {
        self.check_data_is_whole()?;
        if let Closing::Map(skip) = self.closing {
            if let Some(placement) = self.map_frame(skip, memory)? {
                return Ok(Some(placement));
            }
            self.closing = Closing::Tail;
        }
        if self.closing == Closing::Done {
            return Ok(None);
        }
        self.closing = Closing::Done;
        self.superblock.encode_tail(&self.totals(), memory).map_err(|error| self.unfit(error))?;
        Ok(Some(self.block(self.frame_at(self.totals().sequence_end()))))
    }

    /// The head superblock, the originals and map frames, the tail superblock; of an increment also the data frames.
    fn extra(&self, unit: u64) -> Option<Vec<Piece>> {
        let frames = self.totals().sequence_end() - self.first_extra();
        match unit {
            0 => Some(self.block(Bytes::ZERO).pieces),
            unit if unit <= frames => Some(vec![self.frame_piece(self.first_extra() + unit - 1)]),
            unit if unit == frames + 1 => {
                Some(self.block(self.frame_at(self.totals().sequence_end())).pieces)
            }
            _ => None,
        }
    }

    fn check_extra(&self, unit: u64, memory: &[u8]) -> Result<()> {
        let totals = self.totals();
        if unit == 0 || unit > totals.sequence_end() - self.first_extra() {
            return self.check_superblock(unit > 0, memory);
        }
        let sequence = self.first_extra() + unit - 1;
        let frame = self.check_frame(sequence, memory)?;
        let found = frame.control.facts.payload_checksum;
        let written = self.packed.as_ref().and_then(|packed| packed.get(sequence));
        if written.is_some_and(|written| written.checksum != found) {
            return Err(self.bad(sequence, ArchiveError::Torn));
        }
        let expected = match sequence {
            sequence if sequence < totals.data_frames => FrameKind::Data,
            sequence if sequence < totals.first_map() => FrameKind::Originals,
            _ => FrameKind::Map,
        };
        if frame.control.facts.kind == expected {
            return Ok(());
        }
        let error = ArchiveError::KindOrder { found: frame.control.facts.kind, before: expected };
        Err(self.bad(sequence, error))
    }

    fn partial_path(&self) -> Option<&Path> {
        match &self.out {
            Out::File(partial) => Some(partial.partial()),
            Out::Pipe(_) => None,
        }
    }

    fn recognition(&self) -> Recognition {
        match &self.out {
            Out::File(partial) => partial.recognition(),
            Out::Pipe(_) => Recognition::Uninterrupted,
        }
    }

    fn forget(&mut self, segment: &Segment<'_>) {
        if self.frames.unassign(segment.ix) {
            self.other_totals.present_bytes -= segment.valid.iter().map(|extent| extent.length()).sum();
        }
    }

    fn target(&self) -> Option<&TargetRecord> {
        match &self.out {
            Out::File(partial) => Some(partial.identity()),
            Out::Pipe(_) => None,
        }
    }

    fn archive_id(&self) -> Option<Uuid> {
        Some(self.superblock.archive)
    }

    fn forget_cache(&self) {
        if let Out::File(partial) = &self.out {
            forget_cache(partial.file(), &self.description);
        }
    }

    fn seal(&mut self) -> Result<()> {
        let Out::File(partial) = &self.out else { return Ok(()) };
        let length = self.frame_at(self.totals().sequence_end()) + BLOCK;
        partial
            .file()
            .set_len(length.get())
            .io_context(|| format!("set the length of {} to {}", self.description, length.get()))
    }

    fn finish(&mut self) -> Result<()> {
        match &mut self.out {
            Out::File(partial) => partial.publish(),
            Out::Pipe(_) => Ok(()),
        }
    }

    fn leave(&mut self) {
        if let Out::File(partial) = &mut self.out {
            partial.leave();
        }
    }

    fn abandon(&mut self) -> Result<String> {
        match &mut self.out {
            Out::File(partial) => partial.abandon(),
            Out::Pipe(_) => Ok("the data sent to standard output is not a complete archive; restore and \
                                verify refuse it"
                .to_owned()),
        }
    }
}
