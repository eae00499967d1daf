//! How far, how fast, how long still: the arithmetic between a copy's events and what is shown.
//!
//! Pure: the moment of each event is given by the caller.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::base::Bytes;
use crate::copy::progress::{Event, Phase, StoreFill};

/// The rate is measured over this much of the recent past: shorter jumps, longer lags.
const RATE_WINDOW: Duration = Duration::from_secs(10);

/// Samples kept for the rate; more frequent events replace the newest one.
const SAMPLE_COUNT_MAX: usize = 64;

/// What is known about a running copy.
#[derive(Debug, Default)]
pub struct Meter {
    phase: Option<Phase>,
    done: Bytes,
    total: Option<Bytes>,
    store: Option<StoreFill>,
    samples: VecDeque<(Instant, Bytes)>,
}

impl Meter {
    /// Takes an event in, at the moment it arrived.
    pub fn take(&mut self, event: &Event, now: Instant) {
        match event {
            Event::Phase { phase, total } => {
                self.phase = Some(*phase);
                self.done = Bytes::ZERO;
                self.total = *total;
                self.samples.clear();
                self.samples.push_back((now, Bytes::ZERO));
            }
            Event::Progress { phase, done, total } => {
                if self.phase != Some(*phase) {
                    self.take(&Event::Phase { phase: *phase, total: *total }, now);
                }
                self.done = *done;
                self.total = total.or(self.total);
                self.sample(now);
            }
            Event::Store(fill) => self.store = Some(*fill),
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

    /// Bytes of the phase done.
    #[must_use]
    pub fn done(&self) -> Bytes {
        self.done
    }

    /// Bytes of the phase in all, where known.
    #[must_use]
    pub fn total(&self) -> Option<Bytes> {
        self.total
    }

    /// The store, once heard of.
    #[must_use]
    pub fn store(&self) -> Option<&StoreFill> {
        self.store.as_ref()
    }

    /// Bytes per second over the recent past; None before two moments are known.
    #[must_use]
    pub fn rate(&self) -> Option<Bytes> {
        let (first, last) = (self.samples.front()?, self.samples.back()?);
        let millis = (last.0 - first.0).as_millis();
        let bytes = u128::from(last.1.saturating_sub(first.1).get());
        (bytes * 1000).checked_div(millis).and_then(|rate| u64::try_from(rate).ok()).map(Bytes)
    }

    /// Time left in the phase at this rate.
    #[must_use]
    pub fn left(&self) -> Option<Duration> {
        let missing = self.total?.saturating_sub(self.done).get();
        missing.checked_div(self.rate()?.get()).map(Duration::from_secs)
    }

    /// Whole percent of the phase, 100 only when all is done.
    #[must_use]
    pub fn percent(&self) -> Option<u64> {
        let total = u128::from(self.total?.get());
        (u128::from(self.done.get()) * 100).checked_div(total).and_then(|p| u64::try_from(p).ok())
    }
}

/// A phase in words.
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

/// "store 12 MiB of 1 GiB, 3012 exceptions".
#[must_use]
pub fn store_text(fill: &StoreFill) -> String {
    format!("store {} of {}, {} exceptions", fill.used_bytes, fill.total_bytes, fill.exceptions)
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
        Event::Progress { phase: Phase::Data, done: Bytes(done), total: Some(Bytes(1000)) }
    }

    #[test]
    fn rate_and_time_left() {
        let start = Instant::now();
        let mut meter = Meter::default();
        assert_eq!((meter.rate(), meter.left(), meter.percent()), (None, None, None));
        meter.take(&Event::Phase { phase: Phase::Data, total: Some(Bytes(1000)) }, start);
        assert_eq!(meter.rate(), None);
        meter.take(&progress(100), start + Duration::from_secs(1));
        assert_eq!(meter.rate(), Some(Bytes(100)));
        assert_eq!(meter.left(), Some(Duration::from_secs(9)));
        assert_eq!(meter.percent(), Some(10));
    }

    #[test]
    fn the_rate_forgets_and_memory_is_bounded() {
        let start = Instant::now();
        let mut meter = Meter::default();
        // 100 bytes in the first second, then one byte a second, in events of a millisecond each.
        meter.take(&progress(0), start);
        meter.take(&progress(100), start + Duration::from_secs(1));
        for ms in 0..30_000u64 {
            meter.take(&progress(100 + ms / 1000), start + Duration::from_millis(1000 + ms));
            assert!(meter.samples.len() <= SAMPLE_COUNT_MAX * 2 + 4, "{}", meter.samples.len());
        }
        assert!(meter.rate().unwrap() <= Bytes(2), "{:?}", meter.rate());
    }

    #[test]
    fn empty_totals_do_not_divide() {
        let mut meter = Meter::default();
        meter.take(&Event::Phase { phase: Phase::Originals, total: Some(Bytes(0)) }, Instant::now());
        assert_eq!((meter.percent(), meter.left()), (None, None));
    }

    #[test]
    fn times_read_well() {
        for (seconds, text) in [(0, "0 s"), (61, "1 min 1 s"), (7800, "2 h 10 min")] {
            assert_eq!(duration_text(Duration::from_secs(seconds)), text);
        }
    }
}
