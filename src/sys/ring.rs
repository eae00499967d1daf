//! A safe io_uring: tracks which memory the kernel may access, and until when.
//!
//! Invariants:
//! - a buffer that an operation names is *held* by the ring ([`Ring::hold`]) from before its submission until
//!   its completion has been taken; only then can [`Ring::release`] return it;
//! - the ring owns its files for its whole life;
//! - there are never more operations in flight than the ring has entries, so neither queue overflows;
//! - dropping the ring cancels operations that may never complete (streams), and waits for the rest up to
//!   [`DRAIN_MAX`]. If some are left, buffers, files and ring are leaked, as the kernel may still write to
//!   them;
//! - the ring stays on the thread that created it: the kernel may have been promised a single issuer.
//!
//! Must not interpret results: they are the kernel's numbers.

use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::mem::ManuallyDrop;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use io_uring::types::{CancelBuilder, Fd, Fixed, SubmitArgs, Timespec};
use io_uring::{IoUring, Probe, opcode, squeue};

use super::aligned::{AlignedBuffer, Registration};
use crate::base::Bytes;

/// Most operations in flight: enough for any disk, and within any memlock limit.
pub const ENTRIES: u16 = 256;

/// Most files of one ring.
pub const FILES_MAX: usize = 64;

/// Longest wait for the kernel when a ring is dropped.
pub const DRAIN_MAX: Duration = Duration::from_secs(60);

/// Consecutive failed calls after which dropping a ring stops waiting.
const DRAIN_FAILURES_MAX: u32 = 100;

/// The offset by which the kernel uses the stream's own position.
const OFFSET_CURRENT: u64 = u64::MAX;

/// A file of the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileSlot(u16);

/// A buffer held by the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HoldIx(usize);

/// One operation. Offsets are bytes; None means the stream's own position.
#[derive(Clone, Debug)]
#[allow(missing_docs)] // the variants describe their fields
pub enum Operation {
    /// Fill `range` of a held buffer.
    Read { hold: HoldIx, range: Range<usize>, offset: Option<Bytes> },
    /// Write `range` of a held buffer.
    Write { hold: HoldIx, range: Range<usize>, offset: Option<Bytes> },
    /// fsync(2).
    Fsync,
    /// fallocate(2) with `mode`.
    Fallocate { mode: i32, offset: Bytes, length: Bytes },
    /// Wait until a stream can be read.
    PollIn,
    /// Wait until a stream can be written.
    PollOut,
}

/// The kernel's result of one operation.
#[derive(Debug)]
pub struct CompletedOperation {
    /// The caller's number.
    pub user: u64,
    /// Bytes transferred (0 for operations without data), or the errno.
    pub result: io::Result<usize>,
}

/// The features that the kernel granted.
#[derive(Clone, Copy, Debug, Default)]
pub struct Features {
    /// The set-up flags that it accepted: 2 single issuer with deferred work, 1 cooperative, 0 none.
    level: u8,
    /// True if buffers are registered.
    pub fixed_buffers: bool,
    /// True if files are registered.
    pub fixed_files: bool,
}

impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let level = ["plain", "cooperative", "single issuer, deferred work"];
        f.write_str(level.get(usize::from(self.level)).copied().unwrap_or_default())?;
        f.write_str(if self.fixed_buffers { ", registered buffers" } else { ", unregistered buffers" })?;
        f.write_str(if self.fixed_files { ", registered files" } else { ", unregistered files" })
    }
}

/// The most that is requested from the kernel. The default is everything; less is for testing what an older
/// or stricter kernel grants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingOptions {
    /// Highest set of set-up flags to try: 2, 1 or 0, see [`Features`].
    pub level_max: u8,
    /// Whether to register buffers and files.
    pub register: bool,
}

impl Default for RingOptions {
    fn default() -> Self {
        Self { level_max: LEVEL_MAX, register: true }
    }
}

/// The set-up level with the most flags.
const LEVEL_MAX: u8 = 2;

#[derive(Debug)]
struct HeldBuffer {
    memory: AlignedBuffer,
    in_flight: u32,
}

#[derive(Clone, Copy, Debug)]
struct InFlight {
    user: u64,
    hold: Option<HoldIx>,
    /// May wait forever: must be cancelled before the ring is dropped.
    stream: bool,
}

/// An io_uring that owns all memory and files of its operations until they complete.
pub struct Ring {
    /// Dropped explicitly after the drain, or leaked.
    ring: ManuallyDrop<IoUring>,
    id: u64,
    features: Features,
    /// Dropped explicitly after the drain, or leaked.
    files: ManuallyDrop<Vec<OwnedFd>>,
    /// Dropped explicitly after the drain, or leaked.
    held: ManuallyDrop<Vec<Option<HeldBuffer>>>,
    operations: Vec<Option<InFlight>>,
    free_operations: Vec<usize>,
    in_flight: usize,
    /// Makes the ring !Send, as it must stay on its thread.
    thread: PhantomData<*const ()>,
}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ring")
            .field("features", &self.features)
            .field("files", &self.files.len())
            .field("in_flight", &self.in_flight)
            .finish_non_exhaustive()
    }
}

/// Numbers the rings of the process, so that a registration identifies one of them.
static NEXT_RING: AtomicU64 = AtomicU64::new(0);

impl Ring {
    /// Creates a ring with all features that this kernel grants, and registers `memory` if possible.
    ///
    /// # Errors
    /// The errno of io_uring_setup(2): ENOSYS, EPERM (io_uring_disabled, seccomp), ENOMEM (memlock on old
    /// kernels); EOPNOTSUPP if the kernel lacks an operation that is needed.
    pub fn new(memory: &mut [AlignedBuffer], options: RingOptions) -> io::Result<Self> {
        let (ring, level) = set_up(options.level_max)?;
        if !ring.params().is_feature_ext_arg() || !ring.params().is_feature_nodrop() {
            return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        }
        check_operations(&ring)?;
        let capacity = usize::from(ENTRIES);
        let mut ring = Self {
            ring: ManuallyDrop::new(ring),
            id: NEXT_RING.fetch_add(1, Ordering::Relaxed),
            features: Features { level, ..Features::default() },
            files: ManuallyDrop::new(Vec::new()),
            held: ManuallyDrop::new(Vec::new()),
            operations: vec![None; capacity],
            free_operations: (0..capacity).rev().collect(),
            in_flight: 0,
            thread: PhantomData,
        };
        if options.register {
            ring.register_files();
            ring.register_buffers(memory);
        }
        Ok(ring)
    }

    fn register_files(&mut self) {
        let empty: [RawFd; FILES_MAX] = [-1; FILES_MAX];
        match self.ring.submitter().register_files(&empty) {
            Ok(()) => self.features.fixed_files = true,
            Err(error) => tracing::warn!(%error, "io_uring: files are not registered"),
        }
    }

    fn register_buffers(&mut self, memory: &mut [AlignedBuffer]) {
        if memory.is_empty() {
            return;
        }
        let vectors: Vec<libc::iovec> = memory
            .iter_mut()
            .map(|buffer| libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() })
            .collect();
        // SAFETY: each vector is a live allocation, exclusively borrowed now. The kernel pins the pages, so
        // it never follows these addresses after they are freed; it writes to the pages only for an operation
        // that names them, and `push` names only memory that the ring holds.
        match unsafe { self.ring.submitter().register_buffers(&vectors) } {
            Ok(()) => {
                for (index, buffer) in (0u16..).zip(memory) {
                    buffer.set_registration(Registration { ring: self.id, index });
                }
                self.features.fixed_buffers = true;
            }
            Err(error) => {
                tracing::warn!(%error, "io_uring: buffers are not registered (memlock limit?)");
            }
        }
    }

    /// The features that the kernel granted.
    #[must_use]
    pub fn features(&self) -> Features {
        self.features
    }

    /// True if [`Ring::push`] can take another operation.
    #[must_use]
    pub fn has_room(&self) -> bool {
        !self.free_operations.is_empty()
    }

    /// Takes ownership of a file.
    ///
    /// # Errors
    /// EMFILE past [`FILES_MAX`]; the errno of io_uring_register(2).
    pub fn add_file(&mut self, file: OwnedFd) -> io::Result<FileSlot> {
        let slot = u16::try_from(self.files.len())
            .ok()
            .filter(|_| self.files.len() < FILES_MAX)
            .ok_or_else(|| io::Error::from_raw_os_error(libc::EMFILE))?;
        if self.features.fixed_files {
            self.ring.submitter().register_files_update(u32::from(slot), &[file.as_raw_fd()])?;
        }
        self.files.push(file);
        Ok(FileSlot(slot))
    }

    /// The file in a slot.
    #[must_use]
    pub fn file(&self, slot: FileSlot) -> BorrowedFd<'_> {
        self.files[usize::from(slot.0)].as_fd()
    }

    /// Takes ownership of a buffer for later operations.
    pub fn hold(&mut self, memory: AlignedBuffer) -> HoldIx {
        let held = Some(HeldBuffer { memory, in_flight: 0 });
        match self.held.iter().position(Option::is_none) {
            Some(index) => {
                self.held[index] = held;
                HoldIx(index)
            }
            None => {
                self.held.push(held);
                HoldIx(self.held.len() - 1)
            }
        }
    }

    /// Returns a buffer. Panics while an operation on it is in flight: the caller's broken invariant.
    #[must_use]
    pub fn release(&mut self, hold: HoldIx) -> AlignedBuffer {
        let held = self.held[hold.0].take().expect("a held buffer is released once");
        assert!(held.in_flight == 0, "released with {} operations in flight", held.in_flight);
        held.memory
    }

    /// Queues an operation; the kernel gets it with the next [`Ring::submit`] or [`Ring::wait`]. `user` is
    /// returned in its [`CompletedOperation`]. With `may_wait` a worker thread of the kernel makes the call,
    /// and may block; without, the kernel first tries not to block. Panics if there is no room, or for a
    /// range outside the buffer: the caller's broken invariants.
    ///
    /// # Errors
    /// The errno of io_uring_enter(2), if the submission queue had to be emptied first.
    pub fn push(
        &mut self,
        slot: FileSlot,
        operation: Operation,
        user: u64,
        may_wait: bool,
    ) -> io::Result<()> {
        assert!(usize::from(slot.0) < self.files.len(), "a slot must come from add_file");
        assert!(self.has_room(), "push needs room");
        if self.ring.submission().is_full() {
            self.submit()?;
            if self.ring.submission().is_full() {
                return Err(io::Error::from_raw_os_error(libc::EBUSY));
            }
        }
        let (hold, stream) = match &operation {
            Operation::Read { hold, offset, .. } | Operation::Write { hold, offset, .. } => {
                (Some(*hold), offset.is_none())
            }
            Operation::PollIn | Operation::PollOut => (None, true),
            Operation::Fsync | Operation::Fallocate { .. } => (None, false),
        };
        let entry = self.entry(slot, operation);
        let index = self.free_operations.pop().expect("has_room was asserted above");
        self.operations[index] = Some(InFlight { user, hold, stream });
        self.in_flight += 1;
        if let Some(hold) = hold {
            self.held[hold.0].as_mut().expect("entry() has seen it held").in_flight += 1;
        }
        let flags = if may_wait { squeue::Flags::ASYNC } else { squeue::Flags::empty() };
        let entry = entry.user_data(user_data(index)).flags(flags);
        // SAFETY: the memory that the entry names lies inside a held buffer (`memory_of` checks the range),
        // stays at its address while held, and is held until the completion has been taken (`in_flight`
        // counts; `release` refuses; Drop drains or leaks). Nothing else borrows a read's memory meanwhile,
        // as the ring owns it and does not lend it. The file is open for the ring's life.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        pushed.expect("the queue was not full above, and nothing else fills it");
        Ok(())
    }

    /// Address, length and registration of `range` of a held buffer.
    fn memory_of(&mut self, hold: HoldIx, range: &Range<usize>) -> (*mut u8, u32, Option<u16>) {
        let held = self.held[hold.0].as_mut().expect("an operation names a held buffer");
        let registration = held.memory.registration();
        let part = &mut held.memory[range.clone()];
        let length = u32::try_from(part.len()).expect("a buffer is at most 1 GiB");
        let index = registration.filter(|it| it.ring == self.id).map(|it| it.index);
        (part.as_mut_ptr(), length, index)
    }

    fn entry(&mut self, slot: FileSlot, operation: Operation) -> squeue::Entry {
        let fixed = Fixed(u32::from(slot.0));
        let plain = Fd(self.files[usize::from(slot.0)].as_raw_fd());
        // The two kinds of file have different types, hence a macro.
        macro_rules! on_file {
            ($file:ident => $build:expr) => {
                if self.features.fixed_files {
                    let $file = fixed;
                    $build
                } else {
                    let $file = plain;
                    $build
                }
            };
        }
        let place = |offset: Option<Bytes>| offset.map_or(OFFSET_CURRENT, Bytes::get);
        match operation {
            Operation::Read { hold, range, offset } => {
                let at = place(offset);
                match self.memory_of(hold, &range) {
                    (address, length, Some(index)) => on_file!(file =>
                        opcode::ReadFixed::new(file, address, length, index).offset(at).build()),
                    (address, length, None) => {
                        on_file!(file => opcode::Read::new(file, address, length).offset(at).build())
                    }
                }
            }
            Operation::Write { hold, range, offset } => {
                let at = place(offset);
                match self.memory_of(hold, &range) {
                    (address, length, Some(index)) => on_file!(file =>
                        opcode::WriteFixed::new(file, address, length, index).offset(at).build()),
                    (address, length, None) => {
                        on_file!(file => opcode::Write::new(file, address, length).offset(at).build())
                    }
                }
            }
            Operation::Fsync => on_file!(file => opcode::Fsync::new(file).build()),
            Operation::Fallocate { mode, offset, length } => on_file!(file =>
                opcode::Fallocate::new(file, length.get()).offset(offset.get()).mode(mode).build()),
            Operation::PollIn => {
                on_file!(file => opcode::PollAdd::new(file, poll_mask(libc::POLLIN)).build())
            }
            Operation::PollOut => {
                on_file!(file => opcode::PollAdd::new(file, poll_mask(libc::POLLOUT)).build())
            }
        }
    }

    /// Submits what is queued, without waiting.
    ///
    /// # Errors
    /// The errno of io_uring_enter(2). EINTR and the like (EAGAIN, EBUSY: take completions first) are no
    /// error; what was not accepted stays queued.
    pub fn submit(&mut self) -> io::Result<()> {
        ignore_transient(self.ring.submit())
    }

    /// Submits what is queued and waits for a completion, at most `timeout`.
    ///
    /// # Errors
    /// As [`Ring::submit`]; a timeout is no error.
    pub fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        let result = match timeout {
            None => self.ring.submit_and_wait(1),
            Some(timeout) => {
                let timespec = Timespec::from(timeout);
                self.ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&timespec))
            }
        };
        ignore_transient(result)
    }

    /// The next completion, if there is one.
    pub fn take_completion(&mut self) -> Option<CompletedOperation> {
        loop {
            let entry = self.ring.completion().next()?;
            let index = usize::try_from(entry.user_data()).ok();
            let slot = index.and_then(|index| self.operations.get_mut(index));
            let Some(operation) = slot.and_then(Option::take) else {
                tracing::warn!(user_data = entry.user_data(), "io_uring: a completion without an operation");
                continue;
            };
            self.free_operations.extend(index);
            self.in_flight -= 1;
            if let Some(hold) = operation.hold {
                self.held[hold.0].as_mut().expect("held while in flight").in_flight -= 1;
            }
            let result = entry.result();
            let result = usize::try_from(result)
                .map_err(|_| io::Error::from_raw_os_error(result.checked_neg().unwrap_or(libc::EIO)));
            return Some(CompletedOperation { user: operation.user, result });
        }
    }

    /// Asks the kernel to cancel operations that may wait forever.
    fn cancel_streams(&self) {
        let streams = self.operations.iter().enumerate();
        for (index, _) in streams.filter(|(_, it)| it.is_some_and(|it| it.stream)) {
            let which = CancelBuilder::user_data(user_data(index));
            // ENOENT: it has just completed. An old kernel has no such call: the drain then times out.
            let _ = self.ring.submitter().register_sync_cancel(Some(Timespec::new()), which);
        }
    }

    /// Waits until nothing is in flight; false if the kernel still has something.
    fn drain(&mut self) -> bool {
        let end = Instant::now() + DRAIN_MAX;
        let mut failures = 0;
        let _ = self.submit();
        self.cancel_streams();
        loop {
            while self.take_completion().is_some() {}
            if self.in_flight == 0 {
                return true;
            }
            if self.wait(Some(Duration::from_millis(100))).is_err() {
                failures += 1;
            }
            if failures > DRAIN_FAILURES_MAX || Instant::now() > end {
                return false;
            }
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        if !self.drain() {
            tracing::warn!(
                in_flight = self.in_flight,
                "io_uring: operations do not complete; their memory is leaked rather than freed"
            );
            return;
        }
        // Closing a ring releases its files some time later. Unregistered files are released at once, so that
        // the caller may then open the device exclusively or remove it.
        if self.features.fixed_files
            && let Err(error) = self.ring.submitter().unregister_files()
        {
            tracing::debug!(%error, "io_uring: files are released late");
        }
        // SAFETY: each is dropped once, here, and not used after; the drain has seen the last completion, so
        // the kernel uses neither memory nor files any more.
        unsafe {
            ManuallyDrop::drop(&mut self.ring);
            ManuallyDrop::drop(&mut self.files);
            ManuallyDrop::drop(&mut self.held);
        }
    }
}

/// The flags of poll(2) as the kernel's mask; they are small and positive.
fn poll_mask(flags: libc::c_short) -> u32 {
    u32::from(flags.unsigned_abs())
}

/// An operation's index as the kernel's user data.
fn user_data(index: usize) -> u64 {
    u64::try_from(index).expect("Linux has at most 64 bits")
}

fn ignore_transient(result: io::Result<usize>) -> io::Result<()> {
    match result {
        Ok(_) => Ok(()),
        Err(error) => match error.raw_os_error() {
            Some(libc::EINTR | libc::EAGAIN | libc::EBUSY | libc::ETIME) => Ok(()),
            _ => Err(error),
        },
    }
}

/// The best set-up that the kernel accepts, and its level (see [`Features`]).
fn set_up(level_max: u8) -> io::Result<(IoUring, u8)> {
    let mut last = None;
    for level in (0..=level_max.min(LEVEL_MAX)).rev() {
        let mut builder = IoUring::builder();
        builder.dontfork();
        if level >= 1 {
            builder.setup_coop_taskrun().setup_submit_all();
        }
        if level >= 2 {
            builder.setup_single_issuer().setup_defer_taskrun();
        }
        match builder.build(u32::from(ENTRIES)) {
            Ok(ring) => return Ok((ring, level)),
            // EINVAL: a flag that this kernel does not know.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => last = Some(error),
            Err(error) => return Err(error),
        }
    }
    Err(last.unwrap_or_else(|| io::Error::from_raw_os_error(libc::EINVAL)))
}

/// Checks that the kernel has every operation that is used.
fn check_operations(ring: &IoUring) -> io::Result<()> {
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe)?;
    let needed = [
        ("READ", opcode::Read::CODE),
        ("WRITE", opcode::Write::CODE),
        ("READ_FIXED", opcode::ReadFixed::CODE),
        ("WRITE_FIXED", opcode::WriteFixed::CODE),
        ("FSYNC", opcode::Fsync::CODE),
        ("FALLOCATE", opcode::Fallocate::CODE),
        ("POLL_ADD", opcode::PollAdd::CODE),
    ];
    for (name, code) in needed {
        if !probe.is_supported(code) {
            tracing::warn!(operation = name, "io_uring: the kernel lacks an operation");
            return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        }
    }
    Ok(())
}
