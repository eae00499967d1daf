//! How large must a store be, now and at most? Pure arithmetic, no I/O.
//!
//! Invariants: sizes are multiples of [`STORE_UNIT`]; a growth never exceeds the largest size; the
//! worst case is exact: a store of that size cannot fill up, whatever is written to the origin; the RAM
//! head that is taken by default is never more than a [`HEAD_SHARE`]-th of the memory that is available
//! without swapping, nor more than [`HEAD_DEFAULT_MAX`].

use std::time::Duration;

use crate::base::{Bytes, ChunkSize, Error, Result};

/// Granule of every part of a store: a multiple of every chunk and of every logical block.
pub const STORE_UNIT: Bytes = Bytes::mib(1);

/// Smallest store: below this even an idle filesystem's own writes would fill it.
pub const STORE_BYTES_MIN: Bytes = Bytes::mib(4);

/// Smallest tail beside a RAM head.
pub const TAIL_BYTES_MIN: Bytes = Bytes::mib(1);

/// The tail at creation, at least (where the worst case is not smaller): what a busy server writes
/// in the seconds before the first growth.
pub const TAIL_FIRST_MIN: Bytes = Bytes::mib(256);

/// The tail at creation for large origins: this part of the origin.
pub const TAIL_FIRST_SHARE: u64 = 64;

/// A tail that cannot have this much at once is refused (where the worst case is not smaller).
pub const TAIL_FIRST_REFUSED_BELOW: Bytes = Bytes::mib(16);

/// Most pieces of a tail: one more for each process that takes a store over and has to enlarge it.
pub const TAIL_COUNT_MAX: usize = 64;

/// Never taken from the tail's filesystem by default and by growth: this share of its size, at most
/// [`RESERVE_MAX`]. The store must not be what fills /var.
pub const RESERVE_SHARE: u64 = 20;
/// See [`RESERVE_SHARE`].
pub const RESERVE_MAX: Bytes = Bytes::gib(1);

/// The RAM head by default: this share of the memory available.
pub const HEAD_SHARE: u64 = 16;
/// The RAM head by default, at most: all of it counts, since originals may be incompressible.
pub const HEAD_DEFAULT_MAX: Bytes = Bytes::mib(256);
/// A head smaller than this by default is not worth a device.
pub const HEAD_DEFAULT_MIN: Bytes = Bytes::mib(16);

/// The tail joins the head when what is free in the head would last less than this.
pub const JOIN_LEAD: Duration = Duration::from_secs(2);
/// The tail joins when less than this part of the head is free, however slow the filling: a burst
/// from nothing must not fill the rest before the next look.
pub const JOIN_SHARE: u64 = 2;
/// A head smaller than this never goes without its tail, for the same reason.
pub const HEAD_ALONE_MIN: Bytes = Bytes::mib(64);

/// The store is kept ahead of the measured fill rate by this long.
pub const GROWTH_LEAD: Duration = Duration::from_secs(15);
/// Free space kept ahead of an idle store: a burst from nothing must survive until the next look.
pub const FREE_FLOOR: Bytes = Bytes::mib(64);
/// Smallest growth step: each costs a pause of milliseconds in the store's writes.
pub const GROWTH_STEP_MIN: Bytes = Bytes::mib(128);

/// A store that cannot grow is short when what is free in it would last less than this: time for a look
/// and for the suspension of the origin.
pub const SHORT_LEAD: Duration = Duration::from_millis(500);
/// Free space below which it is short however slow the filling: one chunk for each of this many writes
/// that may come before the next look...
pub const SHORT_CHUNKS: u64 = 256;
/// ...but at most this part of the store, so that small ones and large chunks leave some to be used.
pub const SHORT_SHARE: u64 = 8;
/// It is looked at more often when it has less than this many times what makes it short.
pub const SHORT_NEAR: u64 = 4;

/// What is kept of a measured fill rate in [`RATE_TIME`] when nothing is filled; a rise is believed at
/// once.
const RATE_KEPT: f64 = 0.9;
/// See [`RATE_KEPT`].
const RATE_TIME: Duration = Duration::from_millis(100);

/// Entries of 16 bytes in a metadata area of one chunk.
fn entries_per_area(chunk: ChunkSize) -> u64 {
    chunk.bytes().get() / 16
}

/// What a store needs when every chunk of the origin is preserved: the header chunk, a metadata
/// chunk for every area begun (the kernel zeroes the next area when it fills one, so a full last
/// area needs one more), and a chunk for each original; rounded up to [`STORE_UNIT`].
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

/// The RAM head to be had by default from `available` bytes of memory; zero where that is too little.
#[must_use]
pub fn head_default(available: Bytes) -> Bytes {
    let share = Bytes(available.get() / HEAD_SHARE).min(HEAD_DEFAULT_MAX).align_down(STORE_UNIT);
    if share < HEAD_DEFAULT_MIN { Bytes::ZERO } else { share }
}

/// What must stay free on a filesystem of `size` bytes.
#[must_use]
pub fn reserve(size: Bytes) -> Bytes {
    Bytes(size.get() / RESERVE_SHARE).min(RESERVE_MAX)
}

/// The tail to begin with for an origin of `origin` bytes, `limit` bytes at most.
#[must_use]
pub fn first_tail(origin: Bytes, limit: Bytes) -> Bytes {
    Bytes(origin.get() / TAIL_FIRST_SHARE).max(TAIL_FIRST_MIN).align_up(STORE_UNIT).min(limit)
}

/// How fast a store fills: rises are believed at once, falls slowly, so that a pause in a burst does
/// not stop the growth ahead of it.
#[derive(Clone, Copy, Debug, Default)]
pub struct FillRate {
    last: Option<(Duration, Bytes)>,
    bytes_per_second: f64,
}

impl FillRate {
    /// Takes a sample: at `at` (from any fixed moment) `used` bytes were in use.
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
                let kept = RATE_KEPT.powf(seconds / RATE_TIME.as_secs_f64());
                now + (self.bytes_per_second - now) * kept
            };
        }
        self.last = Some((at, used));
    }

    /// What is filled in `time` at this rate.
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

/// Sizes up to 2^53 exactly, above that to 53 bits: enough for a rate.
fn approximate(bytes: Bytes) -> f64 {
    let (high, low) = (bytes.get() >> 32, bytes.get() & 0xffff_ffff);
    f64::from(u32::try_from(high).unwrap_or(u32::MAX)) * 4_294_967_296.0
        + f64::from(u32::try_from(low).unwrap_or(u32::MAX))
}

/// The whole bytes of a rate; anything that is no size is none, anything too large the largest.
fn whole(value: f64) -> Bytes {
    let duration = Duration::try_from_secs_f64(value.clamp(0.0, 4e18)).unwrap_or(Duration::ZERO);
    Bytes(duration.as_secs())
}

/// True where the tail should join a store that is only its head yet.
#[must_use]
pub fn should_join(head: Bytes, used: Bytes, rate: &FillRate) -> bool {
    let free = head.saturating_sub(used);
    head < HEAD_ALONE_MIN || free < Bytes(head.get() / JOIN_SHARE) || free < rate.over(JOIN_LEAD)
}

/// The size that a store of `total` bytes (head and tail) should get now; None where it has enough
/// ahead of its use or is as large as it may be.
#[must_use]
pub fn next_total(total: Bytes, used: Bytes, total_max: Bytes, rate: &FillRate) -> Option<Bytes> {
    let ahead = rate.over(GROWTH_LEAD).max(FREE_FLOOR);
    if total >= total_max || total.saturating_sub(used) >= ahead {
        return None;
    }
    // Twice what is wanted ahead, so that a steady rate grows once per lead and not at every look.
    let step = Bytes(ahead.get().saturating_mul(2)).max(GROWTH_STEP_MIN);
    let wanted = Bytes(total.get().saturating_add(step.get()).min(total_max.get()));
    let next = wanted.align_down(STORE_UNIT);
    (next > total).then_some(next)
}

/// Free space of a store of `total` bytes below which it is short, if it cannot grow.
fn short_below(total: Bytes, chunk: ChunkSize, rate: &FillRate) -> Bytes {
    let floor = (chunk.bytes() * SHORT_CHUNKS).min(Bytes(total.get() / SHORT_SHARE));
    rate.over(SHORT_LEAD).max(floor)
}

/// True where a store of `total` bytes that cannot grow will soon be full: what is free would not last
/// [`SHORT_LEAD`], or is less than writes in flight may need.
#[must_use]
pub fn is_short(total: Bytes, used: Bytes, chunk: ChunkSize, rate: &FillRate) -> bool {
    total.saturating_sub(used) < short_below(total, chunk, rate)
}

/// True where that is near: it is worth looking more often.
#[must_use]
pub fn is_nearly_short(total: Bytes, used: Bytes, chunk: ChunkSize, rate: &FillRate) -> bool {
    let near = short_below(total, chunk, rate).get().saturating_mul(SHORT_NEAR);
    total.saturating_sub(used) < Bytes(near)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The kernel's allocation, one original after the other (`dm-snap-persistent.c`): what the last
    /// one and the zeroing of the next area need.
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

        /// Whatever the rate: a store that is not short has room for it and for the writes in flight, one
        /// that is was said to be near before, and one with nothing free is short.
        #[test]
        fn a_store_is_short_in_time(
            total in 1u64..1 << 40, free in 0u64..1 << 40, rate in 0u64..1 << 34,
            bits in (0u32..40, 0u32..40, 0u32..34), shift in 12u32..21
        ) {
            // Every order of magnitude of each, for it is their relation that counts.
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
    fn a_rise_is_believed_at_once_and_a_fall_slowly() {
        let mut rate = FillRate::default();
        rate.observe(Duration::from_millis(0), Bytes::ZERO);
        rate.observe(Duration::from_millis(100), Bytes::mib(10));
        assert_eq!(rate.per_second(), Bytes::mib(100).get());
        rate.observe(Duration::from_millis(200), Bytes::mib(10));
        assert_eq!(rate.per_second(), Bytes::mib(90).get());
        // Looking more often does not make it fall faster.
        let mut often = rate;
        for at in 21..=30 {
            often.observe(Duration::from_millis(at * 10), Bytes::mib(10));
        }
        rate.observe(Duration::from_millis(300), Bytes::mib(10));
        assert!(often.per_second().abs_diff(rate.per_second()) < 1000, "{often:?} {rate:?}");
        let mut rate = often;
        rate.bytes_per_second = approximate(Bytes::mib(90));
        rate.last = Some((Duration::from_millis(200), Bytes::mib(10)));
        // The same moment twice is no sample.
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
