//! How long until the next read may begin? A token bucket for `--rate`, and beneath it what `--impact`
//! leaves the copier. Reads no clock: time is passed in.

use std::time::Duration;

use super::impact::{Controller, Impact, ImpactWatch, Moment, TICK};
use super::pace::Pace;
use crate::base::Bytes;
use crate::progress::{Event, Observer};

/// Time whose worth of tokens may be saved up: short, so that a pause is not followed by a burst
/// that an application would feel.
const BURST: Duration = Duration::from_millis(250);

/// Between two [`Event::Latency`].
const LATENCY_EVENT_INTERVAL: Duration = Duration::from_millis(500);

/// A token bucket.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    bytes_per_second: Option<u64>,
    /// Tokens, in bytes; negative after a transfer larger than the bucket.
    tokens: f64,
    updated: Duration,
}

impl Bucket {
    fn new(rate: Option<Bytes>) -> Self {
        Self { bytes_per_second: rate.map(|rate| rate.get().max(1)), tokens: 0.0, updated: Duration::ZERO }
    }

    /// Another rate from `now` on; what was saved or is owed stays.
    fn set_rate(&mut self, rate: Option<Bytes>, now: Duration) {
        let rate = rate.map(|rate| rate.get().max(1));
        if rate == self.bytes_per_second {
            return;
        }
        self.fill(now);
        if rate.is_none() {
            self.tokens = 0.0;
        }
        self.bytes_per_second = rate;
    }

    fn fill(&mut self, now: Duration) {
        let elapsed = now.saturating_sub(self.updated);
        self.updated = now;
        if let Some(rate) = self.bytes_per_second.map(to_f64) {
            self.tokens = (self.tokens + elapsed.as_secs_f64() * rate).min(rate * BURST.as_secs_f64());
        }
    }

    /// How long to wait; None where a transfer may begin.
    ///
    /// A transfer may run the bucket into debt, which the next one waits for: so a transfer larger than
    /// the bucket is possible, and the average holds.
    fn wait(&mut self, now: Duration) -> Option<Duration> {
        self.fill(now);
        let rate = to_f64(self.bytes_per_second?);
        (self.tokens < 0.0).then(|| Duration::from_secs_f64((-self.tokens / rate).clamp(1e-6, 3600.0)))
    }

    fn spend(&mut self, bytes: Bytes) {
        if self.bytes_per_second.is_some() {
            self.tokens -= to_f64(bytes.get());
        }
    }
}

/// See the module's head.
pub struct Throttle<'a> {
    cap: Bucket,
    giving_way: Option<GivingWay<'a>>,
}

impl<'a> Throttle<'a> {
    /// At most `rate` bytes per second, or no limit; gives way as `watch` has it, and tells `observer`
    /// how the applications fare.
    #[must_use]
    pub fn new(rate: Option<Bytes>, watch: Option<ImpactWatch>, observer: &'a dyn Observer) -> Self {
        let giving_way = watch.map(|watch| GivingWay::new(watch, observer));
        Self { cap: Bucket::new(rate), giving_way }
    }

    /// What the origin's disk may be asked for at once; None where no applications are given way to.
    #[must_use]
    pub fn read_max(&self) -> Option<Bytes> {
        let watch = &self.giving_way.as_ref()?.watch;
        (watch.impact != Impact::None).then_some(watch.read_max)
    }

    /// Lets a read of `bytes` begin at time `now` (since any fixed start) and answers None, or answers
    /// how long to wait at most and lets nothing begin. `reads`: how many are in flight.
    pub fn take(&mut self, bytes: Bytes, now: Duration, reads: usize) -> Option<Duration> {
        if let Some(giving_way) = &mut self.giving_way
            && let Some(wait) = giving_way.wait(now, Bytes::from_len(reads).get())
        {
            return Some(wait);
        }
        if let Some(wait) = self.cap.wait(now) {
            return Some(wait);
        }
        self.cap.spend(bytes);
        if let Some(giving_way) = &mut self.giving_way {
            giving_way.begun(bytes, Bytes::from_len(reads).get());
        }
        None
    }

    /// A read that was let begin is done at `now`; it took `latency`.
    pub fn done(&mut self, bytes: Bytes, latency: Duration, now: Duration) {
        if let Some(giving_way) = &mut self.giving_way {
            giving_way.own.read(bytes, latency, now);
        }
    }
}

/// The controller, its clock and its senses.
struct GivingWay<'a> {
    watch: ImpactWatch,
    observer: &'a dyn Observer,
    /// Made at the first call: the copy's clock may have run for long by then.
    controller: Option<Controller>,
    ticked: Duration,
    told: Option<Duration>,
    /// What the controller allows.
    pace: Bucket,
    /// What the copier's own reads tell, and what it allows by that.
    own: Pace,
    own_pace: Bucket,
    /// Reads begun, and their bytes; of those, bytes told to the controller as read.
    begun_count: u64,
    begun: Bytes,
    told_read: Bytes,
    since: Moment,
}

impl<'a> GivingWay<'a> {
    fn new(watch: ImpactWatch, observer: &'a dyn Observer) -> Self {
        Self {
            watch,
            observer,
            controller: None,
            ticked: Duration::ZERO,
            told: None,
            pace: Bucket::new(None),
            own: Pace::default(),
            own_pace: Bucket::new(None),
            begun_count: 0,
            begun: Bytes::ZERO,
            told_read: Bytes::ZERO,
            since: Moment::default(),
        }
    }

    fn wait(&mut self, now: Duration, reads: u64) -> Option<Duration> {
        let allowance = self.controller_at(now, reads).allowance();
        self.pace.set_rate(allowance.rate, now);
        self.own_pace.set_rate(self.own.rate(now).filter(|_| !allowance.is_free()), now);
        let until_tick = (self.ticked + TICK).saturating_sub(now).max(Duration::from_millis(1));
        if reads >= allowance.reads {
            if allowance.reads == 0 {
                self.own.interrupted();
            }
            self.since.lacked_slot = true;
            return Some(until_tick);
        }
        if let Some(wait) = self.own_pace.wait(now) {
            return Some(wait.min(until_tick));
        }
        let wait = self.pace.wait(now)?;
        self.since.lacked_rate = true;
        // The next tick may allow more.
        Some(wait.min(until_tick))
    }

    fn begun(&mut self, bytes: Bytes, reads: u64) {
        self.pace.spend(bytes);
        self.own_pace.spend(bytes);
        self.begun += bytes;
        self.begun_count += 1;
        self.since.reads_max = self.since.reads_max.max(reads + 1);
    }

    /// The controller, after the tick that is due.
    fn controller_at(&mut self, now: Duration, reads: u64) -> &Controller {
        let due = match &self.controller {
            Some(_) => now.saturating_sub(self.ticked) >= TICK,
            None => {
                // What came before the first read is no part of it.
                let _ = self.watch.probe.sample();
                self.ticked = now;
                false
            }
        };
        let new = || Controller::new(self.watch.impact, self.watch.before, now);
        let controller = self.controller.get_or_insert_with(new);
        if due {
            self.ticked = now;
            let each = self.begun.get().checked_div(self.begun_count).unwrap_or(0);
            let read = self.begun.saturating_sub(Bytes(each) * reads).max(self.told_read);
            let since = std::mem::take(&mut self.since);
            let sample = self.watch.probe.sample();
            controller.tick(&Moment { now, sample, read: read - self.told_read, reads, ..since });
            self.told_read = read;
            let is_silent = self.told.is_some_and(|told| now.saturating_sub(told) < LATENCY_EVENT_INTERVAL);
            if sample.is_some() && !is_silent {
                self.told = Some(now);
                let (origin, baseline) = controller.latency();
                self.observer.event(&Event::Latency { origin, baseline, rate: controller.allowance().rate });
            }
        }
        controller
    }
}

/// Precise to 2^-53 of the value, which is plenty for a rate.
fn to_f64(value: u64) -> f64 {
    let high = u32::try_from(value >> 32).expect("32 bits remain");
    let low = u32::try_from(value & 0xffff_ffff).expect("32 bits remain");
    f64::from(high) * 4_294_967_296.0 + f64::from(low)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::Silent;

    fn capped(rate: Option<Bytes>) -> Throttle<'static> {
        Throttle::new(rate, None, &Silent)
    }

    #[test]
    fn the_average_is_the_rate() {
        let mut throttle = capped(Some(Bytes::mib(8)));
        let mut now = Duration::from_secs(5);
        let mut done = 0u32;
        let begin = now;
        while now < begin + Duration::from_secs(10) {
            match throttle.take(Bytes::mib(1), now, 0) {
                None => done += 1,
                Some(wait) => now += wait + Duration::from_nanos(1),
            }
        }
        assert!((80..=84).contains(&done), "{done} MiB in 10 s at 8 MiB/s");
    }

    #[test]
    fn no_rate_never_waits() {
        assert_eq!(capped(None).take(Bytes::gib(100), Duration::ZERO, 1000), None);
    }

    #[test]
    fn a_transfer_larger_than_the_bucket_is_paid_back() {
        let mut throttle = capped(Some(Bytes(1000)));
        assert_eq!(throttle.take(Bytes(10_000), Duration::ZERO, 0), None);
        let wait = throttle.take(Bytes(1), Duration::from_secs(1), 0).unwrap();
        assert!((8.9..9.1).contains(&wait.as_secs_f64()));
    }

    #[test]
    fn a_changed_rate_holds_from_then_on() {
        let mut bucket = Bucket::new(Some(Bytes(1000)));
        bucket.spend(Bytes(1000));
        assert_eq!(bucket.wait(Duration::ZERO), Some(Duration::from_secs(1)));
        // Half of the debt is paid at the old rate, the rest takes ten times as long.
        bucket.set_rate(Some(Bytes(100)), Duration::from_millis(500));
        assert_eq!(bucket.wait(Duration::from_millis(500)), Some(Duration::from_secs(5)));
        bucket.set_rate(None, Duration::from_millis(600));
        assert_eq!(bucket.wait(Duration::from_millis(600)), None);
        bucket.set_rate(Some(Bytes(100)), Duration::from_secs(60));
        bucket.spend(Bytes(100));
        assert_eq!(
            bucket.wait(Duration::from_secs(60)),
            Some(Duration::from_secs(1)),
            "nothing was saved up"
        );
    }
}
