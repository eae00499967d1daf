//! The only unsafe code: what the kernel offers, made safe, one wrapper per call.
//!
//! May use [`base`](crate::base) and nothing else of the crate. Decides no policy: a caller says
//! what to do, this module says what the kernel answered, errno included.

#![allow(unsafe_code, reason = "this module is where it belongs")]

pub mod aligned;
pub mod block;
pub mod dm_ioctl;
pub mod found;
pub mod freeze;
pub mod fsmap;
pub mod inquiry;
pub mod loop_device;
pub mod nudge;
pub mod privilege;
pub mod process;
pub mod queue;
pub mod rcu;
pub mod ring;
pub mod semaphore;
pub mod signal;
pub mod stdio;
