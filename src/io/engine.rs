//! The engine trait: many transfers in flight, each owning its buffer until it is complete.
//!
//! Invariants of every engine, checked by the shared suite:
//! - a [`Request`] moves its [`Buffer`] in; the [`Completion`] with the same token moves it out,
//!   exactly once, whether it succeeded or not;
//! - a transfer completes only when all of its pieces are done, or when one has failed and no piece is left
//!   in the kernel; short transfers are resumed inside the engine;
//! - requests may complete in any order; [`Place::Stream`] transfers of one file must be submitted
//!   one at a time by the caller;
//! - dropping an engine first waits for what is in flight; if it cannot, it leaks the memory and never frees
//!   it.

use std::ops::{Deref, DerefMut, Range};
use std::os::fd::OwnedFd;

use crate::base::{Bytes, Result};
use crate::extent::Extent;
use crate::sys::aligned::AlignedBuffer;

/// A file's number in the engine that issued it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileIx(pub u16);

/// A buffer of the engine's pool: aligned for direct I/O, and registered with the kernel if the engine supports
/// that.
#[derive(Debug)]
pub struct Buffer {
    memory: AlignedBuffer,
    index: u16,
}

impl Buffer {
    /// For engines: `index` is the buffer's registration with the kernel.
    #[must_use]
    pub fn new(memory: AlignedBuffer, index: u16) -> Self {
        Self { memory, index }
    }
    /// The memory and the index, for engines.
    #[must_use]
    pub fn into_parts(self) -> (AlignedBuffer, u16) {
        (self.memory, self.index)
    }
    /// The registration index.
    #[must_use]
    #[cfg(test)]
    pub fn index(&self) -> u16 {
        self.index
    }
}

impl Deref for Buffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.memory
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory
    }
}

/// Where a piece is in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// At a byte offset.
    At(Bytes),
    /// At the stream's own position: pipes.
    Stream,
}

/// A part of a buffer, and the place in the file that it is read from or written to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The bytes of the buffer.
    pub range: Range<usize>,
    /// Where they are in the file.
    pub place: Place,
}

/// Work for an engine. The caller chooses `token`; the completion returns it.
#[derive(Debug)]
#[allow(missing_docs)] // the variants explain their fields
pub enum Request {
    /// Fill the pieces of `buffer` from `file`. End of file before the end of a piece is an error. `in_turn`:
    /// read one piece after the other, so that the file's device has one of them to serve at a time;
    /// otherwise the engine reads all of them at once if it can.
    Read { token: u64, file: FileIx, buffer: Buffer, pieces: Vec<Piece>, in_turn: bool },
    /// Write the pieces of `buffer` to `file`.
    Write { token: u64, file: FileIx, buffer: Buffer, pieces: Vec<Piece> },
    /// Make `extent` of `file` read as zeros: a hole in a regular file; on a block device a discard if the
    /// device guarantees zeros after it, else BLKZEROOUT semantics (ordinary writes of zeros if neither is
    /// supported). The file's size stays, and the part of `extent` past its end is ignored. Not for streams.
    Zero { token: u64, file: FileIx, extent: Extent },
    /// Make all completed writes to `file` durable (fsync).
    Sync { token: u64, file: FileIx },
}

/// The end of one request.
#[derive(Debug)]
pub struct Completion {
    /// The request's token.
    pub token: u64,
    /// The request's buffer, for reads and writes.
    pub buffer: Option<Buffer>,
    /// The first failure of its pieces, with file description, offset and errno.
    pub result: Result<()>,
}

/// Sizes of an engine.
#[derive(Clone, Copy, Debug)]
pub struct EngineConfig {
    /// Buffers in the pool.
    pub buffer_count: u16,
    /// Length of each, a multiple of 4 KiB.
    pub buffer_bytes: Bytes,
}

/// Keeps many transfers in flight; each owns its buffer until it completes.
pub trait Engine {
    /// "io_uring", "sync", "memory": for logs and reports.
    fn name(&self) -> &'static str;
    /// Registers a file; `description` names it in errors ("/dev/vdb"). Alignment is the caller's
    /// responsibility: every piece for a file that was opened with O_DIRECT must fit its logical block.
    fn add_file(&mut self, file: OwnedFd, description: &str) -> Result<FileIx>;
    /// A free buffer, or None when all are in use.
    fn take_buffer(&mut self) -> Option<Buffer>;
    /// Gives a buffer back to the pool.
    fn give_buffer(&mut self, buffer: Buffer);
    /// Queues a request; may submit it to the kernel at once or on the next [`Engine::wait_timeout`].
    ///
    /// # Errors
    /// Only when the engine itself is broken; the completion reports the failure of the request.
    fn submit(&mut self, request: Request) -> Result<()>;
    /// Waits for the next completion, but no longer than `timeout`. `Ok(None)` with requests in flight means that
    /// the time ran out.
    ///
    /// # Errors
    /// Only when the engine itself is broken.
    fn wait_timeout(&mut self, timeout: std::time::Duration) -> Result<Option<Completion>>;
    /// True if [`Request::Zero`] has so far returned the space of `file` to its device or filesystem, as
    /// far as that is possible. For reports.
    fn gives_back(&self, file: FileIx) -> bool {
        let _ = file;
        false
    }
    /// Requests submitted and not yet completed.
    fn in_flight(&self) -> usize;
}
