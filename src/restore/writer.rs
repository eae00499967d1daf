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

use std::collections::HashMap;
use std::time::Duration;

use serde::Serialize;

use super::input::{engine_config_for, with_state};
use super::{FrameConsumer, Input};
use crate::base::{Bytes, Extent, Result, SegmentIx};
use crate::format::archive::{FrameFacts, FrameKind, Layout, MapEntry, Superblock, Totals};
use crate::io::open::{EnginePreference, open_engine};
use crate::io::{Buffer, Completion, Driver, FileIx};
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
    mut target: RawTarget,
    input: &Input,
    superblock: Superblock,
    observer: &dyn Observer,
    interrupt: &dyn Fn() -> Result<()>,
) -> Result<RestoreReport> {
    let config = engine_config_for(&superblock);
    let mut engine = open_engine(config, EnginePreference::Auto)?;
    let name = engine.name();
    let mut io = Driver::new(engine.as_mut(), observer, interrupt);
    match write_all(input, &mut io, &mut target) {
        Ok((totals, Amounts { written, zeroed, discarded })) => Ok(RestoreReport {
            archive: input.description(),
            target: target.description().to_owned(),
            engine: name,
            superblock,
            totals,
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
    let mut writer = Writer {
        target,
        file,
        layout: *checker.layout(),
        originals_total: input.totals().map(|totals| totals.originals_bytes),
        last_kind: FrameKind::Data,
        in_flight: HashMap::new(),
        zeros_in_flight: 0,
        written: Bytes::ZERO,
        zeroed: Bytes::ZERO,
    };
    let totals = input.read_all(io, &mut checker, &mut writer)?;
    writer.finish(io, checker.seen())?;
    let (written, zeroed) = (writer.written, writer.zeroed);
    let discards = target.is_device() && io.engine.gives_back(file);
    let amounts = Amounts { written, zeroed, discarded: if discards { zeroed } else { Bytes::ZERO } };
    io.report();
    io.begin_phase(Phase::Finish, None);
    io.sync(file)?;
    target.seal()?;
    target.finish()?;
    Ok((totals, amounts))
}

/// Writes frames to the target.
struct Writer<'t> {
    target: &'t mut RawTarget,
    file: FileIx,
    layout: Layout,
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
                let placement = self.place_originals(&frame.extents, &mut buffer);
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

impl Writer<'_> {
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

    fn place_originals(&mut self, extents: &[Extent], memory: &mut [u8]) -> Placement {
        let mut all = Placement::default();
        let mut packed = Bytes::ZERO;
        for extent in extents {
            // The extents are sorted, so each begins at or after the bytes packed before it: never negative.
            let memory_offset = extent.start() - packed;
            let placement = self.target.lay_out(&[*extent], memory_offset, false, memory);
            all.pieces.extend(placement.pieces);
            all.zeros.extend(placement.zeros);
            packed += extent.length();
        }
        all
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
        // A new file reads as zeros where nothing was written.
        if self.target.is_device() {
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
