//! Records: what a command writes for other processes and for the time after its death.
//!
//! A record `ID` of a directory is three files, all of which are removed with it:
//! - `ID.lock` is locked (flock) from the record's creation until its owner dies or removes it. The lock alone
//!   tells whether the owner lives;
//! - `ID.json` is the record, replaced as a whole (see [`file`](mod@file));
//! - `ID.new` is its spare file.
//!
//! Crash argument: the lock is created under a hidden name and locked before it gets its own, so a record that
//! can be found has an owner, or had one. It is removed last, so a record is found as long as one of its files
//! exists.

mod file;
mod lock;

pub use file::{read, replace, sync_directory, write};
pub use lock::{FoundRecord, LockedRecord, find, ids, path_of, remove};
