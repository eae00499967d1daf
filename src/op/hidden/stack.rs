//! An entry point for the VM cases that inserts and removes stacks without a copy.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::report::tell;
use crate::base::{ChunkSize, DeviceNumber, Error, ErrorKind, Result};
use crate::dm::{Dm, Table};
use crate::job::Job;
use crate::stack::hooks::{Deadline, Hook};
use crate::stack::watchdog::Standby;
use crate::stack::{
    InsertRequest, InstantContext, Stack, StackNames, StackRequest, dismantling, insertion, restoration,
};
use crate::sys::signal;
use crate::volume::lvm_lock::LvmScope;

/// `__stack REPORT ORIGIN[,ORIGIN...] COW[,COW...] BUDGET-MS HOOK [MOUNT-POINT...]`: inserts a stack under each
/// origin at one instant, writes "in place ..." or the error to REPORT, waits for the end of standard input,
/// removes the stacks. `__stack REPORT points ORIGIN-COUNT` writes the names of all crash points.
pub const ARGUMENT: &str = "__stack";

/// Runs the entry point.
///
/// # Errors
/// Any error of its steps.
pub fn run(report: &Path, words: &[String]) -> Result<()> {
    if let [first, count] = words
        && first == "points"
    {
        let count = count.parse().map_err(|_| Error::usage("a number of origins"))?;
        return tell(report, &crash_points(count)?.join("\n"));
    }
    let [origins, cows, budget, hook, mounts @ ..] = words else {
        return Err(Error::usage("__stack REPORT ORIGIN[,...] COW[,...] BUDGET-MS HOOK [MOUNT-POINT...]"));
    };
    signal::catch_termination()?;
    let cows = cows.split(',').map(str::parse).collect::<Result<Vec<DeviceNumber>>>()?;
    let budget = Duration::from_millis(budget.parse().map_err(|_| Error::usage("a budget in ms"))?);
    let names: Vec<&str> = origins.split(',').collect();
    if names.len() != cows.len() {
        return Err(Error::usage("a COW device for each origin"));
    }
    let request = request(&names, &cows, budget, mounts);
    let dm = Dm::open()?;
    let mut job = Job::begin("trial")?;
    let path = PathBuf::from(origins);
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
            below: context.below.first().map(PathBuf::as_path),
            deadline: Some(Deadline { at: context.deadline, option: "--freeze-budget" }),
            variables: &[],
        }
        .run(&interrupt)
    };
    let standby = Standby::start(job.id());
    let stacks = match Stack::insert(&dm, &mut job, &request, &standby, &mut at_instant, &interrupt) {
        Ok(stacks) => stacks,
        Err(error) => {
            if error.failed_undos().is_empty() {
                job.finish()?;
            }
            return Err(error);
        }
    };
    for stack in &stacks {
        let times = stack.times();
        let (frozen, suspended) = (times.frozen.as_millis(), times.suspended.as_millis());
        tell(report, &format!("in place frozen_ms={frozen} suspended_ms={suspended}"))?;
    }
    let mut rest = Vec::new();
    // The end of the input only tells when to remove the stacks. A read error counts as the end.
    let _ = std::io::stdin().read_to_end(&mut rest);
    let checked = stacks.iter().try_for_each(|stack| {
        stack.check_in_place(&dm)?;
        let status = stack.snapshot_status(&dm)?;
        tell(report, &format!("status {status:?}"))
    });
    stacks.iter().try_for_each(|stack| stack.remove(&dm, &mut job))?;
    job.finish()?;
    checked
}

fn request(origins: &[&str], cows: &[DeviceNumber], budget: Duration, mounts: &[String]) -> InsertRequest {
    let stack = |(origin, cow): (&&str, &DeviceNumber)| StackRequest {
        origin: (*origin).to_owned(),
        cow: *cow,
        chunk: ChunkSize::default(),
        lock_filesystem: false,
        all: false,
        omission: None,
        planned_table: None,
    };
    InsertRequest {
        stacks: origins.iter().zip(cows).map(stack).collect(),
        filesystems: mounts.iter().map(PathBuf::from).collect(),
        planned: None,
        budget,
        lvm_lock: LvmScope::Change,
    }
}

/// Every crash point of the changes of this many stacks, in order.
fn crash_points(origins: usize) -> Result<Vec<String>> {
    let id = crate::dm::naming::new_id();
    let table: Table = "0 8 linear 8:0 0".parse()?;
    let names: Vec<String> = (0..origins).map(|index| format!("origin{index}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let cows = vec![DeviceNumber { major: 8, minor: 0 }; origins];
    let request = request(&names, &cows, Duration::ZERO, &[]);
    let changes = [
        insertion(&request, &vec![table.clone(); origins], &id),
        restoration("origin0", &table, &table),
        dismantling(&StackNames::new("origin0", &id)),
    ];
    Ok(changes.iter().flat_map(crate::stack::Change::crash_points).collect())
}
