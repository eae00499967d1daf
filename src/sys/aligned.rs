//! Memory for direct I/O: page-aligned, zeroed, of fixed length.

use std::ops::{Deref, DerefMut};

use aligned_vec::{AVec, ConstAlign};

/// Alignment of every buffer, in bytes: enough for any logical block up to 4 KiB.
pub const BUFFER_ALIGN: usize = 4096;

/// A zeroed, 4 KiB-aligned buffer whose address and length never change.
#[derive(Debug)]
pub struct AlignedBuffer(AVec<u8, ConstAlign<BUFFER_ALIGN>>);

impl AlignedBuffer {
    /// `length` zero bytes.
    #[must_use]
    pub fn zeroed(length: usize) -> Self {
        let mut memory = AVec::with_capacity(BUFFER_ALIGN, length);
        memory.resize(length, 0);
        Self(memory)
    }
}

impl Deref for AlignedBuffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl DerefMut for AlignedBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}
