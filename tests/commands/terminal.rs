//! On a terminal: questions, colours, progress bars, and no archive written to it.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Stdio};
use std::thread;

use super::support::{Bench, ok, random_seed, spawn, tidemark};

/// A pseudo terminal: our end and the command's.
fn terminal() -> (File, OwnedFd) {
    let size = nix::pty::Winsize { ws_row: 24, ws_col: 120, ws_xpixel: 0, ws_ypixel: 0 };
    let pty = nix::pty::openpty(Some(&size), None).unwrap();
    (File::from(pty.master), pty.slave)
}

/// Everything that the command writes to the terminal until it ends (EIO: the other end is closed).
fn read_all(mut ours: &File) -> String {
    let mut text = Vec::new();
    let mut part = [0u8; 4096];
    while let Ok(count) = ours.read(&mut part) {
        if count == 0 {
            break;
        }
        text.extend_from_slice(&part[..count]);
    }
    String::from_utf8_lossy(&text).into_owned()
}

fn finish(child: &mut Child, ours: &File) -> (Option<i32>, String) {
    let reader = ours.try_clone().unwrap();
    let reader = thread::spawn(move || read_all(&reader));
    let code = child.wait().unwrap().code();
    (code, reader.join().unwrap())
}

/// Runs with a terminal for input and messages, and types `answer`.
fn converse(arguments: &[&str], answer: &str, environment: &[(&str, &str)]) -> (Option<i32>, String) {
    let (mut ours, theirs) = terminal();
    let mut command = tidemark(arguments);
    command
        .env("TERM", "xterm")
        .env_remove("NO_COLOR")
        .envs(environment.iter().copied())
        .stdin(Stdio::from(theirs.try_clone().unwrap()))
        .stdout(Stdio::null())
        .stderr(Stdio::from(theirs));
    let mut child = spawn(&mut command);
    drop(command);
    ours.write_all(answer.as_bytes()).unwrap();
    finish(&mut child, &ours)
}

#[test]
fn the_plan_is_shown_and_the_answer_counts() {
    let bench = Bench::new(1 << 20, random_seed());
    ok(&["copy", &bench.origin(), &bench.path("copy.tdm")]);
    for (command, input) in [("copy", bench.origin()), ("restore", bench.path("copy.tdm"))] {
        let target = bench.path("target");
        fs::write(&target, b"precious").unwrap();
        for answer in ["n\n", "\n", "maybe\n", "\u{4}"] {
            let (code, text) = converse(&[command, &input, &target], answer, &[]);
            assert_eq!(code, Some(3), "{command} {answer:?}: {text}");
            assert!(text.contains("[y/N]") && text.contains(&input), "{command}: {text}");
            assert_eq!(bench.read("target"), b"precious", "{command} {answer:?}");
        }
        let (code, text) = converse(&[command, &input, &target], "y\n", &[]);
        assert_eq!(code, Some(0), "{command}: {text}");
        assert!(bench.read("target") == bench.content, "{command}");
    }
}

/// True if the text has a "select graphic rendition" sequence; cursor movements do not count.
fn has_colour(text: &str) -> bool {
    text.split("\x1b[")
        .skip(1)
        .any(|rest| rest.trim_start_matches(|c: char| c.is_ascii_digit() || c == ';').starts_with('m'))
}

#[test]
fn colours_only_where_they_are_wanted() {
    let bench = Bench::new(1000, random_seed());
    let missing = bench.path("missing");
    let (code, text) = converse(&["verify", &missing], "", &[]);
    assert!(code != Some(0) && text.contains("\x1b[31;1m"), "{text:?}");
    let (_, text) = converse(&["verify", &missing], "", &[("NO_COLOR", "1")]);
    assert!(!has_colour(&text), "{text:?}");
    let (_, text) = converse(&["copy", &bench.origin(), &bench.path("copy.img"), "--json"], "", &[]);
    assert!(!text.contains("\x1b["), "{text:?}");
}

#[test]
fn a_bar_is_drawn_on_a_terminal() {
    let bench = Bench::new(4 << 20, random_seed());
    let arguments = ["copy", &bench.origin(), &bench.path("copy.img"), "--rate", "2M"];
    let (code, text) = converse(&arguments, "", &[]);
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("copying") && text.contains('%') && text.contains("/s"), "{text:?}");
}

#[test]
fn an_archive_is_not_written_to_a_terminal() {
    let bench = Bench::new(1000, random_seed());
    let (ours, theirs) = terminal();
    let mut command = tidemark(&["copy", &bench.origin(), "-"]);
    command.stdout(Stdio::from(theirs)).stderr(Stdio::piped());
    let mut child = spawn(&mut command);
    drop(command);
    let (code, written) = finish(&mut child, &ours);
    assert_eq!((code, written.as_str()), (Some(2), ""));
    let mut stderr = String::new();
    child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
    assert!(stderr.contains("terminal"), "{stderr}");
}

#[test]
fn a_watch_redraws_the_terminal() {
    if !super::support::is_root() {
        return;
    }
    let (ours, theirs) = terminal();
    let mut command = tidemark(&["status", "--watch", "--count", "2", "--interval", "100ms"]);
    command.env("TERM", "xterm").stdout(Stdio::from(theirs)).stderr(Stdio::piped());
    let mut child = spawn(&mut command);
    drop(command);
    let (code, text) = finish(&mut child, &ours);
    assert_eq!(code, Some(0), "{text}");
    assert_eq!((text.matches("\x1b[2J").count(), text.matches("\x1b[H").count()), (1, 2), "{text:?}");
    assert!(text.contains("every 100ms"), "{text:?}");
}
