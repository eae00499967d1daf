//! `tidemark snapshot`: its dispatch and its reports.

use std::path::PathBuf;

use serde::Serialize;

use super::confirm::confirmed;
use super::groups::{self, Group};
use super::output::Output;
use super::plans::omitted_text;
use super::progress::observer;
use super::reports::{Human, age_text, size_text, snapshot_rows, state_text};
use super::resolve::{self, FREEZE_BUDGET, reject_dash, volume_name};
use super::signals::{interrupt, stop_on_signals};
use super::snapshot_args::{
    AutoDeleteArg, CloneArgs, CreateArgs, MonitorArgs, RollbackArgs, SnapshotArgs, SnapshotCommand,
};
use crate::base::{Bytes, ChunkSize, Result};
use crate::op::snapshot::clone::{self, ClonePlan, CloneRequest, Cloned};
use crate::op::snapshot::create::{self, CreatePlan, CreateRequest, GroupPlan};
use crate::op::snapshot::delete::{self, DeletePlan, Deleted};
use crate::op::snapshot::list::{self, SnapshotDetails, SnapshotView, SubsetView};
use crate::op::snapshot::monitor::{self, MonitorRequest};
use crate::op::snapshot::mount::{self, Mounted};
use crate::op::snapshot::only::{self, OnlyPlan, OnlyRequest, PutBack};
use crate::op::snapshot::rollback::{self, RollbackPlan, RollbackRequest, RolledBack};
use crate::op::snapshot::set::parse_name;
use crate::op::snapshot::take::{self, CreateReport, Created, CreatedGroup};
use crate::op::unit;
use crate::sys::privilege::require_root;

/// Executes the command.
///
/// # Errors
/// The error that ends it.
pub fn run(args: &SnapshotArgs, output: Output) -> Result<()> {
    match &args.command {
        SnapshotCommand::Create(args) => create(args, output),
        SnapshotCommand::List(args) => {
            let volume = args.volume.as_deref().map(volume_name).transpose()?;
            output.print_result("snapshot list", &SnapshotList(list::list(volume)?))
        }
        SnapshotCommand::Show(args) => {
            parse_name(&args.snapshot)?;
            stop_on_signals(output)?;
            output.print_result("snapshot show", &list::show(&args.snapshot, &interrupt)?)
        }
        SnapshotCommand::Mount(args) => {
            parse_name(&args.snapshot)?;
            reject_dash(&args.directory, "the directory")?;
            output.report("snapshot mount", &mount::mount(&args.snapshot, &args.directory)?)
        }
        SnapshotCommand::Clone(args) => clone(args, output),
        SnapshotCommand::Rollback(args) => rollback(args, output),
        SnapshotCommand::Delete(args) => {
            let plan = delete::plan(&args.snapshots)?;
            let destroys = format!("{} will be deleted", plan.snapshots.join(", "));
            if !confirmed(output, "snapshot delete", args.consent, Some(&destroys), &plan)? {
                return Ok(());
            }
            stop_on_signals(output)?;
            output.report("snapshot delete", &delete::run(&plan, &interrupt)?)
        }
    }
}

/// `tidemark monitor`.
///
/// # Errors
/// The error that ends it.
pub fn monitor(args: &MonitorArgs, output: Output) -> Result<()> {
    let auto_delete = args.auto_delete == Some(AutoDeleteArg::Oldest);
    if args.install_unit {
        require_root("writing a unit")?;
        return output.result_text(&format!("{}\n", unit::write_monitor(auto_delete)?.display()));
    }
    stop_on_signals(output)?;
    let request = MonitorRequest { auto_delete, hook: args.hook.clone() };
    monitor::run(&request, &interrupt, &|text| output.note(text))
}

fn create(args: &CreateArgs, output: Output) -> Result<()> {
    args.volumes.iter().try_for_each(|volume| reject_dash(volume, "the volume"))?;
    let chunk = args.chunk.map(ChunkSize::new).transpose()?;
    let group = match &args.group {
        Some(name) => groups::find(name)?,
        None => Group { volumes: args.volumes.clone(), ..Group::default() },
    };
    let hooks = args.hooks.or(&group.hooks);
    let subset = resolve::subset_of(&args.include, &args.exclude)?;
    let request = |volume: &PathBuf| CreateRequest {
        volume: volume.clone(),
        name: args.name.clone(),
        store: args.store.store.clone(),
        store_size: args.store.store_size,
        chunk,
        subset: subset.clone(),
        freeze_budget: args.freeze_budget.or(group.freeze_budget).unwrap_or(FREEZE_BUDGET),
        hooks: hooks.clone(),
    };
    let requests: Vec<CreateRequest> = group.volumes.iter().map(request).collect();
    stop_on_signals(output)?;
    let plan = create::plan(&requests, &interrupt)?;
    if args.dry_run {
        return output.plan("snapshot create", &plan);
    }
    let observer = observer(output);
    let created = take::run(&plan, observer.as_ref(), &interrupt)?;
    drop(observer);
    output.report("snapshot create", &created)
}

fn clone(args: &CloneArgs, output: Output) -> Result<()> {
    parse_name(&args.snapshot)?;
    let plan = clone::plan(&CloneRequest {
        snapshot: args.snapshot.clone(),
        name: args.name.clone(),
        store: args.store.store.clone(),
        store_size: args.store.store_size,
    })?;
    if args.dry_run {
        return output.plan("snapshot clone", &plan);
    }
    stop_on_signals(output)?;
    output.report("snapshot clone", &clone::run(&plan, &|text| output.note(text), &interrupt)?)
}

fn rollback(args: &RollbackArgs, output: Output) -> Result<()> {
    parse_name(&args.snapshot)?;
    if args.cancel {
        return output.report("snapshot rollback", &rollback::cancel(&args.snapshot, &interrupt)?);
    }
    if !args.only.is_empty() {
        return rollback_only(args, output);
    }
    let plan = rollback::plan(&RollbackRequest {
        snapshot: args.snapshot.clone(),
        at_attach: args.at_attach,
        reserve: args.reserve,
        store: args.store.clone(),
        no_wait: args.no_wait,
    })?;
    let destroys = format!("what was written to {} since {} will be replaced", plan.volume, args.snapshot);
    if !confirmed(output, "snapshot rollback", args.consent, Some(&destroys), &plan)? {
        return Ok(());
    }
    stop_on_signals(output)?;
    output.report("snapshot rollback", &rollback::run(&plan, &|text| output.note(text), &interrupt)?)
}

fn rollback_only(args: &RollbackArgs, output: Output) -> Result<()> {
    let plan = only::plan(&OnlyRequest {
        snapshot: args.snapshot.clone(),
        only: resolve::selectors("--only", &args.only)?,
    })?;
    let destroys = format!("what was written to these since {} will be replaced", args.snapshot);
    if !confirmed(output, "snapshot rollback", args.consent, Some(&destroys), &plan)? {
        return Ok(());
    }
    stop_on_signals(output)?;
    output.report("snapshot rollback", &only::run(&plan, &|text| output.note(text), &interrupt)?)
}

/// The list, as a report.
#[derive(Serialize)]
#[serde(transparent)]
struct SnapshotList(Vec<SnapshotView>);

impl Human for SnapshotList {
    fn human(&self) -> String {
        if self.0.is_empty() { "no snapshots\n".to_owned() } else { snapshot_rows(&self.0) }
    }
}

impl Human for SnapshotDetails {
    fn human(&self) -> String {
        let view = &self.view;
        let count = |count: Option<u64>| count.map_or_else(|| "-".to_owned(), |count| count.to_string());
        let path = view.path.as_ref().map_or_else(|| "-".to_owned(), |path| path.display().to_string());
        let lines = [
            ("snapshot", view.snapshot.clone()),
            ("clone of", view.clone_of.clone().unwrap_or_else(|| "-".to_owned())),
            ("clones", if view.clones.is_empty() { "-".to_owned() } else { view.clones.join(", ") }),
            ("state", state_text(&view.state).to_owned()),
            ("lost", view.lost.clone().unwrap_or_else(|| "-".to_owned())),
            ("instant", view.instant.clone().unwrap_or_else(|| "-".to_owned())),
            ("age", age_text(view.age_seconds)),
            ("device", path),
            ("store", view.store.display().to_string()),
            ("used", format!("{} of {}", size_text(view.used), size_text(view.total))),
            ("chunk", self.chunk.to_string()),
            ("chunks", count(self.chunks_changed)),
            ("unique", size_text(self.unique)),
            ("shared", size_text(self.shared)),
            ("receives", if view.receives { "yes" } else { "no" }.to_owned()),
            ("group", self.group_text()),
            ("subset", view.subset.as_ref().map_or_else(|| "-".to_owned(), subset_text)),
        ];
        lines.iter().map(|(name, value)| format!("{:9} {value}\n", format!("{name}:"))).collect()
    }
}

/// "1.5 MiB in 3 ranges are left out (--exclude /srv/cache)".
fn subset_text(subset: &SubsetView) -> String {
    let options = |option: &'static str, texts: &[String]| {
        texts.iter().map(|text| format!("{option} {text}")).collect::<Vec<_>>()
    };
    let typed = [options("--include", &subset.include), options("--exclude", &subset.exclude)].concat();
    format!("{} in {} ranges are left out ({})", subset.left_out_bytes, subset.ranges, typed.join(" "))
}

impl SnapshotDetails {
    /// The group's id with its snapshots, or a dash.
    fn group_text(&self) -> String {
        let Some(group) = &self.view.group else { return "-".to_owned() };
        format!("{group} ({})", self.group_snapshots.join(", "))
    }
}

impl Human for GroupPlan {
    fn human(&self) -> String {
        let mut text: String = self.snapshots.iter().map(plan_text).collect();
        let frozen: Vec<String> = self.filesystems().iter().map(|path| path.display().to_string()).collect();
        let frozen = if frozen.is_empty() { "nothing".to_owned() } else { frozen.join(", ") };
        text.push_str(&format!("freezes:  {frozen}\n"));
        text
    }
}

impl Human for ClonePlan {
    fn human(&self) -> String {
        format!(
            "clone:    {} of {}\nstore:    {} in {}\n",
            self.clone,
            self.request.snapshot,
            self.store_bytes,
            self.directory.display()
        )
    }
}

impl Human for Cloned {
    fn human(&self) -> String {
        format!(
            "created: {} of {}, as {}\nstore:   {} ({})\nnext:    {}\n",
            self.clone,
            self.snapshot,
            self.path.display(),
            self.store.display(),
            self.store_bytes,
            self.next
        )
    }
}

impl Human for RollbackPlan {
    fn human(&self) -> String {
        let instant = self.instant.as_deref().unwrap_or("unknown");
        format!(
            "volume:   {}\nshows:    {}, of {instant}\nfiles in: {}\n",
            self.volume,
            self.request.snapshot,
            self.directory.display()
        )
    }
}

impl Human for RolledBack {
    fn human(&self) -> String {
        let Self { snapshot, path, complete, next } = self;
        let state = if *complete { "rolled back" } else { "rollback" };
        let mut text = format!("{state}: {} to {snapshot}\n", path.display());
        if let Some(next) = next {
            text.push_str(&format!("next: {next}\n"));
        }
        text
    }
}

impl Human for OnlyPlan {
    fn human(&self) -> String {
        let instant = self.instant.as_deref().unwrap_or("unknown");
        let mut text = format!("from:     {}, of {instant}\n", self.request.snapshot);
        for target in &self.files {
            let how = if target.exists { "replaced" } else { "created" };
            text.push_str(&format!("{how}: {}\n", target.path.display()));
        }
        for range in &self.ranges {
            let (start, length) = (range.start().get(), range.length());
            text.push_str(&format!("replaced: {length} of {} from byte {start} on\n", self.volume));
        }
        text
    }
}

impl Human for PutBack {
    fn human(&self) -> String {
        let files = self.files.iter().map(|path| format!("put back: {}\n", path.display()));
        let bytes = (self.bytes > Bytes::ZERO).then(|| format!("put back: {}\n", self.bytes));
        files.chain(bytes).collect()
    }
}

fn plan_text(plan: &CreatePlan) -> String {
    let mut text = format!(
        "snapshot: {}@{}\nstore:    {} in {}, chunks of {}\n",
        plan.volume,
        plan.name,
        plan.store_bytes,
        plan.directory.display(),
        plan.chunk
    );
    if let Some(omitted) = &plan.omitted {
        text.push_str(&format!("left out: {}\n", omitted_text(&plan.request.subset, omitted)));
        text.extend(omitted.notes.iter().map(|note| format!("kept all the same: {note}\n")));
    }
    text
}

impl Human for CreateReport {
    fn human(&self) -> String {
        match self {
            Self::One(created) => created_text(
                created,
                &held_text(created.instant.as_deref(), created.frozen_ms, created.suspended_ms),
            ),
            Self::Group(group) => group_text(group),
        }
    }
}

fn group_text(group: &CreatedGroup) -> String {
    let mut text = format!("group:     {}\n", group.group);
    text.push_str(&held_text(group.instant.as_deref(), group.frozen_ms, group.suspended_ms));
    text.extend(group.snapshots.iter().map(|created| created_text(created, "")));
    text
}

fn held_text(instant: Option<&str>, frozen_ms: u64, suspended_ms: u64) -> String {
    let instant = instant.unwrap_or("unknown");
    format!("instant:   {instant}\nfrozen:    {frozen_ms} ms\nsuspended: {suspended_ms} ms\n")
}

/// `held`: the lines about its instant.
fn created_text(created: &Created, held: &str) -> String {
    let left_out = created.left_out_bytes.map(|bytes| format!("left out:  {bytes}\n")).unwrap_or_default();
    format!(
        "created:   {} as {}\n{held}store:     {} ({})\n{left_out}next:      {}\n",
        created.snapshot,
        created.path.display(),
        created.store.display(),
        created.store_bytes,
        created.next
    )
}

impl Human for DeletePlan {
    fn human(&self) -> String {
        self.snapshots.iter().map(|snapshot| format!("deletes: {snapshot}\n")).collect()
    }
}

impl Human for Deleted {
    fn human(&self) -> String {
        let mut text: String = self.done.iter().map(|done| format!("done: {done}\n")).collect();
        text.extend(self.snapshots.iter().map(|snapshot| format!("deleted: {snapshot}\n")));
        for retired in &self.retired {
            text.push_str(&format!(
                "note: the store of {retired} still receives originals for older snapshots; its space is freed with the \
                 next snapshot, or with theirs\n"
            ));
        }
        text
    }
}

impl Human for Mounted {
    fn human(&self) -> String {
        let directory = self.directory.display();
        format!("mounted: {} at {directory} ({}, {})\n", self.snapshot, self.filesystem, self.options)
    }
}
