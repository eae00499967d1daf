//! An archive becomes a device or a file again.
//!
//! Order, and why:
//! 1. data frames, each at its place, in any order: no two touch;
//! 2. (all of those complete) ranges without a data frame, copied zeros and what was not copied alike,
//!    become zeros: on a device by a discard where that guarantees zeros, in a new file they are holes;
//! 3. (all of those complete) originals frames, in the order of the archive: they lie over 1 and 2;
//! 4. the map and the tail superblock say that nothing was missing;
//! 5. sync, and only then the final name.
//!
//! Invariants:
//! - a byte of a frame is written only after the frame was checked;
//! - a file has its final name only after 5: an archive that turns out bad leaves nothing there;
//! - memory: the engine's buffers, and a bit for each segment.

use std::collections::HashMap;
use std::time::Duration;

use serde::Serialize;

use super::input::{engine_config_for, with_state};
use super::{FrameUser, Input};
use crate::base::{Bytes, Extent, Result, SegmentIx};
use crate::format::archive::{FrameFacts, FrameKind, Layout, MapEntry, Superblock, Totals};
use crate::io::open::{EnginePreference, open_engine};
use crate::io::{Buffer, Completion, Driver, FileIx};
use crate::progress::{Observer, Phase};
use crate::secondary::archive_read::{CheckedFrame, FrameChecker, SegmentBits};
use crate::secondary::raw::RawTarget;
use crate::secondary::{PAYLOAD_OFFSET, Placement, Secondary as _, Segment};

/// Zero requests in flight at most; they carry no buffer that would bound them.
const ZEROS_IN_FLIGHT_MAX: usize = 64;

/// Longest range zeroed by one request: what a signal has to wait for.
const ZERO_BYTES_MAX: Bytes = Bytes::mib(64);

/// What a restore did. Sizes in bytes, times in seconds.
#[derive(Clone, Debug, Serialize)]
pub struct RestoreReport {
    /// The archive's name.
    pub archive: String,
    /// The target's name.
    pub target: String,
    /// The engine's name.
    pub engine: &'static str,
    /// What the archive says of itself.
    pub superblock: Superblock,
    /// What it held.
    pub totals: Totals,
    /// Bytes written to the target.
    pub written_bytes: Bytes,
    /// Bytes of the target made zero by command; the holes of a new file are not counted.
    pub zeroed_bytes: Bytes,
    /// Of those, bytes that a device was told it may give back: discarded, and read as zeros.
    pub discarded_bytes: Bytes,
    /// The whole restore.
    pub seconds: f64,
}

/// Writes what `input` holds to `target`; on success that is complete and synced, and a file has its final name.
///
/// # Errors
/// [`ErrorKind::BadData`](crate::base::ErrorKind::BadData) for a bad archive, I/O errors, whatever the interrupt answers;
/// each with the state in which the target is left.
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

/// What was done to the target.
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
        stage: FrameKind::Data,
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
    /// The kind of frame that was seen last.
    stage: FrameKind,
    /// Requests of ours, with the range that they change.
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

impl FrameUser for Writer<'_> {
    fn map(&mut self, _entry: MapEntry) {}

    fn frame(
        &mut self,
        io: &mut Driver<'_>,
        frame: &CheckedFrame,
        seen: &SegmentBits,
        mut buffer: Buffer,
    ) -> Result<()> {
        let facts = &frame.facts;
        if self.stage == FrameKind::Data && facts.kind != FrameKind::Data {
            self.end_data(io, seen, facts.kind)?;
        }
        self.stage = facts.kind;
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
        let ended = self.in_flight.remove(&completion.token).expect("every token is a frame's or ours");
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
        .expect("a checked data frame lies within the origin")
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
        let segment = Segment { ix, extent, valid: &[extent], crc: None, zero: false };
        Ok((self.target.place(&segment, memory)?, extent))
    }

    fn place_originals(&mut self, extents: &[Extent], memory: &mut [u8]) -> Placement {
        let mut all = Placement::default();
        let mut packed = Bytes::ZERO;
        for extent in extents {
            // Sorted extents that begin at or behind what was packed before them: never negative.
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

    /// Waits until all of our requests have completed.
    fn settle(&mut self, io: &mut Driver<'_>) -> Result<()> {
        while !self.in_flight.is_empty() {
            let tokens = &self.in_flight;
            let completion = io.next_of(&|token| tokens.contains_key(&token))?;
            self.completed(io, completion.expect("requests of ours are in flight"))?;
        }
        Ok(())
    }

    /// Step 2, between the data frames and what follows.
    fn end_data(&mut self, io: &mut Driver<'_>, seen: &SegmentBits, next: FrameKind) -> Result<()> {
        self.settle(io)?;
        // A new file reads as zeros where nothing was written.
        if self.target.is_device() {
            let segment = self.layout.segment;
            let count = segment.count_for(self.layout.origin_size);
            let mut run: Option<Extent> = None;
            for ix in (0..count).map(SegmentIx).filter(|ix| !seen.get(*ix)) {
                let start = segment.offset_of(ix).expect("a segment lies within the origin");
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

    /// Waits for the last requests. An archive without a frame ends here as well.
    fn finish(&mut self, io: &mut Driver<'_>, seen: &SegmentBits) -> Result<()> {
        if self.stage == FrameKind::Data {
            self.end_data(io, seen, FrameKind::Map)?;
        }
        self.settle(io)
    }
}
