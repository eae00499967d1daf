//! What do the bytes of an archive mean? The codec of writer, reader and verifier; no I/O.
//!
//! Invariants:
//! - encoding goes into the caller's memory and allocates nothing;
//! - decoding looks at a field only when the checksum over it was right, bounds it before any
//!   arithmetic, and never panics, whatever the bytes;
//! - what [`superblock`], [`control`] and [`map`] write, they read back as the same values.
//!
//! Must not know where an archive lies, nor in which order a reader reads it.
//!
#![doc = include_str!("FORMAT.md")]

pub mod control;
pub mod error;
pub mod frame;
mod kind;
mod layout;
pub mod map;
#[cfg(test)]
pub(crate) mod sample;
pub mod superblock;
#[cfg(test)]
mod tests;

pub use super::bytes::BLOCK_BYTES;
pub use control::{Control, EXTENTS_MAX, FrameFacts};
pub use error::{ArchiveError, Block};
pub use frame::Frame;
pub use kind::{FrameKind, Side};
pub use layout::{BLOCK, Layout, PAYLOAD_OFFSET, VERSION, frame_bytes, frame_offset};
pub use map::{MapEntry, MapState};
pub use superblock::{OriginalsMode, Superblock, Totals};
