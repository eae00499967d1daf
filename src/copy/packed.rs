//! The data of an increment: reads the block list in ascending order and packs it into frames, one extent after the
//! other, whatever segments the extents are in. So a frame costs its two control blocks and nothing else, even if
//! every chunk in it comes from another segment.
//!
//! Invariants:
//! - each byte of the block list is read once, and the frames ascend;
//! - a region without anything to copy is released before the first read: no read of it will follow;
//! - when [`run`] returns, no read of the origin is in flight, none will follow, and every frame is on the secondary.
//!
//! Memory: the engine's buffers.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use super::fuzzy::FuzzyStats;
use super::origin::Origin;
use super::ports::Releases;
use super::schedule::Schedule;
use super::sink::Sink;
use super::throttle::Throttle;
use crate::base::limits::DIRECT_IO_ALIGN;
use crate::base::{Bytes, Error, Result};
use crate::extent::Extent;
use crate::io::{Buffer, Completion, Driver, Piece, Place};
use crate::progress::Phase;
use crate::secondary::{PAYLOAD_OFFSET, Secondary, is_zero};

/// Cuts a block list into the extents of one frame after the other.
struct Frames<'a> {
    runs: std::slice::Iter<'a, Extent>,
    rest: Option<Extent>,
    capacity: Bytes,
    extents_max: usize,
}

impl Iterator for Frames<'_> {
    type Item = Vec<Extent>;

    fn next(&mut self) -> Option<Vec<Extent>> {
        let (mut frame, mut used) = (Vec::new(), Bytes::ZERO);
        while frame.len() < self.extents_max && used < self.capacity {
            let Some(run) = self.rest.take().or_else(|| self.runs.next().copied()) else { break };
            let end = run.end().min(run.start() + (self.capacity - used));
            self.rest = Extent::new(end, run.end());
            let part = Extent::new(run.start(), end).expect("there is room, and a run is not empty");
            used += part.length();
            frame.push(part);
        }
        (!frame.is_empty()).then_some(frame)
    }
}

/// A frame whose data is being read.
struct Read {
    number: u64,
    extents: Vec<Extent>,
    begun: Duration,
}

struct Packed<'a, 'd> {
    driver: &'a mut Driver<'d>,
    origin: &'a Origin,
    secondary: &'a mut dyn Secondary,
    sink: &'a mut Sink,
    reads: HashMap<u64, Read>,
    /// Read, but not yet their turn.
    early: BTreeMap<u64, (Vec<Extent>, Buffer)>,
    /// The number of the next frame to be placed.
    turn: u64,
    stats: FuzzyStats,
}

/// Copies the block list of `schedule` into data frames. `region` is the unit of release.
pub(super) fn run(
    driver: &mut Driver<'_>,
    (origin, schedule, region): (&Origin, &Schedule, Bytes),
    releases: Option<&mut (dyn Releases + '_)>,
    secondary: &mut dyn Secondary,
    sink: &mut Sink,
    throttle: &mut Throttle<'_>,
) -> Result<FuzzyStats> {
    if !schedule.size().is_aligned(DIRECT_IO_ALIGN) {
        return Err(Error::refused(format!(
            "an increment of an origin whose size is not a multiple of {DIRECT_IO_ALIGN}"
        )));
    }
    if let Some(releases) = releases {
        release_unneeded(schedule, region, releases)?;
    }
    driver.begin_phase(Phase::Data, Some(schedule.total()));
    let runs: Vec<Extent> =
        Extent::new(Bytes::ZERO, schedule.size()).map(|whole| schedule.parts_of(whole)).unwrap_or_default();
    let (capacity, extents_max) = (schedule.segment().bytes(), secondary.append_extents_max());
    let mut frames = Frames { runs: runs.iter(), rest: None, capacity, extents_max };
    let mut packed = Packed {
        driver,
        origin,
        secondary,
        sink,
        reads: HashMap::new(),
        early: BTreeMap::new(),
        turn: 0,
        stats: FuzzyStats::default(),
    };
    let mut number = 0;
    let mut pending = frames.next();
    loop {
        let mut pause = None;
        while let Some(extents) = pending.take() {
            let Some(buffer) = packed.driver.engine.take_buffer() else {
                pending = Some(extents);
                break;
            };
            let bytes = extents.iter().map(|extent| extent.length()).sum();
            pause = throttle.admit(bytes, packed.driver.now(), packed.reads.len());
            if pause.is_some() {
                packed.driver.engine.give_buffer(buffer);
                pending = Some(extents);
                break;
            }
            packed.start(number, extents, buffer)?;
            number += 1;
            pending = frames.next();
        }
        match packed.driver.next_completion(pause)? {
            Some(completion) => packed.complete(completion, throttle)?,
            None if pause.is_some() => {}
            None if pending.is_some() => return Err(packed.driver.out_of_buffers()),
            None => break,
        }
    }
    packed.driver.report();
    Ok(packed.stats)
}

/// Writes to a region of which nothing is copied need not be preserved.
fn release_unneeded(schedule: &Schedule, region: Bytes, releases: &mut dyn Releases) -> Result<()> {
    let size = schedule.size();
    let regions = (0..size.get().div_ceil(region.get())).filter_map(|number| {
        let start = region * number;
        Extent::new(start, size.min(start + region))
    });
    for region in regions.filter(|region| schedule.parts_of(*region).is_empty()) {
        releases.release(region)?;
    }
    Ok(())
}

impl Packed<'_, '_> {
    fn start(&mut self, number: u64, extents: Vec<Extent>, buffer: Buffer) -> Result<()> {
        let mut at = PAYLOAD_OFFSET;
        let mut pieces = Vec::new();
        for extent in &extents {
            for part in extent.split(self.origin.piece_max.unwrap_or(extent.length())) {
                let range = at..at + part.length().as_len();
                at = range.end;
                pieces.push(Piece { range, place: Place::At(part.start()) });
            }
        }
        let in_turn = self.origin.piece_max.is_some();
        let token = self.driver.read_pieces(self.origin.file, buffer, pieces, in_turn)?;
        self.reads.insert(token, Read { number, extents, begun: self.driver.now() });
        Ok(())
    }

    fn complete(&mut self, completion: Completion, throttle: &mut Throttle<'_>) -> Result<()> {
        let Some(completion) = self.sink.complete(self.driver, completion)? else { return Ok(()) };
        let read = self.reads.remove(&completion.token).expect("a token is the sink's or a read's");
        let now = self.driver.now();
        let bytes = read.extents.iter().map(|extent| extent.length()).sum();
        throttle.done(bytes, now.saturating_sub(read.begun), now);
        completion.result.map_err(|error| error.context("reading the origin failed"))?;
        let buffer = completion.buffer.expect("a read gives its buffer back");
        self.early.insert(read.number, (read.extents, buffer));
        while let Some((extents, buffer)) = self.early.remove(&self.turn) {
            self.turn += 1;
            self.place(&extents, buffer)?;
        }
        Ok(())
    }

    fn place(&mut self, extents: &[Extent], mut buffer: Buffer) -> Result<()> {
        let bytes: Bytes = extents.iter().map(|extent| extent.length()).sum();
        self.stats.read += bytes;
        self.stats.segments += 1;
        if is_zero(&buffer[PAYLOAD_OFFSET..PAYLOAD_OFFSET + bytes.as_len()]) {
            self.stats.zero += bytes;
        }
        let placement = self.secondary.place_packed(extents, &mut buffer)?;
        self.sink.put(self.driver, buffer, placement)?;
        self.driver.advance(bytes);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(start: u64, end: u64) -> Extent {
        Extent::new(Bytes(start), Bytes(end)).unwrap()
    }

    #[test]
    fn frames_are_full_within_the_extent_limit() {
        let runs = [extent(0, 8192), extent(16384, 28672), extent(40960, 45056), extent(53248, 57344)];
        let frames = |capacity, extents_max| -> Vec<Vec<Extent>> {
            Frames { runs: runs.iter(), rest: None, capacity: Bytes(capacity), extents_max }.collect()
        };
        let whole: Vec<Extent> = frames(1 << 20, 9).concat();
        assert_eq!(whole, runs);
        let cut = frames(12288, 9);
        assert_eq!(
            cut,
            [
                vec![extent(0, 8192), extent(16384, 20480)],
                vec![extent(20480, 28672), extent(40960, 45056)],
                vec![extent(53248, 57344)]
            ]
        );
        assert_eq!(frames(1 << 20, 2).iter().map(Vec::len).collect::<Vec<_>>(), [2, 2]);
    }
}
