//! The io_uring engine: every piece of every request in one ring.
//!
//! Invariants: those of [`engine`](super::engine). The ring ([`sys::ring`](crate::sys::ring)) is responsible
//! for memory safety; this module decides which operation is next:
//! - pieces wait in a queue here while the ring is full, so a submission never fails for lack of room;
//! - after the first failure of a request its waiting pieces are dropped, and the request completes when
//!   those in the kernel have returned;
//! - pieces of a stream, and those to be read in turn, are submitted one after the other.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use super::engine::{Buffer, Completion, Engine, EngineConfig, FileIx, Piece, Request};
use super::handle::FileState;
use super::pool::{Pool, check_pieces};
use super::sync_engine::next_file;
use super::transfer::{Direction, RETRIES_MAX, Step, Transfer};
use crate::base::{Bytes, Error, Result};
use crate::extent::Extent;
use crate::sys::block::FileKind;
use crate::sys::ring::{CompletedOperation, Features, FileSlot, HoldIx, Operation, Ring, RingOptions};

/// Longest part of a piece in one operation.
const OPERATION_BYTES_MAX: Bytes = Bytes::mib(16);

#[derive(Debug)]
struct UringFile {
    slot: FileSlot,
    state: FileState,
}

#[derive(Debug)]
struct Job {
    token: u64,
    file: FileIx,
    work: Work,
    /// A part is submitted when the one before it is done.
    in_turn: bool,
    /// Operations in the ring.
    under_way: u32,
    /// Parts not finished: waiting or in the ring.
    open: u32,
    /// Interrupted calls in a row (for zeroing; transfers count their own).
    retries: u32,
    /// The kernel has refused to serve a part of it without blocking.
    may_wait: bool,
    failure: Option<Error>,
}

#[derive(Debug)]
enum Work {
    Transfer {
        hold: HoldIx,
        index: u16,
        transfers: Vec<Transfer>,
    },
    /// The extent, and the mode of the last fallocate(2) for it.
    Zero(Extent, i32),
    Sync,
}

/// The next operation of one part of a job.
#[derive(Clone, Copy, Debug)]
struct NextOperation {
    job: u32,
    part: u32,
    /// Poll the stream first.
    poll: bool,
}

impl NextOperation {
    fn user(self) -> u64 {
        // Bit 63 is the poll flag; the number of a job never reaches it (see `JOBS_MAX`).
        (u64::from(self.poll) << 63) | (u64::from(self.job) << 32) | u64::from(self.part)
    }

    fn from_user(user: u64) -> Self {
        let low = |value: u64| u32::try_from(value & 0xffff_ffff).expect("masked to 32 bits");
        Self { job: low(user >> 32) & (JOBS_MAX - 1), part: low(user), poll: user >> 63 != 0 }
    }
}

/// The number of a job or part, as an index.
fn at(number: u32) -> usize {
    usize::try_from(number).expect("Linux has at least 32 bits")
}

/// Most requests in flight; a caller's buffers run out long before.
const JOBS_MAX: u32 = 1 << 30;

/// An engine on an io_uring of this thread.
#[derive(Debug)]
pub struct UringEngine {
    ring: Ring,
    pool: Pool,
    files: Vec<UringFile>,
    jobs: Vec<Option<Job>>,
    free_jobs: Vec<u32>,
    waiting: VecDeque<NextOperation>,
    ended: VecDeque<Completion>,
    in_flight: usize,
}

impl UringEngine {
    /// An engine without files, on a ring of this thread.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`](crate::base::ErrorKind::Usage) for an invalid pool configuration; the kernel's
    /// refusal with its errno (ENOSYS, EPERM, ENOMEM, EOPNOTSUPP).
    pub fn new(config: EngineConfig) -> Result<Self> {
        Self::with_options(config, RingOptions::default())
    }

    /// As [`UringEngine::new`], using no more kernel features than `options` permits.
    ///
    /// # Errors
    /// As [`UringEngine::new`].
    pub fn with_options(config: EngineConfig, options: RingOptions) -> Result<Self> {
        let mut memory = Pool::memory(config)?;
        let ring =
            Ring::new(&mut memory, options).map_err(|error| Error::kernel("set-up of io_uring", error))?;
        Ok(Self {
            ring,
            pool: Pool::new(memory),
            files: Vec::new(),
            jobs: Vec::new(),
            free_jobs: Vec::new(),
            waiting: VecDeque::new(),
            ended: VecDeque::new(),
            in_flight: 0,
        })
    }

    /// The features that the kernel granted.
    #[must_use]
    pub fn features(&self) -> Features {
        self.ring.features()
    }

    fn add_job(&mut self, job: Job) -> u32 {
        self.in_flight += 1;
        if let Some(index) = self.free_jobs.pop() {
            self.jobs[at(index)] = Some(job);
            return index;
        }
        let index = u32::try_from(self.jobs.len()).ok().filter(|index| *index < JOBS_MAX);
        let index = index.expect("a caller's requests in flight are bounded by its buffers");
        self.jobs.push(Some(job));
        index
    }

    fn job(&mut self, index: u32) -> &mut Job {
        self.jobs[at(index)].as_mut().expect("a job lives until its last part has come back")
    }

    fn submit_transfer(
        &mut self,
        token: u64,
        file: FileIx,
        buffer: Buffer,
        pieces: Vec<Piece>,
        direction: Direction,
        in_turn: bool,
    ) {
        check_pieces(&buffer, &pieces);
        let state = &self.files[usize::from(file.0)].state;
        let failure = (state.kind == FileKind::Other).then(|| state.wrong_kind(direction));
        let direct = state.direct;
        let transfers: Vec<Transfer> = pieces
            .into_iter()
            .map(|piece| Transfer::new(direction, piece, direct))
            .filter(|transfer| !transfer.is_done())
            .collect();
        let open = if failure.is_some() {
            0
        } else {
            u32::try_from(transfers.len()).expect("bounded by the buffer")
        };
        let (memory, index) = buffer.into_parts();
        let hold = self.ring.hold(memory);
        // The kernel guarantees no order.
        let in_turn = in_turn || transfers.iter().any(Transfer::is_stream);
        let work = Work::Transfer { hold, index, transfers };
        let job =
            Job { token, file, work, in_turn, under_way: 0, open, retries: 0, may_wait: false, failure };
        let job = self.add_job(job);
        let parts = if in_turn { open.min(1) } else { open };
        self.waiting.extend((0..parts).map(|part| NextOperation { job, part, poll: false }));
        self.end_if_done(job);
    }

    fn submit_plain(&mut self, token: u64, file: FileIx, work: Work) {
        let job = Job {
            token,
            file,
            work,
            in_turn: false,
            under_way: 0,
            open: 1,
            retries: 0,
            may_wait: false,
            failure: None,
        };
        let job = self.add_job(job);
        self.waiting.push_back(NextOperation { job, part: 0, poll: false });
    }

    /// Moves waiting parts to the ring while it has room.
    fn pump(&mut self) -> Result<()> {
        while self.ring.has_room() {
            let Some(operation) = self.waiting.pop_front() else { break };
            let job = self.jobs[at(operation.job)].as_mut().expect("waiting parts keep their job");
            if job.failure.is_some() {
                job.open -= 1;
                self.end_if_done(operation.job);
                continue;
            }
            let file = &self.files[usize::from(job.file.0)];
            let call = match &mut job.work {
                Work::Transfer { hold, transfers, .. } => {
                    transfer_operation(*hold, &transfers[at(operation.part)], operation.poll)
                }
                Work::Sync => match file.state.check_sync() {
                    Ok(()) => Operation::Fsync,
                    Err(error) => {
                        self.fail_part(operation.job, error);
                        continue;
                    }
                },
                Work::Zero(extent, last_mode) => match file.state.zero_mode() {
                    Some(mode) => {
                        *last_mode = mode;
                        Operation::Fallocate { mode, offset: extent.start(), length: extent.length() }
                    }
                    None => {
                        let extent = *extent;
                        self.zero_waiting(operation.job, extent);
                        continue;
                    }
                },
            };
            job.under_way += 1;
            let may_wait = job.may_wait;
            self.ring
                .push(file.slot, call, operation.user(), may_wait)
                .map_err(|error| Error::kernel("submission to io_uring", error))?;
        }
        Ok(())
    }

    /// Zeroes with system calls that io_uring does not have.
    fn zero_waiting(&mut self, job: u32, extent: Extent) {
        let index = usize::from(self.job(job).file.0);
        let file = &mut self.files[index];
        match file.state.zero_without_fallocate(self.ring.file(file.slot), extent) {
            Ok(()) => {
                self.job(job).open -= 1;
                self.end_if_done(job);
            }
            Err(error) => self.fail_part(job, error),
        }
    }

    fn fail_part(&mut self, index: u32, error: Error) {
        let job = self.job(index);
        job.failure.get_or_insert(error);
        job.open -= 1;
        self.end_if_done(index);
    }

    /// Processes every completion that has arrived.
    fn reap(&mut self) {
        while let Some(CompletedOperation { user, result }) = self.ring.take_completion() {
            let operation = NextOperation::from_user(user);
            let job = self.job(operation.job);
            job.under_way -= 1;
            let file = job.file;
            match job.work {
                Work::Transfer { .. } => self.account_transfer(operation, result),
                Work::Sync => {
                    let noted = self.files[usize::from(file.0)].state.note_sync(result.map(drop));
                    self.end_part(operation.job, noted);
                }
                Work::Zero(extent, mode) => self.account_zero(operation, (extent, mode), result),
            }
        }
    }

    fn end_part(&mut self, job: u32, result: Result<()>) {
        match result {
            Ok(()) => {
                self.job(job).open -= 1;
                self.end_if_done(job);
            }
            Err(error) => self.fail_part(job, error),
        }
    }

    fn account_transfer(&mut self, operation: NextOperation, result: io::Result<usize>) {
        let job = self.jobs[at(operation.job)].as_mut().expect("reap has seen it");
        let Work::Transfer { transfers, .. } = &mut job.work else {
            unreachable!("reap has matched the kind of work")
        };
        let transfer = &mut transfers[at(operation.part)];
        // The kernel first tries without blocking. If that fails, it retries with blocking by itself, unless
        // EAGAIN arrives with a completion from a lower device: for example if device-mapper splits a request
        // over two disks, and one of them has to split its part again. Such a request fails however often it
        // is tried without blocking.
        let refused = result.as_ref().is_err_and(|error| error.raw_os_error() == Some(libc::EAGAIN));
        job.may_wait |= refused && !transfer.is_stream();
        let step = match (operation.poll, result) {
            // The transfer itself reports the error of a failed poll.
            (true, _) => Step::Again,
            (false, result) => transfer.account(result),
        };
        match step {
            Step::Again => self.waiting.push_front(NextOperation { poll: false, ..operation }),
            Step::Poll => self.waiting.push_front(NextOperation { poll: true, ..operation }),
            Step::Done => {
                let next = operation.part + 1;
                if job.in_turn && at(next) < transfers.len() {
                    self.waiting.push_front(NextOperation { part: next, ..operation });
                }
                self.end_part(operation.job, Ok(()));
            }
            Step::Fail(cause) => {
                let error = self.files[usize::from(job.file.0)].state.failure(transfer, cause);
                if job.in_turn {
                    // Later parts were never submitted.
                    job.open = 1;
                }
                self.fail_part(operation.job, error);
            }
        }
    }

    fn account_zero(
        &mut self,
        operation: NextOperation,
        (extent, mode): (Extent, i32),
        result: io::Result<usize>,
    ) {
        let job = self.jobs[at(operation.job)].as_mut().expect("reap has seen it");
        let state = &mut self.files[usize::from(job.file.0)].state;
        let Err(error) = result else { return self.end_part(operation.job, Ok(())) };
        match error.raw_os_error() {
            Some(libc::EINTR | libc::EAGAIN) if job.retries < RETRIES_MAX => {
                job.retries += 1;
                self.waiting.push_front(operation);
            }
            // `zero_mode` now returns another mode, or None: another method is next.
            Some(errno) if state.fallocate_failed(mode, errno) => self.waiting.push_front(operation),
            _ => {
                let error = state.zero_error(extent, error);
                self.fail_part(operation.job, error);
            }
        }
    }

    /// Completes a job whose parts have all ended.
    fn end_if_done(&mut self, index: u32) {
        let slot = &mut self.jobs[at(index)];
        if slot.as_ref().is_some_and(|job| job.open > 0 || job.under_way > 0) {
            return;
        }
        let Some(job) = slot.take() else { return };
        self.free_jobs.push(index);
        let buffer = match job.work {
            Work::Transfer { hold, index, .. } => Some(Buffer::new(self.ring.release(hold), index)),
            Work::Zero(..) | Work::Sync => None,
        };
        let result = job.failure.map_or(Ok(()), Err);
        self.ended.push_back(Completion { token: job.token, buffer, result });
    }

    fn wait_until(&mut self, until: Option<Instant>) -> Result<Option<Completion>> {
        loop {
            self.reap();
            self.pump()?;
            if let Some(completion) = self.ended.pop_front() {
                self.in_flight -= 1;
                return Ok(Some(completion));
            }
            if self.in_flight == 0 {
                return Ok(None);
            }
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return Ok(None);
            }
            self.ring.wait(left).map_err(|error| Error::kernel("wait for io_uring", error))?;
        }
    }
}

fn transfer_operation(hold: HoldIx, transfer: &Transfer, poll: bool) -> Operation {
    let (range, offset) = transfer.next(OPERATION_BYTES_MAX.as_len());
    match (poll, transfer.direction()) {
        (true, Direction::Read) => Operation::PollIn,
        (true, Direction::Write) => Operation::PollOut,
        (false, Direction::Read) => Operation::Read { hold, range, offset },
        (false, Direction::Write) => Operation::Write { hold, range, offset },
    }
}

impl Engine for UringEngine {
    fn name(&self) -> &'static str {
        "io_uring"
    }

    fn add_file(&mut self, file: OwnedFd, description: &str) -> Result<FileIx> {
        let index = next_file(self.files.len())?;
        let state = FileState::new(&file, description)?;
        let slot = self
            .ring
            .add_file(file)
            .map_err(|error| Error::kernel(format!("registration of {description} with io_uring"), error))?;
        self.files.push(UringFile { slot, state });
        Ok(index)
    }

    fn take_buffer(&mut self) -> Option<Buffer> {
        self.pool.take()
    }

    fn give_buffer(&mut self, buffer: Buffer) {
        self.pool.give(buffer);
    }

    fn submit(&mut self, request: Request) -> Result<()> {
        match request {
            Request::Read { token, file, buffer, pieces, in_turn } => {
                self.submit_transfer(token, file, buffer, pieces, Direction::Read, in_turn);
            }
            Request::Write { token, file, buffer, pieces } => {
                self.submit_transfer(token, file, buffer, pieces, Direction::Write, false);
            }
            Request::Zero { token, file, extent } => self.submit_plain(token, file, Work::Zero(extent, 0)),
            Request::Sync { token, file } => self.submit_plain(token, file, Work::Sync),
        }
        self.pump()
    }

    fn wait_timeout(&mut self, timeout: Duration) -> Result<Option<Completion>> {
        self.wait_until(Instant::now().checked_add(timeout))
    }

    fn gives_back(&self, file: FileIx) -> bool {
        self.files[usize::from(file.0)].state.gives_back()
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::engine::Place;
    use std::io::Read as _;

    crate::io::suite::engine_suite!(|config| Box::new(UringEngine::new(config).unwrap()));

    /// What an old kernel or a tight memlock limit leaves.
    mod least {
        use super::*;
        crate::io::suite::engine_suite!(|config| {
            let options = RingOptions { level_max: 0, register: false };
            Box::new(UringEngine::with_options(config, options).unwrap())
        });
    }

    mod cooperative {
        use super::*;
        crate::io::suite::engine_suite!(|config| {
            let options = RingOptions { level_max: 1, register: true };
            Box::new(UringEngine::with_options(config, options).unwrap())
        });
    }

    #[test]
    fn files_are_closed_when_the_engine_is_gone() {
        let config = EngineConfig { buffer_count: 2, buffer_bytes: Bytes::kib(4) };
        for _ in 0..50 {
            let (mut reader, writer) = io::pipe().unwrap();
            let flags = nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK);
            nix::fcntl::fcntl(&reader, flags).unwrap();
            let mut engine = UringEngine::new(config).unwrap();
            engine.add_file(writer.into(), "pipe").unwrap();
            assert_eq!(reader.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
            drop(engine);
            // A device that was opened exclusively must be free at once as well.
            assert_eq!(reader.read(&mut [0]).unwrap(), 0);
        }
    }

    #[test]
    fn what_is_read_in_turn_is_asked_for_a_piece_at_a_time() {
        let content: Vec<u8> = (0..32u32 << 10).map(|at| u8::try_from(at % 251).unwrap()).collect();
        let mut file = tempfile::tempfile().unwrap();
        io::Write::write_all(&mut file, &content).unwrap();
        let config = EngineConfig { buffer_count: 1, buffer_bytes: Bytes::kib(32) };
        let mut engine = UringEngine::new(config).unwrap();
        let file = engine.add_file(file.into(), "file").unwrap();
        // Backwards, so that the order is that of the pieces; the last one is past the end of the file.
        for (in_turn, end, under_way) in [(true, 0, 1), (false, 0, 4), (true, 4, 1)] {
            let piece = |number: usize| Piece {
                range: number * 8192..(number + 1) * 8192,
                place: Place::At(Bytes::kib(8 * Bytes::from_len(number + end).get())),
            };
            let buffer = engine.take_buffer().unwrap();
            let pieces = (0..4).rev().map(piece).collect();
            engine.submit(Request::Read { token: 5, file, buffer, pieces, in_turn }).unwrap();
            assert_eq!((engine.job(0).under_way, engine.waiting.len()), (under_way, 0));
            let completion = engine.wait_timeout(Duration::MAX).unwrap().unwrap();
            let buffer = completion.buffer.unwrap();
            assert_eq!((completion.result.is_ok(), engine.in_flight()), (end == 0, 0));
            assert!(end > 0 || buffer[..] == content[..]);
            engine.give_buffer(buffer);
        }
    }

    #[test]
    fn registrations_are_used_and_reported() {
        let config = EngineConfig { buffer_count: 2, buffer_bytes: Bytes::kib(4) };
        let features = UringEngine::new(config).unwrap().features();
        assert!(features.fixed_buffers && features.fixed_files, "{features}");
        let options = RingOptions { level_max: 0, register: false };
        let features = UringEngine::with_options(config, options).unwrap().features();
        assert_eq!(features.to_string(), "plain, unregistered buffers, unregistered files");
    }

    #[test]
    fn an_invalid_pool_is_refused() {
        for (buffer_count, buffer_bytes) in [(1, 0), (1, 1000), (65535, 16 << 20)] {
            let config = EngineConfig { buffer_count, buffer_bytes: Bytes(buffer_bytes) };
            let error = UringEngine::new(config).unwrap_err();
            assert_eq!(error.kind(), crate::base::ErrorKind::Usage);
        }
    }
}
