//! The kernel's device-mapper, one method per call, with errors that name the device.
//!
//! Reading, creating and loading go through the devicemapper crate; suspend, resume, clear, remove
//! and rename are our own ioctls, because the crate's wait for udev without a limit. Devices are
//! addressed by name. Nothing here decides an order: that is [`change`](super::change).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::thread;
use std::time::Duration;

use devicemapper::errors::Error as CoreError;
use devicemapper::{DM, DevId, DmError, DmFlags, DmName, DmOptions, DmUuid};
use serde::Serialize;

use crate::base::{DeviceNumber, Error, ErrorKind, Result, ResultExt, Sectors};
use crate::sys::dm_ioctl::{self, SuspendFlags};

use super::node;
use super::status::SnapshotStatus;
use super::table::Table;
use super::udev::{Udev, with_cookie};

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
    library: DM,
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

/// A kind of target that the kernel has loaded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TargetVersion {
    /// Its name in tables.
    pub kind: String,
    /// Its version.
    pub version: (u32, u32, u32),
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
        let library = DM::new().map_err(|source| dm_error("opening device-mapper", source))?;
        Ok(Self { library, control })
    }

    /// The interface's version.
    ///
    /// # Errors
    /// The kernel's.
    pub fn version(&self) -> Result<(u32, u32, u32)> {
        self.library.version().map_err(|source| dm_error("asking for device-mapper's version", source))
    }

    /// The targets whose modules are loaded, with their versions.
    ///
    /// # Errors
    /// The kernel's.
    pub fn targets(&self) -> Result<Vec<TargetVersion>> {
        let rows = self
            .library
            .list_versions()
            .map_err(|source| dm_error("listing device-mapper's targets", source))?;
        Ok(rows
            .into_iter()
            .map(|(kind, major, minor, patch)| TargetVersion { kind, version: (major, minor, patch) })
            .collect())
    }

    /// All devices: name and number.
    ///
    /// # Errors
    /// The kernel's.
    pub fn list(&self) -> Result<Vec<(String, DeviceNumber)>> {
        let rows = self
            .library
            .list_devices()
            .map_err(|source| dm_error("listing device-mapper devices", source))?;
        Ok(rows
            .into_iter()
            .map(|(name, device, _)| {
                (name.to_string(), DeviceNumber { major: device.major, minor: device.minor })
            })
            .collect())
    }

    /// Every device whose UUID begins with `prefix`; one that goes away meanwhile is left out.
    ///
    /// # Errors
    /// The kernel's.
    pub fn list_by_uuid(&self, prefix: &str) -> Result<Vec<DeviceInfo>> {
        let mut found = Vec::new();
        for (name, _) in self.list()? {
            if let Some(info) = self.info(&name)?
                && info.uuid.starts_with(prefix)
            {
                found.push(info);
            }
        }
        Ok(found)
    }

    /// What the kernel says of a device; None where there is none of this name.
    ///
    /// # Errors
    /// The kernel's, and names that cannot be one.
    pub fn info(&self, name: &str) -> Result<Option<DeviceInfo>> {
        let info = match self.library.device_info(&DevId::Name(dm_name(name)?)) {
            Ok(info) => info,
            Err(source) if dm_errno(&source) == Some(libc::ENXIO) => return Ok(None),
            Err(source) => return Err(dm_error(&format!("asking for device {name}"), source)),
        };
        let flags = info.flags();
        let device = info.device();
        Ok(Some(DeviceInfo {
            name: name.to_owned(),
            uuid: info.uuid().map(ToString::to_string).unwrap_or_default(),
            number: DeviceNumber { major: device.major, minor: device.minor },
            open_count: u32::try_from(info.open_count()).unwrap_or(0),
            suspended: flags.contains(DmFlags::DM_SUSPEND),
            has_active: flags.contains(DmFlags::DM_ACTIVE_PRESENT),
            has_inactive: flags.contains(DmFlags::DM_INACTIVE_PRESENT),
            read_only: flags.contains(DmFlags::DM_READONLY),
        }))
    }

    /// As [`Dm::info`], for a device that must exist.
    ///
    /// # Errors
    /// [`ErrorKind::Kernel`] where it does not.
    pub fn info_of(&self, name: &str) -> Result<DeviceInfo> {
        self.info(name)?.ok_or_else(|| {
            Error::kernel(format!("asking for device {name}"), io::Error::from_raw_os_error(libc::ENXIO))
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
    pub fn table(&self, name: &str, slot: Slot) -> Result<Option<Table>> {
        let mut flags = DmFlags::DM_STATUS_TABLE | DmFlags::DM_NOFLUSH;
        if slot == Slot::Inactive {
            flags |= DmFlags::DM_QUERY_INACTIVE_TABLE;
        }
        let rows = self.status_rows(name, flags)?;
        if rows.is_empty() {
            return Ok(None);
        }
        Table::from_kernel(&rows).map(Some).map_err(|error| error.context(format!("the table of {name}")))
    }

    /// The status text of each line: start, length, kind, text.
    ///
    /// # Errors
    /// The kernel's.
    pub fn status(&self, name: &str) -> Result<Vec<(Sectors, Sectors, String, String)>> {
        let rows = self.status_rows(name, DmFlags::DM_NOFLUSH)?;
        Ok(rows
            .into_iter()
            .map(|(start, length, kind, text)| (Sectors(start), Sectors(length), kind, text))
            .collect())
    }

    fn status_rows(&self, name: &str, flags: DmFlags) -> Result<Vec<(u64, u64, String, String)>> {
        self.library
            .table_status(&DevId::Name(dm_name(name)?), DmOptions::default().set_flags(flags))
            .map(|(_, rows)| rows)
            .map_err(|source| dm_error(&format!("reading the table of {name}"), source))
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
        let rows = self
            .library
            .table_deps(&DevId::Name(dm_name(name)?), DmOptions::default())
            .map_err(|source| dm_error(&format!("asking what {name} maps to"), source))?;
        Ok(rows.iter().map(|device| DeviceNumber { major: device.major, minor: device.minor }).collect())
    }

    /// Sends a message to the target at `sector` of a device.
    ///
    /// # Errors
    /// The kernel's.
    pub fn message(&self, name: &str, sector: Sectors, text: &str) -> Result<Option<String>> {
        self.library
            .target_msg(&DevId::Name(dm_name(name)?), Some(sector.get()), text)
            .map(|(_, answer)| answer)
            .map_err(|source| dm_error(&format!("message '{text}' to {name}"), source))
    }

    /// Makes a device without a table.
    ///
    /// # Errors
    /// The kernel's: EBUSY where name or UUID is taken.
    pub fn create(&self, name: &str, uuid: &str) -> Result<DeviceNumber> {
        let bad = |source| dm_error(&format!("making device {name}"), source);
        let dm_uuid = DmUuid::new(uuid).map_err(bad)?;
        let info =
            self.library.device_create(dm_name(name)?, Some(dm_uuid), DmOptions::default()).map_err(bad)?;
        let device = info.device();
        Ok(DeviceNumber { major: device.major, minor: device.minor })
    }

    /// Loads a table into a device's inactive slot.
    ///
    /// # Errors
    /// The kernel's; the details are in its log (`dmesg`).
    pub fn load(&self, name: &str, table: &Table) -> Result<()> {
        self.library
            .table_load(&DevId::Name(dm_name(name)?), &table.to_kernel(), DmOptions::default())
            .map(|_| ())
            .map_err(|source| {
                dm_error(&format!("loading the table of {name}"), source)
                    .next("the kernel's log has the reason: dmesg | grep device-mapper")
            })
    }

    /// Drops a device's inactive table, if it has one.
    ///
    /// # Errors
    /// The kernel's.
    pub fn clear(&self, name: &str) -> Result<()> {
        dm_ioctl::clear(&self.control, name)
            .map_err(|source| Error::kernel(format!("dropping the inactive table of {name}"), source))
    }

    /// Holds a device's I/O.
    ///
    /// # Errors
    /// The kernel's.
    pub fn suspend(&self, name: &str, how: SuspendFlags) -> Result<()> {
        let mut attempt = 1;
        loop {
            match dm_ioctl::suspend(&self.control, name, how) {
                Ok(()) => return Ok(()),
                // A signal ended the wait for I/O in flight. Without a flush we are putting
                // something back, which a signal must not prevent.
                Err(source)
                    if source.raw_os_error() == Some(libc::EINTR)
                        && !how.flush
                        && attempt < SUSPEND_ATTEMPTS =>
                {
                    attempt += 1;
                }
                Err(source) if source.raw_os_error() == Some(libc::EINTR) => {
                    return Err(
                        Error::new(ErrorKind::Interrupted, format!("suspending {name}")).with_source(source)
                    );
                }
                Err(source) => return Err(Error::kernel(format!("suspending {name}"), source)),
            }
        }
    }

    /// Activates a device's inactive table, if it has one, and lets I/O go on.
    ///
    /// # Errors
    /// The kernel's.
    pub fn resume(&self, name: &str, udev: Udev) -> Result<()> {
        with_cookie(udev, name, |event_nr| dm_ioctl::resume(&self.control, name, event_nr))
            .map_err(|source| Error::kernel(format!("resuming {name}"), source))
    }

    /// Removes a device; somebody who has it open only for a moment is waited for, at most 2 s.
    ///
    /// # Errors
    /// The kernel's: EBUSY while it is in use, ENXIO where there is none.
    pub fn remove(&self, name: &str, udev: Udev) -> Result<()> {
        let number = self.info(name)?.map(|info| info.number);
        let mut attempt = 1;
        loop {
            match with_cookie(udev, name, |event_nr| dm_ioctl::remove(&self.control, name, event_nr)) {
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

    /// Gives a device another name.
    ///
    /// # Errors
    /// The kernel's.
    pub fn rename(&self, name: &str, to: &str, udev: Udev) -> Result<()> {
        with_cookie(udev, to, |event_nr| dm_ioctl::rename(&self.control, name, to, event_nr))
            .map_err(|source| Error::kernel(format!("renaming device {name} to {to}"), source))?;
        node::withdraw(name, None);
        if let Some(info) = self.info(to)? {
            node::announce(to, info.number);
        }
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
            return Err(match self.remove(name, udev) {
                Ok(()) => error,
                Err(undo) => error.with_failed_undo(undo),
            });
        }
        node::announce(name, number);
        Ok(number)
    }

    /// Replaces the table of a device in use, writes in flight completing first: load, suspend
    /// (nothing flushed, no filesystem frozen), resume. Where the suspension fails the new table is
    /// dropped; where the resume fails it is tried once more with the old table.
    ///
    /// # Errors
    /// The first failure, with a failed undo.
    pub fn reload(&self, name: &str, table: &Table) -> Result<()> {
        self.load(name, table)?;
        let quick = SuspendFlags { flush: false, lock_filesystem: false };
        let error = match self.suspend(name, quick) {
            Ok(()) => match self.resume(name, Udev::None) {
                Ok(()) => return Ok(()),
                Err(error) => error,
            },
            Err(error) => error,
        };
        Err(match self.clear(name).and_then(|()| self.resume(name, Udev::None)) {
            Ok(()) => error.state(format!("{name} keeps the table it had")),
            Err(undo) => error.with_failed_undo(undo),
        })
    }

    /// Makes /dev/mapper/NAME where udevd does not run (see [`node`]).
    pub(super) fn announce(&self, name: &str) {
        if let Ok(Some(info)) = self.info(name) {
            node::announce(name, info.number);
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

fn dm_name(name: &str) -> Result<&DmName> {
    DmName::new(name).map_err(|source| {
        Error::usage(format!("'{name}' cannot be the name of a device-mapper device")).with_source(source)
    })
}

fn dm_errno(error: &DmError) -> Option<i32> {
    match error {
        DmError::Core(CoreError::Ioctl(_, _, _, errno)) => Some(**errno as i32),
        _ => None,
    }
}

/// The crate's error text is its whole request; errno says as much in a line.
fn dm_error(what: &str, source: DmError) -> Error {
    match dm_errno(&source) {
        Some(errno) => Error::kernel(what, io::Error::from_raw_os_error(errno)),
        None => Error::kernel(what, source),
    }
}
