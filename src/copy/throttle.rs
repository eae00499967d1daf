//! Decides how long the copier waits before its next read: a token bucket for `--rate`, and the limits of
//! `--impact`. Reads no clock: time is passed in.

use std::time::Duration;

use super::headroom::Headroom;
use super::impact::{Controller, Impact, ImpactWatch, TICK, TickInput};
use crate::base::Bytes;
use crate::progress::{Event, Observer};

/// Unused tokens are kept for this time at most: short, so that a pause is not followed by a burst that slows
/// down the applications.
const BURST: Duration = Duration::from_millis(250);

/// Time between two [`Event::Latency`].
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

    /// Sets another rate from `now` on; saved tokens and debt are kept.
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

    /// How long to wait; None if a transfer may begin.
    ///
    /// A transfer may take the bucket into debt, and the next one waits until the debt is paid. So a transfer
    /// larger than the bucket is possible, and the average is still the rate.
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

/// Limits the copier's reads.
pub struct Throttle<'a> {
    cap: Bucket,
    impact: Option<ImpactThrottle<'a>>,
}

impl<'a> Throttle<'a> {
    /// Limits reads to `rate` bytes per second, if given, and by the impact on the applications, if `watch`
    /// is given; reports the applications' latency to `observer`.
    #[must_use]
    pub fn new(rate: Option<Bytes>, watch: Option<ImpactWatch>, observer: &'a dyn Observer) -> Self {
        let impact = watch.map(|watch| ImpactThrottle::new(watch, observer));
        Self { cap: Bucket::new(rate), impact }
    }

    /// Most bytes of one request to the origin's disk; None if the applications are not spared.
    #[must_use]
    pub fn read_max(&self) -> Option<Bytes> {
        let watch = &self.impact.as_ref()?.watch;
        (watch.impact != Impact::None).then_some(watch.read_max)
    }

    /// Admits a read of `bytes` at time `now` (since any fixed start) and returns None; or admits nothing and
    /// returns how long to wait at most. `reads`: the reads in flight.
    pub fn admit(&mut self, bytes: Bytes, now: Duration, reads: usize) -> Option<Duration> {
        if let Some(impact) = &mut self.impact
            && let Some(wait) = impact.wait(now, Bytes::from_len(reads).get())
        {
            return Some(wait);
        }
        if let Some(wait) = self.cap.wait(now) {
            return Some(wait);
        }
        self.cap.spend(bytes);
        if let Some(impact) = &mut self.impact {
            impact.read_admitted(bytes, Bytes::from_len(reads).get());
        }
        None
    }

    /// An admitted read has completed at `now`; it took `latency`.
    pub fn done(&mut self, bytes: Bytes, latency: Duration, now: Duration) {
        if let Some(impact) = &mut self.impact {
            impact.headroom.read(bytes, latency, now);
        }
    }
}

/// The impact controller with its clock, its probe and its token buckets.
struct ImpactThrottle<'a> {
    watch: ImpactWatch,
    observer: &'a dyn Observer,
    /// Created at the first call: the copy's clock may have run for long by then.
    controller: Option<Controller>,
    ticked: Duration,
    reported: Option<Duration>,
    /// Enforces the controller's rate.
    impact_bucket: Bucket,
    /// Finds out from the copier's own reads when the disk is saturated, and the rate that leaves headroom
    /// then.
    headroom: Headroom,
    headroom_bucket: Bucket,
    /// Reads admitted, and their bytes; of those, the bytes reported to the controller.
    admitted_count: u64,
    admitted: Bytes,
    reported_bytes: Bytes,
    since: TickInput,
}

impl<'a> ImpactThrottle<'a> {
    fn new(watch: ImpactWatch, observer: &'a dyn Observer) -> Self {
        Self {
            watch,
            observer,
            controller: None,
            ticked: Duration::ZERO,
            reported: None,
            impact_bucket: Bucket::new(None),
            headroom: Headroom::default(),
            headroom_bucket: Bucket::new(None),
            admitted_count: 0,
            admitted: Bytes::ZERO,
            reported_bytes: Bytes::ZERO,
            since: TickInput::default(),
        }
    }

    fn wait(&mut self, now: Duration, reads: u64) -> Option<Duration> {
        let allowance = self.controller_at(now, reads).allowance();
        self.impact_bucket.set_rate(allowance.rate, now);
        self.headroom_bucket.set_rate(self.headroom.rate(now).filter(|_| !allowance.is_free()), now);
        let until_tick = (self.ticked + TICK).saturating_sub(now).max(Duration::from_millis(1));
        if reads >= allowance.reads {
            if allowance.reads == 0 {
                self.headroom.restart();
            }
            self.since.waited_for_slot = true;
            return Some(until_tick);
        }
        if let Some(wait) = self.headroom_bucket.wait(now) {
            return Some(wait.min(until_tick));
        }
        let wait = self.impact_bucket.wait(now)?;
        self.since.waited_for_rate = true;
        // The next tick may permit more.
        Some(wait.min(until_tick))
    }

    fn read_admitted(&mut self, bytes: Bytes, reads: u64) {
        self.impact_bucket.spend(bytes);
        self.headroom_bucket.spend(bytes);
        self.admitted += bytes;
        self.admitted_count += 1;
        self.since.reads_max = self.since.reads_max.max(reads + 1);
    }

    /// The controller, after the tick that is due.
    fn controller_at(&mut self, now: Duration, reads: u64) -> &Controller {
        let due = match &self.controller {
            Some(_) => now.saturating_sub(self.ticked) >= TICK,
            None => {
                // Drops what came before the first read.
                let _ = self.watch.probe.sample();
                self.ticked = now;
                false
            }
        };
        let new = || Controller::new(self.watch.impact, self.watch.before, now);
        let controller = self.controller.get_or_insert_with(new);
        if due {
            self.ticked = now;
            let each = self.admitted.get().checked_div(self.admitted_count).unwrap_or(0);
            let read = self.admitted.saturating_sub(Bytes(each) * reads).max(self.reported_bytes);
            let since = std::mem::take(&mut self.since);
            let sample = self.watch.probe.sample();
            controller.tick(&TickInput { now, sample, read: read - self.reported_bytes, reads, ..since });
            self.reported_bytes = read;
            let is_silent =
                self.reported.is_some_and(|reported| now.saturating_sub(reported) < LATENCY_EVENT_INTERVAL);
            if sample.is_some() && !is_silent {
                self.reported = Some(now);
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
            match throttle.admit(Bytes::mib(1), now, 0) {
                None => done += 1,
                Some(wait) => now += wait + Duration::from_nanos(1),
            }
        }
        assert!((80..=84).contains(&done), "{done} MiB in 10 s at 8 MiB/s");
    }

    #[test]
    fn no_rate_never_waits() {
        assert_eq!(capped(None).admit(Bytes::gib(100), Duration::ZERO, 1000), None);
    }

    #[test]
    fn a_transfer_larger_than_the_bucket_is_followed_by_a_longer_wait() {
        let mut throttle = capped(Some(Bytes(1000)));
        assert_eq!(throttle.admit(Bytes(10_000), Duration::ZERO, 0), None);
        let wait = throttle.admit(Bytes(1), Duration::from_secs(1), 0).unwrap();
        assert!((8.9..9.1).contains(&wait.as_secs_f64()));
    }

    #[test]
    fn a_changed_rate_applies_from_then_on() {
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
