//! Finds the loop devices in use, and what backs each.
//!
//! Uses the kernel's identity of the backing file (`LOOP_GET_STATUS64`), whatever path led to it: the path in
//! sysfs may be gone, belong to another mount namespace, or lead to another file by now. The kernel gets the
//! identity from the backing file's file system. If the server of that is gone, there is no answer, and the
//! loop device is [`LoopBacking::Silent`]. It is not queried again, so that nothing waits for it while
//! writers wait for us.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use super::{Topology, device_number, number_file};
use crate::base::{Bytes, DeviceNumber, Error, Result};
use crate::sys::loop_device::{self, LoopStatus};

/// Loop devices that did not answer, each with the sequence number that distinguishes its uses.
static SILENT_LOOPS: Mutex<BTreeSet<(DeviceNumber, Option<String>)>> = Mutex::new(BTreeSet::new());

/// A loop device in use.
#[derive(Clone, Debug)]
pub(super) struct AttachedLoop {
    pub(super) number: DeviceNumber,
    pub(super) node: PathBuf,
    pub(super) backing: LoopBacking,
}

/// What backs a loop device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum LoopBacking {
    /// This file or device.
    Known(LoopStatus),
    /// A file on a file system that does not answer.
    Silent,
    /// Not available here; the text says why.
    Hidden(String),
}

/// A loop device over another block device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoopOver {
    /// Its number.
    pub device: DeviceNumber,
    /// Its start in the other device.
    pub offset: Bytes,
    /// Its length, if it ends before the other device.
    pub length: Option<Bytes>,
}

impl AttachedLoop {
    pub(super) fn status(&self) -> Option<&LoopStatus> {
        match &self.backing {
            LoopBacking::Known(status) => Some(status),
            LoopBacking::Silent | LoopBacking::Hidden(_) => None,
        }
    }

    /// The block device below it.
    pub(super) fn device_beneath(&self) -> Option<DeviceNumber> {
        let rdev = self.status()?.backing_rdev;
        (rdev != 0).then(|| DeviceNumber::from_dev(rdev))
    }

    /// The `st_dev` of the file below it; None if that is a block device.
    pub(super) fn filesystem_beneath(&self) -> Option<DeviceNumber> {
        let status = self.status()?;
        (status.backing_rdev == 0).then(|| DeviceNumber::from_dev(status.backing_dev))
    }
}

/// The loop devices in use at one moment.
#[derive(Clone, Debug)]
pub struct Loops(pub(super) Vec<AttachedLoop>);

impl Loops {
    /// The loop devices on `device`. They are not among its holders.
    #[must_use]
    pub fn over(&self, device: DeviceNumber) -> Vec<LoopOver> {
        let over = self.0.iter().filter(|it| it.device_beneath() == Some(device));
        let over = over.filter_map(|it| {
            let status = it.status()?;
            Some(LoopOver { device: it.number, offset: status.offset, length: status.length })
        });
        over.collect()
    }

    /// The loop devices whose backing is not known.
    #[must_use]
    pub fn unknown(&self) -> BTreeSet<DeviceNumber> {
        self.0.iter().filter(|it| it.status().is_none()).map(|it| it.number).collect()
    }

    /// The loop devices on a file of the filesystem whose `st_dev` is `device`.
    pub(super) fn over_files_in(&self, device: DeviceNumber) -> impl Iterator<Item = DeviceNumber> {
        self.0.iter().filter(move |it| it.filesystem_beneath() == Some(device)).map(|it| it.number)
    }
}

impl Topology {
    /// All loop devices in use at present.
    #[must_use]
    pub fn loops(&self) -> Loops {
        let entries = fs::read_dir(self.root.join("sys/block")).into_iter().flatten().flatten();
        let attached = entries.filter(|entry| entry.path().join("loop").exists());
        let numbers = attached.filter_map(|entry| number_file(&entry.path().join("dev"))).collect();
        Loops(self.query_loops(numbers))
    }

    /// `device` as a loop device; None if it is no loop device, or not in use.
    pub(super) fn attached_loop(&self, device: DeviceNumber) -> Option<AttachedLoop> {
        let is_one = self.node(device).join("loop").exists();
        if is_one { self.query_loops(vec![device]).pop() } else { None }
    }

    /// Refuses `device`, at `path`, if it is a loop device, or above one, whose file is on a file system that
    /// does not answer.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused).
    pub fn check_loops_answer(&self, device: DeviceNumber, path: &Path) -> Result<()> {
        let beneath = self.stack(device);
        let silent = beneath.into_iter().filter_map(|device| self.attached_loop(device));
        silent.filter(|it| it.backing == LoopBacking::Silent).try_for_each(|it| {
            Err(Error::refused(format!(
                "{} does not answer: the file of {} is on a filesystem whose server is gone",
                path.display(),
                it.node.display()
            ))
            .state("nothing was changed")
            .next("check that server, or choose another device"))
        })
    }

    /// The path of a loop device's backing file according to the kernel. It may be meant for another mount
    /// namespace, or be gone. Only for messages, and to find a mount.
    pub(super) fn backing_path(&self, device: DeviceNumber) -> Option<PathBuf> {
        use std::os::unix::ffi::OsStringExt as _;
        let mut path = fs::read(self.node(device).join("loop/backing_file")).ok()?;
        if path.ends_with(b"\n") {
            path.pop();
        }
        Some(std::ffi::OsString::from_vec(path).into())
    }

    fn query_loops(&self, numbers: Vec<DeviceNumber>) -> Vec<AttachedLoop> {
        let mut found = Vec::new();
        let mut asked: Vec<(DeviceNumber, PathBuf)> = Vec::new();
        for number in numbers {
            let node = PathBuf::from(self.name(number));
            // The node of that name may belong to another device.
            let has_node = device_number(&node).is_ok_and(|it| it == Some(number));
            if self.is_silent(number) {
                found.push(AttachedLoop { number, node, backing: LoopBacking::Silent });
            } else if has_node {
                asked.push((number, node));
            } else {
                let why = format!("{} is not its node here", node.display());
                found.push(AttachedLoop { number, node, backing: LoopBacking::Hidden(why) });
            }
        }
        let paths: Vec<&Path> = asked.iter().map(|(_, node)| node.as_path()).collect();
        let answers = loop_device::statuses(&paths);
        for ((number, node), answer) in asked.into_iter().zip(answers) {
            let backing = match answer {
                Ok(Some(status)) => LoopBacking::Known(status),
                Ok(None) => continue,
                Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                    self.note_silent(number);
                    LoopBacking::Silent
                }
                Err(error) => LoopBacking::Hidden(error.to_string()),
            };
            found.push(AttachedLoop { number, node, backing });
        }
        found.sort_by_key(|it| it.number);
        found
    }

    fn sequence(&self, number: DeviceNumber) -> Option<String> {
        fs::read_to_string(self.node(number).join("diskseq")).ok()
    }

    fn is_silent(&self, number: DeviceNumber) -> bool {
        let silent = SILENT_LOOPS.lock().unwrap_or_else(PoisonError::into_inner);
        !silent.is_empty() && silent.contains(&(number, self.sequence(number)))
    }

    fn note_silent(&self, number: DeviceNumber) {
        let key = (number, self.sequence(number));
        SILENT_LOOPS.lock().unwrap_or_else(PoisonError::into_inner).insert(key);
    }
}
