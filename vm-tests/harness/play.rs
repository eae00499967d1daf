//! Plays and judges one case.
//!
//! The result is one [`Verdict`]. Everything that helps to understand a failure is kept in `target/vm/run/RUN`, and
//! this path is printed. The disks of a case that passes are deleted.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::accel;
use super::case::{Case, Delay, Expect};
use super::guest::{Boot, Ending, Host};
use super::kernel::Kernel;
use super::kernel_log;
use super::options::{Options, run_name};
use super::stamp::Stamps;

/// Number of lines shown of a failed script's output.
const SHOWN_LINES: usize = 40;

/// The project's folder in the guest.
const GUEST_REPO: &str = "/tidemark/repo";

/// The folder of the binary under test in the guest.
const GUEST_BINARIES: &str = "/tidemark/bin";

/// The result of a case.
pub enum Verdict {
    /// It had the expected result. The text is the case's own `summary`, if it wrote one.
    Passed(String),
    /// It passed before, and nothing that it depends on has changed.
    Unchanged,
    /// It failed; with the reason.
    Failed(String),
    /// It could not run; with what is missing.
    Skipped(String),
}

/// What all runs share.
pub struct Stage<'run> {
    /// The host's side.
    pub host: Host,
    /// The binary under test.
    pub binary: PathBuf,
    /// The record of earlier passes.
    pub stamps: Stamps,
    /// The run's seed.
    pub seed: u32,
    /// Whether the user chose it.
    pub seed_given: bool,
    /// Factor for time limits.
    pub time_scale: f64,
    /// Whether a skip is a failure.
    pub skips_fail: bool,
    /// The command line.
    pub options: &'run Options,
}

impl<'run> Stage<'run> {
    /// Inspects the project, the machine and the environment.
    pub fn prepare(options: &'run Options) -> Result<Stage<'run>> {
        let repo = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
        let vm = repo.join("target/vm");
        let binary = PathBuf::from(env!("CARGO_BIN_EXE_tidemark"));
        ensure!(Kernel::Main.image(&vm).is_some(), "there is no kernel to boot: run scripts/setup");
        let stamps = Stamps::new(&repo, &vm, &binary)?;
        let binaries = binary.parent().context("the binary under test is in no folder")?.to_owned();
        let mut host = Host { repo, binaries, vm, accel: String::new() };
        accel::find(&mut host)?;
        let (seed, seed_given) = seed()?;
        let time_scale = match std::env::var("TIDEMARK_VM_TIME_SCALE") {
            Ok(text) => {
                let scale = text.parse().ok().filter(|scale: &f64| (0.1..=100.0).contains(scale));
                scale.context("TIDEMARK_VM_TIME_SCALE is not a number from 0.1 to 100")?
            }
            // A CI run may take longer, and its machine may be busy with other work.
            Err(_) if is_set("CI") => 3.0,
            Err(_) => 1.0,
        };
        let skips_fail = is_set("CI") || is_set("TIDEMARK_NO_SKIP");
        Ok(Stage { host, binary, stamps, seed, seed_given, time_scale, skips_fail, options })
    }

    /// Plays the case, unless it is unchanged or cannot run, as the runner's `worker`th.
    pub fn judge(&self, case: &Case, kernel: Kernel, worker: usize) -> Verdict {
        match self.try_judge(case, kernel, worker) {
            Ok(verdict) => verdict,
            Err(error) => Verdict::Failed(format!("  the harness: {error:#}")),
        }
    }

    fn try_judge(&self, case: &Case, kernel: Kernel, worker: usize) -> Result<Verdict> {
        let missing = self.missing(case, kernel);
        if case.expect == Expect::Skip {
            let failed = Verdict::Failed("  ran, where something was to be missing".to_owned());
            return Ok(if missing.is_some() { Verdict::Passed(String::new()) } else { failed });
        }
        if let Some(why) = missing {
            let failed = Verdict::Failed(format!("  skipped, where nothing may be: {why}"));
            return Ok(if self.skips_fail { failed } else { Verdict::Skipped(why) });
        }
        let run_name = run_name(case, kernel);
        let digest = self.stamps.digest(case, kernel, self.options.depth(), &self.host.vm)?;
        let anew = self.options.all || self.seed_given || case.bench;
        if !anew && self.stamps.passed(&run_name, &digest) {
            return Ok(Verdict::Unchanged);
        }
        self.stamps.forget(&run_name);
        let folder = self.host.vm.join("run").join(&run_name);
        let outcome = self.play(case, kernel, worker, &folder)?;
        if outcome == case.expect {
            if !self.options.keep {
                remove_disks(&folder)?;
            }
            self.stamps.record(&run_name, &digest);
            return Ok(Verdict::Passed(read_log(&folder.join("case/summary"))));
        }
        Ok(Verdict::Failed(self.explain(case, &outcome, &folder)))
    }

    /// The reason why the case cannot run here.
    fn missing(&self, case: &Case, kernel: Kernel) -> Option<String> {
        let name = kernel.name();
        if kernel.image(&self.host.vm).is_none() {
            return Some(format!("no kernel {name} (run scripts/setup)"));
        }
        if let Some(command) = case.commands.iter().find(|command| !on_path(command)) {
            return Some(format!("no command {command} (run scripts/setup)"));
        }
        if let Some(tool) = case.tools.iter().find(|tool| !self.host.binaries.join(tool).is_file()) {
            return Some(format!("no program {tool} (run scripts/setup)"));
        }
        let absent = kernel.absent_module(&self.host.vm, &case.modules);
        absent.map(|module| format!("kernel {name} has no module {module}"))
    }

    /// Boots each phase until one has an unexpected ending.
    fn play(&self, case: &Case, kernel: Kernel, worker: usize, folder: &Path) -> Result<Expect> {
        let share = folder.join("case");
        if folder.exists() {
            fs::remove_dir_all(folder).with_context(|| format!("cannot clear {}", folder.display()))?;
        }
        fs::create_dir_all(share.join("artifacts"))
            .with_context(|| format!("cannot make {}", share.display()))?;
        // A long script can use this list to check the kernel's log itself.
        fs::write(share.join("complaints"), kernel_log::COMPLAINTS.join("\n"))
            .context("cannot write what complaints are")?;
        let mut disks = Vec::new();
        for (number, disk) in case.disks.iter().enumerate() {
            let name = PathBuf::from(format!("disk{number}.raw"));
            let path = folder.join(&name);
            let file = File::create(&path).and_then(|file| file.set_len(disk.bytes));
            file.with_context(|| format!("cannot make {}", path.display()))?;
            disks.push((disk, name));
        }
        for (number, phase) in case.phases.iter().enumerate() {
            let limit = case.limit.mul_f64(self.time_scale);
            self.write_environment(case, kernel, number, limit, &share)?;
            let delay_ms = phase.cut.as_ref().map_or(0, |cut| u64::from(self.seed) % (cut.delay_ms_max + 1));
            let boot = Boot {
                kernel,
                worker,
                clock: case.clock,
                memory_mib: case.memory_mib,
                disks: disks.clone(),
                folder: folder.to_owned(),
                share: share.clone(),
                console: folder.join(format!("console.{number}.log")),
                messages: folder.join(format!("machine.{number}.log")),
                limit,
                phase: number,
                cut: phase.cut.as_ref().map(|cut| (cut, Duration::from_millis(delay_ms))),
            };
            let ending = self.host.boot(&boot)?;
            let log = read_log(&boot.console) + &read_log(&share.join(format!("dmesg.{number}")));
            if kernel_log::complaint(&log, &case.tolerated).is_some() {
                return Ok(Expect::KernelComplaint);
            }
            match ending {
                Ending::Cut => {}
                Ending::Exited(0) if phase.cut.is_none() => {}
                Ending::Exited(0) => return Ok(Expect::ScriptFailure(0)),
                Ending::Exited(status) => return Ok(Expect::ScriptFailure(status)),
                Ending::Hung => return Ok(Expect::Hang),
                Ending::Died => {
                    bail!("the machine ended before the script did; see {}", folder.display());
                }
            }
        }
        Ok(Expect::Pass)
    }

    /// The file `env` that the guest's first process sources.
    fn write_environment(
        &self,
        case: &Case,
        kernel: Kernel,
        number: usize,
        limit: Duration,
        share: &Path,
    ) -> Result<()> {
        // A symbolic link may lead elsewhere in the guest, so it is resolved here.
        let modules = kernel.modules(&self.host.vm);
        let modules =
            fs::canonicalize(&modules).with_context(|| format!("cannot find {}", modules.display()))?;
        let mut variables = vec![
            ("TIDEMARK_HOST_REPO".to_owned(), self.host.repo.display().to_string()),
            ("TIDEMARK_HOST_BINARIES".to_owned(), self.host.binaries.display().to_string()),
            ("TIDEMARK_HOST_MODULES".to_owned(), modules.display().to_string()),
            ("TIDEMARK_REPO".to_owned(), GUEST_REPO.to_owned()),
            ("TIDEMARK_BINARY".to_owned(), format!("{GUEST_BINARIES}/{}", self.binary_name())),
            ("TIDEMARK_SCRIPT".to_owned(), case.phases[number].script.clone()),
            ("TIDEMARK_PHASE".to_owned(), number.to_string()),
            ("TIDEMARK_KERNEL".to_owned(), kernel.series().to_owned()),
            ("TIDEMARK_MACHINE".to_owned(), kernel.machine().name().to_owned()),
            ("TIDEMARK_DELAYS".to_owned(), delays(case)),
            ("TIDEMARK_DEPTH".to_owned(), self.options.depth().name().to_owned()),
            ("TIDEMARK_SEED".to_owned(), self.seed.to_string()),
            ("TIDEMARK_MODULES".to_owned(), case.modules.join(" ")),
            ("TIDEMARK_LIMIT_SECONDS".to_owned(), limit.as_secs().to_string()),
            ("TIDEMARK_HUNG_TASK_SECONDS".to_owned(), "60".to_owned()),
        ];
        variables.extend(case.variables.iter().cloned());
        let quoted =
            |(name, value): &(String, String)| format!("export {name}='{}'\n", value.replace('\'', r"'\''"));
        let text: String = variables.iter().map(quoted).collect();
        fs::write(share.join("env"), text).context("cannot write the guest's environment")
    }

    fn binary_name(&self) -> String {
        self.binary.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    fn explain(&self, case: &Case, outcome: &Expect, folder: &Path) -> String {
        let mut text = match outcome {
            Expect::Pass => format!("  passed, where {:?} was expected\n", case.expect),
            Expect::ScriptFailure(0) => "  ended before the power was cut\n".to_owned(),
            Expect::ScriptFailure(status) => format!("  the script ended with status {status}\n"),
            Expect::Hang => "  hung, and was killed at its time limit\n".to_owned(),
            Expect::KernelComplaint => "  the kernel complained\n".to_owned(),
            Expect::Skip => "  something that it needs is missing\n".to_owned(),
        };
        for number in 0..case.phases.len() {
            let log = read_log(&folder.join(format!("console.{number}.log")))
                + &read_log(&folder.join(format!("case/dmesg.{number}")));
            if let Some(line) = kernel_log::complaint(&log, &case.tolerated) {
                text.push_str(&format!("  | {line}\n"));
            }
        }
        let output = read_log(&folder.join("case/output"));
        let lines: Vec<&str> = output.lines().collect();
        for line in &lines[lines.len().saturating_sub(SHOWN_LINES)..] {
            text.push_str(&format!("  | {line}\n"));
        }
        text.push_str(&format!("  seed {}; everything is kept in {}", self.seed, folder.display()));
        text
    }
}

/// The number and delays of each delayed disk: `NUMBER:READ:WRITE:FLUSH`, in milliseconds.
fn delays(case: &Case) -> String {
    let delayed = case.disks.iter().enumerate().filter_map(|(number, disk)| Some((number, disk.delay?)));
    let words = delayed.map(|(number, Delay { read_ms, write_ms, flush_ms })| {
        format!("{number}:{read_ms}:{write_ms}:{flush_ms}")
    });
    words.collect::<Vec<_>>().join(" ")
}

/// Whether an environment variable is set to a true value.
fn is_set(name: &str) -> bool {
    std::env::var(name).is_ok_and(|value| !value.is_empty() && value != "0" && value != "false")
}

/// The run's seed, and whether the user chose it.
fn seed() -> Result<(u32, bool)> {
    if let Ok(text) = std::env::var("TIDEMARK_SEED") {
        let seed = text
            .parse()
            .ok()
            .with_context(|| format!("TIDEMARK_SEED is '{text}', not a number below 2^32"))?;
        return Ok((seed, true));
    }
    let mut bytes = [0; 4];
    let read = File::open("/dev/urandom").and_then(|mut source| source.read_exact(&mut bytes));
    read.context("cannot read /dev/urandom")?;
    Ok((u32::from_le_bytes(bytes), false))
}

fn read_log(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}

fn remove_disks(folder: &Path) -> Result<()> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?;
    for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
        if path.extension().is_some_and(|extension| extension == "raw") {
            fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
    }
    Ok(())
}

/// Whether the guest, whose root is the host's, will find the command.
fn on_path(command: &str) -> bool {
    let mut folders: Vec<PathBuf> = [
        "/usr/local/sbin",
        "/usr/local/bin",
        "/usr/sbin",
        "/usr/bin",
        "/sbin",
        "/bin",
        "/usr/lib/systemd",
        "/lib/systemd",
    ]
    .iter()
    .map(PathBuf::from)
    .collect();
    if let Ok(versions) = fs::read_dir("/usr/lib/postgresql") {
        folders.extend(versions.filter_map(|entry| Some(entry.ok()?.path().join("bin"))));
    }
    folders.iter().any(|folder| folder.join(command).is_file())
}
