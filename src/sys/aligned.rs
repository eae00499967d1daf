//! Memory for direct I/O: page-aligned, zeroed, of fixed length.
//!
//! A buffer also carries its registration with a ring, which only [`ring`](super::ring) can set: a
//! new buffer at an old address is never taken for the one that was registered there.

use std::ops::{Deref, DerefMut};

use aligned_vec::{AVec, ConstAlign};

/// Alignment of every buffer, in bytes: enough for any logical block up to 4 KiB.
pub const BUFFER_ALIGN: usize = 4096;

/// Which registered buffer of which ring a piece of memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Registration {
    pub(super) ring: u64,
    pub(super) index: u16,
}

/// A zeroed, 4 KiB-aligned buffer whose address and length never change.
#[derive(Debug)]
pub struct AlignedBuffer {
    memory: AVec<u8, ConstAlign<BUFFER_ALIGN>>,
    registration: Option<Registration>,
}

impl AlignedBuffer {
    /// `length` zero bytes.
    #[must_use]
    pub fn zeroed(length: usize) -> Self {
        let mut memory = AVec::with_capacity(BUFFER_ALIGN, length);
        memory.resize(length, 0);
        Self { memory, registration: None }
    }

    pub(super) fn registration(&self) -> Option<Registration> {
        self.registration
    }

    pub(super) fn set_registration(&mut self, registration: Registration) {
        self.registration = Some(registration);
    }
}

impl Deref for AlignedBuffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.memory
    }
}

impl DerefMut for AlignedBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory
    }
}
