//! May these bytes be written there? The refusals that keep a copy from changing its own origin, its
//! store, or something else that is in use.
//!
//! The exclusive open of a device is the last word on mounts and holders; the checks here come first because
//! they can say by whom, and they find what an exclusive open does not: processes that write, loop devices. For a
//! file there is a last word too: the kernel grants no read lease on one that anybody has open for writing.
//! Must not write what it judges, and opens it for reading at most.

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

use crate::base::{DeviceNumber, Error, ErrorKind, Result};
use crate::sys::block::is_open_for_writing;
use crate::topology::{Ground, Topology, User};

impl Topology {
    /// Refuses a device that is mounted, swapped to, held by another device, written by a process, shown by a
    /// loop device, read-only, or part of the stack of one of the `forbidden` ones.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] with the reason and what to do.
    pub fn check_device(&self, device: DeviceNumber, path: &Path, forbidden: &[DeviceNumber]) -> Result<()> {
        let shown = path.display();
        self.check_loops_answer(device, path)?;
        let mut parts = self.partitions(device);
        parts.push(device);
        self.check_not_beneath(&parts, path, forbidden)?;
        self.check_not_above(&self.stack(device), &format!("{shown}"), forbidden)?;
        if self.is_read_only(device) {
            return Err(Error::refused(format!("{shown} is read-only"))
                .state("it was not touched")
                .next("make it writable (blockdev --setrw) or name another device"));
        }
        parts.extend(self.same_bytes(device));
        self.check_not_mounted(&parts, path)?;
        self.check_not_swap(&parts, path)?;
        for &part in &parts {
            if let Some(holder) = self.holders(part).first() {
                return Err(Error::refused(format!(
                    "{shown} is in use: {} holds {}",
                    self.name(*holder),
                    self.name(part)
                ))
                .state("it was not touched")
                .next("take it out of use first (lsblk shows by what), or name another device"));
            }
        }
        self.check_unused(path)
    }

    /// Refuses a device or file that a process writes, a loop device shows or the kernel swaps to.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] with who it is and what to do.
    pub fn check_unused(&self, path: &Path) -> Result<()> {
        self.user_of(path)?.map_or(Ok(()), |user| Err(used(path, &user)))
    }

    /// Refuses to have a file replaced that somebody still writes: what they write would be lost when they close it.
    /// Who only reads it goes on reading what it held.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] with who it is, as far as that can be told.
    pub fn check_replaceable(&self, file: &Path) -> Result<()> {
        if let Some(user) = self.user_of(file)?.filter(User::writes) {
            return Err(used(file, &user));
        }
        // Whoever cannot be seen from here, the kernel's own users among them. One that cannot be opened can
        // still be replaced, and nobody else can be asked about it.
        let opened =
            OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(file);
        match opened {
            Ok(open) if is_open_for_writing(&open) => {
                Err(Error::refused(format!("{} is open for writing", file.display()))
                    .state("it was not touched")
                    .next("stop what writes it (fuser shows it), or name another target"))
            }
            _ => Ok(()),
        }
    }

    /// Refuses a file whose filesystem lies on one of the `forbidden` devices; `directory` is where
    /// the file will be.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`], or stat's I/O error.
    pub fn check_file(&self, directory: &Path, forbidden: &[DeviceNumber]) -> Result<()> {
        let metadata = fs::metadata(directory).map_err(|error| {
            let missing = error.kind() == io::ErrorKind::NotFound;
            let error = Error::io(format!("look at the directory {}", directory.display()), error);
            if missing {
                error.with_kind(ErrorKind::Refused).next("create the directory first")
            } else {
                error
            }
        })?;
        let full = fs::canonicalize(directory).unwrap_or_else(|_| directory.to_owned());
        let what = format!("the filesystem of {}", directory.display());
        match self.ground(DeviceNumber::from_dev(metadata.dev()), &full) {
            Ground::Devices(devices) => {
                devices.iter().try_for_each(|device| self.check_filesystem(*device, &what, forbidden))
            }
            // One that hides what it lies on may be the origin's, by a way that nobody sees. The origin loses nothing by
            // that: at rest it is used by nobody, and a live one waits for the secondary only where writers are held for
            // it, which is asked with everything else that may wait.
            Ground::Elsewhere | Ground::Unknown(_) => Ok(()),
        }
    }

    /// Refuses what lies on the filesystem of `device`, named `what`, if that belongs to a
    /// `forbidden` one.
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

    /// `forbidden` has something in `stack`: writing would change the origin or its store.
    fn check_not_above(
        &self,
        stack: &BTreeSet<DeviceNumber>,
        what: &str,
        forbidden: &[DeviceNumber],
    ) -> Result<()> {
        match forbidden.iter().find(|device| stack.contains(device)) {
            None => Ok(()),
            Some(device) => Err(Error::refused(format!(
                "{what} lies on {}, which belongs to the origin or its store: writing the copy there \
                 would change what is being copied",
                self.name(*device)
            ))
            .state("nothing was written")
            .next("choose a secondary on another disk or filesystem, or - to send the copy elsewhere")),
        }
    }

    /// One of `devices` lies beneath a forbidden one.
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
                    "{} holds a part of the origin's stack ({} lies beneath {})",
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
            let device = view.look(&swap).ok().and_then(|found| found.block_device);
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
    fn a_filesystem_that_hides_what_it_lies_on_is_no_reason() {
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
        assert!(refused(dev(8, 1), &[dev(253, 0)]).contains("beneath"));
        assert!(refused(dev(8, 0), &[dev(253, 0)]).contains("beneath"));
        assert!(refused(dev(253, 0), &[dev(253, 0)]).contains("origin"));
        assert!(refused(dev(253, 0), &[dev(8, 1)]).contains("lies on"));
        assert!(refused(dev(8, 16), &[dev(8, 16)]).contains("origin"));
        topology.check_device(dev(8, 16), Path::new("/dev/sdb"), &[dev(253, 0)]).unwrap();
        topology.check_device(dev(253, 0), Path::new("/dev/dm-0"), &[dev(8, 16)]).unwrap();
        fs::write(topology.node(dev(8, 16)).join("ro"), "1\n").unwrap();
        assert!(refused(dev(8, 16), &[]).contains("read-only"));
    }
}
