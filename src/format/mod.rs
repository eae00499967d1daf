//! Bytes <-> structs: every on-disk format, pure (no I/O, no clock), one folder each with its
//! FORMAT.md.

pub mod archive;
pub mod exception_store;
pub mod state;
