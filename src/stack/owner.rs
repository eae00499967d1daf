//! Changes an origin's table without undoing the changes of other tools.
//!
//! A device-mapper device has one active table, one inactive table and one suspended state, shared by all
//! processes. A load replaces the inactive table; a resume ends any suspension and activates the inactive
//! table. The kernel does not record which process loaded a table or suspended the device. lvm2 loads a
//! table, suspends (for seconds on a busy disk), commits its metadata, and resumes. If another process loads
//! and resumes in between, it undoes that change, and both report success.
//!
//! So only [`Owner`] loads, suspends and resumes an origin's table. Before and after each step it checks that:
//! - the device has the same number and UUID (its name may change: lvrename);
//! - the active table is the expected one;
//! - the inactive table is the one that the owner loaded, or there is none;
//! - the device is suspended only if the owner suspended it.
//!
//! If a check fails, the owner takes no further step. It never ends the suspension of another process, and
//! never replaces, drops or activates a table that it did not load. A device that the owner itself suspended
//! is always resumed.
//!
//! A race of some microseconds remains between a check and the step after it. The lock of lvm2
//! (`volume::lvm_lock`) closes it for lvm2. A table that another tool loads in that window is found by the
//! check after the step: the copy is void, and the device keeps the table that it has by then.

use std::path::Path;
use std::time::Duration;

use crate::base::{DeviceNumber, Error, ErrorKind, Result};
use crate::sys::dm_ioctl::{Key, SuspendFlags};
use crate::sys::process::crash_point;
use crate::sys::queue::QueueSettings;

use crate::dm::{DeviceInfo, Dm, Slot, Table, Udev};

/// The only code that changes the table of a device. Remembers its own steps; reads everything else from the
/// kernel.
#[derive(Clone, Debug)]
pub struct Owner {
    name: String,
    number: DeviceNumber,
    uuid: String,
    active: Table,
    loaded: Option<Table>,
    is_held: bool,
    /// The settings before the table was replaced, until they are restored.
    settings: Option<QueueSettings>,
    /// The first table, and the settings before its first replacement: some settings belong to that table.
    settings_at_first: Option<(Table, QueueSettings)>,
}

fn warn_setting_lost(path: &Path) {
    tracing::warn!("the setting {} was lost, and restoring it failed", path.display());
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
    /// For `device`, whose active table should be `active`; [`Owner::check`] verifies that.
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

    /// The name that the device had when the owner was created.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The device's number.
    #[must_use]
    pub fn number(&self) -> DeviceNumber {
        self.number
    }

    /// The table that should be active, according to the owner.
    #[must_use]
    pub fn active(&self) -> &Table {
        &self.active
    }

    /// True while the device is suspended by the owner.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.is_held
    }

    /// True if the owner has loaded a table that is not active yet.
    #[must_use]
    pub fn has_loaded(&self) -> bool {
        self.loaded.is_some()
    }

    /// Fails unless everything is as the owner left it.
    ///
    /// # Errors
    /// [`ErrorKind::StoreInvalid`] if the device or its active table was replaced; [`ErrorKind::Refused`]
    /// while another tool is changing it, and a retry can succeed; the kernel's.
    pub fn check(&self, dm: &Dm) -> Result<()> {
        match self.find_foreign_change(dm)? {
            None => Ok(()),
            Some(foreign) => Err(self.explain(foreign)),
        }
    }

    /// Loads a table, without activating it.
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

    /// Drops the table that the owner has loaded. A table that another tool has loaded stays.
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
            // EINVAL: already suspended. Another tool may have done that since the check.
            return Err(match self.find_foreign_change(dm) {
                Ok(Some(foreign)) if error.errno() == Some(libc::EINVAL) => self.explain(foreign),
                _ => error,
            });
        }
        self.is_held = true;
        // A suspension waits for I/O in flight, which gave other tools time to act.
        let Err(error) = self.check(dm) else { return Ok(()) };
        Err(error.after_undo(self.resume_if_suspended(dm)))
    }

    /// Activates the loaded table and resumes the device. The next check verifies the result.
    ///
    /// # Errors
    /// Those of [`Owner::check`], after which the device is resumed with its former table. The kernel's.
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

    /// False if the table that the owner loaded is not active after a call that should have activated it: a
    /// watchdog drops the loaded table when it resumes the device.
    fn has_swapped(&self, dm: &Dm) -> Result<bool> {
        let Some(loaded) = &self.loaded else { return Ok(true) };
        Ok(*loaded == self.active || dm.table(self.number, Slot::Active)?.as_ref() != Some(&self.active))
    }

    /// Restores the queue settings of an administrator, which the kernel drops when a table is replaced. Not
    /// to be called while the device is held.
    pub fn put_back_settings(&mut self) {
        for path in self.settings.take().iter().flat_map(QueueSettings::restore_any_table) {
            warn_setting_lost(&path);
        }
        self.put_back_settings_of(&self.active);
    }

    /// Restores the settings that belong to the first table, if `table`, which is active now, is that table.
    pub fn put_back_settings_of(&self, table: &Table) {
        let at_first = self.settings_at_first.iter().filter(|(first, _)| first == table);
        for path in at_first.flat_map(|(_, settings)| settings.restore_same_table()) {
            warn_setting_lost(&path);
        }
    }

    /// Takes over the settings that a dead process recorded for the table `first`. The change that it died in
    /// may have dropped any of them. Not to be called while the device is held.
    pub fn take_over_settings(&mut self, first: Table, settings: QueueSettings) {
        for path in settings.restore_any_table() {
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

    /// Drops the table that the owner has loaded, and resumes the device if the owner has suspended it: for
    /// undo.
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

    /// Replaces the table in one call of the kernel, whether the device is resumed or held by the owner.
    /// Afterwards it is resumed.
    ///
    /// # Errors
    /// As [`Owner::check`], before and after; [`ErrorKind::Interrupted`] if a [`nudge`](crate::sys::nudge)
    /// ended the wait for I/O in flight; the kernel's. In the last two cases the device keeps the table it
    /// had.
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
                // The kernel suspends first, and leaves the device suspended if the tables cannot be swapped.
                self.is_held |= error.kind() != ErrorKind::Interrupted;
                Err(match self.resume_if_suspended(dm) {
                    Ok(()) => error.state(format!("{} keeps its previous table", self.name)),
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

    /// The present state of the device; None if no device has its number and UUID any more. Its name may have
    /// changed.
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
            Error::refused(what)
                .state(format!("{name} was left as it is, because another tool is changing it"))
                .next("wait until that tool is done; if none is running: 'dmsetup info', 'dmsetup resume'")
        };
        match foreign {
            Foreign::Device => replaced(format!("{name} was replaced by another device")),
            Foreign::Active => replaced(format!("another tool replaced the table of {name} during the copy")),
            Foreign::Loaded => {
                busy(format!("another tool is changing {name}: its inactive table is not the expected one"))
            }
            Foreign::Suspended => {
                busy(format!("another tool is changing {name}: it is suspended, and not by Tidemark"))
            }
            Foreign::Resumed => busy(format!("another tool resumed {name} while Tidemark held it suspended")),
        }
    }
}
