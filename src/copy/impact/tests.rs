//! The controller with its throttle on a simulated disk with one queue, event by event. The latency of the
//! applications is measured in the simulation, not taken from the controller.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Mutex;

use super::*;
use crate::copy::chaos::Rng;
use crate::copy::throttle::Throttle;
use crate::progress::{Event, Observer, Silent};

const MS: u64 = 1_000_000;
const SECOND: u64 = 1000 * MS;

/// A copier's read.
const READ: Bytes = Bytes::mib(1);

/// The disk's service times and the load on it.
#[derive(Clone, Copy, Debug)]
struct Load {
    /// Mean service time of an application's I/O, nanoseconds.
    io_ns: u64,
    /// Service time of a copier's read.
    read_ns: u64,
    /// Applications' I/Os per second, at random.
    ios_per_second: u64,
    /// I/Os that are always in flight in addition; each one that completes is followed by another.
    always: u64,
    /// Additional time of an I/O while the copier reads, at any rate.
    copier_delay_ns: u64,
    /// One I/O takes this long: the first one after that time.
    outlier: Option<(u64, u64)>,
}

/// 1 ms for an I/O, 4 ms for 1 MiB: a disk of 250 MiB/s. A fifth of it is in use.
const QUIET_DISK: Load =
    Load { io_ns: MS, read_ns: 4 * MS, ios_per_second: 200, always: 0, copier_delay_ns: 0, outlier: None };

#[derive(Clone, Copy, Debug)]
enum Job {
    Io { issued: u64, again: bool },
    Read,
}

/// The counters that the probe reads, as the kernel keeps them for device-mapper: in whole ticks.
#[derive(Debug, Default)]
struct Counters {
    sample: LatencySample,
}

struct Probe(Rc<RefCell<Counters>>);

impl LatencyProbe for Probe {
    fn sample(&mut self) -> Option<LatencySample> {
        let mut counters = self.0.borrow_mut();
        let in_flight = counters.sample.in_flight;
        let fresh = LatencySample { in_flight, ..LatencySample::default() };
        Some(std::mem::replace(&mut counters.sample, fresh))
    }
}

/// What was measured in a span of time.
#[derive(Clone, Copy, Debug)]
struct Measured {
    latency: Duration,
    mib: u64,
    mib_per_second: u64,
}

struct Disk<'a> {
    load: Load,
    rng: Rng,
    counters: Rc<RefCell<Counters>>,
    throttle: Option<Throttle<'a>>,
    now: u64,
    queue: VecDeque<Job>,
    serving_until: Option<u64>,
    next_io: u64,
    wake: u64,
    reads: usize,
    last_read: u64,
    // Of the current span:
    ios: u64,
    waited: u64,
    read_count: u64,
}

impl<'a> Disk<'a> {
    fn new(load: Load, seed: u64, copier: Option<(Impact, Option<Duration>, Probe)>) -> Self {
        Self::with_observer(load, seed, copier, &Silent)
    }

    fn with_observer(
        load: Load,
        seed: u64,
        copier: Option<(Impact, Option<Duration>, Probe)>,
        observer: &'a dyn Observer,
    ) -> Self {
        println!("seed {seed}, {load:?}");
        let counters = copier.as_ref().map(|(_, _, probe)| Rc::clone(&probe.0)).unwrap_or_default();
        let throttle = copier.map(|(impact, before, probe)| {
            Throttle::new(
                None,
                Some(ImpactWatch { impact, before, probe: Box::new(probe), read_max: Bytes::kib(128) }),
                observer,
            )
        });
        let mut disk = Self {
            load,
            rng: Rng(seed),
            counters,
            throttle,
            now: 0,
            queue: VecDeque::new(),
            serving_until: None,
            next_io: 0,
            wake: 0,
            reads: 0,
            last_read: 0,
            ios: 0,
            waited: 0,
            read_count: 0,
        };
        disk.set_load(load);
        disk
    }

    fn set_load(&mut self, load: Load) {
        self.load = load;
        self.next_io = self.now + self.exponential(SECOND / load.ios_per_second.max(1));
        if load.ios_per_second == 0 {
            self.next_io = u64::MAX;
        }
        let running = self.queue.iter().filter(|job| matches!(job, Job::Io { again: true, .. })).count();
        for _ in u64::try_from(running).unwrap()..load.always {
            self.issue(true);
        }
    }

    /// Exponentially distributed, by inversion: -mean x ln(1 - u).
    fn exponential(&mut self, mean: u64) -> u64 {
        let u = f64::from(u32::try_from(self.rng.below(1 << 32)).unwrap()) / 4_294_967_296.0;
        let factor = Duration::from_secs_f64(-(1.0 - u).ln());
        u64::try_from(factor.as_nanos() * u128::from(mean) / 1_000_000_000).unwrap()
    }

    fn issue(&mut self, again: bool) {
        self.queue.push_back(Job::Io { issued: self.now, again });
        self.counters.borrow_mut().sample.in_flight += 1;
    }

    fn serve(&mut self) {
        let Some(job) = self.queue.front() else { return };
        let time = match job {
            Job::Read => self.load.read_ns,
            Job::Io { .. } => match self.load.outlier {
                Some((at, time)) if self.now >= at => {
                    self.load.outlier = None;
                    time
                }
                _ => self.exponential(self.load.io_ns) + self.copier_delay_ns(),
            },
        };
        self.serving_until = Some(self.now + time.max(1));
    }

    fn copier_delay_ns(&self) -> u64 {
        if self.now < self.last_read + 100 * MS { self.load.copier_delay_ns } else { 0 }
    }

    fn complete(&mut self) {
        self.serving_until = None;
        match self.queue.pop_front().unwrap() {
            Job::Read => {
                self.reads -= 1;
                self.read_count += 1;
                self.last_read = self.now;
                // The copier continues as soon as a read is done.
                self.wake = self.now;
            }
            Job::Io { issued, again } => {
                let mut counters = self.counters.borrow_mut();
                // In jiffies of 4 ms, as bio-based devices are accounted.
                let jiffies = self.now / (4 * MS) - issued / (4 * MS);
                counters.sample.ios += 1;
                counters.sample.waited += Duration::from_millis(jiffies * 4);
                counters.sample.in_flight -= 1;
                drop(counters);
                self.ios += 1;
                self.waited += self.now - issued;
                let always = u64::try_from(
                    self.queue.iter().filter(|job| matches!(job, Job::Io { again: true, .. })).count(),
                );
                if again && always.unwrap() < self.load.always {
                    self.issue(true);
                }
            }
        }
    }

    fn copy(&mut self) {
        let Some(throttle) = &mut self.throttle else {
            self.wake = u64::MAX;
            return;
        };
        loop {
            // The engine has 32 buffers.
            if self.reads >= 32 {
                self.wake = u64::MAX;
                return;
            }
            match throttle.admit(READ, Duration::from_nanos(self.now), self.reads) {
                None => {
                    self.queue.push_back(Job::Read);
                    self.reads += 1;
                }
                Some(wait) => {
                    assert!(wait > Duration::ZERO && wait <= Duration::from_secs(1), "{wait:?}");
                    self.wake = self.now + u64::try_from(wait.as_nanos()).unwrap();
                    return;
                }
            }
        }
    }

    /// Runs for `seconds`; returns what was measured in them.
    fn run(&mut self, seconds: u64) -> Measured {
        let end = self.now + seconds * SECOND;
        (self.ios, self.waited, self.read_count) = (0, 0, 0);
        while self.now < end {
            if self.serving_until.is_none() {
                self.serve();
            }
            let done = self.serving_until.unwrap_or(u64::MAX);
            self.now = done.min(self.next_io).min(self.wake).min(end).max(self.now);
            if self.now == done {
                self.complete();
            }
            if self.now == self.next_io {
                self.issue(false);
                self.next_io = self.now + self.exponential(SECOND / self.load.ios_per_second).max(1);
            }
            if self.now >= self.wake {
                self.copy();
            }
        }
        Measured {
            latency: Duration::from_nanos(self.waited.checked_div(self.ios).unwrap_or(0)),
            mib: self.read_count,
            mib_per_second: self.read_count / seconds,
        }
    }
}

fn probe() -> Probe {
    Probe(Rc::default())
}

/// The latency that the applications have on this disk without a copier.
fn alone(load: Load, seed: u64) -> Duration {
    Disk::new(load, seed, None).run(60).latency
}

fn percent(one: Duration, other: Duration) -> u64 {
    u64::try_from(one.as_nanos() * 100 / other.as_nanos()).unwrap()
}

#[test]
fn the_applications_latency_ends_within_the_goal() {
    for seed in 1..=6 {
        let alone = alone(QUIET_DISK, seed);
        // With and without a latency from before the instant.
        for (impact, percent_max, mib_min) in [(Impact::Low, 125, 12), (Impact::Medium, 200, 50)] {
            for before in [None, Some(alone)] {
                let mut disk = Disk::new(QUIET_DISK, seed, Some((impact, before, probe())));
                disk.run(30);
                let measured = disk.run(120);
                let share = percent(measured.latency, alone);
                // A tenth more: both are means of random times.
                assert!(share <= percent_max + 12, "{impact:?} {before:?}: {share} % {measured:?}");
                assert!(measured.mib_per_second >= mib_min, "{impact:?} {before:?}: {share} % {measured:?}");
            }
        }
        // For comparison: the latency without control.
        let mut disk = Disk::new(QUIET_DISK, seed, Some((Impact::None, Some(alone), probe())));
        let measured = disk.run(60);
        assert!(percent(measured.latency, alone) > 1000 && measured.mib_per_second > 180, "{measured:?}");
    }
}

#[test]
fn the_goal_is_reached_soon_and_kept() {
    for seed in 1..=6 {
        let alone = alone(QUIET_DISK, seed);
        let mut disk = Disk::new(QUIET_DISK, seed, Some((Impact::Medium, Some(alone), probe())));
        disk.run(10);
        // The rate does not oscillate: it is never far from its mean over five seconds.
        let spans: Vec<Measured> = (0..20).map(|_| disk.run(5)).collect();
        let mean = spans.iter().map(|measured| measured.mib_per_second).sum::<u64>() / 20;
        for measured in &spans {
            assert!(
                measured.mib_per_second * 2 >= mean && measured.mib_per_second <= mean * 2,
                "{} of a mean of {mean}: {spans:?}",
                measured.mib_per_second
            );
        }
    }
}

/// If throttling has no effect on the latency, the copier is not throttled: the copy would only take
/// longer.
#[test]
fn the_copier_is_not_throttled_without_effect() {
    let load = Load { io_ns: MS / 2, ios_per_second: 50, copier_delay_ns: 4 * MS, ..QUIET_DISK };
    for seed in 1..=6 {
        let alone = alone(load, seed);
        let mut disk = Disk::new(load, seed, Some((Impact::Medium, Some(alone), probe())));
        disk.run(20);
        let measured = disk.run(60);
        assert!(measured.mib_per_second >= 90, "the floor is 62: {measured:?}");
    }
}

#[test]
fn without_applications_the_copier_runs_at_full_speed() {
    let mut disk = Disk::new(QUIET_DISK, 1, Some((Impact::Low, None, probe())));
    let busy = disk.run(30);
    disk.set_load(Load { ios_per_second: 0, ..QUIET_DISK });
    disk.run(3);
    let idle = disk.run(10);
    assert!(idle.mib_per_second >= 245 && busy.mib_per_second < 125, "{busy:?} {idle:?}");
    // And it throttles again within two seconds of their return.
    disk.set_load(QUIET_DISK);
    disk.run(2);
    let again = disk.run(20);
    assert!(again.mib_per_second < 125, "{again:?}");
}

#[test]
fn the_floor_holds_on_a_disk_that_the_applications_saturate() {
    for (impact, share) in [(Impact::Low, 16), (Impact::Medium, 4)] {
        for seed in 1..=3 {
            let idle = Load { ios_per_second: 0, ..QUIET_DISK };
            let mut disk = Disk::new(idle, seed, Some((impact, Some(Duration::from_millis(1)), probe())));
            let best = disk.run(10).mib_per_second;
            // Sixteen I/Os always in flight: the disk is never idle.
            disk.set_load(Load { always: 16, ..idle });
            disk.run(10);
            let measured = disk.run(60);
            // Less the time for sampling, and the steps up to the floor.
            assert!(measured.mib_per_second * share * 100 >= best * 80, "{impact:?}: {measured:?} of {best}");
        }
    }
}

#[test]
fn the_floor_holds_where_no_rate_would_be_slow_enough() {
    // A read takes as long as eighty I/Os, so any I/O queued after a read is slow. The floor is a share of
    // the best rate, seen before the applications came, or the minimum: 62, 62 and 10 MiB/s divided.
    for (impact, read_ms, floor) in
        [(Impact::Low, 16, 62 / 16), (Impact::Medium, 16, 62 / 4), (Impact::Low, 100, 2)]
    {
        let busy = Load { io_ns: MS / 5, read_ns: read_ms * MS, ..QUIET_DISK };
        for seed in 1..=3 {
            let idle = Load { ios_per_second: 0, ..busy };
            let mut disk = Disk::new(idle, seed, Some((impact, None, probe())));
            disk.run(10);
            disk.set_load(busy);
            disk.run(20);
            let measured = disk.run(100);
            let share = measured.mib / floor;
            assert!((85..=130).contains(&share), "{impact:?}: {share} % of {floor} MiB/s: {measured:?}");
            // And the rate rises again as soon as there is room.
            disk.set_load(QUIET_DISK);
            disk.run(30);
            let measured = disk.run(60);
            let room = if impact == Impact::Low { 12 } else { 45 };
            assert!(measured.mib_per_second >= room, "{impact:?}: {measured:?}");
        }
    }
}

#[test]
fn the_cost_of_copy_on_write_does_not_throttle_the_copier() {
    for seed in 1..=3 {
        let before = alone(QUIET_DISK, seed);
        // Since the instant every I/O takes three times as long, independent of the copier.
        let cow = Load { io_ns: 3 * MS, ios_per_second: 100, ..QUIET_DISK };
        let quiet = alone(cow, seed);
        assert!(percent(quiet, before) > 250, "so that the goal of before is out of reach");
        let mut disk = Disk::new(cow, seed, Some((Impact::Medium, Some(before), probe())));
        disk.run(30);
        let measured = disk.run(60);
        assert!(percent(measured.latency, quiet) <= 212, "{measured:?}");
        assert!(measured.mib_per_second >= 75, "no reason to go near the floor: {measured:?}");
    }
}

#[test]
fn one_outlier_does_not_move_the_rate() {
    let (mut all_with, mut all_without) = (0, 0);
    for seed in 1..=12 {
        let alone = alone(QUIET_DISK, seed);
        let measured = |outlier: Option<(u64, u64)>| {
            let load = Load { outlier, ..QUIET_DISK };
            let mut disk = Disk::new(load, seed, Some((Impact::Medium, Some(alone), probe())));
            disk.run(22);
            disk.run(3).mib_per_second
        };
        let (with, without) = (measured(Some((21 * SECOND, SECOND / 4))), measured(None));
        println!("{with} instead of {without} MiB/s");
        (all_with, all_without) = (all_with + with, all_without + without);
    }
    assert!(all_with * 100 >= all_without * 93, "{all_with} instead of {all_without}");
}

/// The latencies and baselines that were reported.
#[derive(Default)]
struct Reported(Mutex<Vec<(Option<Duration>, Option<Duration>)>>);

impl Observer for Reported {
    fn event(&self, event: &Event) {
        if let Event::Latency { origin, baseline, .. } = event {
            self.0.lock().unwrap().push((*origin, *baseline));
        }
    }
}

#[test]
fn latency_is_reported_twice_a_second_also_without_control() {
    for impact in [Impact::None, Impact::Medium] {
        let reported = Reported::default();
        let mut disk = Disk::with_observer(QUIET_DISK, 1, Some((impact, None, probe())), &reported);
        disk.run(20);
        let reported = reported.0.lock().unwrap();
        assert!((30..=41).contains(&reported.len()), "{}", reported.len());
        assert!(reported.iter().filter(|(origin, _)| origin.is_some()).count() >= 30);
        assert_eq!(reported.iter().any(|(_, baseline)| baseline.is_some()), impact != Impact::None);
    }
}

/// Feeds a controller by hand: one tick of a copier that wants to read more, with these I/Os.
fn tick(controller: &mut Controller, ticks: &mut u32, sample: Option<LatencySample>) -> Allowance {
    *ticks += 1;
    let reads = controller.allowance().reads;
    controller.tick(&TickInput {
        now: TICK * *ticks,
        sample,
        read: Bytes::mib(reads),
        reads: 0,
        reads_max: reads,
        waited_for_slot: true,
        waited_for_rate: controller.allowance().rate.is_some(),
    });
    controller.allowance()
}

fn ios(count: u64, each: Duration) -> Option<LatencySample> {
    Some(LatencySample { ios: count, waited: each * u32::try_from(count).unwrap(), in_flight: 1 })
}

#[test]
fn a_queue_that_brings_no_more_is_not_kept() {
    for (brings_more, most_min, most_max) in [(false, 2, 2), (true, 8, u64::MAX)] {
        let before = Some(Duration::from_millis(1));
        let mut controller = Controller::new(Impact::Medium, before, Duration::ZERO);
        let (mut longest, mut long, mut ticks) = (0, 0, 0);
        for number in 1..=140 {
            let reads = controller.allowance().reads;
            longest = longest.max(reads);
            (long, ticks) = (long + u64::from(reads > 1), ticks + u64::from(reads > 0));
            controller.tick(&TickInput {
                now: TICK * number,
                sample: ios(50, Duration::from_millis(1)),
                read: Bytes::mib(if brings_more { reads } else { reads.min(1) }),
                reads: 0,
                reads_max: reads,
                waited_for_slot: true,
                waited_for_rate: false,
            });
        }
        assert!((most_min..=most_max).contains(&longest), "{longest} reads");
        assert!(brings_more || long * 10 < ticks, "more than one read in {long} of {ticks} ticks");
    }
}

#[test]
fn without_measurements_nothing_is_limited() {
    let (mut controller, mut ticks) = (Controller::new(Impact::Low, None, Duration::ZERO), 0);
    let free = Allowance { reads: WINDOW_MAX / ONE, rate: None };
    assert_eq!(tick(&mut controller, &mut ticks, None), free);
    let slow = ios(100, Duration::from_millis(50));
    for _ in 0..5 {
        assert_ne!(tick(&mut controller, &mut ticks, slow), free, "there are measurements again");
    }
    assert_eq!(tick(&mut controller, &mut ticks, None), free);
}

#[test]
fn sampling_is_short_and_rare() {
    let before = Some(Duration::from_millis(1));
    let (mut controller, mut ticks) = (Controller::new(Impact::Low, before, Duration::ZERO), 0);
    let mut paused = 0u32;
    for _ in 0..3000 {
        // As slow as possible, whatever the controller does.
        let allowance = tick(&mut controller, &mut ticks, ios(50, Duration::from_millis(30)));
        paused += u32::from(allowance.reads == 0);
        assert!(allowance.rate.is_none_or(|rate| rate >= FLOOR_MIN), "{allowance:?}");
    }
    assert!((1..=300).contains(&paused), "{paused} of 3000 ticks");
}

#[test]
fn stuck_io_counts_as_slow_and_not_as_idle() {
    let before = Some(Duration::from_millis(1));
    let (mut controller, mut ticks) = (Controller::new(Impact::Medium, before, Duration::ZERO), 0);
    let stuck = Some(LatencySample { ios: 0, waited: Duration::ZERO, in_flight: 3 });
    for _ in 0..25 {
        tick(&mut controller, &mut ticks, stuck);
    }
    assert!(controller.latency().0 >= Some(Duration::from_millis(900)), "{:?}", controller.latency());
    assert_ne!(controller.state, State::Idle);
    for _ in 0..25 {
        tick(&mut controller, &mut ticks, Some(LatencySample::default()));
    }
    assert_eq!((controller.state, controller.latency().0), (State::Idle, None));
}

#[test]
fn steps_follow_the_latency() {
    let at =
        |ms| factor(Duration::from_millis(ms), Duration::from_millis(10), Duration::from_millis(20), false);
    // A higher latency never gives a larger window, and only a latency past the goal gives a smaller one.
    let steps: Vec<u64> = (0..100).map(at).collect();
    assert!(steps.windows(2).all(|pair| pair[0] >= pair[1]), "{steps:?}");
    assert!((0..=17).all(|ms| at(ms) > 1000) && (18..=20).all(|ms| at(ms) == 1000));
    assert!((21..100).all(|ms| at(ms) < 1000));
}
