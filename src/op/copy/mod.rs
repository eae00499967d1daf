//! `tidemark copy`: observe the origin, plan, and carry the plan out.
//!
//! | module | question it answers |
//! |---|---|
//! | [`mod@plan`] | what would be done, to what (changes nothing; what `--dry-run` shows) |
//! | [`mod@run`] | does it, from the plan to the report |
//! | [`session`] | what a copy in progress owns, and its one way out |
//! | [`report`] | what it did |
//! | [`workers`] | what works beside the copier |
//! | [`rescue`] | puts the origin back where the copier cannot |
//! | [`cold`] | the origin is at rest: held and watched while it is read |
//! | [`live`] | the origin is in use: store, stack, instant, and putting all of it back |
//! | [`latency`] | how the applications on the origin fare |
//! | [`originals`] | shows the COW store to the copier |
//! | [`placement`] | records what is needed to resume the copy |
//!
//! Invariants:
//! - whatever can be refused is refused before the kernel is asked to change anything;
//! - however a copy ends, the origin's own table is put back, or the error says that it was not and
//!   what does it (`tidemark recover`);
//! - the secondary's final name appears only after the snapshot was seen valid after the last read.

mod cold;
mod latency;
mod live;
mod originals;
mod placement;
pub mod plan;
pub mod report;
mod rescue;
pub mod run;
pub mod session;
mod workers;

pub use live::Live;
pub use plan::{CopyPlan, plan};
pub use report::CopyOutcome;
pub use run::run;
