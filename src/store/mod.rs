//! The COW store: where originals go while an origin is copied.
//!
//! | module | question it answers |
//! |---|---|
//! | [`size`] | how large must a store be, now and at most (pure) |
//! | [`head`] | where does the RAM head come from (zram, else brd), and how is it released |
//! | [`place`] | where will the tail be, and how much space is there |
//! | [`plan`] | how large will the store be, and which parts will it have |
//! | [`tail`] | the disk tail: a file through a loop device, or a block device |
//! | [`record`] | which process uses a store, and what does the kernel not know about it |
//! | [`leftovers`] | what has a dead process left, and may it be released |
//! | [`cow`] | the store itself: created, grown, settled, released or kept |
//! | [`adopt`] | how does a process take over the store of a dead one |
//! | [`monitor`] | is the snapshot still valid, and is there enough free space |
//! | [`exceptions`] | which originals does the store hold |
//! | [`follow`] | where is the origin being written now (a hint) |
//!
//! Invariants:
//! - the origin never waits for Tidemark: a growth only makes the store larger, and if it fails, the snapshot
//!   is lost, not a write of the application;
//! - space of the tail is allocated before it is mapped, so that a full filesystem makes a growth fail, and
//!   never a write to the store;
//! - after a crash nothing is left except what the kernel drops by itself (an unnamed file on an autoclear
//!   loop device) and what [`release_leftovers`] finds.
//!
//! Knows nothing of volumes or mounts: `op` decides where the tail must not be.

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

pub use cow::{CowStore, KeptStore};
pub use exceptions::{ExceptionReader, StoreDevice};
pub use follow::Follower;
pub use leftovers::release_leftovers;
pub use monitor::{Monitor, StoreEvent};
pub use place::TailPlace;
pub use plan::{StoreConfig, StorePlan};
