//! `tidemark status`, once and repeatedly. What it shows depends on the machine and is not checked.

use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::support::{interruptible, is_root, json_lines, ok, run, spawn};

#[test]
fn what_only_a_watch_has_needs_one() {
    for arguments in [
        vec!["--interval", "1s"],
        vec!["--count", "1"],
        vec!["--watch", "--count", "0"],
        vec!["--watch", "--count", "-1"],
        vec!["--watch", "--interval", "2"],
        vec!["--watch", "--interval", "50ms"],
    ] {
        let ran = run(&[vec!["status"], arguments.clone()].concat());
        assert_eq!((ran.code, ran.stdout.as_str()), (Some(2), ""), "{arguments:?}: {}", ran.stderr);
        assert!(ran.stderr.contains("--"), "{arguments:?}: {}", ran.stderr);
    }
}

#[test]
fn a_watch_looks_as_often_as_it_is_told_to() {
    if !is_root() {
        return;
    }
    let begin = Instant::now();
    let ran = ok(&["status", "--watch", "--count", "3", "--interval", "200ms", "--json"]);
    assert!(begin.elapsed() >= Duration::from_millis(400), "{:?}", begin.elapsed());
    let lines = json_lines(&ran.stdout);
    assert_eq!(lines.len(), 3, "{}", ran.stdout);
    for line in &lines {
        assert_eq!((line["type"].as_str(), line["command"].as_str()), (Some("result"), Some("status")));
        assert!(line["report"]["jobs"].is_array(), "{line}");
    }
    let ran = ok(&["status", "--watch", "--count", "2", "--interval", "100ms"]);
    assert!(ran.stdout.contains("\n\n") && !ran.stdout.contains('\x1b'), "{}", ran.stdout);
    assert_eq!(ran.stderr, "");
}

#[test]
fn an_interrupted_watch_has_ended_well() {
    if !is_root() {
        return;
    }
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let mut command = interruptible(&["status", "--watch", "--interval", "30m", "--json"]);
        let mut child = spawn(command.stdout(Stdio::piped()).stderr(Stdio::piped()));
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(json_lines(&line).len(), 1);
        kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), signal).unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{signal}: {}", String::from_utf8_lossy(&output.stderr));
        assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}
