//! Faults on purpose: an engine and a block file that fail where and when a test says.
//!
//! Invariants:
//! - what is not told to fail does exactly what the engine beneath does; [`FaultyEngine`] passes the
//!   suite of all engines;
//! - everything random comes from the seed in the plan, which [`FaultPlan`]'s `Debug` form and the
//!   injected errors show.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::block::{BlockRead, BlockWrite, Durable};
use super::engine::{Buffer, Completion, Engine, FileIx, Piece, Place, Request};
use crate::base::{Bytes, Error, Result};
use crate::extent::Extent;

/// Which requests a fault concerns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FaultKind {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Zeroing.
    Zero,
    /// Syncs.
    Sync,
}

/// When a fault strikes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultTrigger {
    /// At the n-th request of its kind, counted from 0, once.
    Nth(u64),
    /// At every request of its kind that touches the extent, in the file if one is named.
    In(Option<FileIx>, Extent),
    /// At every request of its kind from the n-th on.
    From(u64),
}

/// One fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Of which requests.
    pub kind: FaultKind,
    /// When.
    pub trigger: FaultTrigger,
    /// With which error.
    pub errno: i32,
    /// A write leaves a random part of its first piece behind, as a device does that fails half-way;
    /// otherwise nothing is written.
    pub torn: bool,
}

/// What goes wrong.
#[derive(Clone, Debug, Default)]
pub struct FaultPlan {
    /// Source of everything random.
    pub seed: u64,
    /// The faults; the first one that matches strikes.
    pub faults: Vec<Fault>,
    /// Completions come in random order.
    pub reorder: bool,
    /// Reads and writes reach the engine beneath in random small pieces.
    pub split: bool,
}

/// How long a completion is kept back for others to overtake it.
const REORDER_WAIT: Duration = Duration::from_millis(20);

/// A small generator (splitmix64, public domain by its author): tests need the same numbers from the
/// same seed on every version of every crate.
#[derive(Clone, Debug)]
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `end`, which is not 0.
    fn below(&mut self, end: usize) -> usize {
        let end = u64::try_from(end.max(1)).expect("Linux has at most 64 bits");
        usize::try_from(self.next() % end).expect("below a usize")
    }
}

/// Decides which request fails.
#[derive(Debug)]
struct Judge {
    plan: FaultPlan,
    counts: HashMap<FaultKind, u64>,
    random: Random,
}

impl Judge {
    fn new(plan: FaultPlan) -> Self {
        let random = Random(plan.seed);
        Self { plan, counts: HashMap::new(), random }
    }

    /// The fault of the next request of `kind`; counts it.
    fn next(&mut self, kind: FaultKind, file: Option<FileIx>, extents: &[Extent]) -> Option<Fault> {
        let count = self.counts.entry(kind).or_default();
        let number = *count;
        *count += 1;
        let strikes = |fault: &&Fault| {
            fault.kind == kind
                && match fault.trigger {
                    FaultTrigger::Nth(n) => n == number,
                    FaultTrigger::From(n) => number >= n,
                    FaultTrigger::In(which, extent) => {
                        (which.is_none() || file.is_none() || which == file)
                            && extents.iter().any(|it| it.overlaps(extent))
                    }
                }
        };
        self.plan.faults.iter().find(strikes).copied()
    }

    fn error(&self, fault: Fault) -> Error {
        let what = format!("injected failure of a {:?} (seed {})", fault.kind, self.plan.seed);
        Error::io(what, io::Error::from_raw_os_error(fault.errno))
    }
}

fn extents_of(pieces: &[Piece]) -> Vec<Extent> {
    let extent = |piece: &Piece| match piece.place {
        Place::At(offset) => Extent::with_length(offset, Bytes::from_len(piece.range.len())),
        Place::Stream => None,
    };
    pieces.iter().filter_map(extent).collect()
}

/// See the module's head.
pub struct FaultyEngine {
    inner: Box<dyn Engine>,
    judge: Judge,
    ended: Vec<Completion>,
    /// Requests that fail after the engine beneath has done a part of them.
    torn: HashMap<u64, Error>,
}

impl FaultyEngine {
    /// `inner` with the faults of `plan`.
    #[must_use]
    pub fn new(inner: Box<dyn Engine>, plan: FaultPlan) -> Self {
        tracing::info!(?plan, "faults are injected");
        Self { inner, judge: Judge::new(plan), ended: Vec::new(), torn: HashMap::new() }
    }

    /// Cuts pieces at aligned places, and shuffles those that have a place of their own.
    fn split(&mut self, pieces: Vec<Piece>) -> Vec<Piece> {
        const GRAIN: usize = 4096;
        let mut all = Vec::new();
        for piece in pieces {
            let mut start = piece.range.start;
            while start < piece.range.end {
                let length = (1 + self.judge.random.below(16)) * GRAIN;
                let end = piece.range.end.min(start + length);
                let place = match piece.place {
                    Place::At(offset) => Place::At(offset + Bytes::from_len(start - piece.range.start)),
                    Place::Stream => Place::Stream,
                };
                all.push(Piece { range: start..end, place });
                start = end;
            }
        }
        if all.iter().all(|piece| piece.place != Place::Stream) {
            for last in (1..all.len()).rev() {
                all.swap(last, self.judge.random.below(last + 1));
            }
        }
        all
    }

    /// A random aligned part of the first piece.
    fn tear(&mut self, pieces: Vec<Piece>) -> Vec<Piece> {
        const GRAIN: usize = 512;
        let first = pieces.into_iter().next();
        first
            .map(|piece| {
                let length = self.judge.random.below(piece.range.len() / GRAIN) * GRAIN;
                vec![Piece { range: piece.range.start..piece.range.start + length, ..piece }]
            })
            .unwrap_or_default()
    }

    /// Takes one completion from beneath; where the order is random, all that end in a short while.
    fn collect(&mut self, until: Option<Instant>) -> Result<()> {
        while self.inner.in_flight() > 0 && (self.ended.is_empty() || self.judge.plan.reorder) {
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            // One is there: what never ends must not keep it back.
            let left = if self.ended.is_empty() {
                left
            } else {
                Some(left.unwrap_or(REORDER_WAIT).min(REORDER_WAIT))
            };
            let completion = match left {
                None => self.inner.wait()?,
                Some(left) => self.inner.wait_timeout(left)?,
            };
            let Some(mut completion) = completion else { break };
            if let Some(error) = self.torn.remove(&completion.token) {
                completion.result = Err(error);
            }
            self.ended.push(completion);
        }
        Ok(())
    }

    fn next(&mut self) -> Option<Completion> {
        if self.ended.is_empty() {
            return None;
        }
        let index = if self.judge.plan.reorder { self.judge.random.below(self.ended.len()) } else { 0 };
        Some(self.ended.remove(index))
    }

    fn submit_whole(&mut self, request: Request) -> Result<()> {
        let request = match request {
            Request::Read { token, file, buffer, pieces, in_turn } if self.judge.plan.split => {
                Request::Read { token, file, buffer, pieces: self.split(pieces), in_turn }
            }
            Request::Write { token, file, buffer, pieces } if self.judge.plan.split => {
                Request::Write { token, file, buffer, pieces: self.split(pieces) }
            }
            other => other,
        };
        self.inner.submit(request)
    }
}

impl Engine for FaultyEngine {
    fn name(&self) -> &'static str {
        "faulty"
    }

    fn add_file(&mut self, file: OwnedFd, description: &str) -> Result<FileIx> {
        self.inner.add_file(file, description)
    }

    fn take_buffer(&mut self) -> Option<Buffer> {
        self.inner.take_buffer()
    }

    fn give_buffer(&mut self, buffer: Buffer) {
        self.inner.give_buffer(buffer);
    }

    fn submit(&mut self, request: Request) -> Result<()> {
        let fault = match &request {
            Request::Read { file, pieces, .. } => {
                self.judge.next(FaultKind::Read, Some(*file), &extents_of(pieces))
            }
            Request::Write { file, pieces, .. } => {
                self.judge.next(FaultKind::Write, Some(*file), &extents_of(pieces))
            }
            Request::Zero { file, extent, .. } => self.judge.next(FaultKind::Zero, Some(*file), &[*extent]),
            Request::Sync { file, .. } => self.judge.next(FaultKind::Sync, Some(*file), &[]),
        };
        let Some(fault) = fault else { return self.submit_whole(request) };
        let error = self.judge.error(fault);
        match request {
            Request::Write { token, file, buffer, pieces } if fault.torn => {
                self.torn.insert(token, error);
                let pieces = self.tear(pieces);
                self.inner.submit(Request::Write { token, file, buffer, pieces })?;
            }
            Request::Read { token, buffer, .. } | Request::Write { token, buffer, .. } => {
                self.ended.push(Completion { token, buffer: Some(buffer), result: Err(error) });
            }
            Request::Zero { token, .. } | Request::Sync { token, .. } => {
                self.ended.push(Completion { token, buffer: None, result: Err(error) });
            }
        }
        Ok(())
    }

    fn wait(&mut self) -> Result<Option<Completion>> {
        self.collect(None)?;
        Ok(self.next())
    }

    fn wait_timeout(&mut self, timeout: Duration) -> Result<Option<Completion>> {
        self.collect(Instant::now().checked_add(timeout))?;
        Ok(self.next())
    }

    fn gives_back(&self, file: FileIx) -> bool {
        self.inner.gives_back(file)
    }

    fn in_flight(&self) -> usize {
        self.inner.in_flight() + self.ended.len()
    }
}

/// A block file with faults; files and [`Fault::torn`] work as in the engine.
#[derive(Debug)]
pub struct FaultyBlock<T> {
    inner: T,
    judge: Mutex<Judge>,
}

impl<T> FaultyBlock<T> {
    /// `inner` with the faults of `plan`; reordering and splitting do not apply.
    #[must_use]
    pub fn new(inner: T, plan: FaultPlan) -> Self {
        Self { inner, judge: Mutex::new(Judge::new(plan)) }
    }

    /// What is beneath.
    #[must_use]
    pub fn inner(&self) -> &T {
        &self.inner
    }

    fn judge(&self) -> MutexGuard<'_, Judge> {
        self.judge.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn next(&self, kind: FaultKind, offset: Bytes, length: usize) -> Option<Fault> {
        let extent = Extent::with_length(offset, Bytes::from_len(length));
        self.judge().next(kind, None, extent.as_slice())
    }
}

impl<T: BlockRead> BlockRead for FaultyBlock<T> {
    fn size(&self) -> Bytes {
        self.inner.size()
    }

    fn read_at(&self, buffer: &mut [u8], offset: Bytes) -> Result<()> {
        match self.next(FaultKind::Read, offset, buffer.len()) {
            Some(fault) => Err(self.judge().error(fault)),
            None => self.inner.read_at(buffer, offset),
        }
    }
}

impl<T: BlockWrite> BlockWrite for FaultyBlock<T> {
    fn write_at(&self, data: &[u8], offset: Bytes) -> Result<()> {
        let Some(fault) = self.next(FaultKind::Write, offset, data.len()) else {
            return self.inner.write_at(data, offset);
        };
        if fault.torn {
            let length = self.judge().random.below(data.len());
            self.inner.write_at(&data[..length], offset)?;
        }
        Err(self.judge().error(fault))
    }
}

impl<T: Durable> Durable for FaultyBlock<T> {
    fn sync(&self) -> Result<()> {
        // What a failed sync lost cannot be told: the later ones fail as well.
        let mut judge = self.judge();
        match judge.next(FaultKind::Sync, None, &[]) {
            Some(fault) => {
                let error = judge.error(fault);
                let from = Fault { trigger: FaultTrigger::From(0), ..fault };
                judge.plan.faults.insert(0, from);
                Err(error)
            }
            None => {
                drop(judge);
                self.inner.sync()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::ErrorKind;
    use crate::io::{EngineConfig, MemoryEngine, MemoryFile, UringEngine};

    mod calm {
        use super::*;
        crate::io::suite::engine_suite!(|config| {
            let inner = Box::new(MemoryEngine::new(config).unwrap());
            Box::new(FaultyEngine::new(inner, FaultPlan::default()))
        });
    }

    mod shuffled {
        use super::*;
        crate::io::suite::engine_suite!(|config| {
            let inner = Box::new(UringEngine::new(config).unwrap());
            let plan = FaultPlan { seed: 41, reorder: true, split: true, ..FaultPlan::default() };
            Box::new(FaultyEngine::new(inner, plan))
        });
    }

    fn fault(kind: FaultKind, trigger: FaultTrigger, errno: i32) -> Fault {
        Fault { kind, trigger, errno, torn: false }
    }

    const CONFIG: EngineConfig = EngineConfig { buffer_count: 4, buffer_bytes: Bytes::kib(64) };

    /// Writes `count` buffers of ones one after the other; the results by number.
    fn write_all(plan: FaultPlan, file: &MemoryFile, count: u64) -> Vec<Result<()>> {
        let mut inner = MemoryEngine::new(CONFIG).unwrap();
        let index = inner.add_memory(file, "memory").unwrap();
        let mut engine = FaultyEngine::new(Box::new(inner), plan);
        let mut results = Vec::new();
        for token in 0..count {
            let mut buffer = engine.take_buffer().unwrap();
            buffer.fill(1);
            let place = Place::At(CONFIG.buffer_bytes * token);
            let pieces = vec![Piece { range: 0..buffer.len(), place }];
            engine.submit(Request::Write { token, file: index, buffer, pieces }).unwrap();
            let completion = engine.wait().unwrap().unwrap();
            assert_eq!(completion.token, token);
            engine.give_buffer(completion.buffer.unwrap());
            results.push(completion.result);
        }
        assert_eq!(engine.in_flight(), 0);
        results
    }

    #[test]
    fn the_nth_write_fails_and_writes_nothing() {
        let file = MemoryFile::zeroed(Bytes::kib(256));
        let faults = vec![fault(FaultKind::Write, FaultTrigger::Nth(2), libc::ENOSPC)];
        let results = write_all(FaultPlan { faults, ..FaultPlan::default() }, &file, 4);
        let error = results[2].as_ref().unwrap_err();
        assert_eq!((error.kind(), error.errno()), (ErrorKind::NoSpace, Some(libc::ENOSPC)));
        assert!(results[0].is_ok() && results[1].is_ok() && results[3].is_ok());
        assert!(file.content()[128 << 10..192 << 10].iter().all(|byte| *byte == 0));
        assert!(file.content()[192 << 10..].iter().all(|byte| *byte == 1));
    }

    #[test]
    fn an_extent_fails_and_a_torn_write_leaves_a_part() {
        let mut parts = Vec::new();
        for seed in 0..20 {
            let file = MemoryFile::zeroed(Bytes::kib(256));
            let extent = Extent::new(Bytes::kib(100), Bytes::kib(101)).unwrap();
            let trigger = FaultTrigger::In(None, extent);
            let faults = vec![Fault { torn: true, ..fault(FaultKind::Write, trigger, libc::EIO) }];
            let results = write_all(FaultPlan { seed, faults, ..FaultPlan::default() }, &file, 4);
            assert_eq!(results.iter().map(Result::is_err).collect::<Vec<_>>(), [false, true, false, false]);
            let content = file.content();
            let part = content[64 << 10..128 << 10].iter().take_while(|byte| **byte == 1).count();
            assert!(content[(64 << 10) + part..128 << 10].iter().all(|byte| *byte == 0));
            parts.push(part);
        }
        parts.sort_unstable();
        parts.dedup();
        assert!(parts.len() > 5, "the part is random: {parts:?}");
    }

    #[test]
    fn a_block_file_fails_where_told_and_a_sync_for_good() {
        let extent = Extent::new(Bytes(10), Bytes(20)).unwrap();
        let faults = vec![
            fault(FaultKind::Read, FaultTrigger::In(None, extent), libc::EIO),
            fault(FaultKind::Sync, FaultTrigger::Nth(1), libc::EIO),
        ];
        let plan = FaultPlan { faults, ..FaultPlan::default() };
        let file = FaultyBlock::new(MemoryFile::zeroed(Bytes(40)), plan);
        let mut bytes = [0u8; 8];
        assert!(file.read_at(&mut bytes, Bytes(0)).is_ok());
        assert_eq!(file.read_at(&mut bytes, Bytes(19)).unwrap_err().errno(), Some(libc::EIO));
        assert!(file.read_at(&mut bytes, Bytes(20)).is_ok());
        file.write_at(&[1], Bytes(10)).unwrap();
        assert!(file.sync().is_ok());
        assert!(file.sync().is_err());
        assert!(file.sync().is_err());
        assert_eq!(file.inner().syncs(), 1);
    }
}
