//! `tidemark monitor`: enlarges the stores of kept snapshots before they fill, and warns.
//!
//! It looks at the newest snapshot of each volume, the only one that receives: whenever device-mapper reports an event,
//! and as often as the store's fill rate requires. Invariants:
//! - writers never wait for it: an enlargement replaces the table of a store, for milliseconds;
//! - it takes no lock for an enlargement, since a deletion may hold the lock for as long as it copies originals up. A
//!   store that is removed meanwhile fails to be enlarged, and nothing else happens;
//! - a warning is given once, until its cause is gone;
//! - it deletes nothing unless it was told to.

use std::collections::BTreeMap;
use std::fs::{DirBuilder, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::delete;
use super::set::{self, read_all};
use crate::base::clock::Stopwatch;
use crate::base::{Bytes, Error, ErrorKind, Result, ResultExt as _};
use crate::dm::{Dm, SnapshotStatus, node};
use crate::format::state::{SnapshotRecord, SnapshotSetRecord, SnapshotState};
use crate::job::RUN_DIR;
use crate::stack::hooks::Hook;
use crate::store::size::{self, FillRate};
use crate::sys::lock::{LockedFile, try_lock, try_lock_shared};
use crate::sys::privilege::require_root;

/// Longest interval between two looks.
const POLL_MAX: Duration = Duration::from_millis(500);

/// Shortest interval.
const POLL_MIN: Duration = Duration::from_millis(50);

/// The interval is the time in which the free space would be used up, divided by this.
const POLL_SHARE: u64 = 8;

/// Pause after a failed enlargement.
const RETRY: Duration = Duration::from_secs(1);

/// A store that cannot be enlarged is nearly full from this share of its size on, in per cent.
pub const NEARLY_FULL_PERCENT: u64 = 80;

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
    warned: BTreeMap<Cause, ()>,
    retry_at: Option<Instant>,
}

struct Monitor<'a> {
    dm: Dm,
    request: &'a MonitorRequest,
    interrupt: &'a dyn Fn() -> Result<()>,
    notice: &'a dyn Fn(&str),
    clock: Stopwatch,
    watched: BTreeMap<String, Watched>,
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
        interrupt,
        notice,
        clock: Stopwatch::start(),
        watched: BTreeMap::new(),
    };
    // Without a service manager there is nobody to tell.
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

/// True if a monitor runs on this host.
#[must_use]
pub fn is_running() -> bool {
    let path = lock_path();
    File::open(&path).is_ok_and(|file| matches!(try_lock_shared(file, &path), Ok(Err(_))))
}

impl Monitor<'_> {
    /// Looks at every volume. Returns when to look again.
    fn look(&mut self) -> Result<Duration> {
        let mut pause = POLL_MAX;
        let records = read_all()?;
        let known: Vec<&str> = records
            .iter()
            .flatten()
            .flat_map(|record| record.snapshots.iter().map(|snapshot| snapshot.id.as_str()))
            .collect();
        self.watched.retain(|id, _| known.contains(&id.as_str()));
        for record in records.iter().flatten() {
            let Some(newest) = record.linked().pop() else { continue };
            match self.look_at(record, &newest) {
                Ok(next) => pause = pause.min(next),
                // It may have been deleted since the record was read.
                Err(error) => tracing::debug!("{error}"),
            }
        }
        Ok(pause)
    }

    fn look_at(&mut self, record: &SnapshotSetRecord, newest: &SnapshotRecord) -> Result<Duration> {
        let name = format!("{}@{}", record.volume, newest.name);
        let (used, total) = match set::status(&self.dm, record, newest)? {
            None => return Ok(POLL_MAX),
            Some(SnapshotStatus::Active { used, total, .. }) => (used.bytes(), total.bytes()),
            Some(_) => {
                self.warn(
                    newest,
                    Cause::Lost,
                    &name,
                    &format!("{name} is lost: its store failed or was full"),
                );
                return Ok(POLL_MAX);
            }
        };
        let now = self.clock.elapsed();
        let watched = self.watched.entry(newest.id.clone()).or_default();
        watched.rate.observe(now, used);
        let rate = watched.rate;
        let may_try = watched.retry_at.is_none_or(|at| Instant::now() >= at);
        let largest = Bytes(newest.store_bytes_max);
        if let Some(next) = size::next_total(total, used, largest, &rate).filter(|_| may_try) {
            match record.store(newest)?.enlarge(&self.dm, next) {
                Ok(()) => {
                    let watched = self.watched.entry(newest.id.clone()).or_default();
                    watched.warned.remove(&Cause::NearlyFull);
                    watched.retry_at = None;
                    self.report(
                        Cause::Grown,
                        &name,
                        &format!("the store of {name} was enlarged from {total} to {next}"),
                    );
                }
                Err(error) => self.cannot_grow(record, newest, (used, total), &error)?,
            }
        }
        let free = total.saturating_sub(used).get();
        let seconds = free.checked_div(rate.per_second()).unwrap_or(u64::MAX) / POLL_SHARE;
        Ok(Duration::from_secs(seconds.min(POLL_MAX.as_secs() + 1)).clamp(POLL_MIN, POLL_MAX))
    }

    /// Makes room, if the user allowed it; warns if the store is nearly full.
    fn cannot_grow(
        &mut self,
        record: &SnapshotSetRecord,
        newest: &SnapshotRecord,
        (used, total): (Bytes, Bytes),
        error: &Error,
    ) -> Result<()> {
        let name = format!("{}@{}", record.volume, newest.name);
        self.watched.entry(newest.id.clone()).or_default().retry_at = Some(Instant::now() + RETRY);
        if used.get() / NEARLY_FULL_PERCENT * 100 < total.get() {
            return Ok(());
        }
        self.warn(
            newest,
            Cause::NearlyFull,
            &name,
            &format!("the store of {name} is nearly full ({used} of {total} are used) and cannot be enlarged: {error}"),
        );
        if self.request.auto_delete { self.make_room(record, newest) } else { Ok(()) }
    }

    /// Deletes the oldest snapshot of the volume that is not in use, but never the newest.
    fn make_room(&mut self, record: &SnapshotSetRecord, newest: &SnapshotRecord) -> Result<()> {
        let older = record.snapshots.iter().filter(|snapshot| snapshot.id != newest.id);
        for snapshot in older.filter(|snapshot| snapshot.state == SnapshotState::Kept) {
            let name = format!("{}@{}", record.volume, snapshot.name);
            let deleted =
                delete::plan(std::slice::from_ref(&name)).and_then(|plan| delete::run(&plan, self.interrupt));
            match deleted {
                Ok(_) => {
                    self.watched.entry(newest.id.clone()).or_default().retry_at = None;
                    self.report(Cause::Deleted, &name, &format!("{name} was deleted to make room"));
                    return Ok(());
                }
                Err(error) => tracing::warn!("{error}"),
            }
        }
        Ok(())
    }

    fn warn(&mut self, snapshot: &SnapshotRecord, cause: Cause, name: &str, text: &str) {
        let watched = self.watched.entry(snapshot.id.clone()).or_default();
        if watched.warned.insert(cause, ()).is_none() {
            self.report(cause, name, text);
        }
    }

    fn report(&self, cause: Cause, name: &str, text: &str) {
        (self.notice)(text);
        let Some(command) = &self.request.hook else { return };
        let path = node::mapper_path(name);
        let hook = Hook {
            option: "--hook",
            command,
            origin: &path,
            below: None,
            deadline: Some(Instant::now() + HOOK_MAX),
            variables: &[
                ("TIDEMARK_EVENT", cause.word()),
                ("TIDEMARK_SNAPSHOT", name),
                ("TIDEMARK_MESSAGE", text),
            ],
        };
        if let Err(error) = hook.run(self.interrupt) {
            tracing::warn!("{error}");
        }
    }
}
