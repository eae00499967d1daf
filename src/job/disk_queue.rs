//! The queue of copiers at the rotating disks of a host: one at a time reads from each disk, so that two copies do not
//! move its heads back and forth between them.
//!
//! A copier that wants to read has a ticket, `/run/tidemark/disks/<id>.json`: a [`record`], whose
//! lock tells whether its process lives. It names the disks, and has a number that is higher than that of every
//! ticket before it. A ticket is at its turn when no ticket with a lower number names one of its disks. So no copier is
//! overtaken, no two copiers wait for each other (each waits only for lower numbers), and one that was killed blocks
//! none: any process that finds a ticket without an owner removes it.
//!
//! Numbers are given under a lock of the directory, which is held for the creation of a ticket only.
//!
//! Not seen: copiers in another mount namespace with its own `/run`, and other programs.

use std::collections::BTreeSet;
use std::fs::{DirBuilder, File};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::paths::RUN_DIR;
use crate::base::{DeviceNumber, Result, ResultExt as _};
use crate::dm::naming::is_id;
use crate::format::state::Record;
use crate::record::{self, FoundRecord, LockedRecord};
use crate::sys::lock::{LockedFile, try_lock};

/// Time between two looks at the queue.
const POLL: Duration = Duration::from_millis(100);

/// Pause while another process gets a number.
const NUMBER_PAUSE: Duration = Duration::from_millis(5);

/// A ticket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ticket {
    /// Its id: that of its job, if it has one.
    pub id: String,
    /// Process id, for display.
    pub process: u32,
    /// Its place: lower numbers come first.
    pub number: u64,
    /// What is copied, for display.
    pub origins: String,
    /// The disks that it reads, or wants to.
    pub disks: BTreeSet<DeviceNumber>,
}

impl Record for Ticket {
    const KIND: &'static str = "disk-ticket";
}

impl Ticket {
    /// The disks that `earlier` keeps this one from.
    fn disks_after<'t>(&'t self, earlier: &'t Self) -> impl Iterator<Item = DeviceNumber> + 't {
        let is_before = earlier.number < self.number && earlier.id != self.id;
        self.disks.intersection(&earlier.disks).copied().filter(move |_| is_before)
    }
}

/// A disk that a copier waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wait {
    /// The disk.
    pub disk: DeviceNumber,
    /// The ticket that comes before.
    pub before: Ticket,
}

/// A place in the queue. Dropping it leaves the queue.
#[derive(Debug)]
pub struct Place {
    /// None once it has left.
    ticket: Option<LockedRecord<Ticket>>,
}

impl Place {
    /// Joins the queue at `disks` as `id`. Does not wait: see [`Place::wait`]. None if there are no such disks.
    ///
    /// # Errors
    /// I/O errors.
    pub fn join(id: &str, origins: &str, disks: &BTreeSet<DeviceNumber>) -> Result<Option<Self>> {
        if disks.is_empty() {
            return Ok(None);
        }
        Self::join_in(&directory(), id, origins, disks).map(Some)
    }

    fn join_in(directory: &Path, id: &str, origins: &str, disks: &BTreeSet<DeviceNumber>) -> Result<Self> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .io_context(|| format!("creating the directory {}", directory.display()))?;
        let _numbers = lock_numbers(directory)?;
        let last = living(directory)?.iter().map(|ticket| ticket.number).max();
        let ticket = Ticket {
            id: id.to_owned(),
            process: std::process::id(),
            number: last.map_or(1, |last| last.saturating_add(1)),
            origins: origins.to_owned(),
            disks: disks.clone(),
        };
        Ok(Self { ticket: Some(LockedRecord::create(directory, id, ticket)?) })
    }

    /// Returns at its turn. Calls `waiting` whenever it waits for another ticket than before.
    ///
    /// # Errors
    /// Those of `interrupt`, which is polled; I/O errors.
    pub fn wait(&self, waiting: &dyn Fn(&Wait), interrupt: &dyn Fn() -> Result<()>) -> Result<()> {
        let Some(record) = &self.ticket else { return Ok(()) };
        let mut said = None;
        loop {
            let others = living(record.directory())?;
            let Some(wait) = waits_of(record.record(), &others).next() else { return Ok(()) };
            if said.as_ref() != Some(&wait.before.id) {
                waiting(&wait);
                said = Some(wait.before.id);
            }
            interrupt()?;
            thread::sleep(POLL);
        }
    }

    /// From now on it reads only from `disks`, if it still needs any.
    ///
    /// # Errors
    /// I/O errors.
    pub fn keep_only(&mut self, disks: &BTreeSet<DeviceNumber>) -> Result<()> {
        let Some(record) = &mut self.ticket else { return Ok(()) };
        let kept: BTreeSet<DeviceNumber> = record.record().disks.intersection(disks).copied().collect();
        if kept == record.record().disks {
            return Ok(());
        }
        record.record_mut().disks = kept;
        record.save()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(Err(error)) = self.ticket.take().map(|record| record.remove(&[])) {
            // Its lock ends with this process.
            tracing::debug!(%error, "the ticket of a copier stays until another one finds it");
        }
    }
}

/// A ticket, and what it waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Queued {
    /// The ticket.
    pub ticket: Ticket,
    /// The disks that it waits for; none at its turn.
    pub waits: Vec<Wait>,
}

/// The queue, in its order.
///
/// # Errors
/// I/O errors.
pub fn queued() -> Result<Vec<Queued>> {
    queued_in(&directory())
}

/// Removes the tickets of dead processes.
///
/// # Errors
/// I/O errors.
pub fn remove_dead() -> Result<()> {
    living(&directory()).map(drop)
}

fn queued_in(directory: &Path) -> Result<Vec<Queued>> {
    let mut tickets = living(directory)?;
    tickets.sort_by_key(|ticket| ticket.number);
    let queued =
        |ticket: &Ticket| Queued { waits: waits_of(ticket, &tickets).collect(), ticket: ticket.clone() };
    Ok(tickets.iter().map(queued).collect())
}

fn waits_of<'t>(ticket: &'t Ticket, others: &'t [Ticket]) -> impl Iterator<Item = Wait> + 't {
    others
        .iter()
        .flat_map(|before| ticket.disks_after(before).map(|disk| Wait { disk, before: before.clone() }))
}

/// The tickets whose processes live. Those of dead ones are removed.
fn living(directory: &Path) -> Result<Vec<Ticket>> {
    let mut tickets = Vec::new();
    for id in record::ids(directory)?.into_iter().filter(|id| is_id(id)) {
        let Some(found): Option<FoundRecord<Ticket>> = record::find(directory, &id)? else { continue };
        match (&found.lock, &found.record) {
            (Some(_), _) => found.remove(&[])?,
            (None, Ok(ticket)) => tickets.push(ticket.clone()),
            // It is being created, so its number is higher than those of all tickets that are complete.
            (None, Err(_)) => {}
        }
    }
    Ok(tickets)
}

/// The lock under which numbers are given; each holds it for a moment.
fn lock_numbers(directory: &Path) -> Result<LockedFile> {
    let mut file = File::open(directory).io_context(|| format!("opening {}", directory.display()))?;
    loop {
        match try_lock(file, directory)? {
            Ok(lock) => return Ok(lock),
            Err(back) => file = back,
        }
        thread::sleep(NUMBER_PAUSE);
    }
}

fn directory() -> PathBuf {
    Path::new(RUN_DIR).join("disks")
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;
    use crate::base::{Error, ErrorKind};
    use crate::dm::naming::new_id;

    fn disks(minors: &[u32]) -> BTreeSet<DeviceNumber> {
        minors.iter().map(|minor| DeviceNumber { major: 8, minor: *minor }).collect()
    }

    fn stop() -> Result<()> {
        Err(Error::new(ErrorKind::Interrupted, "a signal"))
    }

    #[test]
    fn each_waits_for_those_before_it_at_its_disks() {
        let dir = tempfile::tempdir().unwrap();
        let join =
            |name: &str, minors: &[u32]| Place::join_in(dir.path(), &new_id(), name, &disks(minors)).unwrap();
        let (mut first, second, other) =
            (join("first", &[0, 16]), join("second", &[16]), join("other", &[32]));
        let third = join("third", &[16, 32]);
        let said = RefCell::new(Vec::new());
        let waits = |place: &Place| {
            said.borrow_mut().clear();
            let say = |wait: &Wait| said.borrow_mut().push(wait.before.origins.clone());
            let at_its_turn = place.wait(&say, &stop).is_ok();
            (at_its_turn, said.borrow().clone())
        };
        assert_eq!(waits(&first), (true, vec![]));
        assert_eq!(waits(&other), (true, vec![]));
        assert_eq!(waits(&second), (false, vec!["first".to_owned()]));
        let queue = queued_in(dir.path()).unwrap();
        let names: Vec<_> = queue.iter().map(|one| (one.ticket.origins.as_str(), one.waits.len())).collect();
        assert_eq!(names, [("first", 0), ("second", 1), ("other", 0), ("third", 3)]);
        // One that needs a disk no longer lets the next one go on.
        first.keep_only(&disks(&[0])).unwrap();
        assert_eq!(waits(&second), (true, vec![]));
        assert!(!waits(&third).0);
        drop(second);
        drop(other);
        assert_eq!(waits(&third), (true, vec![]));
        drop((first, third));
        assert_eq!(queued_in(dir.path()).unwrap(), []);
        assert_eq!(record::ids(dir.path()).unwrap(), Vec::<String>::new());
    }

    #[test]
    fn a_ticket_without_an_owner_blocks_none() {
        let dir = tempfile::tempdir().unwrap();
        let mut dead = Place::join_in(dir.path(), &new_id(), "dead", &disks(&[0])).unwrap();
        let next = Place::join_in(dir.path(), &new_id(), "next", &disks(&[0])).unwrap();
        assert!(next.wait(&|_| {}, &stop).is_err());
        // As if its process had been killed: the lock is free, and the files stay.
        drop(dead.ticket.take());
        assert_eq!(record::ids(dir.path()).unwrap().len(), 2);
        next.wait(&|_| {}, &stop).unwrap();
        assert_eq!(record::ids(dir.path()).unwrap().len(), 1, "the next one removes it");
    }

    #[test]
    fn numbers_are_given_once() {
        let dir = tempfile::tempdir().unwrap();
        let join = || Place::join_in(dir.path(), &new_id(), "x", &disks(&[0])).unwrap();
        let places: Vec<Place> = thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(join)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let numbers: BTreeSet<u64> =
            places.iter().map(|place| place.ticket.as_ref().unwrap().record().number).collect();
        assert_eq!(numbers.into_iter().collect::<Vec<_>>(), (1..=8).collect::<Vec<_>>());
    }
}
