//! A job: one command in progress, with its record of intents and the lock that shows that it is running.
//!
//! `/run/tidemark/<id>.json` is its [`record`](crate::record) (see the state format), whose lock tells whether its
//! process lives: `recover` touches nothing of a job whose lock is held. `/run/tidemark/<id>.segments` is the
//! [`segment_log`] of a copy, and `/run/tidemark/<id>.progress` its progress; both are removed with the job.
//! `/run/tidemark/disks` is the [`disk_queue`] of all copies. `/run/tidemark/origins/M:m.lock` is locked by the job
//! that copies the live origin M:m.

pub mod disk_queue;
mod origin_lock;
mod paths;
pub mod published;
mod registry;
mod running;
pub mod segment_log;

pub use origin_lock::refuse_held_origin;
pub use paths::RUN_DIR;
pub use registry::{FoundJob, find_jobs, find_one, list_jobs, record_of};
pub use running::{Job, conclude, is_expedited, partials, with_advice};
