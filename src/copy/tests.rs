//! Whole copies compared with the image at the instant, with a writing application, random sizes, and random
//! orders of completion; and what a failure leaves.

use std::cell::{Cell, RefCell};
use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use proptest::prelude::*;

use super::chaos::{ChaosEngine, Fault, Rng, World, WorldProvider, WorldReleases};
use super::schedule::Schedule;
use super::{
    CopyJob, CopyOptions, CopyReport, Impact, ImpactWatch, LatencyProbe, LatencySample, Order, Releases,
    ResumePoint, run,
};
use crate::base::{Bytes, ChunkSize, Error, ErrorKind, Result, SegmentSize};
use crate::extent::Extent;
use crate::format::SecondaryForm;
use crate::format::archive::map::MapCursor;
use crate::format::archive::{FrameKind, MapState, Superblock, Totals, frame, frame_offset};
use crate::io::engine::EngineConfig;
use crate::progress::{Event, Observer, Phase, Silent};
use crate::secondary::archive::Archive;
use crate::secondary::engine_config;
use crate::secondary::{
    Lineage, OriginIdentity, OriginalsMode, Secondary, SecondaryRequest, SecondaryTarget, open,
};

/// UTC, nanoseconds.
pub(super) const INSTANT: u64 = 1_700_000_000_000_000_000;

/// One copy with random parameters.
#[derive(Clone, Debug)]
pub(super) struct Case {
    pub(super) size: Bytes,
    pub(super) chunk: Bytes,
    pub(super) segment: Bytes,
    pub(super) buffers: u16,
    pub(super) batch_max: usize,
    pub(super) busy: u64,
    /// Segments of a region; None: nothing is released.
    pub(super) region: Option<u64>,
    pub(super) hot: bool,
    /// Percent of releases that are slow.
    pub(super) slow: u64,
    pub(super) verify: bool,
    pub(super) seed: u64,
}

pub(super) fn cases() -> impl Strategy<Value = Case> {
    let sizes = (1u64..1_500_000, 12u32..17, 16u32..20, 2u16..9);
    let order = (prop::option::of(1u64..5), any::<bool>(), 0u64..100);
    (sizes, order, 1usize..200, 0u64..95, any::<bool>(), any::<u64>()).prop_map(
        |((size, chunk, segment, buffers), (region, hot, slow), batch_max, busy, verify, seed)| Case {
            size: Bytes(size),
            chunk: Bytes(1 << chunk),
            segment: Bytes(1 << segment),
            buffers,
            batch_max,
            busy,
            region,
            hot,
            slow,
            verify,
            seed,
        },
    )
}

/// A copy of all of a world's origin, without its originals.
pub(super) fn job<'a>(
    engine: &'a mut ChaosEngine,
    origin: fs::File,
    case: &Case,
    secondary: Box<dyn Secondary>,
) -> CopyJob<'a> {
    let segment = SegmentSize::new(case.segment).unwrap();
    let options = CopyOptions {
        segment,
        region: case.segment * case.region.unwrap_or(1),
        order: if case.hot { Order::Hot } else { Order::Physical },
        rate: None,
        verify: case.verify,
    };
    CopyJob::new(engine, origin.into(), case.size, options, secondary)
}

pub(super) struct Setup {
    pub(super) directory: tempfile::TempDir,
    pub(super) world: Rc<RefCell<World>>,
    pub(super) engine: ChaosEngine,
    pub(super) case: Case,
    pub(super) rate: Option<Bytes>,
    pub(super) impact: Option<ImpactWatch>,
    pub(super) block_list: Vec<Extent>,
}

impl Setup {
    pub(super) fn new(case: &Case) -> Self {
        let world = World::new(case.size, case.chunk, case.seed, case.busy);
        let config = EngineConfig { buffer_count: case.buffers, buffer_bytes: case.segment + Bytes(8192) };
        Self {
            directory: tempfile::tempdir().unwrap(),
            engine: ChaosEngine::new(config, case.seed ^ 1, Some(world.clone())),
            world,
            case: case.clone(),
            rate: None,
            impact: None,
            block_list: vec![Extent::new(Bytes(0), case.size).unwrap()],
        }
    }

    /// Lists only parts of the origin. The rest is free: most of it is not preserved.
    pub(super) fn with_gaps(case: &Case) -> Self {
        let mut this = Self::new(case);
        let mut rng = Rng(case.seed);
        let mut block_list: Vec<Extent> = Vec::new();
        let mut at = 0;
        while at < case.size.get() {
            let start = at + 4096 * rng.below(40);
            at = start + 4096 * (1 + rng.below(40));
            block_list.extend(Extent::new(Bytes(start), case.size.min(Bytes(at))));
            at += 4096;
        }
        if !block_list.is_empty() {
            this.block_list = block_list;
        }
        let schedule =
            Schedule::new(this.block_list.clone(), case.size, SegmentSize::new(case.segment).unwrap());
        let mut releases = WorldReleases { world: this.world.clone(), slow: case.slow };
        for gap in schedule.unwrap().gaps() {
            if rng.chance(80) {
                releases.release(gap).unwrap();
            }
        }
        this
    }

    /// The listed parts of the image at the instant, zeros elsewhere.
    pub(super) fn expected(&self) -> Vec<u8> {
        let mut expected = vec![0u8; self.case.size.as_len()];
        for extent in &self.block_list {
            let range = extent.start().as_len()..extent.end().as_len();
            expected[range.clone()].copy_from_slice(&self.world.borrow().image[range]);
        }
        expected
    }

    pub(super) fn request(
        &self,
        name: &str,
        form: SecondaryForm,
        originals: OriginalsMode,
    ) -> SecondaryRequest {
        SecondaryRequest {
            target: SecondaryTarget::Path(self.directory.path().join(name)),
            form,
            originals,
            replace: false,
            verify: self.case.verify,
            forbidden: Vec::new(),
            origin: OriginIdentity {
                name: "data".to_owned(),
                path: "/dev/mapper/data".to_owned(),
                size: self.case.size,
            },
            segment: SegmentSize::new(self.case.segment).unwrap(),
            chunk: ChunkSize::new(self.case.chunk).unwrap(),
            block_list: self.block_list.clone(),
            lineage: Lineage::default(),
            in_place: false,
        }
    }

    fn copy(
        &mut self,
        secondary: Box<dyn Secondary>,
        interrupt: &dyn Fn() -> Result<()>,
        invalid: bool,
    ) -> Result<CopyReport> {
        self.copy_watched(secondary, interrupt, invalid, &Silent)
    }

    pub(super) fn copy_watched(
        &mut self,
        mut secondary: Box<dyn Secondary>,
        interrupt: &dyn Fn() -> Result<()>,
        invalid: bool,
        observer: &dyn Observer,
    ) -> Result<CopyReport> {
        secondary.set_instant(INSTANT);
        let mut provider =
            WorldProvider { world: self.world.clone(), batch_max: self.case.batch_max, invalid };
        let origin = self.world.borrow().origin.try_clone().unwrap();
        let mut releases = WorldReleases { world: self.world.clone(), slow: self.case.slow };
        let released = self.case.region.is_some();
        let job = job(&mut self.engine, origin, &self.case, secondary);
        run(CopyJob {
            options: CopyOptions { rate: self.rate, ..job.options },
            originals: Some(&mut provider),
            releases: released.then_some(&mut releases as &mut dyn Releases),
            impact: self.impact.take(),
            observer,
            interrupt,
            ..job
        })
    }

    /// Every block of the origin was read once, with no more buffers than exist.
    fn check_economy(&self) {
        let blocks = self.engine.read_blocks("the origin");
        assert_eq!(Bytes::from_len(blocks.len()).get(), self.case.size.get() / 4096);
        assert!(blocks.values().all(|count| *count == 1));
        assert!(self.engine.buffers_used_max() <= usize::from(self.case.buffers));
        assert!(self.engine.pool_is_whole(), "a buffer was lost");
    }

    /// The bytes of "out", which must be the only file.
    pub(super) fn only_file(&self) -> Vec<u8> {
        assert_eq!(self.names(), ["out"]);
        fs::read(self.directory.path().join("out")).unwrap()
    }

    pub(super) fn names(&self) -> Vec<String> {
        names(self.directory.path())
    }
}

pub(super) fn names(directory: &Path) -> Vec<String> {
    fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// Equality without printing megabytes.
pub(super) fn assert_same(found: &[u8], expected: &[u8]) {
    assert_eq!(found.len(), expected.len());
    if let Some(at) = found.iter().zip(expected).position(|(found, expected)| found != expected) {
        panic!("first difference at byte {at}: {} instead of {}", found[at], expected[at]);
    }
}

/// Flips a byte of the secondary, without the copier's knowledge, at the beginning of a phase.
struct Flip {
    directory: std::path::PathBuf,
    at: u64,
    phase: Phase,
}

/// The only file in `directory`.
pub(super) fn open_secondary(directory: &Path) -> fs::File {
    let path = directory.join(names(directory).remove(0));
    fs::OpenOptions::new().read(true).write(true).open(path).unwrap()
}

impl Observer for Flip {
    fn event(&self, event: &Event) {
        if matches!(event, Event::Phase { phase, .. } if *phase == self.phase) {
            let file = open_secondary(&self.directory);
            let mut byte = [0u8];
            file.read_exact_at(&mut byte, self.at).unwrap();
            file.write_all_at(&[byte[0] ^ 1], self.at).unwrap();
        }
    }
}

pub(super) fn never_fails() -> Result<()> {
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn a_raw_file_is_the_image_at_the_instant(case in cases()) {
        let mut setup = Setup::new(&case);
        let secondary = open(&setup.request("out", SecondaryForm::Raw, OriginalsMode::Overlay)).unwrap();
        let report = setup.copy(secondary, &never_fails, false).unwrap();
        prop_assert_eq!(setup.names(), ["out"]);
        let found = fs::read(setup.directory.path().join("out")).unwrap();
        assert_same(&found, &setup.world.borrow().image);
        setup.check_economy();
        prop_assert_eq!(report.read_bytes, case.size);
        prop_assert!(report.originals_count <= Bytes::from_len(setup.world.borrow().preserved_count()).get());
        prop_assert_eq!(report.verified_bytes, case.verify.then_some(case.size));
    }
}

/// An archive's bytes, extracted as FORMAT.md specifies, every block checked; nothing is absent.
pub(super) fn extract(bytes: &[u8]) -> (Vec<u8>, Totals) {
    let (image, totals, absent) = extract_parts(bytes);
    assert!(absent.is_empty(), "{absent:?}");
    (image, totals)
}

/// As [`extract`]; returns the absent extents, too.
pub(super) fn extract_parts(bytes: &[u8]) -> (Vec<u8>, Totals, Vec<Extent>) {
    let head = Superblock::decode_head(&bytes[..4096]).unwrap();
    let (tail, totals) = Superblock::decode_tail(&bytes[bytes.len() - 4096..]).unwrap();
    assert_eq!(head, tail);
    assert_eq!(head.instant_utc_ns, INSTANT);
    let layout = head.layout();
    let frames = layout.frame_count(Bytes::from_len(bytes.len())).unwrap();
    assert_eq!(frames, totals.sequence_end());
    let mut image = vec![0u8; head.origin_size.as_len()];
    let mut present = vec![false; head.origin_size.as_len().div_ceil(4096)];
    let mut map = MapCursor::new(head.origin_size, false);
    let (mut absent, mut present_bytes) = (Vec::new(), Bytes(0));
    for sequence in 0..frames {
        let at = frame_offset(sequence, head.segment).unwrap().as_len();
        let frame = frame::open(&layout, sequence, &bytes[at..]).unwrap();
        let facts = frame.control.facts;
        match facts.kind {
            FrameKind::Data => {
                assert!(sequence < totals.first_originals());
                for extent in frame.control.extents() {
                    let from = (extent.start() - facts.origin_offset).as_len();
                    let range = extent.start().as_len()..extent.end().as_len();
                    image[range.clone()].copy_from_slice(&frame.payload[from..from + range.len()]);
                    present[range.start / 4096..range.end.div_ceil(4096)].fill(true);
                }
            }
            FrameKind::Originals => {
                assert!((totals.first_originals()..totals.first_map()).contains(&sequence));
                let mut from = 0;
                for extent in frame.control.extents() {
                    let range = extent.start().as_len()..extent.end().as_len();
                    image[range.clone()].copy_from_slice(&frame.payload[from..from + range.len()]);
                    from += range.len();
                }
            }
            FrameKind::Map => map
                .read(facts.origin_offset, frame.payload, |entry| {
                    let range =
                        entry.extent.start().as_len() / 4096..entry.extent.end().as_len().div_ceil(4096);
                    let expected = entry.state == MapState::Present;
                    assert!(present[range].iter().all(|found| *found == expected));
                    match entry.state {
                        MapState::Present => present_bytes += entry.extent.length(),
                        MapState::Absent => absent.push(entry.extent),
                        MapState::Zero => {}
                        MapState::Inherited => panic!("a whole archive inherits nothing"),
                    }
                })
                .unwrap(),
        }
    }
    map.finish().unwrap();
    assert_eq!(present_bytes, totals.present_bytes);
    (image, totals, absent)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn an_archive_with_originals_applied_is_the_image_at_the_instant(case in cases()) {
        let mut setup = Setup::new(&case);
        let secondary = open(&setup.request("out.tdm", SecondaryForm::Archive, OriginalsMode::Overlay)).unwrap();
        let report = setup.copy(secondary, &never_fails, false).unwrap();
        prop_assert_eq!(setup.names(), ["out.tdm"]);
        let (image, totals) = extract(&fs::read(setup.directory.path().join("out.tdm")).unwrap());
        assert_same(&image, &setup.world.borrow().image);
        setup.check_economy();
        prop_assert_eq!(totals.originals_frames, 0);
        prop_assert_eq!(report.verified_bytes, case.verify.then_some(case.size));
    }

    #[test]
    fn an_archive_with_originals_appended_is_the_image_at_the_instant(case in cases()) {
        let mut setup = Setup::new(&case);
        let secondary = open(&setup.request("out.tdm", SecondaryForm::Archive, OriginalsMode::Append)).unwrap();
        let report = setup.copy(secondary, &never_fails, false).unwrap();
        let (image, totals) = extract(&fs::read(setup.directory.path().join("out.tdm")).unwrap());
        assert_same(&image, &setup.world.borrow().image);
        setup.check_economy();
        prop_assert_eq!(totals.originals_bytes, report.originals_bytes);
    }

    #[test]
    fn an_archive_down_a_pipe_is_the_image_at_the_instant(mut case in cases()) {
        case.verify = false;
        let mut setup = Setup::new(&case);
        let (mut reader, writer) = std::io::pipe().unwrap();
        let received = std::thread::spawn(move || {
            let mut bytes = Vec::new();
            std::io::Read::read_to_end(&mut reader, &mut bytes).map(|_| bytes)
        });
        let request = setup.request("-", SecondaryForm::Archive, OriginalsMode::Append);
        let writer = fs::File::from(std::os::fd::OwnedFd::from(writer));
        let secondary = Box::new(Archive::over_stream(writer, "a pipe", &request));
        setup.copy(secondary, &never_fails, false).unwrap();
        setup.check_economy();
        let world = setup.world.clone();
        drop(setup);
        let (image, _) = extract(&received.join().unwrap().unwrap());
        assert_same(&image, &world.borrow().image);
    }
}

/// An origin whose applications are slow whenever they are measured.
struct Slow(u64);

impl LatencyProbe for Slow {
    fn sample(&mut self) -> Option<LatencySample> {
        self.0 += 1;
        let waited = Duration::from_millis(100 * self.0);
        Some(LatencySample { ios: 100, waited, in_flight: 1 })
    }
}

#[test]
fn a_throttled_copy_is_the_image_at_the_instant() {
    #[derive(Default)]
    struct Told(std::sync::atomic::AtomicU32);
    impl Observer for Told {
        fn event(&self, event: &Event) {
            if matches!(event, Event::Latency { origin: Some(_), baseline: Some(_), .. }) {
                self.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            }
        }
    }
    let mut setup = Setup::new(&busy_case(true));
    let watch = ImpactWatch {
        impact: Impact::Low,
        before: Some(Duration::from_millis(1)),
        probe: Box::new(Slow(0)),
        read_max: Bytes::kib(64),
    };
    // Two seconds: long enough for a sample of the idle baseline.
    (setup.impact, setup.rate) = (Some(watch), Some(Bytes(setup.case.size.get() / 2)));
    let reported = Told::default();
    let secondary = open(&setup.request("out", SecondaryForm::Raw, OriginalsMode::Overlay)).unwrap();
    setup.copy_watched(secondary, &never_fails, false, &reported).unwrap();
    assert_same(&fs::read(setup.directory.path().join("out")).unwrap(), &setup.world.borrow().image);
    setup.check_economy();
    assert!((2..=6).contains(&reported.0.into_inner()), "two events a second, for two seconds");
}

#[test]
fn a_pipe_without_a_reader_is_reported() {
    let mut setup = Setup::new(&busy_case(false));
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let request = setup.request("-", SecondaryForm::Archive, OriginalsMode::Append);
    let writer = fs::File::from(std::os::fd::OwnedFd::from(writer));
    let secondary = Box::new(Archive::over_stream(writer, "a pipe", &request));
    let error = setup.copy(secondary, &never_fails, false).unwrap_err();
    assert_eq!((error.kind(), error.errno()), (ErrorKind::External, Some(libc::EPIPE)));
    assert!(error.to_string().contains("reader of standard output is gone"), "{error}");
    assert!(error.state_left().unwrap().contains("not a complete archive"));
}

#[test]
fn an_archive_that_fails_its_last_check_never_gets_its_end() {
    let mut setup = Setup::new(&busy_case(false));
    let (mut reader, writer) = std::io::pipe().unwrap();
    let received = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut reader, &mut bytes).map(|_| bytes)
    });
    let request = setup.request("-", SecondaryForm::Archive, OriginalsMode::Append);
    let writer = fs::File::from(std::os::fd::OwnedFd::from(writer));
    let secondary = Box::new(Archive::over_stream(writer, "a pipe", &request));
    let origin = setup.world.borrow().origin.try_clone().unwrap();
    let error = run(CopyJob {
        before_publish: &|| Err(Error::new(ErrorKind::External, "another process wrote to the origin")),
        ..job(&mut setup.engine, origin, &setup.case, secondary)
    })
    .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::External);
    drop(setup);
    let bytes = received.join().unwrap().unwrap();
    let end = bytes.len() - 4096;
    assert!(bytes.len() > 8192 && Superblock::decode_tail(&bytes[end..]).is_err(), "the archive has its end");
}

#[test]
fn originals_are_not_applied_to_a_damaged_frame() {
    // Damages the first frame's payload between the fuzzy copy and the originals. Writing a new checksum over
    // it would hide the damage.
    let mut setup = Setup::new(&busy_case(false));
    let secondary = open(&setup.request("out.tdm", SecondaryForm::Archive, OriginalsMode::Overlay)).unwrap();
    let at = 4096 + 4096 + 60_000;
    let flip = Flip { directory: setup.directory.path().to_owned(), at, phase: Phase::Originals };
    let error = setup.copy_watched(secondary, &never_fails, false, &flip).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BadData, "{error}");
    assert!(setup.names().is_empty());
}

#[test]
fn an_archive_that_another_process_changes_is_detected() {
    // Frames of the busy case are 64 KiB + 8 KiB: these bytes are in a control block, a payload, and both
    // superblocks. The last block is the tail superblock.
    for at in [0u64, 100, 4096 + 32, 4096 + 5000, 4096 + 4096 + 65536 + 40] {
        let mut setup = Setup::new(&busy_case(true));
        let secondary =
            open(&setup.request("out.tdm", SecondaryForm::Archive, OriginalsMode::Append)).unwrap();
        let flip = Flip { directory: setup.directory.path().to_owned(), at, phase: Phase::Verify };
        let error = setup.copy_watched(secondary, &never_fails, false, &flip).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::BadData, "byte {at}: {error}");
        assert!(setup.names().is_empty());
    }
}

pub(super) fn busy_case(verify: bool) -> Case {
    Case {
        size: Bytes(2_000_000),
        chunk: Bytes(4096),
        segment: Bytes(65536),
        buffers: 4,
        batch_max: 50,
        busy: 70,
        region: None,
        hot: false,
        slow: 10,
        verify,
        seed: 7,
    }
}

fn failing(case: &Case, fault: Fault) -> (Error, Vec<String>) {
    let mut setup = Setup::new(case);
    setup.engine.faults.push(fault);
    let secondary = open(&setup.request("out", SecondaryForm::Raw, OriginalsMode::Overlay)).unwrap();
    let error = setup.copy(secondary, &never_fails, false).unwrap_err();
    assert_eq!(crate::io::Engine::in_flight(&setup.engine), 0);
    (error, setup.names())
}

#[test]
fn faults_have_their_kind_and_leave_no_name() {
    for after in [0, 3, 20] {
        let (error, names) = failing(
            &busy_case(false),
            Fault { file: "the origin", write: false, after, errno: libc::EIO, torn: false },
        );
        assert_eq!((error.kind(), error.errno()), (ErrorKind::Io, Some(libc::EIO)));
        assert!(error.to_string().contains("reading the origin failed"), "{error}");
        assert!(error.state_left().unwrap().contains("the partial file was removed"));
        assert!(names.is_empty(), "{names:?}");

        let (error, names) = failing(
            &busy_case(false),
            Fault { file: "out", write: true, after, errno: libc::ENOSPC, torn: false },
        );
        assert_eq!((error.kind(), error.errno()), (ErrorKind::NoSpace, Some(libc::ENOSPC)));
        assert!(names.is_empty(), "{names:?}");

        let (error, names) = failing(
            &busy_case(false),
            Fault { file: "the store", write: false, after, errno: libc::EIO, torn: false },
        );
        assert_eq!(error.kind(), ErrorKind::Io);
        assert!(error.to_string().contains("from the store failed"), "{error}");
        assert!(names.is_empty(), "{names:?}");
    }
    let (error, names) = failing(
        &busy_case(true),
        Fault { file: "out", write: false, after: 5, errno: libc::EIO, torn: false },
    );
    assert_eq!(error.kind(), ErrorKind::Io);
    assert!(names.is_empty(), "{names:?}");
}

#[test]
fn an_invalid_snapshot_ends_the_copy() {
    let mut setup = Setup::new(&busy_case(false));
    let secondary = open(&setup.request("out", SecondaryForm::Raw, OriginalsMode::Overlay)).unwrap();
    let error = setup.copy(secondary, &never_fails, true).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::StoreInvalid);
    assert!(setup.names().is_empty());
}

#[test]
fn an_interrupt_ends_the_copy() {
    let mut setup = Setup::new(&busy_case(false));
    let secondary = open(&setup.request("out", SecondaryForm::Raw, OriginalsMode::Overlay)).unwrap();
    let asked = Cell::new(0);
    let interrupt = || {
        asked.set(asked.get() + 1);
        Err(Error::new(ErrorKind::Interrupted, "interrupted by SIGINT"))
    };
    std::thread::sleep(crate::io::POLL_INTERVAL);
    setup.world.borrow_mut().busy = 0;
    // The throttle makes the copy last longer than the poll interval.
    let origin = setup.world.borrow().origin.try_clone().unwrap();
    let job = job(&mut setup.engine, origin, &setup.case, secondary);
    let error = run(CopyJob {
        options: CopyOptions { rate: Some(Bytes(10_000)), ..job.options },
        interrupt: &interrupt,
        ..job
    })
    .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Interrupted);
    assert_eq!(asked.get(), 1);
    assert!(setup.names().is_empty());
}

/// Originals that cannot be opened.
struct Unopened(ErrorKind);

impl super::OriginalsProvider for Unopened {
    fn open(&mut self) -> Result<(std::os::fd::OwnedFd, String)> {
        Err(Error::new(self.0, "the originals cannot be opened"))
    }
    fn next_batch(&mut self, _max: usize) -> Result<Vec<crate::extent::Original>> {
        Ok(Vec::new())
    }
    fn check_valid(&mut self) -> Result<()> {
        Ok(())
    }
}

#[test]
fn a_resume_that_fails_before_it_writes_leaves_the_copy_unless_its_snapshot_is_lost() {
    for (kind, is_left) in
        [(ErrorKind::Io, true), (ErrorKind::StoreInvalid, false), (ErrorKind::Interrupted, false)]
    {
        let mut setup = Setup::new(&busy_case(false));
        let secondary = open(&setup.request("out", SecondaryForm::Raw, OriginalsMode::Overlay)).unwrap();
        let origin = setup.world.borrow().origin.try_clone().unwrap();
        let (left, undone) = (Cell::new(false), Cell::new(false));
        let error = run(CopyJob {
            originals: Some(&mut Unopened(kind)),
            resumed: Some(ResumePoint { originals_begun: true, ..ResumePoint::default() }),
            on_failure: &|| undone.set(true),
            on_unwritten_failure: &|| left.set(true),
            ..job(&mut setup.engine, origin, &setup.case, secondary)
        })
        .unwrap_err();
        assert_eq!(error.kind(), kind);
        assert_eq!((left.get(), undone.get()), (is_left, !is_left), "{kind:?}");
        assert_eq!(setup.names().is_empty(), !is_left, "the partial file after {kind:?}");
    }
}

#[test]
fn a_copy_that_fails_its_last_check_gets_no_name() {
    let case = busy_case(false);
    let mut setup = Setup::new(&case);
    let secondary = open(&setup.request("out", SecondaryForm::Raw, OriginalsMode::Overlay)).unwrap();
    let origin = setup.world.borrow().origin.try_clone().unwrap();
    let error = run(CopyJob {
        before_publish: &|| Err(Error::new(ErrorKind::External, "another process wrote to the origin")),
        ..job(&mut setup.engine, origin, &setup.case, secondary)
    })
    .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::External);
    assert!(setup.names().is_empty());
}

#[test]
fn a_corrupted_secondary_is_detected() {
    let case = busy_case(true);
    for at in [0, 65535, 1_000_000, 1_999_999] {
        let mut setup = Setup::new(&case);
        let secondary = open(&setup.request("out", SecondaryForm::Raw, OriginalsMode::Overlay)).unwrap();
        let flip = Flip { directory: setup.directory.path().to_owned(), at, phase: Phase::Verify };
        let error = setup.copy_watched(secondary, &never_fails, false, &flip).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::BadData);
        assert!(setup.names().is_empty());
    }
}

#[test]
fn a_block_list_with_gaps_copies_what_it_lists() {
    let mut case = busy_case(true);
    for seed in 0..10 {
        case.seed = seed;
        let mut setup = Setup::with_gaps(&case);
        let mut secondary = open(&setup.request("out", SecondaryForm::Raw, OriginalsMode::Overlay)).unwrap();
        secondary.set_instant(0);
        let origin = setup.world.borrow().origin.try_clone().unwrap();
        let mut provider = WorldProvider { world: setup.world.clone(), batch_max: 99, invalid: false };
        let mut releases = WorldReleases { world: setup.world.clone(), slow: 30 };
        let job = job(&mut setup.engine, origin, &case, secondary);
        run(CopyJob {
            block_list: setup.block_list.clone(),
            options: CopyOptions {
                region: case.segment * (1 + seed % 3),
                order: if seed % 2 == 0 { Order::Hot } else { Order::Physical },
                verify: true,
                ..job.options
            },
            originals: Some(&mut provider),
            releases: Some(&mut releases),
            ..job
        })
        .unwrap();
        assert_same(&fs::read(setup.directory.path().join("out")).unwrap(), &setup.expected());
    }
}

#[test]
fn buffers_stay_within_their_limit() {
    use crate::base::limits::COPY_BUFFER_BYTES_MAX;
    for shift in 16..=24 {
        let segment = SegmentSize::new(Bytes(1 << shift)).unwrap();
        let config = engine_config(segment, COPY_BUFFER_BYTES_MAX);
        let total = config.buffer_bytes * u64::from(config.buffer_count);
        assert!(config.buffer_count >= 2);
        assert!(total <= COPY_BUFFER_BYTES_MAX + Bytes(8192) * 2, "{segment}: {total}");
    }
}
