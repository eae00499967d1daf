//! Metadata I/O: positioned reads of whole buffers.
//!
//! The trait is small so that a simulator fits on a page. Implementations resume short transfers; zero
//! progress is an error.

use crate::base::{Bytes, Result};

/// A device or file that can be read at any offset.
pub trait BlockRead {
    /// Size in bytes now.
    fn size(&self) -> Bytes;
    /// Fills `buffer` from `offset`.
    ///
    /// # Errors
    /// I/O errors with errno; reading past the end is [`ErrorKind::Io`](crate::base::ErrorKind::Io).
    fn read_at(&self, buffer: &mut [u8], offset: Bytes) -> Result<()>;
}

#[cfg(test)]
impl BlockRead for Vec<u8> {
    fn size(&self) -> Bytes {
        Bytes::from_len(self.len())
    }

    fn read_at(&self, buffer: &mut [u8], offset: Bytes) -> Result<()> {
        let at = offset.as_len();
        buffer.copy_from_slice(&self[at..at + buffer.len()]);
        Ok(())
    }
}
