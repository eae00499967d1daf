//! The buffers of an engine, and the checks of a request that all engines share.

use super::engine::{Buffer, EngineConfig, Piece};
use crate::base::limits::DIRECT_IO_ALIGN;
use crate::base::{Error, Result};
use crate::sys::aligned::AlignedBuffer;

/// Most memory in one engine's pool: limits what a configuration can request.
const POOL_BYTES_MAX: u64 = 1 << 30;

/// The free buffers.
#[derive(Debug)]
pub(super) struct Pool(Vec<Buffer>);

impl Pool {
    /// Allocates the memory for `config`, by index.
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
        // Reversed, because the pool is a stack: buffer 0 is taken first.
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

/// Panics unless every piece is within its buffer: the caller has broken an invariant.
pub(super) fn check_pieces(buffer: &Buffer, pieces: &[Piece]) {
    for piece in pieces {
        assert!(
            piece.range.start <= piece.range.end && piece.range.end <= buffer.len(),
            "piece {:?} is outside its buffer of {} bytes",
            piece.range,
            buffer.len()
        );
    }
}
