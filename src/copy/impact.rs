//! The control law of `--impact`: how fast the copier may read without slowing down the applications.
//!
//! Pure: time and measurements are passed in; [`Throttle`](super::throttle::Throttle) applies the result. The
//! measurement is the mean latency of the reads and writes of the origin's own device. The copier reads below
//! that device, so its reads are not counted there; if they share a disk with the applications, they show
//! as higher latency of the applications.
//!
//! # The goal
//!
//! The goal is a multiple of the latency that the applications would have without the copier *now*: the
//! baseline. Until a baseline has been sampled, the latency before the instant takes its place, if there were
//! enough I/Os to measure it. That latency alone would mislead: after the instant the first write to a chunk
//! also waits until its original is preserved, at any rate of the copier, and the load may change. So from
//! time to time, and before it throttles anything, the copier pauses for a few tenths of a second to sample
//! the idle baseline ([`State::Draining`] to [`State::Sampling`]).
//!
//! # The cost of throttling
//!
//! Throttling has a cost for the applications. As long as the copy lasts, first writes are preserved, each at
//! the price of a read and a write: a copy that takes twice as long spares its applications the copier's
//! reads and makes them pay for more first writes. So the rate never falls below a floor
//! ([`Limits::floor_share`] of the best rate seen, [`FLOOR_MIN`] at least), and the cost of copy-on-write
//! itself is not attributed to the copier: if sampling shows that the applications are as slow without it,
//! the copier is not throttled.
//!
//! # The window
//! The controller sets one number, the window: the reads that may be in flight, in thousandths. From 1,000 up
//! it is that many reads without a pause. (A longer queue is the first to raise the latency, and shortening it
//! costs the copy least.) Below 1,000 it is one read at a time, at that share of the rate which one read at a
//! time had. The size of a step depends on the position of the latency between baseline and goal ([`factor`]):
//! the last quarter of that interval is a dead zone, so that noise does not move the window. Each step is
//! decided by three new measurements, without those far slower than the middle one: no outlier moves the
//! window, and no step is taken twice for one cause.
//!
//! More reads than it takes to keep the disk busy only make the queue longer, and first writes wait in that
//! queue, because their originals are read after the copier's reads. So an enlargement that does not raise
//! the rate by its part ([`GAIN_PARTS`]) is undone, and not tried again until the baseline has been sampled
//! again.
//!
//! Throttling cannot reduce every delay: the sampled baseline may be too low, and the cost of table changes
//! depends little on the rate. If more than half of the excess remains at a quarter of the rate, the backoff
//! is undone ([`Controller::backoff_has_little_effect`]) until the baseline has been sampled again: a longer
//! copy would only cost more.
//!
//! Invariants:
//! - an origin without applications (no I/O for [`IDLE`]) is read at full speed;
//! - except while the baseline is sampled, which is bounded, at least one read may be in flight, and the
//!   permitted rate is never below the floor. (This also holds on a disk that the applications saturate by
//!   themselves. If one read at a time gets less than the floor there, it adds less to their latency than the
//!   goal permits, and more reads are permitted.)
//! - without measurements nothing is limited.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::base::Bytes;

/// How much a copy may slow down the applications.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Impact {
    /// Their reads and writes take at most a quarter longer than without the copier, as far as throttling
    /// helps.
    Low,
    /// They take at most twice as long, as far as throttling helps.
    Medium,
    /// The copier is not throttled.
    None,
}

impl Impact {
    /// The default of `--impact`. Medium: on a disk with room for both it changes nothing; on a disk without,
    /// it keeps the copier's queue short, and it rarely reaches the point where the longer copy costs the
    /// applications more than the shorter queue gains them.
    pub const DEFAULT: Self = Self::Medium;

    fn limits(self) -> Option<Limits> {
        match self {
            Self::Low => Some(Limits { latency_percent_max: 125, floor_share: 16 }),
            Self::Medium => Some(Limits { latency_percent_max: 200, floor_share: 4 }),
            Self::None => None,
        }
    }
}

impl fmt::Display for Impact {
    /// "low (the applications' I/O takes at most 125 % of its time without the copier's reads)".
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self {
            Self::Low => "low",
            Self::Medium => "medium",
            Self::None => return f.write_str("none (the copier reads as fast as it can)"),
        };
        let percent = self.limits().map_or(100, |limits| limits.latency_percent_max);
        write!(
            f,
            "{name} (the applications' I/O takes at most {percent} % of its time without the copier's reads)"
        )
    }
}

/// The numbers of a level.
#[derive(Clone, Copy, Debug)]
struct Limits {
    /// The highest latency, in percent of the baseline.
    latency_percent_max: u64,
    /// The copier always gets the best rate seen divided by this.
    floor_share: u64,
}

/// The applications' I/O on the origin since the last sample.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LatencySample {
    /// Reads and writes completed.
    pub ios: u64,
    /// Time that they took, in total.
    pub waited: Duration,
    /// Reads and writes that were issued and have not completed.
    pub in_flight: u64,
}

/// Measures the applications' I/O on the origin's device; implemented in `op`.
pub trait LatencyProbe {
    /// The I/O since the last call; None if it cannot be measured.
    fn sample(&mut self) -> Option<LatencySample>;
}

/// What a copy needs in order to limit its impact on the applications.
pub struct ImpactWatch {
    /// The level.
    pub impact: Impact,
    /// The applications' mean latency before the instant, if there were enough I/Os to measure it.
    pub before: Option<Duration>,
    /// The first sample covers the I/O since the probe was created.
    pub probe: Box<dyn LatencyProbe>,
    /// Most bytes of one request to the origin's disk while the copier may be throttled; a multiple of 4 KiB.
    pub read_max: Bytes,
}

/// Fewest I/Os for a mean.
pub const IOS_MIN: u64 = 32;

/// Time between two ticks of the controller.
pub(super) const TICK: Duration = Duration::from_millis(100);

/// Least total time of the I/Os of a measurement: the time of device-mapper's I/Os is counted in the
/// scheduler's ticks of 1 to 10 ms, and five of the usual 4 ms make a usable sum.
const WAITED_MIN: Duration = Duration::from_millis(20);

/// A difference of one scheduler tick in a sum is no signal.
const KERNEL_TICK: Duration = Duration::from_millis(4);

/// A measurement with too few I/Os ends after this time.
const MEASUREMENT_MAX: Duration = Duration::from_secs(1);

/// Measurements that decide a step.
const MEASUREMENTS: usize = 3;

/// A measurement this many times as slow as the middle one is an outlier.
const OUTLIER: u32 = 3;

/// An origin without any I/O for this long has no applications.
pub const IDLE: Duration = Duration::from_secs(1);

/// Longest time between two samples of the baseline while applications are active: sampling takes under 4 %
/// of the time.
const SAMPLE_EVERY: Duration = Duration::from_secs(15);

/// Shortest time between two samples, however high the latency is.
const SAMPLE_PAUSE: Duration = Duration::from_secs(3);

/// If the reads in flight are not done by then, this sample is given up.
const DRAIN_MAX: Duration = Duration::from_secs(1);

/// Longest sample.
const SAMPLE_MAX: Duration = Duration::from_millis(400);

/// I/Os that are enough for a sample: more than for a measurement, because the goal depends on them.
const SAMPLE_IOS_ENOUGH: u64 = 4 * IOS_MIN;

/// The weight of the earlier baseline against the new sample, in quarters: a few tenths of a second are a
/// small sample.
const BASELINE_KEPT_QUARTERS: u64 = 3;

/// If the new sample differs from the earlier baseline by this factor, the load has changed, and the earlier
/// baseline is dropped.
const BASELINE_DROP_FACTOR: u32 = 2;

/// Below this no latency matters: device-mapper and a fast disk take as long.
const BASELINE_MIN: Duration = Duration::from_micros(100);

/// The copier always gets this rate, bytes per second: at it 10 TiB take two months, but the copy ends.
pub const FLOOR_MIN: Bytes = Bytes::mib(2);

/// The best rate is measured over this time, so that a burst does not count.
const RATE_SPAN: Duration = Duration::from_secs(2);

/// One read in flight, in the window's unit.
const ONE: u64 = 1000;

/// Largest window: as many reads as the engine ever has buffers.
const WINDOW_MAX: u64 = 128 * ONE;

/// The initial window, the shortest queue: before the effect on the applications is known, the copy costs
/// them most, because every write is a first write.
const WINDOW_INITIAL: u64 = ONE;

/// An enlargement is kept if it raises the rate by at least a proportional increase divided by this.
const GAIN_PARTS: u64 = 4;

/// The effect of throttling is judged at the rate of one read at a time divided by this, or at the floor.
const FUTILE_RATE_PARTS: u64 = 4;

/// Rounds in a row by which the effect of throttling is judged.
const FUTILE_ROUNDS: usize = 2;

/// The excess latency from before the copier became slower is valid for this long.
const SLOWED_KEPT: Duration = Duration::from_secs(300);

/// What the copier may do until the next tick.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Allowance {
    /// Reads in flight; 0 while the baseline is sampled.
    pub(super) reads: u64,
    /// Bytes per second; None: no limit.
    pub(super) rate: Option<Bytes>,
}

impl Allowance {
    /// No limit: there are no applications to spare.
    const FREE: Self = Self { reads: WINDOW_MAX / ONE, rate: None };

    /// True if the copier is not limited.
    pub(super) fn is_free(self) -> bool {
        self == Self::FREE
    }
}

/// What happened since the last tick.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct TickInput {
    /// Time since any fixed start.
    pub(super) now: Duration,
    /// The applications' I/O.
    pub(super) sample: Option<LatencySample>,
    /// Bytes that the copier has read.
    pub(super) read: Bytes,
    /// Its reads in flight now.
    pub(super) reads: u64,
    /// The most reads that were in flight.
    pub(super) reads_max: u64,
    /// It wanted to read, and had as many reads in flight as permitted.
    pub(super) waited_for_slot: bool,
    /// It wanted to read, had fewer reads in flight than permitted, and had to wait for the rate.
    pub(super) waited_for_rate: bool,
}

/// I/O that is accumulated until there is enough of it for a mean.
#[derive(Clone, Copy, Debug, Default)]
struct Measurement {
    opened: Duration,
    ios: u64,
    waited: Duration,
    in_flight: u64,
}

/// A number of I/Os, at least one, and the time that they took in total.
#[derive(Clone, Copy, Debug)]
struct Sum {
    ios: u64,
    waited: Duration,
}

impl Sum {
    fn mean(self) -> Duration {
        scaled(self.waited, 1, self.ios)
    }

    fn plus(self, other: Self) -> Self {
        Self { ios: self.ios + other.ios, waited: self.waited + other.waited }
    }
}

impl Measurement {
    fn open(now: Duration) -> Self {
        Self { opened: now, ..Self::default() }
    }

    fn add(&mut self, sample: LatencySample) {
        self.ios += sample.ios;
        self.waited += sample.waited;
        self.in_flight = sample.in_flight;
    }

    fn is_enough(&self, ios_min: u64) -> bool {
        self.ios >= ios_min && self.waited >= WAITED_MIN
    }

    /// None without any I/O. I/O that was issued and does not complete takes at least as long as this
    /// measurement lasts.
    fn sum(&self, now: Duration) -> Option<Sum> {
        match (self.ios, self.in_flight) {
            (0, 0) => None,
            (0, _) => Some(Sum { ios: 1, waited: now.saturating_sub(self.opened) }),
            (ios, _) => Some(Sum { ios, waited: self.waited }),
        }
    }
}

/// The measurements of one step, and the copier's reads meanwhile.
#[derive(Clone, Debug, Default)]
struct Round {
    opened: Duration,
    sums: Vec<Sum>,
    read: Bytes,
    reads_max: u64,
    waited_for_slot: bool,
    waited_for_rate: bool,
}

/// The controller's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The latency is measured while the copier reads.
    Watching,
    /// There are no applications.
    Idle,
    /// Before sampling: no read may begin; waits for those in flight, since this time.
    Draining { since: Duration },
    /// No read is in flight any more; I/O that waited for those reads is still completing.
    Settling,
    /// The applications' I/O is now as it would be without the copier.
    Sampling,
}

/// Decides from the applications' latency how fast the copier may read.
#[derive(Debug)]
pub(super) struct Controller {
    limits: Option<Limits>,
    begun: Duration,
    before: Option<Duration>,
    /// The sampled baseline.
    idle_baseline: Option<Sum>,
    /// When the baseline was last sampled, or the attempt given up.
    sampled_at: Option<Duration>,
    state: State,
    window: u64,
    /// The latency was never above the goal so far: the window is still being searched.
    climbing: bool,
    /// The rate of one read at a time.
    rate_of_one: Option<Bytes>,
    /// The number of reads before the last enlargement, and their rate, until the enlargement is judged.
    enlarged: Option<(u64, Bytes)>,
    /// More reads than this do not raise the rate.
    knee: Option<u64>,
    /// When the rate fell below that of one read at a time, and by how much the latency exceeded the baseline
    /// then.
    slowed: Option<(Duration, Duration)>,
    /// Rounds in a row in which throttling had little effect.
    futile_rounds: usize,
    /// Throttling had little effect, so it was undone.
    backoff_futile: bool,
    /// A step was decided since the baseline was last sampled.
    decided: bool,
    best_rate: Bytes,
    rate_span: (Duration, Bytes),
    measurement: Measurement,
    round: Round,
    last: Option<Sum>,
    /// The last tick had no sample.
    blind: bool,
}

impl Controller {
    pub(super) fn new(impact: Impact, before: Option<Duration>, now: Duration) -> Self {
        Self {
            limits: impact.limits(),
            begun: now,
            before,
            idle_baseline: None,
            sampled_at: None,
            state: State::Watching,
            window: WINDOW_INITIAL,
            climbing: true,
            rate_of_one: None,
            enlarged: None,
            knee: None,
            slowed: None,
            futile_rounds: 0,
            backoff_futile: false,
            decided: false,
            best_rate: Bytes::ZERO,
            rate_span: (now, Bytes::ZERO),
            measurement: Measurement::open(now),
            round: Round { opened: now, ..Round::default() },
            last: None,
            blind: false,
        }
    }

    /// What the copier may do now.
    pub(super) fn allowance(&self) -> Allowance {
        let free = Allowance::FREE;
        if self.limits.is_none() || self.blind {
            return free;
        }
        match self.state {
            State::Idle => free,
            State::Draining { .. } | State::Settling | State::Sampling => Allowance { reads: 0, rate: None },
            State::Watching if self.window >= ONE => Allowance { reads: self.window / ONE, rate: None },
            State::Watching => {
                let share = |rate: Bytes| scale(rate.get(), self.window, ONE);
                let rate = self.rate_of_one.map_or(0, share).max(self.floor().get());
                Allowance { reads: 1, rate: Some(Bytes(rate)) }
            }
        }
    }

    /// The applications' latency as last measured (None: they are idle), and the baseline.
    pub(super) fn latency(&self) -> (Option<Duration>, Option<Duration>) {
        (self.last.map(Sum::mean), self.baseline())
    }

    fn baseline(&self) -> Option<Duration> {
        self.idle_baseline.map(Sum::mean).or(self.before).map(|known| known.max(BASELINE_MIN))
    }

    fn floor(&self) -> Bytes {
        let share = self.limits.map_or(1, |limits| limits.floor_share);
        Bytes(self.best_rate.get() / share).max(FLOOR_MIN)
    }

    /// Processes what happened since the last tick.
    pub(super) fn tick(&mut self, input: &TickInput) {
        self.blind = input.sample.is_none();
        let Some(sample) = input.sample else {
            self.last = None;
            return;
        };
        let now = input.now;
        match self.state {
            State::Watching => self.watch(input, sample),
            State::Idle => {
                self.note_rate(input);
                if sample.ios > 0 || sample.in_flight > 0 {
                    self.resume_watching(now);
                }
            }
            State::Draining { .. } if input.reads == 0 => self.state = State::Settling,
            State::Draining { since } if now.saturating_sub(since) >= DRAIN_MAX => self.sampled(now, None),
            State::Draining { .. } => {}
            State::Settling => {
                self.measurement = Measurement::open(now);
                self.state = State::Sampling;
            }
            State::Sampling => {
                self.measurement.add(sample);
                let sampling = now.saturating_sub(self.measurement.opened);
                if self.measurement.is_enough(SAMPLE_IOS_ENOUGH) || sampling >= SAMPLE_MAX {
                    let baseline = self.measurement.sum(now);
                    self.sampled(now, baseline);
                }
            }
        }
    }

    fn resume_watching(&mut self, now: Duration) {
        self.state = State::Watching;
        self.measurement = Measurement::open(now);
        self.round = Round { opened: now, ..Round::default() };
    }

    fn note_rate(&mut self, input: &TickInput) {
        let (opened, read) = self.rate_span;
        let read = read + input.read;
        let elapsed = input.now.saturating_sub(opened);
        self.rate_span = (opened, read);
        if elapsed >= RATE_SPAN {
            self.best_rate = self.best_rate.max(per_second(read, elapsed));
            self.rate_span = (input.now, Bytes::ZERO);
        }
    }

    fn watch(&mut self, input: &TickInput, sample: LatencySample) {
        let now = input.now;
        self.note_rate(input);
        self.measurement.add(sample);
        self.round.read += input.read;
        self.round.reads_max = self.round.reads_max.max(input.reads_max);
        self.round.waited_for_slot |= input.waited_for_slot;
        self.round.waited_for_rate |= input.waited_for_rate;
        let measured = now.saturating_sub(self.measurement.opened);
        if measured >= IDLE && self.measurement.ios == 0 && self.measurement.in_flight == 0 {
            self.last = None;
            self.state = State::Idle;
            self.reset_slowing();
            return;
        }
        if !self.measurement.is_enough(IOS_MIN) && measured < MEASUREMENT_MAX {
            return;
        }
        if let Some(sum) = self.measurement.sum(now) {
            self.last = Some(sum);
            self.round.sums.push(sum);
        }
        self.measurement = Measurement::open(now);
        if self.round.sums.len() >= MEASUREMENTS {
            let next = Round { opened: now, ..Round::default() };
            let round = std::mem::replace(&mut self.round, next);
            self.decide(now, &round);
        }
    }

    fn decide(&mut self, now: Duration, round: &Round) {
        let Some(limits) = self.limits else { return };
        let Some(sum) = without_outliers(&round.sums) else { return };
        let seen = sum.mean();
        let rate = per_second(round.read, now.saturating_sub(round.opened));
        if self.window / ONE == 1 && round.waited_for_slot && rate > Bytes::ZERO {
            self.rate_of_one = Some(rate);
        }
        let Some(baseline) = self.baseline() else {
            return match self.sampled_at {
                // The applications are idle whenever the copier pauses: throttling cannot help them.
                Some(sampled_at) if now.saturating_sub(sampled_at) < SAMPLE_PAUSE => {
                    self.grow(round, 1200, rate)
                }
                _ => self.begin_sampling(now),
            };
        };
        let goal = scaled(baseline, limits.latency_percent_max, 100) + KERNEL_TICK / narrow(sum.ios);
        let is_slow = seen > goal;
        let since_sampling = now.saturating_sub(self.sampled_at.unwrap_or(self.begun));
        let may_sample = self.sampled_at.is_none()
            || since_sampling >= SAMPLE_PAUSE && self.decided && !self.backoff_futile;
        if since_sampling >= SAMPLE_EVERY || is_slow && may_sample {
            return self.begin_sampling(now);
        }
        self.decided = true;
        let excess = seen.saturating_sub(baseline);
        if is_slow {
            self.climbing = false;
            self.futile_rounds =
                if self.backoff_has_little_effect(excess, rate) { self.futile_rounds + 1 } else { 0 };
            if self.futile_rounds == FUTILE_ROUNDS {
                self.reset_slowing();
                self.backoff_futile = true;
                return;
            }
            let at_least_one = self.window >= ONE;
            self.shrink(round, factor(seen, baseline, goal, false), rate);
            if at_least_one && self.window < ONE {
                self.slowed = Some((now, excess));
            }
        } else {
            self.futile_rounds = 0;
            self.grow(round, factor(seen, baseline, goal, self.climbing), rate);
        }
    }

    /// True if the rate is as low as it gets for this test, and most of the excess latency remains.
    fn backoff_has_little_effect(&self, excess: Duration, rate: Bytes) -> bool {
        let allowed = scale(self.rate_of_one.map_or(0, Bytes::get), self.window, ONE);
        self.window <= self.window_min().max(ONE / FUTILE_RATE_PARTS)
            // The rate must match the window: a round may be shorter than a read and the pause after it.
            && (allowed / 2..=allowed * 2).contains(&rate.get())
            && self.slowed.is_some_and(|(_, before)| excess * 2 > before)
    }

    /// Returns to one read at a time without pauses; later measurements are judged independently of earlier ones.
    fn reset_slowing(&mut self) {
        (self.slowed, self.futile_rounds, self.backoff_futile) = (None, 0, false);
        self.window = self.window.max(ONE);
    }

    /// The smallest window: the floor as a share of the rate of one read at a time.
    fn window_min(&self) -> u64 {
        let one = self.rate_of_one.unwrap_or(Bytes(1));
        scale(self.floor().get(), ONE, one.get()).clamp(1, ONE - 1)
    }

    /// Enlarges the window, unless it was not used up. Undoes the last enlargement if it did not raise the rate.
    fn grow(&mut self, round: &Round, thousandths: u64, rate: Bytes) {
        if !round.waited_for_slot && !round.waited_for_rate {
            return;
        }
        let reads = self.window / ONE;
        if let Some((fewer, before)) = self.enlarged.take()
            && fewer < reads
        {
            let gain_due = scale(before.get(), reads - fewer, GAIN_PARTS * fewer);
            if rate < before + Bytes(gain_due) {
                self.knee = Some(fewer);
                self.window = fewer * ONE;
                return;
            }
        }
        let most = self.knee.map_or(WINDOW_MAX, |knee| knee * ONE + ONE - 1);
        self.window = scale(self.window, thousandths, 1000).min(most);
        if self.window >= ONE {
            self.slowed = None;
        }
        if 0 < reads && reads < self.window / ONE {
            self.enlarged = Some((reads, rate));
        }
    }

    fn shrink(&mut self, round: &Round, thousandths: u64, rate: Bytes) {
        self.enlarged = None;
        // The part of the window beyond the reads that were in flight has no effect; it goes first.
        let used = self.window.min(round.reads_max.max(1) * ONE + ONE - 1);
        let mut window = scale(used, thousandths, 1000);
        if used >= ONE {
            // At least one read less; from one read, at least some pause.
            window = window.min(used / ONE * ONE - 1);
        }
        if window < ONE && self.backoff_futile {
            window = ONE;
        } else if window < ONE {
            self.rate_of_one.get_or_insert(rate.max(Bytes(1)));
            // The floor is the limit: a smaller window would only have to grow back.
            window = window.max(self.window_min());
        }
        self.window = window;
    }

    fn begin_sampling(&mut self, now: Duration) {
        self.state = State::Draining { since: now };
    }

    fn sampled(&mut self, now: Duration, baseline: Option<Sum>) {
        self.sampled_at = Some(now);
        (self.enlarged, self.knee, self.backoff_futile, self.decided) = (None, None, false, false);
        let is_old = |(since, _): (Duration, Duration)| now.saturating_sub(since) >= SLOWED_KEPT;
        if self.slowed.is_some_and(is_old) {
            self.reset_slowing();
        }
        if let Some(baseline) = baseline {
            let same = |old: &Sum| {
                old.mean() <= baseline.mean() * BASELINE_DROP_FACTOR
                    && baseline.mean() <= old.mean() * BASELINE_DROP_FACTOR
            };
            let kept = self.idle_baseline.filter(same).map(|old| Sum {
                ios: scale(old.ios, BASELINE_KEPT_QUARTERS, 4),
                waited: scaled(old.waited, BASELINE_KEPT_QUARTERS, 4),
            });
            self.idle_baseline = Some(kept.map_or(baseline, |kept| kept.plus(baseline)));
        }
        self.rate_span = (now, Bytes::ZERO);
        self.resume_watching(now);
    }
}

/// The factor of the window, in thousandths. It depends on the position of the latency between baseline
/// and goal. Past the goal the window shrinks, faster with the distance. In the last quarter before the goal
/// it stays. Before that it grows, and faster while `climbing`.
///
/// The steps are smaller than the deviations that cause them, because a queue's latency grows faster than its
/// load: near a disk's capacity with the square, and a proportional step would overshoot and oscillate.
fn factor(seen: Duration, baseline: Duration, goal: Duration, climbing: bool) -> u64 {
    let excess = seen.saturating_sub(baseline).as_nanos();
    let room = goal.saturating_sub(baseline).as_nanos().max(1);
    match excess * 100 / room {
        401.. => 500,
        201..=400 => 700,
        101..=200 => 850,
        76..=100 if seen > goal => 850,
        76..=100 => 1000,
        51..=75 => 1100,
        _ if climbing => 1500,
        _ => 1200,
    }
}

/// The sum of `sums` without those far slower than the middle one. (The middle one alone would be below the
/// mean: latencies have a long tail on one side.)
fn without_outliers(sums: &[Sum]) -> Option<Sum> {
    let mut sorted: Vec<Sum> = sums.to_vec();
    sorted.sort_by_key(|sum| sum.mean());
    let middle = sorted.get(sorted.len() / 2)?.mean();
    sorted.into_iter().filter(|sum| sum.mean() <= middle * OUTLIER).reduce(Sum::plus)
}

/// `value` x `by` / `of`, or u64::MAX if that does not fit.
fn scale(value: u64, by: u64, of: u64) -> u64 {
    let wide = u128::from(value) * u128::from(by) / u128::from(of.max(1));
    u64::try_from(wide).unwrap_or(u64::MAX)
}

fn scaled(time: Duration, by: u64, of: u64) -> Duration {
    from_nanos(time.as_nanos() * u128::from(by) / u128::from(of.max(1)))
}

fn from_nanos(nanos: u128) -> Duration {
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

/// `count` as a divisor: at least 1.
fn narrow(count: u64) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX).max(1)
}

fn per_second(bytes: Bytes, time: Duration) -> Bytes {
    let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
    Bytes(scale(bytes.get(), 1_000_000_000, nanos))
}

#[cfg(test)]
mod tests;
