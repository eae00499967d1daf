//! A simulated kernel that keeps adding exceptions while they are read, with every write seen half done; and
//! stores with bad content.

use std::cell::RefCell;
use std::collections::HashMap;

use proptest::prelude::*;

use super::*;
use crate::format::exception_store::entries_per_area;
use crate::store::simulator::{Random, SnapshotSimulator, TornView};

/// Reads everything while the kernel works. Err describes what is wrong with the result.
fn read_while_written(seed: u64, really_settle: bool) -> Result<(), String> {
    let chunk = ChunkSize::default();
    let kernel = RefCell::new(SnapshotSimulator::new(seed, chunk, 3000, 3));
    let rounds = kernel.borrow_mut().random.below(40);
    for _ in 0..rounds {
        kernel.borrow_mut().step();
    }
    let needed = kernel.borrow().committed.clone();
    kernel.borrow_mut().step();
    let status = kernel.borrow().status();
    let settle = || {
        if really_settle {
            kernel.borrow_mut().finish();
        }
        kernel.borrow_mut().step();
        Ok(())
    };
    let writer = StoreWriter::from_status(&status, chunk, settle).unwrap();
    let origin = chunk.bytes() * 3000;
    let wrong = |error: Error| format!("seed {seed}: {error}");
    let mut reader = ExceptionReader::open(TornView(&kernel), chunk, origin, writer).map_err(wrong)?;
    let mut found = HashMap::new();
    loop {
        let batch = reader.next_batch(1 + Bytes(seed % 300).as_len()).map_err(wrong)?;
        if batch.is_empty() {
            break;
        }
        for original in batch {
            found.insert(original.extent.start().get() / 4096, original.store_offset.get() / 4096);
        }
    }
    drop(reader);
    for (old, new) in &found {
        if kernel.borrow().all.get(old) != Some(new) {
            return Err(format!("seed {seed}: {old} -> {new} was never an exception"));
        }
    }
    match needed.iter().find(|old| !found.contains_key(old)) {
        Some(old) => Err(format!("seed {seed}: {old} was committed and is not found")),
        None => Ok(()),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]
    #[test]
    fn an_active_store_yields_every_needed_exception_and_no_wrong_one(seed: u64) {
        prop_assert_eq!(read_while_written(seed, true), Ok(()));
    }
}

#[test]
fn without_settling_the_simulated_kernel_would_be_misread() {
    assert!((0..200).any(|seed| read_while_written(seed, false).is_err()), "the simulator tears nothing");
}

/// A complete store of `count` exceptions: the i-th one is for chunk i of the origin.
fn store(count: u64, chunk: ChunkSize) -> Vec<u8> {
    let mut kernel = SnapshotSimulator::new(7, chunk, 1 << 40, count / entries_per_area(chunk) + 1);
    while (kernel.all.len() as u64) < count {
        let missing = count - kernel.all.len() as u64;
        kernel.begin(missing);
    }
    kernel.finish();
    let mut image = kernel.image;
    for index in 0..count {
        let per_area = entries_per_area(chunk);
        let at = area_offset(index / per_area, chunk).unwrap() + Bytes(index % per_area * 16);
        image[at.as_len()..at.as_len() + 8].copy_from_slice(&index.to_le_bytes());
    }
    image
}

fn read_all(image: Vec<u8>, chunk: ChunkSize, origin: Bytes) -> Result<Vec<Original>> {
    let mut reader = ExceptionReader::open(image, chunk, origin, StoreWriter::None)?;
    let mut all = Vec::new();
    loop {
        let batch = reader.next_batch(100)?;
        if batch.is_empty() {
            return Ok(all);
        }
        all.extend(batch);
    }
}

#[test]
fn a_quiet_store_is_read_to_its_end() {
    let chunk = ChunkSize::default();
    for count in [0, 1, 255, 256, 257, 600] {
        let all = read_all(store(count, chunk), chunk, chunk.bytes() * 1000).unwrap();
        assert_eq!(all.len() as u64, count);
        let starts: Vec<u64> = all.iter().map(|original| original.extent.start().get() / 4096).collect();
        assert_eq!(starts, (0..count).collect::<Vec<_>>());
    }
}

#[test]
fn the_last_chunk_is_clipped_at_the_origins_end() {
    let chunk = ChunkSize::default();
    let all = read_all(store(10, chunk), chunk, Bytes(9 * 4096 + 512)).unwrap();
    assert_eq!(all[9].extent.length(), Bytes(512));
    let error = read_all(store(10, chunk), chunk, Bytes(9 * 4096)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BadData);
}

#[test]
fn a_store_that_ends_too_early_is_bad_data() {
    let chunk = ChunkSize::default();
    let whole = store(600, chunk);
    let needed = Bytes(2 * 257 * 4096 + 2 * 4096).as_len() + 600 % 256 * 4096;
    for end in (4096..whole.len()).step_by(13 * 4096) {
        let result = read_all(whole[..end].to_vec(), chunk, chunk.bytes() * 1000);
        assert_eq!(result.is_ok(), end >= needed, "{end} of {needed}");
        if let Err(error) = result {
            assert_eq!(error.kind(), ErrorKind::BadData, "{end}: {error}");
        }
    }
}

#[test]
fn an_origin_chunk_named_twice_is_bad_data() {
    let chunk = ChunkSize::default();
    let mut image = store(300, chunk);
    image[4096 + 16..4096 + 24].copy_from_slice(&299u64.to_le_bytes());
    let error = read_all(image, chunk, chunk.bytes() * 1000).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BadData);
    assert!(error.to_string().contains("second time"), "{error}");
    // For an origin too large for the map, a duplicate is found only within a batch.
    let mut image = store(50, chunk);
    image[4096 + 16..4096 + 24].copy_from_slice(&40u64.to_le_bytes());
    let error = read_all(image, chunk, chunk.bytes() * (DUPLICATE_CHUNKS_MAX + 1)).unwrap_err();
    assert!(error.to_string().contains("twice"), "{error}");
}

#[test]
fn an_invalid_store_and_another_chunk_are_told_apart() {
    let chunk = ChunkSize::default();
    let mut image = store(3, chunk);
    Header { valid: false, chunk }.encode(&mut image).unwrap();
    assert_eq!(read_all(image, chunk, Bytes::mib(1)).unwrap_err().kind(), ErrorKind::StoreInvalid);
    let other = ChunkSize::new(Bytes(8192)).unwrap();
    assert_eq!(read_all(store(3, other), chunk, Bytes::mib(1)).unwrap_err().kind(), ErrorKind::BadData);
    let zeros = vec![0; 1 << 20];
    assert_eq!(read_all(zeros, chunk, Bytes::mib(1)).unwrap_err().kind(), ErrorKind::BadData);
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_make_the_reader_panic_or_loop(seed: u64, words in 0usize..2000) {
        let chunk = ChunkSize::default();
        let mut image = store(300, chunk);
        let mut random = Random(seed);
        for _ in 0..words {
            let at = Bytes(random.below(image.len() as u64 / 8)).as_len() * 8;
            image[at..at + 8].copy_from_slice(&random.next().to_le_bytes());
        }
        Header { valid: true, chunk }.encode(&mut image).unwrap();
        let _ = read_all(image, chunk, chunk.bytes() * 1000);
    }
}

#[test]
fn a_lost_snapshot_is_not_read() {
    for status in [SnapshotStatus::Invalid, SnapshotStatus::Overflow] {
        let error = StoreWriter::from_status(&status, ChunkSize::default(), || Ok(())).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::StoreInvalid);
    }
    let odd = SnapshotStatus::Active { used: Sectors(16), total: Sectors(32), metadata: Sectors(12) };
    assert!(StoreWriter::from_status(&odd, ChunkSize::default(), || Ok(())).is_err());
}
