//! The codec of the archive format, for writer, reader and verifier; no I/O.
//!
//! Invariants:
//! - encoding writes to the caller's memory and allocates nothing;
//! - decoding uses a field only after the checksum that covers it was found right, bounds it before any
//!   arithmetic, and never panics, whatever the bytes are;
//! - [`superblock`], [`control`] and [`map`] decode what they encode to the same values.
//!
//! This module does not know where an archive is stored, nor in which order it is read.
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
pub use layout::{BLOCK, Layout, PAYLOAD_OFFSET, Version, frame_bytes, frame_offset};
pub use map::{MapEntry, MapState};
pub use superblock::{OriginalsMode, Superblock, Totals};
