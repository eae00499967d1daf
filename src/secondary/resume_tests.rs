//! Copies that are killed and resumed again and again, block by block: writes in flight are torn, segments
//! are placed in any order, and the origin changes meanwhile. A minimal copier in this file makes the copy;
//! the bytes go to real files.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;

use proptest::prelude::*;
use uuid::Uuid;

use super::archive_read::FrameChecker;
use super::*;
use crate::base::checksum::xxh3_64;
use crate::base::{Bytes, ChunkSize, ErrorKind, SegmentIx, SegmentSize};
use crate::extent::{Extent, ExtentSet};
use crate::format::archive::{BLOCK_BYTES, FrameKind, Superblock};
use crate::format::state::TargetRecord;
use crate::io::{Piece, Place};
use crate::sys::block::punch_hole;

const SEGMENT: u64 = 65536;
const CHUNK: u64 = 4096;
const INSTANT: u64 = 1_700_000_000_000_000_000;

/// xorshift64*.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }
    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % u64::try_from(limit).unwrap()).unwrap()
    }
    fn shuffle<T>(&mut self, items: &mut [T]) {
        for at in (1..items.len()).rev() {
            items.swap(at, self.below(at + 1));
        }
    }
    fn block(&mut self) -> Vec<u8> {
        let byte = u8::try_from(self.next() % 3).unwrap();
        (0..CHUNK).map(|at| if byte == 0 { 0 } else { byte ^ u8::try_from(at * 7 % 256).unwrap() }).collect()
    }
}

fn range(extent: Extent) -> std::ops::Range<usize> {
    extent.start().as_len()..extent.end().as_len()
}

/// An origin under a writing application, and its copy.
struct World {
    directory: tempfile::TempDir,
    rng: Rng,
    /// The origin's content at the instant.
    image: Vec<u8>,
    /// The origin's content now.
    now: Vec<u8>,
    /// Chunks whose originals are in the store.
    preserved: BTreeSet<usize>,
    block_list: Vec<Extent>,
    form: SecondaryForm,
    originals: OriginalsMode,
    /// The journal.
    placed: Vec<PlacedSegment>,
    originals_begun: bool,
    archive: Option<Uuid>,
    partial: Option<PathBuf>,
    target: Option<TargetRecord>,
}

#[derive(Clone, Debug)]
struct Case {
    size: usize,
    seed: u64,
    form: SecondaryForm,
    append: bool,
    gaps: bool,
    kills: u8,
}

/// The process is killed.
struct Killed;

impl World {
    fn new(case: &Case) -> Self {
        let mut rng = Rng(case.seed | 1);
        let mut image = Vec::new();
        while image.len() < case.size {
            // Whole segments of zeros too.
            let block = if image.len() / 65536 % 3 == 1 { vec![0; 4096] } else { rng.block() };
            image.extend(block);
        }
        image.truncate(case.size);
        let end = Bytes::from_len(case.size);
        let all = Extent::new(Bytes::ZERO, end).unwrap();
        let mut listed = ExtentSet::from_iter([all]);
        for _ in 0..if case.gaps { 12 } else { 0 } {
            let start = Bytes::from_len(rng.below(case.size)).align_down(Bytes(CHUNK));
            let gap = Extent::new(start, start + Bytes(CHUNK) * (1 + rng.next() % 20)).unwrap();
            listed.remove(gap);
        }
        Self {
            directory: tempfile::tempdir().unwrap(),
            rng,
            now: image.clone(),
            image,
            preserved: BTreeSet::new(),
            block_list: listed.iter().collect(),
            form: case.form,
            originals: if case.append && case.form == SecondaryForm::Archive {
                OriginalsMode::Append
            } else {
                OriginalsMode::Overlay
            },
            placed: Vec::new(),
            originals_begun: false,
            archive: None,
            partial: None,
            target: None,
        }
    }

    fn size(&self) -> Bytes {
        Bytes::from_len(self.image.len())
    }

    fn request(&self) -> SecondaryRequest {
        SecondaryRequest {
            target: SecondaryTarget::Path(self.directory.path().join("out")),
            form: self.form,
            originals: self.originals,
            replace: false,
            verify: false,
            forbidden: Vec::new(),
            origin: OriginIdentity { name: "data".into(), path: "/dev/data".into(), size: self.size() },
            segment: SegmentSize::new(Bytes(SEGMENT)).unwrap(),
            chunk: ChunkSize::new(Bytes(CHUNK)).unwrap(),
            block_list: self.block_list.clone(),
            lineage: Lineage::default(),
            in_place: false,
        }
    }

    fn resumed(&self) -> Resumed {
        Resumed {
            instant_ns: INSTANT,
            archive: self.archive,
            partial: self.partial.clone(),
            target: self.target.clone(),
            placed: self.placed.clone(),
            originals_begun: self.originals_begun,
        }
    }

    /// The application writes some chunks; their originals go to the store first.
    fn write_somewhere(&mut self) {
        for _ in 0..self.rng.below(6) {
            let chunk = self.rng.below(self.image.len().div_ceil(4096));
            let block = self.rng.block();
            let start = chunk * 4096;
            let end = self.image.len().min(start + 4096);
            self.now[start..end].copy_from_slice(&block[..end - start]);
            self.preserved.insert(chunk);
        }
    }

    fn extent(&self, ix: u64) -> Extent {
        Extent::new(Bytes(ix * SEGMENT), self.size().min(Bytes((ix + 1) * SEGMENT))).unwrap()
    }

    fn valid(&self, extent: Extent) -> Vec<Extent> {
        self.block_list.iter().filter_map(|listed| listed.intersection(extent)).collect()
    }

    fn file(&self) -> File {
        OpenOptions::new().read(true).write(true).open(self.partial.as_ref().unwrap()).unwrap()
    }

    /// Writes a placement. Torn: each sector of it is written or not, at random.
    fn write(&mut self, placement: &Placement, memory: &[u8], torn: bool) {
        let file = self.file();
        for extent in &placement.zeros {
            if !torn || self.rng.below(2) == 0 {
                punch_hole(&file, extent.start(), extent.length()).unwrap();
            }
        }
        for piece in &placement.pieces {
            let Place::At(at) = piece.place else { panic!("a file has offsets") };
            for (n, sector) in (0u64..).zip(memory[piece.range.clone()].chunks(512)) {
                if !torn || self.rng.below(2) == 0 {
                    file.write_all_at(sector, at.get() + n * 512).unwrap();
                }
            }
        }
    }

    fn read(&self, pieces: &[Piece], memory: &mut [u8]) {
        let file = self.file();
        for piece in pieces {
            let Place::At(at) = piece.place else { panic!("a file has offsets") };
            file.read_exact_at(&mut memory[piece.range.clone()], at.get()).unwrap();
        }
    }

    fn memory() -> Vec<u8> {
        vec![0; usize::try_from(SEGMENT).unwrap() + 2 * BLOCK_BYTES]
    }

    fn blocks(&mut self, mut next: impl FnMut(&mut [u8]) -> Result<Option<Placement>>) {
        let mut memory = Self::memory();
        while let Some(placement) = next(&mut memory).unwrap() {
            self.write(&placement, &memory, false);
        }
    }

    /// The fuzzy copy of the segments that are not placed, in any order; killed after `steps`.
    fn data(&mut self, secondary: &mut dyn Secondary, mut steps: usize) -> Result<(), Killed> {
        let count = self.size().get().div_ceil(SEGMENT);
        let mut todo: Vec<u64> =
            (0..count).filter(|ix| !self.placed.iter().any(|placed| placed.ix.get() == *ix)).collect();
        todo.retain(|ix| !self.valid(self.extent(*ix)).is_empty());
        self.rng.shuffle(&mut todo);
        for ix in todo {
            self.write_somewhere();
            let extent = self.extent(ix);
            let valid = self.valid(extent);
            let mut memory = Self::memory();
            for part in &valid {
                let at = PAYLOAD_OFFSET + (part.start() - extent.start()).as_len();
                memory[at..at + part.length().as_len()].copy_from_slice(&self.now[range(*part)]);
            }
            let payload = memory[PAYLOAD_OFFSET..][..extent.length().as_len()].to_vec();
            let (checksum, zero) = (xxh3_64(&payload), is_zero(&payload));
            let ix = SegmentIx(ix);
            let segment = Segment { ix, extent, valid: &valid, checksum: Some(checksum), zero };
            let placement = secondary.place(&segment, &mut memory).unwrap();
            // What is in flight when the process dies may be torn, and is not recorded.
            let in_flight = steps < 4 && self.rng.below(2) == 0;
            self.write(&placement, &memory, in_flight);
            if !in_flight {
                let mut back = Self::memory();
                if let Some(pieces) = secondary.stored(&segment) {
                    self.read(&pieces, &mut back);
                    secondary.check_stored(&segment, &back, false).unwrap();
                }
                assert!(
                    back[PAYLOAD_OFFSET..][..payload.len()] == payload,
                    "segment {} is missing",
                    ix.get()
                );
                let frame = secondary.frame_number(ix);
                self.placed.push(PlacedSegment { ix, frame, checksum: Some(checksum), zero });
            }
            match steps.checked_sub(1) {
                Some(left) => steps = left,
                None => return Err(Killed),
            }
        }
        // The copier waits for the last write before the originals begin.
        let all = self.placed.len();
        let listed = (0..count).filter(|ix| !self.valid(self.extent(*ix)).is_empty()).count();
        if all < listed { Err(Killed) } else { Ok(()) }
    }

    /// The originals of each segment, cut to the block list.
    fn originals(&self) -> Vec<(u64, Vec<Extent>)> {
        let chunk = |chunk: &usize| {
            let start = Bytes::from_len(*chunk) * CHUNK;
            Extent::new(start, self.size().min(start + Bytes(CHUNK))).unwrap()
        };
        let all: ExtentSet = self.preserved.iter().map(chunk).flat_map(|extent| self.valid(extent)).collect();
        let count = self.size().get().div_ceil(SEGMENT);
        (0..count)
            .map(|ix| (ix, all.intersection_with(self.extent(ix)).collect::<Vec<_>>()))
            .filter(|(_, extents)| !extents.is_empty())
            .collect()
    }

    fn overlay(&mut self, secondary: &mut dyn Secondary, mut steps: usize) -> Result<(), Killed> {
        // A segment's originals may come in two batches.
        let mut batches: [Vec<(u64, Vec<Extent>)>; 2] = [Vec::new(), Vec::new()];
        for (ix, mut extents) in self.originals() {
            self.rng.shuffle(&mut extents);
            let mut second = extents.split_off(self.rng.below(extents.len() + 1));
            extents.sort();
            second.sort();
            for (batch, extents) in batches.iter_mut().zip([extents, second]) {
                if !extents.is_empty() {
                    batch.push((ix, extents));
                }
            }
        }
        for (ix, changed) in batches.into_iter().flatten() {
            let extent = self.extent(ix);
            let valid = self.valid(extent);
            let mut segment =
                Segment { ix: SegmentIx(ix), extent, valid: &valid, checksum: None, zero: false };
            let mut memory = Self::memory();
            if secondary.is_framed()
                && let Some(pieces) = secondary.stored(&segment)
            {
                self.read(&pieces, &mut memory);
                secondary.check_stored(&segment, &memory, true).unwrap();
            }
            for original in &changed {
                let at = PAYLOAD_OFFSET + (original.start() - extent.start()).as_len();
                memory[at..at + original.length().as_len()].copy_from_slice(&self.image[range(*original)]);
            }
            let payload = &memory[PAYLOAD_OFFSET..][..extent.length().as_len()];
            if secondary.is_framed() {
                (segment.checksum, segment.zero) = (Some(xxh3_64(payload)), is_zero(payload));
            }
            let placement = secondary.overlay(&segment, &changed, &mut memory).unwrap();
            let in_flight = steps < 4 && self.rng.below(2) == 0;
            self.write(&placement, &memory, in_flight);
            if in_flight && steps == 0 {
                return Err(Killed);
            }
            if in_flight {
                // The next batch waits for it, so it did complete.
                self.write(&placement, &memory, false);
            }
            match steps.checked_sub(1) {
                Some(left) => steps = left,
                None => return Err(Killed),
            }
        }
        Ok(())
    }

    fn append(&mut self, secondary: &mut dyn Secondary, mut steps: usize) -> Result<(), Killed> {
        for (_, extents) in self.originals() {
            let mut memory = Self::memory();
            let mut at = PAYLOAD_OFFSET;
            for extent in &extents {
                memory[at..at + extent.length().as_len()].copy_from_slice(&self.image[range(*extent)]);
                at += extent.length().as_len();
            }
            let placement = secondary.append(&extents, &mut memory).unwrap();
            self.write(&placement, &memory, steps == 0);
            match steps.checked_sub(1) {
                Some(left) => steps = left,
                None => return Err(Killed),
            }
        }
        Ok(())
    }

    /// One process: from where the last one was killed, for `steps` steps or to the end.
    fn run(&mut self, steps: usize) -> Result<(), Killed> {
        let mut secondary = match self.partial {
            None => open(&self.request()).unwrap(),
            Some(_) => reopen(&self.request(), &self.resumed()).unwrap(),
        };
        secondary.set_instant(INSTANT);
        self.partial = secondary.partial_path().map(std::path::Path::to_owned);
        self.target = secondary.target().cloned();
        if self.archive.is_some() {
            assert_eq!(secondary.archive_id(), self.archive, "another identity");
        }
        self.archive = secondary.archive_id();
        self.blocks(|memory| secondary.opening(memory));
        let result = self.phases(secondary.as_mut(), steps);
        if result.is_err() {
            // SIGKILL: no clean-up runs.
            die(secondary);
        }
        result
    }

    fn phases(&mut self, secondary: &mut dyn Secondary, steps: usize) -> Result<(), Killed> {
        self.data(secondary, steps)?;
        self.originals_begun = true;
        if secondary.appends() {
            self.append(secondary, steps / 2)?;
        } else {
            self.overlay(secondary, steps / 2)?;
        }
        if self.rng.below(steps) == 0 {
            return Err(Killed);
        }
        self.blocks(|memory| secondary.closing(memory));
        if self.rng.below(steps) == 0 {
            return Err(Killed);
        }
        secondary.seal().unwrap();
        if self.rng.below(steps) == 0 {
            return Err(Killed);
        }
        secondary.finish().unwrap();
        Ok(())
    }

    /// The content that the copy must have: absent ranges are zeros.
    fn expected(&self) -> Vec<u8> {
        let mut expected = vec![0; self.image.len()];
        for extent in &self.block_list {
            expected[range(*extent)].copy_from_slice(&self.image[range(*extent)]);
        }
        expected
    }

    fn found(&self) -> Vec<u8> {
        let bytes = fs::read(self.directory.path().join("out")).unwrap();
        match self.form {
            SecondaryForm::Raw => bytes,
            SecondaryForm::Archive => extract(&bytes, self.archive.unwrap()),
        }
    }
}

/// The content of an archive, checked from end to end.
fn extract(bytes: &[u8], archive: Uuid) -> Vec<u8> {
    let superblock = Superblock::decode_head(bytes).unwrap();
    assert_eq!((superblock.archive, superblock.instant_utc_ns), (archive, INSTANT));
    let mut content = vec![0; superblock.origin_size.as_len()];
    let mut checker = FrameChecker::new(superblock, "out");
    let length = checker.layout().frame_bytes().as_len();
    let mut rest = &bytes[BLOCK_BYTES..];
    while rest.len() > BLOCK_BYTES {
        let frame = checker.accept(rest, &mut |_| {}).unwrap();
        let mut packed = PAYLOAD_OFFSET;
        for extent in &frame.extents {
            let at = match frame.facts.kind {
                FrameKind::Data => PAYLOAD_OFFSET + (extent.start() - frame.facts.origin_offset).as_len(),
                FrameKind::Originals | FrameKind::Map => packed,
            };
            packed += extent.length().as_len();
            content[range(*extent)].copy_from_slice(&rest[at..at + extent.length().as_len()]);
        }
        rest = &rest[length..];
    }
    checker.finish(rest).unwrap();
    content
}

fn cases() -> impl Strategy<Value = Case> {
    (1usize..700_000, any::<u64>(), any::<bool>(), any::<bool>(), any::<bool>(), 0u8..7).prop_map(
        |(size, seed, raw, append, gaps, kills)| Case {
            size,
            seed,
            form: if raw { SecondaryForm::Raw } else { SecondaryForm::Archive },
            append,
            gaps,
            kills,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_copy_that_is_killed_again_and_again_is_the_image_at_the_instant(case in cases()) {
        let mut world = World::new(&case);
        for _ in 0..case.kills {
            let steps = 1 + world.rng.below(14);
            if world.run(steps).is_ok() {
                break;
            }
        }
        if !world.directory.path().join("out").exists() {
            prop_assert!(world.run(usize::MAX / 2).is_ok());
        }
        prop_assert!(world.found() == world.expected());
        prop_assert_eq!(fs::read_dir(world.directory.path()).unwrap().count(), 1, "nothing else is left");
    }
}

/// As when a process is killed: the file is closed, and stays.
fn die(mut secondary: Box<dyn Secondary>) {
    secondary.leave();
}

fn case(form: SecondaryForm) -> Case {
    Case { size: 500_000, seed: 5, form, append: false, gaps: true, kills: 0 }
}

#[test]
fn a_state_that_does_not_fit_is_refused_and_the_partial_file_stays() {
    for form in [SecondaryForm::Raw, SecondaryForm::Archive] {
        let mut world = World::new(&case(form));
        assert!(world.run(3).is_err());
        let before = fs::read(world.partial.as_ref().unwrap()).unwrap();
        let kind = |request: &SecondaryRequest, state: &Resumed| match reopen(request, state) {
            Ok(_) => panic!("it was reopened"),
            Err(error) => error.kind(),
        };
        let (request, state) = (world.request(), world.resumed());
        let gone = Resumed { partial: Some(world.directory.path().join("gone")), ..state.clone() };
        assert_eq!(kind(&request, &gone), ErrorKind::Refused);
        assert_eq!(kind(&request, &Resumed { partial: None, ..state.clone() }), ErrorKind::Refused);
        let other = Resumed {
            archive: if form == SecondaryForm::Raw { Some(Uuid::from_u128(1)) } else { None },
            ..state.clone()
        };
        assert_eq!(kind(&request, &other), ErrorKind::Refused);
        if form == SecondaryForm::Archive {
            let pipe = SecondaryRequest { target: SecondaryTarget::Pipe, ..request.clone() };
            assert_eq!(kind(&pipe, &state), ErrorKind::Refused);
            let mut twice = state.clone();
            twice.placed.extend(state.placed.clone());
            assert_eq!(kind(&request, &twice), ErrorKind::BadData);
        }
        assert!(fs::read(world.partial.as_ref().unwrap()).unwrap() == before);
        assert!(world.run(usize::MAX / 2).is_ok());
        assert!(world.found() == world.expected());
    }
}

#[test]
fn a_segment_that_became_zero_is_zero_on_a_raw_file_after_a_kill() {
    let mut world = World::new(&Case { gaps: false, ..case(SecondaryForm::Raw) });
    let extent = world.extent(0);
    let valid = [extent];
    for byte in [7, 0] {
        let mut secondary = match byte {
            7 => open(&world.request()).unwrap(),
            _ => reopen(&world.request(), &world.resumed()).unwrap(),
        };
        world.partial = secondary.partial_path().map(std::path::Path::to_owned);
        world.target = secondary.target().cloned();
        let mut memory = World::memory();
        memory.fill(byte);
        let segment = Segment { ix: SegmentIx::ZERO, extent, valid: &valid, checksum: None, zero: byte == 0 };
        let placement = secondary.place(&segment, &mut memory).unwrap();
        world.write(&placement, &memory, false);
        die(secondary);
    }
    let mut found = vec![1; extent.length().as_len()];
    world.file().read_exact_at(&mut found, 0).unwrap();
    assert!(is_zero(&found));
}

#[test]
fn an_archive_that_lacks_a_data_frame_is_not_finished() {
    let mut world = World::new(&case(SecondaryForm::Archive));
    assert!(world.run(5).is_err());
    // A journal that lacks a segment in the middle, and a copier that takes it for copied.
    let state = world.resumed();
    let inner = state.placed.iter().position(|placed| placed.frame == Some(0)).unwrap();
    let mut lacking = state;
    lacking.placed.remove(inner);
    let mut secondary = reopen(&world.request(), &lacking).unwrap();
    let error = secondary.closing(&mut World::memory()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BadData);
    let original = Extent::new(Bytes::ZERO, Bytes(CHUNK)).unwrap();
    assert_eq!(secondary.append(&[original], &mut World::memory()).unwrap_err().kind(), ErrorKind::BadData);
}

#[test]
fn only_what_an_overlay_may_have_torn_is_accepted() {
    let mut world = World::new(&Case { gaps: false, ..case(SecondaryForm::Archive) });
    let mut secondary = open(&world.request()).unwrap();
    secondary.set_instant(INSTANT);
    world.partial = secondary.partial_path().map(std::path::Path::to_owned);
    world.target = secondary.target().cloned();
    world.archive = secondary.archive_id();
    assert!(world.data(secondary.as_mut(), usize::MAX).is_ok());
    die(secondary);
    let ix = world.placed.iter().find(|placed| placed.frame.is_some()).unwrap().ix;
    let extent = world.extent(ix.get());
    let valid = [extent];
    let segment = Segment { ix, extent, valid: &valid, checksum: None, zero: false };
    let check_as = |originals, state: &Resumed, at: usize, flip: u8, rewritten: bool, has_originals: bool| {
        let request = SecondaryRequest { originals, ..world.request() };
        let mut secondary = reopen(&request, state).unwrap();
        let mut memory = World::memory();
        world.read(&secondary.stored(&segment).unwrap(), &mut memory);
        if rewritten {
            let segment = Segment { checksum: Some(0), ..segment };
            secondary.overlay(&segment, &[extent], &mut World::memory()).unwrap();
        }
        memory[at] ^= flip;
        let checked = secondary.check_stored(&segment, &memory, has_originals);
        die(secondary);
        checked.map_err(|error| error.kind())
    };
    let check = |state: &Resumed, at, flip, rewritten| {
        check_as(OriginalsMode::Overlay, state, at, flip, rewritten, true)
    };
    let data = world.resumed();
    let begun = Resumed { originals_begun: true, ..data.clone() };
    let torn = [PAYLOAD_OFFSET + 5, 100, PAYLOAD_OFFSET + 65536 + 100];
    for at in torn {
        assert_eq!(check(&data, at, 1, false), Err(ErrorKind::BadData), "no originals had begun: {at}");
        assert_eq!(check(&begun, at, 1, false), Ok(()), "{at}");
        assert_eq!(check(&begun, at, 1, true), Err(ErrorKind::BadData), "rewritten: {at}");
        assert_eq!(check(&begun, at, 0, true), Ok(()));
        let without = check_as(OriginalsMode::Overlay, &begun, at, 1, false, false);
        assert_eq!(without, Err(ErrorKind::BadData), "a segment without originals: {at}");
        let appended = check_as(OriginalsMode::Append, &begun, at, 1, false, true);
        assert_eq!(appended, Err(ErrorKind::BadData), "appended originals leave the data as it is: {at}");
    }
    assert_eq!(check(&begun, 0, 1, false), Err(ErrorKind::BadData), "the magic number is never torn");
}
