//! The plain engine: one transfer at a time with ordinary system calls, for systems without io_uring.
//!
//! Invariants: those of [`engine`](super::engine). Requests are processed in order, inside [`Engine::wait_timeout`].
//! A stream is polled before each call and given no more than a pipe takes at once, so that
//! [`Engine::wait_timeout`] returns in time when the other side has stopped.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::engine::{Buffer, Completion, Engine, EngineConfig, FileIx, Piece, Request};
use super::handle::FileState;
use super::pool::{Pool, check_pieces};
use super::transfer::{Direction, Step, Transfer};
use crate::base::{Error, ErrorKind, Result};
use crate::extent::Extent;
use crate::sys::block::FileKind;

/// What a pipe that polls as writable accepts without blocking (PIPE_BUF).
const STREAM_CALL_BYTES: usize = 4096;

/// Longest single poll: poll(2) takes milliseconds in an int.
const POLL_SLICE: Duration = Duration::from_secs(3600);

/// Whether a request has ended.
enum Outcome {
    Ended(Result<()>),
    /// A stream was not ready in time.
    TimedOut,
}

/// A file handle, and the state of the file.
#[derive(Debug)]
struct SyncFile {
    file: File,
    state: FileState,
}

impl SyncFile {
    fn new(fd: OwnedFd, description: &str) -> Result<Self> {
        let state = FileState::new(&fd, description)?;
        Ok(Self { file: File::from(fd), state })
    }

    fn call(&self, transfer: &Transfer, memory: &mut [u8]) -> io::Result<usize> {
        let polled = transfer.is_stream() && self.state.kind == FileKind::Stream;
        let length_max = if polled { STREAM_CALL_BYTES } else { usize::MAX };
        let (range, at) = transfer.next(length_max);
        match (transfer.direction(), at) {
            (Direction::Read, Some(at)) => self.file.read_at(&mut memory[range], at.get()),
            (Direction::Write, Some(at)) => self.file.write_at(&memory[range], at.get()),
            (Direction::Read, None) => (&self.file).read(&mut memory[range]),
            (Direction::Write, None) => (&self.file).write(&memory[range]),
        }
    }

    /// True if the stream is ready, or has an error that the next call will return.
    fn poll(&self, direction: Direction, until: Option<Instant>) -> io::Result<bool> {
        let flags = match direction {
            Direction::Read => PollFlags::POLLIN,
            Direction::Write => PollFlags::POLLOUT,
        };
        loop {
            let left = until.map_or(POLL_SLICE, |until| until.saturating_duration_since(Instant::now()));
            let mut fds = [PollFd::new(self.file.as_fd(), flags)];
            // Rounded up: a wait of less than a millisecond would otherwise spin.
            let slice = left.min(POLL_SLICE) + Duration::from_micros(999);
            let timeout = PollTimeout::try_from(slice).unwrap_or(PollTimeout::NONE);
            match poll(&mut fds, timeout) {
                Ok(0) if until.is_none() => {}
                Ok(0) => return Ok(false),
                Ok(_) => return Ok(true),
                Err(nix::errno::Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Continues `transfers`, waiting at most until `until` for a stream that is not ready; each can be resumed.
    fn run(&self, transfers: &mut [Transfer], memory: &mut [u8], until: Option<Instant>) -> Outcome {
        for transfer in transfers.iter_mut() {
            if self.state.kind == FileKind::Other {
                return Outcome::Ended(Err(self.state.wrong_kind(transfer.direction())));
            }
            while !transfer.is_done() {
                if transfer.is_stream() && self.state.kind == FileKind::Stream {
                    match self.poll(transfer.direction(), until) {
                        Ok(true) => {}
                        Ok(false) => return Outcome::TimedOut,
                        Err(cause) => return Outcome::Ended(Err(self.state.failure(transfer, cause))),
                    }
                }
                let answer = self.call(transfer, memory);
                if let Step::Fail(cause) = transfer.account(answer) {
                    return Outcome::Ended(Err(self.state.failure(transfer, cause)));
                }
            }
        }
        Outcome::Ended(Ok(()))
    }

    fn zero(&mut self, extent: Extent) -> Result<()> {
        self.state.zero(self.file.as_fd(), extent)
    }

    fn sync(&mut self) -> Result<()> {
        self.state.check_sync()?;
        let answer = loop {
            match self.file.sync_all() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => break other,
            }
        };
        self.state.note_sync(answer)
    }
}

/// A queued request.
#[derive(Debug)]
struct Job {
    token: u64,
    file: FileIx,
    work: Work,
}

#[derive(Debug)]
enum Work {
    Transfer { buffer: Buffer, transfers: Vec<Transfer> },
    Zero(Extent),
    Sync,
}

/// Processes requests one after the other, each when its completion is asked for.
#[derive(Debug)]
pub struct SyncEngine {
    pool: Pool,
    files: Vec<SyncFile>,
    jobs: VecDeque<Job>,
}

impl SyncEngine {
    /// An engine without files.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] for an invalid pool configuration.
    pub fn new(config: EngineConfig) -> Result<Self> {
        Ok(Self { pool: Pool::new(Pool::memory(config)?), files: Vec::new(), jobs: VecDeque::new() })
    }

    fn transfer(
        &self,
        token: u64,
        file: FileIx,
        buffer: Buffer,
        pieces: Vec<Piece>,
        direction: Direction,
    ) -> Job {
        check_pieces(&buffer, &pieces);
        let direct = self.files[usize::from(file.0)].state.direct;
        let transfers = pieces.into_iter().map(|piece| Transfer::new(direction, piece, direct)).collect();
        Job { token, file, work: Work::Transfer { buffer, transfers } }
    }

    fn run(&mut self, until: Option<Instant>) -> Option<Completion> {
        let mut job = self.jobs.pop_front()?;
        let file = &mut self.files[usize::from(job.file.0)];
        let result = match &mut job.work {
            Work::Transfer { buffer, transfers } => match file.run(transfers, buffer, until) {
                Outcome::Ended(result) => result,
                Outcome::TimedOut => {
                    self.jobs.push_front(job);
                    return None;
                }
            },
            Work::Zero(extent) => file.zero(*extent),
            Work::Sync => file.sync(),
        };
        let buffer = match job.work {
            Work::Transfer { buffer, .. } => Some(buffer),
            Work::Zero(_) | Work::Sync => None,
        };
        Some(Completion { token: job.token, buffer, result })
    }
}

/// The index of the next file, or an error if a [`FileIx`] cannot hold it.
pub(super) fn next_file(count: usize) -> Result<FileIx> {
    u16::try_from(count)
        .map(FileIx)
        .map_err(|_| Error::new(ErrorKind::Kernel, format!("more than {count} files in one engine")))
}

impl Engine for SyncEngine {
    fn name(&self) -> &'static str {
        "sync"
    }

    fn add_file(&mut self, file: OwnedFd, description: &str) -> Result<FileIx> {
        let index = next_file(self.files.len())?;
        self.files.push(SyncFile::new(file, description)?);
        Ok(index)
    }

    fn take_buffer(&mut self) -> Option<Buffer> {
        self.pool.take()
    }

    fn give_buffer(&mut self, buffer: Buffer) {
        self.pool.give(buffer);
    }

    fn submit(&mut self, request: Request) -> Result<()> {
        let job = match request {
            Request::Read { token, file, buffer, pieces, in_turn: _ } => {
                self.transfer(token, file, buffer, pieces, Direction::Read)
            }
            Request::Write { token, file, buffer, pieces } => {
                self.transfer(token, file, buffer, pieces, Direction::Write)
            }
            Request::Zero { token, file, extent } => Job { token, file, work: Work::Zero(extent) },
            Request::Sync { token, file } => Job { token, file, work: Work::Sync },
        };
        self.jobs.push_back(job);
        Ok(())
    }

    fn wait_timeout(&mut self, timeout: Duration) -> Result<Option<Completion>> {
        Ok(self.run(Instant::now().checked_add(timeout)))
    }

    fn gives_back(&self, file: FileIx) -> bool {
        self.files[usize::from(file.0)].state.gives_back()
    }

    fn in_flight(&self) -> usize {
        self.jobs.len()
    }
}

#[cfg(test)]
mod tests {
    crate::io::suite::engine_suite!(|config| Box::new(super::SyncEngine::new(config).unwrap()));
}
