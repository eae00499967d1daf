//! The COW store, which receives the originals while an origin is copied.
//!
//! | module | purpose |
//! |---|---|
//! | [`size`] | computes how large a store must be, now and at most (pure) |
//! | [`head`] | creates and releases the RAM head (zram, else brd) |
//! | [`place`] | chooses the place of the tail, and determines how much space there is |
//! | [`plan`] | plans the size of a store and its parts |
//! | [`tail`] | the disk tail: a file through a loop device, or a block device |
//! | [`record`] | records which process uses a store, and what the kernel does not know about it |
//! | [`leftovers`] | finds and releases what a dead process has left |
//! | [`cow`] | the store itself: created, grown, settled, released or kept |
//! | [`adopt`] | takes over the store of a dead process |
//! | [`monitor`] | monitors whether the snapshot is valid, and whether there is enough free space |
//! | [`exceptions`] | finds the originals in the store |
//! | [`follow`] | finds where the origin is being written now (a hint) |
//! | [`persistent`] | the stores of snapshots that are kept |
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
pub mod persistent;
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
pub use persistent::{Overlap, PersistentStore};
pub use place::TailPlace;
pub use plan::{StoreConfig, StorePlan};
