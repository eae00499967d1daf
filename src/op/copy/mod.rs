//! `tidemark copy`: examines the origin, makes a plan, and executes it.
//!
//! | module | purpose |
//! |---|---|
//! | [`mod@plan`] | what would be done to which devices (changes nothing; shown by `--dry-run`) |
//! | [`mod@run`] | executes the plan, up to the report |
//! | [`session`] | owns everything of a copy in progress, and ends it |
//! | [`report`] | the result of a copy |
//! | [`group`] | several origins, copied from one instant |
//! | [`group_plan`] | what that would do, and what is refused |
//! | [`turns`] | which origins are read at the same time |
//! | [`since`] | what has changed since a kept snapshot, and is copied |
//! | [`raw_parent`] | the raw secondary that is updated, by its record |
//! | [`update`] | the update of a raw secondary in place, and the record of what it holds |
//! | [`workers`] | the threads that run in parallel with the copier |
//! | [`rescue`] | restores the origin if the copier cannot |
//! | [`cold`] | a cold origin: kept open exclusively and checked while it is read |
//! | [`live`] | a live origin: store, stack, instant, and their removal |
//! | [`latency`] | the latency of applications on the origin |
//! | [`originals`] | gives the copier access to the COW store |
//! | [`placement`] | records what is needed to resume the copy |
//!
//! Invariants:
//! - whatever can be refused is refused before any change in the kernel;
//! - however a copy ends, the origin's own table is restored, or the error says that it was not, and which command
//!   restores it (`tidemark recover`);
//! - the secondary gets its final name only if the snapshot was valid after the last read.

mod cold;
pub mod group;
pub mod group_plan;
mod latency;
mod live;
mod originals;
mod placement;
pub mod plan;
pub mod raw_parent;
pub mod report;
mod rescue;
pub mod run;
pub mod session;
pub mod since;
pub(in crate::op) mod turns;
mod update;
mod workers;

pub use live::Live;
pub use plan::{CopyPlan, plan};
pub use report::CopyOutcome;
pub use run::run;
