//! Copies that are killed and resumed, compared with the image at the instant, whatever the secondary has lost
//! meanwhile; and a superblock that it has lost, which the superblock's own checksum hides from CRC-32C.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use proptest::prelude::*;

use super::chaos::{ChaosEngine, Fault, Rng, WorldProvider, WorldReleases};
use super::tests::{
    Case, INSTANT, Setup, assert_same, busy_case, cases, extract, extract_parts, job, never_fails,
    open_secondary,
};
use super::{CopyJob, PlacementLog, ResumePoint, run};
use crate::base::checksum::with_ext4_superblock;
use crate::base::{Bytes, Error, ErrorKind, Result};
use crate::extent::{Extent, ExtentSet};
use crate::format::SecondaryForm;
use crate::format::state::TargetRecord;
use crate::io::engine::EngineConfig;
use crate::progress::{Event, Observer, Phase};
use crate::secondary::{OriginalsMode, PlacedSegment, Resumed, open, reopen};

/// An origin whose first segment has the new superblock of [`with_ext4_superblock`].
fn with_superblock(case: &Case) -> Setup {
    let setup = Setup::new(case);
    let segment = case.segment.as_len();
    let mut world = setup.world.borrow_mut();
    let new = with_ext4_superblock(segment, 2);
    world.origin.write_all_at(&new, 0).unwrap();
    world.image[..segment].copy_from_slice(&new);
    drop(world);
    setup
}

/// Puts the old superblock in the place of the new one, as if the secondary had lost its write.
fn lose_superblock(secondary: &fs::File, segment: Bytes) {
    let (old, new) = (with_ext4_superblock(segment.as_len(), 1), with_ext4_superblock(segment.as_len(), 2));
    let mut content = Vec::new();
    std::io::Read::read_to_end(&mut &*secondary, &mut content).unwrap();
    // In a raw file, or in the first frame of an archive.
    let at = [0, 4096 + 4096].into_iter().find(|at| content[*at..].starts_with(&new));
    let at = at.expect("the first segment is on the secondary");
    secondary.write_all_at(&old, Bytes::from_len(at).get()).unwrap();
}

/// Loses the superblock when the verification begins.
struct LoseSuperblock {
    directory: std::path::PathBuf,
    segment: Bytes,
}

impl Observer for LoseSuperblock {
    fn event(&self, event: &Event) {
        if matches!(event, Event::Phase { phase: Phase::Verify, .. }) {
            lose_superblock(&open_secondary(&self.directory), self.segment);
        }
    }
}

/// The forms of secondary for which a killed copy can be resumed.
const FORMS: [(SecondaryForm, OriginalsMode); 3] = [
    (SecondaryForm::Raw, OriginalsMode::Overlay),
    (SecondaryForm::Archive, OriginalsMode::Overlay),
    (SecondaryForm::Archive, OriginalsMode::Append),
];

/// What outlives the copying process.
#[derive(Default)]
struct Survives {
    placed: Vec<PlacedSegment>,
    originals_begun: bool,
}

/// Records what is placed, and dies after a number of records.
struct Mortal<'a> {
    survives: &'a mut Survives,
    left: usize,
}

impl Mortal<'_> {
    fn live(&mut self) -> Result<()> {
        if self.left == 0 {
            return Err(Error::new(ErrorKind::External, "killed"));
        }
        self.left -= 1;
        Ok(())
    }
}

impl PlacementLog for Mortal<'_> {
    fn placed(&mut self, segments: &[PlacedSegment]) -> Result<()> {
        for segment in segments {
            self.live()?;
            assert!(self.survives.placed.iter().all(|other| other.ix != segment.ix), "placed twice");
            self.survives.placed.push(*segment);
        }
        Ok(())
    }
    fn rewrite(&mut self, segments: &[PlacedSegment]) -> Result<()> {
        self.live()?;
        self.survives.placed = segments.to_vec();
        Ok(())
    }
    fn originals_begun(&mut self) -> Result<()> {
        self.live()?;
        self.survives.originals_begun = true;
        Ok(())
    }
}

/// What the secondary loses when a process is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Loss {
    Nothing,
    /// All or some of what was not synced.
    Unsynced,
    /// The same, and the secondary was visibly detached.
    Unplugged,
    /// Anything, and the secondary was visibly detached.
    Lying,
    /// The write of a superblock, and the secondary was visibly detached.
    Superblock,
}

impl Loss {
    /// A lie in a segment to which originals were being applied cannot be detected.
    fn unless_unverifiable(self, is_unverifiable: bool) -> Self {
        if self == Self::Lying && is_unverifiable { Self::Unplugged } else { self }
    }

    /// The engine of a new process: it keeps nothing of the last one's engine or memory.
    fn engine(self, setup: &Setup, seed: u64) -> ChaosEngine {
        let buffer_bytes = setup.case.segment + Bytes(8192);
        let config = EngineConfig { buffer_count: setup.case.buffers, buffer_bytes };
        let mut engine = ChaosEngine::new(config, seed, Some(setup.world.clone()));
        engine.volatile = (!matches!(self, Self::Nothing | Self::Superblock)).then_some("out");
        engine
    }

    /// Applies the loss to the partial file of a process that used `engine` and recorded `target`.
    fn happen(
        self,
        engine: &mut ChaosEngine,
        partial: &Path,
        target: &mut Option<TargetRecord>,
        (segment, rng): (Bytes, &mut Rng),
    ) {
        let file = fs::OpenOptions::new().read(true).write(true).open(partial).unwrap();
        match self {
            Self::Nothing => {}
            Self::Superblock => lose_superblock(&file, segment),
            _ => engine.lose_power(&file),
        }
        if self == Self::Lying {
            let at = rng.below(file.metadata().unwrap().len());
            file.write_all_at(&rng.next().to_le_bytes()[..1], at).unwrap();
        }
        if matches!(self, Self::Unplugged | Self::Lying | Self::Superblock) {
            target.as_mut().unwrap().file.as_mut().unwrap().mount += 1;
        }
    }
}

/// How a process is killed: after a number of records, or in the middle of a write.
fn death(engine: &mut ChaosEngine, rng: &mut Rng, loss: Loss) -> usize {
    if loss == Loss::Superblock {
        return 10;
    }
    if rng.chance(50) {
        return rng.index(20);
    }
    let after = rng.below(60);
    engine.faults.push(Fault { file: "out", write: true, after, errno: libc::EIO, torn: true });
    usize::MAX
}

/// Copies, is killed repeatedly, after a number of segments or in the middle of a write, and resumes each
/// time. Returns how often it was killed.
fn copy_with_deaths(setup: &mut Setup, form: SecondaryForm, originals: OriginalsMode, deaths: u64) -> u64 {
    copy_with_losses(setup, form, originals, deaths, Loss::Nothing).unwrap()
}

/// As [`copy_with_deaths`], with `loss` each time. An error is that of a process that was not killed.
fn copy_with_losses(
    setup: &mut Setup,
    form: SecondaryForm,
    originals: OriginalsMode,
    deaths: u64,
    loss: Loss,
) -> Result<u64> {
    let mut rng = Rng(setup.case.seed ^ 0xdead);
    let mut survives = Survives::default();
    let request = setup.request("out", form, originals);
    let mut secondary = open(&request).unwrap();
    secondary.set_instant(INSTANT);
    let partial = secondary.partial_path().unwrap().to_owned();
    let archive = secondary.archive_id();
    let mut target = secondary.target().cloned();
    let saved = setup.directory.path().join("saved");
    for killed in 0.. {
        let mut engine = loss.engine(setup, rng.next());
        let left = if killed < deaths { death(&mut engine, &mut rng, loss) } else { usize::MAX };
        let point = ResumePoint {
            placed: survives.placed.clone(),
            originals_begun: survives.originals_begun,
            released: setup.world.borrow().released(),
        };
        let mut mortal = Mortal { survives: &mut survives, left };
        let mut provider =
            WorldProvider { world: setup.world.clone(), batch_max: setup.case.batch_max, invalid: false };
        let mut releases = WorldReleases { world: setup.world.clone(), slow: setup.case.slow };
        let origin = setup.world.borrow().origin.try_clone().unwrap();
        fs::hard_link(&partial, &saved).unwrap();
        let outcome = run(CopyJob {
            block_list: setup.block_list.clone(),
            originals: Some(&mut provider),
            releases: Some(&mut releases),
            placements: Some(&mut mortal),
            resumed: (killed > 0).then_some(point),
            ..job(&mut engine, origin, &setup.case, secondary)
        });
        let Err(error) = outcome else {
            fs::remove_file(&saved).unwrap();
            return Ok(killed);
        };
        if loss != Loss::Nothing && error.kind() == ErrorKind::BadData {
            fs::remove_file(&saved).unwrap();
            assert!(loss == Loss::Lying, "{error}");
            return Err(error);
        }
        assert!(killed < deaths, "the last process was not killed: {error}");
        // Killed, not failed: the partial file stays. A rename to another name of the same file does nothing.
        let _ = fs::remove_file(&partial);
        fs::rename(&saved, &partial).unwrap();
        let is_unverifiable = survives.originals_begun && originals == OriginalsMode::Overlay;
        let lossy = (setup.case.segment, &mut rng);
        loss.unless_unverifiable(is_unverifiable).happen(&mut engine, &partial, &mut target, lossy);
        drop(engine);
        setup.world.borrow_mut().copier_died();
        let state = Resumed {
            instant_ns: INSTANT,
            archive,
            partial: Some(partial.clone()),
            target: target.clone(),
            placed: survives.placed.clone(),
            originals_begun: survives.originals_begun,
        };
        secondary = reopen(&request, &state).unwrap();
    }
    unreachable!("the last process lives")
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn lost_data_of_the_secondary_is_never_trusted(
        case in cases(), deaths in 1u64..5, form in 0..FORMS.len(), loss in 0usize..3
    ) {
        let mut setup = Setup::new(&case);
        let (form, originals) = FORMS[form];
        let loss = [Loss::Unsynced, Loss::Unplugged, Loss::Lying][loss];
        if copy_with_losses(&mut setup, form, originals, deaths, loss).is_err() {
            // Detected before anything was written, so the partial file stays.
            prop_assert!(setup.names().iter().all(|name| name.starts_with(".out.tidemark-partial.")));
            return Ok(());
        }
        let found = setup.only_file();
        let found = if form == SecondaryForm::Raw { found } else { extract(&found).0 };
        assert_same(&found, &setup.world.borrow().image);
    }

    #[test]
    fn a_resumed_copy_is_the_image_at_the_instant(case in cases(), deaths in 0u64..5, form in 0..FORMS.len()) {
        let mut setup = Setup::new(&case);
        let (form, originals) = FORMS[form];
        copy_with_deaths(&mut setup, form, originals, deaths);
        let found = setup.only_file();
        let found = if form == SecondaryForm::Raw { found } else { extract(&found).0 };
        assert_same(&found, &setup.world.borrow().image);
    }

    #[test]
    fn a_resumed_copy_of_parts_is_these_parts(case in cases(), deaths in 0u64..5, form in 0..FORMS.len()) {
        let mut setup = Setup::with_gaps(&case);
        let (form, originals) = FORMS[form];
        copy_with_deaths(&mut setup, form, originals, deaths);
        let found = setup.only_file();
        if form == SecondaryForm::Raw {
            assert_same(&found, &setup.expected());
            return Ok(());
        }
        let (image, _, absent) = extract_parts(&found);
        assert_same(&image, &setup.expected());
        let listed: ExtentSet = setup.block_list.iter().copied().collect();
        let gaps: Vec<Extent> = listed.gaps_in(Extent::new(Bytes(0), case.size).unwrap()).collect();
        prop_assert_eq!(absent.iter().copied().collect::<ExtentSet>(), gaps.into_iter().collect::<ExtentSet>());
    }
}

#[test]
fn copies_are_killed_in_every_phase() {
    let mut killed = 0;
    for seed in 0..6 {
        let case = Case { seed, region: Some(1), ..busy_case(seed % 2 == 0) };
        let mut setup = Setup::new(&case);
        killed += copy_with_deaths(&mut setup, SecondaryForm::Archive, OriginalsMode::Overlay, 4);
        let found = fs::read(setup.directory.path().join("out")).unwrap();
        assert_same(&extract(&found).0, &setup.world.borrow().image);
    }
    assert!(killed >= 12, "killed {killed} times: this proves little");
}

#[test]
fn originals_applied_before_a_disk_was_detached_are_no_loss() {
    let mut killed = 0;
    for seed in 0..6 {
        for form in [SecondaryForm::Raw, SecondaryForm::Archive] {
            let case = Case { seed, region: Some(1), ..busy_case(seed % 2 == 0) };
            let mut setup = Setup::new(&case);
            killed += copy_with_losses(&mut setup, form, OriginalsMode::Overlay, 4, Loss::Unplugged).unwrap();
            let found = setup.only_file();
            let found = if form == SecondaryForm::Raw { found } else { extract(&found).0 };
            assert_same(&found, &setup.world.borrow().image);
        }
    }
    assert!(killed >= 24, "killed {killed} times: this proves little");
}

/// Red with CRC-32C as the checksum: the superblock's own CRC-32C makes the old and the new segment equal.
#[test]
fn a_verification_finds_an_old_superblock() {
    let case = Case { busy: 0, ..busy_case(true) };
    for (form, originals) in FORMS {
        let mut setup = with_superblock(&case);
        let secondary = open(&setup.request("out", form, originals)).unwrap();
        let lose = LoseSuperblock { directory: setup.directory.path().to_owned(), segment: case.segment };
        let error = setup.copy_watched(secondary, &never_fails, false, &lose).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::BadData, "{form:?}: {error}");
        assert!(setup.names().is_empty());
    }
}

/// Red with CRC-32C as the checksum, as above.
#[test]
fn a_resumed_copy_replaces_an_old_superblock() {
    // One region, so nothing is released before the copy is killed, and the lost segment can be copied again.
    let case = Case { busy: 0, region: Some(64), ..busy_case(false) };
    for (form, originals) in FORMS {
        let mut setup = with_superblock(&case);
        assert_eq!(copy_with_losses(&mut setup, form, originals, 1, Loss::Superblock).unwrap(), 1);
        let found = setup.only_file();
        let found = if form == SecondaryForm::Raw { found } else { extract(&found).0 };
        assert_same(&found, &setup.world.borrow().image);
    }
}
