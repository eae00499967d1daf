//! `tidemark monitor`: enlarges the stores of kept snapshots before they fill, and warns.
//!
//! It looks at every snapshot that receives, which is the newest of each volume, and after a crash for a moment the one
//! before it too: whenever device-mapper reports an event, and as often as the store's fill rate requires. Invariants:
//! - writers never wait for it: an enlargement replaces the table of a store, for milliseconds;
//! - it takes no lock for an enlargement, since a deletion may hold the lock for as long as it copies originals up. A
//!   store that is removed meanwhile fails to be enlarged, and nothing else happens;
//! - a warning is given once, until its cause is gone;
//! - it deletes nothing unless it was told to, and then only the oldest snapshot of the volume whose store would
//!   fill, if that frees space where it is needed;
//! - hooks and deletions run in threads of their own, and delay no enlargement.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{DirBuilder, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::delete;
use super::set::{SnapshotSet, read_all};
use super::settle::settle_if_idle;
use super::{layers, link, merge};
use crate::base::clock::Stopwatch;
use crate::base::{Bytes, Error, ErrorKind, Result, ResultExt as _};
use crate::dm::{Dm, Slot, SnapshotStatus, node};
use crate::format::state::{SnapshotRecord, SnapshotSetRecord, SnapshotState};
use crate::job::RUN_DIR;
use crate::stack::hooks::{Deadline, Hook};
use crate::store::size::{self, FillRate};
use crate::sys::lock::{LockedFile, try_lock, try_lock_shared};
use crate::sys::privilege::require_root;

/// Longest interval between two looks.
const POLL_MAX: Duration = Duration::from_millis(200);

/// Shortest interval.
const POLL_MIN: Duration = Duration::from_millis(20);

/// The interval is the time in which the free space would be used up, divided by this.
const POLL_SHARE: u64 = 8;

/// Pause after a failed enlargement.
const RETRY: Duration = Duration::from_secs(1);

/// A store that cannot be enlarged is nearly full from this share of its size on, in per cent.
const NEARLY_FULL_PERCENT: u64 = 80;

/// Interval between two looks at the mounts of a volume.
const MOUNTS_PAUSE: Duration = Duration::from_secs(2);

/// Longest time for a hook.
const HOOK_MAX: Duration = Duration::from_secs(30);

/// The arguments of `tidemark monitor`.
#[derive(Clone, Debug)]
pub struct MonitorRequest {
    /// Delete the oldest snapshot of a volume if the store of its newest would fill otherwise.
    pub auto_delete: bool,
    /// Runs with `sh -c` for each warning.
    pub hook: Option<String>,
}

/// Something to be reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Cause {
    Grown,
    NearlyFull,
    Lost,
    Deleted,
}

impl Cause {
    fn word(self) -> &'static str {
        match self {
            Self::Grown => "grown",
            Self::NearlyFull => "nearly-full",
            Self::Lost => "lost",
            Self::Deleted => "deleted",
        }
    }
}

/// What is remembered of a snapshot.
#[derive(Default)]
struct Watched {
    rate: FillRate,
    warned: BTreeSet<Cause>,
    retry_at: Option<Instant>,
}

struct Monitor<'a> {
    dm: Dm,
    request: &'a MonitorRequest,
    notice: &'a dyn Fn(&str),
    clock: Stopwatch,
    watched: BTreeMap<String, Watched>,
    /// When to look at the mounts of each set again.
    mounts_at: BTreeMap<String, Instant>,
    /// A deletion in progress: the snapshot's name, and its result.
    deletion: Option<(String, JoinHandle<Result<()>>)>,
}

/// Monitors until `interrupt` returns an error, which is no failure of the monitor. `notice` reports a line.
///
/// # Errors
/// [`ErrorKind::Refused`] if another monitor runs; the kernel's.
pub fn run(
    request: &MonitorRequest,
    interrupt: &dyn Fn() -> Result<()>,
    notice: &dyn Fn(&str),
) -> Result<()> {
    require_root("monitoring snapshots")?;
    let _lock = lock()?;
    let mut monitor = Monitor {
        dm: Dm::open()?,
        request,
        notice,
        clock: Stopwatch::start(),
        watched: BTreeMap::new(),
        mounts_at: BTreeMap::new(),
        deletion: None,
    };
    // Without a service manager there is nothing to tell.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    loop {
        let pause = monitor.look()?;
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Watchdog]);
        match monitor.dm.wait_for_event(pause) {
            Err(error) if error.kind() != ErrorKind::Interrupted => return Err(error),
            _ => {}
        }
        if interrupt().is_err() {
            let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
            // A deletion that has begun is completed by the next command, if it does not end now.
            return Ok(());
        }
    }
}

fn lock_path() -> PathBuf {
    Path::new(RUN_DIR).join("monitor.lock")
}

fn lock() -> Result<LockedFile> {
    let path = lock_path();
    let what = || format!("locking {}", path.display());
    DirBuilder::new().recursive(true).mode(0o700).create(RUN_DIR).io_context(what)?;
    let mut options = OpenOptions::new();
    let file = options.write(true).create(true).truncate(false).mode(0o600).open(&path).io_context(what)?;
    try_lock(file, &path)?.map_err(|_| {
        Error::refused("another monitor is running")
            .state("nothing was changed")
            .next("systemctl status tidemark-monitor")
    })
}

/// True if a store that cannot be enlarged is about to fill.
#[must_use]
pub fn is_nearly_full(used: Bytes, total: Bytes) -> bool {
    used.get() / NEARLY_FULL_PERCENT * 100 >= total.get()
}

/// True if a monitor runs on this host.
#[must_use]
pub fn is_running() -> bool {
    let path = lock_path();
    File::open(&path).is_ok_and(|file| matches!(try_lock_shared(file, &path), Ok(Err(_))))
}

impl Monitor<'_> {
    /// Looks at every volume. Returns when to look again.
    fn look(&mut self) -> Result<Duration> {
        self.end_deletion();
        let mut pause = POLL_MAX;
        let records = read_all()?;
        let is_known = |id: &String| {
            records.iter().flatten().flat_map(|record| &record.snapshots).any(|snapshot| snapshot.id == *id)
        };
        self.watched.retain(|id, _| is_known(id));
        for record in records.iter().flatten() {
            match self.look_at_volume(record) {
                Ok(next) => pause = pause.min(next),
                // A snapshot may have been deleted since the record was read.
                Err(error) => tracing::debug!("{error}"),
            }
        }
        Ok(pause)
    }

    fn look_at_volume(&mut self, record: &SnapshotSetRecord) -> Result<Duration> {
        let mut pause = POLL_MAX;
        let Some(data) = layers::data(&self.dm, record)? else { return Ok(pause) };
        self.note_mounts(record)?;
        if merge::needs_attention(&self.dm, record)? {
            settle_if_idle(&self.dm, &record.id)?;
        }
        for snapshot in record.linked() {
            let Some(view) = layers::view(&self.dm, record, &snapshot)?.filter(|view| view.has_active) else {
                continue;
            };
            if self.dm.table(view.number, Slot::Active)?.is_some_and(|table| table.maps_to(data.number)) {
                pause = pause.min(self.look_at(record, &snapshot)?);
            }
        }
        for clone in record.clones() {
            pause = pause.min(self.look_at(record, &clone)?);
        }
        Ok(pause)
    }

    /// Notes whether the filesystem was mounted or unmounted since the last look.
    fn note_mounts(&mut self, record: &SnapshotSetRecord) -> Result<()> {
        let now = Instant::now();
        if self.mounts_at.get(&record.id).is_some_and(|at| now < *at) {
            return Ok(());
        }
        self.mounts_at.insert(record.id.clone(), now + MOUNTS_PAUSE);
        if link::with_mounts(&self.dm, record)? == *record {
            return Ok(());
        }
        match SnapshotSet::find_idle(&record.id)? {
            Some(mut set) => link::note_mounts(&self.dm, &mut set),
            None => Ok(()),
        }
    }

    /// Looks at a snapshot that receives.
    fn look_at(&mut self, record: &SnapshotSetRecord, snapshot: &SnapshotRecord) -> Result<Duration> {
        let name = format!("{}@{}", record.volume, snapshot.name);
        let (used, total) = match layers::status(&self.dm, record, snapshot)? {
            Some(SnapshotStatus::Active { used, total, .. }) => (used.bytes(), total.bytes()),
            Some(status) if layers::is_lost(&status) => {
                self.warn(
                    snapshot,
                    Cause::Lost,
                    &name,
                    &format!("{name} is lost: its store failed or was full"),
                );
                return Ok(POLL_MAX);
            }
            Some(SnapshotStatus::Overflow) if snapshot.clone_of.is_some() => {
                self.reopen(record, snapshot, &name)?;
                return Ok(POLL_MAX);
            }
            _ => return Ok(POLL_MAX),
        };
        let now = self.clock.elapsed();
        let watched = self.watched.entry(snapshot.id.clone()).or_default();
        watched.rate.observe(now, used);
        let rate = watched.rate;
        let may_try = watched.retry_at.is_none_or(|at| Instant::now() >= at);
        let largest = Bytes(snapshot.store_bytes_max);
        if let Some(next) = size::next_kept_total(total, used, largest, &rate).filter(|_| may_try) {
            self.enlarge(record, snapshot, (used, total), next)?;
        }
        let free = total.saturating_sub(used).get();
        let millis =
            free.saturating_mul(1000).checked_div(rate.per_second()).unwrap_or(u64::MAX) / POLL_SHARE;
        Ok(Duration::from_millis(millis).clamp(POLL_MIN, POLL_MAX))
    }

    /// Enlarges the store of a clone that was full, and lets it take writes again.
    fn reopen(&mut self, record: &SnapshotSetRecord, clone: &SnapshotRecord, name: &str) -> Result<()> {
        let text =
            format!("the store of {name} is full: the clone takes no writes until there is space for it");
        self.warn(clone, Cause::NearlyFull, name, &text);
        let watched = self.watched.entry(clone.id.clone()).or_default();
        if watched.retry_at.is_some_and(|at| Instant::now() < at) {
            return Ok(());
        }
        watched.retry_at = Some(Instant::now() + RETRY);
        settle_if_idle(&self.dm, &record.id)
    }

    /// Enlarges the store to `next`, or by as much as its filesystem has.
    fn enlarge(
        &mut self,
        record: &SnapshotSetRecord,
        snapshot: &SnapshotRecord,
        (used, total): (Bytes, Bytes),
        next: Bytes,
    ) -> Result<()> {
        let name = format!("{}@{}", record.volume, snapshot.name);
        let store = record.store(snapshot)?;
        let possible = total + store.free_beyond_reserve()?;
        let to = next.min(possible.align_down(size::STORE_UNIT));
        let grown = if to > total { store.enlarge(&self.dm, to) } else { Err(store.no_space()) };
        let watched = self.watched.entry(snapshot.id.clone()).or_default();
        match grown {
            Ok(()) => {
                watched.warned.remove(&Cause::NearlyFull);
                watched.retry_at = None;
                self.report(
                    Cause::Grown,
                    &name,
                    &format!("the store of {name} was enlarged from {total} to {to}"),
                );
                Ok(())
            }
            Err(error) => {
                watched.retry_at = Some(Instant::now() + RETRY);
                self.cannot_grow(record, snapshot, (used, total), &error)
            }
        }
    }

    /// Warns if the store is nearly full, and makes room if the user allowed it.
    fn cannot_grow(
        &mut self,
        record: &SnapshotSetRecord,
        snapshot: &SnapshotRecord,
        (used, total): (Bytes, Bytes),
        error: &Error,
    ) -> Result<()> {
        if !is_nearly_full(used, total) {
            return Ok(());
        }
        let name = format!("{}@{}", record.volume, snapshot.name);
        let text = format!(
            "the store of {name} is nearly full ({used} of {total} are used) and cannot be enlarged: {error}"
        );
        self.warn(snapshot, Cause::NearlyFull, &name, &text);
        if self.request.auto_delete && error.kind() == ErrorKind::NoSpace && self.deletion.is_none() {
            self.make_room(record, snapshot)?;
        }
        Ok(())
    }

    /// Deletes the oldest snapshot of the volume, if it has no clones and its store is on the filesystem that needs space. Nothing reads
    /// through the oldest, so no original has to be copied first.
    fn make_room(&mut self, record: &SnapshotSetRecord, snapshot: &SnapshotRecord) -> Result<()> {
        let linked = record.linked();
        let Some(oldest) = linked.first().filter(|oldest| oldest.id != snapshot.id) else { return Ok(()) };
        let is_there = record.store(oldest)?.filesystem()? == record.store(snapshot)?.filesystem()?;
        let has_clones = record.clones_of(&oldest.id).next().is_some();
        if oldest.state != SnapshotState::Kept || !is_there || has_clones {
            return Ok(());
        }
        let name = format!("{}@{}", record.volume, oldest.name);
        let deleted = name.clone();
        let delete = move || delete::run(&delete::plan(&[deleted])?, &|| Ok(())).map(drop);
        self.deletion = Some((name, thread::spawn(delete)));
        Ok(())
    }

    fn end_deletion(&mut self) {
        let Some((name, thread)) = self.deletion.take_if(|(_, thread)| thread.is_finished()) else { return };
        match thread.join() {
            Ok(Ok(())) => {
                self.watched.values_mut().for_each(|watched| watched.retry_at = None);
                self.report(Cause::Deleted, &name, &format!("{name} was deleted to make room"));
            }
            Ok(Err(error)) => tracing::warn!("{error}"),
            Err(_) => tracing::warn!("deleting {name} failed"),
        }
    }

    fn warn(&mut self, snapshot: &SnapshotRecord, cause: Cause, name: &str, text: &str) {
        let watched = self.watched.entry(snapshot.id.clone()).or_default();
        if watched.warned.insert(cause) {
            self.report(cause, name, text);
        }
    }

    fn report(&self, cause: Cause, name: &str, text: &str) {
        (self.notice)(text);
        let Some(command) = self.request.hook.clone() else { return };
        let (name, text) = (name.to_owned(), text.to_owned());
        thread::spawn(move || {
            let hook = Hook {
                option: "--hook",
                command: &command,
                origin: &node::mapper_path(&name),
                below: None,
                deadline: Some(Deadline { at: Instant::now() + HOOK_MAX, option: "its limit of 30 seconds" }),
                variables: &[
                    ("TIDEMARK_EVENT", cause.word()),
                    ("TIDEMARK_SNAPSHOT", &name),
                    ("TIDEMARK_MESSAGE", &text),
                ],
            };
            if let Err(error) = hook.run(&|| Ok(())) {
                tracing::warn!("{error}");
            }
        });
    }
}
