//! The engine as a reader of archives sees it: tokens, an interrupt that is heard in time, progress that
//! does not flood.

use std::collections::VecDeque;
use std::time::Duration;

use crate::base::clock::Stopwatch;
use crate::base::{Bytes, Error, ErrorKind, Extent, Result};
use crate::io::{Buffer, Completion, Engine, FileIx, Piece, Request};
use crate::progress::{Event, Observer, Phase};

/// Longest time between two looks at the interrupt.
pub const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Shortest time between two progress events.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);

/// An engine, and who is told what it does.
pub struct Io<'a> {
    /// The engine.
    pub engine: &'a mut dyn Engine,
    /// Asked at least every [`POLL_INTERVAL`].
    pub interrupt: &'a dyn Fn() -> Result<()>,
    observer: &'a dyn Observer,
    buffer_count: u16,
    clock: Stopwatch,
    polled: Option<Duration>,
    reported: Duration,
    next_token: u64,
    phase: Phase,
    done: Bytes,
    total: Option<Bytes>,
    /// Completions that someone met while waiting for others.
    stash: VecDeque<Completion>,
}

impl<'a> Io<'a> {
    /// `buffer_count`: the engine's.
    pub fn new(
        engine: &'a mut dyn Engine,
        buffer_count: u16,
        observer: &'a dyn Observer,
        interrupt: &'a dyn Fn() -> Result<()>,
    ) -> Self {
        Self {
            engine,
            interrupt,
            observer,
            buffer_count,
            clock: Stopwatch::start(),
            polled: None,
            reported: Duration::ZERO,
            next_token: 0,
            phase: Phase::Prepare,
            done: Bytes::ZERO,
            total: None,
            stash: VecDeque::new(),
        }
    }

    /// Buffers that reading ahead may hold.
    pub fn ahead_max(&self) -> usize {
        usize::from(self.buffer_count / 2).max(1)
    }

    /// Time since the beginning.
    pub fn elapsed(&self) -> Duration {
        self.clock.elapsed()
    }

    /// Tells that a phase begins, which takes `total` bytes where that is known.
    pub fn begin_phase(&mut self, phase: Phase, total: Option<Bytes>) {
        if self.phase != Phase::Prepare {
            self.report();
        }
        self.phase = phase;
        self.done = Bytes::ZERO;
        self.total = total;
        self.observer.event(&Event::Phase { phase, total });
    }

    /// Adds to what is done of the phase.
    pub fn advance(&mut self, bytes: Bytes) {
        self.done += bytes;
        if self.elapsed().saturating_sub(self.reported) >= PROGRESS_INTERVAL {
            self.report();
        }
    }

    /// Tells the observer how far the phase is.
    pub fn report(&mut self) {
        self.reported = self.elapsed();
        self.observer.event(&Event::Progress {
            phase: self.phase,
            done: self.done,
            total: self.total,
            segments: None,
        });
    }

    /// Hears the interrupt where it is time to.
    pub fn poll(&mut self) -> Result<()> {
        let now = self.elapsed();
        if self.polled.is_none_or(|polled| now.saturating_sub(polled) >= POLL_INTERVAL) {
            self.polled = Some(now);
            (self.interrupt)()?;
        }
        Ok(())
    }

    fn token(&mut self) -> u64 {
        self.next_token += 1;
        self.next_token
    }

    /// Reads `pieces` of `buffer`; the token of the request.
    ///
    /// # Errors
    /// The engine's.
    pub fn read(&mut self, file: FileIx, buffer: Buffer, pieces: Vec<Piece>) -> Result<u64> {
        let token = self.token();
        self.engine.submit(Request::Read { token, file, buffer, pieces, in_turn: false })?;
        Ok(token)
    }

    /// Writes `pieces` of `buffer`; the token of the request.
    ///
    /// # Errors
    /// The engine's.
    pub fn write(&mut self, file: FileIx, buffer: Buffer, pieces: Vec<Piece>) -> Result<u64> {
        let token = self.token();
        self.engine.submit(Request::Write { token, file, buffer, pieces })?;
        Ok(token)
    }

    /// Makes a range zero; the token of the request.
    ///
    /// # Errors
    /// The engine's.
    pub fn zero(&mut self, file: FileIx, extent: Extent) -> Result<u64> {
        let token = self.token();
        self.engine.submit(Request::Zero { token, file, extent })?;
        Ok(token)
    }

    /// Makes all completed writes to `file` durable; nothing else is in flight.
    pub fn sync(&mut self, file: FileIx) -> Result<()> {
        let token = self.token();
        self.engine.submit(Request::Sync { token, file })?;
        match self.next_completion()? {
            Some(completion) if completion.token == token => completion.result,
            _ => panic!("a sync is submitted when nothing else is in flight"),
        }
    }

    /// The next completion. None: nothing is in flight.
    pub fn next_completion(&mut self) -> Result<Option<Completion>> {
        match self.stash.pop_front() {
            Some(completion) => Ok(Some(completion)),
            None => self.fresh(),
        }
    }

    /// The next completion that was not met before.
    fn fresh(&mut self) -> Result<Option<Completion>> {
        loop {
            self.poll()?;
            if self.engine.in_flight() == 0 {
                return Ok(None);
            }
            if let Some(completion) = self.engine.wait_timeout(POLL_INTERVAL)? {
                return Ok(Some(completion));
            }
        }
    }

    /// The next completion with a token for which `mine` holds; others wait for [`Io::next_completion`]. None:
    /// nothing is in flight.
    pub fn next_of(&mut self, mine: &dyn Fn(u64) -> bool) -> Result<Option<Completion>> {
        if let Some(at) = self.stash.iter().position(|completion| mine(completion.token)) {
            return Ok(self.stash.remove(at));
        }
        loop {
            match self.fresh()? {
                Some(completion) if !mine(completion.token) => self.stash.push_back(completion),
                other => return Ok(other),
            }
        }
    }

    /// A completion that is there already.
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

    /// After an error: waits for what is in flight and forgets it.
    pub fn drain(&mut self) {
        for completion in self.stash.drain(..) {
            if let Some(buffer) = completion.buffer {
                self.engine.give_buffer(buffer);
            }
        }
        while self.engine.in_flight() > 0 {
            match self.engine.wait_timeout(POLL_INTERVAL) {
                Ok(Some(Completion { buffer: Some(buffer), .. })) => self.engine.give_buffer(buffer),
                Ok(_) => {}
                Err(error) => {
                    tracing::warn!(%error, "the engine failed while it was drained");
                    return;
                }
            }
        }
    }

    /// For the state "work is left, nothing is in flight": the engine has no buffer.
    pub fn out_of_buffers(&self) -> Error {
        Error::new(ErrorKind::Io, format!("the {} engine has no buffer to work with", self.engine.name()))
    }
}
