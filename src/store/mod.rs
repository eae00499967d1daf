//! The COW store: where originals go while an origin is copied.
//!
//! | module | question it answers |
//! |---|---|
//! | [`size`] | how large must a store be, now and at most (pure) |
//! | [`head`] | where does the RAM head come from (zram, else brd), and how is it given back |
//! | [`place`] | where is the tail to be, and how much room is there |
//! | [`plan`] | how large is it to be, and of what is it made |
//! | [`tail`] | the disk tail: a file through a loop device, or a block device |
//! | [`record`] | who is using a store, and what of it the kernel does not know |
//! | [`leftovers`] | what has a dead process left, and is it ours to give back |
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
mod leftovers;
pub mod monitor;
mod place;
mod plan;
mod record;
#[cfg(test)]
mod simulator;
pub mod size;
pub mod tail;

pub use cow::{CowStore, Grown, KeptStore};
pub use exceptions::{ExceptionReader, StoreDevice, Writing};
pub use follow::Follower;
pub use leftovers::release_leftovers;
pub use monitor::{Fill, Monitor, StoreEvent};
pub use place::TailPlace;
pub use plan::{StoreConfig, StorePlan};
