//! The buffers of an engine, and the checks of a request that all engines share.

use super::engine::{Buffer, EngineConfig, Piece};
use crate::base::limits::DIRECT_IO_ALIGN;
use crate::base::{Error, Result};
use crate::sys::aligned::AlignedBuffer;

/// Memory of one engine's pool at most: a bound on what a configuration can ask for.
const POOL_BYTES_MAX: u64 = 1 << 30;

/// Buffers that are free.
#[derive(Debug)]
pub(super) struct Pool(Vec<Buffer>);

impl Pool {
    /// The memory for `config`, by index.
    pub(super) fn memory(config: EngineConfig) -> Result<Vec<AlignedBuffer>> {
        let bytes = config.buffer_bytes.get();
        let total = bytes.checked_mul(u64::from(config.buffer_count));
        if bytes == 0
            || !config.buffer_bytes.is_aligned(DIRECT_IO_ALIGN)
            || total.is_none_or(|total| total > POOL_BYTES_MAX)
        {
            return Err(Error::usage(format!(
                "{} buffers of {bytes} bytes: not a multiple of {DIRECT_IO_ALIGN}, or too much memory",
                config.buffer_count
            )));
        }
        let length = config.buffer_bytes.as_len();
        Ok(AlignedBuffer::pool(usize::from(config.buffer_count), length))
    }

    /// All of `memory` free, numbered in order.
    pub(super) fn new(memory: Vec<AlignedBuffer>) -> Self {
        // Reversed: the pool is a stack, and the first ones out should be the first ones in.
        let mut buffers: Vec<Buffer> =
            (0u16..).zip(memory).map(|(index, memory)| Buffer::new(memory, index)).collect();
        buffers.reverse();
        Self(buffers)
    }

    pub(super) fn take(&mut self) -> Option<Buffer> {
        self.0.pop()
    }

    pub(super) fn give(&mut self, buffer: Buffer) {
        self.0.push(buffer);
    }
}

/// Every piece must lie in its buffer: anything else is the caller's broken invariant.
pub(super) fn check_pieces(buffer: &Buffer, pieces: &[Piece]) {
    for piece in pieces {
        assert!(
            piece.range.start <= piece.range.end && piece.range.end <= buffer.len(),
            "piece {:?} lies outside its buffer of {} bytes",
            piece.range,
            buffer.len()
        );
    }
}
