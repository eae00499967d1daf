//! How long until the next read may begin? A token bucket for `--rate`. Pure: time is passed in.

use std::time::Duration;

use crate::base::Bytes;

/// Time whose worth of tokens may be saved up: short, so that a pause is not followed by a burst
/// that an application would feel.
const BURST: Duration = Duration::from_millis(250);

/// A token bucket; see the module's head.
#[derive(Clone, Copy, Debug)]
pub struct Throttle {
    bytes_per_second: Option<u64>,
    /// Tokens, in bytes; negative after a transfer larger than the bucket.
    tokens: f64,
    updated: Duration,
}

impl Throttle {
    /// At most `rate` bytes per second, or no limit.
    #[must_use]
    pub fn new(rate: Option<Bytes>) -> Self {
        Self { bytes_per_second: rate.map(|rate| rate.get().max(1)), tokens: 0.0, updated: Duration::ZERO }
    }

    /// Takes `bytes` out of the bucket at time `now` (since any fixed start) and answers None, or
    /// answers how long to wait and takes nothing.
    pub fn take(&mut self, bytes: Bytes, now: Duration) -> Option<Duration> {
        let rate = to_f64(self.bytes_per_second?);
        let elapsed = now.saturating_sub(self.updated);
        self.updated = now;
        self.tokens = (self.tokens + elapsed.as_secs_f64() * rate).min(rate * BURST.as_secs_f64());
        // A transfer may run the bucket into debt, which the next one waits for: so a transfer larger
        // than the bucket is possible, and the average holds.
        if self.tokens >= 0.0 {
            self.tokens -= to_f64(bytes.get());
            None
        } else {
            Some(Duration::from_secs_f64((-self.tokens / rate).clamp(0.0, 3600.0)))
        }
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

    #[test]
    fn the_average_is_the_rate() {
        let mut throttle = Throttle::new(Some(Bytes::mib(8)));
        let mut now = Duration::from_secs(5);
        let mut done = 0u32;
        let begin = now;
        while now < begin + Duration::from_secs(10) {
            match throttle.take(Bytes::mib(1), now) {
                None => done += 1,
                Some(wait) => now += wait + Duration::from_nanos(1),
            }
        }
        assert!((80..=84).contains(&done), "{done} MiB in 10 s at 8 MiB/s");
    }

    #[test]
    fn no_rate_never_waits() {
        let mut throttle = Throttle::new(None);
        assert_eq!(throttle.take(Bytes::gib(100), Duration::ZERO), None);
    }

    #[test]
    fn a_transfer_larger_than_the_bucket_is_paid_back() {
        let mut throttle = Throttle::new(Some(Bytes(1000)));
        assert_eq!(throttle.take(Bytes(10_000), Duration::ZERO), None);
        let wait = throttle.take(Bytes(1), Duration::from_secs(1)).unwrap();
        assert!((8.9..9.1).contains(&wait.as_secs_f64()));
    }
}
