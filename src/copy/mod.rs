//! Copying: the schedule, the copier, applying and appending originals, verification.
//!
//! Uses extents, `io` traits and secondaries, never device-mapper; `op` connects them.

mod append;
#[cfg(test)]
mod chaos;
mod checksums;
mod confirm;
pub mod contents;
#[cfg(test)]
mod device_tests;
mod durable;
mod fuzzy;
mod headroom;
pub mod impact;
pub mod job;
mod origin;
mod overlay;
mod packed;
mod placed;
mod ports;
pub mod regions;
#[cfg(test)]
mod resume_tests;
pub mod sample;
pub mod schedule;
mod sink;
#[cfg(test)]
mod tests;
mod throttle;
mod verify;

pub use confirm::{ConfirmJob, confirm};
pub use impact::{Impact, ImpactWatch, LatencyProbe, LatencySample};
pub use job::{CopyJob, CopyOptions, CopyReport, run};
pub use ports::{OriginalsProvider, PlacementLog, Releases, ResumePoint};
pub use regions::{Order, region_size_for};
pub use schedule::segment_size_for;
