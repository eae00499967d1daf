//! The use cases, each in three steps: observe, plan, run. `--dry-run` shows the same plan that a run would execute.

pub mod admission;
pub mod archive_merge;
pub mod attach;
#[cfg(test)]
mod chain_tests;
pub mod copy;
pub mod detach;
pub mod doctor;
pub mod hidden;
pub mod inspect;
mod interruptible;
mod memory;
pub mod omission;
pub mod raw_secondary;
pub mod recover;
pub mod request;
pub mod restore;
pub mod restore_plan;
#[cfg(test)]
mod restore_tests;
pub mod resume;
pub mod snapshot;
pub mod status;
pub mod targets;
pub mod unit;
pub mod verify;
