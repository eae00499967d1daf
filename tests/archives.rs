//! Archives made by the command: `copy`, `restore`, `verify`, `inspect` and an independent reader, which shares no code
//! with them, must agree.

#![allow(clippy::unwrap_used)] // a test panics, and says so

#[path = "commands/support.rs"]
#[allow(dead_code, clippy::print_stdout)] // shared with the command contracts, which use all of it
mod support;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use support::{Ran, run, tidemark};

/// Data, zeros, and an end within a sector.
const ORIGIN_BYTES: usize = 5 * (1 << 20) + 777;

struct Place {
    directory: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let place = Self { directory: tempfile::tempdir().unwrap() };
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut content = Vec::with_capacity(ORIGIN_BYTES + 8);
        while content.len() < ORIGIN_BYTES {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            content.extend_from_slice(&state.to_le_bytes());
        }
        content.truncate(ORIGIN_BYTES);
        content[1 << 20..3 << 20].fill(0);
        fs::write(place.path("origin"), content).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    fn ok(&self, words: &[&str]) -> Ran {
        let ran = self.ran(words);
        assert_eq!(ran.code, Some(0), "{words:?}: {}", ran.stderr);
        ran
    }

    /// Runs the command; a word that begins with `@` names a file of the place.
    fn ran(&self, words: &[&str]) -> Ran {
        let words: Vec<String> = words
            .iter()
            .map(|word| word.strip_prefix('@').map_or_else(|| (*word).to_owned(), |name| self.text(name)))
            .collect();
        run(&words.iter().map(String::as_str).collect::<Vec<_>>())
    }

    fn same(&self, name: &str) -> bool {
        fs::read(self.path(name)).unwrap() == fs::read(self.path("origin")).unwrap()
    }
}

fn independent_reader(arguments: &[&Path]) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/archive_reader.py");
    let status = Command::new("python3").arg(script).arg("extract").args(arguments).status();
    assert!(status.expect("python3 is installed by scripts/test").success());
}

#[test]
fn what_copy_writes_every_reader_reads() {
    let place = Place::new();
    for segment in ["64KiB", "1MiB", "4MiB"] {
        for name in ["a.tdm", "out", "again"] {
            let _ = fs::remove_file(place.path(name));
        }
        place.ok(&["copy", "@origin", "@a.tdm", "--segment", segment]);
        independent_reader(&[&place.path("a.tdm"), &place.path("out")]);
        assert!(place.same("out"));
        place.ok(&["restore", "@a.tdm", "@again"]);
        assert!(place.same("again"));
        place.ok(&["verify", "@a.tdm"]);
        place.ok(&["verify", "@a.tdm", "--against", "@origin"]);
        let inspected = place.ok(&["inspect", "@a.tdm", "--json"]);
        let value: serde_json::Value = serde_json::from_str(inspected.stdout.trim()).unwrap();
        assert_eq!(value["report"]["superblock"]["origin_size"], ORIGIN_BYTES);
    }
}

#[test]
fn a_pipe_carries_the_same() {
    let place = Place::new();
    let archive = File::create(place.path("a.tdm")).unwrap();
    let mut copy = tidemark(&["copy", &place.text("origin"), "-"]);
    assert!(copy.stdout(archive).stderr(Stdio::null()).status().unwrap().success());
    independent_reader(&[&place.path("a.tdm"), &place.path("out")]);
    assert!(place.same("out"));
    let mut restore = tidemark(&["restore", "-", &place.text("again")]);
    restore.stdin(File::open(place.path("a.tdm")).unwrap()).stderr(Stdio::null());
    assert!(restore.status().unwrap().success());
    assert!(place.same("again"));
}

#[test]
fn bad_archives_end_with_exit_code_4_and_no_file() {
    let place = Place::new();
    place.ok(&["copy", "@origin", "@a.tdm", "--segment", "64KiB"]);
    let whole = fs::read(place.path("a.tdm")).unwrap();
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 1;
    for bad in [&whole[..whole.len() - 4096], &flipped[..], b"no archive at all"] {
        fs::write(place.path("bad.tdm"), bad).unwrap();
        let ran = place.ran(&["restore", "@bad.tdm", "@out"]);
        assert_eq!(ran.code, Some(4), "{}", ran.stderr);
        assert!(!place.path("out").exists());
        assert_eq!(place.ran(&["verify", "@bad.tdm"]).code, Some(4));
    }
    let mut other = fs::read(place.path("origin")).unwrap();
    other[2 << 20] = 1;
    fs::write(place.path("other"), other).unwrap();
    let ran = place.ran(&["verify", "@a.tdm", "--against", "@other"]);
    assert_eq!(ran.code, Some(4));
    assert!(ran.stderr.contains("in 1 ranges, 512 bytes: 2097152..2097664"), "{}", ran.stderr);
    let names = fs::read_dir(place.directory.path()).unwrap().count();
    assert_eq!(names, 4, "origin, a.tdm, bad.tdm, other");
}
