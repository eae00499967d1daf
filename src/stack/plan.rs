//! The steps that insert a stack under an origin, restore the origin's own table, and remove the stack.
//!
//! These are values; nothing is executed here. The same values are shown by `--dry-run`, run by
//! [`Stack::insert`](super::Stack::insert) and [`recover`](crate::op::recover), and stepped through by the
//! crash cases.

use std::path::PathBuf;

use crate::dm::{Table, Template, Udev};
use crate::stack::{Action, Change, Step};

use super::layers::{Layer, StackNames, layers};
use super::model::{InsertRequest, StackRequest};

/// The plan of an insertion: the value that [`Stack::insert`](super::Stack::insert) runs. `own_tables` has the
/// own table of each origin, in the order of the request.
///
/// Every origin is suspended before the instant, and none is resumed before it: one instant for all. The name
/// of a step that is done for each origin has a number from the second origin on: `suspend`, `suspend-2`.
#[must_use]
pub fn insertion(request: &InsertRequest, own_tables: &[Table], id: &str) -> Change {
    let members: Vec<PlannedOrigin<'_>> = request
        .stacks
        .iter()
        .zip(own_tables)
        .enumerate()
        .map(|(index, (stack, own_table))| PlannedOrigin::new(index, stack, own_table, id))
        .collect();
    let origins: Vec<String> = members.iter().map(|member| member.origin().to_owned()).collect();
    let filesystems = || request.filesystems.clone();
    let change = members.iter().fold(Change::new("insert"), |change, member| {
        change.then(member.step("own", own(member.origin(), member.own_table)))
    });
    let change = members.iter().fold(change, |change, member| member.make_layers(change));
    let guard = Action::Guard { devices: origins.clone(), filesystems: filesystems() };
    let change = change.then(Step::new("guard", guard).undo(Action::Dismiss)).then(
        Step::new("freeze", Action::Freeze { filesystems: filesystems() })
            .undo(Action::Thaw { filesystems: filesystems() }),
    );
    let change = members.iter().fold(change, |change, member| change.then(member.load()));
    let change = members.iter().fold(change, |change, member| change.then(member.suspend()));
    let change = change.then(Step::new("instant", Action::Instant));
    // In the reverse order: what was suspended last was quiet for the shortest time.
    let change = members.iter().enumerate().rev().fold(change, |change, (index, member)| {
        change.then(member.switch(&origins[..index], &request.filesystems))
    });
    let change = change
        .then(Step::new("thaw", Action::Thaw { filesystems: filesystems() }))
        .then(Step::new("unguard", Action::Unguard));
    members.iter().fold(change, |change, member| {
        change.then(member.step("expect", Action::ExpectOver { device: member.origin().to_owned() }))
    })
}

/// One origin of an insertion.
struct PlannedOrigin<'a> {
    index: usize,
    request: &'a StackRequest,
    own_table: &'a Table,
    layers: Vec<Layer>,
    names: StackNames,
}

impl<'a> PlannedOrigin<'a> {
    fn new(index: usize, request: &'a StackRequest, own_table: &'a Table, id: &str) -> Self {
        let layers = layers(request, own_table, id);
        Self { index, request, own_table, layers, names: StackNames::new(&request.origin, id) }
    }

    fn origin(&self) -> &str {
        &self.request.origin
    }

    fn step(&self, name: &str, action: Action) -> Step {
        Step::new(&numbered(name, self.index + 1), action)
    }

    /// Creates each device, loads its table and resumes it.
    fn make_layers(&self, change: Change) -> Change {
        self.layers.iter().fold(change, |change, layer| {
            let name = |what: &str| format!("{what}-{}", layer.role);
            let device = || layer.device.clone();
            let create = Action::Create { device: device(), uuid: layer.uuid.clone() };
            let load = Action::Load { device: device(), table: layer.table.clone() };
            let resume = Action::Resume { device: device(), udev: Udev::Internal };
            let remove = Action::Remove { device: device(), udev: Udev::Internal };
            let change = change
                .then(self.step(&name("create"), create).undo(remove))
                .then(self.step(&name("load"), load))
                .then(self.step(&name("resume"), resume));
            if layer.is_claimed {
                change.then(
                    self.step("claim", Action::Claim { device: device() })
                        .undo(Action::Unclaim { device: device() }),
                )
            } else {
                change
            }
        })
    }

    fn load(&self) -> Step {
        let StackNames { real, preserve, .. } = self.names.clone();
        let device = || self.origin().to_owned();
        self.step("load-origin", Action::LoadOver { device: device(), real, preserve })
            .undo(Action::Clear { device: device() })
    }

    fn suspend(&self) -> Step {
        let action = suspend(self.origin(), true, self.request.lock_filesystem);
        resume_with_own_table(self.origin()).into_iter().fold(self.step("suspend", action), Step::undo)
    }

    /// Once the origin uses the new table, the undo is a reload, guarded by another watchdog (the first may
    /// have fired, which may be why there is an undo). It thaws the filesystems first, while the watchdog that
    /// guards them still exists. A thaw writes, so the origins that are still held, `held`, are resumed before.
    fn switch(&self, held: &[String], filesystems: &[PathBuf]) -> Step {
        let origin = self.origin();
        let step = self.step("switch", resume(origin));
        let step = held.iter().flat_map(|held| resume_with_own_table(held)).fold(step, Step::undo);
        undo_by_reload(step, origin, self.own_table, filesystems)
    }
}

/// The name of a step that is done `count` times: it has a number from the second time on.
pub(super) fn numbered(name: &str, count: usize) -> String {
    if count == 1 { name.to_owned() } else { format!("{name}-{count}") }
}

/// Adds the undo of a step after which `origin` uses the new table: a thaw, then a reload of `own_table` under a
/// watchdog of its own.
pub(super) fn undo_by_reload(step: Step, origin: &str, own_table: &Table, filesystems: &[PathBuf]) -> Step {
    step.undo(Action::Thaw { filesystems: filesystems.to_vec() })
        .undo(Action::Dismiss)
        .undo(guard(origin))
        .undo(Action::Load { device: origin.to_owned(), table: own_table.into() })
        .undo(suspend(origin, false, false))
        .undo(resume(origin))
        .undo(Action::Dismiss)
}

/// The plan of restoring the origin's own table, if its active table is `current`.
#[must_use]
pub fn restoration(origin: &str, current: impl Into<Template>, own_table: &Table) -> Change {
    let clear = Action::Clear { device: origin.to_owned() };
    Change::new("restore")
        .then(Step::new("own", own(origin, current)))
        .then(
            Step::new("load-own", Action::Load { device: origin.to_owned(), table: own_table.into() })
                .undo(clear.clone()),
        )
        .then(Step::new("guard", guard(origin)).undo(Action::Dismiss))
        .then(Step::new("suspend", suspend(origin, false, false)).undo(clear).undo(resume(origin)))
        .then(Step::new("switch", resume(origin)))
        .then(Step::new("unguard", Action::Dismiss))
        .then(Step::new("expect", Action::Expect { device: origin.to_owned(), table: own_table.into() }))
}

/// The plan of removing the devices that the origin no longer maps to. No step has an undo: the next attempt
/// removes what is left.
#[must_use]
pub fn dismantling(names: &StackNames) -> Change {
    let remove = |device: &str| Action::Remove { device: device.to_owned(), udev: Udev::Internal };
    names.removable().into_iter().fold(Change::new("dismantle"), |change, (role, device)| {
        change.then(Step::new(&format!("remove-{role}"), remove(device)))
    })
}

pub(super) fn own(origin: &str, table: impl Into<Template>) -> Action {
    Action::Own { device: origin.to_owned(), table: table.into() }
}

fn guard(origin: &str) -> Action {
    Action::Guard { devices: vec![origin.to_owned()], filesystems: Vec::new() }
}

/// Ends a suspension without activating the loaded table.
pub(super) fn resume_with_own_table(origin: &str) -> [Action; 2] {
    [Action::Clear { device: origin.to_owned() }, resume(origin)]
}

pub(super) fn suspend(origin: &str, flush: bool, lock_filesystem: bool) -> Action {
    Action::Suspend { device: origin.to_owned(), flush, lock_filesystem }
}

// Never with a cookie: nothing may wait for udev while anything is held, and udev keeps its information about
// a device that is not ours.
pub(super) fn resume(origin: &str) -> Action {
    Action::Resume { device: origin.to_owned(), udev: Udev::None }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::base::{ChunkSize, DeviceNumber};
    use crate::dm::naming::new_id;
    use crate::volume::lvm_lock::LvmScope;

    fn plan(origins: &[&str]) -> Change {
        let stack = |origin: &&str| StackRequest {
            origin: (*origin).to_owned(),
            cow: DeviceNumber { major: 253, minor: 9 },
            chunk: ChunkSize::default(),
            lock_filesystem: false,
            all: false,
            omission: None,
            planned_table: None,
        };
        let request = InsertRequest {
            stacks: origins.iter().map(stack).collect(),
            filesystems: vec!["/srv".into()],
            planned: None,
            budget: Duration::from_secs(2),
            lvm_lock: LvmScope::Change,
        };
        let own: Table = "0 8192 linear 8:16 2048".parse().unwrap();
        insertion(&request, &vec![own; origins.len()], &new_id())
    }

    #[test]
    fn the_plan_holds_only_the_origins_and_never_waits_for_udev_meanwhile() {
        let origins = ["vg-data", "vg-wal", "vg-log"];
        let plan = plan(&origins);
        let mut held = false;
        for step in &plan.steps {
            match &step.action {
                Action::Freeze { .. } => held = true,
                Action::Unguard => held = false,
                Action::Suspend { device, .. } => assert!(origins.contains(&device.as_str())),
                Action::Resume { udev, .. } if held => assert_eq!(*udev, Udev::None),
                Action::Create { .. } | Action::Load { .. } | Action::Remove { .. } => assert!(!held),
                _ => {}
            }
        }
        let load = plan.steps.iter().find(|step| step.name == "load-origin").unwrap();
        assert_eq!(
            load.action.to_string(),
            "load into vg-data: linear to vg-data#preserve, except where space is free"
        );
        assert_eq!(
            plan.steps[0].action.to_string(),
            "check that no other tool is changing the table of vg-data"
        );
    }

    #[test]
    fn the_steps_of_one_origin_are_these_in_this_order() {
        let own: Table = "0 8192 linear 8:16 2048".parse().unwrap();
        let names = |change: &Change| change.steps.iter().map(|step| step.name.clone()).collect::<Vec<_>>();
        assert_eq!(
            names(&plan(&["vg-data"])),
            [
                "own",
                "create-real",
                "load-real",
                "resume-real",
                "create-snap",
                "load-snap",
                "resume-snap",
                "claim",
                "create-preserve",
                "load-preserve",
                "resume-preserve",
                "guard",
                "freeze",
                "load-origin",
                "suspend",
                "instant",
                "switch",
                "thaw",
                "unguard",
                "expect",
            ]
        );
        assert_eq!(
            names(&restoration("vg-data", &own, &own)),
            ["own", "load-own", "guard", "suspend", "switch", "unguard", "expect"]
        );
        let dismantling = dismantling(&StackNames::new("vg-data", &new_id()));
        assert_eq!(names(&dismantling), ["remove-preserve", "remove-snap", "remove-real"]);
    }

    #[test]
    fn all_origins_are_suspended_at_the_instant_and_every_step_has_its_own_name() {
        let origins = ["vg-data", "vg-wal", "vg-log"];
        let plan = plan(&origins);
        let mut suspended = Vec::new();
        for step in &plan.steps {
            match &step.action {
                Action::Suspend { device, .. } => suspended.push(device.as_str()),
                Action::Resume { device, .. } => suspended.retain(|held| held != device),
                Action::Instant => assert_eq!(suspended, origins),
                Action::Thaw { .. } | Action::Freeze { .. } => assert!(suspended.is_empty()),
                _ => {}
            }
        }
        assert!(suspended.is_empty());
        let names: std::collections::BTreeSet<&str> =
            plan.steps.iter().map(|step| step.name.as_str()).collect();
        assert_eq!(names.len(), plan.steps.len());
        assert!(names.contains("suspend") && names.contains("suspend-3"));
    }

    #[test]
    fn an_undo_never_thaws_while_an_origin_is_suspended() {
        for origins in [&["a"][..], &["a", "b"], &["a", "b", "c"]] {
            let steps = plan(origins).steps;
            for failed in 0..=steps.len() {
                let mut suspended: Vec<&str> = Vec::new();
                let mut act = |action: &'_ Action| match action {
                    Action::Suspend { device, .. } => {
                        suspended.push(origins.iter().find(|origin| *origin == device).unwrap());
                    }
                    Action::Resume { device, .. } => suspended.retain(|held| held != device),
                    Action::Thaw { .. } => assert!(suspended.is_empty(), "step {failed}: {suspended:?}"),
                    _ => {}
                };
                steps[..failed].iter().for_each(|step| act(&step.action));
                steps[..failed].iter().rev().flat_map(|step| &step.undo).for_each(act);
            }
        }
    }
}
