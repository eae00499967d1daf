//! The use cases, each as observe, plan, run. `--dry-run` shows the very plan that would be run.

pub mod copy;
pub mod hidden;
pub mod hooks;
pub mod job;
pub mod privilege;
pub mod request;
pub mod stack;
pub mod watchdog;
