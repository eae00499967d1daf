//! One copy from its first read to its final name: the order of the phases, and the reason for that order.
//!
//! Invariants:
//! - the store is opened after the last read of the origin has completed ([`copy_and_apply_originals`]);
//! - after any failure nothing is in flight, the secondary is abandoned (it gets no final name), and the
//!   error states how it is left. A secondary that does not respond any more is left as it is, with the
//!   writes in flight to it: the engine must then not be dropped.

use std::cell::Cell;
use std::os::fd::OwnedFd;
use std::time::Duration;

use serde::Serialize;

use super::checksums::Checksums;
use super::fuzzy::{self, FuzzyStats};
use super::impact::ImpactWatch;
use super::origin::Origin;
use super::overlay::{self, OriginalsStats, Store};
use super::placed::PlacedSet;
use super::ports::{OriginalsProvider, PlacementLog, Releases, ResumePoint};
use super::regions::Order;
use super::schedule::Schedule;
use super::sink::{Sink, drain};
use super::throttle::Throttle;
use super::{append, confirm, packed, verify};
use crate::base::{Bytes, Error, ErrorKind, Result, SegmentSize};
use crate::extent::{Extent, ExtentSet};
use crate::io::Driver;
use crate::io::{Engine, FileIx};
use crate::progress::{Observer, Phase, Silent};
use crate::secondary::Secondary;
use crate::sys::process::crash_point;

/// Ranges outside the block list are zeroed in pieces of at most this size, so that the interrupt is polled
/// in between.
const ABSENT_STEP: Bytes = Bytes::mib(256);

/// The options of a copy that the user chooses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyOptions {
    /// Unit of copying.
    pub segment: SegmentSize,
    /// Unit of release; see [`region_size_for`](super::region_size_for).
    pub region: Bytes,
    /// The order of the regions.
    pub order: Order,
    /// Most bytes per second read from the origin.
    pub rate: Option<Bytes>,
    /// Re-read the secondary and compare checksums.
    pub verify: bool,
}

/// A copy to be made.
pub struct CopyJob<'a> {
    /// A new engine, configured by [`engine_config`](crate::secondary::engine_config).
    pub engine: &'a mut dyn Engine,
    /// The origin below the snapshot, opened for direct I/O.
    pub origin: OwnedFd,
    /// Its name in error messages.
    pub origin_description: String,
    /// Its size.
    pub origin_size: Bytes,
    /// The parts of the origin that are copied; sorted, disjoint, multiples of 4 KiB or the origin's end.
    pub block_list: Vec<Extent>,
    /// The parts of the origin, outside the block list, that stay as the secondary or its parent has them; sorted,
    /// disjoint.
    pub inherited: Vec<Extent>,
    /// The parts of the origin that are copied first; in any order.
    pub first: Vec<Extent>,
    /// The options.
    pub options: CopyOptions,
    /// The secondary: opened, checked, and its instant set.
    pub secondary: Box<dyn Secondary>,
    /// The originals; None for a cold copy.
    pub originals: Option<&'a mut dyn OriginalsProvider>,
    /// Releases regions; None if nothing is preserved.
    pub releases: Option<&'a mut dyn Releases>,
    /// The durable record of placed segments; None for a copy that cannot be resumed.
    pub placements: Option<&'a mut dyn PlacementLog>,
    /// Where an earlier process stopped; the secondary was reopened accordingly.
    pub resumed: Option<ResumePoint>,
    /// Measures and limits the impact on the applications; None if there are none.
    pub impact: Option<ImpactWatch>,
    /// The report gets the checksum of every segment.
    pub keeps_checksums: bool,
    /// Receives progress events.
    pub observer: &'a dyn Observer,
    /// Polled at least every 100 ms; [`run`] aborts the copy with the error that it returns.
    pub interrupt: &'a dyn Fn() -> Result<()>,
    /// Called after the last read, before the end of the archive is written, and again before the secondary
    /// gets its name: checks whether the data read is still valid. An error abandons the copy.
    pub before_publish: &'a dyn Fn() -> Result<()>,
    /// Called at once when the copy fails: before waiting for what is in flight, and before the secondary is
    /// abandoned.
    pub on_failure: &'a dyn Fn(),
    /// Called instead of `on_failure` when a resumed copy fails before it has written anything, except by an
    /// interrupt or because its snapshot is lost: the secondary is left unchanged, and the caller must leave
    /// everything else unchanged, too.
    pub on_unwritten_failure: &'a dyn Fn(),
}

fn never_fails() -> Result<()> {
    Ok(())
}

impl<'a> CopyJob<'a> {
    /// A copy from the beginning of a whole origin that is not in use, without an observer. The caller sets
    /// the fields that differ.
    pub fn new(
        engine: &'a mut dyn Engine,
        origin: OwnedFd,
        origin_size: Bytes,
        options: CopyOptions,
        secondary: Box<dyn Secondary>,
    ) -> Self {
        Self {
            engine,
            origin,
            origin_description: "the origin".to_owned(),
            origin_size,
            block_list: Extent::new(Bytes::ZERO, origin_size).into_iter().collect(),
            inherited: Vec::new(),
            first: Vec::new(),
            options,
            secondary,
            originals: None,
            releases: None,
            placements: None,
            resumed: None,
            impact: None,
            keeps_checksums: false,
            observer: &Silent,
            interrupt: &never_fails,
            before_publish: &never_fails,
            on_failure: &|| (),
            on_unwritten_failure: &|| (),
        }
    }
}

/// The result of a copy. Sizes in bytes, times in seconds.
#[derive(Clone, Debug, Default, Serialize)]
pub struct CopyReport {
    /// The engine's name.
    pub engine: &'static str,
    /// The secondary's name.
    pub secondary: String,
    /// Unit of copying.
    pub segment_bytes: Bytes,
    /// Segments copied.
    pub segment_count: u64,
    /// Segments that an earlier process had copied.
    pub resumed_segment_count: u64,
    /// Bytes of the origin that are not in the block list.
    pub absent_bytes: Bytes,
    /// Bytes of the origin that the secondary, or the parent of an increment, has already.
    pub inherited_bytes: Bytes,
    /// Bytes read from the origin.
    pub read_bytes: Bytes,
    /// Of those, in segments that were not all zero.
    pub data_bytes: Bytes,
    /// Of those, in segments that were all zero.
    pub zero_bytes: Bytes,
    /// Bytes written to the secondary, framing and originals included.
    pub written_bytes: Bytes,
    /// Originals applied or appended.
    pub originals_count: u64,
    /// Their bytes.
    pub originals_bytes: Bytes,
    /// Bytes of the secondary that were re-read and found equal; None without verification.
    pub verified_bytes: Option<Bytes>,
    /// Duration of the fuzzy copy.
    pub data_seconds: f64,
    /// Duration of applying or appending the originals.
    pub originals_seconds: f64,
    /// Duration of the verification, including the sync before it.
    pub verify_seconds: f64,
    /// Duration of sync and rename.
    pub finish_seconds: f64,
    /// Bytes read from the origin per second of the fuzzy copy.
    pub read_bytes_per_second: u64,
    /// The XXH3-64 of every segment on the secondary, if asked for.
    #[serde(skip)]
    pub checksums: Option<Vec<u64>>,
}

/// Makes a copy. On success the secondary is complete, synced, and has its final name.
///
/// # Errors
/// The first failure, with the state in which the secondary is left; the origin is never written.
/// [`ErrorKind::Io`] for a failed read or write, [`ErrorKind::NoSpace`] for a full secondary,
/// [`ErrorKind::BadData`] for a failed verification, any error that the interrupt or the originals provider
/// returns.
pub fn run(job: CopyJob<'_>) -> Result<CopyReport> {
    let CopyJob {
        engine,
        mut secondary,
        observer,
        interrupt,
        before_publish,
        on_failure,
        on_unwritten_failure,
        ..
    } = job;
    let mut driver = Driver::new(engine, observer, interrupt);
    let options = job.options;
    let confirmed = Cell::new(job.resumed.is_none());
    let resumed = job.resumed.unwrap_or_default();
    let plan = Schedule::new(job.block_list, job.origin_size, options.segment).map(|schedule| Plan {
        placed: PlacedSet::default(),
        resumed,
        schedule,
        region: options.region,
        order: options.order,
        inherited: job.inherited.into_iter().collect(),
        first: job.first,
        origin_description: job.origin_description,
        throttle: Throttle::new(options.rate, job.impact, observer),
        verify: options.verify,
        keeps_checksums: job.keeps_checksums,
        originals: job.originals,
        releases: job.releases,
        placements: job.placements,
    });
    let origin = job.origin;
    let outcome = plan.and_then(|plan| {
        run_phases(&mut driver, plan, origin, secondary.as_mut(), (&confirmed, before_publish))
    });
    outcome.map_err(|error| {
        // A copy whose snapshot is lost can never be resumed.
        let is_final = matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::StoreInvalid);
        if !confirmed.get() && !is_final {
            on_unwritten_failure();
            // Only reads were issued: whether they have completed or not, the secondary is unchanged.
            drain(&mut driver, false);
            secondary.leave();
            return error.state("nothing was written: everything is as the killed copy left it");
        }
        on_failure();
        let is_drained = drain(&mut driver, secondary.is_stream());
        give_up(secondary.as_mut(), error, is_drained)
    })
}

/// Abandons the secondary of a copy that failed with `error`.
fn give_up(secondary: &mut dyn Secondary, error: Error, is_drained: bool) -> Error {
    let abandoned = if is_drained || secondary.is_stream() {
        secondary.abandon()
    } else {
        // A further request to it may hang, as those in flight do.
        secondary.leave();
        Ok(format!(
            "{} does not answer: writes in flight to it may still complete, and this process exits when they \
             have",
            secondary.description()
        ))
    };
    match abandoned {
        Ok(state) => {
            let state = match error.state_left() {
                Some(known) => format!("{known}; {state}"),
                None => state,
            };
            error.state(state)
        }
        Err(undo) => error.with_failed_undo(undo),
    }
}

/// The checked values and the ports of a job.
struct Plan<'a> {
    schedule: Schedule,
    region: Bytes,
    order: Order,
    inherited: ExtentSet,
    first: Vec<Extent>,
    origin_description: String,
    throttle: Throttle<'a>,
    verify: bool,
    keeps_checksums: bool,
    resumed: ResumePoint,
    placed: PlacedSet,
    originals: Option<&'a mut dyn OriginalsProvider>,
    releases: Option<&'a mut dyn Releases>,
    placements: Option<&'a mut dyn PlacementLog>,
}

impl Plan<'_> {
    /// Keeps the segments that an earlier process has placed and that are still on the secondary.
    fn confirm(
        &mut self,
        driver: &mut Driver<'_>,
        secondary: &mut dyn Secondary,
        file: FileIx,
        checksums: &Checksums,
    ) -> Result<()> {
        let originals = self.originals.as_deref_mut().map(|it| it as &mut dyn OriginalsProvider);
        let overlaid = confirm::overlaid(&self.schedule, secondary, &self.resumed, originals)?;
        let placements = self.placements.as_deref_mut().map(|it| it as &mut dyn PlacementLog);
        let facts = (checksums, &overlaid);
        confirm::run(driver, &self.schedule, secondary, file, &mut self.resumed, facts, placements)?;
        self.placed = PlacedSet::new(&self.resumed.placed, self.schedule.segment_count());
        Ok(())
    }
}

fn run_phases(
    driver: &mut Driver<'_>,
    mut plan: Plan<'_>,
    origin: OwnedFd,
    secondary: &mut dyn Secondary,
    (confirmed, before_publish): (&Cell<bool>, &dyn Fn() -> Result<()>),
) -> Result<CopyReport> {
    if plan.verify && secondary.is_stream() {
        return Err(Error::usage("an archive sent to standard output cannot be read back")
            .next("omit --verify, and run 'tidemark verify' where the archive is stored"));
    }
    let (size, piece_max) = (plan.schedule.size(), plan.throttle.read_max());
    let origin = Origin::open(driver.engine, origin, &plan.origin_description, size, piece_max)?;
    let keeps_checksums = plan.verify || plan.keeps_checksums;
    let mut checksums =
        Checksums::new(plan.schedule.segment_count(), plan.schedule.segment().bytes(), keeps_checksums);
    let mut sink = Sink::new(secondary.attach(driver.engine)?, secondary.is_stream());
    if !confirmed.get() {
        plan.confirm(driver, secondary, sink.file, &checksums)?;
        confirmed.set(true);
    }
    checksums.resume(&plan.resumed);
    let mut report = CopyReport {
        engine: driver.engine.name(),
        secondary: secondary.description().to_owned(),
        segment_bytes: plan.schedule.segment().bytes(),
        resumed_segment_count: plan.placed.count(),
        absent_bytes: plan.schedule.size() - plan.schedule.total() - plan.inherited.total(),
        inherited_bytes: plan.inherited.total(),
        ..CopyReport::default()
    };
    write_blocks(driver, &mut sink, |memory| secondary.opening(memory))?;
    copy_and_apply_originals(driver, &mut plan, &origin, secondary, &mut sink, &mut checksums, &mut report)?;
    zero_absent(driver, (&plan.schedule, &plan.inherited), secondary, &mut sink)?;
    // The following blocks make a stream complete: once they are written, it cannot be undone.
    before_publish()?;
    write_blocks(driver, &mut sink, |memory| secondary.closing(memory))?;
    report.written_bytes = sink.written();

    let begin = driver.now();
    if plan.verify {
        driver.sync(sink.file)?;
        secondary.forget_cache();
        // What is packed is read as frames, not as segments.
        let (size, segment) = (plan.schedule.size(), plan.schedule.segment());
        let none = Schedule::new(Vec::new(), size, segment)?;
        let schedule = if secondary.is_packed() { &none } else { &plan.schedule };
        report.verified_bytes = Some(verify::run(driver, schedule, secondary, sink.file, &checksums)?);
        report.verify_seconds = (driver.now() - begin).as_secs_f64();
    }
    let begin = driver.now();
    driver.begin_phase(Phase::Finish, None);
    before_publish()?;
    secondary.seal()?;
    driver.sync(sink.file)?;
    secondary.finish()?;
    report.checksums = checksums.of_all(&plan.schedule).filter(|_| plan.keeps_checksums);
    report.finish_seconds = (driver.now() - begin).as_secs_f64();
    Ok(report)
}

/// The fuzzy copy, then the originals.
///
/// Why the result is exact. A read below the snapshot returns newer data for a chunk only if a write to that
/// chunk was issued to the origin before the read ended, and the kernel issues it only after the exception
/// has been committed. So every chunk that the fuzzy copy got wrong has its original in the store when the last
/// read has completed. The store is read AFTER the last read of the origin has completed: `fuzzy::run`
/// returns only then, and `open` is what makes the store readable. The argument rests on this order alone, and
/// only this function ensures it.
///
/// Why a region may be released before its originals are on the secondary. After the release, writes to the
/// region are not preserved. But the last read of the region has completed before, so no read contains what
/// those writes change. The chunks preserved until then are exactly those that the reads of the region can
/// have got wrong. Their originals stay in the store, which drops nothing, until they are applied. So the
/// applications pay nothing for copy-on-write in the region from then on, and do not have to wait until the
/// originals of the region have been applied.
fn copy_and_apply_originals(
    driver: &mut Driver<'_>,
    plan: &mut Plan<'_>,
    origin: &Origin,
    secondary: &mut dyn Secondary,
    sink: &mut Sink,
    checksums: &mut Checksums,
    report: &mut CopyReport,
) -> Result<()> {
    let begin = driver.now();
    let stats = if secondary.is_packed() {
        let releases = plan.releases.as_deref_mut().map(|it| it as &mut dyn Releases);
        let what = (origin, &plan.schedule, plan.region);
        packed::run(driver, what, releases, secondary, sink, &mut plan.throttle)?
    } else {
        copy_segments(driver, plan, origin, secondary, sink, checksums)?
    };
    report.add_data(stats, driver.now() - begin);

    // The barrier: no read of the origin is in flight any more.
    let Some(provider) = plan.originals.take() else { return Ok(()) };
    if let Some(placements) = plan.placements.as_deref_mut() {
        placements.originals_begun()?;
    }
    let begin = driver.now();
    driver.begin_phase(Phase::Originals, None);
    let (store, description) = provider.open()?;
    let file = driver.engine.add_file(store, &description)?;
    let mut store = Store { provider, file };
    let stats = if secondary.appends() {
        append::run(driver, &mut store, &plan.schedule, secondary, sink)?
    } else {
        overlay::run(driver, &mut store, &plan.schedule, secondary, sink, checksums)?
    };
    crash_point("copy.originals.laid");
    store.provider.check_valid()?;
    driver.report();
    report.add_originals(stats, driver.now() - begin);
    Ok(())
}

/// The fuzzy copy, segment by segment.
fn copy_segments(
    driver: &mut Driver<'_>,
    plan: &mut Plan<'_>,
    origin: &Origin,
    secondary: &mut dyn Secondary,
    sink: &mut Sink,
    checksums: &mut Checksums,
) -> Result<FuzzyStats> {
    let copying = fuzzy::Plan {
        origin,
        schedule: &plan.schedule,
        region: plan.region,
        order: plan.order,
        first: &plan.first,
        placed: &plan.placed,
        releases: plan.releases.as_deref_mut().map(|it| it as &mut dyn Releases),
        placements: plan.placements.as_deref_mut().map(|it| it as &mut dyn PlacementLog),
    };
    fuzzy::run(driver, copying, secondary, sink, checksums, &mut plan.throttle)
}

/// Zeroes the secondary outside the block list, whatever it held before, except what is inherited.
fn zero_absent(
    driver: &mut Driver<'_>,
    (schedule, inherited): (&Schedule, &ExtentSet),
    secondary: &mut dyn Secondary,
    sink: &mut Sink,
) -> Result<()> {
    for gap in schedule.gaps().flat_map(|gap| inherited.gaps_in(gap)) {
        for step in gap.split(ABSENT_STEP) {
            for zeros in secondary.absent(&[step]).zeros {
                while !sink.has_room() {
                    let Some(completion) = driver.next_completion(None)? else { break };
                    sink.take(driver, completion)?;
                }
                sink.put_zeros(driver, zeros)?;
            }
        }
    }
    sink.flush(driver)
}

/// Writes the blocks that `make` lays out until it returns None, one after the other.
fn write_blocks(
    driver: &mut Driver<'_>,
    sink: &mut Sink,
    mut make: impl FnMut(&mut [u8]) -> Result<Option<crate::secondary::Placement>>,
) -> Result<()> {
    loop {
        let Some(mut buffer) = driver.engine.take_buffer() else {
            return Err(driver.out_of_buffers());
        };
        match make(&mut buffer) {
            Ok(Some(placement)) => sink.put(driver, buffer, placement)?,
            other => {
                driver.engine.give_buffer(buffer);
                return other.map(|_| ());
            }
        }
        sink.flush(driver)?;
    }
}

impl CopyReport {
    fn add_data(&mut self, stats: FuzzyStats, elapsed: Duration) {
        self.segment_count = stats.segments;
        self.read_bytes = stats.read;
        self.zero_bytes = stats.zero;
        self.data_bytes = stats.read - stats.zero;
        self.data_seconds = elapsed.as_secs_f64();
        let nanos = elapsed.as_nanos().max(1);
        let rate = u128::from(stats.read.get()) * 1_000_000_000 / nanos;
        self.read_bytes_per_second = u64::try_from(rate).unwrap_or(u64::MAX);
    }

    fn add_originals(&mut self, stats: OriginalsStats, elapsed: Duration) {
        self.originals_count = stats.count;
        self.originals_bytes = stats.bytes;
        self.originals_seconds = elapsed.as_secs_f64();
    }
}
