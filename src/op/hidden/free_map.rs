//! An entry point for the VM cases that maps an origin's free space.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use crate::base::limits::FREE_MAP_TIME_MAX;
use crate::base::{Error, Result, ResultExt};
use crate::sys::freeze;
use crate::volume::free::{FreeMapper, MapDeadlines, MapRequest};

/// `__free_map REPORT MAJOR:MINOR HOOK MOUNT-POINT...`: prepares, runs HOOK, freezes, reads the map of the device,
/// writes it to REPORT ("free START END" and "log START END" in bytes, "note TEXT", "changed" if the second scan finds
/// other devices, "took MICROSECONDS"), waits for the end of standard input, thaws.
pub const ARGUMENT: &str = "__free_map";

/// Runs the entry point.
///
/// # Errors
/// Any error of its steps.
pub fn run(report: &Path, words: &[String]) -> Result<()> {
    let [origin, hook, mounts @ ..] = words else {
        return Err(Error::usage("__free_map REPORT MAJOR:MINOR HOOK MOUNT-POINT..."));
    };
    let mounts: Vec<PathBuf> = mounts.iter().map(PathBuf::from).collect();
    let mapper = FreeMapper::prepare(origin.parse()?, &mounts, MapRequest { free: true, omission: None })?;
    let hooked = Command::new("sh").args(["-ec", hook]).status().io_context(|| hook.clone())?;
    if !hooked.success() {
        return Err(Error::usage(format!("{hook}: {hooked}")));
    }
    let files = mounts.iter().map(|point| File::open(point).io_context(|| point.display().to_string()));
    let files = files.collect::<Result<Vec<File>>>()?;
    for file in &files {
        freeze::freeze(file).io_context(|| "freezing".to_owned())?;
    }
    let begin = Instant::now();
    let (free, mut layout) = mapper.read(MapDeadlines { free: begin + FREE_MAP_TIME_MAX, omission: begin });
    let took = begin.elapsed();
    let mut text = String::new();
    if layout.is_unchanged() {
        for extent in &free.extents {
            let _ = writeln!(text, "free {} {}", extent.start().get(), extent.end().get());
        }
        for extent in &free.logs {
            let _ = writeln!(text, "log {} {}", extent.start().get(), extent.end().get());
        }
    } else {
        text.push_str("changed\n");
    }
    for note in &free.notes {
        let _ = writeln!(text, "note {note}");
    }
    let _ = writeln!(text, "took {}", took.as_micros());
    // Renamed into place, because the script waits for the complete file.
    let unfinished = report.with_extension("new");
    let written = fs::write(&unfinished, text).and_then(|()| fs::rename(&unfinished, report));
    let written = written.io_context(|| report.display().to_string());
    let mut rest = Vec::new();
    let _ = std::io::stdin().read_to_end(&mut rest);
    for file in files.iter().rev() {
        freeze::thaw(file).io_context(|| "thawing".to_owned())?;
    }
    written
}
