//! One copy from its first read to its final name: the order of the phases, and that order's reason.
//!
//! Invariants:
//! - the store is opened after the last read of the origin has completed ([`copy_and_lay_over`]);
//! - whatever fails, nothing is in flight afterwards, the secondary is abandoned (no final name), and
//!   the error says in which state it is left.

use std::os::fd::OwnedFd;
use std::time::Duration;

use serde::Serialize;

use super::checksums::Checksums;
use super::driver::{Driver, Sink};
use super::fuzzy::{self, FuzzyStats};
use super::origin::Origin;
use super::overlay::{self, OriginalsStats, Store};
use super::progress::{Observer, Phase};
use super::schedule::Schedule;
use super::throttle::Throttle;
use super::{append, verify};
use crate::base::limits::{COPY_BUFFER_BYTES_MAX, DIRECT_IO_ALIGN};
use crate::base::{Bytes, Error, Result, SegmentSize};
use crate::extent::{Extent, Original};
use crate::io::Engine;
use crate::io::engine::EngineConfig;
use crate::secondary::Secondary;

/// Buffers at most: more than this many transfers in flight gain nothing on any device.
const BUFFER_COUNT_MAX: u64 = 128;

/// Buffers at least: one being read while another is being written.
const BUFFER_COUNT_MIN: u64 = 2;

/// The engine that a copy with this segment size wants: a segment and a control block on each side in
/// every buffer, within [`COPY_BUFFER_BYTES_MAX`] (two buffers of the largest segment exceed it by
/// their control blocks).
#[must_use]
pub fn engine_config(segment: SegmentSize) -> EngineConfig {
    let buffer_bytes = segment.bytes() + DIRECT_IO_ALIGN * 2;
    let count = COPY_BUFFER_BYTES_MAX.get() / buffer_bytes.get();
    EngineConfig {
        buffer_count: u16::try_from(count.clamp(BUFFER_COUNT_MIN, BUFFER_COUNT_MAX))
            .expect("the count is clamped"),
        buffer_bytes,
    }
}

/// Where originals come from: the COW store, as `op` shows it to a copy.
pub trait OriginalsProvider {
    /// Called exactly once, after the last read of the origin has completed. Answers the COW store,
    /// open for direct reading, and its name.
    ///
    /// # Errors
    /// I/O errors; [`ErrorKind::StoreInvalid`](crate::base::ErrorKind::StoreInvalid).
    fn open(&mut self) -> Result<(OwnedFd, String)>;
    /// At most `max` further originals, in any order; none at the end.
    ///
    /// # Errors
    /// I/O errors, a store that does not decode.
    fn next_batch(&mut self, max: usize) -> Result<Vec<Original>>;
    /// Called after all originals were read: was the snapshot valid until now?
    ///
    /// # Errors
    /// [`ErrorKind::StoreInvalid`](crate::base::ErrorKind::StoreInvalid) where it was not.
    fn check_valid(&mut self) -> Result<()>;
}

/// A copy to be made.
pub struct CopyJob<'a> {
    /// Fresh, made for [`engine_config`].
    pub engine: &'a mut dyn Engine,
    /// What is read: the origin below the snapshot, opened for direct I/O.
    pub origin: OwnedFd,
    /// Its name in errors.
    pub origin_description: String,
    /// Its size.
    pub origin_size: Bytes,
    /// What of it is copied; sorted, disjoint, multiples of 4 KiB or the origin's end.
    pub block_list: Vec<Extent>,
    /// Unit of copying.
    pub segment: SegmentSize,
    /// Where to; opened, checked, and told the instant.
    pub secondary: Box<dyn Secondary>,
    /// The originals; None for a cold copy.
    pub originals: Option<&'a mut dyn OriginalsProvider>,
    /// Bytes per second read from the origin at most.
    pub rate: Option<Bytes>,
    /// Re-read the secondary and compare checksums.
    pub verify: bool,
    /// Is told how it goes.
    pub observer: &'a dyn Observer,
    /// Polled at least every 100 ms; an error aborts the copy and is what [`run`] answers.
    pub interrupt: &'a dyn Fn() -> Result<()>,
    /// Asked behind the last read, before the archive's end is written and again before the secondary
    /// gets its name: can what was read still be believed? An error abandons the copy.
    pub before_publish: &'a dyn Fn() -> Result<()>,
}

/// What a copy did. Sizes in bytes, times in seconds.
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
    /// Bytes read from the origin.
    pub read_bytes: Bytes,
    /// Of those, in segments that were not all zero.
    pub data_bytes: Bytes,
    /// Of those, in segments that were all zero.
    pub zero_bytes: Bytes,
    /// Bytes written to the secondary, framing and originals included.
    pub written_bytes: Bytes,
    /// Originals laid over or appended.
    pub originals_count: u64,
    /// Their bytes.
    pub originals_bytes: Bytes,
    /// Bytes of the secondary re-read and found equal; None where that was not asked for.
    pub verified_bytes: Option<Bytes>,
    /// The fuzzy copy.
    pub data_seconds: f64,
    /// The originals.
    pub originals_seconds: f64,
    /// The verification, the sync before it included.
    pub verify_seconds: f64,
    /// Sync and rename.
    pub finish_seconds: f64,
    /// Bytes read from the origin per second of the fuzzy copy.
    pub read_bytes_per_second: u64,
}

/// Makes a copy. On success the secondary is complete, synced, and has its final name.
///
/// # Errors
/// The first failure, with the state in which the secondary is left; the origin is never written.
/// [`ErrorKind::Io`](crate::base::ErrorKind::Io) for a failed read or write,
/// [`ErrorKind::NoSpace`](crate::base::ErrorKind::NoSpace) for a full secondary,
/// [`ErrorKind::BadData`](crate::base::ErrorKind::BadData) for a failed verification, whatever the
/// interrupt and the originals provider answer.
pub fn run(job: CopyJob<'_>) -> Result<CopyReport> {
    let CopyJob { engine, mut secondary, observer, interrupt, originals, before_publish, .. } = job;
    let mut driver = Driver::new(engine, observer, interrupt);
    let plan = Schedule::new(job.block_list, job.origin_size, job.segment).map(|schedule| Plan {
        schedule,
        origin: job.origin,
        origin_description: job.origin_description,
        rate: job.rate,
        verify: job.verify,
    });
    let outcome =
        plan.and_then(|plan| run_phases(&mut driver, plan, secondary.as_mut(), originals, before_publish));
    outcome.map_err(|error| {
        driver.drain(secondary.is_stream());
        match secondary.abandon() {
            Ok(state) => {
                let state = match error.state_left() {
                    Some(known) => format!("{known}; {state}"),
                    None => state,
                };
                error.state(state)
            }
            Err(undo) => error.with_failed_undo(undo),
        }
    })
}

/// The parts of a job that are plain values, checked.
struct Plan {
    schedule: Schedule,
    origin: OwnedFd,
    origin_description: String,
    rate: Option<Bytes>,
    verify: bool,
}

fn run_phases(
    driver: &mut Driver<'_>,
    plan: Plan,
    secondary: &mut dyn Secondary,
    originals: Option<&mut dyn OriginalsProvider>,
    before_publish: &dyn Fn() -> Result<()>,
) -> Result<CopyReport> {
    if plan.verify && secondary.is_stream() {
        return Err(Error::usage("what was sent to standard output cannot be read back")
            .next("leave --verify away, and run tidemark verify where the archive arrives"));
    }
    let schedule = plan.schedule;
    let mut checksums = Checksums::new(schedule.segment_count(), schedule.segment().bytes(), plan.verify);
    let origin = Origin::open(driver.engine, plan.origin, &plan.origin_description, schedule.size())?;
    let mut sink = Sink::new(secondary.attach(driver.engine)?, secondary.is_stream());
    let mut report = CopyReport {
        engine: driver.engine.name(),
        secondary: secondary.description().to_owned(),
        segment_bytes: schedule.segment().bytes(),
        ..CopyReport::default()
    };
    write_blocks(driver, &mut sink, |memory| secondary.opening(memory))?;
    copy_and_lay_over(
        driver,
        &Copying { schedule: &schedule, origin: &origin, rate: plan.rate },
        secondary,
        &mut sink,
        &mut checksums,
        originals,
        &mut report,
    )?;
    // What comes now is all that tells a complete stream from a cut one: it cannot be taken back.
    before_publish()?;
    write_blocks(driver, &mut sink, |memory| secondary.closing(memory))?;
    report.written_bytes = sink.written();

    let begin = driver.now();
    if plan.verify {
        driver.sync(sink.file)?;
        secondary.forget_cache();
        report.verified_bytes = Some(verify::run(driver, &schedule, secondary, sink.file, &checksums)?);
        report.verify_seconds = (driver.now() - begin).as_secs_f64();
    }
    let begin = driver.now();
    driver.begin_phase(Phase::Finish, None);
    before_publish()?;
    secondary.seal()?;
    driver.sync(sink.file)?;
    secondary.finish()?;
    report.finish_seconds = (driver.now() - begin).as_secs_f64();
    Ok(report)
}

/// What [`copy_and_lay_over`] reads.
struct Copying<'a> {
    schedule: &'a Schedule,
    origin: &'a Origin,
    rate: Option<Bytes>,
}

/// The fuzzy copy, then the originals.
///
/// Why the result is exact. A read below the snapshot returns newer data for a chunk only if a write
/// to that chunk was issued to the origin before the read ended, and the kernel issues it only after
/// the exception has been committed. So every chunk that the fuzzy copy got wrong has its original in
/// the store by the time the reading is done. The store is read AFTER the last read of the origin has
/// completed: `fuzzy::run` returns only then, and `open` is what makes the store readable. That order
/// is the whole argument; it is kept here and nowhere else.
fn copy_and_lay_over(
    driver: &mut Driver<'_>,
    copying: &Copying<'_>,
    secondary: &mut dyn Secondary,
    sink: &mut Sink,
    checksums: &mut Checksums,
    originals: Option<&mut dyn OriginalsProvider>,
    report: &mut CopyReport,
) -> Result<()> {
    let mut throttle = Throttle::new(copying.rate);
    let begin = driver.now();
    let stats =
        fuzzy::run(driver, copying.origin, copying.schedule, secondary, sink, checksums, &mut throttle)?;
    report.add_data(stats, driver.now() - begin);

    // The barrier: no read of the origin is in flight any more.
    let Some(provider) = originals else { return Ok(()) };
    let begin = driver.now();
    driver.begin_phase(Phase::Originals, None);
    let (store, description) = provider.open()?;
    let file = driver.engine.add_file(store, &description)?;
    let mut store = Store { provider, file };
    let stats = if secondary.appends() {
        append::run(driver, &mut store, copying.schedule, secondary, sink)?
    } else {
        overlay::run(driver, &mut store, copying.schedule, secondary, sink, checksums)?
    };
    store.provider.check_valid()?;
    driver.end_phase();
    report.add_originals(stats, driver.now() - begin);
    Ok(())
}

/// Writes blocks made by `make` until there is no more, one after the other.
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
