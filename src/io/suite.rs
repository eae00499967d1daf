//! The suite that every engine passes: [`engine_suite!`] makes one test of each case.
//!
//! The files are in target/, where direct I/O works; on a tmpfs of an older kernel it does not.

use std::collections::{HashMap, HashSet};
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use super::engine::Request;
use super::transfer::is_end_of_file;
use super::*;
use crate::base::{Bytes, ErrorKind};
use crate::extent::Extent;

pub(super) type Make = fn(EngineConfig) -> Box<dyn Engine>;

const BUFFER: usize = 256 << 10;

fn engine(make: Make) -> Box<dyn Engine> {
    make(EngineConfig { buffer_count: 8, buffer_bytes: Bytes::from_len(BUFFER) })
}

pub(super) fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in(concat!(env!("CARGO_MANIFEST_DIR"), "/target")).unwrap()
}

fn open(path: &Path, direct: bool) -> OwnedFd {
    let flags = if direct { libc::O_DIRECT } else { 0 };
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(flags).open(path).unwrap().into()
}

/// Bytes that differ from place to place.
fn pattern(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        bytes.extend_from_slice(&state.rotate_left(29).to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

fn at(range: std::ops::Range<usize>, offset: usize) -> Piece {
    Piece { range, place: Place::At(Bytes::from_len(offset)) }
}

fn stream(range: std::ops::Range<usize>) -> Piece {
    Piece { range, place: Place::Stream }
}

fn finish(engine: &mut dyn Engine) -> HashMap<u64, Completion> {
    let mut all = HashMap::new();
    while let Some(completion) = engine.wait_timeout(Duration::MAX).unwrap() {
        assert!(all.insert(completion.token, completion).is_none(), "a token completed twice");
    }
    assert_eq!(engine.in_flight(), 0);
    all
}

fn one(engine: &mut dyn Engine, request: Request) -> Completion {
    engine.submit(request).unwrap();
    let completion = engine.wait_timeout(Duration::MAX).unwrap().unwrap();
    assert_eq!(engine.in_flight(), 0);
    completion
}

pub(super) fn pieces_go_to_their_places(make: Make) {
    for direct in [false, true] {
        let folder = folder();
        let path = folder.path().join("file");
        let content = pattern(1, 1 << 20);
        std::fs::write(&path, &content).unwrap();
        let mut engine = engine(make);
        let file = engine.add_file(open(&path, direct), "file").unwrap();
        let buffer = engine.take_buffer().unwrap();
        let pieces = vec![at(0..4096, 512 << 10), at(8192..40960, 4096), at(100..100, 0), at(4096..8192, 0)];
        let read = one(
            &mut *engine,
            Request::Read { token: 7, file, buffer, pieces: pieces.clone(), in_turn: false },
        );
        read.result.unwrap();
        let buffer = read.buffer.unwrap();
        assert_eq!(&buffer[0..4096], &content[512 << 10..(512 << 10) + 4096]);
        assert_eq!(&buffer[8192..40960], &content[4096..36864]);
        assert_eq!(&buffer[4096..8192], &content[..4096]);
        let shifted = vec![at(0..4096, 4096), at(4096..8192, 900 << 10)];
        let write = one(&mut *engine, Request::Write { token: 8, file, buffer, pieces: shifted });
        write.result.unwrap();
        one(&mut *engine, Request::Sync { token: 9, file }).result.unwrap();
        let mut expected = content.clone();
        expected[4096..8192].copy_from_slice(&content[512 << 10..(512 << 10) + 4096]);
        expected[900 << 10..(900 << 10) + 4096].copy_from_slice(&content[..4096]);
        assert!(std::fs::read(&path).unwrap() == expected);
    }
}

pub(super) fn many_in_flight_each_completes_once(make: Make) {
    let folder = folder();
    let path = folder.path().join("file");
    std::fs::write(&path, vec![0u8; 4 << 20]).unwrap();
    let mut engine = engine(make);
    let file = engine.add_file(open(&path, true), "file").unwrap();
    let mut free: HashSet<u16> = HashSet::new();
    for round in 0..16usize {
        let mut token = 0;
        while let Some(mut buffer) = engine.take_buffer() {
            buffer.fill(u8::try_from(round * 8 + token).unwrap());
            free.insert(buffer.index());
            // Whole buffers in 64 pieces: more operations than the ring holds.
            let pieces =
                (0..64).map(|i| at(i * 4096..(i + 1) * 4096, token * BUFFER + (63 - i) * 4096)).collect();
            engine.submit(Request::Write { token: token.try_into().unwrap(), file, buffer, pieces }).unwrap();
            token += 1;
        }
        assert_eq!((token, engine.in_flight()), (8, 8));
        for (_, completion) in finish(&mut *engine) {
            completion.result.unwrap();
            engine.give_buffer(completion.buffer.unwrap());
        }
    }
    assert_eq!(free.len(), 8);
    let content = std::fs::read(&path).unwrap();
    for token in 0..8usize {
        let part = &content[token * BUFFER..(token + 1) * BUFFER];
        assert!(part.iter().all(|byte| usize::from(*byte) == 15 * 8 + token));
    }
}

pub(super) fn the_end_of_a_file_is_an_error(make: Make) {
    for direct in [false, true] {
        let folder = folder();
        let path = folder.path().join("short");
        std::fs::write(&path, pattern(3, 10_000)).unwrap();
        let mut engine = engine(make);
        let file = engine.add_file(open(&path, direct), "short").unwrap();
        for (token, pieces) in [
            (1, vec![at(0..16384, 0)]),
            (2, vec![at(0..4096, 0), at(4096..8192, 16384)]),
            (3, vec![at(0..8192, 0)]),
        ] {
            let buffer = engine.take_buffer().unwrap();
            engine.submit(Request::Read { token, file, buffer, pieces, in_turn: false }).unwrap();
        }
        let mut ended = finish(&mut *engine);
        assert!(ended.remove(&3).unwrap().result.is_ok());
        for token in [1, 2] {
            let completion = ended.remove(&token).unwrap();
            assert_eq!(completion.buffer.unwrap().len(), BUFFER);
            let error = completion.result.unwrap_err();
            assert!(is_end_of_file(&error) && error.to_string().contains("short"), "{error}");
        }
    }
}

pub(super) fn errno_and_description_survive(make: Make) {
    let folder = folder();
    let path = folder.path().join("read-only");
    std::fs::write(&path, vec![1u8; 8192]).unwrap();
    let mut engine = engine(make);
    let file = engine.add_file(File::open(&path).unwrap().into(), "the origin").unwrap();
    let buffer = engine.take_buffer().unwrap();
    let pieces = vec![at(0..4096, 0), at(4096..8192, 4096)];
    let write = one(&mut *engine, Request::Write { token: 1, file, buffer, pieces });
    let error = write.result.unwrap_err();
    assert_eq!((error.kind(), error.errno()), (ErrorKind::Io, Some(libc::EBADF)));
    assert!(error.what().contains("write of 4096 bytes at 0 of the origin"), "{error}");
    assert!(write.buffer.is_some());
}

pub(super) fn zeroing_makes_holes_and_keeps_the_size(make: Make) {
    let folder = folder();
    let path = folder.path().join("file");
    let content = pattern(5, 1 << 20);
    std::fs::write(&path, &content).unwrap();
    let mut engine = engine(make);
    let file = engine.add_file(open(&path, true), "file").unwrap();
    for (token, start, length) in [(1, 0, 65536), (2, 200_704, 4096), (3, (1 << 20) - 4096, 65536)] {
        let extent = Extent::with_length(Bytes(start), Bytes(length)).unwrap();
        engine.submit(Request::Zero { token, file, extent }).unwrap();
    }
    for completion in finish(&mut *engine).into_values() {
        assert!(completion.buffer.is_none());
        completion.result.unwrap();
    }
    let mut expected = content;
    for range in [0..65536, 200_704..204_800, (1 << 20) - 4096..1 << 20] {
        expected[range].fill(0);
    }
    assert!(std::fs::read(&path).unwrap() == expected);
}

/// On a loop device, which forwards a discard that reads as zeros to its file.
pub(super) fn zeroing_a_device_gives_space_back(make: Make) {
    use std::os::unix::fs::MetadataExt as _;
    if !nix::unistd::geteuid().is_root() || !Path::new(crate::sys::loop_device::CONTROL_PATH).exists() {
        return;
    }
    let folder = folder();
    let path = folder.path().join("backing");
    let content = pattern(7, 8 << 20);
    std::fs::write(&path, &content).unwrap();
    let backing = File::options().read(true).write(true).open(&path).unwrap();
    backing.sync_all().unwrap();
    let before = backing.metadata().unwrap().blocks();
    let device = crate::sys::loop_device::LoopDevice::attach(&backing, 4096, false).unwrap();
    let mut engine = engine(make);
    let file = engine.add_file(open(&device.path(), true), "device").unwrap();
    for token in 0..6 {
        let extent = Extent::with_length(Bytes::mib(token) + Bytes(4096), Bytes::mib(1)).unwrap();
        engine.submit(Request::Zero { token, file, extent }).unwrap();
    }
    for completion in finish(&mut *engine).into_values() {
        completion.result.unwrap();
    }
    one(&mut *engine, Request::Sync { token: 9, file }).result.unwrap();
    assert!(engine.gives_back(file));
    let mut expected = content;
    expected[4096..(6 << 20) + 4096].fill(0);
    assert!(std::fs::read(&path).unwrap() == expected);
    let after = backing.metadata().unwrap().blocks();
    assert!(after + (5 << 20) / 512 <= before, "{before} blocks before, {after} after");
}

pub(super) fn a_pipe_is_written_and_read(make: Make) {
    for nonblocking in [false, true] {
        let content = pattern(11, 2 * BUFFER);
        let (reader, writer) = std::io::pipe().unwrap();
        let (back_reader, mut back_writer) = std::io::pipe().unwrap();
        if nonblocking {
            for fd in [OwnedFd::from(writer.try_clone().unwrap()), back_reader.try_clone().unwrap().into()] {
                nix::fcntl::fcntl(&fd, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK)).unwrap();
            }
        }
        // The other side returns what it receives, in odd portions and late.
        let echo = std::thread::spawn(move || {
            let mut reader = reader;
            let mut portion = vec![0u8; 7001];
            let mut all = Vec::new();
            loop {
                let count = reader.read(&mut portion).unwrap();
                if count == 0 {
                    break;
                }
                all.extend_from_slice(&portion[..count]);
            }
            for portion in all.chunks(30_011) {
                std::thread::sleep(Duration::from_millis(1));
                back_writer.write_all(portion).unwrap();
            }
        });
        let mut engine_out = engine(make);
        let file = engine_out.add_file(writer.into(), "pipe").unwrap();
        for half in content.chunks(BUFFER) {
            let mut buffer = engine_out.take_buffer().unwrap();
            buffer.copy_from_slice(half);
            let pieces = vec![stream(0..1000), stream(1000..BUFFER)];
            one(&mut *engine_out, Request::Write { token: 1, file, buffer, pieces }).result.unwrap();
        }
        one(&mut *engine_out, Request::Sync { token: 2, file }).result.unwrap();
        drop(engine_out);
        let mut engine = engine(make);
        let file = engine.add_file(back_reader.into(), "pipe").unwrap();
        for half in content.chunks(BUFFER) {
            let buffer = engine.take_buffer().unwrap();
            let pieces = vec![stream(0..BUFFER)];
            let read = one(&mut *engine, Request::Read { token: 1, file, buffer, pieces, in_turn: false });
            read.result.unwrap();
            assert!(*read.buffer.unwrap() == *half);
        }
        let buffer = engine.take_buffer().unwrap();
        let end = one(
            &mut *engine,
            Request::Read { token: 2, file, buffer, pieces: vec![stream(0..1)], in_turn: false },
        );
        assert!(is_end_of_file(&end.result.unwrap_err()));
        echo.join().unwrap();
    }
}

pub(super) fn a_closed_pipe_is_an_error_not_a_signal(make: Make) {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut engine = engine(make);
    let file = engine.add_file(writer.into(), "pipe").unwrap();
    let buffer = engine.take_buffer().unwrap();
    let write = one(&mut *engine, Request::Write { token: 1, file, buffer, pieces: vec![stream(0..BUFFER)] });
    assert_eq!(write.result.unwrap_err().errno(), Some(libc::EPIPE));
    let extent = Extent::new(Bytes(0), Bytes(4096)).unwrap();
    let zero = one(&mut *engine, Request::Zero { token: 2, file, extent });
    assert!(zero.result.is_err());
}

pub(super) fn a_stuck_pipe_times_out_and_resumes(make: Make) {
    let (mut reader, writer) = std::io::pipe().unwrap();
    let mut engine = engine(make);
    let file = engine.add_file(writer.into(), "pipe").unwrap();
    let mut buffer = engine.take_buffer().unwrap();
    let content = pattern(13, BUFFER);
    buffer.copy_from_slice(&content);
    engine.submit(Request::Write { token: 1, file, buffer, pieces: vec![stream(0..BUFFER)] }).unwrap();
    let start = Instant::now();
    assert!(engine.wait_timeout(Duration::from_millis(40)).unwrap().is_none());
    let waited = start.elapsed();
    assert!(waited >= Duration::from_millis(35) && waited < Duration::from_secs(5), "{waited:?}");
    assert_eq!(engine.in_flight(), 1);
    let drain = std::thread::spawn(move || {
        let mut all = vec![0u8; BUFFER];
        reader.read_exact(&mut all).unwrap();
        all
    });
    let completion = engine.wait_timeout(Duration::MAX).unwrap().unwrap();
    completion.result.unwrap();
    assert!(drain.join().unwrap() == content);
    // Nothing in flight: returns at once.
    assert!(engine.wait_timeout(Duration::from_secs(60)).unwrap().is_none());
}

pub(super) fn dropping_with_work_in_flight_ends(make: Make) {
    let folder = folder();
    let path = folder.path().join("file");
    std::fs::write(&path, vec![0u8; 4 << 20]).unwrap();
    let (reader, writer) = std::io::pipe().unwrap();
    let mut engine = engine(make);
    let file = engine.add_file(open(&path, true), "file").unwrap();
    let pipe = engine.add_file(reader.into(), "pipe").unwrap();
    for token in 0..6 {
        let buffer = engine.take_buffer().unwrap();
        engine
            .submit(Request::Read { token, file, buffer, pieces: vec![at(0..BUFFER, 0)], in_turn: false })
            .unwrap();
    }
    let buffer = engine.take_buffer().unwrap();
    engine
        .submit(Request::Read {
            token: 9,
            file: pipe,
            buffer,
            pieces: vec![stream(0..BUFFER)],
            in_turn: false,
        })
        .unwrap();
    let _ = engine.wait_timeout(Duration::MAX).unwrap();
    let start = Instant::now();
    drop(engine);
    assert!(start.elapsed() < Duration::from_secs(5));
    drop(writer);
}

/// A step of a random batch: blocks `start..start + count` are zeroed or written.
#[derive(Clone, Copy, Debug)]
struct RandomStep {
    zero: bool,
    start: usize,
    count: usize,
    seed: u64,
    split: bool,
}

const BLOCKS: usize = 64;

/// Submits one step and does the same to the model; false if no buffer is free.
fn submit_random(
    engine: &mut dyn Engine,
    file: FileIx,
    token: u64,
    step: RandomStep,
    model: &mut [u8],
) -> bool {
    let (from, to) = (step.start * 4096, (step.start + step.count) * 4096);
    if step.zero {
        let extent = Extent::new(Bytes::from_len(from), Bytes::from_len(to)).unwrap();
        engine.submit(Request::Zero { token, file, extent }).unwrap();
        model[from..to].fill(0);
        return true;
    }
    let Some(mut buffer) = engine.take_buffer() else { return false };
    let data = pattern(step.seed, to - from);
    buffer[..data.len()].copy_from_slice(&data);
    model[from..to].copy_from_slice(&data);
    let pieces = if step.split && step.count > 1 {
        vec![at(4096..to - from, from + 4096), at(0..4096, from)]
    } else {
        vec![at(0..to - from, from)]
    };
    engine.submit(Request::Write { token, file, buffer, pieces }).unwrap();
    true
}

fn run_random(make: Make, path: &Path, batches: Vec<Vec<RandomStep>>) -> Result<(), TestCaseError> {
    let mut model = pattern(99, BLOCKS * 4096);
    std::fs::write(path, &model).unwrap();
    let mut engine = engine(make);
    let file = engine.add_file(open(path, true), "file").unwrap();
    for batch in batches {
        // Requests in flight together must not overlap; the caller must see to that.
        let mut taken = [false; BLOCKS];
        for (token, mut step) in (0u64..).zip(batch) {
            step.count = step.count.min(BLOCKS - step.start);
            let blocks = step.start..step.start + step.count;
            if !taken[blocks.clone()].contains(&true)
                && submit_random(&mut *engine, file, token, step, &mut model)
            {
                taken[blocks].fill(true);
            }
        }
        for completion in finish(&mut *engine).into_values() {
            completion.result.unwrap();
            completion.buffer.into_iter().for_each(|buffer| engine.give_buffer(buffer));
        }
        let buffer = engine.take_buffer().unwrap();
        let pieces = vec![at(0..BLOCKS * 4096, 0)];
        let read = one(&mut *engine, Request::Read { token: 0, file, buffer, pieces, in_turn: false });
        read.result.unwrap();
        let buffer = read.buffer.unwrap();
        prop_assert!(buffer[..BLOCKS * 4096] == model[..]);
        engine.give_buffer(buffer);
    }
    let mut disk = vec![0u8; model.len()];
    File::open(path).unwrap().read_exact_at(&mut disk, 0).unwrap();
    prop_assert!(disk == model);
    Ok(())
}

/// Random batches of requests, compared with a vector as the oracle.
pub(super) fn random_batches_match_a_vector(make: Make) {
    let step = (prop::bool::weighted(0.2), 0..BLOCKS, 1..=16usize, any::<u64>(), any::<bool>())
        .prop_map(|(zero, start, count, seed, split)| RandomStep { zero, start, count, seed, split });
    let batches = proptest::collection::vec(proptest::collection::vec(step, 1..12), 1..8);
    let mut runner = TestRunner::new(Config { cases: 12, failure_persistence: None, ..Config::default() });
    let folder = folder();
    let path = folder.path().join("file");
    runner.run(&batches, |batches| run_random(make, &path, batches)).unwrap();
}

/// One test of each case for the engine that `$make` makes.
macro_rules! engine_suite {
    ($make:expr) => {
        $crate::io::suite::engine_suite!($make;
            pieces_go_to_their_places, many_in_flight_each_completes_once, the_end_of_a_file_is_an_error,
            errno_and_description_survive, zeroing_makes_holes_and_keeps_the_size,
            zeroing_a_device_gives_space_back,
            a_pipe_is_written_and_read, a_closed_pipe_is_an_error_not_a_signal,
            a_stuck_pipe_times_out_and_resumes, dropping_with_work_in_flight_ends,
            random_batches_match_a_vector);
    };
    ($make:expr; $($case:ident),*) => {
        $(#[test]
        fn $case() {
            $crate::io::suite::$case($make);
        })*
    };
}
pub(super) use engine_suite;
