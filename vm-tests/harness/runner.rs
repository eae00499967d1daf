//! Which cases run, in what order, and what is said about them?
//!
//! A case comes to one [`Verdict`] per kernel. Everything that a failure needs to be understood is kept in
//! `target/vm/run/CASE-SERIES` and its path is printed; a pass loses its disks.

use std::fmt;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use super::accel;
use super::case::{Case, Expect, Kernel};
use super::guest::{Boot, Ending, Machine, PROCESSORS};
use super::kernel_log;
use super::pool::{self, locked};
use super::stamp::Stamps;

/// Most guests at a time.
const JOBS_MAX: usize = 64;

/// How much of a failed script's output is shown.
const SHOWN_LINES: usize = 40;

/// What the command line says.
#[derive(Debug, Default)]
pub struct Options {
    filters: Vec<String>,
    list: bool,
    all: bool,
    keep: bool,
    bench: bool,
    jobs: Option<usize>,
}

impl Options {
    /// Reads the arguments behind `--`.
    pub fn parse(arguments: impl Iterator<Item = String>) -> Result<Options, String> {
        let mut options = Options::default();
        let mut arguments = arguments;
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--list" => options.list = true,
                "--all" => options.all = true,
                "--keep" => options.keep = true,
                "--bench" => options.bench = true,
                "--jobs" => {
                    let count = arguments.next().and_then(|text| text.parse().ok());
                    let valid = count.filter(|count| (1..=JOBS_MAX).contains(count));
                    options.jobs = Some(valid.ok_or(format!("--jobs takes a number from 1 to {JOBS_MAX}"))?);
                }
                other if other.starts_with('-') => return Err(format!("unknown option {other}")),
                filter => options.filters.push(filter.to_owned()),
            }
        }
        Ok(options)
    }

    /// Whether nothing is to run.
    pub fn only_lists(&self) -> bool {
        self.list
    }

    /// A measurement is no test, and a test no measurement: a run is of one kind.
    fn wants(&self, case: &Case, kernel: Kernel) -> bool {
        let name = run_name(case, kernel);
        let named =
            self.filters.is_empty() || self.filters.iter().any(|filter| name.contains(filter.as_str()));
        named && case.bench == self.bench
    }
}

/// The closing line.
#[derive(Debug, Default)]
pub struct Tally {
    /// Cases that came to what they must come to, now or, unchanged, before.
    pub passed: usize,
    /// Cases that did not.
    pub failed: usize,
    /// Cases that something was missing for.
    pub skipped: usize,
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

enum Verdict {
    Passed,
    Unchanged,
    Failed(String),
    Skipped(String),
}

/// What all runs share.
struct Context<'run> {
    machine: Machine,
    vm: PathBuf,
    binary: PathBuf,
    stamps: Stamps,
    seed: u32,
    seed_given: bool,
    time_scale: f64,
    skips_fail: bool,
    options: &'run Options,
}

/// Runs what the options ask for. An error is one of the harness, not of a case.
pub fn run(cases: Vec<Case>, options: &Options) -> Result<Tally, String> {
    check_names(&cases)?;
    let mut queue: Vec<(Case, Kernel)> = Vec::new();
    for case in cases {
        for kernel in case.kernels.clone() {
            if options.wants(&case, kernel) {
                queue.push((case.clone(), kernel));
            }
        }
    }
    if options.list {
        for (case, kernel) in &queue {
            println!("{}: modules {:?}, commands {:?}", run_name(case, *kernel), case.modules, case.commands);
        }
        return Ok(Tally::default());
    }
    let context = context(options)?;
    let processors = thread::available_parallelism().map_or(1, usize::from);
    // Guests that share processors take as much longer (measured: two of them twice as long), and what has a time limit
    // comes closer to it.
    let jobs = options.jobs.unwrap_or(processors / PROCESSORS).clamp(1, JOBS_MAX);
    println!(
        "vm: {} runs, seed {}, accelerator {}, {jobs} at a time",
        queue.len(),
        context.seed,
        context.machine.accel
    );
    let tally = Mutex::new(Tally::default());
    pool::for_each(jobs, queue, |(case, kernel): (Case, Kernel)| {
        let start = Instant::now();
        let verdict = context.judge(&case, kernel);
        report(&run_name(&case, kernel), &verdict, start.elapsed(), &mut locked(&tally));
    });
    Ok(tally.into_inner().expect("a thread that panicked has ended the scope"))
}

fn run_name(case: &Case, kernel: Kernel) -> String {
    format!("{}-{}", case.name, kernel.series())
}

fn report(name: &str, verdict: &Verdict, took: Duration, tally: &mut Tally) {
    let seconds = took.as_secs_f64();
    match verdict {
        Verdict::Passed => {
            tally.passed += 1;
            println!("vm {name} ... ok ({seconds:.1} s)");
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

fn check_names(cases: &[Case]) -> Result<(), String> {
    let mut names: Vec<&str> = cases.iter().map(|case| case.name.as_str()).collect();
    names.sort_unstable();
    if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(format!("two cases are named {}", pair[0]));
    }
    let fits = |name: &&str| name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
    match names.iter().find(|name| !fits(name)) {
        Some(name) => Err(format!("the case name {name} is not of a-z, 0-9 and _")),
        None => Ok(()),
    }
}

fn context(options: &Options) -> Result<Context<'_>, String> {
    let repo = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let vm = repo.join("target/vm");
    let binary = PathBuf::from(env!("CARGO_BIN_EXE_tidemark"));
    if !vm.join("initramfs-6.12.cpio").exists() {
        return Err("there is no kernel to boot: run scripts/setup".to_owned());
    }
    let stamps = Stamps::new(&repo, &vm, &binary)?;
    let accel = accel::find(&repo, Kernel::Main.series())?;
    let (seed, seed_given) = seed()?;
    let set = |name: &str| {
        std::env::var(name).is_ok_and(|value| !value.is_empty() && value != "0" && value != "false")
    };
    let time_scale = match std::env::var("TIDEMARK_VM_TIME_SCALE") {
        Ok(text) => text
            .parse()
            .ok()
            .filter(|scale: &f64| (0.1..=100.0).contains(scale))
            .ok_or("TIDEMARK_VM_TIME_SCALE is not a number from 0.1 to 100")?,
        // Nobody waits for continuous integration, and its machine may be busy with something else.
        Err(_) if set("CI") => 3.0,
        Err(_) => 1.0,
    };
    Ok(Context {
        machine: Machine { repo, accel },
        vm,
        binary,
        stamps,
        seed,
        seed_given,
        time_scale,
        skips_fail: set("CI") || set("TIDEMARK_NO_SKIP"),
        options,
    })
}

/// The run's seed, and whether the user chose it.
fn seed() -> Result<(u32, bool), String> {
    if let Ok(text) = std::env::var("TIDEMARK_SEED") {
        let seed = text.parse().map_err(|_| format!("TIDEMARK_SEED is '{text}', not a number below 2^32"))?;
        return Ok((seed, true));
    }
    let mut bytes = [0; 4];
    File::open("/dev/urandom")
        .and_then(|mut source| source.read_exact(&mut bytes))
        .map_err(|error| format!("cannot read /dev/urandom: {error}"))?;
    Ok((u32::from_le_bytes(bytes), false))
}

impl Context<'_> {
    fn judge(&self, case: &Case, kernel: Kernel) -> Verdict {
        match self.try_judge(case, kernel) {
            Ok(verdict) => verdict,
            Err(message) => Verdict::Failed(format!("  the harness: {message}")),
        }
    }

    fn try_judge(&self, case: &Case, kernel: Kernel) -> Result<Verdict, String> {
        let missing = self.missing(case, kernel);
        if case.expect == Expect::Skip {
            let failed = Verdict::Failed("  ran, where something was to be missing".to_owned());
            return Ok(if missing.is_some() { Verdict::Passed } else { failed });
        }
        if let Some(why) = missing {
            let failed = Verdict::Failed(format!("  skipped, where nothing may be: {why}"));
            return Ok(if self.skips_fail { failed } else { Verdict::Skipped(why) });
        }
        let run_name = run_name(case, kernel);
        let image = self.machine.kernel_image(kernel.series()).unwrap_or_default();
        let digest = self.stamps.digest(case, kernel, &image.display().to_string())?;
        let anew = self.options.all || self.seed_given || case.bench;
        if !anew && self.stamps.passed(&run_name, &digest) {
            return Ok(Verdict::Unchanged);
        }
        self.stamps.forget(&run_name);
        let folder = self.vm.join("run").join(&run_name);
        let outcome = self.play(case, kernel, &folder)?;
        if outcome == case.expect {
            if !self.options.keep {
                remove_disks(&folder)?;
            }
            self.stamps.record(&run_name, &digest);
            return Ok(Verdict::Passed);
        }
        Ok(Verdict::Failed(self.explain(case, &outcome, &folder)))
    }

    /// Why the case cannot run here.
    fn missing(&self, case: &Case, kernel: Kernel) -> Option<String> {
        let series = kernel.series();
        if self.machine.kernel_image(series).is_none() {
            return Some(format!("no kernel {series} (run scripts/setup)"));
        }
        if let Some(command) = case.commands.iter().find(|command| !on_path(command)) {
            return Some(format!("no command {command} (run scripts/setup)"));
        }
        let known = self.known_modules(series);
        let absent = |module: &&String| !known.lines().any(|line| names_module(line, module));
        case.modules.iter().find(absent).map(|module| format!("kernel {series} has no module {module}"))
    }

    fn known_modules(&self, series: &str) -> String {
        let folder = self.vm.join(format!("kernel-{series}/lib/modules"));
        let version = fs::read_dir(folder).ok().and_then(|mut entries| Some(entries.next()?.ok()?.path()));
        let Some(version) = version else { return String::new() };
        let read = |name: &str| fs::read_to_string(version.join(name)).unwrap_or_default();
        format!("{}{}", read("modules.dep"), read("modules.builtin"))
    }

    /// Boots each phase until one does not go as it must.
    fn play(&self, case: &Case, kernel: Kernel, folder: &Path) -> Result<Expect, String> {
        let share = folder.join("case");
        if folder.exists() {
            fs::remove_dir_all(folder)
                .map_err(|error| format!("cannot clear {}: {error}", folder.display()))?;
        }
        fs::create_dir_all(share.join("artifacts"))
            .map_err(|error| format!("cannot make {}: {error}", share.display()))?;
        let mut disks = Vec::new();
        for (number, disk) in case.disks.iter().enumerate() {
            let path = folder.join(format!("disk{number}.raw"));
            let file = File::create(&path).and_then(|file| file.set_len(disk.bytes));
            file.map_err(|error| format!("cannot make {}: {error}", path.display()))?;
            disks.push((disk, path));
        }
        for (number, phase) in case.phases.iter().enumerate() {
            let limit = case.limit.mul_f64(self.time_scale);
            self.write_environment(case, kernel, number, limit, &share)?;
            let delay_ms = phase.cut.as_ref().map_or(0, |cut| u64::from(self.seed) % (cut.delay_ms_max + 1));
            let boot = Boot {
                series: kernel.series(),
                clock: case.clock,
                memory_mib: case.memory_mib,
                disks: disks.clone(),
                share: share.clone(),
                console: folder.join(format!("console.{number}.log")),
                messages: folder.join(format!("qemu.{number}.log")),
                limit,
                phase: number,
                cut: phase.cut.as_ref().map(|cut| (cut, Duration::from_millis(delay_ms))),
            };
            let ending = self.machine.boot(&boot)?;
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
                    return Err(format!("QEMU ended before the script did; see {}", folder.display()));
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
    ) -> Result<(), String> {
        let mut variables = vec![
            ("TIDEMARK_REPO".to_owned(), self.machine.repo.display().to_string()),
            ("TIDEMARK_BINARY".to_owned(), self.binary.display().to_string()),
            ("TIDEMARK_SCRIPT".to_owned(), case.phases[number].script.clone()),
            ("TIDEMARK_PHASE".to_owned(), number.to_string()),
            ("TIDEMARK_KERNEL".to_owned(), kernel.series().to_owned()),
            ("TIDEMARK_SEED".to_owned(), self.seed.to_string()),
            ("TIDEMARK_MODULES".to_owned(), case.modules.join(" ")),
            ("TIDEMARK_LIMIT_SECONDS".to_owned(), limit.as_secs().to_string()),
            ("TIDEMARK_HUNG_TASK_SECONDS".to_owned(), "60".to_owned()),
        ];
        variables.extend(case.variables.iter().cloned());
        let quoted =
            |(name, value): &(String, String)| format!("export {name}='{}'\n", value.replace('\'', r"'\''"));
        let text: String = variables.iter().map(quoted).collect();
        fs::write(share.join("env"), text)
            .map_err(|error| format!("cannot write the guest's environment: {error}"))
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

fn read_log(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}

fn remove_disks(folder: &Path) -> Result<(), String> {
    let entries =
        fs::read_dir(folder).map_err(|error| format!("cannot list {}: {error}", folder.display()))?;
    for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
        if path.extension().is_some_and(|extension| extension == "raw") {
            fs::remove_file(&path).map_err(|error| format!("cannot remove {}: {error}", path.display()))?;
        }
    }
    Ok(())
}

/// Whether a line of `modules.dep` or `modules.builtin` is about the module.
fn names_module(line: &str, module: &str) -> bool {
    let path = line.split(':').next().unwrap_or_default();
    let file = path.rsplit('/').next().unwrap_or_default();
    let name = file.split(".ko").next().unwrap_or_default();
    name.replace('_', "-") == module.replace('_', "-")
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
