//! Reading archives back: delivers the frames of a file or a pipe, checked and in order, to a consumer that
//! restores or compares them.

pub mod chain;
pub mod compare;
pub mod input;
pub mod map;
pub mod merge;
pub mod writer;

pub use input::{ArchiveSource, FrameConsumer, Input};
