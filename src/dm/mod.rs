//! Device-mapper: targets as types, tables, devices.
//!
//! The kernel holds the state: nothing here caches what a device looks like. Knows nothing of volumes,
//! filesystems or stores; may use [`base`](crate::base), [`sys`](crate::sys) and [`extent`](crate::extent).

pub mod context;
pub mod naming;
pub mod node;
pub mod status;
pub mod table;
pub mod target;
pub mod udev;
mod wire;

pub use context::{CONTROL_PATH, DeviceInfo, Dm, SUSPEND_ATTEMPTS, Slot};
pub use naming::DeviceIdentity;
pub use status::SnapshotStatus;
pub use table::{Table, Template};
pub use target::Target;
pub use udev::Udev;
