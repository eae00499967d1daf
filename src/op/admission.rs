//! Checks that no part of a copy can make its origin wait for itself, and holds a lock while the answer must not
//! change.
//!
//! From the instant on, a write to the origin waits for the store. So the store must not wait for the origin, through
//! any chain of devices ([`WaitGraph`]), nor for a device that cannot be looked through, nor for another machine. The
//! same holds for the secondary, which makes writers wait with `--on-full hold`, and for the job's records.
//!
//! Two copies that begin at once, each with its store on the other's filesystem, would each find that the other origin
//! is not being copied. So there is one lock per host, held from before the store is placed until the stack is in place
//! and visible in the kernel's tables. It is on the inode of device-mapper's control device, which is the same in every
//! mount namespace whose /dev is the devtmpfs. A container with its own device nodes has another inode.
//!
//! Not detected: later changes of mounts, loop devices, tables and swap space by other tools, after the instant.

use std::fs::File;
use std::path::Path;
use std::thread;
use std::time::Duration;

use crate::sys::lock::{LockedFile, try_lock};

use super::request::{CopyRequest, OnFull};
use super::snapshot::group::SET_DIR;
use crate::base::clock::Stopwatch;
use crate::base::{DeviceNumber, Error, Result, ResultExt as _, directory_of};
use crate::dm::{CONTROL_PATH, Dm};
use crate::job::RUN_DIR;
use crate::secondary::SecondaryTarget;
use crate::store::{CowStore, TailPlace};
use crate::topology::graph::{Answer, Node};
use crate::volume::waits::{WaitGraph, refusal};

/// Maximum wait for other copies: each takes seconds, or as long as its freeze budget allows.
const PATIENCE: Duration = Duration::from_secs(600);

/// The message while a copy has to wait.
pub const WAITING_FOR_OTHERS: &str = "waiting: another copy is about to take its instant";

/// Interval between two attempts.
const PAUSE: Duration = Duration::from_millis(20);

/// The advice for a wrong place of the store.
const NAME_ANOTHER: &str = "with --store, name a block device or a directory on another disk of this \
                            machine; its dependencies are known if it is on SCSI, SATA, USB, NVMe, virtio, \
                            Xen or MMC disks, also through LVM and md";

/// The advice if memory may wait for the origin.
const WITHOUT_MEMORY: &str = "disable the swap space for the copy (swapoff), or name a block device other \
                              than a loop device with --store, and omit --store-ram";

/// While this exists, no other copy on this host can place its store.
#[derive(Debug)]
pub struct Admission {
    _lock: LockedFile,
}

impl Admission {
    /// Waits for its turn. Calls `waiting` once if it has to wait.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) after ten minutes; `interrupt`'s; I/O errors.
    pub fn enter(waiting: &dyn Fn(), interrupt: &dyn Fn() -> Result<()>) -> Result<Self> {
        Self::enter_by(Path::new(CONTROL_PATH), waiting, interrupt)
    }

    fn enter_by(path: &Path, waiting: &dyn Fn(), interrupt: &dyn Fn() -> Result<()>) -> Result<Self> {
        let what = || format!("locking {}", path.display());
        let mut file = File::open(path).io_context(what)?;
        let watch = Stopwatch::start();
        let mut has_said = false;
        loop {
            match try_lock(file, path)? {
                Ok(lock) => return Ok(Self { _lock: lock }),
                Err(back) => file = back,
            }
            if !has_said {
                waiting();
                has_said = true;
            }
            interrupt()?;
            if watch.elapsed() >= PATIENCE {
                return Err(Error::refused(format!(
                    "another copy was about to take its instant, and has not done so for {} minutes",
                    PATIENCE.as_secs() / 60
                ))
                .state("nothing was changed")
                .next("'tidemark status' shows it"));
            }
            thread::sleep(PAUSE);
        }
    }
}

/// The devices that may wait for each other, and the origin that is copied.
#[derive(Debug)]
pub struct Question {
    graph: WaitGraph,
    origin: DeviceNumber,
}

impl Question {
    /// Examines the current state of the machine.
    ///
    /// # Errors
    /// I/O errors; errors of the kernel.
    pub fn of(dm: &Dm, origin: DeviceNumber) -> Result<Self> {
        Ok(Self { graph: WaitGraph::observe(dm)?, origin })
    }

    /// Refuses a place for the store's tail that may wait for the origin.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) with the chain of devices; I/O errors.
    pub fn check_place(&self, place: &TailPlace) -> Result<()> {
        let what = format!("the store at {}", place.path().display());
        match place {
            TailPlace::Device { number, .. } => self.check_store_on(&Node::Device(*number), &what),
            TailPlace::Directory(_) | TailPlace::NewFile(_) => {
                self.check_store_on(&self.graph.at(&place.anchor())?, &what)?;
                // A loop device will be put on its file, and needs memory.
                self.check_memory(&Node::Memory, &what)
            }
        }
    }

    /// The reason against a part of the store in memory; None if there is none.
    #[must_use]
    pub fn objection_to_memory(&self) -> Option<Error> {
        self.check_memory(&Node::Memory, "a store in memory").err()
    }

    /// Like [`Question::check_place`], for the devices of an existing store, and for its place if it may grow.
    ///
    /// # Errors
    /// As [`Question::check_place`].
    fn check_store(&self, store: &CowStore) -> Result<()> {
        let what = format!("the store at {}", store.plan().place.path().display());
        store
            .devices()
            .into_iter()
            .try_for_each(|device| self.check_store_on(&Node::Device(device), &what))?;
        if store.is_at_its_largest() { Ok(()) } else { self.check_place(&store.plan().place) }
    }

    /// Makes all checks for a copy whose store exists: neither the store, the records nor the secondary may wait for
    /// the origin.
    ///
    /// # Errors
    /// As [`Question::check_place`].
    pub fn check_copy(&self, store: &CowStore, request: &CopyRequest) -> Result<()> {
        self.check_store(store)?;
        self.check_records()?;
        match &request.secondary {
            SecondaryTarget::Path(path) => self.check_secondary(path, request.on_full),
            SecondaryTarget::Pipe => Ok(()),
        }
    }

    /// Refuses records of snapshots that are on the volume itself: they are needed before it is attached.
    ///
    /// # Errors
    /// As [`Question::check_place`].
    pub fn check_snapshot_records(&self) -> Result<()> {
        let place = TailPlace::Directory(SET_DIR.into()).anchor();
        let answer = self.graph.may_wait(&self.graph.at(&place)?, self.origin, &[Node::Memory]);
        match answer {
            Answer::Yes(_) => refusal(&self.graph, SET_DIR, &answer, true).map_or(Ok(()), |error| {
                Err(error.next(
                    "snapshots of a volume that holds /var/lib/tidemark cannot be put together at boot",
                ))
            }),
            _ => Ok(()),
        }
    }

    fn check_store_on(&self, node: &Node, what: &str) -> Result<()> {
        let answer = self.graph.may_wait(node, self.origin, &[Node::Memory]);
        match refusal(&self.graph, what, &answer, false) {
            Some(error) => Err(error.next(NAME_ANOTHER)),
            None => self.check_memory(node, what),
        }
    }

    /// Refuses if `from` needs memory that may have to be swapped out to the origin first.
    fn check_memory(&self, from: &Node, what: &str) -> Result<()> {
        let answer = self.graph.may_wait(from, self.origin, &[]);
        refusal(&self.graph, what, &answer, true).map_or(Ok(()), |error| Err(error.next(WITHOUT_MEMORY)))
    }

    /// Refuses a secondary that may wait for the origin. If writers are held for it, refuses also one whose devices
    /// cannot be determined; otherwise no writer waits for the secondary. `path` need not exist.
    ///
    /// # Errors
    /// As [`Question::check_place`].
    pub fn check_secondary(&self, path: &Path, on_full: OnFull) -> Result<()> {
        let node = match self.graph.at(path) {
            Ok(device @ Node::Device(_)) => device,
            _ => self.graph.at(directory_of(path))?,
        };
        let answer = self.graph.may_wait(&node, self.origin, &[Node::Memory]);
        match refusal(&self.graph, &format!("the secondary {}", path.display()), &answer, true) {
            _ if on_full == OnFull::Abort && matches!(answer, Answer::Unknown(_)) => Ok(()),
            None => Ok(()),
            Some(error) if matches!(answer, Answer::Unknown(_)) => Err(error.next(
                "omit --on-full hold, or choose a secondary whose dependencies are known, or - for standard \
                 output",
            )),
            Some(error) => {
                Err(error.next("choose a secondary on another disk or filesystem, or - for standard output"))
            }
        }
    }

    /// Refuses job records that may wait for the origin.
    ///
    /// # Errors
    /// As [`Question::check_place`].
    fn check_records(&self) -> Result<()> {
        let answer = self.graph.may_wait(&self.graph.at(Path::new(RUN_DIR))?, self.origin, &[Node::Memory]);
        match answer {
            Answer::Yes(_) => refusal(&self.graph, RUN_DIR, &answer, true)
                .map_or(Ok(()), |error| Err(error.next("mount a tmpfs on /run, as every distribution does"))),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::base::ErrorKind;

    #[test]
    fn one_after_the_other_and_a_signal_ends_the_wait() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let enter = |interrupt: &dyn Fn() -> Result<()>, said: &Cell<u32>| {
            Admission::enter_by(file.path(), &|| said.set(said.get() + 1), interrupt)
        };
        let said = Cell::new(0);
        let first = enter(&|| Ok(()), &said).unwrap();
        let asked = Cell::new(0);
        let interrupt = || {
            asked.set(asked.get() + 1);
            if asked.get() < 3 { Ok(()) } else { Err(Error::new(ErrorKind::Interrupted, "a signal")) }
        };
        enter(&interrupt, &said).unwrap_err();
        assert_eq!((said.get(), asked.get()), (1, 3));
        drop(first);
        enter(&|| Ok(()), &said).unwrap();
    }
}
