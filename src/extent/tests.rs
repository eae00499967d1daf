//! Sets, block lists and originals, compared with a byte-by-byte oracle.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::originals::{arrange, by_segment, total};
use super::*;
use crate::base::{SegmentIx, SegmentSize};

fn extent(start: u64, end: u64) -> Extent {
    Extent::new(Bytes(start), Bytes(end)).unwrap()
}

fn extents() -> impl Strategy<Value = Extent> {
    (0u64..120, 1u64..30).prop_map(|(start, length)| extent(start, start + length))
}

/// The oracle: every byte as an entry of its own.
fn bytes(extents: impl IntoIterator<Item = Extent>) -> BTreeSet<u64> {
    extents.into_iter().flat_map(|extent| extent.start().get()..extent.end().get()).collect()
}

fn check_runs(set: &ExtentSet) {
    let runs: Vec<Extent> = set.iter().collect();
    assert!(runs.windows(2).all(|pair| pair[0].end() < pair[1].start()), "{runs:?}");
    assert_eq!(set.run_count(), runs.len());
    assert_eq!(set.total().as_len(), bytes(runs).len());
}

proptest! {
    #[test]
    fn a_set_is_its_bytes(steps in prop::collection::vec((extents(), any::<bool>()), 0..40), probe in extents()) {
        let (mut set, mut oracle) = (ExtentSet::new(), BTreeSet::new());
        for (extent, insert) in steps {
            for byte in extent.start().get()..extent.end().get() {
                if insert { oracle.insert(byte); } else { oracle.remove(&byte); }
            }
            if insert { set.insert(extent) } else { set.remove(extent) }
            check_runs(&set);
            prop_assert_eq!(&bytes(set.iter()), &oracle);
        }
        let probed = bytes([probe]);
        prop_assert_eq!(set.contains(probe), probed.is_subset(&oracle));
        prop_assert_eq!(bytes(set.intersection_with(probe)), &probed & &oracle);
        prop_assert_eq!(bytes(set.gaps_in(probe)), &probed - &oracle);
        prop_assert_eq!(set.is_empty(), oracle.is_empty());
    }

    #[test]
    fn sets_combine_as_their_bytes(a in prop::collection::vec(extents(), 0..20), b in prop::collection::vec(extents(), 0..20)) {
        let (oracle_a, oracle_b) = (bytes(a.iter().copied()), bytes(b.iter().copied()));
        let (a, b): (ExtentSet, ExtentSet) = (a.into_iter().collect(), b.into_iter().collect());
        let only = a.difference(&b);
        check_runs(&only);
        prop_assert_eq!(bytes(only.iter()), &oracle_a - &oracle_b);
    }

    #[test]
    fn segments_are_the_list_in_order(list in prop::collection::vec(extents(), 0..20)) {
        let size = SegmentSize::new(SegmentSize::MIN).unwrap();
        let scale = SegmentSize::MIN.get() / 16;
        let list: Vec<Extent> = list.iter()
            .map(|e| extent(e.start().get() * scale, e.end().get() * scale - 5))
            .collect();
        let blocks = BlockList::new(list.iter().copied());
        let oracle: ExtentSet = list.into_iter().collect();
        let mut end = Bytes::ZERO;
        for (ix, part) in blocks.segments(size) {
            prop_assert!(part.start() >= end, "out of order");
            end = part.end();
            prop_assert_eq!(size.index_of(part.start()), ix);
            prop_assert_eq!(size.index_of(part.end() - Bytes(1)), ix);
        }
        let again: ExtentSet = blocks.segments(size).map(|(_, part)| part).collect();
        prop_assert_eq!(again, oracle);
    }

    #[test]
    fn arranging_originals_keeps_every_chunks_place(order in Just((0u64..60).collect::<Vec<_>>()).prop_shuffle(), kept in prop::collection::vec(any::<bool>(), 60)) {
        // Chunk `old` of the origin has its original in chunk `new` of the store.
        let chunk = SegmentSize::MIN.get() / 4;
        let originals: Vec<Original> = order.iter().enumerate()
            .filter(|(new, _)| kept[*new])
            .map(|(new, old)| Original {
                extent: extent(old * chunk, (old + 1) * chunk),
                store_offset: Bytes(if new % 3 == 0 { *old } else { new as u64 + 100 }) * chunk,
            })
            .collect();
        let places = |list: &[Original]| -> BTreeSet<(u64, u64)> {
            list.iter().flat_map(|original| {
                (0..original.extent.length().get() / chunk).map(|n| {
                    (original.extent.start().get() + n * chunk, original.store_offset.get() + n * chunk)
                }).collect::<Vec<_>>()
            }).collect()
        };
        let expected = places(&originals);
        let arranged = arrange(originals.clone());
        prop_assert_eq!(places(&arranged), expected.clone());
        prop_assert_eq!(total(&arranged), total(&originals));
        prop_assert!(arranged.windows(2).all(|pair| pair[0].extent.end() <= pair[1].extent.start()
            && !pair[0].continues_with(&pair[1])));
        let size = SegmentSize::new(SegmentSize::MIN).unwrap();
        let groups: Vec<(SegmentIx, Vec<Original>)> = by_segment(&arranged, size).collect();
        prop_assert!(groups.windows(2).all(|pair| pair[0].0 < pair[1].0));
        let mut all = BTreeSet::new();
        for (ix, group) in groups {
            let segment = extent(ix.get() * size.bytes().get(), (ix.get() + 1) * size.bytes().get());
            prop_assert!(group.iter().all(|original| segment.contains(original.extent)));
            all.extend(places(&group));
        }
        prop_assert_eq!(all, expected);
    }
}

#[test]
fn the_last_segment_of_the_address_space_ends() {
    let size = SegmentSize::default();
    let last = extent(u64::MAX - 5, u64::MAX);
    assert_eq!(cut(last, size).map(|(_, part)| part).collect::<Vec<_>>(), [last]);
}

proptest! {
    /// Against a model that fills one gap after the other.
    #[test]
    fn a_block_list_is_joined_over_its_smallest_gaps(
        pages in prop::collection::vec(any::<bool>(), 1..400),
        parts_max in 1usize..6,
    ) {
        let page = |at: usize| {
            Extent::with_length(Bytes::from_len(at) * 4096, Bytes(4096)).unwrap()
        };
        let size = SegmentSize::new(SegmentSize::MIN).unwrap();
        let list = BlockList::new((0..pages.len()).filter(|at| pages[*at]).map(page));
        let joined = list.with_parts_max(size, parts_max);
        let mut lengths = 0;
        for segment in 0..pages.len().div_ceil(16) {
            let parts = |list: &BlockList| -> Vec<Extent> {
                list.segments(size).filter(|(ix, _)| ix.get() == Bytes::from_len(segment).get()).map(|(_, part)| part).collect()
            };
            let mut model = parts(&list);
            while model.len() > parts_max {
                let smallest = (0..model.len() - 1).min_by_key(|at| model[at + 1].start() - model[*at].end()).unwrap();
                let next = model.remove(smallest + 1);
                model[smallest] = Extent::new(model[smallest].start(), next.end()).unwrap();
            }
            prop_assert_eq!(parts(&joined), model);
            lengths += parts(&joined).len();
        }
        prop_assert!(lengths >= joined.runs().len());
        prop_assert!(list.runs().iter().all(|run| joined.runs().iter().any(|other| other.contains(*run))));
    }
}
