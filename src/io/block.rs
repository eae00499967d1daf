//! The seam for metadata I/O: positioned reads and writes of whole buffers, and durability.
//!
//! Small on purpose: a crash simulator or a fault injector is a page of code. Implementations
//! resume short transfers; zero progress is an error.

use crate::base::{Bytes, Result};

/// Something that can be read at any offset.
pub trait BlockRead {
    /// Size in bytes now.
    fn size(&self) -> Bytes;
    /// Fills `buffer` from `offset`.
    ///
    /// # Errors
    /// I/O errors with errno; reading past the end is [`ErrorKind::Io`](crate::base::ErrorKind::Io).
    fn read_at(&self, buffer: &mut [u8], offset: Bytes) -> Result<()>;
}

/// Something that can be written at any offset.
pub trait BlockWrite {
    /// Writes all of `data` at `offset`; not durable before [`Durable::sync`].
    ///
    /// # Errors
    /// I/O errors with errno.
    fn write_at(&self, data: &[u8], offset: Bytes) -> Result<()>;
}

/// Something whose writes can be made durable.
pub trait Durable {
    /// Returns once everything written before is on stable storage.
    ///
    /// # Errors
    /// After one failure every later call fails too: what was lost cannot be told.
    fn sync(&self) -> Result<()>;
}
