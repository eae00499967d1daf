//! A job: one command in progress, with its record of intents and the lock that shows that it is running.
//!
//! `/run/tidemark/<id>.lock` is locked (flock) from the start of the job until its process ends, however it
//! ends: `recover` touches nothing of a job whose lock is held. `/run/tidemark/<id>.json` is the record (see
//! the state format). `/run/tidemark/<id>.segments` is the [`segment_log`] of
//! a copy, and `/run/tidemark/<id>.progress` its progress; both are removed with the job.
//! `/run/tidemark/origins/M:m.lock` is locked by the job that copies the live origin M:m. How a record is
//! replaced is described in [`file`](mod@file).

pub mod file;
mod origin_lock;
mod paths;
pub mod published;
mod registry;
mod running;
pub mod segment_log;

pub use origin_lock::refuse_held_origin;
pub use paths::RUN_DIR;
pub use registry::{FoundJob, find_jobs, find_one, list_jobs, read_record, record_of};
pub use running::{Job, conclude, is_expedited, partials};
