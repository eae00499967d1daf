//! `hooks/postgresql` and a server of Debian's package.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::unistd::Pid;

use crate::servers::{
    Server, as_user, directory_of, give_to, refuses_without_its_server, survives_a_server_that_hangs,
    survives_failures, wait_for,
};
use crate::support::{Ran, output};

struct PostgreSql {
    directory: tempfile::TempDir,
}

/// The programs of the newest version that is installed.
fn program(name: &str) -> PathBuf {
    let versions = fs::read_dir("/usr/lib/postgresql").expect("scripts/setup installs postgresql");
    let newest = versions.map(|entry| entry.unwrap().path()).max().expect("a version of PostgreSQL");
    newest.join("bin").join(name)
}

impl PostgreSql {
    fn new() -> Self {
        let server = Self { directory: directory_of("postgres") };
        let mut init = as_user("postgres", &program("initdb"));
        must(init.args(["-D", server.data().to_str().unwrap(), "-A", "trust", "-N", "-U", "postgres"]));
        server.start();
        server
    }

    fn start(&self) {
        let place = self.directory().display();
        let options =
            format!("-c listen_addresses='' -c unix_socket_directories={place} -c shared_buffers=16MB");
        let (data, log) = (self.data(), self.directory().join("log"));
        let mut start = as_user("postgres", &program("pg_ctl"));
        start.args([
            "-D",
            data.to_str().unwrap(),
            "-w",
            "-l",
            log.to_str().unwrap(),
            "-o",
            &options,
            "start",
        ]);
        // The server inherits the standard output: a wait for the end of that would last as long as the server.
        let status = start.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap();
        assert!(status.success(), "{}", fs::read_to_string(log).unwrap_or_default());
    }

    fn data(&self) -> PathBuf {
        self.directory().join("data")
    }

    fn stop(&self) {
        let mut stop = as_user("postgres", &program("pg_ctl"));
        must(stop.args(["-D", self.data().to_str().unwrap(), "-m", "immediate", "stop"]));
    }

    fn query(&self, query: &str) -> String {
        let mut psql = as_user("postgres", Path::new("/usr/bin/psql"));
        psql.env("PGHOST", self.directory()).args(["-XAt", "-U", "postgres", "-c", query, "postgres"]);
        must(&mut psql).stdout.trim().to_owned()
    }
}

impl Drop for PostgreSql {
    fn drop(&mut self) {
        let data = self.data();
        if data.join("postmaster.pid").exists() {
            let mut stop = as_user("postgres", &program("pg_ctl"));
            let _ = stop.args(["-D", data.to_str().unwrap(), "-m", "immediate", "stop"]).output();
        }
    }
}

fn must(command: &mut Command) -> Ran {
    let ran: Ran = output(command).into();
    assert_eq!(ran.code, Some(0), "{command:?}: {}{}", ran.stdout, ran.stderr);
    ran
}

impl Server for PostgreSql {
    const HOOK: &'static str = "postgresql";

    fn directory(&self) -> &Path {
        self.directory.path()
    }

    fn main_process(&self) -> Pid {
        let text = fs::read_to_string(self.data().join("postmaster.pid")).unwrap();
        Pid::from_raw(text.lines().next().unwrap().parse().unwrap())
    }

    fn environment(&self) -> String {
        format!("PGHOST={} PGUSER=postgres", self.directory().display())
    }

    fn is_held(&self) -> bool {
        let session = "select count(*) from pg_stat_activity where query like '%pg_backup_start%' and state = 'idle' \
                       and pid <> pg_backend_pid()";
        self.query(session) == "1"
    }
}

#[test]
fn the_labels_make_the_copy_a_base_backup() {
    let server = PostgreSql::new();
    let labels = server.directory().join("labels");
    let seen = server.directory().join("seen");
    let sessions = format!(
        " && psql -h {} -U postgres -XAtc \"select count(*) from pg_stat_activity where query like '%pg_backup_start%' \
         and state = 'idle'\" postgres >{}",
        server.directory().display(),
        seen.display()
    );
    let before = server.query("select checkpoint_lsn from pg_control_checkpoint()");
    server.query("create table t as select generate_series(1, 1000)");
    let ran: Ran = output(&mut server.copy(&format!("--labels {}", labels.display()), &sessions, &[])).into();
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert!(!ran.stderr.contains("--hook-after"), "{}", ran.stderr);
    assert_eq!(fs::read_to_string(&seen).unwrap().trim(), "1", "the server was in backup mode");
    assert!(!server.is_held(), "and is not any more");
    let label = fs::read_to_string(labels.join("backup_label")).unwrap();
    assert!(label.starts_with("START WAL LOCATION: ") && label.ends_with("START TIMELINE: 1\n"), "{label}");
    assert!(label.contains("\nLABEL: tidemark\n"), "{label}");
    assert!(!labels.join("tablespace_map").exists(), "there is no tablespace");
    let after = server.query("select checkpoint_lsn from pg_control_checkpoint()");
    assert_ne!(before, after, "a checkpoint was made right before the instant");

    // The label as PostgreSQL itself reads it: a server on the data with it recovers from that checkpoint. The labels
    // of other servers are refused.
    server.stop();
    let label = server.data().join("backup_label");
    fs::copy(labels.join("backup_label"), &label).unwrap();
    give_to("postgres", &label);
    server.start();
    let log = fs::read_to_string(server.directory().join("log")).unwrap();
    assert!(log.contains("consistent recovery state reached"), "{log}");
    assert_eq!(server.query("select count(*) from t"), "1000");
}

#[test]
fn a_tablespace_is_in_the_map() {
    let server = PostgreSql::new();
    let space = directory_of("postgres");
    server.query(&format!("create tablespace other location '{}'", space.path().display()));
    let labels = server.directory().join("labels");
    let ran: Ran = output(&mut server.copy(&format!("--labels {}", labels.display()), "", &[])).into();
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let map = fs::read_to_string(labels.join("tablespace_map")).unwrap();
    assert!(map.trim().ends_with(space.path().to_str().unwrap()), "{map}");
    server.query("drop tablespace other");
}

#[test]
fn backup_mode_ends_whatever_is_killed() {
    let server = PostgreSql::new();
    survives_failures(&server);
    // The server restarts in between: backup mode is gone, and the copy warns.
    let child = server.begin("");
    server.stop();
    server.start();
    wait_for("the session is gone", || !server.is_held());
    let ran = crate::servers::stop(child);
    assert!(ran.stderr.contains("did not last"), "{}", ran.stderr);
}

#[test]
fn a_server_that_does_not_answer_ends_the_copy() {
    let server = PostgreSql::new();
    survives_a_server_that_hangs(&server);
    server.stop();
    refuses_without_its_server(&server);
}
