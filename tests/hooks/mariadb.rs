//! `hooks/mariadb` and a server of Debian's package.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::unistd::Pid;

use crate::servers::{
    Running, Server, refuses_without_its_server, survives_a_server_that_hangs, survives_failures, wait_for,
};
use crate::support::{Ran, output};

struct MariaDb {
    directory: tempfile::TempDir,
    process: Option<Running>,
}

impl MariaDb {
    fn new() -> Self {
        let mut server = Self { directory: tempfile::tempdir().unwrap(), process: None };
        let mut install = Command::new("mariadb-install-db");
        install.arg("--no-defaults").arg("--auth-root-authentication-method=normal");
        install
            .arg("--skip-test-db")
            .arg(server.temporary())
            .arg(server.option("datadir", "data"))
            .args(user());
        let ran: Ran = output(&mut install).into();
        assert_eq!(ran.code, Some(0), "{}{}", ran.stdout, ran.stderr);
        server.start();
        server.query("create database d; create table d.i (n int) engine=innodb").unwrap();
        server.query("create table d.m (n int) engine=myisam").unwrap();
        server
    }

    fn option(&self, name: &str, file: &str) -> String {
        format!("--{name}={}", self.directory().join(file).display())
    }

    /// A server that starts removes the temporary tables that it finds, also those of another server in /tmp.
    fn temporary(&self) -> String {
        self.option("tmpdir", "")
    }

    fn socket(&self) -> PathBuf {
        self.directory().join("socket")
    }

    fn start(&mut self) {
        let mut start = Command::new("/usr/sbin/mariadbd");
        start.args(["--no-defaults", "--skip-networking", "--innodb-buffer-pool-size=8M"]).args(user());
        start.arg(self.temporary());
        start.args([self.option("datadir", "data"), self.option("socket", "socket")]);
        start.arg(self.option("pid-file", "pid")).arg(self.option("log-error", "log"));
        self.process = Some(Running::start(&mut start));
        wait_for("MariaDB answers", || self.query("select 1").is_ok());
    }

    fn stop(&mut self) {
        self.process = None;
    }

    fn query(&self, query: &str) -> Result<String, String> {
        let mut client = Command::new("mariadb");
        client
            .args(["--no-defaults", "-N", "-B", "-u", "root", "-e", query])
            .arg("--socket")
            .arg(self.socket());
        let ran: Ran = output(client.stdin(Stdio::null())).into();
        if ran.code == Some(0) { Ok(ran.stdout.trim().to_owned()) } else { Err(ran.stderr) }
    }

    /// True if a change of this table would wait.
    fn is_blocked(&self, table: &str) -> bool {
        match self.query(&format!("set lock_wait_timeout=0; insert into d.{table} values (1)")) {
            Ok(_) => false,
            Err(error) => {
                assert!(error.contains("Lock wait timeout"), "{error}");
                true
            }
        }
    }
}

/// The server refuses to run as root unless that is asked for.
fn user() -> Option<&'static str> {
    nix::unistd::geteuid().is_root().then_some("--user=root")
}

impl Server for MariaDb {
    const HOOK: &'static str = "mariadb";

    fn directory(&self) -> &Path {
        self.directory.path()
    }

    fn main_process(&self) -> Pid {
        self.process.as_ref().unwrap().id()
    }

    fn options(&self) -> String {
        let defaults = self.directory().join("client.cnf");
        fs::write(&defaults, format!("[client]\nuser=root\nsocket={}\n", self.socket().display())).unwrap();
        format!("--defaults {}", defaults.display())
    }

    fn is_held(&self) -> bool {
        self.is_blocked("i")
    }
}

#[test]
fn no_table_is_written_at_the_instant() {
    let server = MariaDb::new();
    let child = server.begin("");
    assert!(server.is_blocked("i") && server.is_blocked("m"), "neither engine is written");
    let created = server.query("set lock_wait_timeout=0; create table d.new (n int)");
    assert!(created.unwrap_err().contains("Lock wait timeout"), "nor a definition changed");
    server.query("select count(*) from d.i").expect("readers go on");
    let ran = crate::servers::stop(child);
    assert!(!ran.stderr.contains("--hook-after"), "{}", ran.stderr);
    assert!(!server.is_blocked("i") && !server.is_blocked("m"));
    // A copy that is complete.
    let ran: Ran = output(&mut server.copy("", "", &[])).into();
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert!(server.target_exists() && !ran.stderr.contains("--hook-after"), "{}", ran.stderr);
    assert!(!server.is_held());
}

#[test]
fn commits_go_on_whatever_is_killed() {
    let mut server = MariaDb::new();
    survives_failures(&server);
    let child = server.begin("");
    server.stop();
    server.start();
    assert!(!server.is_held());
    let ran = crate::servers::stop(child);
    assert!(ran.stderr.contains("did not last"), "{}", ran.stderr);
}

#[test]
fn a_server_that_does_not_answer_ends_the_copy() {
    let mut server = MariaDb::new();
    survives_a_server_that_hangs(&server);
    server.stop();
    refuses_without_its_server(&server);
}
