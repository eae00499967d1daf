//! Snapshots that are kept: created, shown, mounted, deleted, and put together again.
//!
//! The record of a volume's snapshots ([`set`]) says what there should be. [`settle`] makes the devices agree with it,
//! whatever they are now. So a command changes the record first, durably, and then settles; after a crash, settling
//! again completes it. The one exception is the instant, which no record can bring about: [`create`] records the
//! snapshot as unfinished, takes the instant, and records it as kept; a crash in between ends it.

pub mod changes;
pub mod clone;
pub mod create;
pub mod delete;
mod exchange;
pub mod group;
mod holding;
mod layers;
pub mod link;
pub mod list;
mod merge;
pub mod monitor;
pub mod mount;
pub mod only;
mod placement;
pub mod rollback;
pub mod set;
pub mod settle;
pub mod take;
