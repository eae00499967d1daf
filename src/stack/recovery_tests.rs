//! A fake kernel that crashes before and after every action of every change, and is then recovered.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::Duration;

use super::*;
use crate::base::ChunkSize;
use crate::base::ErrorKind;
use crate::dm::Template;
use crate::dm::naming::{ROLE_COW, ROLE_PRESERVE, new_id};
use crate::format::state::{ChangeRecord, OriginRecord};
use crate::stack::BestEffort;
use crate::stack::change_record;
use crate::stack::{InsertRequest, StackNames, StackRequest, dismantling, insertion};
use crate::volume::lvm_lock::LvmScope;

const OWN: &str = "0 4096 linear 8:16 2048\n4096 4096 linear 8:32 0";
const MOUNT: &str = "/srv";

/// Groups of origins that a copy may hold at one instant.
const GROUPS: [&[&str]; 2] = [&["data"], &["data", "wal", "log"]];

/// The own table of an origin. No two origins have the same disks.
fn own_of(origin: &str) -> Table {
    let text = match origin {
        "wal" => "0 4096 linear 8:64 2048\n4096 4096 linear 8:80 0",
        "log" => "0 4096 linear 8:112 2048\n4096 4096 linear 8:128 0",
        _ => OWN,
    };
    text.parse().unwrap()
}

/// The table of an origin with everything released.
fn released(origin: &str) -> Template {
    Template::new(format!("0 8192 linear {{{origin}#real}} 0"))
}

/// The table of an origin above a stack, as [`Action::LoadOver`] loads it.
fn over(real: &str, preserve: &str) -> String {
    format!("0 4096 linear {{{real}}} 0\n4096 4096 switch 1 4096 0 {{{preserve}}} 4096")
}

/// The error at the point where the process dies.
struct Crash;

#[derive(Clone, Debug, PartialEq, Eq)]
struct FakeDevice {
    uuid: String,
    number: DeviceNumber,
    suspended: bool,
    active: Option<Table>,
    inactive: Option<Table>,
}

#[derive(Clone, Debug)]
struct FakeKernel {
    origins: &'static [&'static str],
    devices: BTreeMap<String, FakeDevice>,
    frozen: BTreeSet<PathBuf>,
    record: Option<JobRecord>,
    next_minor: u32,
    /// Half-actions until the crash; None for no crash.
    crash_in: Option<u32>,
    /// Actions until one fails; None for no failure.
    fail_in: Option<u32>,
}

fn kernel(id: &str) -> FakeKernel {
    kernel_of(GROUPS[0], id)
}

/// The origins, each with a store.
fn kernel_of(origins: &'static [&'static str], id: &str) -> FakeKernel {
    let mut kernel = FakeKernel {
        origins,
        devices: BTreeMap::new(),
        frozen: BTreeSet::new(),
        record: None,
        next_minor: 0,
        crash_in: None,
        fail_in: None,
    };
    for origin in origins {
        let cow = format!("{origin}#cow");
        kernel.create(origin, &format!("LVM-{origin}")).unwrap();
        kernel.device(origin).unwrap().active = Some(own_of(origin));
        kernel.create(&cow, &DeviceIdentity::new(origin, ROLE_COW, id).uuid()).unwrap();
        kernel.device(&cow).unwrap().active = Some("0 999 linear 7:0 0".parse().unwrap());
    }
    kernel
}

impl FakeKernel {
    /// The record of a copy of the origins with no change in progress.
    fn record_of(&self, id: &str) -> JobRecord {
        let mut origins = self.origins.iter().map(|origin| OriginRecord {
            device: (*origin).to_owned(),
            number: self.devices[*origin].number,
            table: own_of(origin).to_string(),
            queue: BTreeMap::new(),
        });
        JobRecord {
            job: id.to_owned(),
            command: "copy".into(),
            process: 1,
            started_utc_ns: 0,
            origin: origins.next(),
            further_origins: origins.collect(),
            change: None,
            resources: Vec::new(),
            copy: None,
        }
    }

    fn request(&self) -> InsertRequest {
        let stack = |origin: &&str| StackRequest {
            origin: (*origin).to_owned(),
            cow: self.devices[&format!("{origin}#cow")].number,
            chunk: ChunkSize::default(),
            lock_filesystem: false,
            all: false,
            omission: None,
            planned_table: None,
        };
        InsertRequest {
            stacks: self.origins.iter().map(stack).collect(),
            filesystems: vec![MOUNT.into()],
            planned: None,
            budget: Duration::from_secs(2),
            lvm_lock: LvmScope::Change,
        }
    }

    fn insertion(&self, id: &str) -> Change {
        let own_tables: Vec<Table> = self.origins.iter().map(|origin| own_of(origin)).collect();
        insertion(&self.request(), &own_tables, id)
    }

    /// The stores, which a finished copy leaves to its caller.
    fn stores(&self) -> Vec<String> {
        let mut names: Vec<String> = self.origins.iter().map(|origin| format!("{origin}#cow")).collect();
        names.sort();
        names
    }

    fn half_action(&mut self) {
        if let Some(left) = &mut self.crash_in {
            if *left == 0 {
                self.crash_in = None;
                resume_unwind(Box::new(Crash));
            }
            *left -= 1;
        }
    }

    fn create(&mut self, name: &str, uuid: &str) -> Result<()> {
        if self.devices.contains_key(name) {
            return Err(Error::refused(format!("{name} exists")));
        }
        self.next_minor += 1;
        let number = DeviceNumber { major: 253, minor: self.next_minor };
        let device =
            FakeDevice { uuid: uuid.to_owned(), number, suspended: false, active: None, inactive: None };
        self.devices.insert(name.to_owned(), device);
        Ok(())
    }

    fn device(&mut self, name: &str) -> Result<&mut FakeDevice> {
        self.devices.get_mut(name).ok_or_else(|| Error::refused(format!("no device {name}")))
    }

    fn resolve(&mut self, template: &crate::dm::Template) -> Result<Table> {
        template.resolve(&mut |name| Ok(self.device(name)?.number))
    }

    fn remove(&mut self, name: &str) -> Result<()> {
        let number = self.device(name)?.number;
        let used = |table: &Option<Table>| table.as_ref().is_some_and(|table| table.maps_to(number));
        if self.devices.values().any(|device| used(&device.active) || used(&device.inactive)) {
            return Err(Error::refused(format!("{name} is busy")));
        }
        self.devices.remove(name);
        Ok(())
    }

    fn act(&mut self, action: &Action) -> Result<()> {
        match action {
            Action::Create { device, uuid } => self.create(device, uuid),
            Action::Load { device, table } => {
                let table = self.resolve(table)?;
                self.device(device)?.inactive = Some(table);
                Ok(())
            }
            // The first half of the origin is free.
            Action::LoadOver { device, real, preserve } => {
                let table = self.resolve(&Template::new(over(real, preserve)))?;
                self.device(device)?.inactive = Some(table);
                Ok(())
            }
            Action::Own { device, table } => {
                let table = self.resolve(table)?;
                let device = self.device(device)?;
                assert_eq!((device.active.as_ref(), &device.inactive), (Some(&table), &None));
                assert!(!device.suspended);
                Ok(())
            }
            Action::ExpectOver { device } => {
                assert!(self.device(device)?.active.as_ref().is_some_and(|table| table.lines().len() == 2));
                Ok(())
            }
            Action::Clear { device } => {
                self.device(device)?.inactive = None;
                Ok(())
            }
            Action::Suspend { device, .. } => {
                let device = self.device(device)?;
                assert!(!device.suspended, "suspended twice");
                device.suspended = true;
                Ok(())
            }
            Action::Resume { device, .. } => {
                let device = self.device(device)?;
                device.suspended = false;
                if let Some(table) = device.inactive.take() {
                    device.active = Some(table);
                }
                Ok(())
            }
            Action::Remove { device, .. } => self.remove(device),
            Action::Expect { device, table } => {
                let table = self.resolve(table)?;
                assert_eq!(self.device(device)?.active, Some(table));
                Ok(())
            }
            Action::Freeze { filesystems } => {
                self.frozen.extend(filesystems.iter().cloned());
                Ok(())
            }
            Action::Thaw { filesystems } => {
                assert!(!self.devices.values().any(|device| device.suspended), "a thaw writes");
                filesystems.iter().for_each(|path| {
                    self.frozen.remove(path);
                });
                Ok(())
            }
            Action::Claim { .. }
            | Action::Unclaim { .. }
            | Action::Guard { .. }
            | Action::Unguard
            | Action::Dismiss
            | Action::Instant => Ok(()),
        }
    }

    /// The watchdog's reaction to the death of the command.
    fn watchdog(&mut self) {
        for origin in self.origins {
            let origin = self.device(origin).unwrap();
            origin.inactive = None;
            origin.suspended = false;
        }
        self.frozen.clear();
    }

    /// The origins are as before, nothing is held, and only the devices `rest` are left of ours.
    fn assert_clean<N: AsRef<str>>(&self, rest: &[N], what: &str) {
        for name in self.origins {
            let origin = &self.devices[*name];
            assert_eq!(origin.active, Some(own_of(name)), "{what}");
            assert!(!origin.suspended && origin.inactive.is_none(), "{what}: {self:?}");
        }
        assert!(self.frozen.is_empty(), "{what}: {self:?}");
        let mut names: Vec<&str> = self.devices.keys().map(String::as_str).collect();
        names.retain(|name| !self.origins.contains(name));
        let rest: Vec<&str> = rest.iter().map(AsRef::as_ref).collect();
        assert_eq!(names, rest, "{what}");
    }
}

impl Executor for FakeKernel {
    fn execute(&mut self, action: &Action) -> Result<()> {
        self.half_action();
        if let Some(left) = &mut self.fail_in {
            if *left == 0 {
                self.fail_in = None;
                return Err(Error::kernel(format!("{action}"), std::io::Error::other("injected")));
            }
            *left -= 1;
        }
        self.act(action)?;
        self.half_action();
        Ok(())
    }
}

impl Machine for FakeKernel {
    fn scene(&mut self) -> Result<Scene> {
        Ok(Scene {
            devices: self
                .devices
                .iter()
                .map(|(name, device)| SeenDevice {
                    name: name.clone(),
                    uuid: device.uuid.clone(),
                    number: device.number,
                    suspended: device.suspended,
                    active: device.active.clone(),
                    inactive: device.inactive.clone(),
                })
                .collect(),
            alive: BTreeSet::new(),
            dead: self.record.iter().cloned().collect(),
        })
    }

    fn executor(&mut self) -> &mut dyn Executor {
        self
    }
}

/// A change that makes ranges of an origin linear again during a copy.
fn release(origin: &str, table: Template) -> Change {
    let device = || origin.to_owned();
    let clear = Action::Clear { device: device() };
    let resume = Action::Resume { device: device(), udev: Udev::None };
    let suspend = Action::Suspend { device: device(), flush: false, lock_filesystem: false };
    Change::new("release")
        .then(Step::new("load", Action::Load { device: device(), table }).undo(clear.clone()))
        .then(Step::new("suspend", suspend).undo(clear).undo(resume.clone()))
        .then(Step::new("switch", resume))
}

/// The changes after the instant: releases, and the end.
fn after_the_instant(origin: &str, id: &str) -> Vec<Change> {
    let own = own_of(origin);
    let disks: Vec<DeviceNumber> = own.devices().into_iter().collect();
    let partly = format!(
        "0 2048 linear {{{origin}#preserve}} 0\n2048 2048 linear {} 4096\n4096 4096 switch 1 4096 0 {} 0",
        disks[0], disks[1]
    );
    vec![
        release(origin, Template::new(partly)),
        release(origin, released(origin)),
        restoration(origin, released(origin), &own),
        dismantling(&StackNames::new(origin, id)),
    ]
}

/// Runs the changes of a whole copy. The fake kernel keeps the record.
fn run_copy(kernel: &mut FakeKernel, id: &str) -> Result<()> {
    struct Pair<'a>(&'a mut JobRecord);
    impl IntentLog for Pair<'_> {
        fn intend(&mut self, change: &Change, index: usize) -> Result<()> {
            self.0.change = Some(change_record(change, index, false));
            Ok(())
        }
        fn intend_undo(&mut self, change: &Change, index: usize) -> Result<()> {
            self.0.change = Some(change_record(change, index, true));
            Ok(())
        }
        fn done(&mut self, _change: &Change) -> Result<()> {
            self.0.change = None;
            Ok(())
        }
    }
    let mut record = kernel.record_of(id);
    let after = kernel.origins.iter().flat_map(|origin| after_the_instant(origin, id));
    let changes: Vec<Change> = std::iter::once(kernel.insertion(id)).chain(after).collect();
    let result = catch_unwind(AssertUnwindSafe(|| {
        changes.iter().try_for_each(|change| change.run(kernel, &mut Pair(&mut record)))
    }));
    kernel.record = Some(record);
    result.unwrap_or_else(|crash| resume_unwind(crash))
}

fn crashes(run: impl FnOnce()) -> bool {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(()) => false,
        Err(thrown) if thrown.is::<Crash>() => true,
        Err(other) => resume_unwind(other),
    }
}

#[test]
fn a_copy_that_is_let_finish_leaves_the_origin_as_it_was() {
    let id = new_id();
    let mut kernel = kernel(&id);
    run_copy(&mut kernel, &id).unwrap();
    kernel.assert_clean(&["data#cow"], "finished");
}

/// A record that can be written this many times; then its disk is full.
struct Full(u32);

impl Full {
    fn write(&mut self) -> Result<()> {
        match self.0.checked_sub(1) {
            Some(left) => {
                self.0 = left;
                Ok(())
            }
            None => Err(Error::new(ErrorKind::NoSpace, "injected")),
        }
    }
}

impl IntentLog for Full {
    fn intend(&mut self, _change: &Change, _index: usize) -> Result<()> {
        self.write()
    }
    fn intend_undo(&mut self, _change: &Change, _index: usize) -> Result<()> {
        self.write()
    }
    fn done(&mut self, _change: &Change) -> Result<()> {
        self.write()
    }
}

#[test]
fn the_origin_is_as_before_also_where_nothing_can_be_recorded_any_more() {
    let (mut taken_back, mut removed) = (0, 0);
    for writes in 0..40 {
        let id = new_id();
        let mut kernel = kernel(&id);
        let mut journal = Full(writes);
        match kernel.insertion(&id).run(&mut kernel, &mut journal) {
            Err(_) => taken_back += 1,
            Ok(()) => {
                removed += 1;
                let over = Template::new(over("data#real", "data#preserve"));
                let own = own_of("data");
                for change in [restoration("data", over, &own), dismantling(&StackNames::new("data", &id))] {
                    change.run(&mut kernel, &mut BestEffort::new(&mut journal)).unwrap();
                }
            }
        }
        kernel.assert_clean(&["data#cow"], &format!("{writes} writes"));
    }
    assert!(taken_back > 14 && removed > 14, "{taken_back} {removed}");
}

#[test]
fn after_a_crash_anywhere_recover_restores_the_origins_and_leaves_nothing() {
    for group in GROUPS {
        let points = (0..1000).take_while(|crash_in| recovers_after(group, *crash_in)).count();
        assert!((60 * group.len()..1000).contains(&points), "{points} crashes");
    }
}

/// False if the copy ended before that crash.
fn recovers_after(group: &'static [&'static str], crash_in: u32) -> bool {
    for with_watchdog in [false, true] {
        let id = new_id();
        let mut kernel = kernel_of(group, &id);
        kernel.crash_in = Some(crash_in);
        if !crashes(|| run_copy(&mut kernel, &id).unwrap()) {
            return false;
        }
        if with_watchdog {
            kernel.watchdog();
        }
        let what = format!("{group:?}, crash {crash_in}, watchdog {with_watchdog}");
        recover_devices(&mut kernel).unwrap_or_else(|error| panic!("{what}: {error}"));
        kernel.assert_clean::<&str>(&[], &what);
        let again = recover_devices(&mut kernel).unwrap();
        assert!(again.iter().all(|done| done.starts_with("thaw")), "{what}");
    }
    true
}

#[test]
fn a_recover_that_is_killed_anywhere_can_be_run_again() {
    for crash_in in 0..1000 {
        let id = new_id();
        let mut before = kernel(&id);
        before.crash_in = Some(crash_in);
        if !crashes(|| run_copy(&mut before, &id).unwrap()) {
            return;
        }
        for again in 0..1000 {
            let mut kernel = before.clone();
            kernel.crash_in = Some(again);
            let crashed = crashes(|| {
                recover_devices(&mut kernel).unwrap();
            });
            kernel.crash_in = None;
            let what = format!("crash {crash_in}, then {again}");
            recover_devices(&mut kernel).unwrap_or_else(|error| panic!("{what}: {error}"));
            kernel.assert_clean::<&str>(&[], &what);
            if !crashed {
                break;
            }
        }
    }
    panic!("the copy never ends");
}

#[test]
fn a_failure_anywhere_puts_everything_back_or_says_so() {
    for group in GROUPS {
        let failures = (0..1000).take_while(|fail_in| puts_back_after(group, *fail_in)).count();
        assert!((20 * group.len()..1000).contains(&failures), "{failures} failures");
    }
}

/// False if the copy ended before that failure.
fn puts_back_after(group: &'static [&'static str], fail_in: u32) -> bool {
    let id = new_id();
    let mut kernel = kernel_of(group, &id);
    kernel.fail_in = Some(fail_in);
    let Err(error) = run_copy(&mut kernel, &id) else { return false };
    let what = format!("{group:?}, failure {fail_in}");
    assert!(error.state_left().is_some());
    let is_held = group.iter().any(|origin| kernel.devices[*origin].suspended);
    assert!(!is_held && kernel.frozen.is_empty(), "{what}");
    if error.what().starts_with("insert") {
        // Only one failure was injected, so every undo must succeed.
        assert!(error.failed_undos().is_empty(), "{what}: {:?}", error.failed_undos());
        kernel.assert_clean(&kernel.stores(), &what);
    }
    recover_devices(&mut kernel).unwrap();
    kernel.assert_clean::<&str>(&[], &format!("{what}, recovered"));
    true
}

#[test]
fn a_crash_while_steps_are_undone_is_recovered_too() {
    let pair: &[&str] = &["data", "wal"];
    for group in [GROUPS[0], pair] {
        let mut crashed = 0;
        for fail_in in 0..1000 {
            if !puts_back_after(group, fail_in) {
                break;
            }
            // A crash before the failure needs no undo.
            for crash_in in 2 * fail_in..1000 {
                let id = new_id();
                let mut kernel = kernel_of(group, &id);
                (kernel.fail_in, kernel.crash_in) = (Some(fail_in), Some(crash_in));
                if !crashes(|| drop(run_copy(&mut kernel, &id))) {
                    break;
                }
                crashed += 1;
                (kernel.fail_in, kernel.crash_in) = (None, None);
                let what = format!("{group:?}, failure {fail_in}, crash {crash_in}");
                recover_devices(&mut kernel).unwrap_or_else(|error| panic!("{what}: {error}"));
                kernel.assert_clean::<&str>(&[], &what);
            }
        }
        assert!(crashed > 200, "{crashed} crashes");
    }
}

#[test]
fn a_living_job_and_other_peoples_devices_are_left_alone() {
    let id = new_id();
    let mut kernel = kernel(&id);
    kernel.crash_in = Some(40);
    assert!(crashes(|| run_copy(&mut kernel, &id).unwrap()));
    kernel.create("other", "LVM-other").unwrap();
    kernel.device("other").unwrap().suspended = true;
    let mut scene = kernel.scene().unwrap();
    scene.dead.clear();
    scene.alive.insert(id);
    assert!(plan_release(&scene).is_empty());
    assert!(plan_restore(&scene).is_empty());
    assert!(plan_remove(&scene).is_empty());
}

/// The record of a copy that died while it held the origin: what the record names is released, but not what another
/// tool holds, even under the same name or number.
#[test]
fn only_what_the_dead_job_itself_holds_is_let_go() {
    let id = new_id();
    let mut kernel = kernel(&id);
    kernel.device("data").unwrap().suspended = true;
    let change = ChangeRecord {
        name: "insert".into(),
        step: 0,
        undo: false,
        frozen: Vec::new(),
        suspended: vec!["data".into()],
        steps: vec!["suspend data".into()],
    };
    let mut scene = kernel.scene().unwrap();
    scene.dead = vec![JobRecord { change: Some(change), ..kernel.record_of(&id) }];
    let resumes = |scene: &Scene| {
        let changes = plan_release(scene);
        let steps = changes.iter().flat_map(|change| &change.steps);
        steps.filter(|step| matches!(step.action, Action::Resume { .. })).count()
    };
    let data = |scene: &mut Scene, change: &dyn Fn(&mut SeenDevice)| {
        change(scene.devices.iter_mut().find(|device| device.name == "data").unwrap());
    };
    assert_eq!(resumes(&scene), 1);
    let mut other = scene.clone();
    data(&mut other, &|device| device.name = "renamed".into());
    assert_eq!(resumes(&other), 1, "renamed");
    let mut other = scene.clone();
    data(&mut other, &|device| device.number.minor += 100);
    assert_eq!(resumes(&other), 0, "another device of this name");
    let mut other = scene.clone();
    data(&mut other, &|device| device.active = Some("0 8192 linear 8:48 0".parse().unwrap()));
    assert_eq!(resumes(&other), 0, "another device with this number, or another tool's table");
    data(&mut scene, &|device| device.inactive = Some("0 16384 linear 8:48 0".parse().unwrap()));
    assert_eq!(resumes(&scene), 0, "another tool is changing it");
}

#[test]
fn an_origin_that_somebody_else_is_changing_is_not_resumed() {
    let id = new_id();
    let mut kernel = killed_with("0 8192 linear {data#preserve} 0", &id);
    let data = kernel.device("data").unwrap();
    data.suspended = true;
    let resumes = |kernel: &mut FakeKernel| {
        let changes = plan_release(&kernel.scene().unwrap());
        let mut steps = changes.iter().flat_map(|change| &change.steps);
        steps.any(|step| matches!(step.action, Action::Resume { .. }))
    };
    assert!(resumes(&mut kernel), "the dead copy has suspended it");
    kernel.device("data").unwrap().inactive = Some("0 16384 linear 8:48 0".parse().unwrap());
    assert!(!resumes(&mut kernel), "his table would come to life");
}

#[test]
fn attached_volumes_and_kept_stores_stay() {
    let id = new_id();
    let mut kernel = kernel(&id);
    for (name, role) in [("vol", ROLE_VOLUME), ("kept", crate::dm::naming::ROLE_KEPT)] {
        kernel.create(name, &DeviceIdentity::new(name, role, &id).uuid()).unwrap();
        kernel.device(name).unwrap().active = Some(OWN.parse().unwrap());
    }
    kernel.create("half", &DeviceIdentity::new("half", ROLE_VOLUME, &id).uuid()).unwrap();
    recover_devices(&mut kernel).unwrap();
    kernel.assert_clean(&["kept", "vol"], "kept");
}

#[test]
fn the_kernels_tables_are_enough_where_the_record_is_lost() {
    for group in GROUPS {
        let recovers = |crash_in: &u32| {
            let id = new_id();
            let mut kernel = kernel_of(group, &id);
            kernel.crash_in = Some(*crash_in);
            if !crashes(|| run_copy(&mut kernel, &id).unwrap()) {
                return false;
            }
            kernel.watchdog();
            kernel.record = None;
            recover_devices(&mut kernel).unwrap_or_else(|error| panic!("crash {crash_in}: {error}"));
            kernel.assert_clean::<&str>(&[], &format!("{group:?}, crash {crash_in}"));
            true
        };
        assert!((0..1000).take_while(recovers).count() < 1000, "the copy never ends");
    }
}

/// A copy that was killed with `table` in its origin.
fn killed_with(table: &str, id: &str) -> FakeKernel {
    let mut kernel = kernel(id);
    let uuid = DeviceIdentity::new("data", ROLE_REAL, id).uuid();
    kernel.act(&Action::Create { device: "data#real".into(), uuid }).unwrap();
    kernel.device("data#real").unwrap().active = Some(OWN.parse().unwrap());
    let uuid = DeviceIdentity::new("data", ROLE_PRESERVE, id).uuid();
    kernel.act(&Action::Create { device: "data#preserve".into(), uuid }).unwrap();
    let over_real = kernel.resolve(&Template::new("0 8192 snapshot-origin {data#real}")).unwrap();
    kernel.device("data#preserve").unwrap().active = Some(over_real);
    let table = kernel.resolve(&Template::new(table)).unwrap();
    kernel.device("data").unwrap().active = Some(table);
    kernel.record = Some(kernel.record_of(id));
    kernel
}

#[test]
fn a_strangers_device_over_ours_is_not_touched() {
    let origins = [
        "0 8192 linear {data#preserve} 0",
        "0 4096 linear {data#preserve} 0\n4096 4096 linear 8:32 0",
        "0 8192 linear {data#real} 0",
    ];
    let strangers =
        ["0 8192 linear {data#real} 0", "0 8 linear {data#real} 4096", "0 8 striped 1 8 {data#real} 0"];
    for (origin, stranger) in origins.iter().flat_map(|it| strangers.iter().map(move |other| (it, other))) {
        for (is_recorded, is_suspended) in [(true, false), (true, true), (false, false), (false, true)] {
            let what =
                format!("{origin} beside {stranger}, recorded: {is_recorded}, suspended: {is_suspended}");
            let id = new_id();
            let mut kernel = killed_with(origin, &id);
            kernel.create("look", "").unwrap();
            let table = kernel.resolve(&Template::new(*stranger)).unwrap();
            let look = kernel.device("look").unwrap();
            (look.active, look.inactive) = (Some(table.clone()), Some(table));
            look.suspended = is_suspended;
            let before = look.clone();
            if !is_recorded {
                kernel.record = None;
            }
            // The other tool keeps `real` in use, which is reported. Everything else is done.
            let error = recover_devices(&mut kernel).unwrap_err();
            assert!(error.to_string().contains("data#real is busy"), "{what}: {error}");
            assert_eq!(kernel.devices["look"], before, "{what}");
            kernel.assert_clean(&["data#real", "look"], &what);
            kernel.remove("look").unwrap();
            recover_devices(&mut kernel).unwrap();
            kernel.assert_clean::<&str>(&[], &what);
        }
    }
}

#[test]
fn an_origin_that_was_renamed_is_known_by_its_number() {
    for table in
        ["0 8192 linear {data#real} 0", "0 4096 linear {data#real} 0\n4096 4096 linear {data#preserve} 4096"]
    {
        let id = new_id();
        let mut kernel = killed_with(table, &id);
        let data = kernel.devices.remove("data").unwrap();
        kernel.devices.insert("renamed".into(), data);
        recover_devices(&mut kernel).unwrap();
        let data = kernel.devices.remove("renamed").unwrap();
        kernel.devices.insert("data".into(), data);
        kernel.assert_clean::<&str>(&[], table);
    }
}

#[test]
fn an_origin_that_is_all_released_goes_back_also_without_what_preserved_it() {
    let id = new_id();
    let mut kernel = killed_with("0 8192 linear {data#real} 0", &id);
    kernel.remove("data#preserve").unwrap();
    recover_devices(&mut kernel).unwrap();
    kernel.assert_clean::<&str>(&[], "all released");
}

#[test]
fn a_table_that_no_copy_makes_is_left_to_whoever_made_it() {
    for table in [
        "0 8192 linear {data#real} 8",
        "0 8 striped 1 8 {data#real} 0\n8 8184 linear {data#preserve} 8",
        "0 8 linear 8:48 0\n8 8184 linear {data#preserve} 8",
        "0 8192 snapshot-origin {data#real}",
    ] {
        for is_recorded in [true, false] {
            let id = new_id();
            let mut kernel = killed_with(table, &id);
            let data = kernel.device("data").unwrap();
            (data.inactive, data.suspended) = (data.active.clone(), true);
            let before = data.clone();
            if !is_recorded {
                kernel.record = None;
            }
            let error = recover_devices(&mut kernel).unwrap_err();
            assert!(error.to_string().contains("is busy"), "{table}: {error}");
            assert_eq!(kernel.devices["data"], before, "{table}");
        }
    }
}
