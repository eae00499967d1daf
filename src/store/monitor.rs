//! Is the snapshot still valid, and is there room ahead of it?
//!
//! A thread asks for the snapshot's status ten times a second, makes the store larger ahead of the
//! rate at which it fills, and remembers why a snapshot was lost. Invariants: a lost snapshot is
//! noticed within a second; nothing here ever makes the origin wait (growing swaps the table of the
//! store alone, for milliseconds); a growth that fails is said once and tried again every second,
//! while the copy goes on with what there is. That room is running out for good is said before it is too
//! late to hold the origin ([`Monitor::is_short`]); whether it is held is not decided here.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::base::{Bytes, ChunkSize, Error, ErrorKind, Result, ResultExt};
use crate::dm::SnapshotStatus;

use super::cow::{CowStore, Grown};
use super::size::{self, FillRate};

/// Between two looks.
pub const POLL: Duration = Duration::from_millis(100);
/// Between two looks while the store is only its RAM head, which fills fastest.
pub const POLL_HEAD: Duration = Duration::from_millis(40);
/// Between two looks while a store that cannot grow has little left.
pub const POLL_SHORT: Duration = Duration::from_millis(10);
/// Between two attempts to grow after one that failed.
const GROWTH_PAUSE: Duration = Duration::from_secs(1);
/// A store that would have been full within this time at its last rate counts as full.
const FULL_DOUBT: Duration = Duration::from_secs(1);
/// No store fills faster than this, bytes per second: what a few NVMe disks write together. What it had
/// left of room may have gone at this rate since the last look.
const FILL_RATE_MAX: u64 = 8 << 30;
/// Exceptions are counted over this long for their number per second.
const COUNT_TIME: Duration = Duration::from_secs(1);
/// Failed looks in a row after which the snapshot counts as lost: within a second.
const STATUS_FAILURES_MAX: u32 = 5;

/// The store at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Fill {
    /// Bytes in use, metadata included.
    pub used_bytes: Bytes,
    /// Bytes the store has, head and tail.
    pub total_bytes: Bytes,
    /// Of those, the RAM head.
    pub ram_bytes: Bytes,
    /// Of those in use, in the RAM head: it is filled first.
    pub used_ram_bytes: Bytes,
    /// Of those in use, on disk.
    pub used_disk_bytes: Bytes,
    /// Exceptions.
    pub exceptions: u64,
    /// New exceptions per second, over about the last second.
    pub exceptions_per_second: u64,
    /// How fast it fills, bytes per second.
    pub fill_bytes_per_second: u64,
}

/// What a monitor tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreEvent {
    /// The fill has changed.
    Fill(Fill),
    /// The store has grown.
    Grown(Grown),
    /// Something a person should worry about; said once.
    Warning(String),
}

/// A store as the monitor needs it.
pub trait Growing: Send + Sync {
    /// See [`CowStore::grow_ahead`].
    ///
    /// # Errors
    /// See there.
    fn grow_ahead(&self, used: Bytes, rate: &FillRate) -> Result<Option<Grown>>;
    /// See [`CowStore::total_bytes`].
    fn total_bytes(&self) -> Bytes;
    /// See [`CowStore::mapped_bytes`].
    fn mapped_bytes(&self) -> Bytes;
    /// See [`CowStore::ram_bytes`].
    fn ram_bytes(&self) -> Bytes;
    /// See [`CowStore::is_at_its_largest`].
    fn is_at_its_largest(&self) -> bool;
    /// See [`CowStore::can_fill_up`].
    fn can_fill_up(&self) -> bool;
    /// See [`CowStore::is_marked_invalid`].
    ///
    /// # Errors
    /// See there.
    fn is_marked_invalid(&self) -> Result<bool>;
    /// Unit of copy-on-write.
    fn chunk(&self) -> ChunkSize;
}

impl Growing for CowStore {
    fn grow_ahead(&self, used: Bytes, rate: &FillRate) -> Result<Option<Grown>> {
        Self::grow_ahead(self, used, rate)
    }
    fn total_bytes(&self) -> Bytes {
        Self::total_bytes(self)
    }
    fn mapped_bytes(&self) -> Bytes {
        Self::mapped_bytes(self)
    }
    fn ram_bytes(&self) -> Bytes {
        Self::ram_bytes(self)
    }
    fn is_at_its_largest(&self) -> bool {
        Self::is_at_its_largest(self)
    }
    fn can_fill_up(&self) -> bool {
        Self::can_fill_up(self)
    }
    fn is_marked_invalid(&self) -> Result<bool> {
        Self::is_marked_invalid(self)
    }
    fn chunk(&self) -> ChunkSize {
        self.plan().chunk
    }
}

/// Why a snapshot was lost.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Lost {
    kind: ErrorKind,
    what: String,
    next: String,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Default)]
struct State {
    stop: bool,
    lost: Option<Lost>,
    fill: Fill,
    short: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change is one assignment.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A running monitor; dropping it stops and joins its thread.
pub struct Monitor {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Monitor {
    /// Starts to watch. `status` asks the kernel about the snapshot; `events` must not block for
    /// long.
    ///
    /// # Errors
    /// Where no thread can be had.
    pub fn start(
        store: Arc<dyn Growing>,
        status: impl Fn() -> Result<SnapshotStatus> + Send + 'static,
        events: impl Fn(StoreEvent) + Send + 'static,
    ) -> Result<Self> {
        let shared = Arc::new(Shared::default());
        let watch = Watch::new(store, Box::new(status), Box::new(events));
        let theirs = Arc::clone(&shared);
        let thread = thread::Builder::new()
            .name("store-monitor".to_owned())
            .spawn(move || run(watch, &theirs))
            .io_context(|| "starting the store's monitor".to_owned())?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Fails once the snapshot is lost. Cheap: for every poll of an interrupt.
    ///
    /// # Errors
    /// [`ErrorKind::StoreInvalid`]; [`ErrorKind::Kernel`] where the kernel does not answer any more.
    pub fn check(&self) -> Result<()> {
        match &self.shared.lock().lost {
            None => Ok(()),
            Some(lost) => Err(Error::new(lost.kind, lost.what.clone())
                .state("the origin is untouched and goes on; this copy is void")
                .next(lost.next.clone())),
        }
    }

    /// The last fill seen.
    #[must_use]
    pub fn fill(&self) -> Fill {
        self.shared.lock().fill
    }

    /// True while the store is about to be full and cannot grow: it is as large as it may be, or its place
    /// has no more space, and what is free would not last [`SHORT_LEAD`](size::SHORT_LEAD) at the measured
    /// rate (see [`size::is_short`]). Writes to the origin that come now may cost the snapshot. Known
    /// within [`POLL_SHORT`] once it is near; of a store that has room again (the tail's filesystem was
    /// cleared) within a second.
    #[must_use]
    pub fn is_short(&self) -> bool {
        self.shared.lock().short
    }

    /// Stops and answers the last fill seen. A lost snapshot that nobody has asked for yet is still
    /// known to [`Monitor::check`] before this.
    pub fn stop(mut self) -> Fill {
        self.join();
        self.fill()
    }

    fn join(&mut self) {
        self.shared.lock().stop = true;
        self.shared.wake.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the store's monitor has panicked");
        }
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        self.join();
    }
}

/// The thread: looks until it is stopped. After a loss there is nothing more to look for.
fn run(mut watch: Watch, shared: &Shared) {
    let begin = Instant::now();
    loop {
        // A panic must not pass for "all is well".
        let look = catch_unwind(AssertUnwindSafe(|| watch.look(begin.elapsed()))).unwrap_or_else(|_| {
            Err(Lost {
                kind: ErrorKind::Kernel,
                what: "the store's monitor failed".to_owned(),
                next: "report this as a bug of Tidemark".to_owned(),
            })
        });
        let poll = watch.poll();
        let short = watch.is_short();
        let mut state = shared.lock();
        state.short = short;
        match look {
            Ok(fill) => state.fill = fill,
            Err(lost) => {
                tracing::info!("the snapshot is lost: {}", lost.what);
                state.lost = Some(lost);
                return;
            }
        }
        let wait = shared
            .wake
            .wait_timeout_while(state, poll, |state| !state.stop)
            .unwrap_or_else(PoisonError::into_inner);
        if wait.0.stop {
            return;
        }
    }
}

/// What is known between two looks.
struct Watch {
    store: Arc<dyn Growing>,
    status: Box<dyn Fn() -> Result<SnapshotStatus> + Send>,
    events: Box<dyn Fn(StoreEvent) + Send>,
    rate: FillRate,
    fill: Fill,
    /// When the kernel last said so.
    filled: Duration,
    /// Exceptions of a while ago, and when.
    counted: Option<(Duration, u64)>,
    status_failures: u32,
    /// The failure that was said, and when the next attempt is due.
    growth_failed: Option<(String, Duration)>,
}

impl Watch {
    fn new(
        store: Arc<dyn Growing>,
        status: Box<dyn Fn() -> Result<SnapshotStatus> + Send>,
        events: Box<dyn Fn(StoreEvent) + Send>,
    ) -> Self {
        Self {
            store,
            status,
            events,
            rate: FillRate::default(),
            fill: Fill::default(),
            filled: Duration::ZERO,
            counted: None,
            status_failures: 0,
            growth_failed: None,
        }
    }

    fn poll(&self) -> Duration {
        let mapped = self.store.mapped_bytes();
        let near = size::is_nearly_short(mapped, self.fill.used_bytes, self.store.chunk(), &self.rate);
        if near && self.may_run_out() {
            return POLL_SHORT;
        }
        let head_alone = mapped < self.store.total_bytes();
        if head_alone { POLL_HEAD } else { POLL }
    }

    /// True for a store that cannot grow and has less than everything that can be written needs.
    fn may_run_out(&self) -> bool {
        let may_grow = self.growth_failed.is_none() && !self.store.is_at_its_largest();
        !may_grow && self.store.can_fill_up()
    }

    fn is_short(&self) -> bool {
        let mapped = self.store.mapped_bytes();
        self.may_run_out() && size::is_short(mapped, self.fill.used_bytes, self.store.chunk(), &self.rate)
    }

    /// Exceptions per second, `now` that there are `exceptions`.
    fn count(&mut self, now: Duration, exceptions: u64) -> u64 {
        let (since, before) = *self.counted.get_or_insert((now, exceptions));
        let passed = now.saturating_sub(since);
        if passed < COUNT_TIME {
            return self.fill.exceptions_per_second;
        }
        self.counted = Some((now, exceptions));
        let per_second = u128::from(exceptions.saturating_sub(before)) * 1000 / passed.as_millis().max(1);
        u64::try_from(per_second).unwrap_or(u64::MAX)
    }

    /// One look, `now` after the first.
    fn look(&mut self, now: Duration) -> Result<Fill, Lost> {
        let status = match (self.status)() {
            Ok(status) => status,
            Err(error) => {
                self.status_failures += 1;
                tracing::debug!("asking for the snapshot's status: {error}");
                if self.status_failures >= STATUS_FAILURES_MAX {
                    return Err(Lost {
                        kind: ErrorKind::Kernel,
                        what: format!("the snapshot's state cannot be known: {error}"),
                        next: "look at the kernel's log (dmesg), then run the copy again".to_owned(),
                    });
                }
                return Ok(self.fill);
            }
        };
        self.status_failures = 0;
        let SnapshotStatus::Active { used, metadata, .. } = status else {
            return Err(self.lost(now, &status));
        };
        let (Some(used), Some(metadata)) = (used.checked_bytes(), metadata.checked_bytes()) else {
            return Err(self.lost(now, &status));
        };
        self.filled = now;
        self.rate.observe(now, used);
        self.grow(now, used);
        let exceptions = used.saturating_sub(metadata).get() / self.store.chunk().bytes().get();
        let ram_bytes = self.store.ram_bytes();
        let fill = Fill {
            used_bytes: used,
            total_bytes: self.store.total_bytes(),
            ram_bytes,
            used_ram_bytes: used.min(ram_bytes),
            used_disk_bytes: used.saturating_sub(ram_bytes),
            exceptions,
            exceptions_per_second: self.count(now, exceptions),
            fill_bytes_per_second: self.rate.per_second(),
        };
        if fill != self.fill {
            self.fill = fill;
            (self.events)(StoreEvent::Fill(fill));
        }
        Ok(fill)
    }

    fn grow(&mut self, now: Duration, used: Bytes) {
        if self.growth_failed.as_ref().is_some_and(|(_, due)| now < *due) {
            return;
        }
        match self.store.grow_ahead(used, &self.rate) {
            Ok(None) => {}
            Ok(Some(grown)) => {
                tracing::debug!("the COW store has grown from {} to {}", grown.from, grown.to);
                self.growth_failed = None;
                (self.events)(StoreEvent::Grown(grown));
            }
            Err(error) => {
                let text = error.to_string();
                if self.growth_failed.is_none() {
                    (self.events)(StoreEvent::Warning(format!(
                        "the COW store cannot grow: {text}; the copy goes on with {}, of which {used} are used",
                        self.store.total_bytes()
                    )));
                }
                self.growth_failed = Some((text, now + GROWTH_PAUSE));
            }
        }
    }

    fn lost(&self, now: Duration, status: &SnapshotStatus) -> Lost {
        let total = self.store.mapped_bytes();
        match status {
            SnapshotStatus::Overflow => self.full(total),
            SnapshotStatus::Invalid => self.invalid(now, total),
            other => Lost {
                kind: ErrorKind::Kernel,
                what: format!("the snapshot is in a state that cannot be used: {other:?}"),
                next: "look at the kernel's log (dmesg), then run the copy again".to_owned(),
            },
        }
    }

    /// Why a snapshot became invalid between the last look and `now`.
    ///
    /// "Overflow" is only said of writes to the snapshot itself; a write to the origin that finds no room
    /// makes the snapshot as invalid as a store that fails does (seen on 6.1 and 6.12). The kernel then marks the store's
    /// header. Where it could not, the store's disk failed. Where it could, how full the store was tells; but a header in
    /// RAM is always marked, and says nothing of the disk behind.
    fn invalid(&self, now: Duration, total: Bytes) -> Lost {
        let next_of_disk = "look at the kernel's log (dmesg) for errors of the store's disk";
        let ram = self.store.ram_bytes();
        let (what, next) = if !self.store.is_marked_invalid().unwrap_or(false) {
            (
                "the COW store failed: the kernel could not write it and has given up the snapshot"
                    .to_owned(),
                format!("{next_of_disk}, then copy again with --store on another one"),
            )
        } else if !self.may_have_filled_up(now, total) {
            (
                "an original could not be preserved: it could not be read from the origin, or not be written to the \
                 COW store; the kernel has given up the snapshot"
                    .to_owned(),
                "look at the kernel's log (dmesg) for the disk that has errors; if it is the store's, copy again with \
                 --store on another one"
                    .to_owned(),
            )
        } else if ram == Bytes::ZERO || total <= ram {
            return self.full(total);
        } else {
            let Lost { what, next, .. } = self.full(total);
            (
                format!("{what} (or its disk failed: its header is in RAM and does not tell)"),
                format!("{next_of_disk}; where there are none, {next}"),
            )
        };
        Lost { kind: ErrorKind::StoreInvalid, what, next }
    }

    /// What was free has gone since the last look at the last rate, or may have in one burst.
    fn may_have_filled_up(&self, now: Duration, total: Bytes) -> bool {
        if !self.store.can_fill_up() {
            return false;
        }
        let free = total.saturating_sub(self.fill.used_bytes);
        let expected = self.rate.over(FULL_DOUBT).max(self.store.chunk().bytes() * 3);
        let since = now.saturating_sub(self.filled);
        let burst = u128::from(FILL_RATE_MAX) * since.as_millis() / 1000;
        free < expected || u128::from(free.get()) <= burst
    }

    fn full(&self, total: Bytes) -> Lost {
        let (why, next) = match &self.growth_failed {
            Some((text, _)) => {
                (format!("it could not grow: {text}"), "copy again with --store where there is more space")
            }
            None if self.store.is_at_its_largest() => (
                "it could not grow: it was as large as it may be".to_owned(),
                "copy again with a larger --store-size, or a larger device for --store",
            ),
            None => (
                format!("it filled faster ({}/s) than it could grow", Bytes(self.rate.per_second())),
                "copy again when there is less writing, or with a block device for --store",
            ),
        };
        Lost {
            kind: ErrorKind::StoreInvalid,
            what: format!("the COW store is full at {total}; {why}"),
            next: next.to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::Sectors;
    use std::sync::mpsc;

    /// A store that grows by 1 MiB when less than that is left, up to a limit.
    struct Fake {
        total: Mutex<Bytes>,
        limit: Bytes,
        fails: bool,
        worst: Bytes,
        ram: Bytes,
        /// What a read of the header says; None where it fails.
        marked: Mutex<Option<bool>>,
    }

    impl Fake {
        fn new(limit: Bytes, fails: bool) -> Arc<Self> {
            Self::for_origin(limit, fails, Bytes::gib(1))
        }

        fn for_origin(limit: Bytes, fails: bool, worst: Bytes) -> Arc<Self> {
            Self::with_ram(limit, fails, worst, Bytes::kib(512))
        }

        fn with_ram(limit: Bytes, fails: bool, worst: Bytes, ram: Bytes) -> Arc<Self> {
            let (total, marked) = (Mutex::new(Bytes::mib(4)), Mutex::new(None));
            Arc::new(Self { total, limit, fails, worst, ram, marked })
        }
    }

    impl Growing for Fake {
        fn grow_ahead(&self, used: Bytes, _rate: &FillRate) -> Result<Option<Grown>> {
            let mut total = self.total.lock().unwrap();
            if total.saturating_sub(used) >= Bytes::mib(1) || *total >= self.limit {
                return Ok(None);
            }
            if self.fails {
                return Err(Error::new(ErrorKind::NoSpace, "no space left"));
            }
            let from = *total;
            *total += Bytes::mib(1);
            Ok(Some(Grown { from, to: *total }))
        }
        fn total_bytes(&self) -> Bytes {
            *self.total.lock().unwrap()
        }
        fn mapped_bytes(&self) -> Bytes {
            self.total_bytes()
        }
        fn ram_bytes(&self) -> Bytes {
            self.ram
        }
        fn is_at_its_largest(&self) -> bool {
            self.total_bytes() >= self.limit
        }
        fn can_fill_up(&self) -> bool {
            self.total_bytes() < self.worst
        }
        fn is_marked_invalid(&self) -> Result<bool> {
            let marked = *self.marked.lock().unwrap();
            marked.ok_or_else(|| Error::new(ErrorKind::Io, "the disk fails"))
        }
        fn chunk(&self) -> ChunkSize {
            ChunkSize::default()
        }
    }

    fn active(used: Bytes) -> SnapshotStatus {
        SnapshotStatus::Active {
            used: Sectors(used.get() / 512),
            total: Sectors(u64::from(u32::MAX)),
            metadata: Sectors(16),
        }
    }

    /// A watch over `statuses`, one per look, and what it says.
    fn watch(store: Arc<Fake>, statuses: Vec<Result<SnapshotStatus>>) -> (Watch, mpsc::Receiver<StoreEvent>) {
        let (events, heard) = mpsc::channel();
        let statuses = Mutex::new(statuses.into_iter());
        let status = move || statuses.lock().unwrap().next().unwrap();
        let say = move |event| events.send(event).unwrap();
        (Watch::new(store, Box::new(status), Box::new(say)), heard)
    }

    fn looks(watch: &mut Watch, count: u64) -> Result<Fill, Lost> {
        let mut last = Ok(Fill::default());
        for look in 0..count {
            last = watch.look(Duration::from_millis(100 * look));
        }
        last
    }

    #[test]
    fn the_store_grows_and_the_fill_is_told() {
        let statuses = vec![Ok(active(Bytes::mib(1))), Ok(active(Bytes::kib(3500)))];
        let (mut watch, heard) = watch(Fake::new(Bytes::mib(9), false), statuses);
        let fill = looks(&mut watch, 2).unwrap();
        assert_eq!(fill.total_bytes, Bytes::mib(5));
        assert_eq!(fill.exceptions, 3500 / 4 - 2);
        let heard: Vec<_> = heard.try_iter().collect();
        assert!(heard.contains(&StoreEvent::Grown(Grown { from: Bytes::mib(4), to: Bytes::mib(5) })));
        assert!(heard.contains(&StoreEvent::Fill(fill)));
    }

    #[test]
    fn a_growth_that_fails_is_said_once_and_named_when_the_store_is_full() {
        let full = Bytes::mib(4) - Bytes::kib(64);
        let mut statuses: Vec<_> = (0..30).map(|_| Ok(active(full))).collect();
        statuses.push(Ok(SnapshotStatus::Overflow));
        let (mut watch, heard) = watch(Fake::new(Bytes::mib(9), true), statuses);
        let lost = looks(&mut watch, 31).unwrap_err();
        assert_eq!(lost.kind, ErrorKind::StoreInvalid);
        assert!(lost.what.contains("no space left"), "{}", lost.what);
        let warnings = heard.try_iter().filter(|event| matches!(event, StoreEvent::Warning(_))).count();
        assert_eq!(warnings, 1);
    }

    #[test]
    fn ram_is_used_before_the_disk_and_exceptions_are_counted_per_second() {
        let statuses = (0..=20).map(|look| Ok(active(Bytes::kib(8 + 40 * look)))).collect();
        let (mut watch, _heard) = watch(Fake::new(Bytes::mib(9), false), statuses);
        let fill = looks(&mut watch, 21).unwrap();
        // Ten every tenth of a second.
        assert_eq!((fill.exceptions, fill.exceptions_per_second), (200, 100));
        assert_eq!((fill.used_ram_bytes, fill.used_disk_bytes), (Bytes::kib(512), Bytes::kib(808 - 512)));
        assert_eq!(fill.used_bytes, fill.used_ram_bytes + fill.used_disk_bytes);
    }

    #[test]
    fn a_store_that_cannot_grow_is_short_before_it_is_full() {
        let (plenty, little) = (Bytes::mib(1), Bytes::mib(4) - Bytes::kib(400));
        let short_after = |store: Arc<Fake>, used: &[Bytes]| {
            let statuses = used.iter().map(|used| Ok(active(*used))).collect();
            let (mut watch, _heard) = watch(store, statuses);
            looks(&mut watch, used.len() as u64).unwrap();
            (watch.is_short(), watch.poll())
        };
        // As large as it may be, or its place full.
        for store in [|| Fake::new(Bytes::mib(4), false), || Fake::new(Bytes::mib(9), true)] {
            assert_eq!(short_after(store(), &[plenty, plenty]), (false, POLL));
            assert_eq!(short_after(store(), &[little]), (true, POLL_SHORT));
        }
        // 10 MiB/s: what is free lasts less than half a second, or one of them, or a minute.
        let largest = || Fake::new(Bytes::mib(4), false);
        assert_eq!(short_after(largest(), &[Bytes::ZERO, Bytes::mib(1)]), (true, POLL_SHORT));
        assert_eq!(short_after(largest(), &[Bytes::ZERO, Bytes::kib(300)]), (false, POLL_SHORT));
        assert_eq!(short_after(largest(), &[Bytes::ZERO, Bytes::kib(4)]), (false, POLL));
        // It grows, or it can hold every chunk of the origin.
        assert_eq!(short_after(Fake::new(Bytes::mib(9), false), &[little]), (false, POLL));
        let whole = Fake::for_origin(Bytes::mib(4), false, Bytes::mib(4));
        assert_eq!(short_after(whole, &[Bytes::ZERO, little]), (false, POLL));
    }

    #[test]
    fn shortness_is_known_to_who_asks_and_ends_when_it_grows() {
        let store = Fake::new(Bytes::mib(4), false);
        let used = Bytes::mib(4) - Bytes::kib(64);
        let monitor =
            Monitor::start(Arc::clone(&store) as Arc<dyn Growing>, move || Ok(active(used)), |_| {}).unwrap();
        let wait_for = |short: bool| {
            let begin = Instant::now();
            while monitor.is_short() != short {
                assert!(begin.elapsed() < Duration::from_secs(5), "not noticed");
                thread::sleep(Duration::from_millis(5));
            }
        };
        wait_for(true);
        *store.total.lock().unwrap() = Bytes::mib(6);
        wait_for(false);
    }

    #[test]
    fn full_and_broken_are_told_apart() {
        let fake = |ram, marked| {
            let store = Fake::with_ram(Bytes::mib(4), false, Bytes::gib(1), ram);
            *store.marked.lock().unwrap() = marked;
            store
        };
        let lost_after = |ram, marked, used, status| {
            let (mut watch, _heard) = watch(fake(ram, marked), vec![Ok(active(used)), Ok(status)]);
            looks(&mut watch, 2).unwrap_err().what
        };
        let full = Bytes::mib(4) - Bytes::kib(4);
        let (ram, none) = (Bytes::kib(512), Bytes::ZERO);
        assert!(lost_after(none, None, full, SnapshotStatus::Overflow).contains("full"));
        let what = lost_after(none, Some(true), full, SnapshotStatus::Invalid);
        assert!(what.contains("full") && !what.contains("or its disk failed"), "{what}");
        // A disk that cannot even be marked has failed, however full it was.
        for marked in [None, Some(false)] {
            assert!(lost_after(none, marked, full, SnapshotStatus::Invalid).contains("could not write"));
        }
        assert!(lost_after(none, None, Bytes::mib(1), SnapshotStatus::Invalid).contains("could not write"));
        // A mark in RAM says nothing of the disk behind, unless there is none.
        let what = lost_after(ram, Some(true), full, SnapshotStatus::Invalid);
        assert!(what.contains("full") && what.contains("or its disk failed"), "{what}");
        let what = lost_after(Bytes::mib(4), Some(true), full, SnapshotStatus::Invalid);
        assert!(!what.contains("or its disk failed"), "{what}");
        // Filling 10 MiB/s with 0.8 MiB left: full before the next look.
        let statuses =
            vec![Ok(active(Bytes::mib(2))), Ok(active(Bytes::kib(3300))), Ok(SnapshotStatus::Invalid)];
        let (mut fast, _heard) = watch(fake(none, Some(true)), statuses);
        assert!(looks(&mut fast, 3).unwrap_err().what.contains("full"));
    }

    #[test]
    fn a_store_that_filled_up_in_one_burst_is_full_where_it_could_still_be_written() {
        let lost_after = |marked, total: Bytes| {
            let store = Fake::for_origin(total, false, Bytes::gib(64));
            *store.total.lock().unwrap() = total;
            *store.marked.lock().unwrap() = marked;
            let (mut watch, _heard) =
                watch(store, vec![Ok(active(Bytes::kib(8))), Ok(SnapshotStatus::Invalid)]);
            looks(&mut watch, 2).unwrap_err().what
        };
        let small = Bytes::mib(6);
        assert!(lost_after(Some(true), small).contains("full"));
        assert!(lost_after(Some(false), small).contains("could not write"));
        assert!(lost_after(None, small).contains("could not write"));
        // One with room for every chunk of the origin is never full.
        let whole = Fake::for_origin(small, false, small);
        *whole.total.lock().unwrap() = small;
        *whole.marked.lock().unwrap() = Some(true);
        let (mut whole, _heard) = watch(whole, vec![Ok(active(Bytes::kib(8))), Ok(SnapshotStatus::Invalid)]);
        assert!(looks(&mut whole, 2).unwrap_err().what.contains("could not be read from the origin"));
        // Nothing writes 2 GiB in a tenth of a second.
        assert!(lost_after(Some(true), Bytes::gib(2)).contains("could not be read from the origin"));
    }

    #[test]
    fn a_kernel_that_does_not_answer_is_borne_for_a_moment() {
        let fail = || Err(Error::new(ErrorKind::Kernel, "no answer"));
        let four: Vec<_> = (0..4).map(|_| fail()).chain([Ok(active(Bytes::mib(1)))]).collect();
        let (mut watch, _heard) = watch(Fake::new(Bytes::mib(4), false), four);
        assert!(looks(&mut watch, 5).is_ok());
        let (mut watch, _heard) =
            super::tests::watch(Fake::new(Bytes::mib(4), false), (0..5).map(|_| fail()).collect());
        assert_eq!(looks(&mut watch, 5).unwrap_err().kind, ErrorKind::Kernel);
    }

    #[test]
    fn a_loss_is_known_within_a_second_and_the_thread_ends() {
        let lost = Arc::new(Mutex::new(false));
        let theirs = Arc::clone(&lost);
        let status =
            move || Ok(if *theirs.lock().unwrap() { SnapshotStatus::Invalid } else { active(Bytes::mib(1)) });
        let monitor = Monitor::start(Fake::new(Bytes::mib(4), false), status, |_| {}).unwrap();
        thread::sleep(POLL);
        monitor.check().unwrap();
        *lost.lock().unwrap() = true;
        let begin = Instant::now();
        while monitor.check().is_ok() {
            assert!(begin.elapsed() < Duration::from_secs(1), "not noticed");
            thread::sleep(Duration::from_millis(5));
        }
        let error = monitor.check().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::StoreInvalid);
        assert!(error.state_left().is_some() && error.next_step().is_some());
        assert_eq!(monitor.stop().used_bytes, Bytes::mib(1));
    }

    #[test]
    fn a_monitor_that_panics_does_not_pass_for_well() {
        let monitor =
            Monitor::start(Fake::new(Bytes::mib(4), false), || panic!("on purpose"), |_| {}).unwrap();
        let begin = Instant::now();
        while monitor.check().is_ok() {
            assert!(begin.elapsed() < Duration::from_secs(5), "not noticed");
            thread::sleep(Duration::from_millis(5));
        }
    }
}
