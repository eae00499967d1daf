//! `tidemark snapshot`: its dispatch and its reports.

use serde::Serialize;

use super::confirm::confirmed;
use super::output::Output;
use super::progress::observer;
use super::reports::{Human, age_text, size_text, snapshot_rows, state_text};
use super::resolve::{reject_dash, volume_name};
use super::signals::{interrupt, stop_on_signals};
use super::snapshot_args::{
    AutoDeleteArg, CloneArgs, CreateArgs, MonitorArgs, RollbackArgs, SnapshotArgs, SnapshotCommand,
};
use crate::base::{ChunkSize, Result};
use crate::op::request::Hooks;
use crate::op::snapshot::clone::{self, ClonePlan, CloneRequest, Cloned};
use crate::op::snapshot::create::{self, CreatePlan, CreateRequest, Created};
use crate::op::snapshot::delete::{self, DeletePlan, Deleted};
use crate::op::snapshot::list::{self, SnapshotDetails, SnapshotView};
use crate::op::snapshot::monitor::{self, MonitorRequest};
use crate::op::snapshot::mount::{self, Mounted};
use crate::op::snapshot::rollback::{self, RollbackPlan, RollbackRequest, RolledBack};
use crate::op::snapshot::set::parse_name;
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
    reject_dash(&args.volume, "the volume")?;
    let plan = create::plan(&CreateRequest {
        volume: args.volume.clone(),
        name: args.name.clone(),
        store: args.store.clone(),
        store_size: args.store_size,
        chunk: args.chunk.map(ChunkSize::new).transpose()?,
        freeze_budget: args.freeze_budget,
        hooks: Hooks {
            before: args.hook_before.clone(),
            frozen: args.hook_frozen.clone(),
            after: args.hook_after.clone(),
        },
    })?;
    if args.dry_run {
        return output.plan("snapshot create", &plan);
    }
    stop_on_signals(output)?;
    let observer = observer(output);
    let created = create::run(&plan, observer.as_ref(), &interrupt)?;
    drop(observer);
    output.report("snapshot create", &created)
}

fn clone(args: &CloneArgs, output: Output) -> Result<()> {
    parse_name(&args.snapshot)?;
    let plan = clone::plan(&CloneRequest {
        snapshot: args.snapshot.clone(),
        name: args.name.clone(),
        store: args.store.clone(),
        store_size: args.store_size,
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
        ];
        lines.iter().map(|(name, value)| format!("{:9} {value}\n", format!("{name}:"))).collect()
    }
}

impl Human for CreatePlan {
    fn human(&self) -> String {
        let frozen: Vec<String> = self.filesystems.iter().map(|path| path.display().to_string()).collect();
        let frozen = if frozen.is_empty() { "nothing".to_owned() } else { frozen.join(", ") };
        format!(
            "snapshot: {}@{}\nstore:    {} in {}, chunks of {}\nfreezes:  {frozen}\n",
            self.volume,
            self.name,
            self.store_bytes,
            self.directory.display(),
            self.chunk
        )
    }
}

impl Human for Created {
    fn human(&self) -> String {
        format!(
            "created:   {} as {}\ninstant:   {}\nstore:     {} ({})\nfrozen:    {} ms\nsuspended: {} ms\nnext:      {}\n",
            self.snapshot,
            self.path.display(),
            self.instant.as_deref().unwrap_or("unknown"),
            self.store.display(),
            self.store_bytes,
            self.frozen_ms,
            self.suspended_ms,
            self.next
        )
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
