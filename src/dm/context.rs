//! The kernel's device-mapper: one method per call, with errors that name the device.
//!
//! A device is addressed by name or by number ([`Key`]). The order of calls is decided elsewhere, in
//! [`change`](crate::stack::change).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::OpenOptionsExt;
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::Serialize;

use crate::base::clock::Stopwatch;
use crate::base::{DeviceNumber, Error, ErrorKind, Result, ResultExt, Sectors};
use crate::sys::dm_ioctl::{self, Call, CallArguments, Key, Reply, SuspendFlags};
use crate::sys::nudge;

use super::naming::{DeviceIdentity, ROLE_PRESERVE, ROLE_REAL, is_ours, stack_device_name};
use super::node;
use super::status::SnapshotStatus;
use super::table::Table;
use super::udev::{Udev, with_cookie};
use super::wire;

/// The path of the control device.
pub const CONTROL_PATH: &str = "/dev/mapper/control";

/// Attempts to suspend while signals interrupt.
pub const SUSPEND_ATTEMPTS: u32 = 64;

/// Attempts to remove a device that another process has open for a moment (blkid, a udev rule).
const REMOVE_ATTEMPTS: u32 = 50;
/// Pause between two attempts.
const REMOVE_PAUSE: Duration = Duration::from_millis(40);

/// An open device-mapper.
pub struct Dm {
    control: File,
}

/// The kernel's information about a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DeviceInfo {
    /// Its name.
    pub name: String,
    /// Its UUID; empty for none.
    pub uuid: String,
    /// Its number.
    pub number: DeviceNumber,
    /// How often it is open, including by tables of other devices.
    pub open_count: u32,
    /// True if it is suspended.
    pub suspended: bool,
    /// True if it has an active table.
    pub has_active: bool,
    /// True if it has an inactive table.
    pub has_inactive: bool,
    /// True if writes are refused.
    pub read_only: bool,
}

/// One of a device's two tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slot {
    /// The table in use.
    Active,
    /// The loaded table, which the next resume activates.
    Inactive,
}

impl Dm {
    /// Opens the control device (which makes the kernel load its module).
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] without permission, [`ErrorKind::Kernel`] if device-mapper is missing.
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

    /// True if the control device exists, whether we may use it or not.
    #[must_use]
    pub fn is_available() -> bool {
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
        let what = || "reading the version of device-mapper".to_owned();
        let [major, minor, patch] = self.call(Call::Version, &CallArguments::default(), what)?.version;
        Ok((major, minor, patch))
    }

    /// True if the kernel has the target `kind`; loads its module if necessary. False if the kernel is too
    /// old to report it (before 5.4).
    #[must_use]
    pub fn has_target(&self, kind: &str) -> bool {
        // The kernel takes the name in the field for a device name.
        let arguments = CallArguments { device: Some(kind.into()), ..CallArguments::default() };
        dm_ioctl::call(&self.control, Call::GetTargetVersion, &arguments).is_ok()
    }

    /// Waits until a device has had an event (a snapshot was lost, for example) since the last call, at most `limit`.
    /// Kernels before 4.13 report no events: then it waits for `limit`.
    ///
    /// # Errors
    /// [`ErrorKind::Interrupted`] if a signal ended the wait; the kernel's.
    pub fn wait_for_event(&self, limit: Duration) -> Result<()> {
        let what = || "waiting for an event of device-mapper".to_owned();
        let timeout = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
        let mut files = [PollFd::new(self.control.as_fd(), PollFlags::POLLIN)];
        match poll(&mut files, timeout) {
            Err(Errno::EINTR) => return Err(Error::new(ErrorKind::Interrupted, what())),
            polled => polled.map_err(io::Error::from).io_context(what)?,
        };
        // The events so far count as seen.
        match dm_ioctl::call(&self.control, Call::ArmPoll, &CallArguments::default()) {
            Err(error) if error.raw_os_error() != Some(libc::ENOTTY) => Err(error).io_context(what),
            _ => Ok(()),
        }
    }

    /// All devices: name and number.
    ///
    /// # Errors
    /// The kernel's.
    pub fn list(&self) -> Result<Vec<(String, DeviceNumber)>> {
        let what = || "listing device-mapper devices".to_owned();
        wire::decode_names(&self.call(Call::ListDevices, &CallArguments::default(), what)?.payload)
    }

    /// Every device that Tidemark created. A device that is removed meanwhile is left out.
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

    /// Information about a device; None if it does not exist.
    ///
    /// # Errors
    /// The kernel's; an error for an impossible name.
    pub fn info<'a>(&self, device: impl Into<Key<'a>>) -> Result<Option<DeviceInfo>> {
        let device = device.into();
        let arguments = CallArguments { device: Some(device), ..CallArguments::default() };
        let reply = match dm_ioctl::call(&self.control, Call::DevStatus, &arguments) {
            Ok(reply) => reply,
            Err(source) if source.raw_os_error() == Some(libc::ENXIO) => return Ok(None),
            Err(source) => return Err(Error::kernel(format!("querying device {device}"), source)),
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
    /// [`ErrorKind::Kernel`] if it does not exist.
    pub fn info_of<'a>(&self, device: impl Into<Key<'a>>) -> Result<DeviceInfo> {
        let device = device.into();
        self.info(device)?.ok_or_else(|| {
            Error::kernel(
                format!("querying device {device}, which was removed or renamed"),
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

    /// The table that device `name` uses.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] if it has none; as [`Dm::table`].
    pub fn active_table(&self, name: &str) -> Result<Table> {
        self.table(name, Slot::Active)?.ok_or_else(|| {
            Error::refused(format!("{name} has no table")).next("activate the device, then copy it")
        })
    }

    /// A device's table; None if the slot is empty.
    ///
    /// # Errors
    /// The kernel's; [`ErrorKind::BadData`] for a table that violates an invariant of [`Table`].
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

    /// The status of a device that consists of one `snapshot` target.
    ///
    /// # Errors
    /// The kernel's; [`ErrorKind::Kernel`] for any other device.
    pub fn snapshot_status(&self, name: &str) -> Result<SnapshotStatus> {
        match self.status(name)?.as_slice() {
            [(_, _, kind, text)] if kind == "snapshot" => Ok(SnapshotStatus::parse(text)),
            _ => Err(Error::new(ErrorKind::Kernel, format!("{name} is not a snapshot device"))),
        }
    }

    /// A device of a copy's stack under device `name`; None if there is no stack. Found by what `name` maps
    /// to, as `name` may have been renamed since; and by its own name, as everything may be released.
    ///
    /// # Errors
    /// The kernel's.
    pub fn stack_under(&self, name: &str) -> Result<Option<DeviceInfo>> {
        let table = self.table(name, Slot::Active)?;
        let is_part = |info: &DeviceInfo| {
            DeviceIdentity::parse(&info.uuid).is_some_and(|it| {
                let is_named = it == DeviceIdentity::new(name, ROLE_REAL, &it.id)
                    && info.name == stack_device_name(name, ROLE_REAL, &it.id);
                let is_below = it.role == ROLE_REAL || it.role == ROLE_PRESERVE;
                is_named || is_below && table.as_ref().is_some_and(|table| table.maps_to(info.number))
            })
        };
        Ok(self.list_ours()?.into_iter().find(is_part))
    }

    /// Creates a device without a table.
    ///
    /// # Errors
    /// The kernel's: EBUSY if name or UUID is in use.
    pub fn create(&self, name: &str, uuid: &str) -> Result<DeviceNumber> {
        let arguments =
            CallArguments { device: Some(name.into()), uuid: Some(uuid), ..CallArguments::default() };
        let reply = self.call(Call::DevCreate, &arguments, || format!("creating device {name}"))?;
        Ok(DeviceNumber::from_dev(reply.dev))
    }

    /// Loads a table into a device's inactive slot.
    ///
    /// # Errors
    /// The kernel's; its log (`dmesg`) has the details.
    pub fn load<'a>(&self, device: impl Into<Key<'a>>, table: &Table) -> Result<()> {
        self.load_as(device.into(), table, 0)
    }

    fn load_as(&self, device: Key<'_>, table: &Table, flags: u32) -> Result<()> {
        let payload = wire::encode_table(table);
        let arguments = CallArguments {
            device: Some(device),
            flags,
            target_count: u32::try_from(table.lines().len()).expect("a table's lines are bounded"),
            payload: &payload,
            ..CallArguments::default()
        };
        self.call(Call::TableLoad, &arguments, || format!("loading the table of {device}"))
            .map(|_| ())
            .map_err(|error| error.next("the kernel's log has the reason: dmesg | grep device-mapper"))
    }

    /// Drops a device's inactive table, if there is one.
    ///
    /// # Errors
    /// The kernel's.
    pub fn clear<'a>(&self, device: impl Into<Key<'a>>) -> Result<()> {
        let device = device.into();
        dm_ioctl::clear(&self.control, device)
            .map_err(|source| Error::kernel(format!("dropping the inactive table of {device}"), source))
    }

    /// Suspends a device.
    ///
    /// # Errors
    /// The kernel's.
    pub fn suspend<'a>(&self, device: impl Into<Key<'a>>, how: SuspendFlags) -> Result<()> {
        let device = device.into();
        let mut attempt = 1;
        loop {
            match dm_ioctl::suspend(&self.control, device, how) {
                Ok(()) => return Ok(()),
                // A signal ended the wait for I/O in flight. A suspension without a flush is part of an undo,
                // which a signal must not prevent, except the nudge that reports that writers are held for
                // too long.
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

    /// Activates a device's inactive table, if there is one, and resumes the device.
    ///
    /// # Errors
    /// The kernel's.
    pub fn resume<'a>(&self, device: impl Into<Key<'a>>, udev: Udev) -> Result<()> {
        let device = device.into();
        with_cookie(udev, device, |event_nr| dm_ioctl::resume(&self.control, device, event_nr))
            .map_err(|source| Error::kernel(format!("resuming {device}"), source))
    }

    /// Resumes a device without a udev cookie. If another process (the watchdog) resumes it at the same
    /// moment, the kernel refuses the second call (EINVAL of `dm_resume`, Linux `drivers/md/dm.c`). The
    /// device is resumed then, so that counts as success. Not for activating a table: it would not be known
    /// whether that happened.
    ///
    /// # Errors
    /// The kernel's.
    pub fn resume_if_suspended<'a>(&self, device: impl Into<Key<'a>>) -> Result<()> {
        let device = device.into();
        let Err(error) = self.resume(device, Udev::None) else { return Ok(()) };
        let is_resumed = |info: &DeviceInfo| info.has_active && !info.suspended && !info.has_inactive;
        match self.info(device) {
            Ok(Some(info)) if error.errno() == Some(libc::EINVAL) && is_resumed(&info) => Ok(()),
            _ => Err(error),
        }
    }

    /// Removes a device. Waits at most 2 s for a process that has it open for a moment.
    ///
    /// # Errors
    /// The kernel's: EBUSY while it is in use, ENXIO if it does not exist.
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
        node::remove_mapper_link(name, number);
        Ok(())
    }

    /// Removes the internal device `name` if it has this UUID. Another device of that name, or none, is no error.
    ///
    /// # Errors
    /// As [`Dm::remove`].
    pub fn remove_if_it_is(&self, name: &str, identity: &DeviceIdentity) -> Result<()> {
        match self.info(name)? {
            Some(info) if info.uuid == identity.uuid() => self.remove(name, Udev::Internal),
            _ => Ok(()),
        }
    }

    /// Creates a device and activates its table; removes it again if a step fails.
    ///
    /// # Errors
    /// The first failure, with a failed removal.
    pub fn create_active(&self, name: &str, uuid: &str, table: &Table, udev: Udev) -> Result<DeviceNumber> {
        self.create_active_as(name, uuid, table, udev, 0)
    }

    /// As [`Dm::create_active`], read-only.
    ///
    /// # Errors
    /// As [`Dm::create_active`].
    pub fn create_read_only(
        &self,
        name: &str,
        uuid: &str,
        table: &Table,
        udev: Udev,
    ) -> Result<DeviceNumber> {
        self.create_active_as(name, uuid, table, udev, dm_ioctl::FLAG_READONLY)
    }

    fn create_active_as(
        &self,
        name: &str,
        uuid: &str,
        table: &Table,
        udev: Udev,
        flags: u32,
    ) -> Result<DeviceNumber> {
        let number = self.create(name, uuid)?;
        let result = self.load_as(name.into(), table, flags).and_then(|()| self.resume(name, udev));
        if let Err(error) = result {
            return Err(error.after_undo(self.remove(name, udev)));
        }
        node::create_mapper_link(name, number);
        Ok(number)
    }

    /// Activates the loaded table of a device in use, after I/O in flight has completed, in *one* call: the
    /// resume of a device that is not suspended suspends it (without flushing or freezing a filesystem),
    /// swaps the tables and resumes it (`do_resume` in Linux `drivers/md/dm-ioctl.c`). So if this process
    /// dies, it never leaves the device suspended. A device that is suspended is resumed with the table.
    ///
    /// Returns how long the swap took: the longest time for which I/O can have been held.
    ///
    /// # Errors
    /// [`ErrorKind::Interrupted`] if a [`nudge`] ended the wait for I/O in flight: the device was not
    /// suspended, and the table may still be loaded. The kernel's; the device may then be suspended, with the
    /// table still loaded.
    pub fn swap_loaded<'a>(&self, device: impl Into<Key<'a>>) -> Result<Duration> {
        let device = device.into();
        let mut attempt = 1;
        loop {
            let watch = Stopwatch::start();
            match self.resume(device, Udev::None) {
                Ok(()) => return Ok(watch.elapsed()),
                // The wait for I/O in flight was interrupted. Linux 6.1 continues as if it had suspended the
                // device, drops the loaded table and returns EINVAL (`do_resume` ignores the result of
                // `dm_suspend`).
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

    /// As [`Dm::swap_loaded`]. If the tables cannot be swapped, drops the loaded one, and resumes the device, which the
    /// kernel then leaves suspended.
    ///
    /// # Errors
    /// As [`Dm::swap_loaded`]; the device keeps the table that it had.
    pub fn swap_or_resume<'a>(&self, device: impl Into<Key<'a>>) -> Result<()> {
        let device = device.into();
        let Err(error) = self.swap_loaded(device) else { return Ok(()) };
        Err(error.after_undo(self.clear(device).and_then(|()| self.resume_if_suspended(device))))
    }

    /// Creates /dev/mapper/NAME if udevd does not run (see [`node`]).
    pub fn create_mapper_link(&self, name: &str) {
        if let Ok(Some(info)) = self.info(name) {
            node::create_mapper_link(name, info.number);
        }
    }

    /// Opens the device with this number exclusively: until it is closed, no other process can do so, in any
    /// namespace.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] if another process has; I/O errors with the path.
    pub fn claim(&self, number: DeviceNumber) -> Result<File> {
        self.open_device(number, false, libc::O_EXCL).map_err(|error| match error.errno() {
            Some(libc::EBUSY) => error.with_kind(ErrorKind::Refused),
            _ => error,
        })
    }

    /// True if a process holds the device open exclusively.
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
