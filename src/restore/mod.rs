//! Archives read back: frames come from a file or a pipe, checked and in order, while what is done with them goes on.

pub mod compare;
pub mod input;
pub mod map;
pub mod writer;

pub use input::{ArchiveSource, FrameUser, Input};
