//! At which rate does the copier leave the disk some air? Judged by what its own reads take.
//!
//! [`impact`](super::impact) looks at the applications, which takes tenths of a second for each step. A disk with a
//! bandwidth that is used up makes everybody wait, and that shows within milliseconds, in the copier's own reads: they
//! take longer for each byte than the fastest of late did. So time is cut into spans. Where the reads of a free span
//! show that the disk is saturated, what follows is paced at a part of the rate it had ([`PACED_PERCENT`]): the reads
//! come evenly, the disk is never used up, and an application's request finds room at once. After [`PACED_MAX`] the next
//! free span tells what the disk can do by then.
//!
//! The price is the rest of the rate in the paced time, an eighth of the copy's in all. It is paid as well where reads
//! take longer for another reason: because applications have the disk, or the processor. A stall makes a span's rate
//! low, so paced time is bounded by time, not by reads.
//!
//! Pure: time is passed in.

use std::time::Duration;

use crate::base::Bytes;

/// A span lasts at least so long: two and a half of the slices of 20 ms in which bandwidth is often handed out (by
/// `null_blk`, by cgroups, by clouds).
const SPAN_MIN: Duration = Duration::from_millis(50);

/// And has at least so many reads.
const READS_MIN: u32 = 4;

/// The disk is saturated where a byte takes on average at least so many percent of what it took at best.
const SATURATED_PERCENT: u128 = 150;

/// The rate of paced spans, of that of the free one before them.
const PACED_PERCENT: u64 = 85;

/// Paced time between two free spans, six times the shortest of these.
const PACED_MAX: Duration = Duration::from_millis(300);

/// Where no read is as fast as the fastest was, that one counts for less with each free span, by this part of it: it may
/// have been of the disk's cache.
const BEST_AGES_PARTS: u32 = 8;

/// See the module's head.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Pace {
    /// What a read of the largest size seen takes at best.
    best: Option<(Bytes, Duration)>,
    /// And what one of this span did.
    best_of_span: Option<Duration>,
    /// The span: its begin, what was read in it, in how many reads of the largest size, and what those took.
    begun: Option<Duration>,
    read: Bytes,
    reads: u32,
    waited: Duration,
    /// The rate, and until when.
    paced: Option<(Bytes, Duration)>,
}

impl Pace {
    /// Bytes per second at most, at `now`; None: no limit.
    pub(super) fn rate(&mut self, now: Duration) -> Option<Bytes> {
        if self.paced.is_some_and(|(_, until)| now >= until) {
            self.interrupted();
        }
        self.paced.map(|(rate, _)| rate)
    }

    /// A read of `bytes` is done at `now`; it took `latency`.
    pub(super) fn read(&mut self, bytes: Bytes, latency: Duration, now: Duration) {
        if self.rate(now).is_some() {
            return;
        }
        let begun = *self.begun.get_or_insert(now.saturating_sub(latency));
        self.read += bytes;
        // Latencies are compared of reads of one size only.
        match &mut self.best {
            Some((size, best)) if bytes == *size => {
                *best = latency.min(*best);
                self.best_of_span = Some(self.best_of_span.map_or(latency, |it| it.min(latency)));
                self.reads += 1;
                self.waited += latency;
            }
            Some((size, _)) if bytes < *size => {}
            best => {
                *best = Some((bytes, latency));
                self.best_of_span = Some(latency);
                (self.reads, self.waited) = (1, latency);
            }
        }
        let span = now.saturating_sub(begun);
        if span >= SPAN_MIN && self.reads >= READS_MIN {
            let paced = self.is_saturated().then(|| (self.rate_of(span), now + PACED_MAX));
            if let (Some((_, best)), Some(of_span)) = (&mut self.best, self.best_of_span) {
                *best = of_span.min(*best + *best / BEST_AGES_PARTS);
            }
            self.interrupted();
            self.paced = paced;
        }
    }

    /// A free span begins, whatever was before: the copier was stopped for another reason, for one.
    pub(super) fn interrupted(&mut self) {
        (self.begun, self.read, self.reads, self.waited) = (None, Bytes::ZERO, 0, Duration::ZERO);
        (self.best_of_span, self.paced) = (None, None);
    }

    fn is_saturated(&self) -> bool {
        let Some((_, best)) = self.best else { return false };
        self.waited.as_nanos() * 100 >= best.as_nanos() * u128::from(self.reads) * SATURATED_PERCENT
    }

    fn rate_of(&self, span: Duration) -> Bytes {
        let per_second = u128::from(self.read.get()) * 1_000_000_000 / span.as_nanos().max(1);
        let paced = per_second * u128::from(PACED_PERCENT) / 100;
        Bytes(u64::try_from(paced).unwrap_or(u64::MAX).max(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const READ: Bytes = Bytes::mib(1);

    /// Reads one after the other, each of which takes `latency(number)`; the rates seen, in MiB per second.
    fn play(pace: &mut Pace, begin: Duration, count: u32, latency: impl Fn(u32) -> u64) -> Vec<Option<u64>> {
        let mut now = begin;
        (0..count)
            .map(|number| {
                let took = Duration::from_micros(latency(number));
                now += took;
                pace.read(READ, took, now);
                pace.rate(now).map(|rate| rate.get() >> 20)
            })
            .collect()
    }

    #[test]
    fn a_disk_that_reads_do_not_saturate_is_not_paced() {
        let rates =
            play(&mut Pace::default(), Duration::ZERO, 1000, |number| 1000 + u64::from(number % 3) * 100);
        assert!(rates.iter().all(Option::is_none));
    }

    #[test]
    fn a_saturated_disk_is_left_some_air_and_tried_anew() {
        // Every fifth read waits for the bandwidth: 2 ms on average, 1 ms at best.
        let mut pace = Pace::default();
        let rates = play(&mut pace, Duration::ZERO, 400, |number| if number % 5 == 4 { 6000 } else { 1000 });
        assert!(rates[..20].iter().all(Option::is_none), "a span comes first");
        let paced: Vec<u64> = rates.iter().flatten().copied().collect();
        // 500 MiB/s were read.
        assert!(paced.iter().all(|rate| (390..=460).contains(rate)), "{paced:?}");
        let free = rates.len() - paced.len();
        assert!((rates.len() / 8..rates.len() / 4).contains(&free), "{free} of {}", rates.len());
    }

    #[test]
    fn a_small_read_is_no_fast_one() {
        let mut pace = Pace::default();
        for number in 1..=2000_u32 {
            let now = Duration::from_millis(u64::from(number));
            let (bytes, took) = if number % 2 == 0 { (READ, 1000) } else { (Bytes::kib(4), 50) };
            pace.read(bytes, Duration::from_micros(took), now);
            assert_eq!(pace.rate(now), None);
        }
    }

    #[test]
    fn a_span_that_was_interrupted_says_nothing() {
        let mut pace = Pace::default();
        play(&mut pace, Duration::ZERO, 30, |_| 1000);
        pace.interrupted();
        for number in 0..100 {
            play(&mut pace, Duration::from_secs(number), 3, |_| 20_000);
            pace.interrupted();
        }
        assert_eq!(pace.rate(Duration::from_secs(100)), None);
    }

    #[test]
    fn after_a_stall_the_copier_does_not_crawl() {
        let mut pace = Pace::default();
        play(&mut pace, Duration::ZERO, 40, |_| 1000);
        // One read of ten seconds: the span's rate is next to nothing.
        let now = Duration::from_secs(20);
        for number in 0..10 {
            pace.read(READ, Duration::from_secs(if number == 9 { 10 } else { 0 }), now);
        }
        assert!(pace.rate(now).is_some_and(|rate| rate < Bytes::mib(20)));
        assert_eq!(pace.rate(now + PACED_MAX), None, "whether anything was read meanwhile or not");
    }

    #[test]
    fn one_fast_read_does_not_count_for_ever() {
        let mut pace = Pace::default();
        play(&mut pace, Duration::ZERO, 1, |_| 100);
        let rates = play(&mut pace, Duration::from_secs(1), 9000, |_| 1000);
        assert!(rates.iter().flatten().count() > 0, "at first it looks saturated");
        assert!(rates[8000..].iter().all(Option::is_none));
    }
}
