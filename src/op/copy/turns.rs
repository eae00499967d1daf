//! Which origins are read at the same time: on each rotating disk one after the other, so that its heads stay with one
//! of them. Origins on other disks are read side by side.
//!
//! A copy joins the host's queue at all of its disks ([`disk_queue`](crate::job::disk_queue)) and waits for its turn
//! before its instant: while it waits, nothing is frozen and no write is preserved. Several origins that were captured
//! together take turns among themselves, in the order in which they were given; each disk is left when the last of them
//! on it has ended.

use std::collections::BTreeSet;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::plan::CopyPlan;
use crate::base::{DeviceNumber, Result};
use crate::dm::naming::new_id;
use crate::job::disk_queue::{Place, Wait};
use crate::progress::{Event, Observer};
use crate::sys::privilege;
use crate::topology::Topology;

/// Time between two checks of an origin that waits.
const POLL: Duration = Duration::from_millis(200);

/// The turns of several origins.
pub(super) struct Turns {
    origins: Vec<Waiting>,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// Which of them have ended.
    ended: Vec<bool>,
    /// The place in the host's queue.
    place: Option<Place>,
}

struct Waiting {
    name: String,
    /// The rotating disks beneath it.
    disks: BTreeSet<DeviceNumber>,
}

impl Turns {
    /// Those of the origins of `plans`, in this order; `place` is theirs in the host's queue.
    pub(super) fn of(plans: &[CopyPlan], place: Option<Place>) -> Self {
        let waiting = |plan: &CopyPlan| Waiting { name: plan.origin.name(), disks: disks_of(plan) };
        Self::new(plans.iter().map(waiting).collect(), place)
    }

    fn new(origins: Vec<Waiting>, place: Option<Place>) -> Self {
        let state = Mutex::new(State { ended: vec![false; origins.len()], place });
        Self { origins, state, changed: Condvar::new() }
    }

    /// Returns when the origin at `index` may be read.
    ///
    /// # Errors
    /// Those of `stop`, which is polled.
    pub(super) fn wait(
        &self,
        index: usize,
        observer: &dyn Observer,
        stop: &dyn Fn() -> Result<()>,
    ) -> Result<()> {
        let mut has_said = false;
        loop {
            let state = self.lock();
            let Some(before) = self.blocker(index, &state.ended) else { return Ok(()) };
            let text = format!("waiting: {} is on the same rotating disk and is copied first", before.name);
            let waited = self.changed.wait_timeout(state, POLL).unwrap_or_else(PoisonError::into_inner);
            drop(waited);
            if !std::mem::replace(&mut has_said, true) {
                observer.event(&Event::Note { text });
            }
            stop()?;
        }
    }

    /// When the value is dropped, the origin at `index` is read no more.
    pub(super) fn until_dropped(&self, index: usize) -> Ended<'_> {
        Ended { turns: self, index }
    }

    fn end(&self, index: usize) {
        let mut state = self.lock();
        state.ended[index] = true;
        let left = self.origins.iter().zip(&state.ended).filter(|(_, ended)| !**ended);
        let disks = left.flat_map(|(origin, _)| origin.disks.iter().copied()).collect();
        if let Some(Err(error)) = state.place.as_mut().map(|place| place.keep_only(&disks)) {
            tracing::debug!(%error, "the next copy waits until this one has ended");
        }
        self.changed.notify_all();
    }

    fn blocker(&self, index: usize, ended: &[bool]) -> Option<&Waiting> {
        let own = &self.origins[index].disks;
        let before = self.origins[..index].iter().zip(ended);
        before
            .filter(|(_, ended)| !**ended)
            .map(|(origin, _)| origin)
            .find(|other| !own.is_disjoint(&other.disks))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Each change is one assignment.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
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

/// The rotating disks beneath the origin of `plan`, or beneath the filesystem of a file.
fn disks_of(plan: &CopyPlan) -> BTreeSet<DeviceNumber> {
    use std::os::unix::fs::MetadataExt as _;
    let of_file = || std::fs::metadata(&plan.origin.path).ok().map(|meta| DeviceNumber::from_dev(meta.dev()));
    plan.origin
        .number
        .or_else(of_file)
        .map(|number| Topology::default().rotating_disks(number))
        .unwrap_or_default()
}

/// Joins the host's queue for the origins of `plans`, which `job` copies, and waits for the turn unless the user does
/// not want that. None if no origin is on a rotating disk, or if there is no queue for an ordinary user.
///
/// # Errors
/// Those of `interrupt`, which is polled; I/O errors.
pub(in crate::op) fn enter_queue(
    plans: &[CopyPlan],
    job: Option<&str>,
    observer: &dyn Observer,
    interrupt: &dyn Fn() -> Result<()>,
) -> Result<Option<Place>> {
    let place = join_queue(plans, job)?;
    if let (Some(place), true) = (&place, plans.iter().all(|plan| plan.request.waits_for_disks)) {
        let topology = Topology::default();
        let say = |wait: &Wait| {
            let (disk, ticket) = (topology.name(wait.disk), &wait.before);
            let text = format!(
                "waiting: {} is copied from the rotating disk {disk} (process {}); --no-wait does not wait for it",
                ticket.origins, ticket.process
            );
            observer.event(&Event::Note { text });
        };
        place.wait(&say, interrupt)?;
    }
    Ok(place)
}

/// Joins the host's queue without waiting.
///
/// # Errors
/// I/O errors.
pub(in crate::op) fn join_queue(plans: &[CopyPlan], job: Option<&str>) -> Result<Option<Place>> {
    if !privilege::is_root() {
        return Ok(None);
    }
    let disks = plans.iter().flat_map(disks_of).collect();
    let origins: Vec<String> = plans.iter().map(|plan| plan.origin.path.display().to_string()).collect();
    Place::join(job.unwrap_or(&new_id()), &origins.join(", "), &disks)
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
        let turns = Turns::new(
            vec![origin("a", &[0]), origin("b", &[16]), origin("c", &[0, 16]), origin("d", &[])],
            None,
        );
        let blocker = |index| turns.blocker(index, &turns.lock().ended).map(|origin| origin.name.clone());
        assert_eq!([0, 1, 2, 3].map(blocker), [None, None, Some("a".to_owned()), None]);
        turns.end(0);
        assert_eq!(blocker(2), Some("b".to_owned()));
        turns.end(1);
        assert_eq!(blocker(2), None);
    }

    #[test]
    fn one_that_waits_goes_on_when_the_other_ends_and_stops_when_asked() {
        let turns = Turns::new(vec![origin("a", &[0]), origin("b", &[0])], None);
        let stop = || Err(Error::new(ErrorKind::Interrupted, "a signal"));
        assert_eq!(turns.wait(1, &Silent, &stop).unwrap_err().kind(), ErrorKind::Interrupted);
        thread::scope(|scope| {
            let waits = scope.spawn(|| turns.wait(1, &Silent, &|| Ok(())));
            drop(turns.until_dropped(0));
            waits.join().unwrap().unwrap();
        });
    }
}
