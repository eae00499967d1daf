//! The engine as the phases of a copy see it: tokens, an interrupt that is heard in time, progress
//! that does not flood, and a sink that writes what a secondary laid out.
//!
//! Invariants:
//! - the interrupt is polled at least every [`POLL_INTERVAL`], also while nothing completes;
//! - at most one write to a stream is in flight;
//! - a buffer is given back to the engine when its last use has completed.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use crate::base::clock::Stopwatch;
use crate::base::{Bytes, Error, ErrorKind, Result, SegmentIx};
use crate::extent::Extent;
use crate::io::{Buffer, Completion, Engine, FileIx, Piece, Request};
use crate::progress::{Event, Observer, Phase, SegmentCount};
use crate::secondary::Placement;

/// Longest time between two looks at the interrupt.
pub const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Shortest time between two progress events.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);

/// Longest time that an aborted copy waits for a stream whose reader has stopped reading.
const STREAM_DRAIN_MAX: Duration = Duration::from_secs(2);

/// Longest time that an aborted copy waits for the next answer of what it wrote to. The applications do not wait with it.
const SILENCE_MAX: Duration = Duration::from_secs(20);

/// Zero requests in flight at most; they carry no buffer that would bound them.
pub const ZEROS_IN_FLIGHT_MAX: usize = 64;

/// See the module's head.
pub struct Driver<'a> {
    pub(super) engine: &'a mut dyn Engine,
    observer: &'a dyn Observer,
    interrupt: &'a dyn Fn() -> Result<()>,
    clock: Stopwatch,
    polled: Duration,
    reported: Duration,
    next_token: u64,
    phase: Phase,
    done: Bytes,
    total: Option<Bytes>,
    segments: Option<SegmentCount>,
}

impl<'a> Driver<'a> {
    pub(super) fn new(
        engine: &'a mut dyn Engine,
        observer: &'a dyn Observer,
        interrupt: &'a dyn Fn() -> Result<()>,
    ) -> Self {
        Self {
            engine,
            observer,
            interrupt,
            clock: Stopwatch::start(),
            polled: Duration::ZERO,
            reported: Duration::ZERO,
            next_token: 0,
            phase: Phase::Data,
            done: Bytes::ZERO,
            total: None,
            segments: None,
        }
    }

    /// Time since the copy began.
    pub(super) fn now(&self) -> Duration {
        self.clock.elapsed()
    }

    pub(super) fn begin_phase(&mut self, phase: Phase, total: Option<Bytes>) {
        self.phase = phase;
        self.done = Bytes::ZERO;
        self.total = total;
        self.segments = None;
        self.observer.event(&Event::Phase { phase, total });
    }

    /// From here on in this phase each [`Driver::advance`] is one segment.
    pub(super) fn count_segments(&mut self, done: u64, total: u64) {
        self.segments = Some(SegmentCount { done, total });
    }

    pub(super) fn end_phase(&mut self) {
        self.report_progress();
    }

    pub(super) fn advance(&mut self, bytes: Bytes) {
        self.done += bytes;
        if let Some(segments) = &mut self.segments {
            segments.done += 1;
        }
        if self.now().saturating_sub(self.reported) >= PROGRESS_INTERVAL {
            self.report_progress();
        }
    }

    fn report_progress(&mut self) {
        self.reported = self.now();
        self.observer.event(&Event::Progress {
            phase: self.phase,
            done: self.done,
            total: self.total,
            segments: self.segments,
        });
    }

    fn token(&mut self) -> u64 {
        self.next_token += 1;
        self.next_token
    }

    pub(super) fn read(&mut self, file: FileIx, buffer: Buffer, pieces: Vec<Piece>) -> Result<u64> {
        self.read_pieces(file, buffer, pieces, false)
    }

    /// As [`Driver::read`]; `in_turn`: a piece at a time.
    pub(super) fn read_pieces(
        &mut self,
        file: FileIx,
        buffer: Buffer,
        pieces: Vec<Piece>,
        in_turn: bool,
    ) -> Result<u64> {
        let token = self.token();
        self.engine.submit(Request::Read { token, file, buffer, pieces, in_turn })?;
        Ok(token)
    }

    /// Hears the interrupt where it is time to.
    pub(super) fn poll(&mut self) -> Result<()> {
        let now = self.now();
        if now.saturating_sub(self.polled) >= POLL_INTERVAL {
            self.polled = now;
            (self.interrupt)()?;
        }
        Ok(())
    }

    /// The next completion. None: nothing is in flight, or `pause` ran out.
    pub(super) fn next(&mut self, pause: Option<Duration>) -> Result<Option<Completion>> {
        let end = pause.map(|pause| self.now() + pause);
        loop {
            self.poll()?;
            let left = end.map(|end| end.saturating_sub(self.now()));
            if left == Some(Duration::ZERO) {
                return Ok(None);
            }
            let wait = left.map_or(POLL_INTERVAL, |left| left.min(POLL_INTERVAL));
            if self.engine.in_flight() > 0 {
                if let Some(completion) = self.engine.wait_timeout(wait)? {
                    return Ok(Some(completion));
                }
            } else if left.is_some() {
                std::thread::sleep(wait);
            } else {
                return Ok(None);
            }
        }
    }

    /// Says something to who watches.
    pub(super) fn note(&self, text: String) {
        self.observer.event(&Event::Note { text });
    }

    /// Begins to make durable all writes to `file` that have completed; others may be in flight.
    pub(super) fn begin_sync(&mut self, file: FileIx) -> Result<u64> {
        let token = self.token();
        self.engine.submit(Request::Sync { token, file })?;
        Ok(token)
    }

    /// Makes all completed writes to `file` durable.
    pub(super) fn sync(&mut self, file: FileIx) -> Result<()> {
        let token = self.begin_sync(file)?;
        match self.next(None)? {
            Some(completion) if completion.token == token => completion.result,
            _ => panic!("a sync is submitted when nothing else is in flight"),
        }
    }

    /// After an error: waits for what is in flight and forgets it. A stream whose reader has stopped, and a secondary
    /// of which nothing comes back any more, is given up after a while; the engine keeps the memory of such a write.
    /// False where something is still in flight.
    pub(super) fn drain(&mut self, stream: bool) -> bool {
        let mut heard = self.now();
        let patience = if stream { STREAM_DRAIN_MAX } else { SILENCE_MAX };
        while self.engine.in_flight() > 0 {
            if self.now().saturating_sub(heard) >= patience {
                tracing::warn!(
                    "what is being written does not end: {} transfers are given up",
                    self.engine.in_flight()
                );
                return false;
            }
            match self.engine.wait_timeout(POLL_INTERVAL) {
                Ok(Some(completion)) => {
                    if !stream {
                        heard = self.now();
                    }
                    if let Some(buffer) = completion.buffer {
                        self.engine.give_buffer(buffer);
                    }
                }
                Ok(None) => {}
                Err(error) => {
                    tracing::warn!(%error, "the engine failed while it was drained");
                    return false;
                }
            }
        }
        true
    }

    /// For the state "work is left, nothing is in flight, nothing pauses": the engine has no buffer.
    pub(super) fn out_of_buffers(&self) -> Error {
        Error::new(ErrorKind::Io, format!("the {} engine has no buffer to work with", self.engine.name()))
    }
}

/// What a write is a part of; None where nobody asks when it has landed.
type Tag = Option<SegmentIx>;

/// Writes what a secondary laid out; see the module's head.
pub struct Sink {
    pub(super) file: FileIx,
    stream: bool,
    /// Writes to a stream that wait for their turn.
    waiting: VecDeque<(Buffer, Vec<Piece>, Tag)>,
    writes: HashMap<u64, Tag>,
    zeros: HashMap<u64, Tag>,
    /// Segments of which something is under way, and in how many parts.
    parts: HashMap<SegmentIx, usize>,
    /// Segments of which everything has been written, in order of completion.
    landed: VecDeque<SegmentIx>,
    written: Bytes,
}

impl Sink {
    pub(super) fn new(file: FileIx, stream: bool) -> Self {
        Self {
            file,
            stream,
            waiting: VecDeque::new(),
            writes: HashMap::new(),
            zeros: HashMap::new(),
            parts: HashMap::new(),
            landed: VecDeque::new(),
            written: Bytes::ZERO,
        }
    }

    /// Bytes handed to the engine for writing so far.
    pub(super) fn written(&self) -> Bytes {
        self.written
    }

    pub(super) fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.writes.is_empty() && self.zeros.is_empty()
    }

    pub(super) fn has_room(&self) -> bool {
        self.zeros.len() < ZEROS_IN_FLIGHT_MAX
    }

    /// Submits `placement` of `buffer`.
    pub(super) fn put(
        &mut self,
        driver: &mut Driver<'_>,
        buffer: Buffer,
        placement: Placement,
    ) -> Result<()> {
        self.put_tagged(driver, buffer, placement, None)
    }

    /// As [`Sink::put`], and tells by [`Sink::take_landed`] when all of it has been written.
    pub(super) fn put_segment(
        &mut self,
        driver: &mut Driver<'_>,
        buffer: Buffer,
        placement: Placement,
        ix: SegmentIx,
    ) -> Result<()> {
        let parts = placement.zeros.len() + usize::from(!placement.pieces.is_empty());
        if parts == 0 {
            self.landed.push_back(ix);
        } else {
            self.parts.insert(ix, parts);
        }
        self.put_tagged(driver, buffer, placement, Some(ix))
    }

    /// Submits a range to be made zero.
    pub(super) fn put_zeros(&mut self, driver: &mut Driver<'_>, extent: Extent) -> Result<()> {
        self.zero(driver, extent, None)
    }

    /// A segment that has been written wholly since the last call.
    pub(super) fn take_landed(&mut self) -> Option<SegmentIx> {
        self.landed.pop_front()
    }

    fn put_tagged(
        &mut self,
        driver: &mut Driver<'_>,
        buffer: Buffer,
        placement: Placement,
        tag: Tag,
    ) -> Result<()> {
        for extent in placement.zeros {
            self.zero(driver, extent, tag)?;
        }
        if placement.pieces.is_empty() {
            driver.engine.give_buffer(buffer);
            return Ok(());
        }
        self.written += placement.pieces.iter().map(|piece| Bytes::from_len(piece.range.len())).sum();
        if self.stream && !self.writes.is_empty() {
            self.waiting.push_back((buffer, placement.pieces, tag));
            return Ok(());
        }
        self.write(driver, buffer, placement.pieces, tag)
    }

    fn zero(&mut self, driver: &mut Driver<'_>, extent: Extent, tag: Tag) -> Result<()> {
        let token = driver.token();
        driver.engine.submit(Request::Zero { token, file: self.file, extent })?;
        self.zeros.insert(token, tag);
        Ok(())
    }

    fn write(&mut self, driver: &mut Driver<'_>, buffer: Buffer, pieces: Vec<Piece>, tag: Tag) -> Result<()> {
        let token = driver.token();
        driver.engine.submit(Request::Write { token, file: self.file, buffer, pieces })?;
        self.writes.insert(token, tag);
        Ok(())
    }

    /// Takes a completion that is the sink's; gives any other back.
    pub(super) fn complete(
        &mut self,
        driver: &mut Driver<'_>,
        completion: Completion,
    ) -> Result<Option<Completion>> {
        let token = completion.token;
        let Some(tag) = self.writes.remove(&token).or_else(|| self.zeros.remove(&token)) else {
            return Ok(Some(completion));
        };
        if let Some(buffer) = completion.buffer {
            driver.engine.give_buffer(buffer);
        }
        completion.result.map_err(|error| self.explain(error))?;
        self.note_landed(tag);
        if self.stream
            && self.writes.is_empty()
            && let Some((buffer, pieces, tag)) = self.waiting.pop_front()
        {
            self.write(driver, buffer, pieces, tag)?;
        }
        Ok(None)
    }

    fn note_landed(&mut self, tag: Tag) {
        let Some(ix) = tag else { return };
        let left = self.parts.get_mut(&ix).expect("a tagged write is a part of its segment");
        *left -= 1;
        if *left == 0 {
            self.parts.remove(&ix);
            self.landed.push_back(ix);
        }
    }

    pub(super) fn explain(&self, error: Error) -> Error {
        match error.errno() {
            Some(libc::EPIPE) => error
                .context("the reader of standard output is gone")
                .with_kind(ErrorKind::External)
                .next("see why the command behind the pipe ended, and copy again"),
            Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => error
                .context("the secondary is full")
                .with_kind(ErrorKind::NoSpace)
                .next("make room on the secondary or choose another one, and copy again"),
            _ => error.context("writing the secondary failed"),
        }
    }

    /// Waits until everything put has completed.
    pub(super) fn flush(&mut self, driver: &mut Driver<'_>) -> Result<()> {
        while !self.is_idle() {
            let Some(completion) = driver.next(None)? else { break };
            self.take(driver, completion)?;
        }
        Ok(())
    }

    /// Takes a completion where nothing but the sink's is in flight.
    pub(super) fn take(&mut self, driver: &mut Driver<'_>, completion: Completion) -> Result<()> {
        if let Some(stray) = self.complete(driver, completion)? {
            unreachable!("token {} is not the sink's, and nothing else is in flight", stray.token);
        }
        Ok(())
    }
}
