//! Which of several origins that were captured together are read at the same time: on each rotating disk one after the
//! other, in the order in which they were given, so that its heads stay with one of them. Others are read side by side.

use std::collections::BTreeSet;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::plan::CopyPlan;
use crate::base::{DeviceNumber, Result};
use crate::progress::{Event, Observer};
use crate::topology::Topology;

/// Time between two checks of an origin that waits.
const POLL: Duration = Duration::from_millis(200);

/// The turns of several origins.
pub(super) struct Turns {
    origins: Vec<Waiting>,
    /// Which of them have ended.
    ended: Mutex<Vec<bool>>,
    changed: Condvar,
}

struct Waiting {
    name: String,
    /// The rotating disks beneath it.
    disks: BTreeSet<DeviceNumber>,
}

impl Turns {
    /// Those of the origins of `plans`, in this order.
    pub(super) fn of(plans: &[CopyPlan], topology: &Topology) -> Self {
        let waiting = |plan: &CopyPlan| Waiting { name: plan.origin.name(), disks: disks_of(plan, topology) };
        Self::new(plans.iter().map(waiting).collect())
    }

    fn new(origins: Vec<Waiting>) -> Self {
        let ended = Mutex::new(vec![false; origins.len()]);
        Self { origins, ended, changed: Condvar::new() }
    }

    /// Returns when the origin at `index` may be read.
    ///
    /// # Errors
    /// Those of `stop`, which is polled.
    pub(super) fn wait(&self, index: usize, observer: &dyn Observer, stop: &dyn Fn() -> Result<()>) -> Result<()> {
        let mut has_said = false;
        let mut ended = self.lock();
        while let Some(before) = self.blocker(index, &ended) {
            if !has_said {
                has_said = true;
                let text = format!("waiting: {} is on the same rotating disk and is copied first", before.name);
                drop(ended);
                observer.event(&Event::Note { text });
                ended = self.lock();
                continue;
            }
            ended = self.changed.wait_timeout(ended, POLL).unwrap_or_else(PoisonError::into_inner).0;
            drop(ended);
            stop()?;
            ended = self.lock();
        }
        Ok(())
    }

    /// When the value is dropped, the origin at `index` is read no more.
    pub(super) fn until_dropped(&self, index: usize) -> Ended<'_> {
        Ended { turns: self, index }
    }

    fn end(&self, index: usize) {
        self.lock()[index] = true;
        self.changed.notify_all();
    }

    fn blocker(&self, index: usize, ended: &[bool]) -> Option<&Waiting> {
        let own = &self.origins[index].disks;
        let before = self.origins[..index].iter().zip(ended);
        before.filter(|(_, ended)| !**ended).map(|(origin, _)| origin).find(|other| !own.is_disjoint(&other.disks))
    }

    fn lock(&self) -> MutexGuard<'_, Vec<bool>> {
        // Each change is one assignment.
        self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See [`Turns::until_dropped`].
pub(super) struct Ended<'a> {
    turns: &'a Turns,
    index: usize,
}

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.turns.end(self.index);
    }
}

/// The rotating disks beneath the origin of `plan`.
pub(super) fn disks_of(plan: &CopyPlan, topology: &Topology) -> BTreeSet<DeviceNumber> {
    plan.origin.number.map(|number| topology.rotating_disks(number)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;
    use crate::base::{Error, ErrorKind};
    use crate::progress::Silent;

    fn origin(name: &str, disks: &[u32]) -> Waiting {
        let disks = disks.iter().map(|minor| DeviceNumber { major: 8, minor: *minor }).collect();
        Waiting { name: name.to_owned(), disks }
    }

    #[test]
    fn those_on_one_rotating_disk_take_turns_in_order() {
        let turns = Turns::new(vec![origin("a", &[0]), origin("b", &[16]), origin("c", &[0, 16]), origin("d", &[])]);
        let blocker = |index| turns.blocker(index, &turns.lock()).map(|origin| origin.name.clone());
        assert_eq!([0, 1, 2, 3].map(blocker), [None, None, Some("a".to_owned()), None]);
        turns.end(0);
        assert_eq!(blocker(2), Some("b".to_owned()));
        turns.end(1);
        assert_eq!(blocker(2), None);
    }

    #[test]
    fn one_that_waits_goes_on_when_the_other_ends_and_stops_when_asked() {
        let turns = Turns::new(vec![origin("a", &[0]), origin("b", &[0])]);
        let stop = || Err(Error::new(ErrorKind::Interrupted, "a signal"));
        assert_eq!(turns.wait(1, &Silent, &stop).unwrap_err().kind(), ErrorKind::Interrupted);
        thread::scope(|scope| {
            let waits = scope.spawn(|| turns.wait(1, &Silent, &|| Ok(())));
            drop(turns.until_dropped(0));
            waits.join().unwrap().unwrap();
        });
    }
}
