//! The snapshot stack over a live origin: put in place at one instant, taken away again.
//!
//! Insertion, in order (each a step with its undo; see [`insertion`]):
//! 1. `real` gets a copy of the origin's own table, `snap` becomes a snapshot of `real` with the COW
//!    store: both in use *before* anything is held, for writes do not pass an origin target yet;
//! 2. `snapshot-origin` over `real` is loaded into the origin, not used yet;
//! 3. filesystems are synced, then frozen; the origin is suspended: the instant;
//! 4. the origin is resumed, which puts the loaded table to use; filesystems are thawed.
//!
//! Invariants: the origin is the only device ever suspended; nothing waits for udev between the
//! freeze and the thaw; nothing is logged meanwhile; a failure anywhere puts the origin's own table
//! back, the very text. A copy of that table is in `real` as long as the stack is in place, so the
//! kernel alone is enough to undo it ([`recover`](super::recover)).

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::base::clock::{self, Stopwatch};
use crate::base::{ChunkSize, DeviceNumber, Error, ErrorKind, Result, ResultExt};
use crate::dm::naming::{ROLE_REAL, ROLE_SNAP, beside};
use crate::dm::{
    Action, Change, DeviceIdentity, Dm, Executor, Slot, SnapshotStatus, Step, Table, Target, Template, Udev,
    node,
};
use crate::sys::{freeze, process};

use super::job::Job;
use super::watchdog::{Order, Verdict, Watchdog, budget_ran_out};

/// Attempts to put the origin's own table back when the watchdog intervenes.
const RESTORE_ATTEMPTS: u32 = 3;

/// The steps of an insertion, in order: with `insert.` before and `.before`, `.after` behind, the
/// names of its crash points.
pub const INSERT_STEPS: [&str; 15] = [
    "create-real",
    "load-real",
    "resume-real",
    "create-snap",
    "load-snap",
    "resume-snap",
    "load-origin",
    "guard",
    "freeze",
    "suspend",
    "instant",
    "switch",
    "thaw",
    "unguard",
    "expect",
];
/// The steps of putting the origin's table back (`restore.`).
pub const RESTORE_STEPS: [&str; 6] = ["load-own", "guard", "suspend", "switch", "unguard", "expect"];
/// The steps of removing the devices beneath (`dismantle.`).
pub const DISMANTLE_STEPS: [&str; 2] = ["remove-snap", "remove-real"];

/// What to put where.
#[derive(Clone, Debug)]
pub struct StackRequest {
    /// The origin's device-mapper name.
    pub origin: String,
    /// The COW store's device, its first chunk zeroed.
    pub cow: DeviceNumber,
    /// Unit of copy-on-write.
    pub chunk: ChunkSize,
    /// Mount points of every filesystem on the origin, one each, in the order of freezing.
    pub filesystems: Vec<PathBuf>,
    /// Let the suspension freeze what is mounted on the device itself: for mounts that cannot be
    /// reached.
    pub lock_filesystem: bool,
    /// Longest time that anything may be frozen or suspended.
    pub budget: Duration,
}

/// What can be done at the instant.
#[derive(Clone, Copy, Debug)]
pub struct InstantContext<'a> {
    /// The device beneath: can be read, and does not change before the origin is resumed.
    pub below: &'a Path,
    /// The instant, UTC, in nanoseconds since 1970.
    pub utc_ns: u64,
    /// When the budget ends.
    pub deadline: Instant,
}

/// How long the origin was held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HoldTimes {
    /// Syncing filesystems, nothing held yet.
    pub synced: Duration,
    /// From the first freeze to the last thaw.
    pub frozen: Duration,
    /// From the suspension's begin to the resume's end.
    pub suspended: Duration,
    /// The instant, UTC, in nanoseconds since 1970.
    pub instant_utc_ns: u64,
}

/// A stack in place. Plain data: dropping it does nothing, [`Stack::remove`] takes it away.
#[derive(Clone, Debug)]
pub struct Stack {
    origin: String,
    real: String,
    snap: String,
    own_table: Table,
    origin_table: Table,
    below: PathBuf,
    budget: Duration,
    times: HoldTimes,
}

/// The plan of an insertion: the very value that [`Stack::insert`] runs.
#[must_use]
pub fn insertion(request: &StackRequest, own_table: &Table, id: &str) -> Change {
    let origin = request.origin.as_str();
    let real = beside(origin, ROLE_REAL, id);
    let snap = beside(origin, ROLE_SNAP, id);
    let length = own_table.length().get();
    let uuid = |role| DeviceIdentity::new(origin, role, id).uuid();
    let snap_table =
        format!("0 {length} snapshot {{{real}}} {} PO {}", request.cow, request.chunk.sectors().get());
    let origin_table = Template::new(format!("0 {length} snapshot-origin {{{real}}}"));
    let step = |name: &str, action| Step::new(name, action);
    let filesystems = request.filesystems.clone();
    Change::new("insert")
        .then(
            step("create-real", Action::Create { device: real.clone(), uuid: uuid(ROLE_REAL) })
                .undo(Action::Remove { device: real.clone(), udev: Udev::Internal }),
        )
        .then(step("load-real", Action::Load { device: real.clone(), table: own_table.into() }))
        .then(step("resume-real", Action::Resume { device: real, udev: Udev::Internal }))
        .then(
            step("create-snap", Action::Create { device: snap.clone(), uuid: uuid(ROLE_SNAP) })
                .undo(Action::Remove { device: snap.clone(), udev: Udev::Internal }),
        )
        .then(step("load-snap", Action::Load { device: snap.clone(), table: Template::new(snap_table) }))
        .then(step("resume-snap", Action::Resume { device: snap, udev: Udev::Internal }))
        .then(
            step("load-origin", Action::Load { device: origin.to_owned(), table: origin_table.clone() })
                .undo(Action::Clear { device: origin.to_owned() }),
        )
        .then(step("guard", guard(origin, &filesystems)).undo(Action::Dismiss))
        .then(
            step("freeze", Action::Freeze { filesystems: filesystems.clone() })
                .undo(Action::Thaw { filesystems: filesystems.clone() }),
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
        .then(step("expect", Action::Expect { device: origin.to_owned(), table: origin_table }))
}

/// Once the origin uses the new table, going back is a reload of its own, under a watchdog of its
/// own (the first one may have fired: that may be why we go back).
/// Filesystems first, while the watchdog that knows of them still stands.
fn undo_switch(step: Step, origin: &str, own_table: &Table, filesystems: &[PathBuf]) -> Step {
    step.undo(Action::Thaw { filesystems: filesystems.to_vec() })
        .undo(Action::Dismiss)
        .undo(guard(origin, &[]))
        .undo(Action::Load { device: origin.to_owned(), table: own_table.into() })
        .undo(suspend(origin, false, false))
        .undo(resume(origin))
        .undo(Action::Dismiss)
}

/// The plan of putting the origin's own table back.
#[must_use]
pub fn restoration(origin: &str, own_table: &Table) -> Change {
    let clear = Action::Clear { device: origin.to_owned() };
    Change::new("restore")
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

/// The plan of removing what the origin no longer maps to. Nothing of it is taken back: what is left
/// is removed by the next attempt.
#[must_use]
pub fn dismantling(snap: &str, real: &str) -> Change {
    let remove = |device: &str| Action::Remove { device: device.to_owned(), udev: Udev::Internal };
    Change::new("dismantle")
        .then(Step::new("remove-snap", remove(snap)))
        .then(Step::new("remove-real", remove(real)))
}

fn guard(origin: &str, filesystems: &[PathBuf]) -> Action {
    Action::Guard { device: origin.to_owned(), filesystems: filesystems.to_vec() }
}

fn suspend(origin: &str, flush: bool, lock_filesystem: bool) -> Action {
    Action::Suspend { device: origin.to_owned(), flush, lock_filesystem }
}

// Never with a cookie: while anything is held nobody waits for udev, and udev keeps what it knows
// of a device that is not ours.
fn resume(origin: &str) -> Action {
    Action::Resume { device: origin.to_owned(), udev: Udev::None }
}

/// Every crash point of a copy's stack changes, in order of passage.
#[must_use]
pub fn crash_points() -> Vec<String> {
    [("insert", &INSERT_STEPS[..]), ("restore", &RESTORE_STEPS), ("dismantle", &DISMANTLE_STEPS)]
        .iter()
        .flat_map(|(change, steps)| steps.iter().map(move |step| (change, step)))
        .flat_map(|(change, step)| [format!("{change}.{step}.before"), format!("{change}.{step}.after")])
        .collect()
}

/// What is done at the instant.
pub type AtInstant<'a> = &'a mut dyn FnMut(&InstantContext<'_>) -> Result<()>;

impl Stack {
    /// Puts the stack in place. `at_instant` runs while the origin is quiet; `interrupt` is asked
    /// before each step of the critical section up to the switch.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] for an origin that cannot carry a stack, [`ErrorKind::Timeout`] where
    /// the budget runs out, `at_instant`'s, `interrupt`'s and the kernel's; everything is put back.
    pub fn insert(
        dm: &Dm,
        job: &mut Job,
        request: &StackRequest,
        at_instant: AtInstant<'_>,
        interrupt: &dyn Fn() -> Result<()>,
    ) -> Result<Self> {
        let origin = request.origin.as_str();
        let own_table = own_table(dm, origin)?;
        refuse_own_record(job, &request.filesystems)?;
        let real = beside(origin, ROLE_REAL, job.id());
        let snap = beside(origin, ROLE_SNAP, job.id());
        for name in [&real, &snap] {
            if dm.info(name)?.is_some() {
                return Err(Error::refused(format!("{origin} has a device {name} already"))
                    .state("nothing was changed")
                    .next("wait for the copy in progress ('tidemark status'), or run 'tidemark recover'"));
            }
        }
        job.set_origin(origin, dm.info_of(origin)?.number, &own_table.to_string())?;
        if request.lock_filesystem {
            // What is frozen by its device cannot be named: write everything back now, or the suspension
            // would do it while writers wait.
            nix::unistd::sync();
        }
        let change = insertion(request, &own_table, job.id());
        let mut runner = Runner::new(dm, request.budget, interrupt);
        runner.at_instant = Some(at_instant);
        runner.below = Some(real.clone());
        change.run(&mut runner, job)?;
        let times = runner.times;
        runner.report(origin);
        // Nothing after the change may fail: the stack is in place.
        let (number, below) = runner.below_found.take().expect("the instant has run, and looked it up");
        let device = Target::SnapshotOrigin { device: number };
        let origin_table = Table::single(own_table.length(), device);
        Ok(Self {
            origin: origin.to_owned(),
            below,
            origin_table: origin_table.expect("one line as long as a table that the kernel has"),
            real,
            snap,
            own_table,
            budget: request.budget,
            times,
        })
    }

    /// How long the origin was held.
    #[must_use]
    pub fn times(&self) -> HoldTimes {
        self.times
    }

    /// A path of the device beneath: the origin's data, read past the snapshot.
    #[must_use]
    pub fn below(&self) -> &Path {
        &self.below
    }

    /// The name of the snapshot device: the origin as it was at the instant.
    #[must_use]
    pub fn snap(&self) -> &str {
        &self.snap
    }

    /// How the snapshot is.
    ///
    /// # Errors
    /// The kernel's.
    pub fn snapshot_status(&self, dm: &Dm) -> Result<SnapshotStatus> {
        dm.snapshot_status(&self.snap)
    }

    /// Fails where the origin does not write through the stack any more: somebody else has replaced
    /// its table (`lvextend` does), so originals may be missing. To be asked after the last read and
    /// before success is claimed.
    ///
    /// # Errors
    /// [`ErrorKind::StoreInvalid`].
    pub fn check_in_place(&self, dm: &Dm) -> Result<()> {
        if dm.table(&self.origin, Slot::Active)?.as_ref() == Some(&self.origin_table) {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::StoreInvalid,
            format!("somebody replaced the table of {} while it was being copied", self.origin),
        )
        .next("copy again, and do not resize or move the volume meanwhile"))
    }

    /// Takes the stack away: the origin gets its own table back, then snapshot and `real` go. Can be
    /// called again where it failed. A table that somebody else has given the origin meanwhile stays.
    ///
    /// # Errors
    /// The kernel's.
    pub fn remove(&self, dm: &Dm, job: &mut Job) -> Result<()> {
        self.put_back(dm, job).map_err(|error| {
            error
                .context(format!("putting back the table of {}", self.origin))
                .state(format!("{} goes on, with the snapshot in place", self.origin))
                .next("run 'tidemark recover'")
        })?;
        let mut runner = Runner::new(dm, self.budget, &|| Ok(()));
        let left: Vec<_> = [&self.snap, &self.real]
            .into_iter()
            .map(|name| Ok((name, dm.info(name)?.is_some())))
            .collect::<Result<Vec<_>>>()?;
        let mut change = dismantling(&self.snap, &self.real);
        let gone = |device: &str| left.iter().any(|(name, there)| name.as_str() == device && !there);
        change.steps.retain(|step| !matches!(&step.action, Action::Remove { device, .. } if gone(device)));
        change.run(&mut runner, job).map_err(|error| {
            error
                .state(format!("{} has its own table again; devices of the copy are left", self.origin))
                .next("run 'tidemark recover'")
        })
    }

    fn put_back(&self, dm: &Dm, job: &mut Job) -> Result<()> {
        let mut attempt = 1;
        loop {
            if dm.table(&self.origin, Slot::Active)?.as_ref() != Some(&self.origin_table) {
                return Ok(());
            }
            let mut runner = Runner::new(dm, self.budget, &|| Ok(()));
            match restoration(&self.origin, &self.own_table).run(&mut runner, job) {
                Ok(()) => return Ok(()),
                Err(error) if attempt >= RESTORE_ATTEMPTS => return Err(error),
                Err(error) => tracing::warn!("{error}; trying again"),
            }
            attempt += 1;
        }
    }
}

/// The origin's table, if it can carry a stack.
fn own_table(dm: &Dm, origin: &str) -> Result<Table> {
    let info = dm.info_of(origin)?;
    let table = dm.table(origin, Slot::Active)?.ok_or_else(|| {
        Error::refused(format!("{origin} has no table")).next("activate the device, then copy it")
    })?;
    if info.suspended || info.has_inactive {
        return Err(Error::refused(format!(
            "somebody is changing {origin}: it is suspended or has a table loaded"
        ))
        .state("nothing was changed")
        .next("wait until that is over; after a crash: 'tidemark recover', or 'dmsetup resume'"));
    }
    for line in table.lines() {
        if !matches!(line.target, Target::Linear { .. } | Target::Striped { .. }) {
            return Err(Error::refused(format!(
                "{origin} has a '{}' target; only linear and striped devices can be copied live",
                line.target.kind()
            )));
        }
    }
    Ok(table)
}

/// The journal must not lie on a filesystem that is about to be frozen.
fn refuse_own_record(job: &Job, filesystems: &[PathBuf]) -> Result<()> {
    let record = job.filesystem()?;
    for path in filesystems {
        let meta = std::fs::metadata(path).io_context(|| format!("looking at {}", path.display()))?;
        if DeviceNumber::from_dev(meta.dev()) == record {
            return Err(Error::refused(format!(
                "{} lies on the filesystem {} that is to be frozen",
                super::job::RUN_DIR,
                path.display()
            ))
            .next("mount a tmpfs on /run, as every distribution does"));
        }
    }
    Ok(())
}

/// Does a change's actions: device-mapper's by [`Dm`], freeze, watchdog and instant itself.
pub(super) struct Runner<'a> {
    dm: &'a Dm,
    budget: Duration,
    interrupt: &'a dyn Fn() -> Result<()>,
    at_instant: Option<AtInstant<'a>>,
    below: Option<String>,
    below_found: Option<(DeviceNumber, PathBuf)>,
    watchdog: Option<Watchdog>,
    files: Vec<(PathBuf, File)>,
    frozen_since: Option<Instant>,
    suspended_since: Option<Instant>,
    times: HoldTimes,
    /// What could not be said while it happened.
    notes: Vec<String>,
}

impl<'a> Runner<'a> {
    pub(super) fn new(dm: &'a Dm, budget: Duration, interrupt: &'a dyn Fn() -> Result<()>) -> Self {
        Self {
            dm,
            budget,
            interrupt,
            at_instant: None,
            below: None,
            below_found: None,
            watchdog: None,
            files: Vec::new(),
            frozen_since: None,
            suspended_since: None,
            times: HoldTimes::default(),
            notes: Vec::new(),
        }
    }

    fn report(&mut self, origin: &str) {
        for note in self.notes.drain(..) {
            tracing::warn!("{note}");
        }
        tracing::info!(
            "{origin}: synced in {} ms, frozen for {} ms, suspended for {} ms",
            self.times.synced.as_millis(),
            self.times.frozen.as_millis(),
            self.times.suspended.as_millis()
        );
    }

    /// Files are opened and dirty data is written back while nothing is held yet, so that the freeze
    /// itself is short.
    fn guard(&mut self, device: &str, filesystems: &[PathBuf]) -> Result<()> {
        let watch = Stopwatch::start();
        self.files.clear();
        for path in filesystems {
            let file = File::open(path).io_context(|| format!("opening {}", path.display()))?;
            freeze::sync_filesystem(&file)
                .io_context(|| format!("writing back the filesystem at {}", path.display()))?;
            self.files.push((path.clone(), file));
        }
        self.times.synced = watch.elapsed();
        let program = Path::new("/proc/self/exe");
        let order = Order {
            devices: vec![device.to_owned()],
            filesystems: filesystems.to_vec(),
            budget_ms: u64::try_from(self.budget.as_millis()).unwrap_or(u64::MAX),
        };
        let mut watchdog = Watchdog::start(program, &order)?;
        if let Err(error) = process::lock_memory() {
            self.notes.push(format!("memory cannot be locked during the freeze: {error}"));
        }
        let armed = watchdog.arm();
        self.watchdog = Some(watchdog);
        armed
    }

    fn dismiss(&mut self) -> Verdict {
        let verdict = self.watchdog.take().map_or(Verdict::Calm, Watchdog::dismiss);
        let _ = process::unlock_memory();
        verdict
    }

    /// Before and after each critical action: has the watchdog let everything go, or the user asked
    /// us to stop? If the watchdog has fired it is stopped first: from then on we put things back.
    fn check(&mut self, interruptible: bool) -> Result<()> {
        let fired = match self.watchdog.as_mut() {
            Some(watchdog) => watchdog.check(),
            None => Ok(()),
        };
        if let Err(error) = fired {
            self.dismiss();
            return Err(error);
        }
        if interruptible { (self.interrupt)() } else { Ok(()) }
    }

    fn freeze(&mut self) -> Result<()> {
        self.check(true)?;
        let start = Instant::now();
        self.frozen_since = Some(start);
        let mut result = Ok(());
        let mut count = 0;
        for (path, file) in &self.files {
            match freeze::freeze(file) {
                Ok(()) => count += 1,
                Err(source) => {
                    result = Err(freeze_error(path, source));
                    break;
                }
            }
        }
        let result = result
            .and_then(|()| self.check(true))
            .and_then(|()| if start.elapsed() > self.budget { Err(budget_ran_out()) } else { Ok(()) });
        // All or none: this step is not taken back by itself.
        if result.is_err() {
            for (_, file) in self.files.iter().take(count).rev() {
                let _ = freeze::thaw(file);
            }
            self.frozen_since = None;
        }
        result
    }

    fn thaw(&mut self, filesystems: &[PathBuf]) -> Result<()> {
        if self.files.is_empty() {
            // Not frozen by us but by a job that died. Opening a directory writes nothing.
            for path in filesystems {
                match File::open(path) {
                    Ok(file) => self.files.push((path.clone(), file)),
                    // Unmounted since, so not frozen.
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                    Err(error) => return Err(error).io_context(|| format!("opening {}", path.display())),
                }
            }
        }
        let mut result = Ok(());
        for (path, file) in self.files.iter().rev() {
            match freeze::thaw(file) {
                Ok(()) => {}
                // The watchdog was faster, or somebody else.
                Err(source) if source.raw_os_error() == Some(libc::EINVAL) => {
                    self.notes.push(format!("{} was thawed by somebody else", path.display()));
                }
                Err(source) => {
                    result = Err(Error::io(format!("thawing {}", path.display()), source)
                        .next(format!("run 'fsfreeze -u {}'", path.display())));
                }
            }
        }
        if let Some(since) = self.frozen_since.take() {
            self.times.frozen = since.elapsed();
        }
        result
    }

    fn suspend(&mut self, action: &Action, device: &str) -> Result<()> {
        self.check(true)?;
        self.suspended_since = Some(Instant::now());
        self.dm.execute(action)?;
        self.times.instant_utc_ns = clock::utc_now_ns();
        if let Err(error) = self.check(false) {
            // The watchdog acted too early to see this suspension.
            let undo = self.dm.clear(device).and_then(|()| self.dm.resume(device, Udev::None));
            return Err(match undo {
                Ok(()) => error,
                Err(undo) => error.with_failed_undo(undo),
            });
        }
        Ok(())
    }

    fn instant(&mut self) -> Result<()> {
        self.check(true)?;
        let held_since = self.frozen_since.or(self.suspended_since).unwrap_or_else(Instant::now);
        let (Some(below), Some(at_instant)) = (self.below.as_deref(), self.at_instant.as_mut()) else {
            return Ok(());
        };
        let number = self.dm.info_of(below)?.number;
        let path = node::device_path(number)?;
        self.below_found = Some((number, path.clone()));
        at_instant(&InstantContext {
            below: &path,
            utc_ns: self.times.instant_utc_ns,
            deadline: held_since + self.budget,
        })?;
        self.check(true)
    }

    fn resume(&mut self, action: &Action) -> Result<()> {
        self.dm.execute(action)?;
        if let Some(since) = self.suspended_since.take() {
            self.times.suspended = since.elapsed();
        }
        Ok(())
    }
}

impl Executor for Runner<'_> {
    fn execute(&mut self, action: &Action) -> Result<()> {
        match action {
            Action::Guard { device, filesystems } => {
                (self.interrupt)()?;
                let result = self.guard(device, filesystems);
                if result.is_err() {
                    self.dismiss();
                }
                result
            }
            Action::Freeze { .. } => self.freeze(),
            Action::Thaw { filesystems } => self.thaw(filesystems),
            Action::Suspend { device, .. } => self.suspend(action, device),
            Action::Instant => self.instant(),
            Action::Resume { .. } => self.resume(action),
            Action::Unguard => match self.dismiss() {
                Verdict::Fired(_) => Err(budget_ran_out()),
                Verdict::Calm => Ok(()),
                Verdict::Lost => {
                    self.notes.push("the watchdog died".to_owned());
                    Ok(())
                }
            },
            Action::Dismiss => {
                if let Verdict::Fired(_) = self.dismiss() {
                    self.notes.push("the watchdog had let the origin go on".to_owned());
                }
                Ok(())
            }
            _ => self.dm.execute(action),
        }
    }
}

fn freeze_error(path: &Path, source: std::io::Error) -> Error {
    let error = |what: &str| Error::refused(format!("freezing {}: {what}", path.display()));
    match source.raw_os_error() {
        Some(libc::EBUSY) => error("somebody else has frozen it")
            .with_source(source)
            .next(format!("thaw it first: fsfreeze -u {}", path.display())),
        Some(libc::EOPNOTSUPP) => {
            error("its filesystem cannot be frozen").with_source(source).next("unmount it, then copy it")
        }
        _ => Error::io(format!("freezing {}", path.display()), source),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> StackRequest {
        StackRequest {
            origin: "vg-data".into(),
            cow: DeviceNumber { major: 253, minor: 9 },
            chunk: ChunkSize::default(),
            filesystems: vec!["/srv".into()],
            lock_filesystem: false,
            budget: Duration::from_secs(2),
        }
    }

    #[test]
    fn crash_points_are_those_of_the_plans() {
        let own: Table = "0 8192 linear 8:16 2048".parse().unwrap();
        let id = crate::dm::naming::new_id();
        let mut points = insertion(&request(), &own, &id).crash_points();
        points.extend(restoration("vg-data", &own).crash_points());
        points.extend(dismantling("s", "r").crash_points());
        assert_eq!(points, crash_points());
    }

    #[test]
    fn the_plan_holds_only_the_origin_and_waits_for_nobody_meanwhile() {
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
        assert_eq!(
            plan.steps[6].action.to_string(),
            "load into vg-data: 0 8192 snapshot-origin {vg-data-real}"
        );
    }
}
