//! A copy to a real device, of an origin of which only parts are copied: the device's old content must not
//! show between them.

use std::fs::{self, File};
use std::path::Path;

use proptest::prelude::*;

use super::{CopyJob, CopyOptions, Order, run};
use crate::base::limits::COPY_BUFFER_BYTES_MAX;
use crate::base::{Bytes, ChunkSize, SegmentSize};
use crate::extent::Extent;
use crate::format::SecondaryForm;
use crate::io::open::{EnginePreference, open_engine};
use crate::secondary::engine_config;
use crate::secondary::{OriginIdentity, OriginalsMode, SecondaryRequest, SecondaryTarget, open};
use crate::sys::loop_device::{CONTROL_PATH, LoopDevice};

const PAGE: u64 = 4096;

fn pattern(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        bytes.extend_from_slice(&state.rotate_left(29).to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_not_copied_reads_as_zeros_on_a_device(
        pages in prop::collection::vec(prop::bool::weighted(0.4), 1..150),
        seed in any::<u64>(),
        verify in any::<bool>(),
    ) {
        if !nix::unistd::geteuid().is_root() || !Path::new(CONTROL_PATH).exists() {
            return Ok(());
        }
        let directory = tempfile::tempdir().unwrap();
        let (origin, device) = (directory.path().join("origin"), directory.path().join("device"));
        let content = pattern(pages.len() * 4096, seed);
        fs::write(&origin, &content).unwrap();
        let old = pattern(content.len() + (1 << 20), seed ^ 2);
        fs::write(&device, &old).unwrap();
        let backing = File::options().read(true).write(true).open(&device).unwrap();
        let target = LoopDevice::attach(&backing, 4096, false).unwrap();

        let size = Bytes::from_len(content.len());
        let mut expected = vec![0; content.len()];
        let mut block_list = Vec::new();
        for (page, _) in (0u64..).zip(&pages).filter(|(_, listed)| **listed) {
            let extent = Extent::with_length(Bytes(page * PAGE), Bytes(PAGE)).unwrap();
            let range = extent.start().as_len()..extent.end().as_len();
            expected[range.clone()].copy_from_slice(&content[range]);
            block_list.push(extent);
        }
        let segment = SegmentSize::new(SegmentSize::MIN).unwrap();
        let secondary = open(&SecondaryRequest {
            target: SecondaryTarget::Path(target.path().to_owned()),
            form: SecondaryForm::Raw,
            originals: OriginalsMode::None,
            replace: true,
            verify,
            forbidden: Vec::new(),
            origin: OriginIdentity { name: "data".into(), path: "/dev/data".into(), size },
            segment,
            chunk: ChunkSize::default(),
            block_list: block_list.clone(),
            lineage: crate::secondary::Lineage::default(),
            in_place: false,
        })
        .unwrap();
        let mut engine = open_engine(engine_config(segment, COPY_BUFFER_BYTES_MAX), EnginePreference::Auto).unwrap();
        let read = File::open(&origin).unwrap();
        let options =
            CopyOptions { segment, region: segment.bytes(), order: Order::Physical, rate: None, verify };
        let mut job = CopyJob::new(engine.as_mut(), read.into(), size, options, secondary);
        job.block_list = block_list;
        run(job).unwrap();
        let found = fs::read(&device).unwrap();
        prop_assert!(found[..expected.len()] == expected);
        prop_assert!(found[expected.len()..] == old[expected.len()..], "bytes past the origin's end are unchanged");
    }
}
