//! A stack inserted and removed without a copy, for the VM cases.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::report::tell;
use crate::base::{ChunkSize, Error, ErrorKind, Result};
use crate::dm::Dm;
use crate::job::Job;
use crate::stack::hooks::Hook;
use crate::stack::watchdog::Standby;
use crate::stack::{InstantContext, Stack, StackRequest, crash_points};
use crate::sys::signal;
use crate::volume::lvm_lock::LvmScope;

/// `__stack REPORT ORIGIN COW BUDGET-MS HOOK [MOUNT-POINT...]`: inserts, writes "in place ..." or
/// the error to REPORT, waits for the end of standard input, removes. `__stack REPORT points`
/// writes the names of all crash points.
pub const ARGUMENT: &str = "__stack";

/// Does it.
///
/// # Errors
/// Those of what it does.
pub fn run(report: &Path, words: &[String]) -> Result<()> {
    if words == ["points"] {
        return tell(report, &crash_points().join("\n"));
    }
    let [origin, cow, budget, hook, mounts @ ..] = words else {
        return Err(Error::usage("__stack REPORT ORIGIN COW BUDGET-MS HOOK [MOUNT-POINT...]"));
    };
    signal::catch_termination()?;
    let request = StackRequest {
        origin: origin.clone(),
        cow: cow.parse()?,
        chunk: ChunkSize::default(),
        filesystems: mounts.iter().map(PathBuf::from).collect(),
        lock_filesystem: false,
        budget: Duration::from_millis(budget.parse().map_err(|_| Error::usage("a budget in ms"))?),
        all: false,
        planned: None,
        lvm_lock: LvmScope::Change,
    };
    let dm = Dm::open()?;
    let mut job = Job::begin("trial")?;
    let path = PathBuf::from(origin);
    let interrupt = || {
        if signal::stop_requested() {
            return Err(Error::new(ErrorKind::Interrupted, "asked to stop"));
        }
        Ok(())
    };
    let mut at_instant = |context: &InstantContext<'_>| {
        Hook {
            option: "--hook-frozen",
            command: hook,
            origin: &path,
            below: Some(context.below),
            deadline: Some(context.deadline),
        }
        .run(&interrupt)
    };
    let standby = Standby::start(job.id());
    let stack = match Stack::insert(&dm, &mut job, &request, &standby, &mut at_instant, &interrupt) {
        Ok(stack) => stack,
        Err(error) => {
            if error.failed_undos().is_empty() {
                job.finish()?;
            }
            return Err(error);
        }
    };
    let times = stack.times();
    let (frozen, suspended) = (times.frozen.as_millis(), times.suspended.as_millis());
    tell(report, &format!("in place frozen_ms={frozen} suspended_ms={suspended}"))?;
    let mut rest = Vec::new();
    // A signal ends the wait as well as the end of the input does.
    let _ = std::io::stdin().read_to_end(&mut rest);
    let checked = stack.check_in_place(&dm).and_then(|()| {
        let status = stack.snapshot_status(&dm)?;
        tell(report, &format!("status {status:?}"))
    });
    stack.remove(&dm, &mut job)?;
    job.finish()?;
    checked
}
