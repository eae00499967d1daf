//! The fuzzy copy: reads the block list as fast as the origin permits and writes it to the secondary,
//! regardless of which chunks change meanwhile.
//!
//! Invariants:
//! - each byte of the block list is read once;
//! - reads and writes of different segments overlap, bounded by the engine's buffers;
//! - a region is released after the last of its segments has been written and, if the copy can be resumed,
//!   made durable ([`durable`](super::durable)) and recorded as placed. So no process reads the region from
//!   the origin again: neither this one, nor one that resumes the copy, whatever the secondary has lost by
//!   then;
//! - when [`run`] returns, no read of the origin is in flight, none will follow, and every segment is on the
//!   secondary.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::Duration;

use super::checksums::Checksums;
use super::durable::Syncer;
use super::origin::{Origin, payload};
use super::placed::PlacedSet;
use super::ports::{PlacementLog, Releases};
use super::regions::{Order, Regions};
use super::schedule::{Schedule, Work};
use super::sink::Sink;
use super::throttle::Throttle;
use crate::base::{Bytes, Result, SegmentIx};
use crate::extent::Extent;
use crate::io::Driver;
use crate::io::{Buffer, Completion};
use crate::progress::Phase;
use crate::secondary::{PlacedSegment, Secondary, Segment, is_zero};
use crate::sys::process::crash_point;

/// Amounts of the fuzzy copy.
#[derive(Clone, Copy, Debug, Default)]
pub struct FuzzyStats {
    pub(super) read: Bytes,
    pub(super) zero: Bytes,
    pub(super) segments: u64,
}

/// What is copied, in which order, and the ports to report to.
pub(super) struct Plan<'a, 'p> {
    pub(super) origin: &'a Origin,
    pub(super) schedule: &'a Schedule,
    pub(super) region: Bytes,
    pub(super) order: Order,
    /// Copied before everything else, whatever the order.
    pub(super) first: &'a [Extent],
    /// The segments that an earlier process has placed.
    pub(super) placed: &'a PlacedSet,
    pub(super) releases: Option<&'p mut dyn Releases>,
    pub(super) placements: Option<&'p mut dyn PlacementLog>,
}

/// A segment that has been read.
struct Filled {
    work: Work,
    buffer: Buffer,
}

struct Fuzzy<'a, 'p, 'd> {
    driver: &'a mut Driver<'d>,
    plan: Plan<'a, 'p>,
    regions: Regions<'a>,
    secondary: &'a mut dyn Secondary,
    sink: &'a mut Sink,
    checksums: &'a mut Checksums,
    /// Reads in flight, and when each began.
    reads: HashMap<u64, (Work, Duration)>,
    /// For an ordered secondary: the segments being read, and those that wait for an earlier one.
    order: VecDeque<SegmentIx>,
    early: BTreeMap<SegmentIx, Filled>,
    /// Segments being written.
    placing: HashMap<SegmentIx, PlacedSegment>,
    syncer: Syncer,
    stats: FuzzyStats,
}

/// Copies every segment of the plan's schedule that is not placed yet.
pub(super) fn run(
    driver: &mut Driver<'_>,
    plan: Plan<'_, '_>,
    secondary: &mut dyn Secondary,
    sink: &mut Sink,
    checksums: &mut Checksums,
    throttle: &mut Throttle<'_>,
) -> Result<FuzzyStats> {
    let schedule = plan.schedule;
    driver.begin_phase(Phase::Data, Some(schedule.total()));
    driver.advance(plan.placed.bytes(schedule));
    driver.count_segments(plan.placed.count(), schedule.work_count());
    let mut regions = Regions::new(schedule, plan.region, plan.order, &|ix| plan.placed.contains(ix));
    regions.put_first(plan.first);
    let syncer = Syncer::new(sink.file);
    let mut fuzzy = Fuzzy {
        driver,
        plan,
        regions,
        secondary,
        sink,
        checksums,
        reads: HashMap::new(),
        order: VecDeque::new(),
        early: BTreeMap::new(),
        placing: HashMap::new(),
        syncer,
        stats: FuzzyStats::default(),
    };
    fuzzy.process_landed()?;
    let mut pending = fuzzy.next_work();
    loop {
        let mut pause = None;
        while let Some(work) = pending.take() {
            if !fuzzy.sink.has_room() {
                pending = Some(work);
                break;
            }
            let Some(buffer) = fuzzy.driver.engine.take_buffer() else {
                pending = Some(work);
                break;
            };
            pause = throttle.admit(work.valid_bytes(), fuzzy.driver.now(), fuzzy.reads.len());
            if pause.is_some() {
                fuzzy.driver.engine.give_buffer(buffer);
                pending = Some(work);
                break;
            }
            fuzzy.start(work, buffer)?;
            pending = fuzzy.next_work();
        }
        // At the end the landed segments wait only for their sync.
        let is_end = pause.is_none() && pending.is_none() && fuzzy.driver.engine.in_flight() == 0;
        fuzzy.syncer.advance(fuzzy.driver, is_end)?;
        match fuzzy.driver.next_completion(pause)? {
            Some(completion) => fuzzy.complete(completion, throttle)?,
            None if pause.is_some() => {}
            None if pending.is_some() => return Err(fuzzy.driver.out_of_buffers()),
            None => break,
        }
    }
    fuzzy.driver.report();
    Ok(fuzzy.stats)
}

impl Fuzzy<'_, '_, '_> {
    /// The next segment, according to the order of regions.
    fn next_work(&mut self) -> Option<Work> {
        if self.regions.is_at_boundary()
            && let Some(releases) = self.plan.releases.as_deref_mut()
        {
            if self.regions.order() == Order::Hot {
                self.regions.heat(&releases.recent());
            }
            if releases.was_slow() {
                self.regions.enlarge();
            }
        }
        let placed = self.plan.placed;
        self.regions.next(&|ix| placed.contains(ix))
    }

    /// Passes the segments that landed since the last call to the next sync; without a placement log they
    /// count as placed at once.
    fn process_landed(&mut self) -> Result<()> {
        while let Some(ix) = self.sink.take_landed() {
            crash_point("copy.segment.landed");
            let segment = self.placing.remove(&ix).expect("what lands was placed");
            match self.plan.placements {
                Some(_) => self.syncer.landed(segment),
                None => self.regions.placed(ix),
            }
        }
        self.release_done()
    }

    /// Records durable segments as placed, then releases the regions that this completes. The order matters:
    /// a released region must never be read from the origin again.
    fn record_durable(&mut self, segments: &[PlacedSegment]) -> Result<()> {
        if let Some(placements) = self.plan.placements.as_deref_mut() {
            placements.placed(segments)?;
        }
        for segment in segments {
            self.regions.placed(segment.ix);
        }
        self.release_done()
    }

    fn release_done(&mut self) -> Result<()> {
        while let Some(region) = self.regions.take_done() {
            if let Some(releases) = self.plan.releases.as_deref_mut() {
                releases.release(region)?;
            }
        }
        Ok(())
    }

    fn start(&mut self, work: Work, mut buffer: Buffer) -> Result<()> {
        self.plan.origin.prepare(&work, &mut buffer);
        let pieces = self.plan.origin.pieces(&work);
        if self.secondary.is_ordered() {
            self.order.push_back(work.ix);
        }
        if pieces.is_empty() {
            return self.filled(Filled { work, buffer });
        }
        let in_turn = self.plan.origin.piece_max.is_some();
        let token = self.driver.read_pieces(self.plan.origin.file, buffer, pieces, in_turn)?;
        self.reads.insert(token, (work, self.driver.now()));
        Ok(())
    }

    fn complete(&mut self, completion: Completion, throttle: &mut Throttle<'_>) -> Result<()> {
        let Some(completion) = self.sink.complete(self.driver, completion)? else {
            return self.process_landed();
        };
        if let Some(durable) = self.syncer.synced(completion.token, self.driver.now()) {
            completion.result.map_err(|error| self.sink.explain(error))?;
            return self.record_durable(&durable);
        }
        let (work, begun) = self.reads.remove(&completion.token).expect("a token is the sink's or a read's");
        let now = self.driver.now();
        throttle.done(work.valid_bytes(), now.saturating_sub(begun), now);
        completion.result.map_err(|error| error.context("reading the origin failed"))?;
        let buffer = completion.buffer.expect("a read gives its buffer back");
        self.filled(Filled { work, buffer })
    }

    fn filled(&mut self, filled: Filled) -> Result<()> {
        if !self.secondary.is_ordered() {
            return self.place(filled);
        }
        self.early.insert(filled.work.ix, filled);
        while let Some(next) = self.order.front()
            && let Some(filled) = self.early.remove(next)
        {
            self.order.pop_front();
            self.place(filled)?;
        }
        Ok(())
    }

    fn place(&mut self, filled: Filled) -> Result<()> {
        let Filled { work, mut buffer } = filled;
        let bytes = work.valid_bytes();
        let data = payload(&work, &buffer);
        let zero = is_zero(data);
        // A process that resumes the copy may have to compare what the secondary still holds.
        let needs_checksum =
            self.checksums.is_kept() || self.secondary.is_framed() || self.plan.placements.is_some();
        let checksum = needs_checksum.then(|| self.checksums.of(data, zero));
        if let Some(checksum) = checksum {
            self.checksums.set(work.ix, checksum);
        }
        self.stats.read += bytes;
        self.stats.segments += 1;
        if zero {
            self.stats.zero += bytes;
        }
        let segment = Segment { ix: work.ix, extent: work.extent, valid: &work.valid, checksum, zero };
        let placement = self.secondary.place(&segment, &mut buffer)?;
        let frame = self.secondary.frame_number(work.ix);
        self.placing.insert(work.ix, PlacedSegment { ix: work.ix, frame, checksum, zero });
        self.sink.put_segment(self.driver, buffer, placement, work.ix)?;
        self.driver.advance(bytes);
        // A segment of zeros may have landed without a write.
        self.process_landed()
    }
}
