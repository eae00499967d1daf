//! A server that a test runs, and the failures that every hook with a session must survive.

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, User};

use crate::support::{Ran, output, spawn, tidemark};

/// How long anything may take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A server under test.
pub trait Server {
    /// The name of its hook.
    const HOOK: &'static str;
    /// The directory of the test, for its files.
    fn directory(&self) -> &Path;
    /// The process that answers new connections.
    fn main_process(&self) -> Pid;
    /// The environment by which the hook finds it, as assignments of a shell.
    fn environment(&self) -> String {
        String::new()
    }
    /// Options of the hook.
    fn options(&self) -> String {
        String::new()
    }
    /// True while it holds what the hook has begun.
    fn is_held(&self) -> bool;

    /// A command line that runs the hook.
    fn hook(&self, arguments: &str) -> String {
        let hook = Path::new(env!("CARGO_MANIFEST_DIR")).join("hooks").join(Self::HOOK);
        format!("{} '{}' {arguments} {}", self.environment(), hook.display(), self.options())
    }

    /// A copy with the hook around it. `and`: what the shell does after the hook before the copy.
    fn copy(&self, before: &str, and: &str, options: &[&str]) -> Command {
        self.copy_with("", before, and, options)
    }

    /// The same; `first` is what the shell does first.
    fn copy_with(&self, first: &str, before: &str, and: &str, options: &[&str]) -> Command {
        let (origin, target) = (self.directory().join("origin"), self.directory().join("copy.tdm"));
        if !origin.exists() {
            fs::write(&origin, vec![7; 4 << 20]).unwrap();
        }
        let _ = fs::remove_file(&target);
        let before = format!("{first}{}{and}", self.hook(&format!("before {before}")));
        let after = self.hook("after");
        let mut words = vec!["copy", origin.to_str().unwrap(), target.to_str().unwrap()];
        words.extend(["--hook-before", &before, "--hook-after", &after]);
        words.extend(options);
        tidemark(&words)
    }

    /// Starts a copy that takes long, and waits until the hook has begun.
    fn begin(&self, before: &str) -> Child {
        let mut command = self.copy(before, "", &["--rate", "64KiB", "--segment", "64KiB"]);
        let child = spawn(command.stdout(Stdio::null()).stderr(Stdio::piped()));
        let is_open = || state_left(Self::HOOK, child.id()).iter().any(|state| state.join("open").exists());
        wait_for("the hook begins", is_open);
        assert!(self.is_held());
        child
    }

    fn target_exists(&self) -> bool {
        self.directory().join("copy.tdm").exists()
    }
}

/// A server's process, which is killed at the end of the test.
pub struct Running(Child);

impl Running {
    pub fn start(command: &mut Command) -> Self {
        Self(spawn(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null())))
    }

    pub fn id(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.0.id()).unwrap())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// Ends it with SIGTERM, and returns what it printed.
pub fn stop(child: Child) -> Ran {
    send(child.id(), Signal::SIGTERM);
    child.wait_with_output().unwrap().into()
}

pub fn send(process: u32, signal: Signal) {
    kill(Pid::from_raw(i32::try_from(process).unwrap()), signal).unwrap();
}

pub fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < end, "waited in vain: {what}");
        sleep(Duration::from_millis(50));
    }
}

/// The keeper of this hook with this Tidemark, as it has noted itself.
fn keeper(hook: &str, tidemark: u32) -> Option<u32> {
    let note = fs::read_to_string(state_left(hook, tidemark).first()?.join("keeper")).ok()?;
    note.split(' ').next()?.parse().ok()
}

/// The directory of a hook's state.
fn state_left(hook: &str, tidemark: u32) -> Vec<PathBuf> {
    let prefix = format!("{hook}.{tidemark}.");
    let own = nix::unistd::geteuid();
    let of_user = std::env::var("XDG_RUNTIME_DIR").unwrap_or_else(|_| "/tmp".to_owned());
    let directory = if own.is_root() {
        "/run/tidemark-hooks".to_owned()
    } else {
        format!("{of_user}/tidemark-hooks-{own}")
    };
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    let paths = entries.map(|entry| entry.unwrap());
    paths
        .filter(|entry| entry.file_name().to_str().unwrap().starts_with(&prefix))
        .map(|entry| entry.path())
        .collect()
}

fn nothing_is_left(server: &impl Server, hook: &str, tidemark: u32) {
    wait_for("nothing is held any more", || !server.is_held());
    wait_for("its state is removed", || state_left(hook, tidemark).is_empty());
}

/// Everything that may happen to a session between --hook-before and --hook-after.
pub fn survives_failures<S: Server>(server: &S) {
    // The copy fails after the hook has begun: --hook-after comes in any case.
    let ran: Ran = output(&mut server.copy("", " && false", &[])).into();
    assert_eq!(ran.code, Some(1), "{}", ran.stderr);
    assert!(!ran.stderr.contains("did not last"), "{}", ran.stderr);
    assert!(!server.is_held() && !server.target_exists());

    // A signal ends the copy: --hook-after still comes.
    let child = server.begin("");
    let id = child.id();
    let ran = stop(child);
    assert!(!ran.stderr.contains("did not last"), "{}", ran.stderr);
    nothing_is_left(server, S::HOOK, id);

    // Tidemark is killed and not reaped: a zombie.
    let mut child = server.begin("");
    send(child.id(), Signal::SIGKILL);
    nothing_is_left(server, S::HOOK, child.id());
    child.wait().unwrap();

    // The keeper is killed: the connection ends, and the copy warns.
    let child = server.begin("");
    let id = child.id();
    send(keeper(S::HOOK, id).expect("a keeper"), Signal::SIGKILL);
    wait_for("nothing is held any more", || !server.is_held());
    let ran = stop(child);
    assert!(ran.stderr.contains("--hook-after") && ran.stderr.contains("did not last"), "{}", ran.stderr);
    nothing_is_left(server, S::HOOK, id);

    // The limit runs out.
    let child = server.begin("--limit 3");
    let id = child.id();
    wait_for("the limit ends it", || !server.is_held());
    let ran = stop(child);
    assert!(ran.stderr.contains("its limit of 3 s is over"), "{}", ran.stderr);
    assert!(ran.stderr.contains("did not last"), "{}", ran.stderr);
    nothing_is_left(server, S::HOOK, id);
}

/// The server does not answer: the hook is killed at its timeout, and nothing is left once the server goes on.
pub fn survives_a_server_that_hangs<S: Server>(server: &S) {
    kill(server.main_process(), Signal::SIGSTOP).unwrap();
    let child =
        spawn(server.copy("", "", &["--hook-timeout", "2s"]).stdout(Stdio::null()).stderr(Stdio::piped()));
    let id = child.id();
    let ran: Ran = child.wait_with_output().unwrap().into();
    kill(server.main_process(), Signal::SIGCONT).unwrap();
    assert_eq!(ran.code, Some(1), "{}", ran.stderr);
    assert!(ran.stderr.contains("ran past --hook-timeout"), "{}", ran.stderr);
    assert!(!server.target_exists());
    nothing_is_left(server, S::HOOK, id);
}

/// The server is down: nothing is copied.
pub fn refuses_without_its_server<S: Server>(server: &S) {
    let ran: Ran = output(&mut server.copy("", "", &[])).into();
    assert_eq!(ran.code, Some(1), "{}", ran.stderr);
    assert!(ran.stderr.contains("--hook-before") && ran.stderr.contains(S::HOOK), "{}", ran.stderr);
    assert!(!ran.stderr.contains("--hook-after"), "nothing was begun: {}", ran.stderr);
    assert!(!server.target_exists());
}

/// A program of a package that scripts/setup has unpacked and not installed.
pub fn unpacked(program: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/servers").join(program);
    assert!(path.exists(), "{} is missing: run scripts/setup", path.display());
    path
}

/// `program` as the ordinary user `name`, if the tests run as root; else as it is.
pub fn as_user(name: &str, program: &Path) -> Command {
    let mut command = Command::new(program);
    if let Some(user) = user(name) {
        command.uid(user.uid.as_raw()).gid(user.gid.as_raw());
    }
    command.current_dir("/").stdin(Stdio::null());
    command
}

/// A directory that this user owns.
pub fn directory_of(name: &str) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    give_to(name, directory.path());
    directory
}

/// Makes the user the owner of a file or directory, if the tests run as root.
pub fn give_to(name: &str, path: &Path) {
    if let Some(user) = user(name) {
        nix::unistd::chown(path, Some(user.uid), Some(user.gid)).unwrap();
    }
}

/// None if the tests do not run as root: then everything runs as their own user.
fn user(name: &str) -> Option<User> {
    let found = || User::from_name(name).unwrap().unwrap_or_else(|| panic!("there is no user {name}"));
    nix::unistd::geteuid().is_root().then(found)
}
