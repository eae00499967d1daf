//! A safe io_uring: which memory may the kernel touch, and until when?
//!
//! Invariants:
//! - a buffer that an operation names is *held* by the ring ([`Ring::hold`]) from before its
//!   submission until after its completion was taken; [`Ring::release`] gives it back only then;
//! - files are owned by the ring for its whole life;
//! - never more operations under way than [`Ring::capacity`], so neither queue overflows;
//! - dropping cancels what may never end (streams), waits for the rest up to [`DRAIN_MAX`], and then
//!   leaks buffers, files and ring rather than freeing what the kernel may still write to;
//! - the ring stays on the thread that made it: the kernel may have been promised a single issuer.
//!
//! Must not decide what an answer means: results are the kernel's numbers.

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

/// Operations under way at most: deep enough for any disk, small enough for any memlock limit.
pub const ENTRIES: u16 = 256;

/// Files of one ring at most.
pub const FILES_MAX: usize = 64;

/// Longest that dropping a ring waits for the kernel.
pub const DRAIN_MAX: Duration = Duration::from_secs(60);

/// Failing calls in a row before dropping a ring stops waiting.
const DRAIN_FAILURES_MAX: u32 = 100;

/// The stream position: the kernel's offset for "where the file stands".
const OFFSET_CURRENT: u64 = u64::MAX;

/// A file of the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileSlot(u16);

/// A held buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HoldIx(usize);

/// One operation. Offsets are bytes; None is the stream's own position.
#[derive(Clone, Debug)]
#[allow(missing_docs)] // the variants say what their fields are
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

/// The kernel's answer to one operation.
#[derive(Debug)]
pub struct Answer {
    /// The caller's number.
    pub user: u64,
    /// Bytes transferred (0 for operations without), or the errno.
    pub result: io::Result<usize>,
}

/// What the kernel granted.
#[derive(Clone, Copy, Debug, Default)]
pub struct Features {
    /// The set-up flags that it took: 2 single issuer with deferred work, 1 cooperative, 0 none.
    level: u8,
    /// Buffers are registered.
    pub fixed_buffers: bool,
    /// Files are registered.
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

/// What to ask the kernel for, at most. The default is everything; less is for trying what an older
/// or stricter kernel grants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingOptions {
    /// See [`Features`]: 2, 1 or 0.
    pub level_max: u8,
    /// Register buffers and files.
    pub register: bool,
}

impl Default for RingOptions {
    fn default() -> Self {
        Self { level_max: LEVEL_MAX, register: true }
    }
}

/// The set-up with the most flags.
const LEVEL_MAX: u8 = 2;

#[derive(Debug)]
struct Held {
    memory: AlignedBuffer,
    under_way: u32,
}

#[derive(Clone, Copy, Debug)]
struct UnderWay {
    user: u64,
    hold: Option<HoldIx>,
    /// May wait for ever: to be cancelled before the ring is dropped.
    stream: bool,
}

/// See the module's head.
pub struct Ring {
    /// Dropped by hand, after the drain, or leaked.
    ring: ManuallyDrop<IoUring>,
    id: u64,
    features: Features,
    /// Dropped by hand, after the drain, or leaked.
    files: ManuallyDrop<Vec<OwnedFd>>,
    /// Dropped by hand, after the drain, or leaked.
    held: ManuallyDrop<Vec<Option<Held>>>,
    operations: Vec<Option<UnderWay>>,
    free_operations: Vec<usize>,
    under_way: usize,
    /// Not Send: see the last invariant.
    thread: PhantomData<*const ()>,
}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ring")
            .field("features", &self.features)
            .field("files", &self.files.len())
            .field("under_way", &self.under_way)
            .finish_non_exhaustive()
    }
}

/// Numbers the rings of the process, so that a registration names one of them.
static NEXT_RING: AtomicU64 = AtomicU64::new(0);

impl Ring {
    /// A ring with as much as this kernel grants, and all of `memory` registered where it can be.
    ///
    /// # Errors
    /// The errno of io_uring_setup(2): ENOSYS, EPERM (io_uring_disabled, seccomp), ENOMEM (memlock
    /// on old kernels); EOPNOTSUPP where an operation that we need is missing.
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
            under_way: 0,
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
        // SAFETY: each vector is a live allocation, exclusively borrowed now. The kernel pins the
        // pages, so it never follows these addresses after they are freed; it writes to the pages
        // only for an operation that names them, and `push` names only memory that the ring holds.
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

    /// What the kernel granted.
    #[must_use]
    pub fn features(&self) -> Features {
        self.features
    }

    /// Operations that may be under way at once.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.operations.len()
    }

    /// True where [`Ring::push`] takes another operation.
    #[must_use]
    pub fn has_room(&self) -> bool {
        !self.free_operations.is_empty()
    }

    /// Operations pushed whose answers have not been taken.
    #[must_use]
    pub fn under_way(&self) -> usize {
        self.under_way
    }

    /// Takes a file over.
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

    /// Takes a buffer over for operations to come.
    pub fn hold(&mut self, memory: AlignedBuffer) -> HoldIx {
        let held = Some(Held { memory, under_way: 0 });
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

    /// Gives a buffer back. Panics while an operation on it is under way: the caller's broken
    /// invariant.
    #[must_use]
    pub fn release(&mut self, hold: HoldIx) -> AlignedBuffer {
        let held = self.held[hold.0].take().expect("a held buffer is released once");
        assert!(held.under_way == 0, "released with {} operations under way", held.under_way);
        held.memory
    }

    /// Queues an operation; the kernel sees it with the next [`Ring::submit`] or [`Ring::wait`].
    /// `user` comes back in its [`Answer`]. With `may_wait` a worker thread of the kernel makes the call, and waits
    /// where need be; without, the kernel first tries not to. Panics without room and for a range outside the buffer:
    /// the caller's broken invariants.
    ///
    /// # Errors
    /// The errno of io_uring_enter(2), where the submission queue had to be emptied first.
    pub fn push(
        &mut self,
        slot: FileSlot,
        operation: Operation,
        user: u64,
        may_wait: bool,
    ) -> io::Result<()> {
        assert!(usize::from(slot.0) < self.files.len(), "a slot is one that add_file gave");
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
        self.operations[index] = Some(UnderWay { user, hold, stream });
        self.under_way += 1;
        if let Some(hold) = hold {
            self.held[hold.0].as_mut().expect("entry() has seen it held").under_way += 1;
        }
        let flags = if may_wait { squeue::Flags::ASYNC } else { squeue::Flags::empty() };
        let entry = entry.user_data(user_data(index)).flags(flags);
        // SAFETY: the memory that the entry names lies inside a held buffer (`memory_of` checks the
        // range), stays at its address while held, and is held until the answer was taken
        // (`under_way` counts; `release` refuses; Drop drains or leaks). A read's memory is borrowed
        // by nobody else meanwhile, because the ring owns it and lends it to nobody. The file is open
        // for the ring's life.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        pushed.expect("the queue was not full above, and nobody else fills it");
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

    /// Hands what is queued to the kernel, without waiting.
    ///
    /// # Errors
    /// The errno of io_uring_enter(2); EINTR and the like (EAGAIN, EBUSY: take answers first) are no
    /// error, what was not taken stays queued.
    pub fn submit(&mut self) -> io::Result<()> {
        tolerate(self.ring.submit())
    }

    /// Hands what is queued to the kernel and waits for an answer, at most `timeout`.
    ///
    /// # Errors
    /// As [`Ring::submit`]; running out of time is no error.
    pub fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        let answer = match timeout {
            None => self.ring.submit_and_wait(1),
            Some(timeout) => {
                let timespec = Timespec::from(timeout);
                self.ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&timespec))
            }
        };
        tolerate(answer)
    }

    /// The next answer, if there is one.
    pub fn take_answer(&mut self) -> Option<Answer> {
        loop {
            let entry = self.ring.completion().next()?;
            let index = usize::try_from(entry.user_data()).ok();
            let slot = index.and_then(|index| self.operations.get_mut(index));
            let Some(operation) = slot.and_then(Option::take) else {
                tracing::warn!(user_data = entry.user_data(), "io_uring: an answer to nothing asked");
                continue;
            };
            self.free_operations.extend(index);
            self.under_way -= 1;
            if let Some(hold) = operation.hold {
                self.held[hold.0].as_mut().expect("held while under way").under_way -= 1;
            }
            let result = entry.result();
            let result = usize::try_from(result)
                .map_err(|_| io::Error::from_raw_os_error(result.checked_neg().unwrap_or(libc::EIO)));
            return Some(Answer { user: operation.user, result });
        }
    }

    /// Asks the kernel to give up what may wait for ever.
    fn cancel_streams(&self) {
        let streams = self.operations.iter().enumerate();
        for (index, _) in streams.filter(|(_, it)| it.is_some_and(|it| it.stream)) {
            let which = CancelBuilder::user_data(user_data(index));
            // ENOENT: it has just ended. An old kernel has no such call: the drain then times out.
            let _ = self.ring.submitter().register_sync_cancel(Some(Timespec::new()), which);
        }
    }

    /// Waits until nothing is under way; false where the kernel still has something.
    fn drain(&mut self) -> bool {
        let end = Instant::now() + DRAIN_MAX;
        let mut failures = 0;
        let _ = self.submit();
        self.cancel_streams();
        loop {
            while self.take_answer().is_some() {}
            if self.under_way == 0 {
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
                under_way = self.under_way,
                "io_uring: the kernel does not finish; its memory is leaked rather than freed"
            );
            return;
        }
        // Closing a ring gives its files back some time later; asked for, they go at once, and the
        // caller may then open the device exclusively or remove it.
        if self.features.fixed_files
            && let Err(error) = self.ring.submitter().unregister_files()
        {
            tracing::debug!(%error, "io_uring: files are given back late");
        }
        // SAFETY: each is dropped once, here, and not used after; the drain has seen the last answer,
        // so the kernel uses neither memory nor files any more.
        unsafe {
            ManuallyDrop::drop(&mut self.ring);
            ManuallyDrop::drop(&mut self.files);
            ManuallyDrop::drop(&mut self.held);
        }
    }
}

/// poll(2)'s flags as the kernel's mask; they are small and positive.
fn poll_mask(flags: libc::c_short) -> u32 {
    u32::from(flags.unsigned_abs())
}

/// An operation's index as the kernel's user data.
fn user_data(index: usize) -> u64 {
    u64::try_from(index).expect("Linux has at most 64 bits")
}

fn tolerate(answer: io::Result<usize>) -> io::Result<()> {
    match answer {
        Ok(_) => Ok(()),
        Err(error) => match error.raw_os_error() {
            Some(libc::EINTR | libc::EAGAIN | libc::EBUSY | libc::ETIME) => Ok(()),
            _ => Err(error),
        },
    }
}

/// The best set-up that the kernel takes, and its level (see [`Features`]).
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

/// Asks whether the kernel has every operation that we use.
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
