//! A job: one command in progress, its log of intents, and the lock that says it lives.
//!
//! `/run/tidemark/<id>.lock` is locked (flock) from the job's beginning to the process's end, however
//! it ends: `recover` touches nothing of a job whose lock is held. `/run/tidemark/<id>.json` is the
//! record (see the state format); `/run/tidemark/<id>.segments` is the [`journal`](crate::job::segment_log) of a
//! copy's segments and `/run/tidemark/<id>.progress` shows how far it is; both end with the job.
//! `/run/tidemark/origins/M:m.lock` is locked by the job that copies the live origin M:m. How a record is replaced is
//! told in [`record_file`](crate::job::file).

pub mod file;
mod origin_lock;
mod paths;
pub mod published;
mod registry;
mod running;
pub mod segment_log;

pub use origin_lock::refuse_held_origin;
pub use paths::RUN_DIR;
pub use registry::{FoundJob, find_jobs, find_one, look_at_jobs, read_record, record_of};
pub use running::{Job, conclude, is_expedited, partials};
