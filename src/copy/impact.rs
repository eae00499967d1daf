//! How much may the copier read, so that the applications do not feel it? The law behind `--impact`.
//!
//! Pure: time and measurements are passed in, [`Throttle`](super::throttle::Throttle) carries the answer
//! out. What is measured is the mean latency of the reads and writes of the origin's own device. The
//! copier reads beneath it, so what is counted there is the applications' alone, and a disk that the two
//! share shows as their latency.
//!
//! # What is compared with what
//!
//! The goal is a multiple of the latency that the applications would have without the copier *now*. Until
//! that is known the latency before the instant stands for it, where there were enough I/Os to measure it.
//! That one alone would mislead: after the instant the first write to a chunk also waits for its original
//! to be preserved, at any rate of the copier, and the load may change. So now and then, and before
//! anything is slowed down, the copier holds its breath for a few tenths of a second ([`State::Draining`]
//! to [`State::Listening`]) and listens.
//!
//! # The trade
//!
//! Giving way is no gift. As long as the copy lasts, first writes are preserved, each at the price of a
//! read and a write: a copy that takes twice as long spares its applications the copier's reads and makes
//! them pay for more first writes. So nothing is slowed down beyond a floor ([`Limits::floor_share`] of the
//! best rate seen, [`FLOOR_MIN`] at least), and what copy-on-write itself costs is never put down to the
//! copier: where listening shows that the applications are as slow without it, it reads on.
//!
//! # The knob
//!
//! One number, the window: the reads that may be in flight, in thousandths. From 1,000 up it is that many
//! reads without a pause (a queue is what hurts first, and shortening it costs least), below 1,000 it is
//! one read at a time, at that share of the rate which one read at a time had. It is moved in steps that
//! depend on where in the room between baseline and goal the latency is ([`factor`]): a quarter of that
//! room is a dead zone, so that noise does not move it, and each step is judged by three fresh looks, of
//! which those far off the middle one do not count: no outlier moves it, and no step is taken twice for
//! one cause.
//!
//! More reads than it takes to keep the disk busy are only a longer queue, and who waits in it is a
//! first write, whose original is read behind them. So an enlargement that does not bring its part of the rate
//! ([`GAIN_PARTS`]) is taken back, and not tried again until the copier has listened anew.
//!
//! Nor is every delay mended by giving way: the baseline may have been taken too low, and what the table's changes
//! cost has little to do with the rate. Where a quarter of the rate leaves more than half of the excess, the copier
//! takes its rate back ([`Controller::mends_little`]), until it has listened anew: a longer copy would only cost more.
//!
//! Invariants:
//! - an origin without applications (no I/O for [`IDLE`]) is read at full speed;
//! - outside listening, which is bounded, at least one read may be in flight and the rate allowed is never
//!   below the floor. (On a disk that the applications saturate alone the floor is kept as well: where
//!   one read at a time gets a smaller share than that, it adds less to the others' latency than the goal
//!   allows, and there may be more reads.)
//! - without measurements nothing is limited.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::base::Bytes;

/// How much the applications may feel of a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Impact {
    /// Their reads and writes take at most a quarter longer than without the copier, as far as giving way mends it.
    Low,
    /// They take at most twice as long, as far as giving way mends it.
    Medium,
    /// The copier does not look.
    None,
}

impl Impact {
    /// What `--impact` is when it is not given. Medium: on a disk that has room for both it changes
    /// nothing, on one that has not it keeps the copier's queue short, and it rarely reaches the point
    /// where the longer copy costs the applications more than the shorter queue gives them.
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
    /// "low (applications' I/O at most 1.25 times as slow by the copier's reads)".
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self {
            Self::Low => "low",
            Self::Medium => "medium",
            Self::None => return f.write_str("none (the copier reads as fast as it can)"),
        };
        let percent = self.limits().map_or(100, |limits| limits.latency_percent_max);
        write!(f, "{name} (the copier's reads make the applications' take at most {percent} % of their time)")
    }
}

/// What a level means in numbers.
#[derive(Clone, Copy, Debug)]
struct Limits {
    /// Of the latency without the copier.
    latency_percent_max: u64,
    /// The copier always gets the best rate seen divided by this.
    floor_share: u64,
}

/// What the applications did on the origin since the last sample.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LatencySample {
    /// Reads and writes completed.
    pub ios: u64,
    /// Time that they took, summed.
    pub waited: Duration,
    /// Reads and writes that are issued and not completed.
    pub in_flight: u64,
}

/// Who can tell how the applications fare: `op`, for the origin's device.
pub trait LatencyProbe {
    /// What was done since the last call; None where that cannot be known.
    fn sample(&mut self) -> Option<LatencySample>;
}

/// What a copy needs to give way.
pub struct ImpactWatch {
    /// How far.
    pub impact: Impact,
    /// The applications' mean latency before the instant, where there were enough I/Os to measure one.
    pub before: Option<Duration>,
    /// Its first sample covers what was done since it was made.
    pub probe: Box<dyn LatencyProbe>,
    /// What the origin's disk is asked for at once while anybody is given way to; multiples of 4 KiB.
    pub read_max: Bytes,
}

/// I/Os from which on a mean is one.
pub const IOS_MIN: u64 = 32;

/// Between two ticks of the controller.
pub(super) const TICK: Duration = Duration::from_millis(100);

/// And the waiting that it should be made of: the time of device-mapper's I/Os is counted in the
/// scheduler's ticks of 1 to 10 ms, and five of the usual 4 ms make a sum.
const WAITED_MIN: Duration = Duration::from_millis(20);

/// One tick of the scheduler more or less in a sum is no signal.
const KERNEL_TICK: Duration = Duration::from_millis(4);

/// A look with too few I/Os ends after this all the same.
const LOOK_MAX: Duration = Duration::from_secs(1);

/// Looks that a step is decided by.
const LOOKS: usize = 3;

/// A look this many times as slow as the middle one is an outlier.
const OUTLIER: u32 = 3;

/// An origin on which nothing was done for so long has no applications.
pub const IDLE: Duration = Duration::from_secs(1);

/// Applications that are active are listened to at least so often: under 4 % of the time.
const LISTEN_EVERY: Duration = Duration::from_secs(15);

/// And not more often than this, however bad the latency is.
const LISTEN_PAUSE: Duration = Duration::from_secs(3);

/// Reads that are not done by then make listening pointless this time.
const DRAIN_MAX: Duration = Duration::from_secs(1);

/// Longest listening.
const LISTEN_MAX: Duration = Duration::from_millis(400);

/// I/Os that are enough to hear: more than for a look, because the goal hangs on them.
const HEARD_ENOUGH: u64 = 4 * IOS_MIN;

/// Of what was heard before, this share counts beside what is heard now, in quarters: a few tenths of a
/// second are a small sample.
const HEARD_KEPT_QUARTERS: u64 = 3;

/// Where what is heard differs by this factor from what was heard before, the load is another one, and
/// what was heard before is forgotten.
const HEARD_ANEW: u32 = 2;

/// Below this no latency matters: it is what device-mapper and a fast disk take.
const BASELINE_MIN: Duration = Duration::from_micros(100);

/// The copier always gets this, bytes per second: 10 TiB in two months, but it ends.
pub const FLOOR_MIN: Bytes = Bytes::mib(2);

/// The best rate is measured over this: a burst is none.
const RATE_SPAN: Duration = Duration::from_secs(2);

/// One read in flight, in the window's unit.
const ONE: u64 = 1000;

/// The window at most: as many reads as the engine ever has buffers.
const WINDOW_MAX: u64 = 128 * ONE;

/// The window at the beginning, the shortest queue: until it is known what the applications feel, the copy is
/// at its costliest for them, for every write is a first one.
const WINDOW_BEGIN: u64 = ONE;

/// Of the rate that more reads would bring if each brought its own, one in so many is enough to keep them.
const GAIN_PARTS: u64 = 4;

/// Whether giving way mends anything is judged at this part of the rate of one read at a time, or at the floor.
const VAIN_RATE_PARTS: u64 = 4;

/// And by so many rounds running.
const VAIN_ROUNDS: usize = 2;

/// What was seen before the copier became slower says nothing any more after this.
const SLOWED_KEPT: Duration = Duration::from_secs(300);

/// What the copier may do until the next tick.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Allowance {
    /// Reads in flight; 0 while it is listened.
    pub(super) reads: u64,
    /// Bytes per second; None: no limit.
    pub(super) rate: Option<Bytes>,
}

impl Allowance {
    /// No limit: there is no application to yield to.
    const FREE: Self = Self { reads: WINDOW_MAX / ONE, rate: None };

    /// True if the copier need not yield.
    pub(super) fn is_free(self) -> bool {
        self == Self::FREE
    }
}

/// What happened since the last tick.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Moment {
    /// Since any fixed start.
    pub(super) now: Duration,
    /// The applications' I/O.
    pub(super) sample: Option<LatencySample>,
    /// Bytes that the copier has read.
    pub(super) read: Bytes,
    /// Its reads in flight now.
    pub(super) reads: u64,
    /// And at most.
    pub(super) reads_max: u64,
    /// It wanted to read and had as many in flight as it may.
    pub(super) lacked_slot: bool,
    /// It wanted to read, might have had another in flight, and had to wait for the rate.
    pub(super) lacked_rate: bool,
}

/// I/O being summed up until there is enough of it for a mean.
#[derive(Clone, Copy, Debug, Default)]
struct Look {
    opened: Duration,
    ios: u64,
    waited: Duration,
    in_flight: u64,
}

/// I/Os, at least one, and how long they took in all.
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

impl Look {
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

    /// None where nothing was done. What is issued and does not come back takes at least as long as we
    /// have looked.
    fn sum(&self, now: Duration) -> Option<Sum> {
        match (self.ios, self.in_flight) {
            (0, 0) => None,
            (0, _) => Some(Sum { ios: 1, waited: now.saturating_sub(self.opened) }),
            (ios, _) => Some(Sum { ios, waited: self.waited }),
        }
    }
}

/// The looks of one step, and what the copier did meanwhile.
#[derive(Clone, Debug, Default)]
struct Round {
    opened: Duration,
    sums: Vec<Sum>,
    read: Bytes,
    reads_max: u64,
    lacked_slot: bool,
    lacked_rate: bool,
}

/// What is being done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The origin is measured while the copier reads.
    Watching,
    /// There are no applications; since when nothing was seen of them is the look's.
    Idle,
    /// To be listened to: no read may begin, and those in flight (since when) are waited for.
    Draining { since: Duration },
    /// None is in flight any more, but what waited behind them is still coming back.
    Settling,
    /// What comes now is as it would be without the copier.
    Listening,
}

/// See the module's head.
#[derive(Debug)]
pub(super) struct Controller {
    limits: Option<Limits>,
    begun: Duration,
    before: Option<Duration>,
    /// What was heard while the copier held its breath.
    quiet: Option<Sum>,
    /// When that was, or was tried.
    listened: Option<Duration>,
    state: State,
    window: u64,
    /// Nothing has been too slow yet: the window is still being found.
    climbing: bool,
    /// Rate of one read at a time.
    rate_of_one: Option<Bytes>,
    /// The reads that there were before the last enlargement, and their rate, until it is judged.
    enlarged: Option<(u64, Bytes)>,
    /// More reads than these bring nothing.
    knee: Option<u64>,
    /// When one read at a time became slower, and by how much the latency was above the baseline then.
    slowed: Option<(Duration, Duration)>,
    /// Rounds running in which that has mended nothing.
    vain_rounds: usize,
    /// So the rate was taken back.
    in_vain: bool,
    /// Something was done about the latency since the copier last listened.
    acted: bool,
    best: Bytes,
    span: (Duration, Bytes),
    look: Look,
    round: Round,
    last: Option<Sum>,
    /// The last sample was none.
    blind: bool,
}

impl Controller {
    pub(super) fn new(impact: Impact, before: Option<Duration>, now: Duration) -> Self {
        Self {
            limits: impact.limits(),
            begun: now,
            before,
            quiet: None,
            listened: None,
            state: State::Watching,
            window: WINDOW_BEGIN,
            climbing: true,
            rate_of_one: None,
            enlarged: None,
            knee: None,
            slowed: None,
            vain_rounds: 0,
            in_vain: false,
            acted: false,
            best: Bytes::ZERO,
            span: (now, Bytes::ZERO),
            look: Look::open(now),
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
            State::Draining { .. } | State::Settling | State::Listening => Allowance { reads: 0, rate: None },
            State::Watching if self.window >= ONE => Allowance { reads: self.window / ONE, rate: None },
            State::Watching => {
                let share = |rate: Bytes| scale(rate.get(), self.window, ONE);
                let rate = self.rate_of_one.map_or(0, share).max(self.floor().get());
                Allowance { reads: 1, rate: Some(Bytes(rate)) }
            }
        }
    }

    /// The applications' latency as last measured (None: they are idle), and what it is compared with.
    pub(super) fn latency(&self) -> (Option<Duration>, Option<Duration>) {
        (self.last.map(Sum::mean), self.baseline())
    }

    fn baseline(&self) -> Option<Duration> {
        self.quiet.map(Sum::mean).or(self.before).map(|known| known.max(BASELINE_MIN))
    }

    fn floor(&self) -> Bytes {
        let share = self.limits.map_or(1, |limits| limits.floor_share);
        Bytes(self.best.get() / share).max(FLOOR_MIN)
    }

    /// Takes in what happened since the last tick.
    pub(super) fn tick(&mut self, moment: &Moment) {
        self.blind = moment.sample.is_none();
        let Some(sample) = moment.sample else {
            self.last = None;
            return;
        };
        let now = moment.now;
        match self.state {
            State::Watching => self.watch(moment, sample),
            State::Idle => {
                self.note_rate(moment);
                if sample.ios > 0 || sample.in_flight > 0 {
                    self.watch_anew(now);
                }
            }
            State::Draining { .. } if moment.reads == 0 => self.state = State::Settling,
            State::Draining { since } if now.saturating_sub(since) >= DRAIN_MAX => self.listened(now, None),
            State::Draining { .. } => {}
            State::Settling => {
                self.look = Look::open(now);
                self.state = State::Listening;
            }
            State::Listening => {
                self.look.add(sample);
                let listening = now.saturating_sub(self.look.opened);
                if self.look.is_enough(HEARD_ENOUGH) || listening >= LISTEN_MAX {
                    let heard = self.look.sum(now);
                    self.listened(now, heard);
                }
            }
        }
    }

    fn watch_anew(&mut self, now: Duration) {
        self.state = State::Watching;
        self.look = Look::open(now);
        self.round = Round { opened: now, ..Round::default() };
    }

    fn note_rate(&mut self, moment: &Moment) {
        let (opened, read) = self.span;
        let read = read + moment.read;
        let elapsed = moment.now.saturating_sub(opened);
        self.span = (opened, read);
        if elapsed >= RATE_SPAN {
            self.best = self.best.max(per_second(read, elapsed));
            self.span = (moment.now, Bytes::ZERO);
        }
    }

    fn watch(&mut self, moment: &Moment, sample: LatencySample) {
        let now = moment.now;
        self.note_rate(moment);
        self.look.add(sample);
        self.round.read += moment.read;
        self.round.reads_max = self.round.reads_max.max(moment.reads_max);
        self.round.lacked_slot |= moment.lacked_slot;
        self.round.lacked_rate |= moment.lacked_rate;
        let looked = now.saturating_sub(self.look.opened);
        if looked >= IDLE && self.look.ios == 0 && self.look.in_flight == 0 {
            self.last = None;
            self.state = State::Idle;
            self.forget_slowing();
            return;
        }
        if !self.look.is_enough(IOS_MIN) && looked < LOOK_MAX {
            return;
        }
        if let Some(sum) = self.look.sum(now) {
            self.last = Some(sum);
            self.round.sums.push(sum);
        }
        self.look = Look::open(now);
        if self.round.sums.len() >= LOOKS {
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
        if self.window / ONE == 1 && round.lacked_slot && rate > Bytes::ZERO {
            self.rate_of_one = Some(rate);
        }
        let Some(baseline) = self.baseline() else {
            return match self.listened {
                // Whoever rests as soon as the copier does can be given no way to.
                Some(listened) if now.saturating_sub(listened) < LISTEN_PAUSE => self.grow(round, 1200, rate),
                _ => self.listen(now),
            };
        };
        let goal = scaled(baseline, limits.latency_percent_max, 100) + KERNEL_TICK / narrow(sum.ios);
        let is_slow = seen > goal;
        let unheard = now.saturating_sub(self.listened.unwrap_or(self.begun));
        let may_listen = self.listened.is_none() || unheard >= LISTEN_PAUSE && self.acted && !self.in_vain;
        if unheard >= LISTEN_EVERY || is_slow && may_listen {
            return self.listen(now);
        }
        self.acted = true;
        let excess = seen.saturating_sub(baseline);
        if is_slow {
            self.climbing = false;
            self.vain_rounds = if self.mends_little(excess, rate) { self.vain_rounds + 1 } else { 0 };
            if self.vain_rounds == VAIN_ROUNDS {
                self.forget_slowing();
                self.in_vain = true;
                return;
            }
            let at_least_one = self.window >= ONE;
            self.shrink(round, factor(seen, baseline, goal, false), rate);
            if at_least_one && self.window < ONE {
                self.slowed = Some((now, excess));
            }
        } else {
            self.vain_rounds = 0;
            self.grow(round, factor(seen, baseline, goal, self.climbing), rate);
        }
    }

    /// True where the rate is as low as it is made to find out, and most of the excess is still there.
    fn mends_little(&self, excess: Duration, rate: Bytes) -> bool {
        let allowed = scale(self.rate_of_one.map_or(0, Bytes::get), self.window, ONE);
        self.window <= self.lowest().max(ONE / VAIN_RATE_PARTS)
            // What was read is what the window says: a round may be shorter than a read and the pause behind it.
            && (allowed / 2..=allowed * 2).contains(&rate.get())
            && self.slowed.is_some_and(|(_, before)| excess * 2 > before)
    }

    /// One read at a time again, without pauses: what comes is judged anew.
    fn forget_slowing(&mut self) {
        (self.slowed, self.vain_rounds, self.in_vain) = (None, 0, false);
        self.window = self.window.max(ONE);
    }

    /// The smallest window: the floor as a share of the rate of one read at a time.
    fn lowest(&self) -> u64 {
        let one = self.rate_of_one.unwrap_or(Bytes(1));
        scale(self.floor().get(), ONE, one.get()).clamp(1, ONE - 1)
    }

    /// A window that was not used is not made larger, nor one that got no more out of the disk when it was.
    fn grow(&mut self, round: &Round, thousandths: u64, rate: Bytes) {
        if !round.lacked_slot && !round.lacked_rate {
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
        // What is beyond the reads that there were has no effect, and is given up first.
        let used = self.window.min(round.reads_max.max(1) * ONE + ONE - 1);
        let mut window = scale(used, thousandths, 1000);
        if used >= ONE {
            // At least one read less, or none but with pauses.
            window = window.min(used / ONE * ONE - 1);
        }
        if window < ONE && self.in_vain {
            window = ONE;
        } else if window < ONE {
            self.rate_of_one.get_or_insert(rate.max(Bytes(1)));
            // The floor is as far as it goes: a window below it would only have to be climbed again.
            window = window.max(self.lowest());
        }
        self.window = window;
    }

    fn listen(&mut self, now: Duration) {
        self.state = State::Draining { since: now };
    }

    fn listened(&mut self, now: Duration, heard: Option<Sum>) {
        self.listened = Some(now);
        (self.enlarged, self.knee, self.in_vain, self.acted) = (None, None, false, false);
        let is_old = |(since, _): (Duration, Duration)| now.saturating_sub(since) >= SLOWED_KEPT;
        if self.slowed.is_some_and(is_old) {
            self.forget_slowing();
        }
        if let Some(heard) = heard {
            let same = |old: &Sum| {
                old.mean() <= heard.mean() * HEARD_ANEW && heard.mean() <= old.mean() * HEARD_ANEW
            };
            let kept = self.quiet.filter(same).map(|old| Sum {
                ios: scale(old.ios, HEARD_KEPT_QUARTERS, 4),
                waited: scaled(old.waited, HEARD_KEPT_QUARTERS, 4),
            });
            self.quiet = Some(kept.map_or(heard, |kept| kept.plus(heard)));
        }
        self.span = (now, Bytes::ZERO);
        self.watch_anew(now);
    }
}

/// By how many thousandths the window is multiplied. The latency's place between baseline and goal is
/// what counts: where it is beyond the goal, the window shrinks the faster the farther; in the last
/// quarter before the goal nothing is done; before that it grows, and faster while `climbing`.
///
/// The steps are smaller than what they answer to, because a queue's latency grows faster than its load:
/// close to a disk's capacity by the square, and a step in proportion would overshoot there and swing.
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

/// All of `sums` but those far slower than the middle one. (The middle one alone would be below the mean:
/// latencies have a long tail on one side.)
fn without_outliers(sums: &[Sum]) -> Option<Sum> {
    let mut sorted: Vec<Sum> = sums.to_vec();
    sorted.sort_by_key(|sum| sum.mean());
    let middle = sorted.get(sorted.len() / 2)?.mean();
    sorted.into_iter().filter(|sum| sum.mean() <= middle * OUTLIER).reduce(Sum::plus)
}

/// `value` x `by` / `of`, or as much of it as fits.
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

/// For a divisor: at least 1.
fn narrow(count: u64) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX).max(1)
}

fn per_second(bytes: Bytes, time: Duration) -> Bytes {
    let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
    Bytes(scale(bytes.get(), 1_000_000_000, nanos))
}

#[cfg(test)]
mod tests;
