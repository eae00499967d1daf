//! The kernel's device-mapper, one method per call, with errors that name the device.
//!
//! A device is addressed by name or by number ([`Key`]). Nothing here decides an order: that is
//! [`change`](crate::stack::change).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::thread;
use std::time::Duration;

use serde::Serialize;

use crate::base::clock::Stopwatch;
use crate::base::{DeviceNumber, Error, ErrorKind, Result, ResultExt, Sectors};
use crate::sys::dm_ioctl::{self, Call, CallArguments, Key, Reply, SuspendFlags};
use crate::sys::nudge;

use super::naming::{DeviceIdentity, ROLE_PRESERVE, ROLE_REAL, beside, is_ours};
use super::node;
use super::status::SnapshotStatus;
use super::table::Table;
use super::target::TargetVersion;
use super::udev::{Udev, with_cookie};
use super::wire;

/// The control device.
pub const CONTROL_PATH: &str = "/dev/mapper/control";

/// Attempts to suspend when signals interrupt.
const SUSPEND_ATTEMPTS: u32 = 64;

/// Attempts to remove a device that somebody has open for a moment (blkid, a udev rule).
const REMOVE_ATTEMPTS: u32 = 50;
/// Pause between them.
const REMOVE_PAUSE: Duration = Duration::from_millis(40);

/// An open device-mapper.
pub struct Dm {
    control: File,
}

/// What the kernel says of a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DeviceInfo {
    /// Its name.
    pub name: String,
    /// Its UUID; empty for none.
    pub uuid: String,
    /// Its number.
    pub number: DeviceNumber,
    /// How many have it open, other devices' tables included.
    pub open_count: u32,
    /// I/O is held.
    pub suspended: bool,
    /// A table is in use.
    pub has_active: bool,
    /// A table is loaded and not in use.
    pub has_inactive: bool,
    /// Writes are refused.
    pub read_only: bool,
}

/// Which of a device's two tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slot {
    /// In use.
    Active,
    /// Loaded, to be used on the next resume.
    Inactive,
}

impl Dm {
    /// Opens the control device (the kernel loads its module by this).
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] without the right to, [`ErrorKind::Kernel`] where device-mapper is
    /// missing.
    pub fn open() -> Result<Self> {
        let control = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_CLOEXEC)
            .open(CONTROL_PATH)
            .map_err(|source| match source.kind() {
                io::ErrorKind::PermissionDenied => {
                    Error::refused(format!("opening {CONTROL_PATH}")).with_source(source).next("run as root")
                }
                _ => Error::kernel(format!("opening {CONTROL_PATH}"), source)
                    .next("load the kernel module: modprobe dm_mod"),
            })?;
        Ok(Self { control })
    }

    /// True where the kernel offers device-mapper to us, whether we may use it or not.
    #[must_use]
    pub fn is_there() -> bool {
        std::path::Path::new(CONTROL_PATH).exists()
    }

    fn call(
        &self,
        call: Call,
        arguments: &CallArguments<'_>,
        what: impl FnOnce() -> String,
    ) -> Result<Reply> {
        dm_ioctl::call(&self.control, call, arguments).map_err(|source| Error::kernel(what(), source))
    }

    /// The interface's version.
    ///
    /// # Errors
    /// The kernel's.
    pub fn version(&self) -> Result<(u32, u32, u32)> {
        let what = || "asking for device-mapper's version".to_owned();
        let [major, minor, patch] = self.call(Call::Version, &CallArguments::default(), what)?.version;
        Ok((major, minor, patch))
    }

    /// The targets whose modules are loaded, with their versions.
    ///
    /// # Errors
    /// The kernel's.
    pub fn targets(&self) -> Result<Vec<TargetVersion>> {
        let what = || "listing device-mapper's targets".to_owned();
        let reply = self.call(Call::ListVersions, &CallArguments::default(), what)?;
        wire::decode_versions(&reply.payload)
    }

    /// True where the kernel has the target `kind`, whose module it loads if need be; false where it is too old to say
    /// (before 5.4).
    #[must_use]
    pub fn has_target(&self, kind: &str) -> bool {
        // The kernel takes it in the field of a device's name.
        let arguments = CallArguments { device: Some(kind.into()), ..CallArguments::default() };
        dm_ioctl::call(&self.control, Call::GetTargetVersion, &arguments).is_ok()
    }

    /// All devices: name and number.
    ///
    /// # Errors
    /// The kernel's.
    pub fn list(&self) -> Result<Vec<(String, DeviceNumber)>> {
        let what = || "listing device-mapper devices".to_owned();
        wire::decode_names(&self.call(Call::ListDevices, &CallArguments::default(), what)?.payload)
    }

    /// Every device of ours; one that goes away meanwhile is left out.
    ///
    /// # Errors
    /// The kernel's.
    pub fn list_ours(&self) -> Result<Vec<DeviceInfo>> {
        let mut found = Vec::new();
        for (_, number) in self.list()? {
            if let Some(info) = self.info(number)?
                && is_ours(&info.uuid)
            {
                found.push(info);
            }
        }
        Ok(found)
    }

    /// What the kernel says of a device; None where there is none.
    ///
    /// # Errors
    /// The kernel's, and names that cannot be one.
    pub fn info<'a>(&self, device: impl Into<Key<'a>>) -> Result<Option<DeviceInfo>> {
        let device = device.into();
        let arguments = CallArguments { device: Some(device), ..CallArguments::default() };
        let reply = match dm_ioctl::call(&self.control, Call::DevStatus, &arguments) {
            Ok(reply) => reply,
            Err(source) if source.raw_os_error() == Some(libc::ENXIO) => return Ok(None),
            Err(source) => return Err(Error::kernel(format!("asking for device {device}"), source)),
        };
        let has = |flag| reply.flags & flag != 0;
        Ok(Some(DeviceInfo {
            name: reply.name.clone(),
            uuid: reply.uuid.clone(),
            number: DeviceNumber::from_dev(reply.dev),
            open_count: u32::try_from(reply.open_count).unwrap_or(0),
            suspended: has(dm_ioctl::FLAG_SUSPEND),
            has_active: has(dm_ioctl::FLAG_ACTIVE_PRESENT),
            has_inactive: has(dm_ioctl::FLAG_INACTIVE_PRESENT),
            read_only: has(dm_ioctl::FLAG_READONLY),
        }))
    }

    /// As [`Dm::info`], for a device that must exist.
    ///
    /// # Errors
    /// [`ErrorKind::Kernel`] where it does not.
    pub fn info_of<'a>(&self, device: impl Into<Key<'a>>) -> Result<DeviceInfo> {
        let device = device.into();
        self.info(device)?.ok_or_else(|| {
            Error::kernel(
                format!("asking for device {device}, which was removed or renamed"),
                io::Error::from_raw_os_error(libc::ENXIO),
            )
        })
    }

    /// The name of the device with this number, if it is a device-mapper device.
    ///
    /// # Errors
    /// The kernel's.
    pub fn name_of(&self, number: DeviceNumber) -> Result<Option<String>> {
        Ok(self.list()?.into_iter().find(|(_, other)| *other == number).map(|(name, _)| name))
    }

    /// A device's table; None where the slot is empty.
    ///
    /// # Errors
    /// The kernel's; [`ErrorKind::BadData`] for a table that breaks [`Table`]'s invariants.
    pub fn table<'a>(&self, device: impl Into<Key<'a>>, slot: Slot) -> Result<Option<Table>> {
        let device = device.into();
        let mut flags = dm_ioctl::FLAG_STATUS_TABLE | dm_ioctl::FLAG_NOFLUSH;
        if slot == Slot::Inactive {
            flags |= dm_ioctl::FLAG_QUERY_INACTIVE_TABLE;
        }
        let rows = self.status_rows(device, flags)?;
        if rows.is_empty() {
            return Ok(None);
        }
        Table::from_kernel(&rows).map(Some).map_err(|error| error.context(format!("the table of {device}")))
    }

    /// The status text of each line: start, length, kind, text.
    ///
    /// # Errors
    /// The kernel's.
    pub fn status(&self, name: &str) -> Result<Vec<(Sectors, Sectors, String, String)>> {
        let rows = self.status_rows(name, dm_ioctl::FLAG_NOFLUSH)?;
        Ok(rows
            .into_iter()
            .map(|(start, length, kind, text)| (Sectors(start), Sectors(length), kind, text))
            .collect())
    }

    fn status_rows<'a>(&self, device: impl Into<Key<'a>>, flags: u32) -> Result<Vec<wire::Row>> {
        let device = device.into();
        let arguments = CallArguments { device: Some(device), flags, ..CallArguments::default() };
        let reply = self.call(Call::TableStatus, &arguments, || format!("reading the table of {device}"))?;
        wire::decode_rows(&reply.payload, reply.target_count)
    }

    /// The status of a device that is one `snapshot` target.
    ///
    /// # Errors
    /// The kernel's; [`ErrorKind::Kernel`] where the device is anything else.
    pub fn snapshot_status(&self, name: &str) -> Result<SnapshotStatus> {
        match self.status(name)?.as_slice() {
            [(_, _, kind, text)] if kind == "snapshot" => Ok(SnapshotStatus::parse(text)),
            _ => Err(Error::new(ErrorKind::Kernel, format!("{name} is not a snapshot device"))),
        }
    }

    /// The devices that a device's active table maps to.
    ///
    /// # Errors
    /// The kernel's.
    pub fn dependencies(&self, name: &str) -> Result<Vec<DeviceNumber>> {
        let arguments = CallArguments { device: Some(name.into()), ..CallArguments::default() };
        let reply = self.call(Call::TableDeps, &arguments, || format!("asking what {name} maps to"))?;
        wire::decode_dependencies(&reply.payload)
    }

    /// A device of the stack that a copy has under device `name`; None where none has. Known by what `name` maps to, for
    /// it may have been renamed since; and by its name, for all of it may be released.
    ///
    /// # Errors
    /// The kernel's.
    pub fn stack_under(&self, name: &str) -> Result<Option<DeviceInfo>> {
        let table = self.table(name, Slot::Active)?;
        let is_its = |info: &DeviceInfo| {
            DeviceIdentity::parse(&info.uuid).is_some_and(|it| {
                let is_named = it == DeviceIdentity::new(name, ROLE_REAL, &it.id)
                    && info.name == beside(name, ROLE_REAL, &it.id);
                let is_beneath = it.role == ROLE_REAL || it.role == ROLE_PRESERVE;
                is_named || is_beneath && table.as_ref().is_some_and(|table| table.maps_to(info.number))
            })
        };
        Ok(self.list_ours()?.into_iter().find(is_its))
    }

    /// Sends a message to the target at `sector` of a device.
    ///
    /// # Errors
    /// The kernel's.
    pub fn message(&self, name: &str, sector: Sectors, text: &str) -> Result<Option<String>> {
        let payload = wire::encode_message(sector.get(), text);
        let arguments =
            CallArguments { device: Some(name.into()), payload: &payload, ..CallArguments::default() };
        let reply = self.call(Call::TargetMessage, &arguments, || format!("message '{text}' to {name}"))?;
        if reply.flags & dm_ioctl::FLAG_DATA_OUT == 0 {
            return Ok(None);
        }
        wire::text(&reply.payload, 0).map(Some)
    }

    /// Makes a device without a table.
    ///
    /// # Errors
    /// The kernel's: EBUSY where name or UUID is taken.
    pub fn create(&self, name: &str, uuid: &str) -> Result<DeviceNumber> {
        let arguments =
            CallArguments { device: Some(name.into()), uuid: Some(uuid), ..CallArguments::default() };
        let reply = self.call(Call::DevCreate, &arguments, || format!("making device {name}"))?;
        Ok(DeviceNumber::from_dev(reply.dev))
    }

    /// Loads a table into a device's inactive slot.
    ///
    /// # Errors
    /// The kernel's; the details are in its log (`dmesg`).
    pub fn load<'a>(&self, device: impl Into<Key<'a>>, table: &Table) -> Result<()> {
        let device = device.into();
        let payload = wire::encode_table(table);
        let arguments = CallArguments {
            device: Some(device),
            target_count: u32::try_from(table.lines().len()).expect("a table's lines are bounded"),
            payload: &payload,
            ..CallArguments::default()
        };
        self.call(Call::TableLoad, &arguments, || format!("loading the table of {device}"))
            .map(|_| ())
            .map_err(|error| error.next("the kernel's log has the reason: dmesg | grep device-mapper"))
    }

    /// Drops a device's inactive table, if it has one.
    ///
    /// # Errors
    /// The kernel's.
    pub fn clear<'a>(&self, device: impl Into<Key<'a>>) -> Result<()> {
        let device = device.into();
        dm_ioctl::clear(&self.control, device)
            .map_err(|source| Error::kernel(format!("dropping the inactive table of {device}"), source))
    }

    /// Holds a device's I/O.
    ///
    /// # Errors
    /// The kernel's.
    pub fn suspend<'a>(&self, device: impl Into<Key<'a>>, how: SuspendFlags) -> Result<()> {
        let device = device.into();
        let mut attempt = 1;
        loop {
            match dm_ioctl::suspend(&self.control, device, how) {
                Ok(()) => return Ok(()),
                // A signal ended the wait for I/O in flight. Without a flush we are putting
                // something back, which a signal must not prevent, but for the one that says that writers
                // are held for too long.
                Err(source)
                    if source.raw_os_error() == Some(libc::EINTR)
                        && !how.flush
                        && !nudge::is_overdue()
                        && attempt < SUSPEND_ATTEMPTS =>
                {
                    attempt += 1;
                }
                Err(source) if source.raw_os_error() == Some(libc::EINTR) => {
                    return Err(Error::new(ErrorKind::Interrupted, format!("suspending {device}"))
                        .with_source(source));
                }
                Err(source) => return Err(Error::kernel(format!("suspending {device}"), source)),
            }
        }
    }

    /// Activates a device's inactive table, if it has one, and lets I/O go on.
    ///
    /// # Errors
    /// The kernel's.
    pub fn resume<'a>(&self, device: impl Into<Key<'a>>, udev: Udev) -> Result<()> {
        let device = device.into();
        with_cookie(udev, device, |event_nr| dm_ioctl::resume(&self.control, device, event_nr))
            .map_err(|source| Error::kernel(format!("resuming {device}"), source))
    }

    /// As [`Dm::resume`] without a word to udev, where all that matters is that I/O goes on. Whoever lets a device go at
    /// the same moment as somebody else (the watchdog) is refused by the kernel if he comes second (EINVAL of
    /// `dm_resume`, Linux `drivers/md/dm.c`): what was wanted has then been done. Of a table that was to be activated
    /// that is not known.
    ///
    /// # Errors
    /// The kernel's.
    pub fn resume_if_suspended<'a>(&self, device: impl Into<Key<'a>>) -> Result<()> {
        let device = device.into();
        let Err(error) = self.resume(device, Udev::None) else { return Ok(()) };
        let goes_on = |info: &DeviceInfo| info.has_active && !info.suspended && !info.has_inactive;
        match self.info(device) {
            Ok(Some(info)) if error.errno() == Some(libc::EINVAL) && goes_on(&info) => Ok(()),
            _ => Err(error),
        }
    }

    /// Removes a device; somebody who has it open only for a moment is waited for, at most 2 s.
    ///
    /// # Errors
    /// The kernel's: EBUSY while it is in use, ENXIO where there is none.
    pub fn remove(&self, name: &str, udev: Udev) -> Result<()> {
        let number = self.info(name)?.map(|info| info.number);
        let mut attempt = 1;
        loop {
            match with_cookie(udev, name, |event_nr| dm_ioctl::remove(&self.control, name.into(), event_nr)) {
                Ok(()) => break,
                Err(source) if source.raw_os_error() == Some(libc::EBUSY) && attempt < REMOVE_ATTEMPTS => {
                    attempt += 1;
                    thread::sleep(REMOVE_PAUSE);
                }
                Err(source) => return Err(Error::kernel(format!("removing device {name}"), source)),
            }
        }
        node::withdraw(name, number);
        Ok(())
    }

    /// Makes a device and puts its table to use; removed again where a step fails.
    ///
    /// # Errors
    /// The first failure, with a failed removal.
    pub fn create_active(&self, name: &str, uuid: &str, table: &Table, udev: Udev) -> Result<DeviceNumber> {
        let number = self.create(name, uuid)?;
        let result = self.load(name, table).and_then(|()| self.resume(name, udev));
        if let Err(error) = result {
            return Err(error.after_undo(self.remove(name, udev)));
        }
        node::announce(name, number);
        Ok(number)
    }

    /// Puts the table that is loaded into a device in use to use, I/O in flight completing first, in *one* call: the
    /// resume of a device that is not suspended suspends it (nothing flushed, no filesystem frozen), swaps
    /// the tables and resumes it in itself (`do_resume` in Linux `drivers/md/dm-ioctl.c`). So there is no
    /// moment at which our death would leave the device suspended. A device that is suspended goes on with the table.
    ///
    /// Answers how long the swap took: the longest that I/O can have been held.
    ///
    /// # Errors
    /// [`ErrorKind::Interrupted`] where a [`nudge`] ended the wait for I/O in flight: the device was not suspended, and the
    /// table may be loaded. The kernel's; the device may then be suspended, with the table still loaded.
    pub fn swap_loaded<'a>(&self, device: impl Into<Key<'a>>) -> Result<Duration> {
        let device = device.into();
        let mut attempt = 1;
        loop {
            let watch = Stopwatch::start();
            match self.resume(device, Udev::None) {
                Ok(()) => return Ok(watch.elapsed()),
                // The wait for I/O in flight was ended. Linux 6.1 goes on as if it had suspended the device, drops the
                // loaded table and answers EINVAL (`do_resume` ignores what `dm_suspend` returns).
                Err(error)
                    if nudge::is_overdue() && matches!(error.errno(), Some(libc::EINTR | libc::EINVAL)) =>
                {
                    let error = error.with_kind(ErrorKind::Interrupted);
                    return Err(error.context("I/O in flight took longer than writers may wait"));
                }
                Err(error) if error.errno() == Some(libc::EINTR) && attempt < SUSPEND_ATTEMPTS => {
                    attempt += 1
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Makes /dev/mapper/NAME where udevd does not run (see [`node`]).
    pub fn announce(&self, name: &str) {
        if let Ok(Some(info)) = self.info(name) {
            node::announce(name, info.number);
        }
    }

    /// Opens the device with this number exclusively: the kernel lets nobody else do so until it is closed, whatever
    /// namespace they are in.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] where somebody else has; I/O errors with the path.
    pub fn claim(&self, number: DeviceNumber) -> Result<File> {
        self.open_device(number, false, libc::O_EXCL).map_err(|error| match error.errno() {
            Some(libc::EBUSY) => error.with_kind(ErrorKind::Refused),
            _ => error,
        })
    }

    /// True where somebody holds the device open exclusively.
    ///
    /// # Errors
    /// I/O errors with the path.
    pub fn is_claimed(&self, number: DeviceNumber) -> Result<bool> {
        match self.claim(number) {
            Ok(_) => Ok(false),
            Err(error) if error.kind() == ErrorKind::Refused => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// Opens the device with this number for reading, with `flags` of open(2) added.
    ///
    /// # Errors
    /// I/O errors with the path.
    pub fn open_device(&self, number: DeviceNumber, write: bool, flags: i32) -> Result<File> {
        let path = node::device_path(number)?;
        OpenOptions::new()
            .read(true)
            .write(write)
            .custom_flags(flags | libc::O_CLOEXEC)
            .open(&path)
            .io_context(|| format!("opening {}", path.display()))
    }
}
