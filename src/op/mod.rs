//! The use cases, each as observe, plan, run. `--dry-run` shows the very plan that would be run.

pub mod admission;
mod apart;
mod archive;
pub mod attach;
pub mod copy;
pub mod detach;
pub mod doctor;
pub mod hidden;
#[cfg(feature = "vm")]
mod hidden_store;
pub mod hooks;
pub mod inspect;
pub mod job;
pub mod journal;
mod leave;
mod memory;
pub mod privilege;
pub mod progress_file;
mod record_file;
pub mod recover;
pub mod request;
pub mod restore;
pub mod restore_plan;
pub mod resume;
pub mod stack;
pub mod status;
pub mod targets;
pub mod verify;
mod want_of_memory;
mod watchdog;
pub mod write_back;
