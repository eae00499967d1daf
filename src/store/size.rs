//! Computes how large a store must be, now and at most. Pure arithmetic, no I/O.
//!
//! Invariants: sizes are multiples of [`STORE_UNIT`]. A growth never exceeds the largest size. The worst case
//! is exact: a store of that size cannot fill up, whatever is written to the origin. The default RAM head is
//! at most a [`HEAD_SHARE`]-th of the memory that is available without swapping, and at most
//! [`HEAD_DEFAULT_MAX`].

use std::time::Duration;

use crate::base::{Bytes, ChunkSize, Error, Result};

/// Granularity of every part of a store: a multiple of every chunk and of every logical block.
pub const STORE_UNIT: Bytes = Bytes::mib(1);

/// Smallest store: the writes of an idle filesystem alone would fill a smaller one.
pub const STORE_BYTES_MIN: Bytes = Bytes::mib(4);

/// Smallest tail of a store with a RAM head.
pub const TAIL_BYTES_MIN: Bytes = Bytes::mib(1);

/// Smallest tail at creation (unless the worst case is smaller): what a busy server writes in the seconds
/// before the first growth.
pub const TAIL_FIRST_MIN: Bytes = Bytes::mib(256);

/// Tail at creation for large origins: the origin's size divided by this.
pub const TAIL_FIRST_SHARE: u64 = 64;

/// A place with less space than this is refused (unless the worst case is smaller).
pub const TAIL_FIRST_REFUSED_BELOW: Bytes = Bytes::mib(16);

/// Most pieces of a tail: one more for each process that takes a store over and has to enlarge it.
pub const TAIL_COUNT_MAX: usize = 64;

/// Space that a default size or a growth never takes from the tail's filesystem: its size divided by this, at
/// most [`RESERVE_MAX`]. The store must not be what fills /var.
pub const RESERVE_SHARE: u64 = 20;
/// Largest reserve on the tail's filesystem.
pub const RESERVE_MAX: Bytes = Bytes::gib(1);

/// Default RAM head: the available memory divided by this.
pub const HEAD_SHARE: u64 = 16;
/// Largest default RAM head: all of it counts, since originals may be incompressible.
pub const HEAD_DEFAULT_MAX: Bytes = Bytes::mib(256);
/// Smallest default RAM head: a smaller one is not worth a device.
pub const HEAD_DEFAULT_MIN: Bytes = Bytes::mib(16);

/// The tail joins the head when the head's free space would last less than this.
pub const JOIN_LEAD: Duration = Duration::from_secs(2);
/// The tail joins when less than one part in this many of the head is free, however slow the filling: a
/// sudden burst must not fill the rest before the next sample.
pub const JOIN_SHARE: u64 = 2;
/// A head smaller than this is never used without its tail, for the same reason.
pub const HEAD_ALONE_MIN: Bytes = Bytes::mib(64);

/// Growth keeps free space for this time at the measured fill rate.
pub const GROWTH_LEAD: Duration = Duration::from_secs(15);
/// Free space kept in an idle store: a sudden burst must not fill it before the next sample.
pub const FREE_FLOOR: Bytes = Bytes::mib(64);
/// The same two for the store of a kept snapshot.
pub const KEPT_LEAD: Duration = Duration::from_secs(30);
/// Free space kept in it, if its filesystem has that much.
pub const KEPT_FREE_FLOOR: Bytes = Bytes::gib(1);
/// Smallest growth: each one pauses the store's writes for milliseconds.
pub const GROWTH_STEP_MIN: Bytes = Bytes::mib(128);

/// A store that cannot grow is short when its free space would last less than this: time for a sample and for
/// the suspension of the origin.
pub const SHORT_LEAD: Duration = Duration::from_millis(500);
/// A store is also short, however slow the filling, when it has less than one free chunk for each of this
/// many writes that may come before the next sample...
pub const SHORT_CHUNKS: u64 = 256;
/// ...but at most one part in this many of the store, so that small stores and large chunks leave some to be
/// used.
pub const SHORT_SHARE: u64 = 8;
/// It is sampled more often when its free space is less than this many times the limit.
pub const SHORT_NEAR: u64 = 4;

/// Part of a measured fill rate that is left after [`RATE_DECAY_TIME`] without writes; a rise counts at once.
const RATE_DECAY: f64 = 0.9;
/// Time in which a fill rate falls to [`RATE_DECAY`] of its value.
const RATE_DECAY_TIME: Duration = Duration::from_millis(100);

/// Entries of 16 bytes in a metadata area of one chunk.
fn entries_per_area(chunk: ChunkSize) -> u64 {
    chunk.bytes().get() / 16
}

/// What a store needs if every chunk of the origin is preserved: the header chunk, a metadata chunk for each
/// area begun (the kernel zeroes the next area when it fills one, so a full last area needs one more), and a
/// chunk for each original; rounded up to [`STORE_UNIT`].
///
/// # Errors
/// [`ErrorKind::Usage`](crate::base::ErrorKind::Usage) for an origin too large for 64 bits.
pub fn worst_case(origin: Bytes, chunk: ChunkSize) -> Result<Bytes> {
    let chunks = chunk.count_for(origin);
    let areas = chunks / entries_per_area(chunk) + 1;
    chunks
        .checked_add(areas)
        .and_then(|sum| sum.checked_add(1))
        .and_then(|sum| sum.checked_mul(chunk.bytes().get()))
        .filter(|bytes| *bytes < 1 << 62)
        .map(|bytes| Bytes(bytes).align_up(STORE_UNIT).max(STORE_BYTES_MIN))
        .ok_or_else(|| Error::usage(format!("an origin of {origin} is too large for chunks of {chunk}")))
}

/// The smallest store that works with this chunk: header, area, next area and a few originals.
#[must_use]
pub fn smallest(chunk: ChunkSize) -> Bytes {
    (chunk.bytes() * 8).max(STORE_BYTES_MIN)
}

/// The default RAM head for `available` bytes of memory; zero if that is too little.
#[must_use]
pub fn head_default(available: Bytes) -> Bytes {
    let share = Bytes(available.get() / HEAD_SHARE).min(HEAD_DEFAULT_MAX).align_down(STORE_UNIT);
    if share < HEAD_DEFAULT_MIN { Bytes::ZERO } else { share }
}

/// Space that must stay free on a filesystem of `size` bytes.
#[must_use]
pub fn reserve(size: Bytes) -> Bytes {
    Bytes(size.get() / RESERVE_SHARE).min(RESERVE_MAX)
}

/// The first tail for an origin of `origin` bytes, at most `limit` bytes.
#[must_use]
pub fn first_tail(origin: Bytes, limit: Bytes) -> Bytes {
    Bytes(origin.get() / TAIL_FIRST_SHARE).max(TAIL_FIRST_MIN).align_up(STORE_UNIT).min(limit)
}

/// How fast a store fills. A rise counts at once, a fall slowly, so that a pause in a burst does not stop the
/// growth ahead of it.
#[derive(Clone, Copy, Debug, Default)]
pub struct FillRate {
    last: Option<(Duration, Bytes)>,
    bytes_per_second: f64,
}

impl FillRate {
    /// Adds a sample: `used` bytes were in use at `at` (from any fixed moment).
    pub fn observe(&mut self, at: Duration, used: Bytes) {
        if let Some((last_at, last_used)) = self.last {
            let seconds = at.saturating_sub(last_at).as_secs_f64();
            if seconds <= 0.0 {
                return;
            }
            let now = approximate(used.saturating_sub(last_used)) / seconds;
            self.bytes_per_second = if now > self.bytes_per_second {
                now
            } else {
                let kept = RATE_DECAY.powf(seconds / RATE_DECAY_TIME.as_secs_f64());
                now + (self.bytes_per_second - now) * kept
            };
        }
        self.last = Some((at, used));
    }

    /// How much is filled in `time` at this rate.
    #[must_use]
    pub fn over(&self, time: Duration) -> Bytes {
        whole(self.bytes_per_second * time.as_secs_f64())
    }

    /// Bytes per second.
    #[must_use]
    pub fn per_second(&self) -> u64 {
        whole(self.bytes_per_second).get()
    }
}

/// Exact up to 2^53, above that 53 significant bits: enough for a rate.
fn approximate(bytes: Bytes) -> f64 {
    let (high, low) = (bytes.get() >> 32, bytes.get() & 0xffff_ffff);
    f64::from(u32::try_from(high).unwrap_or(u32::MAX)) * 4_294_967_296.0
        + f64::from(u32::try_from(low).unwrap_or(u32::MAX))
}

/// The whole bytes of a rate: zero for what is no size, at most the largest size.
fn whole(value: f64) -> Bytes {
    let duration = Duration::try_from_secs_f64(value.clamp(0.0, 4e18)).unwrap_or(Duration::ZERO);
    Bytes(duration.as_secs())
}

/// True if the tail should join a store that is only its head so far.
#[must_use]
pub fn should_join(head: Bytes, used: Bytes, rate: &FillRate) -> bool {
    let free = head.saturating_sub(used);
    head < HEAD_ALONE_MIN || free < Bytes(head.get() / JOIN_SHARE) || free < rate.over(JOIN_LEAD)
}

/// The size to which a store of `total` bytes (head and tail) should grow now; None if it has enough free
/// space or has its largest size.
#[must_use]
pub fn next_total(total: Bytes, used: Bytes, total_max: Bytes, rate: &FillRate) -> Option<Bytes> {
    let ahead = rate.over(GROWTH_LEAD).max(FREE_FLOOR);
    if total >= total_max || total.saturating_sub(used) >= ahead {
        return None;
    }
    // Twice the free space wanted, so that a steady rate causes one growth per lead time, not one per sample.
    let step = Bytes(ahead.get().saturating_mul(2)).max(GROWTH_STEP_MIN);
    let wanted = Bytes(total.get().saturating_add(step.get()).min(total_max.get()));
    let next = wanted.align_down(STORE_UNIT);
    (next > total).then_some(next)
}

/// A store of `total` bytes that cannot grow is short if less than this is free.
/// As [`next_total`], for a store whose writers cannot be held: much more free space, so that no burst between two looks
/// fills it.
#[must_use]
pub fn next_kept_total(total: Bytes, used: Bytes, total_max: Bytes, rate: &FillRate) -> Option<Bytes> {
    let ahead = rate.over(KEPT_LEAD).max(KEPT_FREE_FLOOR);
    if total >= total_max || total.saturating_sub(used) >= ahead {
        return None;
    }
    let wanted =
        Bytes(used.get().saturating_add(ahead.get()).saturating_add(ahead.get() / 2).min(total_max.get()));
    let next = wanted.align_down(STORE_UNIT);
    (next > total).then_some(next)
}

fn short_below(total: Bytes, chunk: ChunkSize, rate: &FillRate) -> Bytes {
    let floor = (chunk.bytes() * SHORT_CHUNKS).min(Bytes(total.get() / SHORT_SHARE));
    rate.over(SHORT_LEAD).max(floor)
}

/// True if a store of `total` bytes that cannot grow will soon be full: its free space would not last
/// [`SHORT_LEAD`], or is less than writes in flight may need.
#[must_use]
pub fn is_short(total: Bytes, used: Bytes, chunk: ChunkSize, rate: &FillRate) -> bool {
    total.saturating_sub(used) < short_below(total, chunk, rate)
}

/// True if that is near, so that more frequent samples are worth while.
#[must_use]
pub fn is_nearly_short(total: Bytes, used: Bytes, chunk: ChunkSize, rate: &FillRate) -> bool {
    let near = short_below(total, chunk, rate).get().saturating_mul(SHORT_NEAR);
    total.saturating_sub(used) < Bytes(near)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The kernel's allocation, one original after another (`dm-snap-persistent.c`): everything up to the
    /// last original, and the zeroed next area.
    fn oracle_chunks(originals: u64, per_area: u64) -> u64 {
        let mut next_free = 2;
        for _ in 0..originals {
            next_free += 1;
            if next_free % (per_area + 1) == 1 {
                next_free += 1;
            }
        }
        next_free
    }

    proptest! {
        #[test]
        fn the_worst_case_is_what_the_kernel_would_use(chunks in 0u64..5000, shift in 12u32..15) {
            let chunk = ChunkSize::new(Bytes(1 << shift)).unwrap();
            let exact = oracle_chunks(chunks, entries_per_area(chunk)) * chunk.bytes().get();
            let have = worst_case(chunk.bytes() * chunks, chunk).unwrap();
            prop_assert!(have.get() >= exact);
            prop_assert!(have == STORE_BYTES_MIN || have.get() < exact + STORE_UNIT.get());
        }

        /// At any rate: a store that is not short has room for that rate and for the writes in flight, a
        /// short one also counts as nearly short, and one with nothing free is short.
        #[test]
        fn a_store_is_short_in_time(
            total in 1u64..1 << 40, free in 0u64..1 << 40, rate in 0u64..1 << 34,
            bits in (0u32..40, 0u32..40, 0u32..34), shift in 12u32..21
        ) {
            // Every order of magnitude of each, as their ratio matters.
            let (total, free, rate) = ((total >> bits.0).max(1), free >> bits.1, rate >> bits.2);
            let (total, chunk) = (Bytes(total), ChunkSize::new(Bytes(1 << shift)).unwrap());
            let used = total.saturating_sub(Bytes(free));
            let mut fill = FillRate::default();
            fill.observe(Duration::ZERO, Bytes::ZERO);
            fill.observe(Duration::from_secs(1), Bytes(rate));
            let free = total - used;
            let floor = (256 << shift).min(total.get() / 8);
            let expected = free.get() < floor || free.get() < rate / 2;
            prop_assert_eq!(is_short(total, used, chunk, &fill), expected);
            prop_assert!(!expected || is_nearly_short(total, used, chunk, &fill));
            prop_assert!(is_short(total, total, chunk, &fill) || total.get() < 8);
            prop_assert!(rate > 0 || !is_short(total, Bytes::ZERO, chunk, &fill));
        }

        #[test]
        fn the_default_head_is_never_more_than_its_share(available: u64) {
            let head = head_default(Bytes(available));
            prop_assert!(head.get() <= available / HEAD_SHARE && head <= HEAD_DEFAULT_MAX);
            prop_assert!(head == Bytes::ZERO || head >= HEAD_DEFAULT_MIN && head.is_aligned(STORE_UNIT));
        }

        #[test]
        fn growth_is_bounded_and_aligned(
            total in 1u64..1 << 20, used in 0u64..1 << 20, more in 0u64..1 << 20, rate in 0u64..1 << 40
        ) {
            let (total, used) = (STORE_UNIT * total, STORE_UNIT * used.min(total));
            let total_max = total + STORE_UNIT * more;
            let mut fill = FillRate::default();
            fill.observe(Duration::ZERO, Bytes::ZERO);
            fill.observe(Duration::from_secs(1), Bytes(rate));
            if let Some(next) = next_total(total, used, total_max, &fill) {
                prop_assert!(next > total && next <= total_max && next.is_aligned(STORE_UNIT));
            } else {
                prop_assert!(total == total_max || total - used >= fill.over(GROWTH_LEAD).max(FREE_FLOOR));
            }
        }
    }

    #[test]
    fn a_rise_counts_at_once_and_a_fall_slowly() {
        let mut rate = FillRate::default();
        rate.observe(Duration::from_millis(0), Bytes::ZERO);
        rate.observe(Duration::from_millis(100), Bytes::mib(10));
        assert_eq!(rate.per_second(), Bytes::mib(100).get());
        rate.observe(Duration::from_millis(200), Bytes::mib(10));
        assert_eq!(rate.per_second(), Bytes::mib(90).get());
        // More frequent samples do not make the rate fall faster.
        let mut often = rate;
        for at in 21..=30 {
            often.observe(Duration::from_millis(at * 10), Bytes::mib(10));
        }
        rate.observe(Duration::from_millis(300), Bytes::mib(10));
        assert!(often.per_second().abs_diff(rate.per_second()) < 1000, "{often:?} {rate:?}");
        let mut rate = often;
        rate.bytes_per_second = approximate(Bytes::mib(90));
        rate.last = Some((Duration::from_millis(200), Bytes::mib(10)));
        // A second sample at the same time is ignored.
        rate.observe(Duration::from_millis(200), Bytes::mib(20));
        assert_eq!(rate.per_second(), Bytes::mib(90).get());
    }

    #[test]
    fn the_tail_joins_in_time() {
        let head = Bytes::mib(256);
        let mut rate = FillRate::default();
        assert!(!should_join(head, Bytes::mib(100), &rate));
        assert!(should_join(head, Bytes::mib(140), &rate));
        assert!(should_join(Bytes::mib(32), Bytes::ZERO, &rate));
        rate.observe(Duration::ZERO, Bytes::ZERO);
        rate.observe(Duration::from_secs(1), Bytes::mib(100));
        assert!(should_join(head, Bytes::mib(100), &rate));
    }

    #[test]
    fn the_default_head_is_a_bounded_share() {
        assert_eq!(head_default(Bytes::mib(100)), Bytes::ZERO);
        assert_eq!(head_default(Bytes::mib(512)), Bytes::mib(32));
        assert_eq!(head_default(Bytes::gib(64)), HEAD_DEFAULT_MAX);
    }

    #[test]
    fn impossible_origins_are_refused() {
        assert!(worst_case(Bytes(u64::MAX), ChunkSize::default()).is_err());
    }
}
