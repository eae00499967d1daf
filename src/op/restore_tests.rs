//! Restore and verify from files and pipes: exactness, and all refusals.

use std::fs::{self, File};
use std::io::{Seek as _, Write as _};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use proptest::prelude::*;

use super::request::{InspectRequest, RestoreRequest};
use super::{inspect, restore, verify};
use crate::base::{Bytes, Error, ErrorKind, Extent, Result, SegmentSize};
use crate::format::archive::sample::Sample;
use crate::format::archive::{ArchiveError, BLOCK_BYTES, OriginalsMode, frame_offset};
use crate::progress::Silent;
use crate::restore::chain::Content;
use crate::restore::compare::{self, VerifyReport};
use crate::restore::writer::RestoreReport;
use crate::restore::{ArchiveSource, Input};
use crate::secondary::archive_read::FrameChecker;
use crate::sys::loop_device::{CONTROL_PATH, LoopDevice};

const SEGMENT: u64 = 64 * 1024;

fn extent(start: u64, end: u64) -> Extent {
    Extent::new(Bytes(start), Bytes(end)).unwrap()
}

/// Bytes that differ at every offset.
fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// Data, a zero segment, originals over both, and an end within a sector.
fn sample() -> Sample {
    let mut content = noise(Bytes(4 * SEGMENT + 5001).as_len(), 1);
    content[Bytes(SEGMENT).as_len()..Bytes(2 * SEGMENT).as_len()].fill(0);
    let end = 4 * SEGMENT + 5001;
    Sample::new(content)
        .with_originals(&[extent(0, 4096), extent(SEGMENT + 8192, SEGMENT + 16384)], 0xab)
        .with_originals(&[extent(2 * SEGMENT - 4096, 2 * SEGMENT + 4096), extent(end - 905, end)], 0xcd)
}

struct Place {
    directory: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        Self { directory: tempfile::tempdir().unwrap() }
    }
    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
    fn put(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, bytes).unwrap();
        path
    }
    fn names(&self) -> Vec<String> {
        let names = fs::read_dir(self.directory.path()).unwrap();
        names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}

fn request(archive: &Path, target: &Path) -> RestoreRequest {
    let archive = ArchiveSource::Path(archive.to_owned());
    RestoreRequest { archive, target: target.to_owned(), parents: Vec::new(), replace: false }
}

fn restore_file(archive: &Path, target: &Path) -> Result<RestoreReport> {
    restore::run(&request(archive, target), &Silent, &|| Ok(()))
}

/// A pipe that a thread fills.
fn pipe(bytes: Vec<u8>) -> OwnedFd {
    let (read, write) = nix::unistd::pipe().unwrap();
    std::thread::spawn(move || {
        // A reader that stops early closes the pipe.
        let _ = File::from(write).write_all(&bytes);
    });
    read
}

fn restore_pipe(bytes: Vec<u8>, target: &Path) -> Result<RestoreReport> {
    let input = Input::stream(pipe(bytes), "the pipe", &|| Ok(()))?;
    let request = RestoreRequest {
        archive: ArchiveSource::Pipe,
        target: target.to_owned(),
        parents: Vec::new(),
        replace: false,
    };
    restore::restore(&Content::Whole(input), &request, &Silent, &|| Ok(()))
}

fn verify_pipe(bytes: Vec<u8>, against: Option<&Path>) -> Result<VerifyReport> {
    let input = Input::stream(pipe(bytes), "the pipe", &|| Ok(()))?;
    compare::verify(&input, against, &Silent, &|| Ok(()))
}

fn verify_file(archive: &Path, against: Option<&Path>) -> Result<VerifyReport> {
    let request = crate::op::request::VerifyRequest {
        archive: ArchiveSource::Path(archive.to_owned()),
        against: against.map(Path::to_owned),
        parents: Vec::new(),
    };
    verify::run(&request, &Silent, &|| Ok(()))
}

fn kind<T>(result: Result<T>) -> ErrorKind {
    match result {
        Ok(_) => panic!("must fail"),
        Err(error) => error.kind(),
    }
}

#[test]
fn an_archive_is_restored_and_verified() {
    let (place, sample) = (Place::new(), sample());
    let archive = place.put("a.tdm", &sample.build());
    let out = place.path("out");
    let report = restore_file(&archive, &out).unwrap();
    assert_eq!(report.totals.data_frames, 4);
    assert_eq!(report.totals.originals_frames, 2);
    assert!(fs::read(&out).unwrap() == sample.content());
    restore_pipe(sample.build(), &place.path("piped")).unwrap();
    assert!(fs::read(place.path("piped")).unwrap() == sample.content());
    assert_eq!(verify_file(&archive, None).unwrap().totals, report.totals);
    let against = verify_file(&archive, Some(&out)).unwrap();
    assert_eq!(against.compared_bytes, sample.superblock.origin_size);
    assert_eq!(against.absent_bytes, Bytes::ZERO);
    verify_pipe(sample.build(), Some(&out)).unwrap();
    let inspected = inspect::run(&InspectRequest { archive }, &Silent, &|| Ok(())).unwrap();
    assert_eq!(inspected.totals, report.totals);
    assert_eq!(inspected.map.zero_bytes, Bytes(SEGMENT));
    assert_eq!(inspected.map.entries, 3);
    assert_eq!(inspected.instant.as_deref(), Some("2023-11-14T22:13:20Z"));
}

#[test]
fn a_difference_is_named_to_the_sector() {
    let (place, sample) = (Place::new(), sample());
    let archive = place.put("a.tdm", &sample.build());
    let content = sample.content();
    // In data, in a zero segment, in an original, in the last byte.
    for at in [3 * SEGMENT + 700, SEGMENT + 5000, SEGMENT + 9000, 4 * SEGMENT + 5000] {
        let mut other = content.clone();
        other[Bytes(at).as_len()] ^= 1;
        let other = place.put("other", &other);
        for result in [verify_file(&archive, Some(&other)), verify_pipe(sample.build(), Some(&other))] {
            let error = result.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::BadData);
            let start = at / 512 * 512;
            let end = (start + 512).min(4 * SEGMENT + 5001);
            assert!(
                error.to_string().contains(&format!("in 1 ranges, {} bytes: {start}..{end}", end - start)),
                "{error}"
            );
        }
    }
    let short = place.put("short", &content[1..]);
    assert_eq!(kind(verify_file(&archive, Some(&short))), ErrorKind::BadData);
    // Fuzzy data that originals replace must not count as equal.
    let fuzzy = place.put("fuzzy", &sample.fuzzy);
    assert_eq!(kind(verify_file(&archive, Some(&fuzzy))), ErrorKind::BadData);
}

#[test]
fn every_cut_is_found_and_leaves_no_file() {
    let (place, whole) = (Place::new(), sample().build());
    let out = place.path("out");
    for cut in (0..whole.len()).step_by(BLOCK_BYTES).chain([1, whole.len() - 1]) {
        let archive = place.put("cut.tdm", &whole[..cut]);
        let error = restore_file(&archive, &out).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::BadData, "cut at {cut}: {error}");
        assert_eq!(kind(restore_pipe(whole[..cut].to_vec(), &out)), ErrorKind::BadData, "pipe cut at {cut}");
        assert_eq!(place.names(), ["cut.tdm"], "cut at {cut}");
    }
    let mut longer = whole.clone();
    longer.push(0);
    let archive = place.put("cut.tdm", &longer);
    assert_eq!(kind(restore_file(&archive, &out)), ErrorKind::BadData);
    assert_eq!(kind(restore_pipe(longer, &out)), ErrorKind::BadData);
    assert_eq!(place.names(), ["cut.tdm"]);
}

/// The reader without its I/O engine: fast enough to test every byte.
fn check(bytes: &[u8]) -> Result<()> {
    use crate::format::archive::Superblock;
    let superblock = Superblock::decode_head(bytes).map_err(Error::from)?;
    let mut checker = FrameChecker::new(superblock, "sample");
    let length = checker.layout().frame_bytes().as_len();
    let mut rest = &bytes[BLOCK_BYTES..];
    while rest.len() > BLOCK_BYTES {
        if rest.len() < length {
            return Err(checker.truncated(rest.len()));
        }
        checker.accept(rest, &mut |_| {})?;
        rest = &rest[length..];
    }
    checker.finish(rest).map(|_| ())
}

#[test]
fn every_corrupted_byte_is_found() {
    let sample =
        Sample::new(noise(Bytes(SEGMENT + 3000).as_len(), 2)).with_originals(&[extent(4096, 8192)], 1);
    let mut bytes = sample.build();
    check(&bytes).unwrap();
    let (end, frame) = (bytes.len() - BLOCK_BYTES, sample.layout().frame_bytes().as_len());
    assert_eq!((end - BLOCK_BYTES) / frame, 4, "two data frames, originals, map");
    // The reader's state before each frame: a corrupted byte must be found in its own frame.
    let mut readers = vec![FrameChecker::new(sample.superblock.clone(), "sample")];
    for at in (BLOCK_BYTES..end).step_by(frame) {
        let mut reader = readers.last().unwrap().clone();
        reader.accept(&bytes[at..], &mut |_| {}).unwrap();
        readers.push(reader);
    }
    for at in 0..bytes.len() {
        let flip = 1u8 << (at % 8);
        bytes[at] ^= flip;
        let found = if at < BLOCK_BYTES {
            check(&bytes)
        } else {
            let mut reader = readers[(at - BLOCK_BYTES) / frame].clone();
            let begin = at - (at - BLOCK_BYTES) % frame;
            if begin == end {
                reader.finish(&bytes[end..]).map(|_| ())
            } else {
                reader.accept(&bytes[begin..], &mut |_| {}).map(|_| ())
            }
        };
        bytes[at] ^= flip;
        assert_eq!(found.map_err(|error| error.kind()), Err(ErrorKind::BadData), "byte {at}");
    }
}

#[test]
fn a_corrupted_archive_leaves_no_file() {
    let (place, bytes) = (Place::new(), sample().build());
    let out = place.path("out");
    for at in (17..bytes.len()).step_by(9973) {
        let mut bad = bytes.clone();
        bad[at] ^= 0x40;
        let archive = place.put("bad.tdm", &bad);
        assert_eq!(kind(restore_file(&archive, &out)), ErrorKind::BadData, "byte {at}");
        assert_eq!(kind(verify_file(&archive, None)), ErrorKind::BadData, "byte {at}");
        assert_eq!(kind(restore_pipe(bad, &out)), ErrorKind::BadData, "byte {at}");
        assert_eq!(place.names(), ["bad.tdm"]);
    }
}

#[test]
fn frames_that_are_moved_doubled_or_left_out_are_found() {
    let (sample, bytes) = (sample(), sample().build());
    let segment = SegmentSize::new(Bytes(SEGMENT)).unwrap();
    let at = |n: u64| frame_offset(n, segment).unwrap().as_len();
    let (first, second, third) = (&bytes[at(0)..at(1)], &bytes[at(1)..at(2)], &bytes[at(2)..]);
    let head = &bytes[..BLOCK_BYTES];
    for wrong in [
        [head, second, first, third].concat(),
        [head, first, first, third].concat(),
        [head, first, third].concat(),
        [head, first, first, second, third].concat(),
    ] {
        assert_eq!(kind(check(&wrong)), ErrorKind::BadData);
    }
    // Frames of another archive with the same layout.
    let mut other = sample;
    other.superblock.archive = uuid::Uuid::from_u128(99);
    let other = other.build();
    let mixed = [head, &other[at(0)..at(1)], second, third].concat();
    assert_eq!(kind(check(&mixed)), ErrorKind::BadData);
}

/// The reason why an archive is refused.
fn fault(sample: &Sample) -> ArchiveError {
    use std::error::Error as _;
    let error = check(&sample.build()).unwrap_err();
    error.source().unwrap().downcast_ref::<ArchiveError>().unwrap().clone()
}

#[test]
fn a_map_that_disagrees_with_the_frames_is_found() {
    // One frame is missing, with sequence numbers and totals adjusted: only the map shows it.
    let lacking = Sample { omitted_frame: Some(2), ..sample() };
    assert_eq!(fault(&lacking), ArchiveError::MapMismatch { origin_offset: 2 * SEGMENT, map: "present" });
    let whole = extent(0, 4 * SEGMENT + 5001);
    let cases = [
        // A segment with a frame that is absent in the map.
        (vec![whole], vec![extent(0, 3 * SEGMENT), extent(4 * SEGMENT, 4 * SEGMENT + 5001)]),
        // As many bytes, at another place in the segment.
        (vec![extent(0, 8192)], vec![extent(4096, 12288)]),
        (vec![extent(0, 4096), extent(8192, 12288)], vec![extent(0, 8192)]),
        // Other bytes.
        (vec![extent(0, 8192)], vec![extent(0, 12288)]),
    ];
    for (frames, map) in cases {
        let sample = Sample::new(noise(whole.end().as_len(), 3));
        let honest = Sample { block_list: frames, ..sample };
        check(&honest.build()).unwrap();
        let lying = Sample { wrong_map_list: Some(map.clone()), ..honest };
        let fault = fault(&lying);
        assert!(
            matches!(fault, ArchiveError::MapMismatch { .. } | ArchiveError::Totals { .. }),
            "{map:?}: {fault}"
        );
    }
}

#[test]
fn originals_where_none_can_be_are_refused() {
    let mut lying = sample();
    lying.superblock.originals = OriginalsMode::Overlay;
    assert!(matches!(fault(&lying), ArchiveError::Field { .. }));
}

#[test]
fn what_stands_in_the_way_is_refused() {
    let (place, sample) = (Place::new(), sample());
    let archive = place.put("a.tdm", &sample.build());
    let there = place.put("there", b"theirs");
    assert_eq!(kind(restore_file(&archive, &there)), ErrorKind::Refused);
    assert_eq!(fs::read(&there).unwrap(), b"theirs");
    assert_eq!(kind(restore_file(&archive, place.directory.path())), ErrorKind::Refused);
    let over = RestoreRequest { replace: true, ..request(&archive, &there) };
    restore::run(&over, &Silent, &|| Ok(())).unwrap();
    assert!(fs::read(&there).unwrap() == sample.content());
    let own = RestoreRequest { replace: true, ..request(&archive, &archive) };
    assert_eq!(kind(restore::run(&own, &Silent, &|| Ok(()))), ErrorKind::Refused);
    assert!(fs::read(&archive).unwrap() == sample.build());
}

#[test]
fn an_interrupt_leaves_nothing() {
    let (place, sample) = (Place::new(), sample());
    let archive = place.put("a.tdm", &sample.build());
    let stop = || Err(Error::new(ErrorKind::Interrupted, "stopped"));
    let out = place.path("out");
    assert_eq!(kind(restore::run(&request(&archive, &out), &Silent, &stop)), ErrorKind::Interrupted);
    // The interrupt is noticed although the pipe delivers nothing.
    let (read, write) = nix::unistd::pipe().unwrap();
    let result = Input::stream(read, "the pipe", &stop);
    assert_eq!(kind(result.map(|_| ())), ErrorKind::Interrupted);
    drop(write);
    assert_eq!(place.names(), ["a.tdm"]);
}

#[test]
fn the_empty_origin_is_restored() {
    let (place, sample) = (Place::new(), Sample::new(Vec::new()));
    let archive = place.put("a.tdm", &sample.build());
    restore_file(&archive, &place.path("out")).unwrap();
    assert_eq!(fs::read(place.path("out")).unwrap(), b"");
    verify_file(&archive, Some(&place.path("out"))).unwrap();
}

/// A random sample: parts copied or not, zero or not, any number of originals.
fn samples() -> impl Strategy<Value = Sample> {
    let pages = prop::collection::vec((any::<bool>(), any::<bool>()), 1..80);
    let originals = prop::collection::vec(prop::collection::btree_set(0u64..80, 1..10), 0..4);
    (pages, originals, 1u64..=4096, any::<Option<u64>>(), any::<u64>()).prop_map(
        |(pages, originals, tail, shuffled, seed)| {
            let size = (Bytes::from_len(pages.len()).get() - 1) * 4096 + tail;
            let mut content = noise(Bytes(size).as_len(), seed);
            let mut list: Vec<Extent> = Vec::new();
            for (page, (copied, zero)) in pages.iter().enumerate() {
                let start = Bytes::from_len(page).get() * 4096;
                let end = size.min(start + 4096);
                if *zero || start / SEGMENT == 1 {
                    content[Bytes(start).as_len()..Bytes(end).as_len()].fill(0);
                }
                if *copied {
                    match list.last_mut() {
                        Some(last) if last.end() == Bytes(start) => *last = extent(last.start().get(), end),
                        _ => list.push(extent(start, end)),
                    }
                }
            }
            let mut sample = Sample::new(content);
            sample.block_list = list;
            sample.shuffled = shuffled;
            for (byte, frame) in (1u8..).zip(originals) {
                // Page-sized extents, some of them adjacent; absent pages have none.
                let extents: Vec<Extent> = frame
                    .into_iter()
                    .filter_map(|page| Extent::new(Bytes(page * 4096), Bytes(size.min(page * 4096 + 4096))))
                    .filter(|extent| sample.block_list.iter().any(|listed| listed.contains(*extent)))
                    .collect();
                if !extents.is_empty() {
                    sample = sample
                        .with_originals(&extents, byte.wrapping_mul(if seed % 2 == 0 { 0 } else { 31 }));
                }
            }
            sample
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_archive_is_restored_exactly(sample in samples()) {
        let place = Place::new();
        let bytes = sample.build();
        let archive = place.put("a.tdm", &bytes);
        let (out, piped) = (place.path("out"), place.path("piped"));
        restore_file(&archive, &out).unwrap();
        prop_assert!(fs::read(&out).unwrap() == sample.content());
        restore_pipe(bytes.clone(), &piped).unwrap();
        prop_assert!(fs::read(&piped).unwrap() == sample.content());
        verify_file(&archive, Some(&out)).unwrap();
        verify_pipe(bytes, Some(&out)).unwrap();
        inspect::run(&InspectRequest { archive }, &Silent, &|| Ok(())).unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn what_is_absent_is_not_compared_and_everything_else_is(
        sample in samples(),
        stale in any::<u64>(),
        at in any::<prop::sample::Index>(),
    ) {
        let (place, bytes) = (Place::new(), sample.build());
        let archive = place.put("a.tdm", &bytes);
        // The other side has different content wherever nothing was copied.
        let expected = sample.content();
        let mut other = noise(expected.len(), stale);
        for listed in &sample.block_list {
            let range = listed.start().as_len()..listed.end().as_len();
            other[range.clone()].copy_from_slice(&expected[range]);
        }
        let copied: Bytes = sample.block_list.iter().map(|extent| extent.length()).sum();
        let path = place.put("other", &other);
        let absent = Bytes::from_len(expected.len()) - copied;
        for report in [verify_file(&archive, Some(&path)).unwrap(), verify_pipe(bytes.clone(), Some(&path)).unwrap()] {
            prop_assert_eq!((report.compared_bytes, report.absent_bytes), (copied, absent));
        }
        let inspected = inspect::run(&InspectRequest { archive: archive.clone() }, &Silent, &|| Ok(())).unwrap();
        prop_assert_eq!(inspected.map.absent_bytes, absent);
        let alone = verify_file(&archive, None).unwrap();
        prop_assert_eq!((alone.compared_bytes, alone.absent_bytes), (Bytes::ZERO, absent));

        let at = at.index(other.len());
        let offset = Bytes::from_len(at);
        other[at] ^= 1;
        let path = place.put("other", &other);
        let is_copied = sample.block_list.iter().any(|listed| listed.start() <= offset && offset < listed.end());
        prop_assert_eq!(verify_file(&archive, Some(&path)).is_err(), is_copied);
        prop_assert_eq!(verify_pipe(bytes, Some(&path)).is_err(), is_copied);
    }
}

#[test]
fn a_pipe_may_be_a_file_that_was_opened() {
    let (place, sample) = (Place::new(), sample());
    let mut file = File::open(place.put("a.tdm", &sample.build())).unwrap();
    file.rewind().unwrap();
    let input = Input::stream(file.into(), "the file", &|| Ok(())).unwrap();
    compare::verify(&input, None, &Silent, &|| Ok(())).unwrap();
}

/// A loop device on `file`; None if this process may not create one.
fn loop_over(file: &Path) -> Option<LoopDevice> {
    if !nix::unistd::geteuid().is_root() || !Path::new(CONTROL_PATH).exists() {
        return None;
    }
    let backing = File::options().read(true).write(true).open(file).unwrap();
    Some(LoopDevice::attach(&backing, 4096, false).unwrap())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_device_holds_nothing_of_its_earlier_life(sample in samples(), stale in any::<u64>(), pipe in any::<bool>()) {
        let place = Place::new();
        let bytes = sample.build();
        let archive = place.put("a.tdm", &bytes);
        let expected = sample.content();
        let size = expected.len().next_multiple_of(4096) + (1 << 20);
        let old = noise(size, stale);
        let file = place.put("device", &old);
        let Some(device) = loop_over(&file) else { return Ok(()) };
        let report = if pipe {
            let input = Input::stream(self::pipe(bytes), "the pipe", &|| Ok(())).unwrap();
            let archive = ArchiveSource::Pipe;
            let request = RestoreRequest { archive, target: device.path(), parents: Vec::new(), replace: true };
            restore::restore(&Content::Whole(input), &request, &Silent, &|| Ok(())).unwrap()
        } else {
            let over = RestoreRequest { replace: true, ..request(&archive, &device.path()) };
            restore::run(&over, &Silent, &|| Ok(())).unwrap()
        };
        let found = fs::read(&file).unwrap();
        prop_assert!(found[..expected.len()] == expected);
        let rest = expected.len().next_multiple_of(4096);
        prop_assert!(found[rest..] == old[rest..], "what follows the copy is left alone");
        prop_assert_eq!(report.discarded_bytes, report.zeroed_bytes);
    }
}

#[test]
fn a_loop_device_over_the_archive_is_refused() {
    let (place, sample) = (Place::new(), sample());
    let bytes = sample.build();
    let archive = place.put("a.tdm", &bytes);
    // The kernel shows another path than the given one.
    let other_name = place.path("other-name");
    fs::hard_link(&archive, &other_name).unwrap();
    let Some(device) = loop_over(&other_name) else { return };
    fs::remove_file(&other_name).unwrap();
    let over = RestoreRequest { replace: true, ..request(&archive, &device.path()) };
    let error = restore::run(&over, &Silent, &|| Ok(())).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused);
    assert!(error.to_string().contains("the archive itself"), "{error}");
    drop(device);
    assert!(fs::read(&archive).unwrap() == bytes);
}

fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// The golden archive's content according to tests/golden/archive/README.md.
fn golden_content() -> Vec<u8> {
    let size = Bytes(2 * SEGMENT + 5001).as_len();
    let mut content: Vec<u8> =
        (0..size.div_ceil(16)).flat_map(|unit| format!("unit{unit:012}").into_bytes()).collect();
    content.truncate(size);
    content[40960..49152].fill(0);
    content[65536..131_072].fill(0);
    content[4096..8192].fill(b'O');
    content[73728..77824].fill(b'O');
    content
}

/// The golden archives: version, name, and XXH3-64 of the file.
const GOLDEN: [(u32, &str, u64); 2] =
    [(1, "v1.tdm", 0xdc02_a621_952f_657f), (2, "v2.tdm", 0x1e46_7354_6464_22ce)];

fn golden_path(name: &str) -> PathBuf {
    repository("tests/golden/archive").join(name)
}

#[test]
fn the_golden_archives_are_read() {
    for (version, name, checksum) in GOLDEN {
        let bytes = fs::read(golden_path(name)).unwrap();
        assert_eq!(bytes.len(), 303_104);
        let found = crate::base::checksum::xxh3_64(&bytes);
        assert_eq!(found, checksum, "a golden file is never regenerated: {name}");
        read_golden(version, &golden_path(name));
    }
}

fn read_golden(version: u32, golden: &Path) {
    let golden = golden.to_owned();
    let place = Place::new();
    let out = place.path("out");
    let report = restore_file(&golden, &out).unwrap();
    assert!(fs::read(&out).unwrap() == golden_content());
    assert_eq!(report.superblock.origin_path, "/dev/mapper/golden");
    assert_eq!(report.superblock.instant_utc_ns, 1_700_000_000_123_456_789);
    let inspected = inspect::run(&InspectRequest { archive: golden.clone() }, &Silent, &|| Ok(())).unwrap();
    assert_eq!((inspected.totals.data_frames, inspected.totals.originals_frames), (2, 1));
    assert_eq!((inspected.version, inspected.superblock.version.number()), (version, version));
    assert_eq!(inspected.map.absent_bytes, Bytes(8192));
    assert_eq!(inspected.map.zero_bytes, Bytes(SEGMENT));
    verify_file(&golden, Some(&out)).unwrap();
}

/// Runs tests/archive_reader.py, which shares no code with us; returns its exit code.
fn independent_reader(arguments: &[&std::ffi::OsStr]) -> i32 {
    let output = std::process::Command::new("python3")
        .arg(repository("tests/archive_reader.py"))
        .args(arguments)
        .output()
        .expect("python3 is installed by scripts/test");
    output.status.code().unwrap_or_else(|| panic!("{}", String::from_utf8_lossy(&output.stderr)))
}

#[test]
fn a_reader_written_from_the_format_alone_agrees() {
    let place = Place::new();
    let mut padded = sample();
    let ascending = padded.build();
    padded.shuffled = Some(0x5eed);
    assert!(padded.build() != ascending, "the data frames are in another order");
    padded.block_list =
        vec![extent(0, 12288), extent(20480, 3 * SEGMENT), extent(3 * SEGMENT + 512, 4 * SEGMENT + 5001)];
    let cases = [
        (fs::read(golden_path("v1.tdm")).unwrap(), golden_content()),
        (fs::read(golden_path("v2.tdm")).unwrap(), golden_content()),
        (sample().build(), sample().content()),
        (padded.build(), padded.content()),
        (Sample::new(Vec::new()).build(), Vec::new()),
    ];
    for (bytes, content) in cases {
        let (archive, out) = (place.put("a.tdm", &bytes), place.path("out"));
        assert_eq!(independent_reader(&["extract".as_ref(), archive.as_os_str(), out.as_os_str()]), 0);
        assert!(fs::read(&out).unwrap() == content);
    }
    // The independent reader also refuses what we refuse.
    let bytes = sample().build();
    for at in [100, 2000, 4096, 4096 + 500, 12345, bytes.len() - 5000, bytes.len() - 4000, bytes.len() - 1] {
        let mut bad = bytes.clone();
        bad[at] ^= 4;
        let archive = place.put("a.tdm", &bad);
        assert_eq!(independent_reader(&["check".as_ref(), archive.as_os_str()]), 4, "byte {at}");
    }
    let archive = place.put("a.tdm", &bytes[..bytes.len() - BLOCK_BYTES]);
    assert_eq!(independent_reader(&["check".as_ref(), archive.as_os_str()]), 4);
}
