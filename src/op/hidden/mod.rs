//! Hidden entry points: processes that help a command (watchdog, write-back) and, in test builds, parts of a copy.
//!
//! They are handled before the command line is parsed: a watchdog must start quickly, and no option may make it fail.

#[cfg(feature = "vm")]
mod free_map;
#[cfg(feature = "vm")]
mod report;
#[cfg(feature = "vm")]
mod stack;
#[cfg(feature = "vm")]
mod store;

use std::process::ExitCode;

use super::recover;
use crate::stack::{watchdog, write_back};

/// Runs the hidden entry point that the first argument names; None for an ordinary command.
#[must_use]
pub fn run() -> Option<ExitCode> {
    let mut arguments = std::env::args_os().skip(1);
    let first = arguments.next()?;
    if first == watchdog::ARGUMENT {
        let job = arguments.next().and_then(|job| job.into_string().ok());
        let drop_loaded = job.clone().map(|job| move |process| recover::drop_loaded(&job, process));
        return Some(watchdog::main(drop_loaded, job.map(|job| move || recover::recover_job(&job))));
    }
    if first == write_back::ARGUMENT {
        return Some(write_back::main());
    }
    #[cfg(feature = "vm")]
    if first == stack::ARGUMENT {
        return Some(report::main(stack::run));
    }
    #[cfg(feature = "vm")]
    if first == store::ARGUMENT {
        return Some(report::main(store::run));
    }
    #[cfg(feature = "vm")]
    if first == free_map::ARGUMENT {
        return Some(report::main(free_map::run));
    }
    None
}
