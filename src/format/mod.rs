//! Conversion between bytes and structs for every on-disk format; pure (no I/O, no clock). Each format is a
//! folder with its FORMAT.md.

pub mod archive;
mod bytes;
pub mod exception_store;
pub mod filesystem_id;
pub mod filesystem_log;
pub mod filesystem_mount;
pub mod mirror_log;
pub mod raw_copy;
mod secondary;
pub mod segment_log;
pub mod state;

pub use secondary::SecondaryForm;
