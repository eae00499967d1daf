//! Tidemark: exact copies of live Linux block devices with the stock kernel.
//!
//! # Layers
//!
//! Imports go strictly down; siblings do not import each other: what they share moves down.
//! `tests/tidy.rs` enforces this table.
//!
//! | layer | modules | purpose |
//! |---|---|---|
//! | L0 | [`base`] | units, checked arithmetic, checksums, limits, errors, clock |
//! | L0 | [`sys`] | the only `unsafe` code: buffers, ring, ioctls, probes (may use [`base`]) |
//! | L1 | [`format`](mod@format) | bytes <-> structs, pure |
//! | L1 | [`extent`] | extent sets and block lists, pure |
//! | L1 | [`progress`] | the events that a running operation reports to its observer |
//! | L2 | [`io`] | block reading and writing: traits and engines |
//! | L2 | [`dm`] | device-mapper: targets, tables, devices |
//! | L2 | [`record`] | files that other processes read, each locked by its owner and replaced as a whole |
//! | L2 | [`topology`] | block devices, their stacking, mounts and users; which of them wait for each other |
//! | L3 | [`store`] | the COW store: RAM head, tail, growth, exceptions, originals |
//! | L3 | [`volume`] | origins: resolve, mounts, freeze |
//! | L3 | [`secondary`] | the targets of a copy: raw device, raw file, archive, pipe |
//! | L3 | [`job`] | records of running jobs, and the files that they are in |
//! | L4 | [`copy`] | schedule, copier, overlay, verify |
//! | L4 | [`stack`] | layers over an origin: inserted and removed by steps with undo, guarded by a watchdog |
//! | L4 | [`restore`] | reads archives back, writes them to a target, compares them |
//! | L5 | [`op`] | the use cases: observe, plan, run |
//! | L6 | [`cli`] | arguments, output, exit codes |

// Public is what the command, the fuzz targets and the format's tests use. The rest is private, so that the compiler
// finds what nothing calls.
pub mod base;
mod cli;
mod copy;
mod dm;
mod extent;
pub mod format;
mod io;
mod job;
mod op;
mod progress;
mod record;
mod restore;
mod secondary;
mod stack;
mod store;
mod sys;
mod topology;
mod volume;

pub use cli::main;
pub use op::hidden;
pub use secondary::archive_read::FrameChecker;
