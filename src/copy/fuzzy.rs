//! The fuzzy copy: reads the block list as fast as the origin gives it, writes it to the secondary,
//! and does not ask which chunks change meanwhile.
//!
//! Invariants:
//! - each byte of the block list is read once;
//! - reads and writes of different segments overlap, bounded by the engine's buffers;
//! - when [`run`] returns, no read of the origin is in flight and none will follow.

use std::collections::{BTreeMap, HashMap, VecDeque};

use super::checksums::Checksums;
use super::driver::{Driver, Sink};
use super::origin::{Origin, payload};
use super::progress::Phase;
use super::schedule::{Schedule, Work};
use super::throttle::Throttle;
use crate::base::{Bytes, Result, SegmentIx};
use crate::io::Buffer;
use crate::secondary::{Secondary, Segment, is_zero};

/// What the fuzzy copy did.
#[derive(Clone, Copy, Debug, Default)]
pub struct FuzzyStats {
    pub(super) read: Bytes,
    pub(super) zero: Bytes,
    pub(super) segments: u64,
}

/// A segment that has been read.
struct Filled {
    work: Work,
    buffer: Buffer,
}

struct Fuzzy<'a, 'd> {
    driver: &'a mut Driver<'d>,
    origin: &'a Origin,
    secondary: &'a mut dyn Secondary,
    sink: &'a mut Sink,
    checksums: &'a mut Checksums,
    reads: HashMap<u64, Work>,
    /// For an ordered secondary: the segments being read, and those that wait for an earlier one.
    order: VecDeque<SegmentIx>,
    early: BTreeMap<SegmentIx, Filled>,
    stats: FuzzyStats,
}

/// Copies everything in `schedule`; see the module's head.
pub(super) fn run(
    driver: &mut Driver<'_>,
    origin: &Origin,
    schedule: &Schedule,
    secondary: &mut dyn Secondary,
    sink: &mut Sink,
    checksums: &mut Checksums,
    throttle: &mut Throttle,
) -> Result<FuzzyStats> {
    driver.begin_phase(Phase::Data, Some(schedule.total()));
    let mut fuzzy = Fuzzy {
        driver,
        origin,
        secondary,
        sink,
        checksums,
        reads: HashMap::new(),
        order: VecDeque::new(),
        early: BTreeMap::new(),
        stats: FuzzyStats::default(),
    };
    let mut works = schedule.works();
    let mut pending = works.next();
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
            pause = throttle.take(work.valid_bytes(), fuzzy.driver.now());
            if pause.is_some() {
                fuzzy.driver.engine.give_buffer(buffer);
                pending = Some(work);
                break;
            }
            fuzzy.start(work, buffer)?;
            pending = works.next();
        }
        match fuzzy.driver.next(pause)? {
            Some(completion) => fuzzy.complete(completion)?,
            None if pause.is_some() => {}
            None if pending.is_some() => return Err(fuzzy.driver.out_of_buffers()),
            None => break,
        }
    }
    fuzzy.driver.end_phase();
    Ok(fuzzy.stats)
}

impl Fuzzy<'_, '_> {
    fn start(&mut self, work: Work, mut buffer: Buffer) -> Result<()> {
        self.origin.prepare(&work, &mut buffer);
        let pieces = self.origin.pieces(&work);
        if self.secondary.is_ordered() {
            self.order.push_back(work.ix);
        }
        if pieces.is_empty() {
            return self.filled(Filled { work, buffer });
        }
        let token = self.driver.read(self.origin.file, buffer, pieces)?;
        self.reads.insert(token, work);
        Ok(())
    }

    fn complete(&mut self, completion: crate::io::Completion) -> Result<()> {
        let Some(completion) = self.sink.complete(self.driver, completion)? else { return Ok(()) };
        let work = self.reads.remove(&completion.token).expect("a token is the sink's or a read's");
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
        let crc =
            (self.checksums.is_kept() || self.secondary.is_framed()).then(|| self.checksums.of(data, zero));
        if let Some(crc) = crc {
            self.checksums.set(work.ix, crc);
        }
        self.stats.read += bytes;
        self.stats.segments += 1;
        if zero {
            self.stats.zero += bytes;
        }
        let segment = Segment { ix: work.ix, extent: work.extent, valid: &work.valid, crc, zero };
        let placement = self.secondary.place(&segment, &mut buffer)?;
        self.sink.put(self.driver, buffer, placement)?;
        self.driver.advance(bytes);
        Ok(())
    }
}
