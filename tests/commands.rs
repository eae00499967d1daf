//! The command line as its users see it: what is printed where, and which exit code.

#![allow(clippy::unwrap_used, clippy::print_stdout)] // a test panics, and prints its seed

#[path = "commands/cold.rs"]
mod cold;
#[path = "commands/contract.rs"]
mod contract;
#[path = "commands/status.rs"]
mod status;
#[path = "commands/support.rs"]
mod support;
#[path = "commands/terminal.rs"]
mod terminal;
#[path = "commands/unprivileged.rs"]
mod unprivileged;
