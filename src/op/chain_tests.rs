//! Chains of increments, written by the copier: restored, compared and merged at every point, and refused if broken.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use uuid::Uuid;

use super::request::{MergeRequest, RestoreRequest, VerifyRequest};
use super::{archive_merge, restore, restore_plan, verify};
use crate::base::limits::COPY_BUFFER_BYTES_MAX;
use crate::base::{Bytes, ChunkSize, Error, ErrorKind, Extent, Result, SegmentSize};
use crate::copy::{self, CopyJob, CopyOptions, CopyReport, Order};
use crate::extent::BlockList;
use crate::format::SecondaryForm;
use crate::format::archive::{BLOCK_BYTES, Superblock};
use crate::io::open::{EnginePreference, open_engine};
use crate::progress::Silent;
use crate::restore::ArchiveSource;
use crate::secondary::archive_read::FrameChecker;
use crate::secondary::{
    Lineage, OriginIdentity, OriginalsMode, SecondaryRequest, SecondaryTarget, engine_config, open,
};

const PAGE: usize = 4096;

/// Pages of the volume.
const PAGES: usize = 80;

/// A volume in generations, and the archives of each.
struct World {
    directory: tempfile::TempDir,
    /// What the volume holds; free pages included.
    image: Vec<u8>,
    /// What a restore of each generation gives.
    wanted: Vec<Vec<u8>>,
    /// Of each generation, which pages are absent from the chain.
    absent: Vec<Vec<bool>>,
    ids: Vec<Uuid>,
}

fn runs(pages: &[bool]) -> Vec<Extent> {
    let page = |number: usize| Extent::with_length(Bytes::from_len(number * PAGE), Bytes::from_len(PAGE));
    let listed = pages.iter().enumerate().filter(|(_, listed)| **listed);
    BlockList::new(listed.filter_map(|(number, _)| page(number))).runs().to_vec()
}

fn snapshot_id(generation: usize) -> Uuid {
    Uuid::from_u128(0xabc0_0000 + u128::try_from(generation).unwrap())
}

impl World {
    fn new() -> Self {
        let image = vec![0; PAGES * PAGE];
        let directory = tempfile::tempdir().unwrap();
        Self { directory, image, wanted: Vec::new(), absent: Vec::new(), ids: Vec::new() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn archive(&self, generation: usize) -> PathBuf {
        self.path(&format!("g{generation}.tdm"))
    }

    /// Writes `changed` pages, and copies what is needed: everything in use if `parent` is None.
    fn generation(
        &mut self,
        changed: &[u8],
        used: &[bool],
        parent: Option<usize>,
        verify: bool,
    ) -> CopyReport {
        let generation = self.wanted.len();
        for (page, fill) in changed.iter().enumerate().filter(|(_, fill)| **fill > 0) {
            // Some pages become zero.
            self.image[page * PAGE..(page + 1) * PAGE].fill(fill / 2);
        }
        let needs = |page: usize| match parent {
            None => used[page],
            Some(parent) => used[page] && (changed[page] > 0 || self.absent[parent][page]),
        };
        let needed: Vec<bool> = (0..PAGES).map(needs).collect();
        let inherited: Vec<bool> = match parent {
            None => vec![false; PAGES],
            Some(_) => (0..PAGES).map(|page| used[page] && !needed[page]).collect(),
        };
        let mut wanted = self.image.clone();
        for (page, _) in used.iter().enumerate().filter(|(_, used)| !**used) {
            wanted[page * PAGE..(page + 1) * PAGE].fill(0);
        }
        self.wanted.push(wanted);
        self.absent.push(used.iter().map(|used| !used).collect());
        let lineage = Lineage {
            snapshot: snapshot_id(generation),
            base: parent.map_or(Uuid::nil(), snapshot_id),
            parent: parent.map_or(Uuid::nil(), |parent| self.ids[parent]),
        };
        let report = self.copy(generation, (&needed, &inherited), lineage, verify).unwrap();
        self.ids.push(head(&self.archive(generation)).archive);
        report
    }

    fn copy(
        &self,
        generation: usize,
        (needed, inherited): (&[bool], &[bool]),
        lineage: Lineage,
        verify: bool,
    ) -> Result<CopyReport> {
        fs::write(self.path("origin"), &self.image).unwrap();
        let size = Bytes::from_len(self.image.len());
        let segment =
            SegmentSize::new(Bytes::kib(if generation.is_multiple_of(2) { 64 } else { 128 })).unwrap();
        let mut secondary = open(&SecondaryRequest {
            target: SecondaryTarget::Path(self.archive(generation)),
            form: SecondaryForm::Archive,
            originals: OriginalsMode::Append,
            replace: true,
            verify,
            forbidden: Vec::new(),
            origin: OriginIdentity { name: "data".into(), path: "/dev/mapper/data".into(), size },
            segment,
            chunk: ChunkSize::default(),
            block_list: runs(needed),
            lineage,
            in_place: false,
        })?;
        secondary.set_instant(1_000_000_000 * (1 + u64::try_from(generation).unwrap()));
        secondary.restrict(&runs(needed));
        secondary.inherit(&runs(inherited));
        let mut engine = open_engine(engine_config(segment, COPY_BUFFER_BYTES_MAX), EnginePreference::Auto)?;
        let order = Order::Physical;
        let options = CopyOptions { segment, region: segment.bytes(), order, rate: None, verify };
        let origin = File::open(self.path("origin")).unwrap();
        let mut job = CopyJob::new(engine.as_mut(), origin.into(), size, options, secondary);
        job.block_list = runs(needed);
        job.inherited = runs(inherited);
        copy::run(job)
    }

    fn restore(&self, archive: &Path, parents: &[PathBuf]) -> Result<Vec<u8>> {
        let target = self.path("out");
        let _ = fs::remove_file(&target);
        let archive = ArchiveSource::Path(archive.to_owned());
        let request =
            RestoreRequest { archive, target: target.clone(), parents: parents.to_vec(), replace: false };
        restore_plan::plan(&request, &|| Ok(()))?;
        let result = restore::run(&request, &Silent, &|| Ok(()));
        assert_eq!(target.exists(), result.is_ok(), "only a good restore leaves a file");
        result.map(|_| fs::read(&target).unwrap())
    }

    fn verify(&self, archive: &Path, against: Option<&[u8]>) -> Result<()> {
        let other = against.map(|bytes| {
            let other = self.path("other");
            fs::write(&other, bytes).unwrap();
            other
        });
        let archive = ArchiveSource::Path(archive.to_owned());
        let request = VerifyRequest { archive, against: other, parents: Vec::new() };
        verify::run(&request, &Silent, &|| Ok(())).map(drop)
    }

    fn merge(&self, archive: &Path, merged: &Path) -> Result<()> {
        let request = MergeRequest {
            archive: archive.to_owned(),
            merged: merged.to_owned(),
            parents: Vec::new(),
            replace: false,
        };
        let plan = archive_merge::plan(&request, &|| Ok(()))?;
        archive_merge::run(&plan, &Silent, &|| Ok(())).map(drop)
    }

    /// Three generations: everything, some pages, some others.
    fn of_three() -> Self {
        let mut world = Self::new();
        let all = vec![true; PAGES];
        let every = |step: usize, fill: u8| -> Vec<u8> {
            (0..PAGES).map(|page| if page.is_multiple_of(step) { fill } else { 0 }).collect()
        };
        // Segments of zeros have no frame: later data is over them.
        let first: Vec<u8> = (0..PAGES).map(|page| if (16..48).contains(&page) { 1 } else { 7 }).collect();
        world.generation(&first, &all, None, false);
        world.generation(&every(3, 21), &all, Some(0), true);
        world.generation(&every(7, 41), &all, Some(1), false);
        world
    }
}

fn head(path: &Path) -> Superblock {
    Superblock::decode_head(&fs::read(path).unwrap()).unwrap()
}

fn kind<T>(result: Result<T>) -> ErrorKind {
    result.map(drop).expect_err("must fail").kind()
}

fn flip(path: &Path, at: u64) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

/// What the independent reader extracts.
fn independent(archive: &Path, parents: &[PathBuf], out: &Path) -> Vec<u8> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/archive_reader.py");
    let mut command = std::process::Command::new("python3");
    command.arg(script).arg("extract").args([archive, out]).args(parents);
    assert!(command.status().unwrap().success(), "{}", archive.display());
    fs::read(out).unwrap()
}

#[test]
fn a_chain_is_restored_verified_and_merged_at_every_point() {
    let world = World::of_three();
    let wanted = |generation: usize| world.wanted[generation].clone();
    for generation in 0..3 {
        let archive = world.archive(generation);
        assert!(world.restore(&archive, &[]).unwrap() == wanted(generation), "generation {generation}");
        world.verify(&archive, Some(&wanted(generation))).unwrap();
        let parents: Vec<PathBuf> = (0..generation).map(|parent| world.archive(parent)).collect();
        assert!(independent(&archive, &parents, &world.path("out.py")) == wanted(generation));
        if generation > 0 {
            // Whole, and of the same snapshot.
            let merged = world.path("merged.tdm");
            let _ = fs::remove_file(&merged);
            world.merge(&archive, &merged).unwrap();
            assert!(world.restore(&merged, &[]).unwrap() == wanted(generation));
            world.verify(&merged, Some(&wanted(generation))).unwrap();
            assert!(independent(&merged, &[], &world.path("out.py")) == wanted(generation));
            assert!(!head(&merged).is_increment());
            assert_eq!(head(&merged).snapshot, snapshot_id(generation));
        }
    }
    assert_eq!(kind(world.merge(&world.archive(0), &world.path("m.tdm"))), ErrorKind::Refused);
    assert_eq!(kind(world.merge(&world.archive(2), &world.archive(1))), ErrorKind::Refused);
    let mut other = wanted(2);
    other[5 * PAGE] ^= 1;
    let error = world.verify(&world.archive(2), Some(&other)).unwrap_err();
    assert!(error.to_string().contains(&format!("{}..{}", 5 * PAGE, 5 * PAGE + 512)), "{error}");
}

#[test]
fn a_merged_archive_takes_the_place_of_its_chain() {
    let world = World::of_three();
    world.merge(&world.archive(1), &world.path("merged.tdm")).unwrap();
    fs::remove_file(world.archive(0)).unwrap();
    world.verify(&world.path("merged.tdm"), Some(&world.wanted[1])).unwrap();
    fs::rename(world.archive(1), world.path("aside")).unwrap();
    world.verify(&world.archive(2), Some(&world.wanted[2])).unwrap();
    world.merge(&world.archive(2), &world.path("again.tdm")).unwrap();
    assert!(world.restore(&world.path("again.tdm"), &[]).unwrap() == world.wanted[2]);
    fs::rename(world.path("aside"), world.archive(1)).unwrap();
    // It is whole, so it is preferred to the increment of the same snapshot, whose parent is gone.
    assert!(world.restore(&world.archive(2), &[]).unwrap() == world.wanted[2]);
    assert_eq!(kind(world.restore(&world.archive(1), &[])), ErrorKind::Refused);
    fs::remove_file(world.archive(1)).unwrap();
    assert!(world.restore(&world.archive(2), &[]).unwrap() == world.wanted[2]);
}

#[test]
fn an_increment_moves_what_has_changed_and_little_else() {
    let mut world = World::new();
    let all = vec![true; PAGES];
    world.generation(&[9; PAGES], &all, None, false);
    let changed: Vec<u8> = (0..PAGES).map(|page| if page.is_multiple_of(2) { 77 } else { 0 }).collect();
    let report = world.generation(&changed, &all, Some(0), false);
    let bytes = Bytes::from_len(PAGES / 2 * PAGE);
    assert_eq!(report.read_bytes, bytes);
    assert_eq!(report.inherited_bytes, bytes);
    let length = Bytes(fs::metadata(world.archive(1)).unwrap().len());
    assert_eq!(report.written_bytes, length);
    // Two superblocks, a map of one block, and the control blocks of it and of two frames of data.
    assert_eq!(length - bytes, Bytes::from_len(BLOCK_BYTES * (2 + 3 + 4)));
}

#[test]
fn a_broken_chain_is_refused_before_the_target_is_touched() {
    let world = World::of_three();
    let (tip, middle, aside) = (world.archive(2), world.archive(1), world.path("aside"));
    fs::create_dir(&aside).unwrap();
    let moved = aside.join("x");
    fs::rename(&middle, &moved).unwrap();
    // Missing, found elsewhere, and found by name only.
    assert_eq!(kind(world.restore(&tip, &[])), ErrorKind::Refused);
    let places = [aside.clone(), world.archive(0)];
    assert!(world.restore(&tip, &places).unwrap() == world.wanted[2]);
    assert_eq!(kind(world.restore(&tip, std::slice::from_ref(&aside))), ErrorKind::Refused);
    fs::copy(world.archive(0), &middle).unwrap();
    assert_eq!(kind(world.restore(&tip, &[])), ErrorKind::Refused);
    // Damaged: cut off, in the map, in a superblock. The first two blocks before the tail are the map's.
    let length = fs::metadata(&moved).unwrap().len();
    for damage in [length - 1, length - 5000, length - 9000, length - 13000] {
        fs::copy(&moved, &middle).unwrap();
        flip(&middle, damage);
        assert_eq!(kind(world.restore(&tip, &[])), ErrorKind::BadData, "byte {damage}");
        assert_eq!(kind(world.verify(&tip, None)), ErrorKind::BadData, "byte {damage}");
    }
    fs::copy(&moved, &middle).unwrap();
    File::options().write(true).open(&middle).unwrap().set_len(length - 4096).unwrap();
    assert_eq!(kind(world.restore(&tip, &[])), ErrorKind::BadData);
    // In the data: found when it is read.
    fs::copy(&moved, &middle).unwrap();
    flip(&middle, 8192 + 100);
    assert_eq!(kind(world.restore(&tip, &[])), ErrorKind::BadData);
    assert_eq!(kind(world.merge(&tip, &world.path("m.tdm"))), ErrorKind::BadData);
    assert!(!world.path("m.tdm").exists());
}

#[test]
fn a_parent_that_does_not_fit_is_refused() {
    let mut world = World::of_three();
    let early = Lineage { snapshot: snapshot_id(1), ..Lineage::default() };
    fs::remove_file(world.archive(1)).unwrap();
    // It continues the one that continues it.
    let (snapshot, base) = (snapshot_id(1), snapshot_id(2));
    let circle = Lineage { snapshot, base, parent: Uuid::from_u128(9) };
    world.copy(1, (&[false; PAGES], &[true; PAGES]), circle, false).unwrap();
    let error = world.restore(&world.archive(2), &[]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BadData);
    assert!(error.to_string().contains("continues itself"), "{error}");
    // Of the same snapshot, but without a range that the child inherits.
    let some: Vec<bool> = (0..PAGES).map(|page| page != 11).collect();
    world.copy(1, (&some, &[false; PAGES]), early, false).unwrap();
    let error: Error = world.restore(&world.archive(2), &[]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BadData);
    assert!(error.to_string().contains("does not hold 45056..49152"), "{error}");
    // Of a volume of another size.
    world.image.extend_from_slice(&[0; PAGE]);
    world.copy(1, (&[true; PAGES + 1], &[false; PAGES + 1]), early, false).unwrap();
    assert_eq!(kind(world.restore(&world.archive(2), &[])), ErrorKind::BadData);
}

#[test]
fn an_increment_is_not_read_from_a_pipe() {
    let world = World::of_three();
    let (read, write) = nix::unistd::pipe().unwrap();
    let bytes = fs::read(world.archive(1)).unwrap();
    let writer = std::thread::spawn(move || {
        let _ = std::io::Write::write_all(&mut File::from(write), &bytes);
    });
    let input = crate::restore::Input::stream(read, "the pipe", &|| Ok(())).unwrap();
    assert_eq!(kind(crate::restore::chain::Content::of_stream(input)), ErrorKind::Usage);
    writer.join().unwrap();
}

/// The content that tests/golden/archive/README.md describes.
fn golden_content(is_increment: bool) -> Vec<u8> {
    let units = (0..40 * PAGE / 16).flat_map(|number| format!("unit{number:012}").into_bytes());
    let mut content: Vec<u8> = units.collect();
    content[16 * PAGE..32 * PAGE].fill(0);
    if is_increment {
        for (pages, fill) in
            [(2..3, b'D'), (5..6, b'O'), (6..7, b'D'), (10..12, 0), (20..21, b'E'), (34..36, 0)]
        {
            content[pages.start * PAGE..pages.end * PAGE].fill(fill);
        }
    }
    content
}

#[test]
fn the_golden_chain_is_read() {
    let world = World::new();
    let golden = |name: &str| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/archive").join(name);
    for (name, length, checksum) in
        [("v3.tdm", 229_376, 0xb533_a945_38fd_4088), ("v3-increment.tdm", 65_536, 0xd0be_c428_3cc0_c361)]
    {
        let bytes = fs::read(golden(name)).unwrap();
        assert_eq!(bytes.len(), length);
        let found = crate::base::checksum::xxh3_64(&bytes);
        assert_eq!(found, checksum, "a golden file is never regenerated: {name}");
        let is_increment = name.contains("increment");
        let wanted = golden_content(is_increment);
        assert!(world.restore(&golden(name), &[]).unwrap() == wanted, "{name}");
        world.verify(&golden(name), Some(&wanted)).unwrap();
        let parents: &[PathBuf] = if is_increment { &[golden("v3.tdm")] } else { &[] };
        assert!(independent(&golden(name), parents, &world.path("out.py")) == wanted, "{name}");
    }
    let superblock = head(&golden("v3-increment.tdm"));
    assert_eq!(superblock.parent, head(&golden("v3.tdm")).archive);
    assert_eq!(superblock.base, head(&golden("v3.tdm")).snapshot);
    assert_eq!(superblock.snapshot.to_string(), "22222222-3333-4444-8555-666666666666");
}

/// The reader without its I/O.
fn check(bytes: &[u8]) -> Result<()> {
    let mut checker = FrameChecker::new(Superblock::decode_head(bytes)?, "the increment");
    let mut rest = &bytes[BLOCK_BYTES..];
    while rest.len() > BLOCK_BYTES {
        let length = checker.next_length(rest)?.as_len();
        checker.accept(rest, &mut |_| {})?;
        rest = &rest[length..];
    }
    checker.finish(rest).map(drop)
}

#[test]
fn every_corrupted_byte_of_an_increment_is_found() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/archive/v3-increment.tdm");
    let mut bytes = fs::read(path).unwrap();
    check(&bytes).unwrap();
    for at in 0..bytes.len() {
        bytes[at] ^= 0x40;
        assert_eq!(kind(check(&bytes)), ErrorKind::BadData, "byte {at}");
        bytes[at] ^= 0x40;
    }
    // A frame that is left out.
    bytes.drain(BLOCK_BYTES..BLOCK_BYTES * 6);
    assert_eq!(kind(check(&bytes)), ErrorKind::BadData);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Generations with any changes and any free space, each continuing the one before or an older one.
    #[test]
    fn every_generation_is_what_the_volume_held(
        steps in prop::collection::vec(
            (prop::collection::vec(0u8..90, PAGES), prop::collection::vec(0u8..8, PAGES), 0usize..3),
            2..6,
        ),
    ) {
        let mut world = World::new();
        // The changes of all generations since each.
        let mut since: Vec<Vec<u8>> = Vec::new();
        for (number, (fills, free, back)) in steps.into_iter().enumerate() {
            let density = u8::try_from(20 + number * 10).unwrap();
            let changed: Vec<u8> = fills.iter().map(|fill| fill.saturating_sub(density)).collect();
            let used: Vec<bool> = free.iter().map(|free| *free > 0).collect();
            for older in &mut since {
                older.iter_mut().zip(&changed).filter(|(_, fill)| **fill > 0).for_each(|(all, fill)| *all = *fill);
            }
            let parent = number.checked_sub(1 + back).or(number.checked_sub(1));
            let changed = parent.map_or(changed, |parent| since[parent].clone());
            world.generation(&changed, &used, parent, number.is_multiple_of(2));
            since.push(vec![0; PAGES]);
        }
        for generation in 0..world.wanted.len() {
            let archive = world.archive(generation);
            prop_assert!(world.restore(&archive, &[]).unwrap() == world.wanted[generation]);
            world.verify(&archive, Some(&world.wanted[generation])).unwrap();
            if head(&archive).is_increment() {
                let merged = world.path("merged.tdm");
                let _ = fs::remove_file(&merged);
                world.merge(&archive, &merged).unwrap();
                prop_assert!(world.restore(&merged, &[]).unwrap() == world.wanted[generation]);
                fs::remove_file(&merged).unwrap();
            }
        }
    }
}
