//! Memory for direct I/O: page-aligned, zeroed, of fixed length.
//!
//! A buffer also carries its registration with a ring, which only [`ring`](super::ring) can set: a new buffer
//! at an old address is never taken for the one that was registered there.
//!
//! The buffers of a pool are adjacent in one mapping that requests huge pages. Contiguous memory goes to the
//! disk in requests as large as the disk accepts. A transfer of 1 MiB in scattered 4 KiB pages exceeds its
//! limit of segments (virtio: 254), and is split into two requests.

use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;

use aligned_vec::{AVec, ConstAlign};

/// Alignment of every buffer, in bytes: enough for any logical block up to 4 KiB.
pub const BUFFER_ALIGN: usize = 4096;

/// The registered buffer of a ring that a piece of memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Registration {
    pub(super) ring: u64,
    pub(super) index: u16,
}

/// Size and alignment of a huge page, on architectures that have this size; elsewhere only a generous
/// alignment.
const HUGE_PAGE: usize = 2 << 20;

/// An anonymous mapping, unmapped with its last buffer.
#[derive(Debug)]
struct Region {
    start: NonNull<libc::c_void>,
    length: usize,
}

// SAFETY: a region is an address and a length; its memory is reached only through buffers, each of
// which alone owns its part (see `AlignedBuffer::pool`).
unsafe impl Send for Region {}
// SAFETY: as above; a shared region gives no access to its memory.
unsafe impl Sync for Region {}

impl Region {
    /// `length` zero bytes, on huge pages if the kernel has some; None if the kernel refuses.
    fn map(length: usize) -> Option<Self> {
        // SAFETY: an anonymous private mapping at an address of the kernel's choice touches no memory
        // that exists.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return None;
        }
        let region = Self { start: NonNull::new(start)?, length };
        // Only a hint: without huge pages everything works, and requests are smaller.
        // SAFETY: the range is the mapping just made.
        let _ = unsafe { libc::madvise(region.start.as_ptr(), length, libc::MADV_HUGEPAGE) };
        // A fork would copy pinned pages while writers wait for a hook, and no child needs them.
        // SAFETY: as above.
        let _ = unsafe { libc::madvise(region.start.as_ptr(), length, libc::MADV_DONTFORK) };
        Some(region)
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and the last buffer that pointed into it is gone. An error would mean
        // that the range is not ours, which would be a broken invariant.
        let result = unsafe { libc::munmap(self.start.as_ptr(), self.length) };
        debug_assert_eq!(result, 0);
    }
}

#[derive(Debug)]
enum Memory {
    Own(AVec<u8, ConstAlign<BUFFER_ALIGN>>),
    /// `length` bytes from `start`, a part of `region` that no other buffer has.
    Part {
        start: NonNull<u8>,
        length: usize,
        /// Keeps the mapping alive.
        _region: Arc<Region>,
    },
}

// SAFETY: a part is owned by its buffer alone, like the vector's memory, and the region that it keeps is Send
// and Sync.
unsafe impl Send for Memory {}
// SAFETY: as above: a shared buffer gives shared access to its own part only.
unsafe impl Sync for Memory {}

/// A zeroed, 4 KiB-aligned buffer whose address and length never change.
#[derive(Debug)]
pub struct AlignedBuffer {
    memory: Memory,
    registration: Option<Registration>,
}

impl AlignedBuffer {
    /// `length` zero bytes.
    #[must_use]
    pub fn zeroed(length: usize) -> Self {
        let mut memory = AVec::with_capacity(BUFFER_ALIGN, length);
        memory.resize(length, 0);
        Self { memory: Memory::Own(memory), registration: None }
    }

    /// `count` buffers of `length` zero bytes each, adjacent in memory for large requests.
    ///
    /// # Panics
    /// If `length` is not a positive multiple of [`BUFFER_ALIGN`], or if all of them do not fit the address
    /// space: the caller bounds both.
    #[must_use]
    pub fn pool(count: usize, length: usize) -> Vec<Self> {
        assert!(length > 0 && length.is_multiple_of(BUFFER_ALIGN), "buffers of {length} bytes");
        let total = count.checked_mul(length).and_then(|total| total.checked_add(HUGE_PAGE));
        let total = total.expect("a pool fits the address space");
        let Some(region) = Region::map(total).map(Arc::new) else {
            return (0..count).map(|_| Self::zeroed(length)).collect();
        };
        // Skips to the first huge page: at most HUGE_PAGE - 1 bytes, which are included in `total`. The
        // mapping itself begins on a page, so every buffer does.
        let lead = region.start.as_ptr().addr().next_multiple_of(HUGE_PAGE) - region.start.as_ptr().addr();
        (0..count)
            .map(|index| {
                // SAFETY: lead + (index + 1) * length <= total, so the part lies within the mapping;
                // parts of different indexes do not overlap.
                let start = unsafe { region.start.cast::<u8>().add(lead + index * length) };
                let memory = Memory::Part { start, length, _region: Arc::clone(&region) };
                Self { memory, registration: None }
            })
            .collect()
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
        match &self.memory {
            Memory::Own(memory) => memory,
            // SAFETY: the part is mapped as long as `_region` lives, zeroed by the kernel and so
            // initialized, and owned by this buffer alone, of which `self` is a shared borrow.
            Memory::Part { start, length, .. } => unsafe {
                std::slice::from_raw_parts(start.as_ptr(), *length)
            },
        }
    }
}

impl DerefMut for AlignedBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        match &mut self.memory {
            Memory::Own(memory) => memory,
            // SAFETY: as in `deref`, with a unique borrow.
            Memory::Part { start, length, .. } => unsafe {
                std::slice::from_raw_parts_mut(start.as_ptr(), *length)
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pools_buffers_are_zero_aligned_and_apart() {
        let mut buffers = AlignedBuffer::pool(5, 3 * BUFFER_ALIGN);
        for (index, buffer) in (1u8..).zip(&mut buffers) {
            assert_eq!(buffer.as_ptr().addr() % BUFFER_ALIGN, 0);
            assert!(buffer.iter().all(|byte| *byte == 0));
            buffer.fill(index);
        }
        // A buffer that outlives the others keeps the mapping alive.
        let last = buffers.pop().unwrap();
        for (index, buffer) in (1u8..).zip(&buffers) {
            assert!(buffer.len() == 3 * BUFFER_ALIGN && buffer.iter().all(|byte| *byte == index));
        }
        drop(buffers);
        assert!(std::thread::spawn(move || last.iter().all(|byte| *byte == 5)).join().unwrap());
    }
}
