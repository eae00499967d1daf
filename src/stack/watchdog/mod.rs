//! The watchdog: a separate process that resumes the origin if the command cannot.
//!
//! It is started before anything is frozen, and serves one command for its lifetime, order after order
//! (between orders it is on [`Standby`]). Before an order is armed, the watchdog has opened everything that
//! it will need and locked its memory. It is isolated from what happens to the command
//! ([`isolation`](super::isolation)): a Ctrl-C, the end of its session, a control group that is frozen or killed. Two
//! pipes connect it to the command: one for orders, one for verdicts. It guards an order from "arm", which it
//! confirms, to "disarm"; a further "arm" restarts its clock.
//!
//! If the command dies while no order is armed, everything stays as it is. Only a table that the command
//! loaded but did not activate is dropped, so that no other tool activates it by mistake.
//!
//! It acts when its deadline passes, or when the order pipe ends while it is armed (the command is dead). For
//! each device it drops the inactive table, then resumes; it thaws each filesystem. It drops first because a
//! resume *activates* a loaded table. So the origin ends up with either its old table (the stack was never
//! active) or, if the command had already switched, the new one: always a whole table.
//!
//! As long as the command lives it may still suspend or freeze something after the watchdog has acted. So the
//! watchdog keeps acting until the command answers. The command finds the verdict "fired" before and after
//! each of its critical steps, stops the watchdog, and undoes everything itself. If the command had the
//! kernel expedite RCU ([`rcu`](crate::sys::rcu)), the watchdog ends that when it has acted.
//!
//! No process can stop a freeze in progress: FITHAW waits for its end, or fails because nothing is frozen
//! yet. So each filesystem has a thread of its own, and the kernel's log records each thaw when it has
//! happened, not before.

mod client;
mod protocol;
mod server;

pub use client::{Standby, Verdict, Watchdog, budget_ran_out};
pub use protocol::Order;
pub use server::{ARGUMENT, main};
