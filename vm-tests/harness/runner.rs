//! Selects, orders and runs cases in parallel, and reports the results.

use std::fmt;
use std::fs;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::case::{Case, Depth};
use super::kernel::{Kernel, Machine};
use super::options::{JOBS_MAX, Options, run_name};
use super::play::{Stage, Verdict};
use super::pool::{self, locked};
use super::qemu;

/// The closing line.
#[derive(Debug, Default)]
pub struct Tally {
    /// Cases with the expected result, now or, if unchanged, before.
    pub passed: usize,
    /// Cases with another result.
    pub failed: usize,
    /// Cases that could not run because something was missing.
    pub skipped: usize,
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

/// A case on a kernel.
type Run = (Case, Kernel);

/// Runs what the options select. An error is a failure of the harness, not of a case.
pub fn run(cases: Vec<Case>, options: &Options) -> Result<Tally> {
    check_names(&cases)?;
    let stage = Stage::prepare(options)?;
    let (queue, missing) = queue(cases, &stage);
    if options.only_lists() {
        list(&queue);
        return Ok(Tally::default());
    }
    if missing {
        println!(
            "vm: there is no user-mode kernel here: its cases run under QEMU instead, which takes much longer"
        );
    }
    let is_emulated = |(_, kernel): &Run| kernel.machine() == Machine::Qemu;
    let emulated_count = queue.iter().filter(|run| is_emulated(run)).count();
    let processors = options.jobs.unwrap_or_else(|| thread::available_parallelism().map_or(1, usize::from));
    let side_by_side = processors.min(fitting_memory(&queue)).max(1);
    println!(
        "vm: {} user-mode runs, {emulated_count} under QEMU ({}); {side_by_side} at a time, seed {}",
        queue.len() - emulated_count,
        stage.host.accel,
        stage.seed
    );
    let tally = Mutex::new(Tally::default());
    let work = |worker: usize, (case, kernel): Run| {
        let start = Instant::now();
        let verdict = stage.judge(&case, kernel, worker);
        report(&run_name(&case, kernel), &verdict, start.elapsed(), &mut locked(&tally));
    };
    // Emulated guests that share processors are slower in proportion (measured: two of them take twice as long), and
    // get closer to their time limits. A user-mode guest beside an emulated one uses what that leaves idle.
    pool::for_each(side_by_side, processors / qemu::PROCESSORS, queue, is_emulated, work);
    Ok(tally.into_inner().expect("a thread that panicked has ended the scope"))
}

/// The runs in order, and whether the stock kernel replaces a missing user-mode kernel.
fn queue(cases: Vec<Case>, stage: &Stage<'_>) -> (Vec<Run>, bool) {
    let has_user_mode = Kernel::UserMode.image(&stage.host.vm).is_some();
    let mut runs: Vec<Run> = Vec::new();
    let mut missing = false;
    for case in cases {
        let mut kernels: Vec<Kernel> = Vec::new();
        for &(kernel, depth) in &case.kernels {
            if stage.options.wants(&case, kernel, depth) {
                let stands_in = kernel == Kernel::UserMode && !has_user_mode;
                missing |= stands_in;
                kernels.push(if stands_in { Kernel::Main } else { kernel });
            }
        }
        kernels.dedup();
        runs.extend(kernels.into_iter().map(|kernel| (case.clone(), kernel)));
    }
    (runs, missing)
}

/// Prints the table of runs: the case, its needs, and why it runs on this kernel.
fn list(queue: &[Run]) {
    let width = queue.iter().map(|(case, _)| case.name.len()).max().unwrap_or(0);
    let columns: Vec<String> = Kernel::ALL.iter().map(|kernel| format!("{:7}", kernel.name())).collect();
    println!("{:width$}  {} needs", "case", columns.join(" "));
    let mut cases: Vec<&Case> = queue.iter().map(|(case, _)| case).collect();
    cases.dedup_by(|one, other| one.name == other.name);
    for case in cases {
        let cell = |kernel: &Kernel| {
            let depth = case.kernels.iter().find(|(on, _)| on == kernel).map(|(_, depth)| *depth);
            let word = match depth {
                Some(Depth::Routine) => "always",
                Some(Depth::Full) => "full",
                None => "-",
            };
            format!("{word:7}")
        };
        let cells: Vec<String> = Kernel::ALL.iter().map(cell).collect();
        let why = if case.why.is_empty() { String::new() } else { format!(" ({})", case.why) };
        let needs = [case.modules.join(" "), case.commands.join(" ")].join(", ");
        println!("{:width$}  {} {needs}{why}", case.name, cells.join(" "));
    }
}

/// How many of the guests fit into free memory: each needs its own memory, and its disks in the page cache.
fn fitting_memory(runs: &[Run]) -> usize {
    let Ok(text) = fs::read_to_string("/proc/meminfo") else { return 1 };
    let available = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let available = available.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    let need = |case: &Case| {
        u64::from(case.memory_mib) + case.disks.iter().map(|disk| disk.bytes >> 20).sum::<u64>()
    };
    let largest = runs.iter().map(|(case, _)| need(case)).max().unwrap_or(1).max(1);
    available.map_or(1, |kib| usize::try_from((kib >> 10) / largest).unwrap_or(usize::MAX)).min(JOBS_MAX)
}

fn report(name: &str, verdict: &Verdict, took: Duration, tally: &mut Tally) {
    let seconds = took.as_secs_f64();
    match verdict {
        Verdict::Passed(summary) => {
            tally.passed += 1;
            println!("vm {name} ... ok ({seconds:.1} s)");
            print!("{summary}");
        }
        Verdict::Unchanged => {
            tally.passed += 1;
            println!("vm {name} ... unchanged, passed before");
        }
        Verdict::Failed(why) => {
            tally.failed += 1;
            println!("vm {name} ... FAILED ({seconds:.1} s)\n{why}");
        }
        Verdict::Skipped(why) => {
            tally.skipped += 1;
            println!("vm {name} ... skipped: {why}");
        }
    }
}

fn check_names(cases: &[Case]) -> Result<()> {
    let mut names: Vec<&str> = cases.iter().map(|case| case.name.as_str()).collect();
    names.sort_unstable();
    if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        bail!("two cases are named {}", pair[0]);
    }
    let fits = |name: &str| name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
    match names.iter().find(|name| !fits(name)) {
        Some(name) => bail!("the case name {name} is not of a-z, 0-9 and _"),
        None => Ok(()),
    }
}
