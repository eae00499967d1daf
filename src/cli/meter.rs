//! Progress, rate and remaining time: the arithmetic between a copy's events and their display.
//!
//! Pure: the caller supplies the time of each event.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::base::Bytes;
use crate::format::state::ProgressView;
use crate::progress::{Event, Phase, SegmentCount, StoreFill};

/// The rate covers this much of the recent past: less would fluctuate, more would lag.
const RATE_WINDOW: Duration = Duration::from_secs(10);

/// Most samples for the rate; more frequent events replace the newest one.
const SAMPLE_COUNT_MAX: usize = 64;

/// What has been released so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Released {
    /// Regions released.
    pub regions: u64,
    /// Regions in total.
    pub total: u64,
    /// The longest time for which a release has held the origin.
    pub longest_stall: Duration,
}

/// The latency of applications on the origin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Latency {
    /// Present mean of their reads and writes, if there are any.
    pub origin: Option<Duration>,
    /// The same without the copier, if known.
    pub baseline: Option<Duration>,
    /// The resulting limit of the copier, bytes per second; None: no limit.
    pub allowed: Option<Bytes>,
}

/// The state of a running copy.
#[derive(Debug, Default)]
pub struct Meter {
    phase: Option<Phase>,
    done: Bytes,
    total: Option<Bytes>,
    segments: Option<SegmentCount>,
    store: Option<StoreFill>,
    released: Option<Released>,
    latency: Option<Latency>,
    samples: VecDeque<(Instant, Bytes)>,
}

impl Meter {
    /// Updates the state by an event that arrived at `now`.
    pub fn update(&mut self, event: &Event, now: Instant) {
        match event {
            Event::Phase { phase, total } => {
                self.phase = Some(*phase);
                self.done = Bytes::ZERO;
                self.total = *total;
                self.segments = None;
                self.samples.clear();
                self.samples.push_back((now, Bytes::ZERO));
            }
            Event::Progress { phase, done, total, segments } => {
                if self.phase != Some(*phase) {
                    self.update(&Event::Phase { phase: *phase, total: *total }, now);
                }
                self.done = *done;
                self.total = total.or(self.total);
                self.segments = *segments;
                self.sample(now);
            }
            Event::Store(fill) => self.store = Some(*fill),
            Event::Regions { released, total, longest_stall, .. } => {
                self.released =
                    Some(Released { regions: *released, total: *total, longest_stall: *longest_stall });
            }
            Event::Latency { origin, baseline, rate } => {
                self.latency = Some(Latency { origin: *origin, baseline: *baseline, allowed: *rate });
            }
            Event::Instant { .. } | Event::Note { .. } | Event::Warning { .. } => {}
        }
    }

    fn sample(&mut self, now: Instant) {
        let spacing = RATE_WINDOW / u32::try_from(SAMPLE_COUNT_MAX).expect("a small constant");
        let crowded = self.samples.len() >= 2
            && self.samples.get(self.samples.len() - 2).is_some_and(|(at, _)| now - *at < spacing);
        if crowded {
            self.samples.pop_back();
        }
        self.samples.push_back((now, self.done));
        while self.samples.len() > 2 && self.samples.front().is_some_and(|(at, _)| now - *at > RATE_WINDOW) {
            self.samples.pop_front();
        }
    }

    /// The phase, once one has begun.
    #[must_use]
    pub fn phase(&self) -> Option<Phase> {
        self.phase
    }

    /// Bytes done in this phase.
    #[must_use]
    pub fn done(&self) -> Bytes {
        self.done
    }

    /// Bytes of this phase in total, if known.
    #[must_use]
    pub fn total(&self) -> Option<Bytes> {
        self.total
    }

    /// The store, once it has been reported.
    #[must_use]
    pub fn store(&self) -> Option<&StoreFill> {
        self.store.as_ref()
    }

    /// The segments, in the phase that has them.
    #[must_use]
    pub fn segments(&self) -> Option<SegmentCount> {
        self.segments
    }

    /// The regions, once one has been released.
    #[must_use]
    pub fn released(&self) -> Option<&Released> {
        self.released.as_ref()
    }

    /// The origin's latency, once measured.
    #[must_use]
    pub fn latency(&self) -> Option<&Latency> {
        self.latency.as_ref()
    }

    /// Bytes per second over the recent past; None before there are two samples.
    #[must_use]
    pub fn rate(&self) -> Option<Bytes> {
        let (first, last) = (self.samples.front()?, self.samples.back()?);
        let millis = (last.0 - first.0).as_millis();
        let bytes = u128::from(last.1.saturating_sub(first.1).get());
        (bytes * 1000).checked_div(millis).and_then(|rate| u64::try_from(rate).ok()).map(Bytes)
    }

    /// The present position in the phase.
    #[must_use]
    pub fn position(&self) -> Position {
        Position {
            phase: self.phase,
            done: self.done,
            total: self.total,
            rate: self.rate(),
            segments: self.segments,
        }
    }

    /// Time left in the phase at the present rate.
    #[must_use]
    pub fn left(&self) -> Option<Duration> {
        self.position().left()
    }
}

/// The position in a phase.
#[derive(Clone, Copy, Debug, Default)]
pub struct Position {
    /// The phase, once one has begun.
    pub phase: Option<Phase>,
    /// Bytes done.
    pub done: Bytes,
    /// Bytes in total, if known.
    pub total: Option<Bytes>,
    /// Bytes per second.
    pub rate: Option<Bytes>,
    /// Segments, in the phase that has them.
    pub segments: Option<SegmentCount>,
}

impl Position {
    /// Time left in the phase at this rate.
    #[must_use]
    pub fn left(&self) -> Option<Duration> {
        let missing = self.total?.saturating_sub(self.done).get();
        missing.checked_div(self.rate?.get()).map(Duration::from_secs)
    }

    /// Whole percent of the phase, 100 only when all is done.
    #[must_use]
    pub fn percent(&self) -> Option<u64> {
        let total = u128::from(self.total?.get());
        (u128::from(self.done.get()) * 100).checked_div(total).and_then(|p| u64::try_from(p).ok())
    }
}

/// "copying: 1.2 GiB of 10 GiB (12%), 400 MiB/s, 22 s left, 1228 of 10240 segments".
#[must_use]
pub fn position_text(position: &Position) -> String {
    let mut line = format!("{}: {}", position.phase.map_or("working", phase_text), position.done);
    if let Some(total) = position.total {
        line.push_str(&format!(" of {total}"));
    }
    if let Some(percent) = position.percent() {
        line.push_str(&format!(" ({percent}%)"));
    }
    if let Some(rate) = position.rate {
        line.push_str(&format!(", {rate}/s"));
    }
    if let Some(left) = position.left() {
        line.push_str(&format!(", {} left", duration_text(left)));
    }
    if let Some(segments) = position.segments {
        line.push_str(&format!(", {} of {} segments", segments.done, segments.total));
    }
    line
}

/// The lines that show a copy in progress, from its progress file.
#[must_use]
pub fn view_texts(view: &ProgressView) -> Vec<String> {
    let phase = serde_json::from_value(serde_json::Value::String(view.phase.clone())).ok();
    let segments = view.segments_done.zip(view.segments_total);
    let mut lines = vec![position_text(&Position {
        phase,
        done: view.done_bytes,
        total: view.total_bytes,
        rate: view.rate_bytes_per_second,
        segments: segments.map(|(done, total)| SegmentCount { done, total }),
    })];
    lines.extend(view.store.map(|store| {
        store_text(&StoreFill {
            used_bytes: store.used_bytes,
            total_bytes: store.total_bytes,
            ram_used_bytes: store.ram_used_bytes,
            disk_used_bytes: store.disk_used_bytes,
            exceptions: store.exceptions,
            exceptions_per_second: store.exceptions_per_second,
            ..StoreFill::default()
        })
    }));
    lines.extend(view.regions.map(|regions| {
        released_text(&Released {
            regions: regions.released,
            total: regions.total,
            longest_stall: Duration::from_micros(regions.longest_stall_us),
        })
    }));
    lines.extend(view.origin.map(|origin| {
        origin_text(&Latency {
            origin: origin.latency_us.map(Duration::from_micros),
            baseline: origin.baseline_us.map(Duration::from_micros),
            allowed: origin.allowed_bytes_per_second,
        })
    }));
    lines
}

/// A phase as text.
#[must_use]
pub fn phase_text(phase: Phase) -> &'static str {
    match phase {
        Phase::Prepare => "preparing",
        Phase::Instant => "instant",
        Phase::Data => "copying",
        Phase::Originals => "originals",
        Phase::Verify => "verifying",
        Phase::Finish => "finishing",
    }
}

/// "store 12 MiB of 1 GiB (RAM 4 MiB, disk 8 MiB), 3012 exceptions, 40/s".
#[must_use]
pub fn store_text(fill: &StoreFill) -> String {
    format!(
        "store {} of {} (RAM {}, disk {}), {} exceptions, {}/s",
        fill.used_bytes,
        fill.total_bytes,
        fill.ram_used_bytes,
        fill.disk_used_bytes,
        fill.exceptions,
        fill.exceptions_per_second
    )
}

/// "5 of 16 regions released, longest stall 12.3 ms".
#[must_use]
pub fn released_text(released: &Released) -> String {
    format!(
        "{} of {} regions released, longest stall {}",
        released.regions,
        released.total,
        latency_text(released.longest_stall)
    )
}

/// "origin 1.2 ms per I/O (820 us without the copier), copier at most 100 MiB/s". Unknown parts are omitted, and an
/// origin without I/O of applications is "idle".
#[must_use]
pub fn origin_text(latency: &Latency) -> String {
    let mut text = match latency.origin {
        Some(origin) => format!("origin {} per I/O", latency_text(origin)),
        None => "origin idle".to_owned(),
    };
    if let (Some(_), Some(baseline)) = (latency.origin, latency.baseline) {
        text.push_str(&format!(" ({} without the copier)", latency_text(baseline)));
    }
    if let Some(allowed) = latency.allowed {
        text.push_str(&format!(", copier at most {allowed}/s"));
    }
    text
}

/// "820 us", "1.2 ms", "340 ms", "2.5 s": at most three digits, for times below a minute.
#[must_use]
pub fn latency_text(time: Duration) -> String {
    let micros = time.as_micros();
    match micros {
        0..1_000 => format!("{micros} us"),
        1_000..100_000 => format!("{}.{} ms", micros / 1_000, micros / 100 % 10),
        100_000..1_000_000 => format!("{} ms", micros / 1_000),
        _ => format!("{}.{} s", micros / 1_000_000, micros / 100_000 % 10),
    }
}

/// "42 s", "3 min 5 s", "2 h 10 min".
#[must_use]
pub fn duration_text(time: Duration) -> String {
    let seconds = time.as_secs();
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, s) => format!("{s} s"),
        (0, m, s) => format!("{m} min {s} s"),
        (h, m, _) => format!("{h} h {m} min"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn progress(done: u64) -> Event {
        Event::Progress { phase: Phase::Data, done: Bytes(done), total: Some(Bytes(1000)), segments: None }
    }

    #[test]
    fn rate_and_time_left() {
        let start = Instant::now();
        let mut meter = Meter::default();
        assert_eq!((meter.rate(), meter.left(), meter.position().percent()), (None, None, None));
        meter.update(&Event::Phase { phase: Phase::Data, total: Some(Bytes(1000)) }, start);
        assert_eq!(meter.rate(), None);
        meter.update(&progress(100), start + Duration::from_secs(1));
        assert_eq!(meter.rate(), Some(Bytes(100)));
        assert_eq!(meter.left(), Some(Duration::from_secs(9)));
        assert_eq!(meter.position().percent(), Some(10));
    }

    #[test]
    fn the_rate_covers_a_window_and_memory_is_bounded() {
        let start = Instant::now();
        let mut meter = Meter::default();
        // 100 bytes in the first second, then one byte a second, in events of a millisecond each.
        meter.update(&progress(0), start);
        meter.update(&progress(100), start + Duration::from_secs(1));
        for ms in 0..30_000u64 {
            meter.update(&progress(100 + ms / 1000), start + Duration::from_millis(1000 + ms));
            assert!(meter.samples.len() <= SAMPLE_COUNT_MAX * 2 + 4, "{}", meter.samples.len());
        }
        assert!(meter.rate().unwrap() <= Bytes(2), "{:?}", meter.rate());
    }

    #[test]
    fn empty_totals_do_not_divide() {
        let mut meter = Meter::default();
        meter.update(&Event::Phase { phase: Phase::Originals, total: Some(Bytes(0)) }, Instant::now());
        assert_eq!((meter.position().percent(), meter.left()), (None, None));
    }

    #[test]
    fn events_are_kept_and_shown_as_text() {
        let now = Instant::now();
        let mut meter = Meter::default();
        assert!(meter.segments().is_none() && meter.released().is_none() && meter.latency().is_none());
        let segments = Some(SegmentCount { done: 3, total: 8 });
        meter.update(&Event::Progress { phase: Phase::Data, done: Bytes(1), total: None, segments }, now);
        assert_eq!(meter.segments(), segments);
        meter.update(
            &Event::Regions {
                released: 5,
                total: 16,
                released_bytes: Bytes::gib(5),
                stall: Duration::from_millis(1),
                longest_stall: Duration::from_micros(12_345),
            },
            now,
        );
        assert_eq!(
            released_text(meter.released().unwrap()),
            "5 of 16 regions released, longest stall 12.3 ms"
        );
        let (origin, baseline) = (Some(Duration::from_micros(1234)), Some(Duration::from_micros(820)));
        for (origin, baseline, rate, text) in [
            (
                origin,
                baseline,
                Some(Bytes::mib(100)),
                "origin 1.2 ms per I/O (820 us without the copier), copier at most 100 MiB/s",
            ),
            (origin, None, None, "origin 1.2 ms per I/O"),
            (None, baseline, None, "origin idle"),
        ] {
            meter.update(&Event::Latency { origin, baseline, rate }, now);
            assert_eq!(origin_text(meter.latency().unwrap()), text);
        }
        let fill = StoreFill {
            used_bytes: Bytes::mib(12),
            total_bytes: Bytes::gib(1),
            ram_used_bytes: Bytes::mib(4),
            disk_used_bytes: Bytes::mib(8),
            exceptions: 3012,
            exceptions_per_second: 40,
            ..StoreFill::default()
        };
        assert_eq!(store_text(&fill), "store 12 MiB of 1 GiB (RAM 4 MiB, disk 8 MiB), 3012 exceptions, 40/s");
        meter.update(&Event::Phase { phase: Phase::Originals, total: None }, now);
        assert_eq!(meter.segments(), None, "only the data phase has segments");
        assert!(meter.released().is_some(), "releases are kept");
    }

    #[test]
    fn a_view_is_shown_as_the_copy_itself_shows_it() {
        let golden = include_bytes!("../format/state/golden/progress-v1.json");
        let mut view = ProgressView::decode(golden).unwrap();
        assert_eq!(
            view_texts(&view),
            [
                "copying: 20 MiB of 100 MiB (20%), 10 MiB/s, 8 s left, 20 of 100 segments",
                "store 12 MiB of 1 GiB (RAM 4 MiB, disk 8 MiB), 3012 exceptions, 40/s",
                "1 of 5 regions released, longest stall 1.5 ms",
                "origin 1.2 ms per I/O, copier at most 50 MiB/s",
            ]
        );
        view = ProgressView { phase: "another".to_owned(), ..ProgressView::default() };
        assert_eq!(view_texts(&view), ["working: 0 B"]);
        view.phase = "originals".to_owned();
        assert_eq!(view_texts(&view), ["originals: 0 B"]);
    }

    #[test]
    fn times_read_well() {
        for (seconds, text) in [(0, "0 s"), (61, "1 min 1 s"), (7800, "2 h 10 min")] {
            assert_eq!(duration_text(Duration::from_secs(seconds)), text);
        }
        for (micros, text) in [
            (0, "0 us"),
            (999, "999 us"),
            (1_000, "1.0 ms"),
            (99_999, "99.9 ms"),
            (340_500, "340 ms"),
            (2_549_000, "2.5 s"),
        ] {
            assert_eq!(latency_text(Duration::from_micros(micros)), text);
        }
    }
}
