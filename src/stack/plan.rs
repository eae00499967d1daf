//! Which steps insert a stack under an origin, restore the origin's own table, and remove the stack?
//!
//! These are values; nothing is executed here. The same values are shown by `--dry-run`, run by
//! [`Stack::insert`](super::Stack::insert) and [`recover`](crate::op::recover), and stepped through by the
//! crash cases.

use std::path::PathBuf;

use crate::dm::naming::{ROLE_PRESERVE, ROLE_REAL, ROLE_SNAP, stack_device_name};
use crate::dm::{DeviceIdentity, Table, Template, Udev};
use crate::stack::{Action, Change, Step};

use super::model::StackRequest;

/// The steps of an insertion, in order. Each has the crash points `insert.STEP.before` and
/// `insert.STEP.after`.
pub const INSERT_STEPS: [&str; 20] = [
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
];
/// The steps of restoring the origin's table (`restore.`).
pub const RESTORE_STEPS: [&str; 7] = ["own", "load-own", "guard", "suspend", "switch", "unguard", "expect"];
/// The steps of removing the devices below (`dismantle.`).
pub const DISMANTLE_STEPS: [&str; 3] = ["remove-preserve", "remove-snap", "remove-real"];

/// The devices of a stack, by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StackNames {
    /// Carries the origin's own table.
    pub real: String,
    /// The snapshot: the origin as it was at the instant.
    pub snap: String,
    /// Preserves originals before the first write.
    pub preserve: String,
}

impl StackNames {
    /// For job `id` over the device `origin`.
    #[must_use]
    pub fn new(origin: &str, id: &str) -> Self {
        Self {
            real: stack_device_name(origin, ROLE_REAL, id),
            snap: stack_device_name(origin, ROLE_SNAP, id),
            preserve: stack_device_name(origin, ROLE_PRESERVE, id),
        }
    }

    /// The names in an order in which the devices can be removed.
    pub(super) fn removable(&self) -> [&str; 3] {
        [&self.preserve, &self.snap, &self.real]
    }
}

/// The plan of an insertion: the value that [`Stack::insert`](super::Stack::insert) runs.
#[must_use]
pub fn insertion(request: &StackRequest, own_table: &Table, id: &str) -> Change {
    let origin = request.origin.as_str();
    let StackNames { real, snap, preserve } = StackNames::new(origin, id);
    let length = own_table.length().get();
    let snap_table =
        format!("0 {length} snapshot {{{real}}} {} PO {}", request.cow, request.chunk.sectors().get());
    let preserve_table = format!("0 {length} snapshot-origin {{{real}}}");
    let step = |name: &str, action| Step::new(name, action);
    let filesystems = request.filesystems.clone();
    // Creates a device, loads its table and resumes it.
    let made = |change: Change, device: &str, role: &str, table: Template| {
        let name = |what: &str| format!("{what}-{role}");
        let uuid = DeviceIdentity::new(origin, role, id).uuid();
        let device = || device.to_owned();
        change
            .then(
                Step::new(&name("create"), Action::Create { device: device(), uuid })
                    .undo(Action::Remove { device: device(), udev: Udev::Internal }),
            )
            .then(Step::new(&name("load"), Action::Load { device: device(), table }))
            .then(Step::new(&name("resume"), Action::Resume { device: device(), udev: Udev::Internal }))
    };
    let change = Change::new("insert").then(step("own", own(origin, own_table)));
    let change = made(change, &real, ROLE_REAL, own_table.into());
    let change = made(change, &snap, ROLE_SNAP, Template::new(snap_table));
    let change = change.then(step("claim", Action::Claim { device: snap }).undo(Action::Unclaim));
    made(change, &preserve, ROLE_PRESERVE, Template::new(preserve_table))
        .then(step("guard", guard(origin, &filesystems)).undo(Action::Dismiss))
        .then(
            step("freeze", Action::Freeze { filesystems: filesystems.clone() })
                .undo(Action::Thaw { filesystems: filesystems.clone() }),
        )
        .then(
            step("load-origin", Action::LoadOver { device: origin.to_owned(), real, preserve })
                .undo(Action::Clear { device: origin.to_owned() }),
        )
        .then(
            step("suspend", suspend(origin, true, request.lock_filesystem))
                .undo(Action::Clear { device: origin.to_owned() })
                .undo(resume(origin)),
        )
        .then(step("instant", Action::Instant))
        .then(undo_switch(step("switch", resume(origin)), origin, own_table, &filesystems))
        .then(step("thaw", Action::Thaw { filesystems }))
        .then(step("unguard", Action::Unguard))
        .then(step("expect", Action::ExpectOver { device: origin.to_owned() }))
}

/// Once the origin uses the new table, the undo is a reload, guarded by another watchdog (the first may have
/// fired, which may be why there is an undo). It thaws the filesystems first, while the watchdog that guards
/// them still exists.
fn undo_switch(step: Step, origin: &str, own_table: &Table, filesystems: &[PathBuf]) -> Step {
    step.undo(Action::Thaw { filesystems: filesystems.to_vec() })
        .undo(Action::Dismiss)
        .undo(guard(origin, &[]))
        .undo(Action::Load { device: origin.to_owned(), table: own_table.into() })
        .undo(suspend(origin, false, false))
        .undo(resume(origin))
        .undo(Action::Dismiss)
}

/// The plan of restoring the origin's own table where its active table is `current`.
#[must_use]
pub fn restoration(origin: &str, current: impl Into<Template>, own_table: &Table) -> Change {
    let clear = Action::Clear { device: origin.to_owned() };
    Change::new("restore")
        .then(Step::new("own", own(origin, current)))
        .then(
            Step::new("load-own", Action::Load { device: origin.to_owned(), table: own_table.into() })
                .undo(clear.clone()),
        )
        .then(Step::new("guard", guard(origin, &[])).undo(Action::Dismiss))
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
    let steps = DISMANTLE_STEPS.iter().zip(names.removable());
    steps
        .fold(Change::new("dismantle"), |change, (step, device)| change.then(Step::new(step, remove(device))))
}

fn own(origin: &str, table: impl Into<Template>) -> Action {
    Action::Own { device: origin.to_owned(), table: table.into() }
}

fn guard(origin: &str, filesystems: &[PathBuf]) -> Action {
    Action::Guard { device: origin.to_owned(), filesystems: filesystems.to_vec() }
}

fn suspend(origin: &str, flush: bool, lock_filesystem: bool) -> Action {
    Action::Suspend { device: origin.to_owned(), flush, lock_filesystem }
}

// Never with a cookie: nothing may wait for udev while anything is held, and udev keeps its information about
// a device that is not ours.
fn resume(origin: &str) -> Action {
    Action::Resume { device: origin.to_owned(), udev: Udev::None }
}

/// Every crash point of the stack changes of a copy, in order.
#[must_use]
pub fn crash_points() -> Vec<String> {
    [("insert", &INSERT_STEPS[..]), ("restore", &RESTORE_STEPS), ("dismantle", &DISMANTLE_STEPS)]
        .iter()
        .flat_map(|(change, steps)| steps.iter().map(move |step| (change, step)))
        .flat_map(|(change, step)| [format!("{change}.{step}.before"), format!("{change}.{step}.after")])
        .collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::base::{ChunkSize, DeviceNumber};
    use crate::dm::Table;
    use crate::volume::lvm_lock::LvmScope;

    fn request() -> StackRequest {
        StackRequest {
            origin: "vg-data".into(),
            cow: DeviceNumber { major: 253, minor: 9 },
            chunk: ChunkSize::default(),
            filesystems: vec!["/srv".into()],
            lock_filesystem: false,
            budget: Duration::from_secs(2),
            all: false,
            planned: None,
            lvm_lock: LvmScope::Change,
        }
    }

    #[test]
    fn crash_points_are_those_of_the_plans() {
        let own: Table = "0 8192 linear 8:16 2048".parse().unwrap();
        let id = crate::dm::naming::new_id();
        let mut points = insertion(&request(), &own, &id).crash_points();
        points.extend(restoration("vg-data", &own, &own).crash_points());
        points.extend(dismantling(&StackNames::new("vg-data", &id)).crash_points());
        assert_eq!(points, crash_points());
    }

    #[test]
    fn the_plan_holds_only_the_origin_and_never_waits_for_udev_meanwhile() {
        let own: Table = "0 8192 linear 8:16 2048".parse().unwrap();
        let plan = insertion(&request(), &own, &crate::dm::naming::new_id());
        let mut held = false;
        for step in &plan.steps {
            match &step.action {
                Action::Freeze { .. } => held = true,
                Action::Unguard => held = false,
                Action::Suspend { device, .. } => assert_eq!(device, "vg-data"),
                Action::Resume { udev, .. } if held => assert_eq!(*udev, Udev::None),
                Action::Create { .. } | Action::Load { .. } | Action::Remove { .. } => assert!(!held),
                _ => {}
            }
        }
        let load = plan.steps.iter().find(|step| step.name == "load-origin").unwrap();
        assert_eq!(
            load.action.to_string(),
            "load into vg-data: linear to vg-data#preserve, past it where nothing is in use"
        );
        assert_eq!(
            plan.steps[0].action.to_string(),
            "check that no other tool is changing the table of vg-data"
        );
    }
}
