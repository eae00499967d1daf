//! Exactness of whole copies against the image at the instant, under a writing application, random
//! sizes, and random orders of completion; and what is left when something fails.

use std::cell::{Cell, RefCell};
use std::fs;
use std::path::Path;
use std::rc::Rc;

use proptest::prelude::*;

use super::chaos::{ChaosEngine, Fault, Rng, World, WorldProvider};
use super::progress::Silent;
use super::{CopyJob, CopyReport, engine_config, run};
use crate::base::{Bytes, Error, ErrorKind, Result, SegmentSize};
use crate::extent::Extent;
use crate::io::engine::EngineConfig;
use crate::secondary::{Form, OriginIdentity, OriginalsMode, Secondary, SecondaryRequest, Target, open};

/// One copy, as drawn.
#[derive(Clone, Debug)]
struct Case {
    size: Bytes,
    chunk: Bytes,
    segment: Bytes,
    buffers: u16,
    batch_max: usize,
    busy: u64,
    verify: bool,
    seed: u64,
}

fn cases() -> impl Strategy<Value = Case> {
    (1u64..3_000_000, 12u32..18, 16u32..20, 2u16..9, 1usize..200, 0u64..95, any::<bool>(), any::<u64>())
        .prop_map(|(size, chunk, segment, buffers, batch_max, busy, verify, seed)| Case {
            size: Bytes(size),
            chunk: Bytes(1 << chunk),
            segment: Bytes(1 << segment),
            buffers,
            batch_max,
            busy,
            verify,
            seed,
        })
}

struct Setup {
    directory: tempfile::TempDir,
    world: Rc<RefCell<World>>,
    engine: ChaosEngine,
    case: Case,
}

impl Setup {
    fn new(case: &Case) -> Self {
        let world = World::new(case.size, case.chunk, case.seed, case.busy);
        let config = EngineConfig { buffer_count: case.buffers, buffer_bytes: case.segment + Bytes(8192) };
        Self {
            directory: tempfile::tempdir().unwrap(),
            engine: ChaosEngine::new(config, case.seed ^ 1, Some(world.clone())),
            world,
            case: case.clone(),
        }
    }

    fn request(&self, name: &str, form: Form, originals: OriginalsMode) -> SecondaryRequest {
        SecondaryRequest {
            target: Target::Path(self.directory.path().join(name)),
            form,
            originals,
            replace: false,
            verify: self.case.verify,
            forbidden: Vec::new(),
            origin: OriginIdentity { description: "the origin".to_owned(), size: self.case.size },
            segment: SegmentSize::new(self.case.segment).unwrap(),
            block_list: vec![Extent::new(Bytes(0), self.case.size).unwrap()],
        }
    }

    fn copy(
        &mut self,
        mut secondary: Box<dyn Secondary>,
        interrupt: &dyn Fn() -> Result<()>,
        invalid: bool,
    ) -> Result<CopyReport> {
        secondary.begin(1_700_000_000_000_000_000);
        let mut provider =
            WorldProvider { world: self.world.clone(), batch_max: self.case.batch_max, invalid };
        let origin = self.world.borrow().origin.try_clone().unwrap();
        run(CopyJob {
            engine: &mut self.engine,
            origin: origin.into(),
            origin_description: "the origin".to_owned(),
            origin_size: self.case.size,
            block_list: vec![Extent::new(Bytes(0), self.case.size).unwrap()],
            segment: SegmentSize::new(self.case.segment).unwrap(),
            secondary,
            originals: Some(&mut provider),
            rate: None,
            verify: self.case.verify,
            observer: &Silent,
            interrupt,
        })
    }

    /// Every block of the origin was read once, never more buffers than there are.
    fn check_economy(&self) {
        let blocks = self.engine.read_blocks("the origin");
        assert_eq!(Bytes::from_len(blocks.len()).get(), self.case.size.get() / 4096);
        assert!(blocks.values().all(|count| *count == 1));
        assert!(self.engine.buffers_used_max() <= usize::from(self.case.buffers));
        assert!(self.engine.pool_is_whole(), "a buffer was lost");
    }

    fn names(&self) -> Vec<String> {
        names(self.directory.path())
    }
}

fn names(directory: &Path) -> Vec<String> {
    fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// Equality without printing megabytes.
fn assert_same(found: &[u8], expected: &[u8]) {
    assert_eq!(found.len(), expected.len());
    if let Some(at) = found.iter().zip(expected).position(|(found, expected)| found != expected) {
        panic!("first difference at byte {at}: {} instead of {}", found[at], expected[at]);
    }
}

fn go_on() -> Result<()> {
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn a_raw_file_is_the_image_at_the_instant(case in cases()) {
        let mut setup = Setup::new(&case);
        let secondary = open(&setup.request("out", Form::Raw, OriginalsMode::Overlay)).unwrap();
        let report = setup.copy(secondary, &go_on, false).unwrap();
        prop_assert_eq!(setup.names(), ["out"]);
        let found = fs::read(setup.directory.path().join("out")).unwrap();
        assert_same(&found, &setup.world.borrow().image);
        setup.check_economy();
        prop_assert_eq!(report.read_bytes, case.size);
        prop_assert!(report.originals_count <= Bytes::from_len(setup.world.borrow().preserved_count()).get());
        prop_assert_eq!(report.verified_bytes, case.verify.then_some(case.size));
    }
}

fn busy_case(verify: bool) -> Case {
    Case {
        size: Bytes(2_000_000),
        chunk: Bytes(4096),
        segment: Bytes(65536),
        buffers: 4,
        batch_max: 50,
        busy: 70,
        verify,
        seed: 7,
    }
}

fn failing(case: &Case, fault: Fault) -> (Error, Vec<String>) {
    let mut setup = Setup::new(case);
    setup.engine.faults.push(fault);
    let secondary = open(&setup.request("out", Form::Raw, OriginalsMode::Overlay)).unwrap();
    let error = setup.copy(secondary, &go_on, false).unwrap_err();
    assert_eq!(crate::io::Engine::in_flight(&setup.engine), 0);
    (error, setup.names())
}

#[test]
fn faults_have_their_kind_and_leave_no_name() {
    for after in [0, 3, 20] {
        let (error, names) =
            failing(&busy_case(false), Fault { file: "the origin", write: false, after, errno: libc::EIO });
        assert_eq!((error.kind(), error.errno()), (ErrorKind::Io, Some(libc::EIO)));
        assert!(error.to_string().contains("reading the origin failed"), "{error}");
        assert!(error.state_left().unwrap().contains("the partial file was removed"));
        assert!(names.is_empty(), "{names:?}");

        let (error, names) =
            failing(&busy_case(false), Fault { file: "out", write: true, after, errno: libc::ENOSPC });
        assert_eq!((error.kind(), error.errno()), (ErrorKind::NoSpace, Some(libc::ENOSPC)));
        assert!(names.is_empty(), "{names:?}");

        let (error, names) =
            failing(&busy_case(false), Fault { file: "the store", write: false, after, errno: libc::EIO });
        assert_eq!(error.kind(), ErrorKind::Io);
        assert!(error.to_string().contains("from the store failed"), "{error}");
        assert!(names.is_empty(), "{names:?}");
    }
    let (error, names) =
        failing(&busy_case(true), Fault { file: "out", write: false, after: 5, errno: libc::EIO });
    assert_eq!(error.kind(), ErrorKind::Io);
    assert!(names.is_empty(), "{names:?}");
}

#[test]
fn an_invalid_snapshot_ends_the_copy() {
    let mut setup = Setup::new(&busy_case(false));
    let secondary = open(&setup.request("out", Form::Raw, OriginalsMode::Overlay)).unwrap();
    let error = setup.copy(secondary, &go_on, true).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::StoreInvalid);
    assert!(setup.names().is_empty());
}

#[test]
fn an_interrupt_ends_the_copy() {
    let mut setup = Setup::new(&busy_case(false));
    let secondary = open(&setup.request("out", Form::Raw, OriginalsMode::Overlay)).unwrap();
    let asked = Cell::new(0);
    let interrupt = || {
        asked.set(asked.get() + 1);
        Err(Error::new(ErrorKind::Interrupted, "interrupted by SIGINT"))
    };
    std::thread::sleep(super::driver::POLL_INTERVAL);
    setup.world.borrow_mut().busy = 0;
    // The throttle makes the copy last longer than the poll interval.
    let origin = setup.world.borrow().origin.try_clone().unwrap();
    let error = run(CopyJob {
        engine: &mut setup.engine,
        origin: origin.into(),
        origin_description: "the origin".to_owned(),
        origin_size: setup.case.size,
        block_list: vec![Extent::new(Bytes(0), setup.case.size).unwrap()],
        segment: SegmentSize::new(setup.case.segment).unwrap(),
        secondary,
        originals: None,
        rate: Some(Bytes(10_000)),
        verify: false,
        observer: &Silent,
        interrupt: &interrupt,
    })
    .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Interrupted);
    assert_eq!(asked.get(), 1);
    assert!(setup.names().is_empty());
}

#[test]
fn a_secondary_that_lies_is_found_out() {
    // The verifier must see one flipped byte, wherever it is: the test flips it behind the copier's
    // back, between writing and re-reading, through an observer that knows the moment.
    struct Flip {
        directory: std::path::PathBuf,
        at: u64,
    }
    impl super::progress::Observer for Flip {
        fn event(&self, event: &super::progress::Event) {
            use std::os::unix::fs::FileExt as _;
            if let super::progress::Event::Phase { phase: super::progress::Phase::Verify, .. } = event {
                let name = names(&self.directory).remove(0);
                let path = self.directory.join(name);
                let file = fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
                let mut byte = [0u8];
                file.read_exact_at(&mut byte, self.at).unwrap();
                file.write_all_at(&[byte[0] ^ 1], self.at).unwrap();
            }
        }
    }
    let case = busy_case(true);
    for at in [0, 65535, 1_000_000, 1_999_999] {
        let mut setup = Setup::new(&case);
        let secondary = open(&setup.request("out", Form::Raw, OriginalsMode::Overlay)).unwrap();
        let origin = setup.world.borrow().origin.try_clone().unwrap();
        let flip = Flip { directory: setup.directory.path().to_owned(), at };
        let mut provider = WorldProvider { world: setup.world.clone(), batch_max: 9, invalid: false };
        let error = run(CopyJob {
            engine: &mut setup.engine,
            origin: origin.into(),
            origin_description: "the origin".to_owned(),
            origin_size: case.size,
            block_list: vec![Extent::new(Bytes(0), case.size).unwrap()],
            segment: SegmentSize::new(case.segment).unwrap(),
            secondary,
            originals: Some(&mut provider),
            rate: None,
            verify: true,
            observer: &flip,
            interrupt: &go_on,
        })
        .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::BadData);
        assert!(setup.names().is_empty());
    }
}

#[test]
fn a_block_list_with_gaps_copies_what_it_lists() {
    let mut case = busy_case(true);
    for seed in 0..10 {
        case.seed = seed;
        let mut setup = Setup::new(&case);
        let mut rng = Rng(seed);
        let mut block_list: Vec<Extent> = Vec::new();
        let mut at = 0;
        while at < case.size.get() {
            let start = at + 4096 * rng.below(40);
            at = start + 4096 * (1 + rng.below(40));
            block_list.extend(Extent::new(Bytes(start), case.size.min(Bytes(at))));
            at += 4096;
        }
        let mut secondary = open(&setup.request("out", Form::Raw, OriginalsMode::Overlay)).unwrap();
        secondary.begin(0);
        let origin = setup.world.borrow().origin.try_clone().unwrap();
        let mut provider = WorldProvider { world: setup.world.clone(), batch_max: 99, invalid: false };
        run(CopyJob {
            engine: &mut setup.engine,
            origin: origin.into(),
            origin_description: "the origin".to_owned(),
            origin_size: case.size,
            block_list: block_list.clone(),
            segment: SegmentSize::new(case.segment).unwrap(),
            secondary,
            originals: Some(&mut provider),
            rate: None,
            verify: true,
            observer: &Silent,
            interrupt: &go_on,
        })
        .unwrap();
        let mut expected = vec![0u8; case.size.as_len()];
        for extent in &block_list {
            let range = extent.start().as_len()..extent.end().as_len();
            expected[range.clone()].copy_from_slice(&setup.world.borrow().image[range]);
        }
        assert_same(&fs::read(setup.directory.path().join("out")).unwrap(), &expected);
    }
}

#[test]
fn buffers_stay_within_their_limit() {
    use crate::base::limits::COPY_BUFFER_BYTES_MAX;
    for shift in 16..=24 {
        let segment = SegmentSize::new(Bytes(1 << shift)).unwrap();
        let config = engine_config(segment);
        let total = config.buffer_bytes * u64::from(config.buffer_count);
        assert!(config.buffer_count >= 2);
        assert!(total <= COPY_BUFFER_BYTES_MAX + Bytes(8192) * 2, "{segment}: {total}");
    }
}
