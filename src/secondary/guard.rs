//! The refusals that keep a copy from overwriting its own origin, its store, or another device or file in
//! use.
//!
//! The exclusive open of a device decides about mounts and holders. The checks here come first because they
//! can name the user of the device, and because they find what an exclusive open does not: processes that
//! write, loop devices. For a file the kernel decides as well: it grants no read lease on a file that is open
//! for writing. This module never writes to what it checks, and opens it only for reading.

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

use crate::base::{DeviceNumber, Error, ErrorKind, Result};
use crate::sys::block::is_open_for_writing;
use crate::topology::{FilesystemBacking, Topology, User};

impl Topology {
    /// Refuses a device that is mounted, swapped to, held by another device, written by a process, the
    /// backing device of a loop device, read-only, or part of the stack of one of the `forbidden` devices; by itself
    /// or by another path to its disk.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] with the reason and what to do.
    pub fn check_device(&self, device: DeviceNumber, path: &Path, forbidden: &[DeviceNumber]) -> Result<()> {
        let shown = path.display();
        self.check_loops_answer(device, path)?;
        let mut parts = self.partitions(device);
        parts.push(device);
        self.check_not_beneath(&parts, path, forbidden)?;
        let others = self.other_paths_of(&parts);
        self.check_not_beneath(&others, path, forbidden)
            .and_then(|()| self.check_not_held(&others, path))
            .map_err(|error| error.context(format!("{shown} is another path to a disk that is in use")))?;
        self.check_not_above(&self.stack(device), &format!("{shown}"), forbidden)?;
        if self.is_read_only(device) {
            return Err(Error::refused(format!("{shown} is read-only"))
                .state("it was not touched")
                .next("make it writable (blockdev --setrw) or name another device"));
        }
        parts.extend(self.same_bytes(device));
        self.check_not_held(&parts, path)?;
        self.check_unused(path)
    }

    /// None of `devices`, through which `path` is reached, is mounted, swapped to or held by another device.
    fn check_not_held(&self, devices: &[DeviceNumber], path: &Path) -> Result<()> {
        self.check_not_mounted(devices, path)?;
        self.check_not_swap(devices, path)?;
        for &device in devices {
            if let Some(holder) = self.holders(device).first() {
                return Err(Error::refused(format!(
                    "{} is in use: {} holds {}",
                    path.display(),
                    self.name(*holder),
                    self.name(device)
                ))
                .state("it was not touched")
                .next("release it first (lsblk shows the user), or name another device"));
            }
        }
        Ok(())
    }

    /// Refuses a device or file that a process writes, a loop device is backed by, or the kernel swaps to.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] with the user of it and what to do.
    pub fn check_unused(&self, path: &Path) -> Result<()> {
        self.user_of(path)?.map_or(Ok(()), |user| Err(used(path, &user)))
    }

    /// Refuses to replace a file that is open for writing: a process that holds it open would lose what it
    /// writes. A process that only reads it keeps reading the old content.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] with the user of it, as far as that can be determined.
    pub fn check_replaceable(&self, file: &Path) -> Result<()> {
        if let Some(user) = self.user_of(file)?.filter(User::writes) {
            return Err(used(file, &user));
        }
        // This finds users that are not visible from here, the kernel's own among them. A file that cannot be
        // opened can still be replaced, and no other check is possible.
        let opened =
            OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(file);
        match opened {
            Ok(open) if is_open_for_writing(&open) => {
                Err(Error::refused(format!("{} is open for writing", file.display()))
                    .state("it was not touched")
                    .next("stop the process that writes to it (fuser shows it), or name another target"))
            }
            _ => Ok(()),
        }
    }

    /// Refuses a file whose filesystem is on one of the `forbidden` devices; `directory` is where the file
    /// will be.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`], or stat's I/O error.
    pub fn check_file(&self, directory: &Path, forbidden: &[DeviceNumber]) -> Result<()> {
        let metadata = fs::metadata(directory).map_err(|error| {
            let missing = error.kind() == io::ErrorKind::NotFound;
            let error = Error::io(format!("stat of the directory {}", directory.display()), error);
            if missing {
                error.with_kind(ErrorKind::Refused).next("create the directory first")
            } else {
                error
            }
        })?;
        let full = fs::canonicalize(directory).unwrap_or_else(|_| directory.to_owned());
        let what = format!("the filesystem of {}", directory.display());
        match self.filesystem_backing(DeviceNumber::from_dev(metadata.dev()), &full) {
            FilesystemBacking::Devices(devices) => {
                devices.iter().try_for_each(|device| self.check_filesystem(*device, &what, forbidden))
            }
            // A filesystem whose devices are hidden may be on the origin. The origin loses nothing by that: a
            // cold origin is not in use, and a live one waits for the secondary only if writers are held for it;
            // that case is checked together with everything else that may wait.
            FilesystemBacking::Elsewhere | FilesystemBacking::Unknown(_) => Ok(()),
        }
    }

    /// Refuses the filesystem of `device`, named `what`, if it belongs to a `forbidden` device.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`].
    pub fn check_filesystem(
        &self,
        device: DeviceNumber,
        what: &str,
        forbidden: &[DeviceNumber],
    ) -> Result<()> {
        self.check_not_above(&self.stack(device), what, forbidden)
    }

    /// Refuses if `forbidden` has a device in `stack`: writing would change the origin or its store.
    fn check_not_above(
        &self,
        stack: &BTreeSet<DeviceNumber>,
        what: &str,
        forbidden: &[DeviceNumber],
    ) -> Result<()> {
        match forbidden.iter().find(|device| stack.contains(device)) {
            None => Ok(()),
            Some(device) => Err(Error::refused(format!(
                "{what} is on {}, which belongs to the origin or its store: writing the copy there \
                 would change what is being copied",
                self.name(*device)
            ))
            .state("nothing was written")
            .next("choose a secondary on another disk or filesystem, or - to send the copy elsewhere")),
        }
    }

    /// Refuses if one of `devices` is below a forbidden one.
    fn check_not_beneath(
        &self,
        devices: &[DeviceNumber],
        path: &Path,
        forbidden: &[DeviceNumber],
    ) -> Result<()> {
        for &upper in forbidden {
            let beneath = self.stack(upper);
            if let Some(device) = devices.iter().find(|device| beneath.contains(device)) {
                return Err(Error::refused(format!(
                    "{} holds a part of the origin's stack ({} is below {})",
                    path.display(),
                    self.name(*device),
                    self.name(upper)
                ))
                .state("nothing was written")
                .next("choose a secondary that shares no device with the origin"));
            }
        }
        Ok(())
    }

    fn check_not_mounted(&self, devices: &[DeviceNumber], path: &Path) -> Result<()> {
        let mounts = self.mounts()?;
        let found = mounts.iter().find(|mount| devices.iter().any(|it| mount.is_of(*it)));
        match found {
            None => Ok(()),
            Some(mount) => {
                Err(Error::refused(format!("{} is mounted (at {})", path.display(), mount.point.display()))
                    .state("it was not touched")
                    .next(format!("umount {} first, or name another device", mount.point.display())))
            }
        }
    }

    fn check_not_swap(&self, devices: &[DeviceNumber], path: &Path) -> Result<()> {
        let view = self.own_view()?;
        for swap in self.swaps()? {
            let device = view.stat(&swap).ok().and_then(|found| found.block_device);
            if device.is_some_and(|device| devices.contains(&device)) {
                return Err(Error::refused(format!("{} is swap space", path.display()))
                    .state("it was not touched")
                    .next(format!("swapoff {} first, or name another device", swap.display())));
            }
        }
        Ok(())
    }
}

fn used(path: &Path, user: &User) -> Error {
    Error::refused(format!("{} is {user}", path.display()))
        .with_source(io::Error::from_raw_os_error(libc::EBUSY))
        .state("it was not touched")
        .next(format!("{}, or name another target", user.remedy()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::tests::{dev, machine};

    #[test]
    fn a_filesystem_with_hidden_devices_is_accepted() {
        let (keep, topology) = machine();
        for kind in ["fuse.mergerfs", "zfs", "nfs4", "smbfs"] {
            let line = format!("50 1 0:7777 / / rw - {kind} pool rw\n");
            fs::write(keep.path().join("proc/self/mountinfo"), line).unwrap();
            topology.check_file(keep.path(), &[dev(253, 0)]).unwrap();
        }
    }

    #[test]
    fn refusals() {
        let (_keep, topology) = machine();
        let refused = |device, forbidden: &[DeviceNumber]| {
            let error = topology.check_device(device, Path::new("/dev/x"), forbidden).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Refused);
            assert!(error.next_step().is_some());
            error.to_string()
        };
        assert!(refused(dev(8, 2), &[]).contains("mounted (at /mnt/my disk)"));
        assert!(refused(dev(8, 0), &[]).contains("mounted"), "a disk with a mounted partition");
        assert!(refused(dev(8, 1), &[]).contains("/dev/dm-0 holds /dev/sda1"));
        assert!(refused(dev(8, 1), &[dev(253, 0)]).contains("is below"));
        assert!(refused(dev(8, 0), &[dev(253, 0)]).contains("is below"));
        assert!(refused(dev(253, 0), &[dev(253, 0)]).contains("origin"));
        assert!(refused(dev(253, 0), &[dev(8, 1)]).contains("is on"));
        assert!(refused(dev(8, 16), &[dev(8, 16)]).contains("origin"));
        topology.check_device(dev(8, 16), Path::new("/dev/sdb"), &[dev(253, 0)]).unwrap();
        topology.check_device(dev(253, 0), Path::new("/dev/dm-0"), &[dev(8, 16)]).unwrap();
        fs::write(topology.node(dev(8, 16)).join("ro"), "1\n").unwrap();
        assert!(refused(dev(8, 16), &[]).contains("read-only"));
    }
    #[test]
    fn a_disk_in_use_is_refused_by_its_other_path() {
        let (_keep, topology) = machine();
        for device in [dev(8, 0), dev(8, 16)] {
            let path = topology.node(device).join("wwid");
            fs::write(path, "naa.600a0b80\n").unwrap();
        }
        let refused = |forbidden: &[DeviceNumber]| {
            let error = topology.check_device(dev(8, 16), Path::new("/dev/sdb"), forbidden).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Refused);
            assert!(error.to_string().contains("/dev/sdb is another path"), "{error}");
            error.to_string()
        };
        assert!(refused(&[dev(253, 0)]).contains("/dev/sda is below /dev/dm-0"));
        // The kernel has not read the partition table by this path, so only the other path has partitions.
        let error = topology.check_device(dev(8, 16), Path::new("/dev/sdb"), &[]).unwrap_err();
        assert!(error.to_string().contains("mounted (at /mnt/my disk)"), "{error}");
    }
}
