//! The only unsafe code: safe wrappers for kernel interfaces, one wrapper per call.
//!
//! May use [`base`](crate::base) and nothing else of the crate. Has no policy: the caller decides what to do,
//! and this module returns the kernel's result, including the errno.

#![allow(unsafe_code, reason = "this module is where it belongs")]

pub mod aligned;
pub mod beneath;
pub mod block;
pub mod child_probe;
pub mod dm_ioctl;
pub mod file_map;
pub mod freeze;
pub mod fsmap;
pub mod lock;
pub mod loop_device;
pub mod nudge;
pub mod path_stat;
pub mod privilege;
pub mod process;
pub mod queue;
pub mod rcu;
pub mod read_probe;
pub mod ring;
pub mod semaphore;
pub mod signal;
pub mod stdio;
