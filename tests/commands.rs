//! The command line as its users see it: what is printed where, and which exit code.

#![allow(clippy::unwrap_used)] // a test panics, and says so

#[path = "commands/contract.rs"]
mod contract;
#[path = "commands/support.rs"]
mod support;
