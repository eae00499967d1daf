//! Monitors the snapshot: whether it is still valid, and whether there is enough free space.
//!
//! A thread samples the snapshot's status ten times a second, enlarges the store ahead of the rate at which
//! it fills, and records why a snapshot was lost. Invariants:
//! - A lost snapshot is noticed within a second.
//! - The monitor never makes the origin wait (a growth swaps only the store's table, for milliseconds).
//! - A failed growth is reported once and retried every second, while the copy continues with the space that
//!   there is.
//! - A permanent shortage is reported before it is too late to hold the origin ([`Monitor::is_short`]);
//!   whether to hold it is not decided here.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::base::{Bytes, ChunkSize, Error, ErrorKind, Result, ResultExt};
use crate::dm::SnapshotStatus;
use crate::progress::StoreFill;
use crate::sys::process::join_worker;

use super::cow::{CowStore, Grown};
use super::size::{self, FillRate};

/// Sampling interval.
pub const POLL: Duration = Duration::from_millis(100);
/// Sampling interval while the store is only its RAM head, which fills fastest.
pub const POLL_HEAD: Duration = Duration::from_millis(40);
/// Sampling interval while a store that cannot grow has little space left.
pub const POLL_SHORT: Duration = Duration::from_millis(10);
/// Pause after a failed growth.
const GROWTH_PAUSE: Duration = Duration::from_secs(1);
/// A store that would have been full within this time, at its last rate, counts as full.
const FULL_MARGIN: Duration = Duration::from_secs(1);
/// Highest fill rate, bytes per second: what a few NVMe disks write together. At this rate the free space may
/// have been used up since the last sample.
const FILL_RATE_MAX: u64 = 8 << 30;
/// Exceptions per second are averaged over this time.
const COUNT_TIME: Duration = Duration::from_secs(1);
/// Failed samples in a row after which the snapshot counts as lost: within a second.
const STATUS_FAILURES_MAX: u32 = 5;

/// What a monitor reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreEvent {
    /// The fill has changed.
    Fill(StoreFill),
    /// The store has grown.
    Grown(Grown),
    /// A warning for the user, given once.
    Warning(String),
}

/// The store, as the monitor uses it.
pub trait MonitoredStore: Send + Sync {
    /// As [`CowStore::grow_ahead`].
    ///
    /// # Errors
    /// As there.
    fn grow_ahead(&self, used: Bytes, rate: &FillRate) -> Result<Option<Grown>>;
    /// As [`CowStore::total_bytes`].
    fn total_bytes(&self) -> Bytes;
    /// As [`CowStore::mapped_bytes`].
    fn mapped_bytes(&self) -> Bytes;
    /// As [`CowStore::ram_bytes`].
    fn ram_bytes(&self) -> Bytes;
    /// As [`CowStore::is_at_its_largest`].
    fn is_at_its_largest(&self) -> bool;
    /// As [`CowStore::can_fill_up`].
    fn can_fill_up(&self) -> bool;
    /// As [`CowStore::is_marked_invalid`].
    ///
    /// # Errors
    /// As there.
    fn is_marked_invalid(&self) -> Result<bool>;
    /// Unit of copy-on-write.
    fn chunk(&self) -> ChunkSize;
}

impl MonitoredStore for CowStore {
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
    fill: StoreFill,
    short: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change is one assignment, so the state is never half-written.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A running monitor; dropping it stops and joins its thread.
pub struct Monitor {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Monitor {
    /// Starts the thread. `status` reads the snapshot's status from the kernel; `events` must not block for
    /// long.
    ///
    /// # Errors
    /// If the thread cannot be started.
    pub fn start(
        store: Arc<dyn MonitoredStore>,
        status: impl Fn() -> Result<SnapshotStatus> + Send + 'static,
        events: impl Fn(StoreEvent) + Send + 'static,
    ) -> Result<Self> {
        let shared = Arc::new(Shared::default());
        let sampler = Sampler::new(store, Box::new(status), Box::new(events));
        let thread_shared = Arc::clone(&shared);
        let thread = thread::Builder::new()
            .name("store-monitor".to_owned())
            .spawn(move || run(sampler, &thread_shared))
            .io_context(|| "starting the store's monitor".to_owned())?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Fails once the snapshot is lost. Cheap enough for every poll of an interrupt.
    ///
    /// # Errors
    /// [`ErrorKind::StoreInvalid`]; [`ErrorKind::Kernel`] if the kernel no longer reports a status.
    pub fn check(&self) -> Result<()> {
        match &self.shared.lock().lost {
            None => Ok(()),
            Some(lost) => Err(Error::new(lost.kind, lost.what.clone())
                .state("the origin stays in use and is unaffected; this copy is lost")
                .next(lost.next.clone())),
        }
    }

    /// The fill at the last sample.
    #[must_use]
    pub fn fill(&self) -> StoreFill {
        self.shared.lock().fill
    }

    /// True while the store is about to be full and cannot grow: it has its largest size, or its place has no
    /// space left, and the free space would not last [`SHORT_LEAD`](size::SHORT_LEAD) at the measured rate
    /// (see [`size::is_short`]). A write to the origin may then cost the snapshot. Noticed within
    /// [`POLL_SHORT`] when it is near. The end of a shortage (space on the tail's filesystem was freed) is
    /// noticed within a second.
    #[must_use]
    pub fn is_short(&self) -> bool {
        self.shared.lock().short
    }

    /// Stops the thread and returns the last fill. A lost snapshot must be read with [`Monitor::check`]
    /// before this.
    pub fn stop(mut self) -> StoreFill {
        self.join();
        self.fill()
    }

    fn join(&mut self) {
        self.shared.lock().stop = true;
        self.shared.wake.notify_all();
        join_worker(&mut self.thread, "the store's monitor");
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        self.join();
    }
}

/// The thread: samples until it is stopped or the snapshot is lost.
fn run(mut sampler: Sampler, shared: &Shared) {
    let begin = Instant::now();
    loop {
        // A panic must not pass for success.
        let sample =
            catch_unwind(AssertUnwindSafe(|| sampler.sample(begin.elapsed()))).unwrap_or_else(|_| {
                Err(Lost {
                    kind: ErrorKind::Kernel,
                    what: "the store's monitor failed".to_owned(),
                    next: "report this as a bug of Tidemark".to_owned(),
                })
            });
        let sampling_interval = sampler.sampling_interval();
        let short = sampler.is_short();
        let mut state = shared.lock();
        state.short = short;
        match sample {
            Ok(fill) => state.fill = fill,
            Err(lost) => {
                tracing::info!("the snapshot is lost: {}", lost.what);
                state.lost = Some(lost);
                return;
            }
        }
        let wait = shared
            .wake
            .wait_timeout_while(state, sampling_interval, |state| !state.stop)
            .unwrap_or_else(PoisonError::into_inner);
        if wait.0.stop {
            return;
        }
    }
}

/// The sampler's state between two samples.
struct Sampler {
    store: Arc<dyn MonitoredStore>,
    status: Box<dyn Fn() -> Result<SnapshotStatus> + Send>,
    events: Box<dyn Fn(StoreEvent) + Send>,
    rate: FillRate,
    fill: StoreFill,
    /// Time of the last successful sample.
    filled_at: Duration,
    /// Time and number of exceptions at the start of the present average.
    last_count: Option<(Duration, u64)>,
    status_failures: u32,
    /// The reported failure, and when to retry.
    growth_failed: Option<(String, Duration)>,
}

impl Sampler {
    fn new(
        store: Arc<dyn MonitoredStore>,
        status: Box<dyn Fn() -> Result<SnapshotStatus> + Send>,
        events: Box<dyn Fn(StoreEvent) + Send>,
    ) -> Self {
        Self {
            store,
            status,
            events,
            rate: FillRate::default(),
            fill: StoreFill::default(),
            filled_at: Duration::ZERO,
            last_count: None,
            status_failures: 0,
            growth_failed: None,
        }
    }

    fn sampling_interval(&self) -> Duration {
        let mapped = self.store.mapped_bytes();
        let near = size::is_nearly_short(mapped, self.fill.used_bytes, self.store.chunk(), &self.rate);
        if near && self.may_run_out() {
            return POLL_SHORT;
        }
        let head_alone = mapped < self.store.total_bytes();
        if head_alone { POLL_HEAD } else { POLL }
    }

    /// True if the store cannot grow and is smaller than the worst case.
    fn may_run_out(&self) -> bool {
        let may_grow = self.growth_failed.is_none() && !self.store.is_at_its_largest();
        !may_grow && self.store.can_fill_up()
    }

    fn is_short(&self) -> bool {
        let mapped = self.store.mapped_bytes();
        self.may_run_out() && size::is_short(mapped, self.fill.used_bytes, self.store.chunk(), &self.rate)
    }

    /// Exceptions per second, if there are `exceptions` at `now`.
    fn count(&mut self, now: Duration, exceptions: u64) -> u64 {
        let (since, before) = *self.last_count.get_or_insert((now, exceptions));
        let passed = now.saturating_sub(since);
        if passed < COUNT_TIME {
            return self.fill.exceptions_per_second;
        }
        self.last_count = Some((now, exceptions));
        let per_second = u128::from(exceptions.saturating_sub(before)) * 1000 / passed.as_millis().max(1);
        u64::try_from(per_second).unwrap_or(u64::MAX)
    }

    /// Takes one sample, `now` after the first.
    fn sample(&mut self, now: Duration) -> Result<StoreFill, Lost> {
        let status = match (self.status)() {
            Ok(status) => status,
            Err(error) => {
                self.status_failures += 1;
                tracing::debug!("reading the snapshot's status: {error}");
                if self.status_failures >= STATUS_FAILURES_MAX {
                    return Err(Lost {
                        kind: ErrorKind::Kernel,
                        what: format!("the snapshot's status cannot be read: {error}"),
                        next: "check the kernel's log (dmesg), then copy again".to_owned(),
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
        self.filled_at = now;
        self.rate.observe(now, used);
        self.grow(now, used);
        let exceptions = used.saturating_sub(metadata).get() / self.store.chunk().bytes().get();
        let ram_bytes = self.store.ram_bytes();
        let fill = StoreFill {
            used_bytes: used,
            total_bytes: self.store.total_bytes(),
            ram_bytes,
            ram_used_bytes: used.min(ram_bytes),
            disk_used_bytes: used.saturating_sub(ram_bytes),
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
                        "the COW store cannot grow: {text}; the copy continues with {}, of which {used} are used",
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
                what: format!("the snapshot is in an unusable state: {other:?}"),
                next: "check the kernel's log (dmesg), then copy again".to_owned(),
            },
        }
    }

    /// The reason why the snapshot became invalid between the last sample and `now`.
    ///
    /// The status is "Overflow" only after a write to the snapshot itself. A write to the origin that finds
    /// no space makes the snapshot "Invalid", as a failed store does (seen on 6.1 and 6.12). The kernel then
    /// marks the store's header. If it could not, the store's disk failed. If it could, the last fill
    /// decides; but a header in RAM is always marked, whatever the state of the tail's disk.
    fn invalid(&self, now: Duration, total: Bytes) -> Lost {
        let disk_advice = "check the kernel's log (dmesg) for errors of the store's disk";
        let ram = self.store.ram_bytes();
        let (what, next) = if !self.store.is_marked_invalid().unwrap_or(false) {
            (
                "the COW store failed: the kernel could not write to it and has invalidated the snapshot"
                    .to_owned(),
                format!("{disk_advice}, then copy again with --store on another one"),
            )
        } else if !self.may_have_filled_up(now, total) {
            (
                "an original could not be preserved: it could not be read from the origin, or not be written to the \
                 COW store; the kernel has invalidated the snapshot"
                    .to_owned(),
                "check the kernel's log (dmesg) for the disk that has errors; if it is the store's, copy again with \
                 --store on another one"
                    .to_owned(),
            )
        } else if ram == Bytes::ZERO || total <= ram {
            return self.full(total);
        } else {
            let Lost { what, next, .. } = self.full(total);
            (
                format!("{what} (or its disk failed, which the header in RAM does not show)"),
                format!("{disk_advice}; if there are none, {next}"),
            )
        };
        Lost { kind: ErrorKind::StoreInvalid, what, next }
    }

    /// True if the free space would have been used up since the last sample at the last rate, or may have
    /// been in one burst.
    fn may_have_filled_up(&self, now: Duration, total: Bytes) -> bool {
        if !self.store.can_fill_up() {
            return false;
        }
        let free = total.saturating_sub(self.fill.used_bytes);
        let expected = self.rate.over(FULL_MARGIN).max(self.store.chunk().bytes() * 3);
        let since = now.saturating_sub(self.filled_at);
        let burst = u128::from(FILL_RATE_MAX) * since.as_millis() / 1000;
        free < expected || u128::from(free.get()) <= burst
    }

    fn full(&self, total: Bytes) -> Lost {
        let (why, next) = match &self.growth_failed {
            Some((text, _)) => {
                (format!("it could not grow: {text}"), "copy again with --store where there is more space")
            }
            None if self.store.is_at_its_largest() => (
                "it could not grow: it had its largest size already".to_owned(),
                "copy again with a larger --store-size, or a larger device for --store",
            ),
            None => (
                format!("it filled faster ({}/s) than it could grow", Bytes(self.rate.per_second())),
                "copy again when there are fewer writes, or with a block device for --store",
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

    /// A store that grows by 1 MiB when less than that is free, up to a limit.
    struct Fake {
        total: Mutex<Bytes>,
        limit: Bytes,
        fails: bool,
        worst: Bytes,
        ram: Bytes,
        /// What reading the header reports; None makes the read fail.
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

    impl MonitoredStore for Fake {
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

    /// A sampler over `statuses`, one per sample, and the events that it sends.
    fn sampler(
        store: Arc<Fake>,
        statuses: Vec<Result<SnapshotStatus>>,
    ) -> (Sampler, mpsc::Receiver<StoreEvent>) {
        let (events, received) = mpsc::channel();
        let statuses = Mutex::new(statuses.into_iter());
        let status = move || statuses.lock().unwrap().next().unwrap();
        let say = move |event| events.send(event).unwrap();
        (Sampler::new(store, Box::new(status), Box::new(say)), received)
    }

    fn samples(sampler: &mut Sampler, count: u64) -> Result<StoreFill, Lost> {
        let mut last = Ok(StoreFill::default());
        for sample in 0..count {
            last = sampler.sample(Duration::from_millis(100 * sample));
        }
        last
    }

    #[test]
    fn the_store_grows_and_the_fill_is_reported() {
        let statuses = vec![Ok(active(Bytes::mib(1))), Ok(active(Bytes::kib(3500)))];
        let (mut sampler, received) = sampler(Fake::new(Bytes::mib(9), false), statuses);
        let fill = samples(&mut sampler, 2).unwrap();
        assert_eq!(fill.total_bytes, Bytes::mib(5));
        assert_eq!(fill.exceptions, 3500 / 4 - 2);
        let received: Vec<_> = received.try_iter().collect();
        assert!(received.contains(&StoreEvent::Grown(Grown { from: Bytes::mib(4), to: Bytes::mib(5) })));
        assert!(received.contains(&StoreEvent::Fill(fill)));
    }

    #[test]
    fn a_failed_growth_is_reported_once_and_named_when_the_store_is_full() {
        let full = Bytes::mib(4) - Bytes::kib(64);
        let mut statuses: Vec<_> = (0..30).map(|_| Ok(active(full))).collect();
        statuses.push(Ok(SnapshotStatus::Overflow));
        let (mut sampler, received) = sampler(Fake::new(Bytes::mib(9), true), statuses);
        let lost = samples(&mut sampler, 31).unwrap_err();
        assert_eq!(lost.kind, ErrorKind::StoreInvalid);
        assert!(lost.what.contains("no space left"), "{}", lost.what);
        let warnings = received.try_iter().filter(|event| matches!(event, StoreEvent::Warning(_))).count();
        assert_eq!(warnings, 1);
    }

    #[test]
    fn ram_is_used_before_the_disk_and_exceptions_are_counted_per_second() {
        let statuses = (0..=20).map(|sample| Ok(active(Bytes::kib(8 + 40 * sample)))).collect();
        let (mut sampler, _heard) = sampler(Fake::new(Bytes::mib(9), false), statuses);
        let fill = samples(&mut sampler, 21).unwrap();
        // Ten exceptions per tenth of a second.
        assert_eq!((fill.exceptions, fill.exceptions_per_second), (200, 100));
        assert_eq!((fill.ram_used_bytes, fill.disk_used_bytes), (Bytes::kib(512), Bytes::kib(808 - 512)));
        assert_eq!(fill.used_bytes, fill.ram_used_bytes + fill.disk_used_bytes);
    }

    #[test]
    fn a_store_that_cannot_grow_is_short_before_it_is_full() {
        let (plenty, little) = (Bytes::mib(1), Bytes::mib(4) - Bytes::kib(400));
        let short_after = |store: Arc<Fake>, used: &[Bytes]| {
            let statuses = used.iter().map(|used| Ok(active(*used))).collect();
            let (mut sampler, _heard) = sampler(store, statuses);
            samples(&mut sampler, used.len() as u64).unwrap();
            (sampler.is_short(), sampler.sampling_interval())
        };
        // As large as it may be, or its place is full.
        for store in [|| Fake::new(Bytes::mib(4), false), || Fake::new(Bytes::mib(9), true)] {
            assert_eq!(short_after(store(), &[plenty, plenty]), (false, POLL));
            assert_eq!(short_after(store(), &[little]), (true, POLL_SHORT));
        }
        // At 10 MiB/s the free space lasts less than half a second; then for one in between; then for a
        // minute.
        let largest = || Fake::new(Bytes::mib(4), false);
        assert_eq!(short_after(largest(), &[Bytes::ZERO, Bytes::mib(1)]), (true, POLL_SHORT));
        assert_eq!(short_after(largest(), &[Bytes::ZERO, Bytes::kib(300)]), (false, POLL_SHORT));
        assert_eq!(short_after(largest(), &[Bytes::ZERO, Bytes::kib(4)]), (false, POLL));
        // It can grow, or it can hold every chunk of the origin.
        assert_eq!(short_after(Fake::new(Bytes::mib(9), false), &[little]), (false, POLL));
        let whole = Fake::for_origin(Bytes::mib(4), false, Bytes::mib(4));
        assert_eq!(short_after(whole, &[Bytes::ZERO, little]), (false, POLL));
    }

    #[test]
    fn is_short_is_reported_and_ends_when_the_store_grows() {
        let store = Fake::new(Bytes::mib(4), false);
        let used = Bytes::mib(4) - Bytes::kib(64);
        let monitor =
            Monitor::start(Arc::clone(&store) as Arc<dyn MonitoredStore>, move || Ok(active(used)), |_| {})
                .unwrap();
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
    fn a_full_store_is_distinguished_from_a_failed_one() {
        let fake = |ram, marked| {
            let store = Fake::with_ram(Bytes::mib(4), false, Bytes::gib(1), ram);
            *store.marked.lock().unwrap() = marked;
            store
        };
        let lost_after = |ram, marked, used, status| {
            let (mut sampler, _heard) = sampler(fake(ram, marked), vec![Ok(active(used)), Ok(status)]);
            samples(&mut sampler, 2).unwrap_err().what
        };
        let full = Bytes::mib(4) - Bytes::kib(4);
        let (ram, none) = (Bytes::kib(512), Bytes::ZERO);
        assert!(lost_after(none, None, full, SnapshotStatus::Overflow).contains("full"));
        let what = lost_after(none, Some(true), full, SnapshotStatus::Invalid);
        assert!(what.contains("full") && !what.contains("or its disk failed"), "{what}");
        // If not even the mark could be written, the disk has failed, however full the store was.
        for marked in [None, Some(false)] {
            assert!(lost_after(none, marked, full, SnapshotStatus::Invalid).contains("could not write"));
        }
        assert!(lost_after(none, None, Bytes::mib(1), SnapshotStatus::Invalid).contains("could not write"));
        // A mark in RAM shows nothing about the tail's disk, unless there is no tail.
        let what = lost_after(ram, Some(true), full, SnapshotStatus::Invalid);
        assert!(what.contains("full") && what.contains("or its disk failed"), "{what}");
        let what = lost_after(Bytes::mib(4), Some(true), full, SnapshotStatus::Invalid);
        assert!(!what.contains("or its disk failed"), "{what}");
        // Fills at 10 MiB/s with 0.8 MiB left: full before the next sample.
        let statuses =
            vec![Ok(active(Bytes::mib(2))), Ok(active(Bytes::kib(3300))), Ok(SnapshotStatus::Invalid)];
        let (mut fast, _heard) = sampler(fake(none, Some(true)), statuses);
        assert!(samples(&mut fast, 3).unwrap_err().what.contains("full"));
    }

    #[test]
    fn a_store_filled_by_one_burst_counts_as_full_if_its_header_is_marked() {
        let lost_after = |marked, total: Bytes| {
            let store = Fake::for_origin(total, false, Bytes::gib(64));
            *store.total.lock().unwrap() = total;
            *store.marked.lock().unwrap() = marked;
            let (mut sampler, _heard) =
                sampler(store, vec![Ok(active(Bytes::kib(8))), Ok(SnapshotStatus::Invalid)]);
            samples(&mut sampler, 2).unwrap_err().what
        };
        let small = Bytes::mib(6);
        assert!(lost_after(Some(true), small).contains("full"));
        assert!(lost_after(Some(false), small).contains("could not write"));
        assert!(lost_after(None, small).contains("could not write"));
        // A store with room for every chunk of the origin is never full.
        let whole = Fake::for_origin(small, false, small);
        *whole.total.lock().unwrap() = small;
        *whole.marked.lock().unwrap() = Some(true);
        let (mut whole, _heard) =
            sampler(whole, vec![Ok(active(Bytes::kib(8))), Ok(SnapshotStatus::Invalid)]);
        assert!(samples(&mut whole, 2).unwrap_err().what.contains("could not be read from the origin"));
        // Nothing writes 2 GiB in a tenth of a second.
        assert!(lost_after(Some(true), Bytes::gib(2)).contains("could not be read from the origin"));
    }

    #[test]
    fn a_few_failed_status_calls_are_tolerated() {
        let fail = || Err(Error::new(ErrorKind::Kernel, "no answer"));
        let four: Vec<_> = (0..4).map(|_| fail()).chain([Ok(active(Bytes::mib(1)))]).collect();
        let (mut sampler, _heard) = sampler(Fake::new(Bytes::mib(4), false), four);
        assert!(samples(&mut sampler, 5).is_ok());
        let (mut sampler, _heard) =
            super::tests::sampler(Fake::new(Bytes::mib(4), false), (0..5).map(|_| fail()).collect());
        assert_eq!(samples(&mut sampler, 5).unwrap_err().kind, ErrorKind::Kernel);
    }

    #[test]
    fn a_loss_is_noticed_within_a_second_and_the_thread_ends() {
        let lost = Arc::new(Mutex::new(false));
        let thread_shared = Arc::clone(&lost);
        let status = move || {
            Ok(if *thread_shared.lock().unwrap() { SnapshotStatus::Invalid } else { active(Bytes::mib(1)) })
        };
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
    fn a_monitor_that_panics_reports_an_error() {
        let monitor =
            Monitor::start(Fake::new(Bytes::mib(4), false), || panic!("on purpose"), |_| {}).unwrap();
        let begin = Instant::now();
        while monitor.check().is_ok() {
            assert!(begin.elapsed() < Duration::from_secs(5), "not noticed");
            thread::sleep(Duration::from_millis(5));
        }
    }
}
