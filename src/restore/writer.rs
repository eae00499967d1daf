//! Writes an archive to a device or a file.
//!
//! Order, and why:
//! 1. Write the data frames at their places, in any order: no two overlap.
//! 2. (After all of those are complete:) zero the ranges without a data frame, both copied zeros and ranges
//!    that were not copied: on a device by a discard if that guarantees zeros; in a new file they are
//!    holes.
//! 3. (After all of those are complete:) write the originals frames, in the order of the archive: they
//!    replace parts of 1 and 2.
//! 4. Check the map and the tail superblock, which show that nothing was missing.
//! 5. Sync, and only then give the file its final name.
//!
//! Invariants:
//! - a byte of a frame is written only after the frame was checked;
//! - a file gets its final name only in step 5: an archive that proves bad leaves nothing under it;
//! - memory: the engine's buffers, and a bit for each segment.
//!
//! Of a chain, each archive is written like that, one after the other, as far as it owns the content.

use std::collections::HashMap;
use std::time::Duration;

use serde::Serialize;

use super::chain::{Chain, engine_config_for_chain};
use super::input::{engine_config_for, read_archive, with_state};
use super::{FrameConsumer, Input};
use crate::base::{Bytes, Extent, Result, SegmentIx};
use crate::extent::ExtentSet;
use crate::format::archive::{FrameFacts, FrameKind, Layout, MapEntry, Superblock, Totals};
use crate::io::open::{EnginePreference, open_engine};
use crate::io::{Buffer, Completion, Driver, EngineConfig, FileIx};
use crate::progress::{Observer, Phase};
use crate::secondary::archive_read::{CheckedFrame, FrameChecker, SegmentBits};
use crate::secondary::raw::RawTarget;
use crate::secondary::{PAYLOAD_OFFSET, Placement, Secondary as _, Segment};

/// Most zero requests in flight; they carry no buffer that would limit them.
const ZEROS_IN_FLIGHT_MAX: usize = 64;

/// Longest range zeroed by one request: a signal waits for its end.
const ZERO_BYTES_MAX: Bytes = Bytes::mib(64);

/// The result of a restore. Sizes in bytes, times in seconds.
#[derive(Clone, Debug, Serialize)]
pub struct RestoreReport {
    /// The archive's name.
    pub archive: String,
    /// The target's name.
    pub target: String,
    /// The engine's name.
    pub engine: &'static str,
    /// The archive's superblock.
    pub superblock: Superblock,
    /// The archive's totals.
    pub totals: Totals,
    /// The archives that it continues, the whole one first; none for a whole archive.
    pub parents: Vec<String>,
    /// Bytes written to the target.
    pub written_bytes: Bytes,
    /// Bytes of the target zeroed by command; the holes of a new file are not counted.
    pub zeroed_bytes: Bytes,
    /// Of those, bytes that were discarded and read as zeros: the device may release their space.
    pub discarded_bytes: Bytes,
    /// Duration of the whole restore.
    pub seconds: f64,
}

/// Writes the archive that `input` reads to `target`. On success the target is complete and synced, and a
/// file has its final name.
///
/// # Errors
/// [`ErrorKind::BadData`](crate::base::ErrorKind::BadData) for a bad archive; I/O errors; any error that the
/// interrupt returns. Each states how the target is left.
pub fn write(
    target: RawTarget,
    input: &Input,
    observer: &dyn Observer,
    interrupt: &dyn Fn() -> Result<()>,
) -> Result<RestoreReport> {
    let (config, facts) = (engine_config_for(input.superblock()), Facts::of(input));
    write_with(target, config, facts, (observer, interrupt), |io, target| write_all(input, io, target))
}

/// Writes the content of `chain` to `target`. Each byte is written once, from the archive that owns it.
///
/// # Errors
/// As [`write()`].
pub fn write_chain(
    target: RawTarget,
    chain: &Chain,
    observer: &dyn Observer,
    interrupt: &dyn Fn() -> Result<()>,
) -> Result<RestoreReport> {
    let (config, facts) = (engine_config_for_chain(chain), Facts::of_chain(chain));
    write_with(target, config, facts, (observer, interrupt), |io, target| {
        write_all_of_chain(chain, io, target).map(|amounts| (*chain.last().totals(), amounts))
    })
}

/// What a report says of an archive.
struct Facts {
    archive: String,
    superblock: Superblock,
    parents: Vec<String>,
}

impl Facts {
    fn of(input: &Input) -> Self {
        let superblock = input.superblock().clone();
        Self { archive: input.description(), superblock, parents: Vec::new() }
    }

    fn of_chain(chain: &Chain) -> Self {
        let last = chain.last();
        Self {
            archive: last.path().display().to_string(),
            superblock: last.superblock().clone(),
            parents: chain.parents(),
        }
    }
}

fn write_with(
    mut target: RawTarget,
    config: EngineConfig,
    facts: Facts,
    (observer, interrupt): (&dyn Observer, &dyn Fn() -> Result<()>),
    write: impl FnOnce(&mut Driver<'_>, &mut RawTarget) -> Result<(Totals, Amounts)>,
) -> Result<RestoreReport> {
    let Facts { archive, superblock, parents } = facts;
    let mut engine = open_engine(config, EnginePreference::Auto)?;
    let name = engine.name();
    let mut io = Driver::new(engine.as_mut(), observer, interrupt);
    match write(&mut io, &mut target) {
        Ok((totals, Amounts { written, zeroed, discarded })) => Ok(RestoreReport {
            archive,
            target: target.description().to_owned(),
            engine: name,
            superblock,
            totals,
            parents,
            written_bytes: written,
            zeroed_bytes: zeroed,
            discarded_bytes: discarded,
            seconds: io.now().as_secs_f64(),
        }),
        Err(error) => {
            io.drain(Duration::MAX, true);
            Err(match target.abandon() {
                Ok(state) => with_state(error, state),
                Err(undo) => error.with_failed_undo(undo),
            })
        }
    }
}

/// Amounts written to the target.
struct Amounts {
    written: Bytes,
    zeroed: Bytes,
    discarded: Bytes,
}

fn write_all(input: &Input, io: &mut Driver<'_>, target: &mut RawTarget) -> Result<(Totals, Amounts)> {
    let file = target.attach(io.engine)?;
    let mut checker = FrameChecker::new(input.superblock().clone(), &input.description());
    io.begin_phase(Phase::Data, input.totals().map(|totals| totals.present_bytes));
    let originals_total = input.totals().map(|totals| totals.originals_bytes);
    let mut writer = Writer::new(target, file, *checker.layout(), originals_total);
    let totals = input.read_all(io, &mut checker, &mut writer)?;
    writer.finish(io, checker.seen())?;
    let (written, zeroed) = (writer.written, writer.zeroed);
    Ok((totals, publish(io, target, file, (written, zeroed))?))
}

/// Writes the archives of a chain, the whole one first. What a later one owns is not written twice.
fn write_all_of_chain(chain: &Chain, io: &mut Driver<'_>, target: &mut RawTarget) -> Result<Amounts> {
    let file = target.attach(io.engine)?;
    io.begin_phase(Phase::Data, Some(chain.owned_bytes()));
    let (mut written, mut zeroed) = (Bytes::ZERO, Bytes::ZERO);
    for (number, link) in chain.links.iter().enumerate() {
        let shown = link.archive.path().display().to_string();
        let mut checker = FrameChecker::new(link.archive.superblock().clone(), &shown);
        let mut writer =
            Writer { owned: Some(&link.owned), ..Writer::new(target, file, *checker.layout(), None) };
        // Originals may follow over zeros. A new file reads as zeros where nothing was written.
        if number == 0 && writer.target.is_device() {
            let zero = [&chain.zero, &chain.absent].into_iter().flat_map(|set| set.iter()).collect();
            writer.zero_all(io, &zero)?;
        }
        read_archive(&link.archive, io, &mut checker, &mut writer)?;
        writer.settle(io)?;
        written += writer.written;
        zeroed += writer.zeroed;
    }
    publish(io, target, file, (written, zeroed))
}

/// Step 5.
fn publish(
    io: &mut Driver<'_>,
    target: &mut RawTarget,
    file: FileIx,
    (written, zeroed): (Bytes, Bytes),
) -> Result<Amounts> {
    let discards = target.is_device() && io.engine.gives_back(file);
    let amounts = Amounts { written, zeroed, discarded: if discards { zeroed } else { Bytes::ZERO } };
    io.report();
    io.begin_phase(Phase::Finish, None);
    io.sync(file)?;
    target.seal()?;
    target.finish()?;
    Ok(amounts)
}

/// Writes frames to the target.
struct Writer<'t> {
    target: &'t mut RawTarget,
    file: FileIx,
    layout: Layout,
    /// Of a chain: the only parts of the origin that are written. Nothing else is zeroed then.
    owned: Option<&'t ExtentSet>,
    originals_total: Option<Bytes>,
    /// The kind of the last frame.
    last_kind: FrameKind,
    /// Requests of this writer, with the range that each changes.
    in_flight: HashMap<u64, InFlight>,
    zeros_in_flight: usize,
    written: Bytes,
    zeroed: Bytes,
}

#[derive(Clone, Copy)]
struct InFlight {
    hull: Extent,
    is_zero: bool,
}

impl FrameConsumer for Writer<'_> {
    fn map(&mut self, _entry: MapEntry) {}

    fn frame(
        &mut self,
        io: &mut Driver<'_>,
        frame: &CheckedFrame,
        seen: &SegmentBits,
        mut buffer: Buffer,
    ) -> Result<()> {
        let facts = &frame.facts;
        if self.last_kind == FrameKind::Data && facts.kind != FrameKind::Data {
            self.end_data(io, seen, facts.kind)?;
        }
        self.last_kind = facts.kind;
        match facts.kind {
            FrameKind::Data | FrameKind::Originals if self.owned.is_some() => {
                let hull = hull(&frame.extents);
                if self.in_flight.values().any(|other| other.hull.overlaps(hull)) {
                    self.settle(io)?;
                }
                let (placement, bytes) = self.place_owned(frame, &mut buffer);
                self.put(io, hull, placement, buffer)?;
                if facts.kind == FrameKind::Data {
                    io.advance(bytes);
                }
            }
            FrameKind::Data => {
                let (placement, extent) = self.place_data(frame, &mut buffer)?;
                self.put(io, extent, placement, buffer)?;
                io.advance(frame.extents.iter().map(|extent| extent.length()).sum());
            }
            FrameKind::Originals => {
                let hull = hull(&frame.extents);
                if self.in_flight.values().any(|other| other.hull.overlaps(hull)) {
                    self.settle(io)?;
                }
                let (placement, _) = self.place_owned(frame, &mut buffer);
                self.put(io, hull, placement, buffer)?;
                io.advance(facts.payload_length);
            }
            FrameKind::Map => io.engine.give_buffer(buffer),
        }
        Ok(())
    }

    fn completed(&mut self, io: &mut Driver<'_>, completion: Completion) -> Result<()> {
        let ended =
            self.in_flight.remove(&completion.token).expect("every token is a frame's or this writer's");
        self.zeros_in_flight -= usize::from(ended.is_zero);
        if let Some(buffer) = completion.buffer {
            io.engine.give_buffer(buffer);
        }
        completion.result.map_err(|error| error.context("writing the target failed"))
    }

    fn has_room(&self) -> bool {
        self.zeros_in_flight < ZEROS_IN_FLIGHT_MAX
    }
}

/// From the first byte of sorted extents to their last.
fn hull(extents: &[Extent]) -> Extent {
    let ends = extents.first().zip(extents.last());
    let hull = ends.and_then(|(first, last)| Extent::new(first.start(), last.end()));
    hull.expect("a checked originals frame has extents, in order")
}

/// The segment's range on the origin.
fn segment_extent(facts: &FrameFacts) -> Extent {
    Extent::with_length(facts.origin_offset, facts.payload_length)
        .expect("a checked data frame is within the origin")
}

impl<'t> Writer<'t> {
    fn new(target: &'t mut RawTarget, file: FileIx, layout: Layout, originals_total: Option<Bytes>) -> Self {
        Self {
            target,
            file,
            layout,
            owned: None,
            originals_total,
            last_kind: FrameKind::Data,
            in_flight: HashMap::new(),
            zeros_in_flight: 0,
            written: Bytes::ZERO,
            zeroed: Bytes::ZERO,
        }
    }

    fn place_data(&mut self, frame: &CheckedFrame, memory: &mut [u8]) -> Result<(Placement, Extent)> {
        let extent = segment_extent(&frame.facts);
        // What was not copied reads as zeros, whatever the payload has there.
        let position = |at: Bytes| PAYLOAD_OFFSET + (at - extent.start()).as_len();
        let mut at = extent.start();
        for part in &frame.extents {
            memory[position(at)..position(part.start())].fill(0);
            at = part.end();
        }
        memory[position(at)..position(extent.end())].fill(0);
        let ix = self.layout.segment.index_of(extent.start());
        let segment = Segment { ix, extent, valid: &[extent], checksum: None, zero: false };
        Ok((self.target.place(&segment, memory)?, extent))
    }

    /// Places the extents of a frame, as far as they are owned; returns their bytes too.
    fn place_owned(&mut self, frame: &CheckedFrame, memory: &mut [u8]) -> (Placement, Bytes) {
        let (mut all, mut bytes) = (Placement::default(), Bytes::ZERO);
        for (extent, at) in frame.parts() {
            // The extents are sorted, so each begins at or after the bytes packed before it: never negative.
            let memory_offset = extent.start() - at;
            let owned: Vec<Extent> = match self.owned {
                Some(owned) => owned.intersection_with(extent).collect(),
                None => vec![extent],
            };
            let placement = self.target.lay_out(&owned, memory_offset, false, memory);
            all.pieces.extend(placement.pieces);
            all.zeros.extend(placement.zeros);
            bytes += owned.iter().map(|extent| extent.length()).sum();
        }
        (all, bytes)
    }

    /// Zeroes ranges of a device.
    fn zero_all(&mut self, io: &mut Driver<'_>, extents: &ExtentSet) -> Result<()> {
        for part in extents.iter().flat_map(|extent| extent.split(ZERO_BYTES_MAX)) {
            self.zero_run(io, Some(part))?;
        }
        self.settle(io)
    }

    fn put(&mut self, io: &mut Driver<'_>, hull: Extent, placement: Placement, buffer: Buffer) -> Result<()> {
        for extent in placement.zeros {
            self.zero(io, extent)?;
        }
        if placement.pieces.is_empty() {
            io.engine.give_buffer(buffer);
            return Ok(());
        }
        self.written += placement.pieces.iter().map(|piece| Bytes::from_len(piece.range.len())).sum();
        let token = io.write(self.file, buffer, placement.pieces)?;
        self.in_flight.insert(token, InFlight { hull, is_zero: false });
        Ok(())
    }

    fn zero(&mut self, io: &mut Driver<'_>, extent: Extent) -> Result<()> {
        self.zeroed += extent.length();
        let token = io.zero(self.file, extent)?;
        self.in_flight.insert(token, InFlight { hull: extent, is_zero: true });
        self.zeros_in_flight += 1;
        Ok(())
    }

    /// Waits until all requests of this writer have completed.
    fn settle(&mut self, io: &mut Driver<'_>) -> Result<()> {
        while !self.in_flight.is_empty() {
            let tokens = &self.in_flight;
            let completion = io.next_of(&|token| tokens.contains_key(&token))?;
            self.completed(io, completion.expect("requests of this writer are in flight"))?;
        }
        Ok(())
    }

    /// Step 2, between the data frames and the following ones.
    fn end_data(&mut self, io: &mut Driver<'_>, seen: &SegmentBits, next: FrameKind) -> Result<()> {
        self.settle(io)?;
        // A new file reads as zeros where nothing was written. What a chain holds nowhere is zeroed apart.
        if self.target.is_device() && self.owned.is_none() {
            let segment = self.layout.segment;
            let count = segment.count_for(self.layout.origin_size);
            let mut run: Option<Extent> = None;
            for ix in (0..count).map(SegmentIx).filter(|ix| !seen.get(*ix)) {
                let start = segment.offset_of(ix).expect("a segment is within the origin");
                let end = self.layout.origin_size.min(start + segment.bytes());
                run = match run {
                    Some(run) if run.end() == start && run.length() < ZERO_BYTES_MAX => {
                        Extent::new(run.start(), end)
                    }
                    other => {
                        self.zero_run(io, other)?;
                        Extent::new(start, end)
                    }
                };
            }
            self.zero_run(io, run)?;
            self.settle(io)?;
        }
        if next == FrameKind::Originals {
            io.report();
            io.begin_phase(Phase::Originals, self.originals_total);
        }
        Ok(())
    }

    fn zero_run(&mut self, io: &mut Driver<'_>, run: Option<Extent>) -> Result<()> {
        let Some(run) = run else { return Ok(()) };
        if !self.has_room() {
            self.settle(io)?;
        }
        let extent = self.target.zeroed(run);
        self.zero(io, extent)
    }

    /// Waits for the last requests, and ends an archive without any frame after the data.
    fn finish(&mut self, io: &mut Driver<'_>, seen: &SegmentBits) -> Result<()> {
        if self.last_kind == FrameKind::Data {
            self.end_data(io, seen, FrameKind::Map)?;
        }
        self.settle(io)
    }
}
