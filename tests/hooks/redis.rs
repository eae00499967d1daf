//! `hooks/redis` and a server of Debian's package.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::sys::signal::Signal;
use nix::unistd::Pid;

use crate::servers::{Running, Server, refuses_without_its_server, send, unpacked, wait_for};
use crate::support::{Ran, output};

struct Redis {
    directory: tempfile::TempDir,
    process: Option<Running>,
}

impl Redis {
    fn new(options: &[&str]) -> Self {
        let mut server = Self { directory: tempfile::tempdir().unwrap(), process: None };
        server.start(server.directory.path().to_owned(), options);
        server
    }

    /// A server on what a copy of `files` holds.
    fn on_copy_of(files: &Path, options: &[&str]) -> Self {
        let mut server = Self { directory: tempfile::tempdir().unwrap(), process: None };
        let ran: Ran = output(Command::new("cp").arg("-aT").arg(files).arg(server.directory.path())).into();
        assert_eq!(ran.code, Some(0), "{}", ran.stderr);
        server.start(server.directory.path().to_owned(), options);
        server
    }

    fn start(&mut self, data: PathBuf, options: &[&str]) {
        let mut start = Command::new(unpacked("usr/bin/redis-server"));
        start.args(["--port", "0", "--save", "", "--dir"]).arg(data);
        start.arg("--unixsocket").arg(self.socket()).args(options);
        self.process = Some(Running::start(&mut start));
        wait_for("Redis answers", || self.ask(&["dbsize"]).parse::<u64>().is_ok());
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("socket")
    }

    fn ask(&self, words: &[&str]) -> String {
        let mut client = Command::new("redis-cli");
        let ran: Ran = output(client.arg("-s").arg(self.socket()).args(words).stdin(Stdio::null())).into();
        ran.stdout.trim().to_owned()
    }

    fn stop(&mut self) {
        self.process = None;
    }
}

impl Server for Redis {
    const HOOK: &'static str = "redis";

    fn directory(&self) -> &Path {
        self.directory.path()
    }

    fn main_process(&self) -> Pid {
        self.process.as_ref().unwrap().id()
    }

    fn options(&self) -> String {
        format!("--socket {}", self.socket().display())
    }

    fn is_held(&self) -> bool {
        false
    }
}

/// A copy that has to succeed without a word of the hook.
fn copies(server: &Redis, and: &str) {
    let ran: Ran = output(&mut server.copy("", and, &[])).into();
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert!(server.target_exists() && !ran.stderr.contains("hook"), "{}", ran.stderr);
}

#[test]
fn the_copy_has_what_was_written_before_the_hook() {
    let server = Redis::new(&["--appendonly", "no"]);
    server.ask(&["set", "old", "1"]);
    server.ask(&["save"]);
    server.ask(&["set", "key", "before"]);
    let files = server.directory().join("files");
    // What the device would hold at the instant.
    copies(
        &server,
        &format!(" && mkdir {0} && cp {1}/dump.rdb {0}", files.display(), server.directory().display()),
    );
    let other = Redis::on_copy_of(&files, &["--appendonly", "no"]);
    assert_eq!(other.ask(&["get", "key"]), "before", "without the hook, only the old dump is there");
}

#[test]
fn a_dump_that_runs_already_is_not_mistaken_for_the_new_one() {
    let server = Redis::new(&["--appendonly", "no"]);
    for key in 0..200 {
        server.ask(&["set", &format!("key{key}"), "1"]);
    }
    // Each key takes 5 ms to be dumped.
    server.ask(&["config", "set", "rdb-key-save-delay", "5000"]);
    server.ask(&["bgsave"]);
    server.ask(&["set", "key", "new"]);
    let files = server.directory().join("files");
    copies(
        &server,
        &format!(" && mkdir {0} && cp {1}/dump.rdb {0}", files.display(), server.directory().display()),
    );
    let other = Redis::on_copy_of(&files, &["--appendonly", "no"]);
    assert_eq!(other.ask(&["get", "key"]), "new");
}

#[test]
fn a_server_with_an_append_only_file_needs_no_dump() {
    let server = Redis::new(&["--appendonly", "yes"]);
    server.ask(&["set", "key", "1"]);
    let saves = server.ask(&["lastsave"]);
    let files = server.directory().join("files");
    let copy = format!(
        " && mkdir {0} && cp -a {1}/appendonlydir {0}",
        files.display(),
        server.directory().display()
    );
    copies(&server, &copy);
    assert_eq!(server.ask(&["lastsave"]), saves, "no dump was made");
    assert!(!server.directory().join("dump.rdb").exists());
    let other = Redis::on_copy_of(&files, &["--appendonly", "yes"]);
    assert_eq!(other.ask(&["get", "key"]), "1");
}

#[test]
fn a_dump_that_fails_or_takes_too_long_ends_the_copy() {
    let mut server = Redis::new(&["--appendonly", "no"]);
    let fails = |server: &Redis, options: &str, words: &[&str], why: &str| {
        let ran: Ran = output(&mut server.copy(options, "", words)).into();
        assert_eq!(ran.code, Some(1), "{}", ran.stderr);
        assert!(ran.stderr.contains(why), "no word of '{why}': {}", ran.stderr);
        assert!(!server.target_exists());
    };
    for key in 0..100 {
        server.ask(&["set", &format!("key{key}"), "1"]);
    }
    server.ask(&["config", "set", "rdb-key-save-delay", "200000"]);
    fails(&server, "--limit 1", &[], "the limit of 1 s is over");
    fails(&server, "", &["--hook-timeout", "1s"], "ran past --hook-timeout");
    // The dump ends as the child that writes it is killed.
    let children = format!("/proc/{0}/task/{0}/children", server.main_process());
    let child = fs::read_to_string(children).unwrap();
    send(child.trim().parse().expect("the child that dumps"), Signal::SIGKILL);
    wait_for("the dump ends", || server.ask(&["info", "persistence"]).contains("rdb_bgsave_in_progress:0"));
    server.ask(&["config", "set", "rdb-key-save-delay", "0"]);
    // A directory cannot be replaced by a file.
    fs::create_dir(server.directory().join("dump.rdb")).unwrap();
    fs::write(server.directory().join("dump.rdb/file"), "").unwrap();
    fails(&server, "", &[], "could not write its dump");
    // The server hangs.
    nix::sys::signal::kill(server.main_process(), Signal::SIGSTOP).unwrap();
    fails(&server, "--limit 1", &[], "does not answer");
    nix::sys::signal::kill(server.main_process(), Signal::SIGCONT).unwrap();
    // A password is needed.
    server.ask(&["config", "set", "requirepass", "secret"]);
    fails(&server, "", &[], "NOAUTH");
    fs::remove_dir_all(server.directory().join("dump.rdb")).unwrap();
    let password = "export REDISCLI_AUTH=secret; ";
    let ran: Ran = output(&mut server.copy_with(password, "", "", &[])).into();
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    server.stop();
    refuses_without_its_server(&server);
}
