//! Copying: the schedule, the copier, overlay and append of originals, verification, progress.
//!
//! Sees extents, `io` traits and secondaries; never device-mapper: `op` wires them.

pub mod progress;
