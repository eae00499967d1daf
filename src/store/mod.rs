//! The COW store: where originals go while an origin is copied.
//!
//! | module | question it answers |
//! |---|---|
//! | [`size`] | how large must a store be, now and at most (pure) |
//! | [`head`] | where does the RAM head come from (zram, else brd), and how is it given back |
//! | [`tail`] | where is the disk tail: a file through a loop device, or a block device |
//! | [`record`] | what must be given back after a crash, who is still using it, what the kernel does not know |
//! | [`cow`] | the store itself: made, grown, settled, given back or kept |
//! | [`adopt`] | can the store of a process that is gone be used on |
//! | [`monitor`] | is the snapshot still valid, and is there room ahead of it |
//! | [`exceptions`] | which originals does the store hold |
//! | [`follow`] | where is the origin being written now (a hint) |
//!
//! Invariants:
//! - the origin never waits for Tidemark: growth only ever makes the store larger, and where it
//!   fails the snapshot is lost, not a write of the application;
//! - space of the tail is allocated before the kernel is told of it, so that a full filesystem is a
//!   growth that failed and not a write error in the store;
//! - after a crash nothing is left that the kernel does not drop by itself (a file without a name
//!   behind an autoclear loop device) or that [`release_leftovers`] does not know.
//!
//! Knows nothing of volumes or mounts: `op` says where the tail must not be.

mod adopt;
pub mod cow;
pub mod exceptions;
pub mod follow;
mod head;
pub mod monitor;
mod record;
#[cfg(test)]
mod simulator;
pub mod size;
pub mod tail;

pub use cow::{CowStore, Grown, KeptStore, StoreConfig, StorePlan};
pub use exceptions::{ExceptionReader, StoreDevice, Writing};
pub use follow::Follower;
pub use monitor::{Fill, Monitor, StoreEvent};
pub use record::release_leftovers;
pub use tail::TailPlace;
