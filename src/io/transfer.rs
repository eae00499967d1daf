//! The progress of one piece: what to ask the kernel for next, and what its answer means.
//!
//! Pure, and shared by all engines, so that short transfers, interruptions and the alignment of direct I/O
//! are decided in one place:
//! - a short transfer resumes where it stopped; on a direct file it resumes at the last aligned byte before
//!   that, because the kernel refuses an unaligned rest (a byte transferred twice is the same byte);
//! - a transfer that makes no progress is an error: end of file for a read, a device that accepts
//!   nothing for a write;
//! - `EINTR` and `EAGAIN` are retried at most [`RETRIES_MAX`] times without progress in between; a stream
//!   that would block has to be polled first.

use std::io;
use std::ops::Range;

use super::engine::{Piece, Place};
use crate::base::{Bytes, Error, ErrorKind};
use crate::sys::aligned::BUFFER_ALIGN;

/// `EINTR` and `EAGAIN` answers in a row before they count as an error.
pub const RETRIES_MAX: u32 = 1000;

/// Most bytes in one call; the kernel's own limit is a page short of 2 GiB.
pub const CALL_BYTES_MAX: usize = 1 << 30;

/// The direction of a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the file to memory.
    Read,
    /// From memory to the file.
    Write,
}

impl Direction {
    /// "read" or "write".
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
        }
    }
}

/// What to do next.
#[derive(Debug)]
pub enum Step {
    /// The piece is done.
    Done,
    /// Issue [`Transfer::next`].
    Again,
    /// A stream has no room or nothing to read: poll it, then issue [`Transfer::next`].
    Poll,
    /// The piece has failed.
    Fail(io::Error),
}

/// One piece in progress.
#[derive(Clone, Debug)]
pub struct Transfer {
    direction: Direction,
    range: Range<usize>,
    place: Place,
    /// Bytes known to be transferred, from the start of the piece.
    done: usize,
    /// Where the next call begins: `done`, or the aligned byte before it.
    from: usize,
    retries: u32,
    direct: bool,
}

impl Transfer {
    /// `direct`: the file was opened with O_DIRECT.
    #[must_use]
    pub fn new(direction: Direction, piece: Piece, direct: bool) -> Self {
        Self { direction, range: piece.range, place: piece.place, done: 0, from: 0, retries: 0, direct }
    }

    /// True if nothing is left to transfer.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.done == self.range.len()
    }

    /// The direction.
    #[must_use]
    pub fn direction(&self) -> Direction {
        self.direction
    }

    /// True for a stream.
    #[must_use]
    pub fn is_stream(&self) -> bool {
        self.place == Place::Stream
    }

    /// The part of the buffer to transfer next, at most `length_max` bytes, and its place in the file (None:
    /// the stream's position).
    #[must_use]
    pub fn next(&self, length_max: usize) -> (Range<usize>, Option<Bytes>) {
        let start = self.range.start + self.from;
        let end = self.range.end.min(start.saturating_add(length_max.min(CALL_BYTES_MAX)));
        let at = match self.place {
            Place::At(offset) => Some(offset + Bytes::from_len(self.from)),
            Place::Stream => None,
        };
        (start..end, at)
    }

    /// Takes the kernel's answer to [`Transfer::next`].
    pub fn account(&mut self, answer: io::Result<usize>) -> Step {
        match answer {
            Ok(count) => self.advance(count),
            Err(error) => match error.raw_os_error() {
                Some(libc::EAGAIN) if self.is_stream() => Step::Poll,
                Some(libc::EINTR | libc::EAGAIN) if self.retries < RETRIES_MAX => {
                    self.retries += 1;
                    Step::Again
                }
                _ => Step::Fail(error),
            },
        }
    }

    fn advance(&mut self, count: usize) -> Step {
        let reached = self.from.saturating_add(count);
        if reached > self.range.len() {
            return Step::Fail(io::Error::other("the kernel transferred more than it was asked for"));
        }
        if reached <= self.done {
            return Step::Fail(match self.direction {
                Direction::Read => io::ErrorKind::UnexpectedEof.into(),
                Direction::Write => io::ErrorKind::WriteZero.into(),
            });
        }
        self.done = reached;
        self.retries = 0;
        if self.is_done() {
            return Step::Done;
        }
        self.from = if self.direct && !self.is_stream() { reached - reached % BUFFER_ALIGN } else { reached };
        Step::Again
    }

    /// The error of a piece of `description` that failed with `cause`.
    #[must_use]
    pub fn failure(&self, description: &str, cause: io::Error) -> Error {
        let what = match self.place {
            Place::At(offset) => format!(
                "{} of {} bytes at {} of {description}",
                self.direction.name(),
                self.range.len(),
                offset.get()
            ),
            Place::Stream => {
                format!("{} of {} bytes of {description}", self.direction.name(), self.range.len())
            }
        };
        let what = match cause.kind() {
            io::ErrorKind::UnexpectedEof => format!("{what}: it ends after {} of them", self.done),
            io::ErrorKind::WriteZero => format!("{what}: it accepts no more than {} of them", self.done),
            _ => what,
        };
        Error::io(what, cause)
    }
}

/// True if `error` reports that a file ended before a read was complete.
#[must_use]
pub fn is_end_of_file(error: &Error) -> bool {
    use std::error::Error as _;
    error.kind() == ErrorKind::Io
        && error
            .source()
            .and_then(|cause| cause.downcast_ref::<io::Error>())
            .is_some_and(|cause| cause.kind() == io::ErrorKind::UnexpectedEof)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A kernel that gives any permitted answer: short counts, EINTR, EAGAIN.
    fn drive(transfer: &mut Transfer, file: &[u8], memory: &mut [u8], answers: &[(u8, usize)]) -> Step {
        let mut answers = answers.iter().cycle();
        loop {
            if transfer.is_done() {
                return Step::Done;
            }
            let (range, at) = transfer.next(usize::MAX);
            let at = usize::try_from(at.unwrap().get()).unwrap();
            let &(kind, short) = answers.next().unwrap();
            let answer = match kind {
                0 => Err(io::Error::from_raw_os_error(libc::EINTR)),
                1 => Err(io::Error::from_raw_os_error(libc::EAGAIN)),
                _ => {
                    let want = range.len().min(file.len().saturating_sub(at));
                    let count = if want == 0 { 0 } else { 1 + short % want };
                    memory[range.start..range.start + count].copy_from_slice(&file[at..at + count]);
                    Ok(count)
                }
            };
            match transfer.account(answer) {
                Step::Again => {}
                other => return other,
            }
        }
    }

    proptest! {
        #[test]
        fn short_transfers_give_the_same_bytes(
            file in proptest::collection::vec(any::<u8>(), 1..3000),
            cut in any::<prop::sample::Index>(),
            mut answers in proptest::collection::vec((0u8..6, any::<usize>()), 1..20),
        ) {
            answers.push((9, usize::MAX));
            let start = cut.index(file.len());
            let piece = Piece { range: 5..5 + file.len() - start, place: Place::At(Bytes::from_len(start)) };
            let mut memory = vec![0u8; 5 + file.len() - start];
            let mut transfer = Transfer::new(Direction::Read, piece, false);
            let step = drive(&mut transfer, &file, &mut memory, &answers);
            prop_assert!(matches!(step, Step::Done), "{step:?}");
            prop_assert_eq!(&memory[5..], &file[start..]);
        }
    }

    #[test]
    fn a_direct_transfer_resumes_aligned() {
        let piece = Piece { range: 0..16384, place: Place::At(Bytes(512)) };
        let mut transfer = Transfer::new(Direction::Read, piece, true);
        assert!(matches!(transfer.account(Ok(5000)), Step::Again));
        assert_eq!(transfer.next(usize::MAX), (4096..16384, Some(Bytes(512 + 4096))));
        // The same end again: no progress, although bytes were transferred.
        assert!(
            matches!(transfer.account(Ok(904)), Step::Fail(e) if e.kind() == io::ErrorKind::UnexpectedEof)
        );
    }

    #[test]
    fn zero_progress_is_an_error() {
        let piece = Piece { range: 0..10, place: Place::Stream };
        let mut read = Transfer::new(Direction::Read, piece.clone(), false);
        assert!(matches!(read.account(Ok(3)), Step::Again));
        let Step::Fail(cause) = read.account(Ok(0)) else { panic!() };
        let error = read.failure("it", cause);
        assert!(is_end_of_file(&error), "{error}");
        assert!(error.to_string().contains("ends after 3"), "{error}");
        let mut write = Transfer::new(Direction::Write, piece, false);
        assert!(matches!(write.account(Ok(0)), Step::Fail(e) if e.kind() == io::ErrorKind::WriteZero));
    }

    #[test]
    fn progress_resets_the_retry_limit() {
        let piece = Piece { range: 0..10, place: Place::At(Bytes(0)) };
        let mut transfer = Transfer::new(Direction::Write, piece, false);
        let again = || Err(io::Error::from_raw_os_error(libc::EINTR));
        for _ in 0..RETRIES_MAX {
            assert!(matches!(transfer.account(again()), Step::Again));
        }
        assert!(matches!(transfer.account(Ok(1)), Step::Again));
        for _ in 0..RETRIES_MAX {
            assert!(matches!(transfer.account(again()), Step::Again));
        }
        assert!(matches!(transfer.account(again()), Step::Fail(_)));
    }

    #[test]
    fn a_stream_that_would_block_is_polled() {
        let mut transfer = Transfer::new(Direction::Read, Piece { range: 0..1, place: Place::Stream }, false);
        let answer = Err(io::Error::from_raw_os_error(libc::EAGAIN));
        assert!(matches!(transfer.account(answer), Step::Poll));
    }
}
