//! Keeps headroom on a disk that the copier's reads saturate.
//!
//! [`impact`](super::impact) measures the applications' latency, which takes tenths of a second for each
//! step. A disk whose bandwidth is used up delays every request, and the copier's own reads show that within
//! milliseconds: they take longer for each byte than the fastest recent read. So time is cut into spans. If
//! the reads of an unlimited span show that the disk is saturated, the following time is limited to a part of
//! the rate of that span ([`LIMITED_PERCENT`]): the reads are spread evenly, the bandwidth is never used up,
//! and an application's request is served at once. After [`LIMITED_MAX`] the next unlimited span measures the
//! disk again.
//!
//! The price is the rest of the rate in the limited time, an eighth of the copy's rate in total. It is also
//! paid if reads take longer for another reason: because the applications use the disk, or the processor.
//! A stall makes the rate of a span low, so the limited time is bounded by time and not by reads.
//!
//! Pure: time is passed in.

use std::time::Duration;

use crate::base::Bytes;

/// Shortest span: two and a half of the 20 ms slices in which bandwidth is often assigned (by `null_blk`, by
/// cgroups, by clouds).
const SPAN_MIN: Duration = Duration::from_millis(50);

/// Fewest reads in a span.
const READS_MIN: u32 = 4;

/// The disk is saturated if a byte takes on average at least this percentage of its shortest time.
const SATURATED_PERCENT: u128 = 150;

/// The rate of limited time, in percent of that of the unlimited span before it.
const LIMITED_PERCENT: u64 = 85;

/// Limited time between two unlimited spans, six times the shortest of these.
const LIMITED_MAX: Duration = Duration::from_millis(300);

/// If no read is as fast as the fastest, the recorded shortest time grows by this part of itself with each
/// unlimited span: that read may have been served from the disk's cache.
const SHORTEST_AGES_PARTS: u32 = 8;

/// Detects a saturated disk, and limits the rate for a while.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Headroom {
    /// The largest read size seen, and the shortest time that such a read took.
    shortest: Option<(Bytes, Duration)>,
    /// The shortest time of this span.
    shortest_of_span: Option<Duration>,
    /// The span: its beginning, the bytes read in it, its reads of the largest size, and the time that those
    /// took.
    begun: Option<Duration>,
    read: Bytes,
    reads: u32,
    waited: Duration,
    /// The limit, and when it ends.
    limit: Option<(Bytes, Duration)>,
}

impl Headroom {
    /// Most bytes per second at `now`; None: no limit.
    pub(super) fn rate(&mut self, now: Duration) -> Option<Bytes> {
        if self.limit.is_some_and(|(_, until)| now >= until) {
            self.restart();
        }
        self.limit.map(|(rate, _)| rate)
    }

    /// A read of `bytes` has completed at `now`; it took `latency`.
    pub(super) fn read(&mut self, bytes: Bytes, latency: Duration, now: Duration) {
        if self.rate(now).is_some() {
            return;
        }
        let begun = *self.begun.get_or_insert(now.saturating_sub(latency));
        self.read += bytes;
        // Only latencies of reads of the same size are compared.
        match &mut self.shortest {
            Some((size, shortest)) if bytes == *size => {
                *shortest = latency.min(*shortest);
                self.shortest_of_span = Some(self.shortest_of_span.map_or(latency, |it| it.min(latency)));
                self.reads += 1;
                self.waited += latency;
            }
            Some((size, _)) if bytes < *size => {}
            shortest => {
                *shortest = Some((bytes, latency));
                self.shortest_of_span = Some(latency);
                (self.reads, self.waited) = (1, latency);
            }
        }
        let span = now.saturating_sub(begun);
        if span >= SPAN_MIN && self.reads >= READS_MIN {
            let limit = self.is_saturated().then(|| (self.rate_of(span), now + LIMITED_MAX));
            if let (Some((_, shortest)), Some(of_span)) = (&mut self.shortest, self.shortest_of_span) {
                *shortest = of_span.min(*shortest + *shortest / SHORTEST_AGES_PARTS);
            }
            self.restart();
            self.limit = limit;
        }
    }

    /// Begins an unlimited span and drops the current one: for example after the copier was stopped for
    /// another reason.
    pub(super) fn restart(&mut self) {
        (self.begun, self.read, self.reads, self.waited) = (None, Bytes::ZERO, 0, Duration::ZERO);
        (self.shortest_of_span, self.limit) = (None, None);
    }

    fn is_saturated(&self) -> bool {
        let Some((_, shortest)) = self.shortest else { return false };
        self.waited.as_nanos() * 100 >= shortest.as_nanos() * u128::from(self.reads) * SATURATED_PERCENT
    }

    fn rate_of(&self, span: Duration) -> Bytes {
        let per_second = u128::from(self.read.get()) * 1_000_000_000 / span.as_nanos().max(1);
        let limit = per_second * u128::from(LIMITED_PERCENT) / 100;
        Bytes(u64::try_from(limit).unwrap_or(u64::MAX).max(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const READ: Bytes = Bytes::mib(1);

    /// Reads one after the other, each of which takes `latency(number)`; returns the limits after each, in
    /// MiB per second.
    fn play(
        headroom: &mut Headroom,
        begin: Duration,
        count: u32,
        latency: impl Fn(u32) -> u64,
    ) -> Vec<Option<u64>> {
        let mut now = begin;
        (0..count)
            .map(|number| {
                let took = Duration::from_micros(latency(number));
                now += took;
                headroom.read(READ, took, now);
                headroom.rate(now).map(|rate| rate.get() >> 20)
            })
            .collect()
    }

    #[test]
    fn a_disk_that_is_not_saturated_is_not_limited() {
        let rates =
            play(&mut Headroom::default(), Duration::ZERO, 1000, |number| 1000 + u64::from(number % 3) * 100);
        assert!(rates.iter().all(Option::is_none));
    }

    #[test]
    fn a_saturated_disk_is_limited_and_measured_again() {
        // Every fifth read waits for bandwidth: 2 ms on average, 1 ms at best.
        let mut headroom = Headroom::default();
        let rates =
            play(&mut headroom, Duration::ZERO, 400, |number| if number % 5 == 4 { 6000 } else { 1000 });
        assert!(rates[..20].iter().all(Option::is_none), "a span comes first");
        let limited: Vec<u64> = rates.iter().flatten().copied().collect();
        // The unlimited rate was 500 MiB/s.
        assert!(limited.iter().all(|rate| (390..=460).contains(rate)), "{limited:?}");
        let free = rates.len() - limited.len();
        assert!((rates.len() / 8..rates.len() / 4).contains(&free), "{free} of {}", rates.len());
    }

    #[test]
    fn a_small_read_does_not_count_as_fast() {
        let mut headroom = Headroom::default();
        for number in 1..=2000_u32 {
            let now = Duration::from_millis(u64::from(number));
            let (bytes, took) = if number % 2 == 0 { (READ, 1000) } else { (Bytes::kib(4), 50) };
            headroom.read(bytes, Duration::from_micros(took), now);
            assert_eq!(headroom.rate(now), None);
        }
    }

    #[test]
    fn an_interrupted_span_does_not_count() {
        let mut headroom = Headroom::default();
        play(&mut headroom, Duration::ZERO, 30, |_| 1000);
        headroom.restart();
        for number in 0..100 {
            play(&mut headroom, Duration::from_secs(number), 3, |_| 20_000);
            headroom.restart();
        }
        assert_eq!(headroom.rate(Duration::from_secs(100)), None);
    }

    #[test]
    fn after_a_stall_the_copier_does_not_crawl() {
        let mut headroom = Headroom::default();
        play(&mut headroom, Duration::ZERO, 40, |_| 1000);
        // One read of ten seconds: the rate of its span is almost zero.
        let now = Duration::from_secs(20);
        for number in 0..10 {
            headroom.read(READ, Duration::from_secs(if number == 9 { 10 } else { 0 }), now);
        }
        assert!(headroom.rate(now).is_some_and(|rate| rate < Bytes::mib(20)));
        assert_eq!(headroom.rate(now + LIMITED_MAX), None, "whether anything was read meanwhile or not");
    }

    #[test]
    fn one_fast_read_does_not_count_for_ever() {
        let mut headroom = Headroom::default();
        play(&mut headroom, Duration::ZERO, 1, |_| 100);
        let rates = play(&mut headroom, Duration::from_secs(1), 9000, |_| 1000);
        assert!(rates.iter().flatten().count() > 0, "at first it looks saturated");
        assert!(rates[8000..].iter().all(Option::is_none));
    }
}
