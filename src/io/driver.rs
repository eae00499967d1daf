//! Runs an engine for one operation: tokens, an interrupt that is polled in time, rate-limited progress
//! events.
//!
//! Invariants:
//! - the interrupt is polled at least every [`POLL_INTERVAL`], also while nothing completes;
//! - a token is used once.

use std::collections::VecDeque;
use std::time::Duration;

use super::engine::{Buffer, Completion, Engine, FileIx, Piece, Request};
use crate::base::clock::Stopwatch;
use crate::base::{Bytes, Error, ErrorKind, Extent, Result};
use crate::progress::{Event, Observer, Phase, SegmentCount};

/// Longest time between two polls of the interrupt.
pub const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Shortest time between two progress events.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);

/// An engine, its interrupt, and the observer of its progress.
pub struct Driver<'a> {
    /// The engine.
    pub engine: &'a mut dyn Engine,
    observer: &'a dyn Observer,
    /// Polled at least every [`POLL_INTERVAL`].
    pub interrupt: &'a dyn Fn() -> Result<()>,
    clock: Stopwatch,
    polled: Option<Duration>,
    reported: Duration,
    next_token: u64,
    phase: Phase,
    done: Bytes,
    total: Option<Bytes>,
    segments: Option<SegmentCount>,
    /// Completions that arrived while waiting for others.
    stash: VecDeque<Completion>,
}

impl<'a> Driver<'a> {
    /// A driver with nothing in flight yet.
    pub fn new(
        engine: &'a mut dyn Engine,
        observer: &'a dyn Observer,
        interrupt: &'a dyn Fn() -> Result<()>,
    ) -> Self {
        Self {
            engine,
            observer,
            interrupt,
            clock: Stopwatch::start(),
            polled: None,
            reported: Duration::ZERO,
            next_token: 0,
            phase: Phase::Prepare,
            done: Bytes::ZERO,
            total: None,
            segments: None,
            stash: VecDeque::new(),
        }
    }

    /// Time since the operation began.
    pub fn now(&self) -> Duration {
        self.clock.elapsed()
    }

    /// Reports that a phase begins; `total`: its bytes, if known.
    pub fn begin_phase(&mut self, phase: Phase, total: Option<Bytes>) {
        self.phase = phase;
        self.done = Bytes::ZERO;
        self.total = total;
        self.segments = None;
        self.observer.event(&Event::Phase { phase, total });
    }

    /// From here on in this phase, each [`Driver::advance`] is one segment.
    pub fn count_segments(&mut self, done: u64, total: u64) {
        self.segments = Some(SegmentCount { done, total });
    }

    /// Adds to the bytes of the phase that are done.
    pub fn advance(&mut self, bytes: Bytes) {
        self.done += bytes;
        if let Some(segments) = &mut self.segments {
            segments.done += 1;
        }
        if self.now().saturating_sub(self.reported) >= PROGRESS_INTERVAL {
            self.report();
        }
    }

    /// Reports the phase's progress to the observer.
    pub fn report(&mut self) {
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

    /// Reads `pieces` of `buffer`; returns the token of the request.
    ///
    /// # Errors
    /// The engine's.
    pub fn read(&mut self, file: FileIx, buffer: Buffer, pieces: Vec<Piece>) -> Result<u64> {
        self.read_pieces(file, buffer, pieces, false)
    }

    /// As [`Driver::read`]; `in_turn`: one piece after the other.
    ///
    /// # Errors
    /// The engine's.
    pub fn read_pieces(
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

    /// Writes `pieces` of `buffer`; returns the token of the request.
    ///
    /// # Errors
    /// The engine's.
    pub fn write(&mut self, file: FileIx, buffer: Buffer, pieces: Vec<Piece>) -> Result<u64> {
        let token = self.token();
        self.engine.submit(Request::Write { token, file, buffer, pieces })?;
        Ok(token)
    }

    /// Zeroes a range; returns the token of the request.
    ///
    /// # Errors
    /// The engine's.
    pub fn zero(&mut self, file: FileIx, extent: Extent) -> Result<u64> {
        let token = self.token();
        self.engine.submit(Request::Zero { token, file, extent })?;
        Ok(token)
    }

    /// Polls the interrupt when that is due.
    ///
    /// # Errors
    /// The interrupt's.
    pub fn poll(&mut self) -> Result<()> {
        let now = self.now();
        if self.polled.is_none_or(|polled| now.saturating_sub(polled) >= POLL_INTERVAL) {
            self.polled = Some(now);
            (self.interrupt)()?;
        }
        Ok(())
    }

    /// The next completion. None: nothing is in flight, or `pause` ran out.
    ///
    /// # Errors
    /// The interrupt's, the engine's.
    pub fn next_completion(&mut self, pause: Option<Duration>) -> Result<Option<Completion>> {
        match self.stash.pop_front() {
            Some(completion) => Ok(Some(completion)),
            None => self.fresh(pause),
        }
    }

    /// The next completion whose token `mine` accepts; others are set aside for [`Driver::next_completion`].
    /// None: nothing is in flight.
    ///
    /// # Errors
    /// The interrupt's, the engine's.
    pub fn next_of(&mut self, mine: &dyn Fn(u64) -> bool) -> Result<Option<Completion>> {
        if let Some(at) = self.stash.iter().position(|completion| mine(completion.token)) {
            return Ok(self.stash.remove(at));
        }
        loop {
            match self.fresh(None)? {
                Some(completion) if !mine(completion.token) => self.stash.push_back(completion),
                other => return Ok(other),
            }
        }
    }

    /// A completion that has already arrived.
    ///
    /// # Errors
    /// The interrupt's, the engine's.
    pub fn ended(&mut self) -> Result<Option<Completion>> {
        self.poll()?;
        if let Some(completion) = self.stash.pop_front() {
            return Ok(Some(completion));
        }
        if self.engine.in_flight() == 0 {
            return Ok(None);
        }
        self.engine.wait_timeout(Duration::ZERO)
    }

    /// The next completion that was not set aside.
    fn fresh(&mut self, pause: Option<Duration>) -> Result<Option<Completion>> {
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

    /// Sends a note to the observer.
    pub fn note(&self, text: String) {
        self.observer.event(&Event::Note { text });
    }

    /// Begins to make all completed writes to `file` durable; others may be in flight.
    ///
    /// # Errors
    /// The engine's.
    pub fn begin_sync(&mut self, file: FileIx) -> Result<u64> {
        let token = self.token();
        self.engine.submit(Request::Sync { token, file })?;
        Ok(token)
    }

    /// Makes all completed writes to `file` durable; nothing else may be in flight.
    ///
    /// # Errors
    /// The interrupt's, the engine's.
    pub fn sync(&mut self, file: FileIx) -> Result<()> {
        let token = self.begin_sync(file)?;
        match self.next_completion(None)? {
            Some(completion) if completion.token == token => completion.result,
            _ => panic!("a sync is submitted when nothing else is in flight"),
        }
    }

    /// After an error: waits for what is in flight and drops it, for at most `patience`; with `restarts` that
    /// time starts again at each completion. Returns false if something is still in flight.
    pub fn drain(&mut self, patience: Duration, restarts: bool) -> bool {
        let set_aside = self.stash.drain(..).filter_map(|completion| completion.buffer);
        set_aside.for_each(|buffer| self.engine.give_buffer(buffer));
        let mut since = self.now();
        while self.engine.in_flight() > 0 {
            if self.now().saturating_sub(since) >= patience {
                tracing::warn!("writes do not complete: giving up {} transfers", self.engine.in_flight());
                return false;
            }
            match self.engine.wait_timeout(POLL_INTERVAL) {
                Ok(Some(completion)) => {
                    if restarts {
                        since = self.now();
                    }
                    if let Some(buffer) = completion.buffer {
                        self.engine.give_buffer(buffer);
                    }
                }
                Ok(None) => {}
                Err(error) => {
                    tracing::warn!(%error, "the engine failed while it was being drained");
                    return false;
                }
            }
        }
        true
    }

    /// For the state "work is left, nothing is in flight": the engine has no free buffer.
    #[must_use]
    pub fn out_of_buffers(&self) -> Error {
        Error::new(ErrorKind::Io, format!("the {} engine has no free buffer", self.engine.name()))
    }
}
