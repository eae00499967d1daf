//! The foundation of all other modules: errors, units, checked arithmetic, checksums, numbers from a seed, limits,
//! clock.
//!
//! Pure except [`clock`]. Must not import any other module of the crate.

pub mod checksum;
pub mod clock;
pub mod device;
pub mod error;
pub mod escape;
pub mod extent;
pub mod limits;
pub mod numbers;
pub mod path;
pub mod units;

pub use device::DeviceNumber;
pub use error::{Error, ErrorKind, Result, ResultExt};
pub use extent::Extent;
pub use path::directory_of;
pub use units::{Bytes, ChunkIx, ChunkSize, Sectors, SegmentIx, SegmentSize};
