//! The command line as users see it: its output and its exit codes.

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
