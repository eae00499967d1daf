//! `tidemark copy`: observe the origin, plan, and carry the plan out.
//!
//! | module | question it answers |
//! |---|---|
//! | [`mod@plan`] | what would be done, to what (changes nothing; what `--dry-run` shows) |
//! | [`mod@run`] | does it: opens the secondary, makes the copy, reports |
//! | [`cold`] | the origin is at rest: held and watched while it is read |
//! | [`live`] | the origin is in use: store, stack, instant, and putting all of it back |
//! | [`latency`] | how the applications on the origin fare |
//! | [`originals`] | shows the COW store to the copier |
//! | [`placement`] | shows the job's log of segments to the copier |
//!
//! Invariants:
//! - whatever can be refused is refused before the kernel is asked to change anything;
//! - however a copy ends, the origin's own table is put back, or the error says that it was not and
//!   what does it (`tidemark recover`);
//! - the secondary's final name appears only after the snapshot was seen valid behind the last read.

mod cold;
mod latency;
mod live;
mod originals;
mod placement;
pub mod plan;
mod rescue;
pub mod run;

pub use live::Live;
pub use plan::{CopyPlan, plan};
pub use run::{CopyOutcome, run};
