//! Reading archives back: delivers the frames of a file or a pipe, checked and in order, to a consumer that
//! restores or compares them.

pub mod compare;
pub mod input;
pub mod map;
pub mod writer;

pub use input::{ArchiveSource, FrameConsumer, Input};
