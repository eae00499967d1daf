//! Performs the steps of a change: [`Dm`] does those of device-mapper, the runner itself freeze, watchdog,
//! free-space map and instant.

use std::fs::File;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::base::clock::{self, Stopwatch};
use crate::base::limits::{FREE_MAP_TIME_MAX, OMISSION_BUDGET_SHARE};
use crate::base::{DeviceNumber, Error, ErrorKind, Result, ResultExt};
use crate::dm::{Dm, SUSPEND_ATTEMPTS, Table, Template, Udev, node};
use crate::stack::watchdog::{Order, Standby, Verdict, Watchdog, budget_ran_out};
use crate::stack::write_back::write_back;
use crate::stack::{Action, Executor, Owner};
use crate::sys::dm_ioctl::SuspendFlags;
use crate::sys::nudge::Nudge;
use crate::sys::process;
use crate::sys::process::LockedMemory;
use crate::sys::rcu::Expedite;
use crate::volume::free::MapDeadlines;
use crate::volume::{FreezeSet, open_in_other_namespace};

use super::freeze_estimate;
use super::freezing::Filesystems;
use super::member::Member;
use super::model::{AtInstant, HoldTimes, InstantContext};

/// Performs the actions of a change: those of device-mapper by [`Dm`], freeze, watchdog and instant itself.
pub struct Runner<'a> {
    dm: &'a Dm,
    budget: Duration,
    interrupt: &'a dyn Fn() -> Result<()>,
    pub(super) at_instant: Option<AtInstant<'a>>,
    /// The origins under which stacks are inserted; empty for another change.
    pub(super) members: Vec<Member>,
    /// The only code that changes the tables of the devices of [`Action::Own`].
    pub(super) owners: Vec<Owner>,
    /// The devices `real`, by a path that can be opened: known from the instant on, in the order of the members.
    pub(super) below: Vec<PathBuf>,
    /// The filesystems to freeze, as found by the plan; None if there was no plan.
    pub(super) frozen: Option<FreezeSet>,
    /// Steps are being undone: interrupts are ignored.
    is_undoing: bool,
    /// The devices held open by [`Action::Claim`], by name.
    pub(super) claims: Vec<(String, File)>,
    /// Supplies the watchdog, and takes it back when it has nothing to guard.
    pub(super) standby: Standby,
    watchdog: Option<Watchdog>,
    /// Expedites RCU while writers wait.
    expedite: Option<Expedite>,
    filesystems: Filesystems,
    /// Memory, locked while something is guarded. Other code of this process may keep it locked for longer.
    locked: Option<LockedMemory>,
    /// Interrupts a suspension that takes longer than the budget.
    nudge: Option<Nudge>,
    /// When the watchdog was armed.
    armed_since: Option<Instant>,
    frozen_since: Option<Instant>,
    /// Until when what is not copied may be looked for.
    map_deadlines: Option<MapDeadlines>,
    suspended_since: Option<Instant>,
    pub(super) times: HoldTimes,
    /// Messages that could not be logged while something was held.
    notes: Vec<String>,
}

impl Drop for Runner<'_> {
    /// Logs the collected messages, as nothing is held any more.
    fn drop(&mut self) {
        self.log_notes();
    }
}

impl<'a> Runner<'a> {
    /// A runner without settings: the caller sets what its change needs.
    pub fn new(dm: &'a Dm, budget: Duration, interrupt: &'a dyn Fn() -> Result<()>) -> Self {
        Self {
            dm,
            budget,
            interrupt,
            at_instant: None,
            members: Vec::new(),
            owners: Vec::new(),
            below: Vec::new(),
            frozen: None,
            is_undoing: false,
            claims: Vec::new(),
            standby: Standby::default(),
            watchdog: None,
            expedite: None,
            filesystems: Filesystems::default(),
            locked: None,
            nudge: None,
            armed_since: None,
            frozen_since: None,
            map_deadlines: None,
            suspended_since: None,
            times: HoldTimes::default(),
            notes: Vec::new(),
        }
    }

    /// Longest time that anything may be held.
    pub(super) fn budget(&self) -> Duration {
        self.budget
    }

    pub(super) fn report(&mut self) {
        self.log_notes();
        let origins: Vec<&str> = self.members.iter().map(|member| member.name.as_str()).collect();
        tracing::info!(
            "{}: synced in {} ms, frozen for {} ms, suspended for {} ms",
            origins.join(", "),
            self.times.synced.as_millis(),
            self.times.frozen.as_millis(),
            self.times.suspended.as_millis()
        );
    }

    fn log_notes(&mut self) {
        for note in self.notes.drain(..) {
            tracing::warn!("{note}");
        }
    }

    /// Does everything that takes time before anything is held. Dirty data is written back last, so that the
    /// freeze, which writes back what has become dirty since, is short.
    fn guard(&mut self, devices: &[String], filesystems: &[PathBuf]) -> Result<()> {
        self.filesystems.clear();
        for path in filesystems {
            let file = File::open(path).io_context(|| format!("opening {}", path.display()))?;
            if let Some(frozen) = &self.frozen {
                frozen.check_file(path, &file)?;
            }
            for mapper in self.members.iter().filter_map(Member::mapper) {
                mapper.check_same(path, &file)?;
            }
            let height = self.frozen.as_ref().and_then(|frozen| frozen.height_of(path));
            self.filesystems.add(path, file, height);
        }
        self.expedite = Expedite::open_if_off();
        let numbers = devices.iter().map(|device| Ok(self.dm.info_of(device.as_str())?.number));
        let order = Order {
            devices: numbers.collect::<Result<_>>()?,
            // Names these open files, whatever is mounted at their paths by the time that the watchdog opens
            // them.
            filesystems: self.filesystems.files().map(|(_, file)| process::path_of(file)).collect(),
            budget_ms: u64::try_from(self.budget.as_millis()).unwrap_or(u64::MAX),
            is_expedited: self.expedite.is_some(),
        };
        self.watchdog = Some(self.standby.guard(&order)?);
        match LockedMemory::lock() {
            Ok(locked) => self.locked = Some(locked),
            Err(error) => self.notes.push(format!("memory cannot be locked during the freeze: {error}")),
        }
        self.nudge = Some(
            Nudge::new()
                .io_context(|| "preparing to interrupt a suspension that takes too long".to_owned())?,
        );
        let watch = Stopwatch::start();
        self.write_back()?;
        self.times.synced = watch.elapsed();
        self.watchdog.as_mut().map_or(Ok(()), Watchdog::arm)?;
        self.armed_since = Some(Instant::now());
        // From here on the watchdog turns it off if this process cannot.
        if let Some(expedite) = &self.expedite
            && let Err(error) = expedite.turn_on()
        {
            self.notes.push(format!("RCU grace periods cannot be expedited: {error}"));
        }
        Ok(())
    }

    /// Writes back the filesystems and the devices, and repeats that while it becomes shorter. Fails if the
    /// freeze would take longer than the budget.
    fn write_back(&self) -> Result<()> {
        if self.is_undoing || self.members.is_empty() {
            return Ok(());
        }
        let mut targets: Vec<(String, &File)> =
            self.filesystems.files().map(|(path, file)| (path.display().to_string(), file)).collect();
        // A filesystem mounted in another namespace, and writes to the device itself, also count.
        let locked = self.members.iter().filter(|member| member.lock_filesystem);
        let hidden = locked.map(|member| open_in_other_namespace(member.number));
        let hidden: Vec<File> = hidden.filter_map(Result::transpose).collect::<Result<_>>()?;
        targets
            .extend(hidden.iter().map(|file| ("the filesystem in another mount namespace".to_owned(), file)));
        let frozen_count = targets.len();
        let open = |member: &Member| {
            File::open(node::device_path(member.number)?)
                .io_context(|| format!("opening the origin {}", member.name))
        };
        let devices = self.members.iter().map(open).collect::<Result<Vec<_>>>()?;
        targets.extend(devices.iter().map(|device| ("the device".to_owned(), device)));
        let interrupt = || self.check_interrupt();
        let numbers = self.numbers();
        let expected = freeze_estimate::expected_freeze(&numbers, frozen_count, || {
            targets.iter().try_for_each(|(what, file)| write_back(file, what, &interrupt))
        })?;
        if frozen_count == 0 || expected.total() <= self.budget {
            return Ok(());
        }
        Err(expected.refusal(self.budget))
    }

    fn numbers(&self) -> Vec<DeviceNumber> {
        self.members.iter().map(|member| member.number).collect()
    }

    fn dismiss(&mut self) -> Verdict {
        // Turned off before the watchdog is dismissed: the watchdog turns it off if this process dies here.
        if let Some(Err(error)) = self.expedite.take().map(|expedite| expedite.turn_off()) {
            self.notes.push(format!("{} stays on: {error}", crate::sys::rcu::PATH));
        }
        self.nudge = None;
        let verdict = self.watchdog.take().map_or(Verdict::Calm, |watchdog| self.standby.dismiss(watchdog));
        self.locked = None;
        // Not while another origin of the group is still held.
        if !self.owners.iter().any(Owner::is_held) {
            self.owners.iter_mut().for_each(Owner::put_back_settings);
        }
        verdict
    }

    /// Before and after each critical action: has the watchdog fired, or has the user asked to stop? A
    /// watchdog that has fired is dismissed first, as steps are undone from then on.
    fn check(&mut self, interruptible: bool) -> Result<()> {
        let fired = match self.watchdog.as_mut() {
            Some(watchdog) => watchdog.check(),
            None => Ok(()),
        };
        if let Err(error) = fired {
            self.dismiss();
            return Err(error);
        }
        if interruptible { self.check_interrupt() } else { Ok(()) }
    }

    fn check_interrupt(&self) -> Result<()> {
        if self.is_undoing { Ok(()) } else { (self.interrupt)() }
    }

    /// Freezes the filesystems at `points`, all or none: a step that fails is not undone by the change.
    fn freeze(&mut self, points: &[PathBuf]) -> Result<()> {
        self.check(true)?;
        let start = Instant::now();
        self.frozen_since.get_or_insert(start);
        let result = self.filesystems.freeze(points);
        let took = start.elapsed();
        let result = result.and_then(|()| self.check(true)).and_then(|()| self.check_frozen());
        let result = match result {
            Ok(()) if took > self.budget => Err(overran(took)),
            Err(error) if error.kind() == ErrorKind::Timeout && took > self.budget => Err(overran(took)),
            result => result,
        };
        if result.is_err() {
            let _ = self.filesystems.thaw(points);
            self.note_thaw();
        }
        result
    }

    /// Ends the time of the freeze if nothing is frozen any more.
    fn note_thaw(&mut self) {
        if !self.filesystems.is_any_frozen()
            && let Some(since) = self.frozen_since.take()
        {
            self.times.frozen = since.elapsed();
        }
    }

    /// A filesystem mounted meanwhile would accept writes, so the filesystems must still be the same.
    fn check_frozen(&self) -> Result<()> {
        let Some(frozen) = self.frozen.as_ref().filter(|_| self.filesystems.are_frozen()) else {
            return Ok(());
        };
        frozen.recheck(&self.numbers(), "while it was being frozen").map(drop)
    }

    fn load_over(&mut self, device: &str, real: &str, preserve: &str) -> Result<()> {
        self.check(true)?;
        let dm = self.dm;
        // One time for all origins, whose writers wait together.
        let budget = self.budget;
        let deadlines = *self.map_deadlines.get_or_insert_with(|| {
            let now = Instant::now();
            MapDeadlines { free: now + FREE_MAP_TIME_MAX, omission: now + budget / OMISSION_BUDGET_SHARE }
        });
        let table = self.member(device).table_over(dm, (real, preserve), deadlines)?;
        self.owner_of(device).expect("an insertion owns its origins").load(dm, &table)?;
        let member = self.member(device);
        member.map_in_force = !member.skipped.extents.is_empty();
        Ok(())
    }

    fn expect_over(&mut self, device: &str) -> Result<()> {
        let dm = self.dm;
        self.owner_of(device).expect("an insertion owns its origins").check(dm)?;
        self.member(device).check_layout()
    }

    fn member(&mut self, device: &str) -> &mut Member {
        let found = self.members.iter_mut().find(|member| member.name == device);
        found.expect("only an insertion leads an origin over a stack, and it knows its origins")
    }

    /// Thaws those of `points` that are still frozen: the undo of each origin's switch begins with a thaw of all.
    fn thaw(&mut self, points: &[PathBuf]) -> Result<()> {
        if self.filesystems.is_empty() {
            // Frozen by a job that died, not by this process. Opening a directory writes nothing.
            for path in points {
                match File::open(path) {
                    Ok(file) => self.filesystems.add_frozen(path, file),
                    // Unmounted since, so it is not frozen.
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                    Err(error) => return Err(error).io_context(|| format!("opening {}", path.display())),
                }
            }
        }
        let mut result = Ok(());
        // During undo nothing depends on the maps.
        let maps = self.members.iter_mut().map(|member| std::mem::take(&mut member.map_in_force));
        let map_in_force = maps.fold(false, |any, in_force| any | in_force) && !self.is_undoing;
        let mut early = None;
        for (path, source) in self.filesystems.thaw(points) {
            match source.raw_os_error() {
                // The watchdog, or another process, was faster. What was free when the map was read may have
                // been in use at the instant.
                Some(libc::EINVAL) if map_in_force => early = Some((path, source)),
                Some(libc::EINVAL) => {
                    self.notes.push(format!("another process thawed {}", path.display()));
                }
                _ => {
                    result = Err(Error::io(format!("thawing {}", path.display()), source)
                        .next(format!("run 'fsfreeze -u {}'", path.display())));
                }
            }
        }
        self.note_thaw();
        if let (Some((path, source)), Ok(())) = (early, &result) {
            // If it was the watchdog, its own error is reported.
            self.check(false)?;
            result = Err(Error::io(
                format!("{} was thawed before the instant had been taken", path.display()),
                source,
            )
            .next("copy again, and leave the filesystem alone while it is frozen, or use --all"));
        }
        result
    }

    /// The owner of `device`; None for a device that is not an origin.
    fn owner_of(&mut self, device: &str) -> Option<&mut Owner> {
        self.owners.iter_mut().find(|owner| owner.name() == device)
    }

    /// The owner cannot tell the watchdog from another tool. If the watchdog has fired, its error is reported
    /// instead.
    fn prefer_watchdog_error(&mut self, result: Result<()>) -> Result<()> {
        match result {
            Err(error) if error.kind() == ErrorKind::Refused => {
                self.check(false)?;
                Err(error)
            }
            result => result,
        }
    }

    fn own(&mut self, device: &str, table: Table) -> Result<()> {
        let owner = Owner::new(self.dm, device, table)?;
        owner.check(self.dm)?;
        self.owners.retain(|known| known.name() != device);
        self.owners.push(owner);
        Ok(())
    }

    fn load(&mut self, action: &Action, device: &str, table: &Template) -> Result<()> {
        let dm = self.dm;
        match self.owner_of(device) {
            Some(owner) => owner.load(dm, &dm.resolve(table)?),
            None => dm.execute(action),
        }
    }

    fn clear(&mut self, action: &Action, device: &str) -> Result<()> {
        if let Some(member) = self.members.iter_mut().find(|member| member.name == device) {
            member.map_in_force = false;
        }
        let dm = self.dm;
        match self.owner_of(device) {
            Some(owner) => owner.drop_loaded(dm),
            None => dm.execute(action),
        }
    }

    fn suspend(&mut self, action: &Action, device: &str, how: SuspendFlags) -> Result<()> {
        self.check(true)?;
        self.suspended_since.get_or_insert_with(Instant::now);
        let dm = self.dm;
        let end = self.armed_since.map(|since| since + self.budget);
        let is_over = || end.is_some_and(|end| Instant::now() >= end);
        let mut attempts_left = SUSPEND_ATTEMPTS;
        let result = loop {
            match self.suspend_once(action, device, how, end) {
                // I/O in flight took longer than the budget allows, so the suspension was aborted.
                Err(error) if error.kind() == ErrorKind::Interrupted && is_over() => {
                    // While another origin is held, the watchdog guards it until the undo has resumed it.
                    if !self.owners.iter().any(Owner::is_held) {
                        self.dismiss();
                    }
                    break Err(budget_ran_out());
                }
                // If no signal asked us to stop, try again: the kernel interrupts every process to put the machine
                // to sleep, and only later kernels restart this call by themselves (`dm_wait_for_completion`).
                Err(error) if error.kind() == ErrorKind::Interrupted && attempts_left > 0 => {
                    if let Err(stop) = self.check(true) {
                        break Err(stop);
                    }
                    attempts_left -= 1;
                }
                result => break result,
            }
        };
        self.prefer_watchdog_error(result)?;
        self.times.instant_utc_ns = clock::utc_now_ns();
        if let Err(error) = self.check(false) {
            // The watchdog acted before this suspension, so it did not end it.
            let undo = match self.owner_of(device) {
                Some(owner) => owner.resume_if_suspended(dm),
                None => dm.clear(device).and_then(|()| dm.resume_if_suspended(device)),
            };
            return Err(error.after_undo(undo));
        }
        Ok(())
    }

    /// Waits for I/O in flight until `end`.
    fn suspend_once(
        &mut self,
        action: &Action,
        device: &str,
        how: SuspendFlags,
        end: Option<Instant>,
    ) -> Result<()> {
        let dm = self.dm;
        let nudge = self.nudge.take();
        let mut work = || match self.owner_of(device) {
            Some(owner) => owner.suspend(dm, how),
            None => dm.execute(action),
        };
        let result = match (&nudge, end) {
            (Some(nudge), Some(end)) => nudge.within(end, work),
            _ => work(),
        };
        self.nudge = nudge;
        result
    }

    fn instant(&mut self) -> Result<()> {
        self.check(true)?;
        let held_since = self.frozen_since.or(self.suspended_since).unwrap_or_else(Instant::now);
        let Some(at_instant) = self.at_instant.as_mut() else { return Ok(()) };
        let lower = self.members.iter().filter_map(|member| member.lower.as_ref());
        self.below = lower.map(|lower| node::device_path(lower.real)).collect::<Result<_>>()?;
        at_instant(&InstantContext {
            below: &self.below,
            deadline: self.armed_since.unwrap_or(held_since) + self.budget,
        })?;
        self.check(true)
    }

    fn resume(&mut self, action: &Action, device: &str) -> Result<()> {
        let (dm, is_undoing) = (self.dm, self.is_undoing);
        match self.owner_of(device) {
            // During undo there may be a table to activate, or only a suspension to end.
            Some(owner) if is_undoing && !owner.has_loaded() => owner.resume_if_suspended(dm)?,
            Some(owner) => {
                let result = owner.resume(dm);
                self.prefer_watchdog_error(result)?;
            }
            // The same as a watchdog that has fired does.
            None if is_undoing => dm.resume_if_suspended(device)?,
            None => dm.execute(action)?,
        }
        if !self.owners.iter().any(Owner::is_held)
            && let Some(since) = self.suspended_since.take()
        {
            self.times.suspended = since.elapsed();
        }
        Ok(())
    }
}

impl Executor for Runner<'_> {
    fn begin(&mut self) {
        // Each change names the devices that it owns.
        self.owners.clear();
    }

    fn begin_undo(&mut self) {
        self.is_undoing = true;
    }

    fn execute(&mut self, action: &Action) -> Result<()> {
        match action {
            Action::Guard { devices, filesystems } => {
                self.check_interrupt()?;
                let result = self.guard(devices, filesystems);
                if result.is_err() {
                    self.dismiss();
                }
                result
            }
            Action::LoadOver { device, real, preserve } => self.load_over(device, real, preserve),
            Action::ExpectOver { device } => self.expect_over(device),
            Action::Claim { device } => {
                let file = self.dm.claim(self.dm.info_of(device.as_str())?.number)?;
                self.claims.push((device.clone(), file));
                Ok(())
            }
            Action::Unclaim { device } => {
                self.claims.retain(|(claimed, _)| claimed != device);
                Ok(())
            }
            Action::Freeze { filesystems } => self.freeze(filesystems),
            Action::Thaw { filesystems } => self.thaw(filesystems),
            Action::Own { device, table } => self.own(device, self.dm.resolve(table)?),
            Action::Load { device, table } => self.load(action, device, table),
            Action::Suspend { device, flush, lock_filesystem } => self.suspend(
                action,
                device,
                SuspendFlags { flush: *flush, lock_filesystem: *lock_filesystem },
            ),
            Action::Instant => self.instant(),
            Action::Resume { device, udev: Udev::None } => self.resume(action, device),
            Action::Clear { device } => self.clear(action, device),
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
                    self.notes.push("the watchdog had resumed the origin".to_owned());
                }
                Ok(())
            }
            _ => self.dm.execute(action),
        }
    }
}

/// A freeze takes as long as the kernel needs: neither a signal nor the watchdog can end it.
fn overran(took: Duration) -> Error {
    Error::new(
        ErrorKind::Timeout,
        format!(
            "freezing the filesystems took {took:.1?}, longer than the freeze budget, and could not be stopped; writers \
             waited all that time"
        ),
    )
    .next("copy again while there is less load, or when the disk is faster; a larger --freeze-budget allows it")
}
