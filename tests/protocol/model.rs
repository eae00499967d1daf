//! A model of a copy: its states and steps.
//!
//! The smallest world in which the argument for exactness ("fuzzy copy, then originals") can fail: three chunks in two
//! regions, each chunk a segment of its own, three writes of an application, one death of the copying process, and one
//! loss of the store, each at any moment. A chunk holds the instant's content, or newer content, or junk. All writes
//! are alike, because it does not matter to the argument which write a chunk holds.
//!
//! Modelled, with the file that implements the rule:
//! - dm-snapshot: a first write waits until its original has been copied to the store and its exception committed. A
//!   write is mapped by the table that is active when it is issued. A lost store lets writes pass.
//! - The copier (`src/copy/fuzzy.rs`) reads beneath the snapshot, each chunk at its own moment, writes to the
//!   secondary, and notes what is placed (`src/job/segment_log.rs`).
//! - Release (`src/stack/gate.rs`, `src/stack`): the origin is suspended until nothing is in flight, then its table
//!   bypasses the snapshot.
//! - Originals (`src/copy/overlay.rs`): the list of exceptions is read after the last read of the origin, then each
//!   original is applied to the secondary. Then the snapshot is checked to be valid, and the copy gets its name
//!   (`src/copy/job.rs`).
//! - Death and resume (`src/op/resume.rs`): memory is lost; the kernel's tables and snapshot, the notes and the
//!   secondary remain; the watchdog resumes what was suspended (`src/stack/watchdog`); a write to the secondary that
//!   the dead process had issued may still land.
//!
//! Not modelled: the insertion (the world begins at the instant), sizes, time, device errors, power loss; and copies
//! that end for any other reason, which get no name.

use std::fmt;

/// Chunks of the origin.
pub const CHUNKS: usize = 3;

/// Maximum number of writes that the application issues.
const WRITES: u8 = 3;

/// The region of each chunk.
const REGION: [usize; CHUNKS] = [0, 0, 1];

/// Regions of the origin.
const REGIONS: usize = 2;

/// The rules of the argument; a variant of the protocol breaks one of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// A write reaches the origin only after its chunk's exception has been committed (dm-snapshot).
    PreservedFirst,
    /// An exception is committed only after its original is in the store (dm-snapshot).
    OriginalBeforeException,
    /// The list of exceptions is read after the last read of the origin (`src/copy/job.rs`).
    OriginalsAfterReads,
    /// Every original is applied to the secondary (`src/copy/overlay.rs`).
    AllOriginals,
    /// A region is released after its last read (`src/copy/fuzzy.rs`).
    ReleasedAfterRead,
    /// A region is released after its segments have been noted as placed (`src/copy/fuzzy.rs`).
    ReleasedAfterNote,
    /// A released region is never preserved again, also after a resume (`src/stack`, `Stack::released`).
    ReleasedForGood,
    /// A table is replaced only while nothing is in flight (a suspension that flushes, without `noflush`).
    Drained,
    /// A segment is noted after it is on the secondary (`src/copy/fuzzy.rs`).
    NotedAfterWritten,
    /// A resumed copy does not copy noted segments again (`src/copy/regions.rs`).
    NotedIsKept,
    /// A resumed copy applies every original, including those that its predecessor has applied (`src/op/resume.rs`).
    OriginalsAnew,
    /// No write of the dead process to the secondary is in flight when the copy is resumed: such writes hold the lock
    /// of the partial file, or the exclusive open of the device (`src/secondary/partial.rs`, `src/secondary/raw.rs`).
    NothingUnderWay,
    /// The snapshot is checked to be valid after the last read of the origin (`src/copy/job.rs`).
    ValidAtTheEnd,
    /// A resume finds a valid snapshot (`src/stack`).
    ValidOnResume,
    /// Only space that was not in use at the instant bypasses the snapshot from the start (`src/volume/free.rs`).
    FreeIsFree,
    /// What a dead process has suspended is resumed (`src/stack/watchdog`).
    WatchdogResumes,
}

/// The content of a chunk of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Content {
    /// The instant's content.
    Instant,
    /// Content written after the instant.
    Newer,
    /// Neither: never written, or torn.
    Junk,
}

/// A chunk's exception.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Exception {
    None,
    /// Writes wait for it; the store does not hold it yet.
    Pending,
    /// The original is in the store, but not in the list.
    Stored(Content),
    /// In the list.
    Committed(Content),
}

/// The progress of the copier with a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Segment {
    Unread,
    Read(Content),
    Written,
    Noted,
}

/// The phase of the copying process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Segments are copied.
    Data,
    /// Originals are applied; those of the list that are left.
    Originals([bool; CHUNKS]),
    /// Everything is on the secondary; the final check of the snapshot is left.
    LastLook,
    /// The process is dead.
    Dead,
    /// The copy has its name.
    Named,
    /// The copy has ended with an error.
    Refused,
}

/// The origin's suspension.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Suspension {
    None,
    /// No write is mapped; requests in flight end; then this region is released.
    For(u8),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Chunk {
    origin: Content,
    exception: Exception,
    /// Writes that wait for the exception.
    waiting: u8,
    /// Writes in flight to the origin.
    in_flight: u8,
    segment: Segment,
    secondary: Content,
    /// A write of a dead process to the secondary that is in flight.
    under_way: Option<Content>,
}

/// The complete state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct World {
    chunks: [Chunk; CHUNKS],
    /// Whether each region's line bypasses the snapshot.
    released: [bool; REGIONS],
    suspension: Suspension,
    is_valid: bool,
    phase: Phase,
    writes_left: u8,
    deaths_left: u8,
    losses_left: u8,
}

/// One step, with the number of its chunk or region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The application writes to a chunk.
    Write(usize),
    /// The kernel copies a chunk's original to the store.
    Store(usize),
    /// The kernel commits a chunk's exception, and its waiting writes continue.
    Commit(usize),
    /// A write reaches the origin.
    Reach(usize),
    /// The store is full or fails.
    Lose,
    /// The copier reads a chunk beneath the snapshot.
    Read(usize),
    /// It writes the chunk's segment to the secondary.
    Place(usize),
    /// It notes the segment as placed.
    Note(usize),
    /// It suspends the origin to release a region.
    Suspend(usize),
    /// The region bypasses the snapshot, and the origin is resumed.
    Release(usize),
    /// It reads the list of exceptions.
    List,
    /// It applies a chunk's original to the secondary.
    Overlay(usize),
    /// It has applied all of them.
    AllLaid,
    /// It checks the snapshot, and names the copy or ends with an error.
    Finish,
    /// It dies; the writes to the secondary of the chunks with a set bit are in flight.
    Die(u8),
    /// The watchdog resumes what the dead process has suspended.
    Watchdog,
    /// A write of a dead process to the secondary lands.
    Land(usize),
    /// Another process resumes the copy.
    Resume,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

/// The protocol, with at most one rule broken.
#[derive(Clone, Copy, Debug)]
pub struct Protocol {
    /// The rule that this variant breaks.
    pub broken: Option<Rule>,
    /// Chunks that were free at the instant: not copied, not preserved.
    pub free: [bool; CHUNKS],
}

impl Protocol {
    fn keeps(&self, rule: Rule) -> bool {
        self.broken != Some(rule)
    }

    /// The world at the instant.
    pub fn start(&self) -> World {
        let chunk = |at: usize| Chunk {
            origin: Content::Instant,
            exception: Exception::None,
            waiting: 0,
            in_flight: 0,
            segment: if self.free[at] { Segment::Noted } else { Segment::Unread },
            secondary: Content::Junk,
            under_way: None,
        };
        World {
            chunks: std::array::from_fn(chunk),
            released: [false; REGIONS],
            suspension: Suspension::None,
            is_valid: true,
            phase: Phase::Data,
            writes_left: WRITES,
            deaths_left: 1,
            losses_left: 1,
        }
    }

    /// Whether writes to a chunk bypass the snapshot.
    fn leads_past(&self, world: &World, at: usize) -> bool {
        let taken_for_free = at == 0 && !self.keeps(Rule::FreeIsFree);
        self.free[at] || taken_for_free || world.released[REGION[at]]
    }

    /// Every possible next step, and its result.
    pub fn steps(&self, world: &World, found: &mut Vec<(Step, World)>) {
        match world.phase {
            // Final: later writes do not affect the copy.
            Phase::Named | Phase::Refused => return,
            Phase::Data => self.copying(world, found),
            Phase::Originals(left) => self.laying(world, left, found),
            Phase::LastLook => {
                let phase = if world.is_valid || !self.keeps(Rule::ValidAtTheEnd) {
                    Phase::Named
                } else {
                    Phase::Refused
                };
                found.push((Step::Finish, World { phase, ..*world }));
            }
            Phase::Dead => self.dead(world, found),
        }
        self.application_and_kernel(world, found);
        world.landings(found);
        if world.phase != Phase::Dead {
            self.dying(world, found);
        }
    }

    fn application_and_kernel(&self, world: &World, found: &mut Vec<(Step, World)>) {
        for at in 0..CHUNKS {
            let chunk = world.chunks[at];
            let mut push = |step, change: &dyn Fn(&mut World)| {
                let mut next = *world;
                change(&mut next);
                found.push((step, next));
            };
            if world.writes_left > 0 && world.suspension == Suspension::None {
                push(Step::Write(at), &|next| {
                    next.writes_left -= 1;
                    self.map(next, at);
                });
            }
            if chunk.exception == Exception::Pending {
                push(Step::Store(at), &|next| next.chunks[at].exception = Exception::Stored(chunk.origin));
            }
            match chunk.exception {
                Exception::Stored(content) => push(Step::Commit(at), &|next| next.commit(at, content)),
                Exception::Pending if !self.keeps(Rule::OriginalBeforeException) => {
                    push(Step::Commit(at), &|next| next.commit(at, Content::Junk));
                }
                _ => {}
            }
            if chunk.in_flight > 0 {
                push(Step::Reach(at), &|next| {
                    next.chunks[at].in_flight -= 1;
                    next.chunks[at].origin = Content::Newer;
                });
            }
        }
        if world.losses_left > 0 && world.is_valid {
            let mut next = World { is_valid: false, losses_left: world.losses_left - 1, ..*world };
            for chunk in &mut next.chunks {
                if matches!(chunk.exception, Exception::Pending | Exception::Stored(_)) {
                    chunk.exception = Exception::None;
                }
                chunk.in_flight += std::mem::take(&mut chunk.waiting);
            }
            found.push((Step::Lose, next));
        }
    }

    /// Maps a write when it is issued.
    fn map(&self, world: &mut World, at: usize) {
        let past = self.leads_past(world, at) || !world.is_valid;
        let chunk = &mut world.chunks[at];
        if past || matches!(chunk.exception, Exception::Committed(_)) {
            chunk.in_flight += 1;
            return;
        }
        if chunk.exception == Exception::None {
            chunk.exception = Exception::Pending;
        }
        if self.keeps(Rule::PreservedFirst) { chunk.waiting += 1 } else { chunk.in_flight += 1 }
    }

    fn copying(&self, world: &World, found: &mut Vec<(Step, World)>) {
        if let Suspension::For(region) = world.suspension {
            let idle = world.chunks.iter().all(|chunk| chunk.waiting == 0 && chunk.in_flight == 0);
            if idle || !self.keeps(Rule::Drained) {
                let mut next = World { suspension: Suspension::None, ..*world };
                next.released[usize::from(region)] = true;
                found.push((Step::Release(region.into()), next));
            }
        }
        for at in 0..CHUNKS {
            let mut push = |step, segment, secondary| {
                let mut next = *world;
                next.chunks[at].segment = segment;
                next.chunks[at].secondary = secondary;
                found.push((step, next));
            };
            let chunk = world.chunks[at];
            match chunk.segment {
                Segment::Unread => push(Step::Read(at), Segment::Read(chunk.origin), chunk.secondary),
                Segment::Read(content) => push(Step::Place(at), Segment::Written, content),
                Segment::Written => push(Step::Note(at), Segment::Noted, chunk.secondary),
                Segment::Noted => {}
            }
            // A segment that is noted too early is still written in the end, unless the process dies first.
            if let (Segment::Read(content), false) = (chunk.segment, self.keeps(Rule::NotedAfterWritten)) {
                let mut next = *world;
                next.chunks[at].segment = Segment::Noted;
                next.chunks[at].under_way = Some(content);
                found.push((Step::Note(at), next));
            }
        }
        if world.suspension == Suspension::None {
            for region in 0..REGIONS {
                if !world.released[region] && self.may_release(world, region) {
                    let number = u8::try_from(region).expect("there are two regions");
                    found.push((
                        Step::Suspend(region),
                        World { suspension: Suspension::For(number), ..*world },
                    ));
                }
            }
            let noted_early = !self.keeps(Rule::NotedAfterWritten);
            let is_there = |chunk: &Chunk| {
                chunk.segment == Segment::Noted && (chunk.under_way.is_none() || !noted_early)
            };
            if world.chunks.iter().all(is_there) || !self.keeps(Rule::OriginalsAfterReads) {
                found.push((Step::List, world.listed(self)));
            }
        }
    }

    fn may_release(&self, world: &World, region: usize) -> bool {
        let mut chunks = (0..CHUNKS).filter(|at| REGION[*at] == region).map(|at| world.chunks[at].segment);
        if !self.keeps(Rule::ReleasedAfterRead) {
            return true;
        }
        if !self.keeps(Rule::ReleasedAfterNote) {
            return chunks.all(|segment| segment != Segment::Unread);
        }
        chunks.all(|segment| segment == Segment::Noted)
    }

    fn laying(&self, world: &World, left: [bool; CHUNKS], found: &mut Vec<(Step, World)>) {
        // If originals are read too early, segments are still being copied.
        if !self.keeps(Rule::OriginalsAfterReads) {
            let begin = found.len();
            self.copying(world, found);
            let copies = |step: &Step| matches!(step, Step::Read(_) | Step::Place(_) | Step::Note(_));
            let kept: Vec<_> = found.drain(begin..).filter(|(step, _)| copies(step)).collect();
            found.extend(kept);
        }
        for at in (0..CHUNKS).filter(|at| left[*at]) {
            let Exception::Committed(content) = world.chunks[at].exception else {
                // The store was lost, so this original cannot be read.
                continue;
            };
            let mut next = *world;
            let mut left = left;
            left[at] = false;
            next.chunks[at].secondary = content;
            next.phase = Phase::Originals(left);
            found.push((Step::Overlay(at), next));
        }
        let all_noted = world.chunks.iter().all(|chunk| chunk.segment == Segment::Noted);
        let all_laid = left.iter().all(|left| !left) || !self.keeps(Rule::AllOriginals);
        if all_noted && all_laid {
            found.push((Step::AllLaid, World { phase: Phase::LastLook, ..*world }));
        }
    }

    fn dying(&self, world: &World, found: &mut Vec<(Step, World)>) {
        if world.deaths_left == 0 {
            return;
        }
        let read = |at: &usize| matches!(world.chunks[*at].segment, Segment::Read(_));
        let candidates: Vec<usize> = (0..CHUNKS).filter(read).collect();
        for mask in 0..1u8 << candidates.len() {
            let mut next = World { phase: Phase::Dead, deaths_left: world.deaths_left - 1, ..*world };
            for chunk in &mut next.chunks {
                // If the note came first, a write that was not issued before the death never lands.
                if !self.keeps(Rule::NotedAfterWritten) {
                    chunk.under_way = None;
                }
            }
            for (bit, &at) in candidates.iter().enumerate() {
                if let Segment::Read(content) = world.chunks[at].segment
                    && mask & (1 << bit) != 0
                {
                    next.chunks[at].under_way = Some(content);
                }
            }
            for at in 0..CHUNKS {
                let chunk = &mut next.chunks[at];
                let kept =
                    chunk.segment == Segment::Noted && (self.keeps(Rule::NotedIsKept) || self.free[at]);
                if !kept {
                    chunk.segment = Segment::Unread;
                }
            }
            found.push((Step::Die(mask), next));
        }
    }

    fn dead(&self, world: &World, found: &mut Vec<(Step, World)>) {
        if world.suspension != Suspension::None && self.keeps(Rule::WatchdogResumes) {
            found.push((Step::Watchdog, World { suspension: Suspension::None, ..*world }));
        }
        let quiet = world.chunks.iter().all(|chunk| chunk.under_way.is_none());
        if world.suspension == Suspension::None && (quiet || !self.keeps(Rule::NothingUnderWay)) {
            let phase =
                if world.is_valid || !self.keeps(Rule::ValidOnResume) { Phase::Data } else { Phase::Refused };
            let released = if self.keeps(Rule::ReleasedForGood) { world.released } else { [false; REGIONS] };
            found.push((Step::Resume, World { phase, released, ..*world }));
        }
    }
}

impl Content {
    fn code(self) -> u64 {
        match self {
            Content::Instant => 0,
            Content::Newer => 1,
            Content::Junk => 2,
        }
    }
}

impl Chunk {
    /// A number below 18,432.
    fn code(&self) -> u64 {
        let exception = match self.exception {
            Exception::None => 0,
            Exception::Pending => 1,
            Exception::Stored(content) => 2 + content.code(),
            Exception::Committed(content) => 5 + content.code(),
        };
        let segment = match self.segment {
            Segment::Unread => 0,
            Segment::Written => 1,
            Segment::Noted => 2,
            Segment::Read(content) => 3 + content.code(),
        };
        let under_way = self.under_way.map_or(0, |content| 1 + content.code());
        let fields = [
            (self.origin.code(), 2),
            (exception, 8),
            (self.waiting.into(), 4),
            (self.in_flight.into(), 4),
            (segment, 6),
            (self.secondary.code(), 3),
            (under_way, 4),
        ];
        pack(&fields)
    }
}

/// Packs several numbers, each below its bound, into one.
fn pack(fields: &[(u64, u64)]) -> u64 {
    fields.iter().fold(0, |code, &(value, bound)| {
        assert!(value < bound, "{fields:?}");
        code * bound + value
    })
}

impl World {
    /// A unique number for every world that is not final.
    pub fn code(&self) -> u64 {
        let phase = match self.phase {
            Phase::Data => 0,
            Phase::LastLook => 1,
            Phase::Dead => 2,
            Phase::Named => 3,
            Phase::Refused => 4,
            Phase::Originals(left) => 5 + pack(&left.map(|left| (u64::from(left), 2))),
        };
        let suspension = match self.suspension {
            Suspension::None => 0,
            Suspension::For(region) => 1 + u64::from(region),
        };
        let [one, two, three] = self.chunks.map(|chunk| chunk.code());
        // A chunk has 2 x 8 x 4 x 4 x 6 x 3 x 4 = 18,432 values.
        pack(&[
            (one, 18_432),
            (two, 18_432),
            (three, 18_432),
            (self.released[0].into(), 2),
            (self.released[1].into(), 2),
            (suspension, 3),
            (self.is_valid.into(), 2),
            (phase, 13),
            (self.writes_left.into(), 4),
            (self.deaths_left.into(), 2),
            (self.losses_left.into(), 2),
        ])
    }

    fn commit(&mut self, at: usize, content: Content) {
        let chunk = &mut self.chunks[at];
        chunk.exception = Exception::Committed(content);
        chunk.in_flight += std::mem::take(&mut chunk.waiting);
    }

    fn listed(&self, protocol: &Protocol) -> World {
        let is_listed = |at: usize| {
            // The broken rule: after a death, originals are not applied again.
            let forgotten = !protocol.keeps(Rule::OriginalsAnew) && self.deaths_left == 0;
            matches!(self.chunks[at].exception, Exception::Committed(_)) && !forgotten
        };
        World { phase: Phase::Originals(std::array::from_fn(is_listed)), ..*self }
    }

    /// Writes of a dead process that land, independent of other steps.
    fn landings(&self, found: &mut Vec<(Step, World)>) {
        for at in 0..CHUNKS {
            if let Some(content) = self.chunks[at].under_way {
                let mut next = *self;
                next.chunks[at].under_way = None;
                next.chunks[at].secondary = content;
                found.push((Step::Land(at), next));
            }
        }
    }

    /// The phase of the copy.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Whether the secondary equals the instant wherever space was in use.
    pub fn is_exact(&self, protocol: &Protocol) -> bool {
        (0..CHUNKS).all(|at| protocol.free[at] || self.chunks[at].secondary == Content::Instant)
    }

    /// Whether the copy needed an original: otherwise it proves nothing.
    pub fn has_originals(&self) -> bool {
        self.chunks.iter().any(|chunk| matches!(chunk.exception, Exception::Committed(_)))
    }

    /// Whether the process died and the copy was resumed.
    pub fn was_resumed(&self) -> bool {
        self.deaths_left == 0
    }
}
