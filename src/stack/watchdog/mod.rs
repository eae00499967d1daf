//! The watchdog: a process of its own that lets the origin go on if the command cannot.
//!
//! It is started before anything is frozen, and serves a command as long as that lives, order after order ([`Standby`]
//! has it in between): for each it has everything open and locked in memory that it will need. It does not share what
//! happens to the command ([`apart`](super::apart)): a Ctrl-C, the end of its session, a control group that is frozen or killed. Two
//! pipes join it to the command: orders in, verdicts out. An order is guarded from "arm", which it answers, to "disarm"; a
//! further "arm" starts its clock anew.
//!
//! Where the command dies without an order being armed, all goes on as it is: only a table that it had loaded and not put
//! to use is dropped, before anybody else takes it for his.
//!
//! It acts when its deadline passes, or when the order pipe ends while it is armed (the command is
//! dead). To act is, for each device: drop the inactive table, then resume; for each filesystem:
//! thaw. Dropping comes first because a resume *activates* a loaded table: after it, the origin has
//! either its old table (the stack never came to be) or, where the command had already switched, the
//! new one, whole. Never half of one.
//!
//! While the command lives it may still suspend or freeze something after the watchdog has acted, so
//! the watchdog goes on acting until the command answers: the command finds the verdict "fired"
//! before and after each of its own critical steps, stops the watchdog, and takes everything back
//! itself. Where the command had the kernel expedite RCU ([`rcu`](crate::sys::rcu)), that is over once the watchdog has acted.
//!
//! A freeze in progress cannot be stopped, by anybody: FITHAW waits for its end, or answers that nothing is frozen yet.
//! So every filesystem has its own thread, and the kernel's log is told what was done when it was done, not before.

mod client;
mod protocol;
mod server;

pub use client::{Standby, Verdict, Watchdog, budget_ran_out};
pub use protocol::Order;
pub use server::{ARGUMENT, main};
