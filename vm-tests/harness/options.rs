//! The options on the command line.

use anyhow::{Context, Result, bail};

use super::case::{Case, Depth};
use super::kernel::Kernel;

/// Maximum number of guests at a time.
pub const JOBS_MAX: usize = 64;

/// The parsed command line.
#[derive(Debug, Default)]
pub struct Options {
    filters: Vec<String>,
    kernel: Option<Kernel>,
    list: bool,
    full: bool,
    /// Also run what passed before.
    pub all: bool,
    /// Also keep the disks of cases that pass.
    pub keep: bool,
    bench: bool,
    /// Processors to use at a time; None for all.
    pub jobs: Option<usize>,
}

impl Options {
    /// Parses the arguments after `--`.
    pub fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Options> {
        let mut options = Options::default();
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--list" => options.list = true,
                "--full" => options.full = true,
                "--all" => options.all = true,
                "--keep" => options.keep = true,
                "--bench" => options.bench = true,
                "--kernel" => {
                    let name = arguments.next().unwrap_or_default();
                    let found = Kernel::ALL.into_iter().find(|kernel| kernel.name() == name);
                    options.kernel = Some(found.context("--kernel takes um, 6.12 or 6.1")?);
                }
                "--jobs" => {
                    let count = arguments.next().and_then(|text| text.parse().ok());
                    let valid = count.filter(|count| (1..=JOBS_MAX).contains(count));
                    let valid =
                        valid.with_context(|| format!("--jobs takes a number from 1 to {JOBS_MAX}"))?;
                    options.jobs = Some(valid);
                }
                other if other.starts_with('-') => bail!("unknown option {other}"),
                filter => options.filters.push(filter.to_owned()),
            }
        }
        Ok(options)
    }

    /// Whether this is a routine or a full run.
    pub fn depth(&self) -> Depth {
        if self.full { Depth::Full } else { Depth::Routine }
    }

    /// Whether to list the cases without running them.
    pub fn only_lists(&self) -> bool {
        self.list
    }

    /// Whether this run is selected. A run of the program has either tests or measurements. A full name as filter
    /// selects in any depth.
    pub fn wants(&self, case: &Case, kernel: Kernel, depth: Depth) -> bool {
        let name = run_name(case, kernel);
        let named =
            self.filters.is_empty() || self.filters.iter().any(|filter| name.contains(filter.as_str()));
        let exact = self.filters.contains(&name);
        let on = self.kernel.is_none_or(|only| only == kernel);
        named && on && case.bench == self.bench && (depth <= self.depth() || exact)
    }
}

/// The name of a case on a kernel.
pub fn run_name(case: &Case, kernel: Kernel) -> String {
    format!("{}-{}", case.name, kernel.name())
}
