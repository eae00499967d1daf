//! Device-mapper: targets as types, tables, devices, and a change as a list of steps with undo.
//!
//! The kernel is the truth: nothing here remembers what a device looks like. Knows nothing of
//! volumes, filesystems or stores; may use [`base`](crate::base), [`sys`](crate::sys) and
//! [`extent`](crate::extent).

pub mod change;
pub mod context;
pub mod naming;
pub mod node;
pub mod origin_table;
pub mod owner;
pub mod status;
pub mod table;
pub mod target;
pub mod udev;
mod wire;

pub use change::{Action, AtBest, Change, Executor, Journal, NoJournal, Step};
pub use context::{CONTROL_PATH, DeviceInfo, Dm, Slot};
pub use naming::DeviceIdentity;
pub use owner::Owner;
pub use status::SnapshotStatus;
pub use table::{Line, Table, Template};
pub use target::{Persistence, Target, TargetVersion};
pub use udev::Udev;
