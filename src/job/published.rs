//! Publishes the progress of a running copy: folds its events into a [`ProgressView`], and writes that to a file
//! next to the job's record, for `tidemark status`.
//!
//! Invariants:
//! - every event is passed on, whatever happens to the file;
//! - the file is replaced whole (by a rename), at most every [`WRITE_INTERVAL`], and never synced: it is on a
//!   tmpfs, and nothing depends on it;
//! - a failed write never harms a copy: it is logged once, and not retried;
//! - nothing is written while the origin is being brought to its instant and filesystems are frozen.

use std::collections::VecDeque;
use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize as _;

use crate::base::{Bytes, clock};
use crate::format::state::{OriginView, ProgressView, RegionsView, StoreView};
use crate::progress::{Event, Observer, Phase, StoreFill};

/// Shortest time between two writes.
const WRITE_INTERVAL: Duration = Duration::from_millis(500);

/// Number of writes over which the rate is measured: ten seconds.
const RATE_WRITES: usize = 20;

/// An observer that keeps the progress file up to date and passes every event on.
pub struct ProgressFile<'a> {
    inner: &'a dyn Observer,
    path: PathBuf,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    view: ProgressView,
    /// The origin is being brought to its instant.
    held: bool,
    failed: bool,
    written: Option<Instant>,
    /// Bytes done in this phase, at the last writes.
    done: VecDeque<(Instant, Bytes)>,
}

impl<'a> ProgressFile<'a> {
    /// Writes the view to `path`, and passes events on to `inner`.
    #[must_use]
    pub fn new(inner: &'a dyn Observer, path: PathBuf) -> Self {
        Self { inner, path, state: Mutex::default() }
    }

    /// As [`ProgressFile::new`], for one origin of several.
    #[must_use]
    pub fn of_origin(inner: &'a dyn Observer, path: PathBuf, origin: &str) -> Self {
        let view = ProgressView { origin_path: Some(origin.to_owned()), ..ProgressView::default() };
        Self { inner, path, state: Mutex::new(State { view, ..State::default() }) }
    }

    fn handle(&self, event: &Event, now: Instant) {
        // Every change is an assignment: the state after a panic is good enough for display.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.fold(event);
        let is_due = state.written.is_none_or(|written| now.duration_since(written) >= WRITE_INTERVAL);
        if state.held || state.failed || !is_due {
            return;
        }
        state.written = Some(now);
        state.measure(now);
        state.view.updated_utc_ns = clock::utc_now_ns();
        let written =
            state.view.encode().map_err(io::Error::other).and_then(|bytes| replace(&self.path, &bytes));
        if let Err(error) = written {
            state.failed = true;
            tracing::info!("{} is no longer updated: {error}", self.path.display());
        }
    }
}

impl Observer for ProgressFile<'_> {
    fn event(&self, event: &Event) {
        self.handle(event, Instant::now());
        self.inner.event(event);
    }
}

impl State {
    fn fold(&mut self, event: &Event) {
        match event {
            Event::Phase { phase, total } => self.begin(*phase, *total),
            Event::Progress { phase, done, total, segments } => {
                let name = phase_name(*phase);
                if self.view.phase != name {
                    self.begin(*phase, *total);
                }
                self.view.done_bytes = *done;
                self.view.total_bytes = total.or(self.view.total_bytes);
                self.view.segments_done = segments.map(|segments| segments.done);
                self.view.segments_total = segments.map(|segments| segments.total);
            }
            Event::Store(fill) => self.view.store = Some(store_view(fill)),
            Event::Regions { released, total, released_bytes, longest_stall, .. } => {
                self.view.regions = Some(RegionsView {
                    released: *released,
                    total: *total,
                    released_bytes: *released_bytes,
                    longest_stall_us: micros(*longest_stall),
                });
            }
            Event::Latency { origin, baseline, rate } => {
                self.view.origin = Some(OriginView {
                    latency_us: origin.map(micros),
                    baseline_us: baseline.map(micros),
                    allowed_bytes_per_second: *rate,
                });
            }
            Event::Instant { .. } => self.held = false,
            Event::Note { .. } | Event::Warning { .. } => {}
        }
    }

    fn begin(&mut self, phase: Phase, total: Option<Bytes>) {
        self.held = phase == Phase::Instant;
        self.done.clear();
        self.view = ProgressView {
            phase: phase_name(phase),
            done_bytes: Bytes::ZERO,
            total_bytes: total,
            rate_bytes_per_second: None,
            segments_done: None,
            segments_total: None,
            ..std::mem::take(&mut self.view)
        };
    }

    fn measure(&mut self, now: Instant) {
        self.done.push_back((now, self.view.done_bytes));
        if self.done.len() > RATE_WRITES {
            self.done.pop_front();
        }
        let rate = self.done.front().and_then(|(begin, done)| {
            let millis = now.duration_since(*begin).as_millis();
            let bytes = u128::from(self.view.done_bytes.saturating_sub(*done).get());
            u64::try_from((bytes * 1000).checked_div(millis)?).ok()
        });
        self.view.rate_bytes_per_second = rate.map(Bytes);
    }
}

fn store_view(fill: &StoreFill) -> StoreView {
    StoreView {
        used_bytes: fill.used_bytes,
        total_bytes: fill.total_bytes,
        ram_used_bytes: fill.ram_used_bytes,
        disk_used_bytes: fill.disk_used_bytes,
        exceptions: fill.exceptions,
        exceptions_per_second: fill.exceptions_per_second,
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// The name used in JSON lines.
fn phase_name(phase: Phase) -> String {
    match phase.serialize(serde_json::value::Serializer) {
        Ok(serde_json::Value::String(name)) => name,
        _ => String::new(),
    }
}

fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let new = temporary(path);
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.write_all(bytes)?;
    fs::rename(&new, path)
}

/// The path at which the new file for `path` is written.
#[must_use]
pub fn temporary(path: &Path) -> PathBuf {
    path.with_extension("progress-new")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::{SegmentCount, Silent};

    fn view_at(path: &Path) -> Option<ProgressView> {
        ProgressView::decode(&fs::read(path).ok()?)
    }

    fn progress(done: u64) -> Event {
        let segments = Some(SegmentCount { done: done / 10, total: 100 });
        Event::Progress { phase: Phase::Data, done: Bytes(done), total: Some(Bytes(1000)), segments }
    }

    fn instant() -> Event {
        Event::Instant { utc_ns: 1, frozen: Duration::ZERO, suspended: Duration::ZERO }
    }

    #[test]
    fn events_are_folded_and_written_twice_a_second() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.progress");
        let file = ProgressFile::new(&Silent, path.clone());
        let begin = Instant::now();
        let at = |ms| begin + Duration::from_millis(ms);
        file.handle(&Event::Phase { phase: Phase::Data, total: Some(Bytes(1000)) }, at(0));
        assert_eq!(view_at(&path).unwrap().phase, "data");
        file.handle(&progress(100), at(100));
        let fill = StoreFill { used_bytes: Bytes(7), disk_used_bytes: Bytes(3), ..StoreFill::default() };
        file.handle(&Event::Store(fill), at(200));
        let longest_stall = Duration::from_millis(2);
        let (released_bytes, stall) = (Bytes(9), Duration::ZERO);
        file.handle(&Event::Regions { released: 1, total: 4, released_bytes, stall, longest_stall }, at(300));
        file.handle(
            &Event::Latency { origin: Some(Duration::from_millis(3)), baseline: None, rate: None },
            at(400),
        );
        assert_eq!(view_at(&path).unwrap().done_bytes, Bytes::ZERO, "not again within half a second");
        file.handle(&progress(250), at(500));
        let view = view_at(&path).unwrap();
        assert_eq!((view.done_bytes, view.total_bytes), (Bytes(250), Some(Bytes(1000))));
        assert_eq!(view.rate_bytes_per_second, Some(Bytes(500)));
        assert_eq!((view.segments_done, view.segments_total), (Some(25), Some(100)));
        assert_eq!(view.store.unwrap().disk_used_bytes, Bytes(3));
        assert_eq!(view.regions.unwrap().longest_stall_us, 2000);
        assert_eq!(view.origin.unwrap().latency_us, Some(3000));
        assert!(view.updated_utc_ns > 0);

        file.handle(&Event::Phase { phase: Phase::Originals, total: None }, at(1000));
        let view = view_at(&path).unwrap();
        assert_eq!(
            (view.phase.as_str(), view.done_bytes, view.segments_done),
            ("originals", Bytes::ZERO, None)
        );
        assert!(
            view.store.is_some() && view.regions.is_some(),
            "fields that do not depend on the phase stay"
        );
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left beside it");
    }

    #[test]
    fn nothing_is_written_between_freeze_and_thaw() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.progress");
        let file = ProgressFile::new(&Silent, path.clone());
        let begin = Instant::now();
        file.handle(&Event::Phase { phase: Phase::Instant, total: None }, begin);
        file.handle(&Event::Note { text: "n".into() }, begin + Duration::from_secs(10));
        assert!(!path.exists());
        file.handle(&instant(), begin + Duration::from_secs(11));
        assert!(path.exists());
    }

    #[test]
    fn every_event_is_passed_on_even_if_nothing_can_be_written() {
        #[derive(Default)]
        struct Count(std::sync::atomic::AtomicU32);
        impl Observer for Count {
            fn event(&self, _event: &Event) {
                self.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            }
        }
        let dir = tempfile::tempdir().unwrap();
        let count = Count::default();
        let file = ProgressFile::new(&count, dir.path().join("missing/x.progress"));
        for done in 0..5 {
            file.event(&progress(done));
        }
        assert_eq!(count.0.load(std::sync::atomic::Ordering::Relaxed), 5);
        assert!(file.state.lock().unwrap().failed);
    }

    #[test]
    fn the_rate_covers_the_last_writes_and_memory_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.progress");
        let file = ProgressFile::new(&Silent, path.clone());
        let begin = Instant::now();
        for half in 0..200u32 {
            // 400 bytes at once, then one every half second.
            file.handle(&progress(400 + u64::from(half)), begin + WRITE_INTERVAL * half);
        }
        assert_eq!(view_at(&path).unwrap().rate_bytes_per_second, Some(Bytes(2)));
        assert!(file.state.lock().unwrap().done.len() <= RATE_WRITES);
    }
}
