//! Helpers that run the command, and test data.

use std::process::{Child, Command, Output, Stdio};
use std::sync::{PoisonError, RwLock};

/// The command itself.
pub const PROGRAM: &str = env!("CARGO_BIN_EXE_tidemark");

/// The command with these arguments, empty standard input, and no inherited log options.
pub fn tidemark(arguments: &[&str]) -> Command {
    with_arguments(Command::new(PROGRAM), arguments)
}

/// Like [`tidemark`], but started as from a terminal: background jobs of a script ignore SIGINT, and their children,
/// including these tests, inherit that.
pub fn interruptible(arguments: &[&str]) -> Command {
    let mut command = Command::new("env");
    command.arg("--default-signal=INT").arg(PROGRAM);
    with_arguments(command, arguments)
}

fn with_arguments(mut command: Command, arguments: &[&str]) -> Command {
    command.args(arguments).env_remove("TIDEMARK_LOG").stdin(Stdio::null());
    command
}

/// The result of a command.
pub struct Ran {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

/// Locked for writing while an origin is written, and for reading while a process is started. A process that another
/// test starts inherits the open file until its exec, and a file that is open for writing is rightly refused as an
/// origin (and as a program).
static STARTING: RwLock<()> = RwLock::new(());

/// Starts it.
pub fn spawn(command: &mut Command) -> Child {
    let _starting = STARTING.read().unwrap_or_else(PoisonError::into_inner);
    command.spawn().unwrap()
}

/// Runs it to its end, output captured.
pub fn output(command: &mut Command) -> Output {
    let child = spawn(command.stdout(Stdio::piped()).stderr(Stdio::piped()));
    child.wait_with_output().unwrap()
}

/// Runs `write` while no process is being started.
pub fn undisturbed<T>(write: impl FnOnce() -> T) -> T {
    let _starting = STARTING.write().unwrap_or_else(PoisonError::into_inner);
    write()
}

pub fn run(arguments: &[&str]) -> Ran {
    output(&mut tidemark(arguments)).into()
}

pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// The JSON line of type `error` that must be the only line on standard error.
pub fn json_error(ran: &Ran) -> serde_json::Value {
    assert_eq!(ran.stderr.lines().count(), 1, "one line: {}", ran.stderr);
    let value: serde_json::Value = serde_json::from_str(&ran.stderr).unwrap();
    assert_eq!(value["tidemark"], 1);
    assert_eq!(value["type"], "error");
    assert_eq!(value["exit_code"], ran.code.unwrap());
    value
}

/// A separate folder for one test, with an origin in it.
pub struct Bench {
    pub dir: tempfile::TempDir,
    pub content: Vec<u8>,
}

impl Bench {
    /// An origin of `size` bytes from a printed seed: noise, with zeros in its middle third.
    pub fn new(size: usize, seed: u64) -> Self {
        println!("seed {seed}, {size} bytes");
        let dir = tempfile::Builder::new().prefix("tidemark-test-").tempdir().unwrap();
        let content = noise(size, seed);
        undisturbed(|| std::fs::write(dir.path().join("origin"), &content)).unwrap();
        Self { dir, content }
    }

    /// The path of `name` in the folder, as an argument.
    pub fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    pub fn origin(&self) -> String {
        self.path("origin")
    }

    pub fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.dir.path().join(name)).unwrap()
    }

    /// The folder's files, sorted.
    pub fn files(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.dir.path()).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// Fails if the origin has changed.
    pub fn assert_origin_untouched(&self) {
        assert!(self.read("origin") == self.content, "the origin was changed");
    }
}

/// xorshift64*: reproducible, and without equal 8-byte words in any test.
pub fn noise(size: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = Vec::with_capacity(size + 8);
    while bytes.len() < size {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        bytes.extend(state.wrapping_mul(0x2545_F491_4F6C_DD1D).to_le_bytes());
    }
    bytes.truncate(size);
    bytes[size / 3..size / 3 * 2].fill(0);
    bytes
}

/// A seed that differs from run to run; the test prints it.
pub fn random_seed() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    now.as_secs() ^ (u64::from(now.subsec_nanos()) << 20)
}

/// Runs and expects success; returns the output.
pub fn ok(arguments: &[&str]) -> Ran {
    let ran = run(arguments);
    assert_eq!(ran.code, Some(0), "{arguments:?}: {}{}", ran.stdout, ran.stderr);
    ran
}

/// Every line as JSON, each tagged and versioned.
pub fn json_lines(text: &str) -> Vec<serde_json::Value> {
    text.lines()
        .map(|line| {
            let value: serde_json::Value =
                serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
            assert_eq!(value["tidemark"], 1, "{line}");
            assert!(value["type"].is_string(), "{line}");
            value
        })
        .collect()
}
