//! Writes what a secondary has laid out. A segment has *landed* when all of its writes have completed.
//!
//! Invariants:
//! - at most one write to a stream is in flight;
//! - a buffer is returned to the engine when its last use has completed.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use crate::base::{Bytes, Error, ErrorKind, Result, SegmentIx};
use crate::extent::Extent;
use crate::io::{Buffer, Completion, Driver, FileIx, Piece};
use crate::secondary::Placement;

/// Longest time that an aborted copy waits for a stream whose reader has stopped reading.
const STREAM_DRAIN_MAX: Duration = Duration::from_secs(2);

/// Longest time that an aborted copy waits for the next completion from the secondary. The applications do
/// not wait for it.
const SILENCE_MAX: Duration = Duration::from_secs(20);

/// Most zero requests in flight; they carry no buffer that would limit them.
pub const ZEROS_IN_FLIGHT_MAX: usize = 64;

/// After an error: waits for what is in flight. Gives up after a while on a stream whose reader has stopped,
/// and on a secondary that completes nothing any more; the engine keeps the memory of such a write. Returns
/// false if something is still in flight.
pub(super) fn drain(driver: &mut Driver<'_>, stream: bool) -> bool {
    if stream { driver.drain(STREAM_DRAIN_MAX, false) } else { driver.drain(SILENCE_MAX, true) }
}

/// The segment that a write belongs to; None if its completion need not be reported.
type Tag = Option<SegmentIx>;

/// Submits the writes of a copy and tracks their completion.
pub struct Sink {
    pub(super) file: FileIx,
    stream: bool,
    /// Writes to a stream that wait for their turn.
    waiting: VecDeque<(Buffer, Vec<Piece>, Tag)>,
    writes: HashMap<u64, Tag>,
    zeros: HashMap<u64, Tag>,
    /// Segments with writes in flight, and the number of those writes.
    parts: HashMap<SegmentIx, usize>,
    /// Segments that have landed, in order of completion.
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

    /// Bytes submitted to the engine for writing so far.
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

    /// As [`Sink::put`]; [`Sink::take_landed`] returns `ix` when all of it has been written.
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

    /// Submits a range to be zeroed.
    pub(super) fn put_zeros(&mut self, driver: &mut Driver<'_>, extent: Extent) -> Result<()> {
        self.zero(driver, extent, None)
    }

    /// A segment that has landed since the last call.
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
        let token = driver.zero(self.file, extent)?;
        self.zeros.insert(token, tag);
        Ok(())
    }

    fn write(&mut self, driver: &mut Driver<'_>, buffer: Buffer, pieces: Vec<Piece>, tag: Tag) -> Result<()> {
        let token = driver.write(self.file, buffer, pieces)?;
        self.writes.insert(token, tag);
        Ok(())
    }

    /// Processes a completion of the sink; returns any other.
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
                .next("find out why the command that reads the pipe ended, and copy again"),
            Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => error
                .context("the secondary is full")
                .with_kind(ErrorKind::NoSpace)
                .next("make room on the secondary or choose another one, and copy again"),
            Some(libc::ENODEV) => error
                .context("the secondary is gone")
                .next("connect it again or choose another one, and copy again"),
            _ => error.context("writing the secondary failed"),
        }
    }

    /// Waits until everything submitted has completed.
    pub(super) fn flush(&mut self, driver: &mut Driver<'_>) -> Result<()> {
        while !self.is_idle() {
            let Some(completion) = driver.next_completion(None)? else { break };
            self.take(driver, completion)?;
        }
        Ok(())
    }

    /// Processes a completion while only requests of the sink are in flight.
    pub(super) fn take(&mut self, driver: &mut Driver<'_>, completion: Completion) -> Result<()> {
        if let Some(stray) = self.complete(driver, completion)? {
            unreachable!("token {} is not the sink's, and nothing else is in flight", stray.token);
        }
        Ok(())
    }
}
