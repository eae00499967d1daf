//! Changes an origin's table without undoing what others do to it.
//!
//! A device-mapper device has one active table, one inactive table and one suspended state, shared by everybody. A load
//! replaces the inactive table; a resume ends any suspension and activates the inactive table. The kernel does not record
//! who loaded a table or suspended the device. lvm2 loads a table, suspends (for seconds on a busy disk), commits its
//! metadata, and resumes. A load and a resume by somebody else in between undo that, and both report success.
//!
//! So only [`Owner`] loads, suspends and resumes an origin's table. Before and after each step it checks that:
//! - the device has the same number and UUID (its name may change: lvrename);
//! - the active table is the expected one;
//! - the inactive table is the one that the owner loaded, or there is none;
//! - the device is suspended only if the owner suspended it.
//!
//! If a check fails, the owner takes no further step. It never ends a suspension of somebody else, and never replaces,
//! drops or activates a table that it did not load. A device that the owner itself suspended is always resumed.
//!
//! A race of some microseconds remains between a check and the step behind it. The lock of lvm2 (`volume::lvm_lock`)
//! closes it for lvm2. A table that somebody else loads by hand in that window is found by the check after the step: the
//! copy is void, and the device keeps the table that it then has.

use std::path::Path;
use std::time::Duration;

use crate::base::{DeviceNumber, Error, ErrorKind, Result};
use crate::sys::dm_ioctl::{Key, SuspendFlags};
use crate::sys::process::crash_point;
use crate::sys::queue::QueueSettings;

use crate::dm::{DeviceInfo, Dm, Slot, Table, Udev};

/// The only one that changes a device's table. Remembers its own steps; reads everything else from the kernel.
#[derive(Clone, Debug)]
pub struct Owner {
    name: String,
    number: DeviceNumber,
    uuid: String,
    active: Table,
    loaded: Option<Table>,
    is_held: bool,
    /// As they were before the table was replaced, until they are put back.
    settings: Option<QueueSettings>,
    /// As they were before the first replacement, with the table of that time: some go with it.
    settings_at_first: Option<(Table, QueueSettings)>,
}

fn warn_setting_lost(path: &Path) {
    tracing::warn!("{} has lost its setting, and cannot be written", path.display());
}

/// A change to the device that the owner did not make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Foreign {
    Device,
    Active,
    Loaded,
    Suspended,
    Resumed,
}

impl Owner {
    /// For `device`, whose active table should be `active`; [`Owner::check`] tells whether it is.
    ///
    /// # Errors
    /// The kernel's, for a device that does not exist.
    pub fn new<'a>(dm: &Dm, device: impl Into<Key<'a>>, active: Table) -> Result<Self> {
        let DeviceInfo { name, number, uuid, .. } = dm.info_of(device)?;
        Ok(Self {
            name,
            number,
            uuid,
            active,
            loaded: None,
            is_held: false,
            settings: None,
            settings_at_first: None,
        })
    }

    /// The device's name when it was owned.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The device's number.
    #[must_use]
    pub fn number(&self) -> DeviceNumber {
        self.number
    }

    /// The table in use, by the owner's doing.
    #[must_use]
    pub fn active(&self) -> &Table {
        &self.active
    }

    /// True where the owner has suspended the device, and not let it go on.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.is_held
    }

    /// True where the owner has loaded a table that is not in use yet.
    #[must_use]
    pub fn has_loaded(&self) -> bool {
        self.loaded.is_some()
    }

    /// Fails unless everything is as the owner left it.
    ///
    /// # Errors
    /// [`ErrorKind::StoreInvalid`] if the device or its active table was replaced; [`ErrorKind::Refused`] while somebody
    /// else is changing it, where a retry can succeed; the kernel's.
    pub fn check(&self, dm: &Dm) -> Result<()> {
        match self.find_foreign_change(dm)? {
            None => Ok(()),
            Some(foreign) => Err(self.explain(foreign)),
        }
    }

    /// Loads a table, not used yet.
    ///
    /// # Errors
    /// As [`Owner::check`], before and after; the kernel's.
    pub fn load(&mut self, dm: &Dm, table: &Table) -> Result<()> {
        self.check(dm)?;
        dm.load(self.number, table)?;
        self.loaded = Some(table.clone());
        let Err(error) = self.check(dm) else { return Ok(()) };
        Err(error.after_undo(self.drop_loaded(dm)))
    }

    /// Drops what the owner has loaded. What somebody else has loaded stays.
    ///
    /// # Errors
    /// The kernel's.
    pub fn drop_loaded(&mut self, dm: &Dm) -> Result<()> {
        let Some(loaded) = &self.loaded else { return Ok(()) };
        let info = self.device(dm)?;
        if info.is_some_and(|info| info.has_inactive)
            && dm.table(self.number, Slot::Inactive)?.as_ref() == Some(loaded)
        {
            dm.clear(self.number)?;
        }
        self.loaded = None;
        Ok(())
    }

    /// Suspends the device.
    ///
    /// # Errors
    /// As [`Owner::check`], before and after; the device is then resumed. The kernel's.
    pub fn suspend(&mut self, dm: &Dm, how: SuspendFlags) -> Result<()> {
        self.check(dm)?;
        if let Err(error) = dm.suspend(self.number, how) {
            // EINVAL: it is suspended already. Somebody else may have done that since the check.
            return Err(match self.find_foreign_change(dm) {
                Ok(Some(foreign)) if error.errno() == Some(libc::EINVAL) => self.explain(foreign),
                _ => error,
            });
        }
        self.is_held = true;
        // A suspension takes as long as the I/O in flight: others had time.
        let Err(error) = self.check(dm) else { return Ok(()) };
        Err(error.after_undo(self.resume_if_suspended(dm)))
    }

    /// Puts what was loaded to use and lets the device go on. What comes of it the next look tells.
    ///
    /// # Errors
    /// As [`Owner::check`], before: the device then goes on with the table it had. The kernel's.
    pub fn resume(&mut self, dm: &Dm) -> Result<()> {
        if let Err(error) = self.check(dm) {
            return Err(error.after_undo(self.resume_if_suspended(dm)));
        }
        self.note_settings();
        dm.resume(self.number, Udev::None)?;
        if self.has_swapped(dm)? {
            self.note_resumed();
            return Ok(());
        }
        (self.loaded, self.is_held) = (None, false);
        Err(self.explain(Foreign::Resumed))
    }

    /// False where the table that the owner loaded is not in use behind a call that should have seen to that: a watchdog
    /// that lets the device go on drops what is loaded.
    fn has_swapped(&self, dm: &Dm) -> Result<bool> {
        let Some(loaded) = &self.loaded else { return Ok(true) };
        Ok(*loaded == self.active || dm.table(self.number, Slot::Active)?.as_ref() != Some(&self.active))
    }

    /// Puts back what an administrator has set on the device's queue, which the kernel drops with a table. Not while the
    /// device is held.
    pub fn put_back_settings(&mut self) {
        for path in self.settings.take().iter().flat_map(QueueSettings::put_back) {
            warn_setting_lost(&path);
        }
        self.put_back_settings_of(&self.active);
    }

    /// With `table` in use, by whomever: if it is the one that was there at first, puts back the settings that go with it.
    pub fn put_back_settings_of(&self, table: &Table) {
        let at_first = self.settings_at_first.iter().filter(|(first, _)| first == table);
        for path in at_first.flat_map(|(_, settings)| settings.put_back_of_table()) {
            warn_setting_lost(&path);
        }
    }

    /// Takes over the settings that a dead process found with the table `first`; the change that it died in may have
    /// dropped any of them. Not while the device is held.
    pub fn take_over_settings(&mut self, first: Table, settings: QueueSettings) {
        for path in settings.put_back() {
            warn_setting_lost(&path);
        }
        self.settings_at_first = Some((first, settings));
        self.put_back_settings_of(&self.active);
    }

    fn note_settings(&mut self) {
        if self.loaded.is_some() && self.settings.is_none() {
            let settings = QueueSettings::read(self.number);
            self.settings_at_first.get_or_insert_with(|| (self.active.clone(), settings.clone()));
            self.settings = Some(settings);
        }
    }

    /// Drops what the owner has loaded, and lets the device go on where the owner has suspended it: for undo.
    ///
    /// # Errors
    /// The kernel's.
    pub fn resume_if_suspended(&mut self, dm: &Dm) -> Result<()> {
        self.drop_loaded(dm)?;
        if self.is_held && self.device(dm)?.is_some_and(|info| info.suspended) {
            dm.resume_if_suspended(self.number)?;
        }
        self.is_held = false;
        Ok(())
    }

    /// Replaces the table in one call of the kernel, in use or held; a device that the owner holds goes on.
    ///
    /// # Errors
    /// As [`Owner::check`], before and after; [`ErrorKind::Interrupted`] where a [`nudge`](crate::sys::nudge) ended the wait
    /// for I/O in flight; the kernel's. In the last two cases the device has the table it had.
    pub fn swap(&mut self, dm: &Dm, table: &Table) -> Result<Duration> {
        self.load(dm, table)?;
        self.note_settings();
        crash_point("release.swap.loaded");
        let swapped = dm.swap_loaded(self.number);
        match swapped {
            Ok(held) => {
                if !self.has_swapped(dm)? {
                    (self.loaded, self.is_held) = (None, false);
                    return Err(self.explain(Foreign::Resumed));
                }
                self.note_resumed();
                self.put_back_settings();
                self.check(dm)?;
                Ok(held)
            }
            Err(error) => {
                // The kernel suspends first, and leaves it at that where the tables cannot be swapped.
                self.is_held |= error.kind() != ErrorKind::Interrupted;
                Err(match self.resume_if_suspended(dm) {
                    Ok(()) => error.state(format!("{} keeps the table it had", self.name)),
                    Err(undo) => error.with_failed_undo(undo),
                })
            }
        }
    }

    fn note_resumed(&mut self) {
        self.is_held = false;
        if let Some(table) = self.loaded.take() {
            self.active = table;
        }
    }

    /// The device as it is now; None where there is none with its number and UUID any more. Its name may be another.
    ///
    /// # Errors
    /// The kernel's.
    pub fn device(&self, dm: &Dm) -> Result<Option<DeviceInfo>> {
        let is_it = |info: &DeviceInfo| info.uuid == self.uuid;
        Ok(dm.info(self.number)?.filter(is_it))
    }

    fn find_foreign_change(&self, dm: &Dm) -> Result<Option<Foreign>> {
        let Some(info) = self.device(dm)? else { return Ok(Some(Foreign::Device)) };
        let active = dm.table(self.number, Slot::Active)?;
        let loaded = if info.has_inactive { dm.table(self.number, Slot::Inactive)? } else { None };
        Ok(self.compare(info.suspended, active.as_ref(), info.has_inactive, loaded.as_ref()))
    }

    fn compare(
        &self,
        suspended: bool,
        active: Option<&Table>,
        has_loaded: bool,
        loaded: Option<&Table>,
    ) -> Option<Foreign> {
        if active != Some(&self.active) {
            return Some(Foreign::Active);
        }
        if has_loaded != self.loaded.is_some() || loaded != self.loaded.as_ref() {
            return Some(Foreign::Loaded);
        }
        match (suspended, self.is_held) {
            (true, false) => Some(Foreign::Suspended),
            (false, true) => Some(Foreign::Resumed),
            _ => None,
        }
    }

    fn explain(&self, foreign: Foreign) -> Error {
        let name = &self.name;
        let replaced = |what: String| {
            Error::new(ErrorKind::StoreInvalid, what)
                .next("copy again, and do not resize or move the volume meanwhile")
        };
        let busy = |what: String| {
            Error::refused(what).state(format!("{name} was left to whoever changes it")).next(
                "wait until that is over; if nobody is at it any more: 'dmsetup info', 'dmsetup resume'",
            )
        };
        match foreign {
            Foreign::Device => replaced(format!("{name} is not the device that it was")),
            Foreign::Active => {
                replaced(format!("somebody replaced the table of {name} while it was being copied"))
            }
            Foreign::Loaded => {
                busy(format!("somebody is changing {name}: what is loaded into it is not ours"))
            }
            Foreign::Suspended => {
                busy(format!("somebody is changing {name}: it is suspended, and not by us"))
            }
            Foreign::Resumed => busy(format!("somebody else has let {name} go on while we held it")),
        }
    }
}
