//! Plans of copies as text: what `--dry-run` shows.

use std::path::PathBuf;

use super::reports::Human;
use crate::base::Bytes;
use crate::copy::Order;
use crate::format::SecondaryForm;
use crate::op::copy::CopyPlan;
use crate::op::copy::group_plan::GroupCopyPlan;
use crate::op::copy::plan::LivePlan;
use crate::op::copy::raw_parent::RawCheckPlan;
use crate::op::copy::since::SincePlan;
use crate::op::omission::OmissionPlan;
use crate::op::request::{OnFull, Originals};
use crate::op::resume::ResumePlan;
use crate::secondary::SecondaryTarget;
use crate::volume::OriginKind;
use crate::volume::subset::Subset;

impl Human for CopyPlan {
    fn human(&self) -> String {
        copy_lines(self, true)
    }
}

/// The plan of one copy. `has_instant`: it takes an instant of its own.
fn copy_lines(plan: &CopyPlan, has_instant: bool) -> String {
    let mut lines = Lines::default();
    let origin = &plan.origin;
    lines.add("origin", format!("{} ({}, {})", origin.path.display(), origin.size, origin.kind));
    lines.add("secondary", secondary_text(plan));
    if let Some(destroys) = plan.destroys() {
        lines.add("overwrites", destroys);
    }
    for warning in &plan.target.warnings {
        lines.add("warning", warning);
    }
    lines.add("segments", segments_text(plan));
    if let Some(since) = &plan.since {
        add_since(&mut lines, since);
    }
    match (&plan.live, &origin.kind) {
        (Some(live), _) => add_live(&mut lines, plan, live, has_instant),
        (None, OriginKind::Live { .. }) => lines.add("snapshot", "in place; the resumed copy uses it"),
        (None, OriginKind::Snapshot { .. }) => {
            lines.0.push_str("the origin is a kept snapshot: it is read as it is, and nothing is frozen\n")
        }
        (None, _) => lines.0.push_str("the origin is not in use: it is read directly, without a snapshot\n"),
    }
    lines.0
}

impl Human for GroupCopyPlan {
    fn human(&self) -> String {
        let mut text = String::new();
        for copy in &self.copies {
            text.push_str(&copy_lines(copy, false));
            text.push('\n');
        }
        let mut lines = Lines::default();
        let budget = self.copies[0].request.freeze_budget;
        lines.add("frozen", format!("{} (for at most {budget:?})", points_text(&self.filesystems)));
        for text in &self.not_frozen {
            lines.add("not frozen", text);
        }
        for step in &self.steps.steps {
            lines.add("step", &step.name);
        }
        text + &lines.0
    }
}

impl Human for ResumePlan {
    fn human(&self) -> String {
        let mut lines = Lines::default();
        let then = if self.originals_begun { ", then all originals again" } else { "" };
        lines.add("job", format!("{}, begun {}", self.job, self.started));
        lines.add("done", format!("{} of {} segments{then}", self.placed, self.segments));
        lines.0 + &self.copy.human()
    }
}

/// Lines of a name and a value.
#[derive(Default)]
struct Lines(String);

impl Lines {
    fn add(&mut self, name: &str, value: impl AsRef<str>) {
        self.0.push_str(&format!("{name:<12}{}\n", value.as_ref()));
    }
}

fn secondary_text(plan: &CopyPlan) -> String {
    let target = match &plan.request.secondary {
        SecondaryTarget::Pipe => "standard output".to_owned(),
        SecondaryTarget::Path(path) => path.display().to_string(),
    };
    let format = match (plan.request.format, plan.request.originals) {
        (SecondaryForm::Raw, _) => "raw",
        (SecondaryForm::Archive, Originals::Overlay) => "archive, originals applied to the data",
        (SecondaryForm::Archive, Originals::Append) => "archive, originals after the data",
    };
    format!("{target} ({format})")
}

fn segments_text(plan: &CopyPlan) -> String {
    let rate = plan.request.rate.map(|rate| format!(", at most {rate}/s")).unwrap_or_default();
    let verified = if plan.request.verify { ", verified afterwards" } else { "" };
    format!("{} of {}{rate}{verified}", plan.segment.count_for(plan.origin.size), plan.segment)
}

/// "12 files (1.5 MiB), 64 KiB of ranges".
pub(super) fn omitted_text(subset: &Subset, omitted: &OmissionPlan) -> String {
    let mut parts = Vec::new();
    if subset.names_files() {
        parts.push(format!("{} files ({})", omitted.files, omitted.file_bytes));
    }
    if omitted.range_bytes > Bytes::ZERO {
        parts.push(format!("{} of ranges", omitted.range_bytes));
    }
    if parts.is_empty() { "nothing".to_owned() } else { parts.join(", ") }
}

fn add_omitted(lines: &mut Lines, plan: &CopyPlan) {
    let Some(omitted) = &plan.omitted else { return };
    lines.add("left out", omitted_text(&plan.request.subset, omitted));
    for note in &omitted.notes {
        lines.add("copied all the same", note);
    }
}

fn add_since(lines: &mut Lines, since: &SincePlan) {
    lines.add("since", format!("{}, which {} holds", since.base, since.parent.display()));
    let changed = format!("{} chunks of {} have changed", since.changed_chunks, since.chunk);
    lines.add("changes", format!("{changed}: {} of {} to move", since.to_move, since.total));
    let Some(check) = &since.check else { return };
    let RawCheckPlan { sample, segments, miss_probability, .. } = check;
    if check.is_interrupted {
        lines.add("interrupted", "an earlier update was: all that it may have written is written again");
    }
    lines.add(
        "read first",
        format!(
            "{sample} of {segments} segments at random, which miss a change of 1 in 100 with a probability of \
             {miss_probability:.2e}; and all that will be changed"
        ),
    );
}

fn points_text(points: &[PathBuf]) -> String {
    if points.is_empty() {
        return "nothing: no filesystem of the origin is mounted; the origin is suspended".to_owned();
    }
    points.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

fn add_instant(lines: &mut Lines, plan: &CopyPlan, live: &LivePlan) {
    let frozen = points_text(&plan.origin.filesystems);
    lines.add("frozen", format!("{frozen} (for at most {:?})", plan.request.freeze_budget));
    for text in &plan.origin.not_frozen {
        lines.add("not frozen", text);
    }
    for step in &live.steps.steps {
        lines.add("step", &step.name);
    }
}

fn add_live(lines: &mut Lines, plan: &CopyPlan, live: &LivePlan, has_instant: bool) {
    let store = &live.store;
    lines.add(
        "store",
        format!(
            "{} in RAM, {} at {}, up to {} in all, chunks of {}{}",
            store.head_bytes,
            store.tail_bytes,
            store.place.path().display(),
            store.total_bytes_max,
            store.chunk,
            if store.keep { ", kept" } else { "" }
        ),
    );
    if live.memory_waits {
        lines.add("memory", "may wait for the origin (swap space): the copy is locked in memory");
    }
    let free = if plan.request.all { "copied and preserved as well" } else { "not copied where it is known" };
    lines.add("free space", free);
    add_omitted(lines, plan);
    let region = plan.region;
    lines.add(
        "regions",
        match plan.order {
            Order::Physical => format!("of {region}, released as they are copied"),
            Order::Hot => format!("of {region}, most written first, released as they are copied"),
        },
    );
    if plan.request.on_full == OnFull::Hold {
        let budget = plan.request.hold_budget;
        lines.add(
            "store full",
            format!("writers are held until the copy has caught up (for at most {budget:?})"),
        );
    }
    lines.add("impact", plan.request.impact.to_string());
    if has_instant {
        add_instant(lines, plan, live);
    }
    lines
        .add("afterwards", format!("the origin's own table is restored: {}", live.table.replace('\n', "; ")));
}
