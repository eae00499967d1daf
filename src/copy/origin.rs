//! The origin as the copier reads it: by direct I/O, except for the end of a file that direct I/O cannot
//! read.
//!
//! A block device's size is a multiple of its logical block, so every piece of it can be read directly. A
//! regular file (a cold copy: no process writes it) may end anywhere: the part after its last multiple of
//! [`DIRECT_IO_ALIGN`] is read once, through the page cache, when the origin is opened.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;

use super::schedule::Work;
use crate::base::limits::DIRECT_IO_ALIGN;
use crate::base::{Bytes, Result, ResultExt as _};
use crate::extent::Extent;
use crate::io::{Engine, FileIx, Piece, Place};
use crate::secondary::{PAYLOAD_OFFSET, zero_padding};

/// The open origin.
#[derive(Debug)]
pub struct Origin {
    pub(super) file: FileIx,
    /// Where direct I/O ends.
    direct_end: Bytes,
    /// Most bytes of one request to its disk; the pieces of a segment are then read one after the other.
    pub(super) piece_max: Option<Bytes>,
    /// The bytes from `direct_end` to the origin's end.
    tail: Vec<u8>,
}

impl Origin {
    pub(super) fn open(
        engine: &mut dyn Engine,
        fd: OwnedFd,
        description: &str,
        size: Bytes,
        piece_max: Option<Bytes>,
    ) -> Result<Self> {
        let file = File::from(fd);
        let regular = file.metadata().io_context(|| format!("stat of the origin {description}"))?.is_file();
        let direct_end = if regular { size.align_down(DIRECT_IO_ALIGN) } else { size };
        let mut tail = vec![0u8; (size - direct_end).as_len()];
        if !tail.is_empty() {
            // Through /proc, because the present handle was opened for direct I/O.
            OpenOptions::new()
                .read(true)
                .open(format!("/proc/self/fd/{}", file.as_raw_fd()))
                .and_then(|file| file.read_exact_at(&mut tail, direct_end.get()))
                .io_context(|| {
                    format!("read {} bytes at {} of {description}", tail.len(), direct_end.get())
                })?;
        }
        Ok(Self { file: engine.add_file(OwnedFd::from(file), description)?, direct_end, piece_max, tail })
    }

    /// What to read for `work`.
    pub(super) fn pieces(&self, work: &Work) -> Vec<Piece> {
        let base = work.extent.start();
        let direct = |extent: &Extent| Extent::new(extent.start(), extent.end().min(self.direct_end));
        work.valid
            .iter()
            .filter_map(direct)
            .flat_map(|extent| extent.split(self.piece_max.unwrap_or(extent.length())))
            .map(|extent| Piece {
                range: payload_position(base, extent.start())..payload_position(base, extent.end()),
                place: Place::At(extent.start()),
            })
            .collect()
    }

    /// Prepares a buffer for `work`: zeroes what will not be read, and puts the tail in its place.
    pub(super) fn prepare(&self, work: &Work, memory: &mut [u8]) {
        zero_gaps(work, memory);
        if let Some(last) = work.valid.last().filter(|last| last.end() > self.direct_end) {
            let from = last.start().max(self.direct_end);
            let part = &self.tail[(from - self.direct_end).as_len()..];
            let at = payload_position(work.extent.start(), from);
            memory[at..at + part.len()].copy_from_slice(part);
        }
    }
}

/// Where byte `offset` of the origin is in the buffer of a segment that begins at `base`.
pub(super) fn payload_position(base: Bytes, offset: Bytes) -> usize {
    PAYLOAD_OFFSET + (offset - base).as_len()
}

/// Zeroes the parts of the payload that are not in `work.valid`, and the padding after it.
pub(super) fn zero_gaps(work: &Work, memory: &mut [u8]) {
    let base = work.extent.start();
    let mut at = base;
    for extent in &work.valid {
        memory[payload_position(base, at)..payload_position(base, extent.start())].fill(0);
        at = extent.end();
    }
    memory[payload_position(base, at)..payload_position(base, work.extent.end())].fill(0);
    zero_padding(memory, payload_position(base, work.extent.end()));
}

/// The payload of `work` in a buffer.
pub(super) fn payload<'m>(work: &Work, memory: &'m [u8]) -> &'m [u8] {
    &memory[PAYLOAD_OFFSET..PAYLOAD_OFFSET + work.extent.length().as_len()]
}
