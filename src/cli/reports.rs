//! Reports as text: a few aligned lines, sizes with units.

use std::time::Duration;

use crate::base::{Bytes, escape};
use crate::cli::meter::{duration_text, view_texts};
use crate::dm::SnapshotStatus;
use crate::format::archive::{OriginalsMode, Superblock, Totals};
use crate::op::archive_merge::MergePlan;
use crate::op::attach::Attached;
use crate::op::copy::CopyOutcome;
use crate::op::copy::report::GroupOutcome;
use crate::op::copy::report::SkippedReport;
use crate::op::detach::Detached;
use crate::op::doctor;
use crate::op::inspect::InspectReport;
use crate::op::raw_secondary::{RawSecondary, RawVerifyReport};
use crate::op::recover::RecoverReport;
use crate::op::restore_plan::{RestorePlan, TargetKind};
use crate::op::snapshot::list::{SnapshotView, State};
use crate::op::status::{DiskStatus, DiskWait, JobStatus, Status, VolumeStatus};
use crate::restore::ArchiveSource;
use crate::restore::compare::VerifyReport;
use crate::restore::merge::MergeReport;
use crate::restore::writer::RestoreReport;

/// A value that can be shown as text.
pub trait Human {
    /// The text, lines ended by newlines.
    fn human(&self) -> String;
}

/// Lines of "name: value", values aligned.
#[derive(Default)]
struct Lines(Vec<(&'static str, String)>);

impl Lines {
    fn add(&mut self, name: &'static str, value: impl ToString) -> &mut Self {
        self.0.push((name, value.to_string()));
        self
    }

    fn finish(&self) -> String {
        let width = self.0.iter().map(|(name, _)| name.len()).max().unwrap_or(0) + 1;
        let line = |(name, value): &(&str, String)| {
            let name = format!("{name}:");
            format!("{name:width$} {value}\n")
        };
        self.0.iter().map(line).collect()
    }
}

/// "1.5 GiB (1610612736 bytes)".
fn exact(size: Bytes) -> String {
    if size.get() < 1024 { format!("{} bytes", size.get()) } else { format!("{size} ({} bytes)", size.get()) }
}

/// "12 s", with tenths below ten seconds: "1.2 s".
fn seconds_text(seconds: f64) -> String {
    match Duration::try_from_secs_f64(seconds) {
        Ok(time) if time < Duration::from_secs(10) => format!("{seconds:.1} s"),
        Ok(time) => duration_text(time),
        Err(_) => "an unknown time".to_owned(),
    }
}

/// ", 400 MiB/s", or nothing if the time is too short for a rate.
fn rate_text(size: Bytes, seconds: f64) -> String {
    let millis = Duration::try_from_secs_f64(seconds).map_or(0, |time| time.as_millis());
    match (u128::from(size.get()) * 1000).checked_div(millis).map(u64::try_from) {
        Some(Ok(rate)) if millis >= 100 => format!(", {}/s", Bytes(rate)),
        _ => String::new(),
    }
}

fn instant_text(superblock: &Superblock) -> String {
    crate::base::clock::utc_text(superblock.instant_utc_ns).unwrap_or_else(|| "unknown".to_owned())
}

fn originals_text(mode: OriginalsMode, totals: &Totals) -> String {
    match mode {
        OriginalsMode::None => "none: the origin was not in use".to_owned(),
        OriginalsMode::Overlay => "applied to the data".to_owned(),
        OriginalsMode::Append => format!("{} after the data, applied by restore", totals.originals_bytes),
    }
}

fn origin_text(superblock: &Superblock) -> String {
    let (name, path) = (escape::word(&superblock.origin_name), escape::word(&superblock.origin_path));
    if name.is_empty() || name == path { path.into_owned() } else { format!("{name} ({path})") }
}

/// Whether the snapshot's device still shows the instant.
fn preserved_text(preserved: Option<Bytes>, size: Option<Bytes>) -> String {
    match (preserved, size) {
        (Some(preserved), Some(size)) if preserved == size => "shows the instant".to_owned(),
        (Some(preserved), Some(size)) => {
            format!("{preserved} of {size} still preserved: only the copy shows the instant")
        }
        _ => "no writes of the origin go through it".to_owned(),
    }
}

fn skipped_text(skipped: &SkippedReport) -> String {
    if skipped.bytes == Bytes::ZERO {
        return "copied with the rest".to_owned();
    }
    let omitted = skipped.omitted_bytes.map(|bytes| format!(" ({bytes} of it left out)")).unwrap_or_default();
    format!("{} in {} ranges, not copied{omitted}", skipped.bytes, skipped.ranges)
}

impl Human for GroupOutcome {
    fn human(&self) -> String {
        let mut lines = Lines::default();
        lines
            .add("instant", &self.instant.utc)
            .add("frozen", format!("{:.1} ms", self.instant.frozen_ms))
            .add("suspended", format!("{:.1} ms", self.instant.suspended_ms));
        let mut text = lines.finish();
        for one in &self.origins {
            text.push('\n');
            match (&one.copy, &one.error) {
                (Some(copy), _) => text.push_str(&copy.human()),
                (None, Some(error)) => {
                    text.push_str(&format!("NOT COPIED: {} to {}: {error}\n", one.origin, one.secondary));
                }
                (None, None) => {}
            }
        }
        text + &format!("\ntook: {}\n", seconds_text(self.total_seconds))
    }
}

impl Human for CopyOutcome {
    fn human(&self) -> String {
        let copy = &self.copy;
        let mut lines = Lines::default();
        lines
            .add("copied", format!("{} to {}", self.origin, copy.secondary))
            .add("size", exact(self.origin_bytes))
            .add("instant", &self.instant.utc)
            .add(
                "data",
                format!(
                    "{} and {} of zeros in {}{}",
                    copy.data_bytes,
                    copy.zero_bytes,
                    seconds_text(copy.data_seconds),
                    rate_text(copy.read_bytes, copy.data_seconds)
                ),
            );
        if let Some(since) = &self.since {
            let changed = format!("{} chunks, {}", since.changed_chunks, since.changed_bytes);
            lines
                .add("since", format!("{}, which {} holds", since.base, since.parent.display()))
                .add("changed", format!("{changed}; moved: {}", since.moved_bytes));
            if let Some(check) = &since.check {
                lines
                    .add("read first", format!("{} of {} segments, as recorded", check.read, check.segments));
            }
        }
        if let Some(store) = &self.store {
            let held = &self.instant;
            lines
                .add("frozen", format!("{:.1} ms", held.frozen_ms))
                .add("suspended", format!("{:.1} ms", held.suspended_ms))
                .add("free space", skipped_text(&self.skipped))
                .add("originals", format!("{}, {}", copy.originals_count, copy.originals_bytes))
                .add("store", format!("{} used of {}", store.used_bytes, store.total_bytes));
        }
        if let Some(release) = &self.release {
            lines.add(
                "released",
                format!(
                    "{} in {} releases, the longest {:.1} ms",
                    release.released_bytes,
                    release.releases,
                    release.longest_stall.as_secs_f64() * 1000.0
                ),
            );
            if release.holds > 0 {
                let held = seconds_text(release.held.as_secs_f64());
                lines.add(
                    "held",
                    format!("{held} in {} holds, because the store was about to fill", release.holds),
                );
            }
        }
        if let Some(kept) = &self.kept_store {
            lines.add("store kept", kept);
        }
        if let Some(verified) = copy.verified_bytes {
            lines.add("verified", format!("{verified} read again and equal"));
        }
        lines.add("took", seconds_text(self.total_seconds));
        lines.finish()
    }
}

impl Human for InspectReport {
    fn human(&self) -> String {
        let block = &self.superblock;
        let mut lines = Lines::default();
        lines
            .add("archive", format!("{}, {}", self.archive, exact(self.archive_bytes)))
            .add("identity", block.archive)
            .add("format", format!("version {}, written by {}", self.version, escape::word(&block.tool)))
            .add("origin", origin_text(block))
            .add("origin size", exact(block.origin_size))
            .add("instant", instant_text(block))
            .add("segment", format!("{}, {} of them", block.segment, self.segments))
            .add("chunk", block.chunk);
        add_lineage(&mut lines, self);
        lines
            .add("originals", originals_text(block.originals, &self.totals))
            .add("present", exact(self.map.present_bytes))
            .add("zero", exact(self.map.zero_bytes))
            .add("absent", exact(self.map.absent_bytes));
        if block.is_increment() {
            lines.add("inherited", exact(self.map.inherited_bytes));
        }
        lines.finish()
    }
}

impl Human for RawSecondary {
    fn human(&self) -> String {
        let mut lines = Lines::default();
        lines
            .add("raw copy", format!("{}, {}", self.secondary.display(), exact(self.size)))
            .add("state", &self.text)
            .add("increments", format!("--since {} (snapshot {})", self.base, self.base_id.simple()))
            .add("segment", self.segment)
            .add("absent", exact(self.absent_bytes));
        let is_recognized = match self.is_proven {
            Some(true) => "by its own facts",
            _ => "only by its content: an increment reads all of it first",
        };
        lines.add("recognized", is_recognized);
        lines.finish()
    }
}

impl Human for RawVerifyReport {
    fn human(&self) -> String {
        format!(
            "{}: every segment is as recorded; {} checked in {}{}\nit {}\n",
            self.secondary.secondary.display(),
            self.verified_bytes,
            seconds_text(self.seconds),
            rate_text(self.verified_bytes, self.seconds),
            self.secondary.text
        )
    }
}

/// The snapshot that an archive shows, and what it continues.
fn add_lineage(lines: &mut Lines, report: &InspectReport) {
    let block = &report.superblock;
    if !block.snapshot.is_nil() {
        lines.add("snapshot", block.snapshot.simple());
    }
    if block.is_increment() {
        let found = match &report.parent {
            Some(path) => path.display().to_string(),
            None => "not in this directory".to_owned(),
        };
        lines.add("continues", format!("{} ({found})", block.parent)).add("since", block.base.simple());
    }
}

impl Human for VerifyReport {
    fn human(&self) -> String {
        let read = self.totals.present_bytes + self.totals.originals_bytes;
        let mut text = format!(
            "{}: every block is good; {read} checked in {}{}\n",
            self.archive,
            seconds_text(self.seconds),
            rate_text(read, self.seconds)
        );
        for parent in &self.parents {
            text.push_str(&format!("{parent}, which it needs: every block is good\n"));
        }
        if let Some(against) = &self.against {
            text.push_str(&format!("{against}: equal, {} compared", self.compared_bytes));
            if self.absent_bytes > Bytes::ZERO {
                text.push_str(&format!(", {} not in the archive and not compared", self.absent_bytes));
            }
            text.push('\n');
        }
        text
    }
}

impl Human for RestoreReport {
    fn human(&self) -> String {
        let block = &self.superblock;
        let mut lines = Lines::default();
        lines
            .add("restored", format!("{} to {}", self.archive, self.target))
            .add("origin", format!("{}, {}", origin_text(block), exact(block.origin_size)))
            .add("instant", instant_text(block));
        add_parents(&mut lines, &self.parents);
        lines.add(
            "written",
            format!(
                "{} in {}{}",
                self.written_bytes,
                seconds_text(self.seconds),
                rate_text(self.written_bytes, self.seconds)
            ),
        );
        if self.zeroed_bytes > Bytes::ZERO {
            let how = if self.discarded_bytes > Bytes::ZERO { ", discarded" } else { "" };
            lines.add("zeroed", format!("{}{how}", self.zeroed_bytes));
        }
        lines.finish()
    }
}

impl Human for MergePlan {
    fn human(&self) -> String {
        let mut lines = Lines::default();
        let archives: Vec<String> = self.archives.iter().map(|path| path.display().to_string()).collect();
        lines
            .add("merge", archives.join(", "))
            .add("to", self.request.merged.display())
            .add("data", exact(self.bytes));
        if let Some(overwrites) = &self.target.overwrites {
            lines.add("overwrites", overwrites);
        }
        for warning in &self.target.warnings {
            lines.add("warning", warning);
        }
        lines.finish()
    }
}

impl Human for MergeReport {
    fn human(&self) -> String {
        let mut lines = Lines::default();
        lines
            .add("merged", self.archives.join(", "))
            .add("to", format!("{}, {}", self.merged, exact(self.written_bytes)))
            .add("identity", self.archive)
            .add("data", format!("{} of {} are still needed", self.kept_bytes, self.read_bytes))
            .add("in", seconds_text(self.seconds));
        lines.finish()
    }
}

fn add_parents(lines: &mut Lines, parents: &[String]) {
    if !parents.is_empty() {
        lines.add("with", parents.join(", "));
    }
}

impl Human for RestorePlan {
    fn human(&self) -> String {
        let target = self.request.target.display();
        let archive = match &self.request.archive {
            ArchiveSource::Pipe => "standard input".to_owned(),
            ArchiveSource::Path(path) => path.display().to_string(),
        };
        let mut lines = Lines::default();
        lines.add("restore", archive);
        if let Some(found) = &self.archive {
            lines
                .add(
                    "origin",
                    format!("{}, {}", origin_text(&found.superblock), exact(found.superblock.origin_size)),
                )
                .add("instant", instant_text(&found.superblock));
        }
        add_parents(&mut lines, &self.parents);
        lines.add(
            "to",
            match self.target_kind {
                TargetKind::Device => format!("the device {target}"),
                TargetKind::ExistingFile => format!("the file {target}, which is replaced once complete"),
                TargetKind::NewFile => format!("a new file {target}"),
            },
        );
        if let Some(overwrites) = &self.target.overwrites {
            lines.add("overwrites", overwrites);
        }
        for warning in &self.target.warnings {
            lines.add("warning", warning);
        }
        lines.finish()
    }
}

/// "next: COMMAND" for each.
fn next_text(next: &[String]) -> String {
    next.iter().map(|line| format!("next: {line}\n")).collect()
}

impl Human for Attached {
    fn human(&self) -> String {
        let mut lines = Lines::default();
        lines
            .add("attached", format!("{} as {}", self.device.display(), self.path.display()))
            .add("size", exact(self.size));
        if let Some(unit) = &self.unit {
            lines.add("unit", unit.display());
        }
        lines.finish() + &next_text(&self.next)
    }
}

impl Human for Detached {
    fn human(&self) -> String {
        let mut text = format!("detached: {}\n", self.name);
        if let Some(unit) = &self.unit {
            text.push_str(&format!("removed:  {}\n", unit.display()));
        }
        text + &next_text(&self.next)
    }
}

impl Human for RecoverReport {
    fn human(&self) -> String {
        let mut text: String = self.done.iter().map(|done| format!("done: {done}\n")).collect();
        if self.done.is_empty() {
            text.push_str("nothing was left behind\n");
        }
        for job in &self.running {
            text.push_str(&format!("left alone: job {job}, which is running\n"));
        }
        text
    }
}

/// Rows with aligned columns; the last column is not padded.
fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns)
        .map(|at| {
            rows.iter().filter_map(|row| row.get(at)).map(|cell| cell.chars().count()).max().unwrap_or(0)
        })
        .collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line.push_str(&format!("{cell:width$}  "));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

pub fn row(cells: &[&str]) -> Vec<String> {
    cells.iter().map(|cell| (*cell).to_owned()).collect()
}

fn snapshot_text(status: &SnapshotStatus) -> String {
    match status {
        SnapshotStatus::Active { used, total, .. } => {
            format!("good, store {} of {}", used.bytes(), total.bytes())
        }
        SnapshotStatus::Invalid => "INVALID: its store failed".to_owned(),
        SnapshotStatus::Overflow => "LOST: its store was full".to_owned(),
        SnapshotStatus::MergeFailed => "merge failed".to_owned(),
        SnapshotStatus::Unknown => "unknown".to_owned(),
        SnapshotStatus::Other { text } => text.clone(),
    }
}

fn volume_row(volume: &VolumeStatus) -> Vec<String> {
    let mounted: Vec<String> = volume.mounted_at.iter().map(|path| path.display().to_string()).collect();
    vec![
        volume.name.clone(),
        if volume.number.is_some() { "attached".to_owned() } else { "not attached".to_owned() },
        volume.size.map_or_else(|| "-".to_owned(), |size| size.to_string()),
        volume.device.clone().unwrap_or_else(|| "-".to_owned()),
        if mounted.is_empty() { "-".to_owned() } else { mounted.join(" ") },
    ]
}

fn job_row(job: &JobStatus) -> Vec<String> {
    let or_dash = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".to_owned());
    vec![
        job.id.clone(),
        if job.alive { "running".to_owned() } else { "DEAD".to_owned() },
        or_dash(&job.command),
        job.process.map_or_else(|| "-".to_owned(), |process| process.to_string()),
        or_dash(&job.started),
        or_dash(&job.origin),
        or_dash(&job.step),
    ]
}

fn disk_row(copy: &DiskStatus) -> Vec<String> {
    let wait = |wait: &DiskWait| {
        format!("waits for disk {}, used by job {} (process {})", wait.disk, wait.job, wait.process)
    };
    let state = copy.waits.first().map_or_else(|| "reads".to_owned(), wait);
    vec![copy.disks.join(", "), copy.process.to_string(), copy.origins.clone(), state]
}

/// A paragraph for a job that has reported progress.
fn job_progress(job: &JobStatus) -> String {
    let died = if job.alive { "" } else { " (when it died)" };
    let mut lines = String::new();
    for view in job.progress.iter().chain(&job.further_progress) {
        lines.extend(view.origin_path.iter().map(|path| format!("  {path}\n")));
        let indent = if view.origin_path.is_some() { "    " } else { "  " };
        lines.extend(view_texts(view).iter().map(|line| format!("{indent}{line}\n")));
    }
    if lines.is_empty() {
        return lines;
    }
    let lvm = if job.keeps_lvm_away {
        "  LVM commands that change the volume group wait until it ends\n"
    } else {
        ""
    };
    format!("job {}{died}\n{lines}{lvm}\n", job.id)
}

/// A table and an empty line, or nothing if there is only the header.
pub fn section(rows: &[Vec<String>]) -> String {
    if rows.len() > 1 { table(rows) + "\n" } else { String::new() }
}

impl Human for Status {
    fn human(&self) -> String {
        let mut rows = vec![row(&["VOLUME", "STATE", "SIZE", "DEVICE", "MOUNTED AT"])];
        rows.extend(self.volumes.iter().map(volume_row));
        let mut text = section(&rows);
        let mut rows = vec![row(&["JOB", "STATE", "COMMAND", "PROCESS", "STARTED", "ORIGIN", "STEP"])];
        rows.extend(self.jobs.iter().map(job_row));
        text.push_str(&section(&rows));
        text.extend(self.jobs.iter().map(job_progress));
        let mut rows = vec![row(&["DISK", "PROCESS", "COPIES", "STATE"])];
        rows.extend(self.disks.iter().map(disk_row));
        text.push_str(&section(&rows));
        let mut rows = vec![row(&["SNAPSHOT", "JOB", "BELOW", "STATE", "CONTENT"])];
        rows.extend(self.stacks.iter().map(|stack| {
            let below = stack.below.clone().unwrap_or_else(|| "-".to_owned());
            vec![
                stack.snapshot.clone(),
                stack.job.clone(),
                below,
                snapshot_text(&stack.status),
                if stack.status.is_usable() {
                    preserved_text(stack.preserved, stack.size)
                } else {
                    "lost".to_owned()
                },
            ]
        }));
        text.push_str(&section(&rows));
        text.push_str(&snapshot_rows(&self.snapshots));
        let mut rows = vec![row(&["RAW COPY", "SIZE", "STATE"])];
        rows.extend(self.secondaries.iter().map(|secondary| {
            vec![
                secondary.secondary.display().to_string(),
                secondary.size.to_string(),
                secondary.text.clone(),
            ]
        }));
        text.push_str(&section(&rows));
        if text.is_empty() {
            text.push_str("no volumes, nothing in progress, nothing left behind\n");
        }
        for warning in &self.warnings {
            text.push_str(&format!("warning: {warning}\n"));
        }
        text
    }
}

/// A state in words.
pub fn state_text(state: &State) -> &'static str {
    match state {
        State::Valid => "valid",
        State::Invalid => "LOST",
        State::NeedsLost => "LOST with a newer one",
        State::Full => "FULL",
        State::NotAttached => "not attached",
        State::Creating => "being created",
        State::Deleting => "being deleted",
        State::Retired => "deleted, still receives",
    }
}

/// Digits of a group's id in a table: enough to see which snapshots share it.
const GROUP_DIGITS: usize = 8;

/// A size, or a dash.
pub fn size_text(size: Option<Bytes>) -> String {
    size.map_or_else(|| "-".to_owned(), |size| size.to_string())
}

/// A number of seconds in words, or a dash.
pub fn age_text(seconds: Option<u64>) -> String {
    seconds.map_or_else(|| "-".to_owned(), |seconds| duration_text(Duration::from_secs(seconds)))
}

/// The table of snapshots that are kept; nothing if there are none. It has a column with the first digits of the group's
/// id if there is a group.
pub fn snapshot_rows(views: &[SnapshotView]) -> String {
    let mut rows = vec![row(&["KEPT SNAPSHOT", "STATE", "INSTANT", "AGE", "USED", "STORE"])];
    rows.extend(views.iter().map(|view| {
        vec![
            match &view.clone_of {
                Some(snapshot) => format!("{} (clone of {snapshot})", view.snapshot),
                None => view.snapshot.clone(),
            },
            match (view.rollback_percent, &view.subset) {
                (Some(percent), _) => format!("{}, rolling back {percent} %", state_text(&view.state)),
                (None, Some(_)) => format!("{}, a subset", state_text(&view.state)),
                (None, None) => state_text(&view.state).to_owned(),
            },
            view.instant.clone().unwrap_or_else(|| "-".to_owned()),
            age_text(view.age_seconds),
            size_text(view.used),
            size_text(view.total),
        ]
    }));
    if views.iter().any(|view| view.group.is_some()) {
        let short = |view: &SnapshotView| {
            view.group.as_ref().map_or_else(|| "-".to_owned(), |id| id.chars().take(GROUP_DIGITS).collect())
        };
        let column = std::iter::once("GROUP".to_owned()).chain(views.iter().map(short));
        rows.iter_mut().zip(column).for_each(|(row, cell)| row.push(cell));
    }
    section(&rows)
}

impl Human for doctor::Report {
    fn human(&self) -> String {
        let width = self.checks.iter().map(|check| check.name.len()).max().unwrap_or(0);
        let mut text = String::new();
        for check in &self.checks {
            let status = match check.status {
                doctor::Status::Ok => "ok     ",
                doctor::Status::Warn => "warn   ",
                doctor::Status::Missing => "MISSING",
            };
            text.push_str(&format!("{status}  {:width$}  {}\n", check.name, check.found));
            if let Some(remedy) = &check.remedy {
                text.push_str(&format!(
                    "{:9}needed for {}\n{:9}to get it: {remedy}\n",
                    "", check.needed_for, ""
                ));
            }
        }
        text.push_str(if self.ready {
            "\nThis machine can copy live volumes.\n"
        } else {
            "\nThis machine cannot copy live volumes yet.\n"
        });
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_aligned() {
        let mut lines = Lines::default();
        lines.add("a", 1).add("longer", "x");
        assert_eq!(lines.finish(), "a:      1\nlonger: x\n");
    }

    #[test]
    fn tables_are_aligned() {
        let rows = [row(&["A", "LONG", "Z"]), row(&["value", "x", "-"])];
        assert_eq!(table(&rows), "A      LONG  Z\nvalue  x     -\n");
        assert_eq!(Status::default().human(), "no volumes, nothing in progress, nothing left behind\n");
    }

    #[test]
    fn a_jobs_progress_is_below_the_table() {
        let golden = include_bytes!("../format/state/golden/progress-v1.json");
        let job = |id: &str, alive, progress| JobStatus {
            id: id.to_owned(),
            alive,
            command: Some("copy".to_owned()),
            process: Some(7),
            started: None,
            origin: None,
            keeps_lvm_away: false,
            step: None,
            progress,
            further_progress: Vec::new(),
        };
        let view = crate::format::state::ProgressView::decode(golden);
        let status =
            Status { jobs: vec![job("a1", true, view.clone()), job("b2", false, view)], ..Status::default() };
        let text = status.human();
        let copying = "  copying: 20 MiB of 100 MiB (20%), 10 MiB/s, 8 s left, 20 of 100 segments\n  store ";
        assert!(text.contains(&format!("\njob a1\n{copying}")), "{text}");
        assert!(text.contains(&format!("\njob b2 (when it died)\n{copying}")), "{text}");
        let status = Status { jobs: vec![job("a1", true, None)], ..Status::default() };
        assert!(!status.human().contains("job a1"), "{}", status.human());
    }

    #[test]
    fn sizes_and_times_read_well() {
        assert_eq!(exact(Bytes(0)), "0 bytes");
        assert_eq!(exact(Bytes::mib(3)), "3 MiB (3145728 bytes)");
        assert_eq!(seconds_text(1.25), "1.2 s");
        assert_eq!(seconds_text(75.0), "1 min 15 s");
        assert_eq!(seconds_text(-1.0), "an unknown time");
        assert_eq!(rate_text(Bytes::mib(10), 2.0), ", 5 MiB/s");
        assert_eq!(rate_text(Bytes::mib(10), 0.0), "");
    }
}
