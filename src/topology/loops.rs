//! Which loop devices are there, and what does each show?
//!
//! By the kernel's own identity of the backing file (`LOOP_GET_STATUS64`), whatever path led to it: the path that sysfs
//! shows can be gone, belong to another mount namespace, or lead to another file by now. The identity is for the backing
//! file's system to give. One whose server is gone gives none, and the loop device is [`Shows::Silent`]: it is not asked a
//! second time, so that nothing waits for it where writers wait for us.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use super::{Topology, device_number, number_file};
use crate::base::{Bytes, DeviceNumber, Error, Result};
use crate::sys::loop_device::{self, LoopStatus};

/// Loop devices that did not answer, with the count that tells one use of a loop device from the next.
static SILENT: Mutex<BTreeSet<(DeviceNumber, Option<String>)>> = Mutex::new(BTreeSet::new());

/// A loop device in use.
#[derive(Clone, Debug)]
pub(super) struct Attached {
    pub(super) number: DeviceNumber,
    pub(super) node: PathBuf,
    pub(super) shows: Shows,
}

/// What a loop device shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Shows {
    /// This.
    Known(LoopStatus),
    /// A file of a file system that does not answer.
    Silent,
    /// It cannot be asked here: why.
    Hidden(String),
}

/// A loop device over another block device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoopOver {
    /// Its number.
    pub device: DeviceNumber,
    /// Where in the other device it begins.
    pub offset: Bytes,
    /// Its length, where it ends before the other device does.
    pub length: Option<Bytes>,
}

impl Attached {
    pub(super) fn status(&self) -> Option<&LoopStatus> {
        match &self.shows {
            Shows::Known(status) => Some(status),
            Shows::Silent | Shows::Hidden(_) => None,
        }
    }

    /// The block device that it shows.
    pub(super) fn device_beneath(&self) -> Option<DeviceNumber> {
        let rdev = self.status()?.backing_rdev;
        (rdev != 0).then(|| DeviceNumber::from_dev(rdev))
    }

    /// `st_dev` of the file that it shows; None where that is a block device.
    pub(super) fn filesystem_beneath(&self) -> Option<DeviceNumber> {
        let status = self.status()?;
        (status.backing_rdev == 0).then(|| DeviceNumber::from_dev(status.backing_dev))
    }
}

/// The loop devices in use at one moment.
#[derive(Clone, Debug)]
pub struct Loops(pub(super) Vec<Attached>);

impl Loops {
    /// Those that show `device`. They are not among its holders.
    #[must_use]
    pub fn over(&self, device: DeviceNumber) -> Vec<LoopOver> {
        let over = self.0.iter().filter(|it| it.device_beneath() == Some(device));
        let over = over.filter_map(|it| {
            let status = it.status()?;
            Some(LoopOver { device: it.number, offset: status.offset, length: status.length })
        });
        over.collect()
    }

    /// Those that do not say what they show.
    #[must_use]
    pub fn unknown(&self) -> BTreeSet<DeviceNumber> {
        self.0.iter().filter(|it| it.status().is_none()).map(|it| it.number).collect()
    }

    /// Those that show a file of the filesystem whose `st_dev` is `device`.
    pub(super) fn over_files_in(&self, device: DeviceNumber) -> impl Iterator<Item = DeviceNumber> {
        self.0.iter().filter(move |it| it.filesystem_beneath() == Some(device)).map(|it| it.number)
    }
}

impl Topology {
    /// All loop devices in use, as they are now.
    #[must_use]
    pub fn loops(&self) -> Loops {
        let entries = fs::read_dir(self.root.join("sys/block")).into_iter().flatten().flatten();
        let attached = entries.filter(|entry| entry.path().join("loop").exists());
        let numbers = attached.filter_map(|entry| number_file(&entry.path().join("dev"))).collect();
        Loops(self.look_at_loops(numbers))
    }

    /// `device` as a loop device; None where it is none, or none in use.
    pub(super) fn attached_loop(&self, device: DeviceNumber) -> Option<Attached> {
        let is_one = self.node(device).join("loop").exists();
        if is_one { self.look_at_loops(vec![device]).pop() } else { None }
    }

    /// Refuses `device`, at `path`, where it is, or lies on, a loop device over a file of a file system that does not answer.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused).
    pub fn check_loops_answer(&self, device: DeviceNumber, path: &Path) -> Result<()> {
        let beneath = self.stack(device);
        let silent = beneath.into_iter().filter_map(|device| self.attached_loop(device));
        silent.filter(|it| it.shows == Shows::Silent).try_for_each(|it| {
            Err(Error::refused(format!(
                "{} does not answer: the file that {} shows is on a file system whose server is gone",
                path.display(),
                it.node.display()
            ))
            .state("nothing was changed")
            .next("see to that server, or name another device"))
        })
    }

    /// Where the kernel says that a loop device's backing file is, as seen from here: another mount namespace, or no place
    /// at all, may be meant. For people, and to find a mount by.
    pub(super) fn backing_path(&self, device: DeviceNumber) -> Option<PathBuf> {
        use std::os::unix::ffi::OsStringExt as _;
        let mut path = fs::read(self.node(device).join("loop/backing_file")).ok()?;
        if path.ends_with(b"\n") {
            path.pop();
        }
        Some(std::ffi::OsString::from_vec(path).into())
    }

    fn look_at_loops(&self, numbers: Vec<DeviceNumber>) -> Vec<Attached> {
        let mut found = Vec::new();
        let mut asked: Vec<(DeviceNumber, PathBuf)> = Vec::new();
        for number in numbers {
            let node = PathBuf::from(self.name(number));
            // A node of that name can be another device's.
            let has_node = device_number(&node).is_ok_and(|it| it == Some(number));
            if self.is_silent(number) {
                found.push(Attached { number, node, shows: Shows::Silent });
            } else if has_node {
                asked.push((number, node));
            } else {
                let why = format!("{} is no node of it here", node.display());
                found.push(Attached { number, node, shows: Shows::Hidden(why) });
            }
        }
        let paths: Vec<&Path> = asked.iter().map(|(_, node)| node.as_path()).collect();
        let answers = loop_device::statuses(&paths);
        for ((number, node), answer) in asked.into_iter().zip(answers) {
            let shows = match answer {
                Ok(Some(status)) => Shows::Known(status),
                Ok(None) => continue,
                Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                    self.note_silent(number);
                    Shows::Silent
                }
                Err(error) => Shows::Hidden(error.to_string()),
            };
            found.push(Attached { number, node, shows });
        }
        found.sort_by_key(|it| it.number);
        found
    }

    fn sequence(&self, number: DeviceNumber) -> Option<String> {
        fs::read_to_string(self.node(number).join("diskseq")).ok()
    }

    fn is_silent(&self, number: DeviceNumber) -> bool {
        let silent = SILENT.lock().unwrap_or_else(PoisonError::into_inner);
        !silent.is_empty() && silent.contains(&(number, self.sequence(number)))
    }

    fn note_silent(&self, number: DeviceNumber) {
        let key = (number, self.sequence(number));
        SILENT.lock().unwrap_or_else(PoisonError::into_inner).insert(key);
    }
}
