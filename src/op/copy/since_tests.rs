//! Updates of a raw secondary against a model of a volume and the stores of its snapshots.

use proptest::prelude::*;

use super::*;
use crate::base::SegmentSize;
use crate::format::raw_copy::{Description, RawCopy, RawCopyState, Shown};
use crate::format::state::TargetRecord;

/// Chunks of the volume.
const CHUNKS: usize = 64;
const CHUNK: u64 = 4096;

/// A snapshot: its content, and the chunks in its store.
#[derive(Clone, Debug)]
struct Kept {
    id: Uuid,
    content: Vec<u64>,
    store: Vec<bool>,
    /// Chunks that it leaves out, by bit.
    omits: u64,
}

/// A volume, its snapshots from the oldest to the newest, and a raw secondary.
struct World {
    volume: Vec<u64>,
    snapshots: Vec<Kept>,
    secondary: Vec<u64>,
    raw: RawParent,
    next: u64,
}

#[derive(Clone, Debug)]
enum Step {
    Write(Vec<usize>),
    /// Creates a snapshot that leaves out these chunks.
    Create(u64),
    /// Deletes a snapshot that is neither the base nor the newest: the next older one takes over what its store lacks.
    Delete(usize),
    /// Updates the secondary to a kept snapshot or, if there is none of this number, to the volume as it is, of which
    /// only some chunks are in use. Without an end, of all writes only those happen that the mask names.
    Update {
        to: usize,
        used: u64,
        end: bool,
        mask: u64,
    },
}

fn extents(chunks: impl Iterator<Item = usize>) -> ExtentSet {
    let extent = |chunk: usize| {
        let start = Bytes::from_len(chunk).get() * CHUNK;
        Extent::new(Bytes(start), Bytes(start + CHUNK)).unwrap()
    };
    chunks.map(extent).collect()
}

fn chunks(extents: &[Extent]) -> impl Iterator<Item = usize> + '_ {
    let range = |extent: &Extent| {
        Bytes(extent.start().get() / CHUNK).as_len()..Bytes(extent.end().get() / CHUNK).as_len()
    };
    extents.iter().flat_map(range)
}

fn bits(mask: u64) -> impl Iterator<Item = usize> {
    (0..CHUNKS).filter(move |chunk| mask >> chunk & 1 == 1)
}

impl World {
    /// The secondary is a whole copy of the first snapshot.
    fn new() -> Self {
        let content: Vec<u64> = (1..).take(CHUNKS).collect();
        let first =
            Kept { id: Uuid::from_u128(1), content: content.clone(), store: vec![false; CHUNKS], omits: 0 };
        let segment = SegmentSize::new(SegmentSize::MIN).unwrap();
        let size = Bytes(Bytes::from_len(CHUNKS).get() * CHUNK);
        let copy = RawCopy {
            id: Uuid::from_u128(99),
            state: RawCopyState::Complete,
            base: first.id,
            shown: Shown { snapshot: Some(first.id), instant_ns: 0 },
            size,
            segment,
            description: Description {
                path: String::new(),
                base: String::new(),
                shown: None,
                target: TargetRecord { boot: String::new(), file: None, devices: Vec::new() },
            },
            absent: Vec::new(),
            checksums: vec![0; Bytes(segment.count_for(size)).as_len()],
        };
        let raw = RawParent { path: PathBuf::new(), copy, is_proven: true };
        Self { volume: content.clone(), snapshots: vec![first], secondary: content, raw, next: 1000 }
    }

    fn position(&self, id: Uuid) -> usize {
        self.snapshots.iter().position(|one| one.id == id).unwrap()
    }

    /// What [`changes::set`] returns.
    fn changed(&self, from: Uuid, to: Option<&str>) -> ExtentSet {
        let end = to.map_or(self.snapshots.len(), |to| self.position(Uuid::parse_str(to).unwrap()));
        let stores = &self.snapshots[self.position(from)..end];
        extents((0..CHUNKS).filter(|chunk| stores.iter().any(|one| one.store[*chunk])))
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Write(chunks) => {
                for chunk in chunks {
                    self.next += 1;
                    self.volume[*chunk] = self.next;
                    // What every snapshot leaves out is not preserved.
                    if self.snapshots.iter().any(|kept| kept.omits >> chunk & 1 == 0) {
                        self.snapshots.last_mut().unwrap().store[*chunk] = true;
                    }
                }
            }
            Step::Create(omits) => {
                self.next += 1;
                let id = Uuid::from_u128(self.next.into());
                self.snapshots.push(Kept {
                    id,
                    content: self.volume.clone(),
                    store: vec![false; CHUNKS],
                    omits: *omits,
                });
            }
            Step::Delete(at) => {
                let at = at % self.snapshots.len();
                if at + 1 == self.snapshots.len() || self.snapshots[at].id == self.raw.copy.base {
                    return;
                }
                let gone = self.snapshots.remove(at);
                if let Some(older) = at.checked_sub(1).map(|older| &mut self.snapshots[older]) {
                    older.store.iter_mut().zip(gone.store).for_each(|(older, gone)| *older |= gone);
                }
            }
            Step::Update { to, used, end, mask } => self.update(*to, *used, (*end, *mask)),
        }
    }

    fn update(&mut self, to: usize, used: u64, (end, mask): (bool, u64)) {
        let base = self.raw.copy.base;
        let to = to % (self.snapshots.len() + 1);
        let kept = self.snapshots.get(to).cloned();
        if kept.is_some() && to <= self.position(base) {
            return;
        }
        let origin = kept.as_ref().map(|kept| KeptOrigin {
            snapshot: String::new(),
            id: kept.id,
            instant_utc_ns: 0,
            left_out: ExtentSet::new(),
            volume: String::new(),
        });
        let used = kept.as_ref().map_or(used, |kept| !kept.omits);
        let base_omits = self.snapshots[self.position(base)].omits;
        let mut absent = self.raw.absent();
        absent.extend(extents(bits(base_omits)).iter());
        let content = kept.as_ref().map_or(&self.volume, |kept| &kept.content).clone();
        let since = SincePlan {
            base: String::new(),
            base_id: base,
            parent: PathBuf::new(),
            parent_id: Uuid::nil(),
            check: None,
            chunk: Bytes(CHUNK),
            changed_chunks: 0,
            to_move: Bytes::ZERO,
            total: self.raw.copy.size,
            volume: String::new(),
            absent,
            raw: Some(self.raw.clone()),
            planned: ExtentSet::new(),
        };
        let last = last_of(origin.as_ref(), Some(&self.raw));
        let used_extents: Vec<Extent> = extents(bits(used)).iter().collect();
        let selection = since.select(&used_extents, &self.changed(base, last.as_deref()));
        let inherited: ExtentSet = selection.inherited.iter().copied().collect();
        let zeroed: Vec<Extent> =
            selection.absent.iter().flat_map(|extent| inherited.gaps_in(*extent)).collect();
        // The mark.
        let mut absent = self.raw.absent();
        absent.extend(selection.absent.iter().copied());
        self.raw.copy.absent = absent.iter().collect();
        self.raw.copy.state = RawCopyState::Updating;
        self.raw.copy.shown = Shown { snapshot: origin.as_ref().map(|kept| kept.id), instant_ns: 0 };
        let happens = |chunk: &usize| end || mask >> chunk & 1 == 1;
        chunks(&selection.needed).filter(happens).for_each(|chunk| self.secondary[chunk] = content[chunk]);
        chunks(&zeroed).filter(happens).for_each(|chunk| self.secondary[chunk] = 0);
        if !end {
            return;
        }
        self.raw.copy.absent = selection.absent;
        self.raw.copy.state = RawCopyState::Complete;
        if let Some(kept) = origin {
            self.raw.copy.base = kept.id;
        }
        for (chunk, wanted) in content.into_iter().enumerate() {
            let wanted = if used >> chunk & 1 == 1 { wanted } else { 0 };
            assert_eq!(self.secondary[chunk], wanted, "chunk {chunk}");
        }
    }
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        3 => prop::collection::vec(0..CHUNKS, 1..6).prop_map(Step::Write),
        2 => prop_oneof![Just(0), (any::<u64>(), any::<u64>()).prop_map(|(one, other)| one & other)].prop_map(Step::Create),
        1 => any::<usize>().prop_map(Step::Delete),
        3 => (any::<usize>(), any::<u64>(), any::<u64>(), any::<bool>(), any::<u64>()).prop_map(
            |(to, one, other, end, mask)| Step::Update { to, used: one | other, end, mask }
        ),
    ];
    prop::collection::vec(step, 1..60)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn a_complete_update_shows_its_instant_whatever_was_interrupted_before(steps in steps()) {
        let mut world = World::new();
        steps.iter().for_each(|step| world.step(step));
        world.step(&Step::Update { to: world.snapshots.len(), used: u64::MAX, end: true, mask: 0 });
    }
}

/// What an attempt at a newer instant wrote is not among the changes of an older one.
#[test]
fn a_newer_attempt_is_overwritten_by_an_older_instant() {
    let mut world = World::new();
    world.step(&Step::Write(vec![3]));
    world.step(&Step::Create(0));
    world.step(&Step::Write(vec![40]));
    world.step(&Step::Create(0));
    world.step(&Step::Update { to: 2, used: 0, end: false, mask: u64::MAX });
    world.step(&Step::Update { to: 1, used: 0, end: true, mask: 0 });
    assert_eq!(world.raw.copy.base, world.snapshots[1].id);
}

/// What a base leaves out was written by an update to a later instant, and is left out again.
#[test]
fn what_is_left_out_again_is_zeroed() {
    let mut world = World::new();
    let only_5 = 1 << 5;
    world.step(&Step::Create(only_5));
    world.step(&Step::Update { to: 1, used: 0, end: true, mask: 0 });
    world.step(&Step::Write(vec![5]));
    world.step(&Step::Update { to: 2, used: u64::MAX, end: true, mask: 0 });
    assert_ne!(world.secondary[5], 0);
    world.step(&Step::Create(only_5));
    world.step(&Step::Update { to: 2, used: 0, end: true, mask: 0 });
    assert_eq!(world.secondary[5], 0);
}
