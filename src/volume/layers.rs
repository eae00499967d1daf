//! Who lies on an origin, and on what lies on it? Whoever covers a byte may need it.
//!
//! Each device of the picture has claims on its bytes: those of the devices above it. A claim of
//! `linear` lines is as precise as these; anybody else (another target, a device that is no
//! device-mapper device, a loop device) claims all that it can reach, and never says that a byte is
//! free. Invariants of [`Layers::free`]:
//! - a byte of a device is free where at least one of its claims says so and none that covers it says
//!   otherwise; the filesystem on the device is a claim to all of it;
//! - a byte that nobody claims is not free: it may be anything (swap, a partition table, LVM's own);
//! - what was not understood, or went over a limit, is not free.

use std::collections::BTreeMap;

use crate::base::{Bytes, DeviceNumber};
use crate::dm::{Table, Target};
use crate::extent::{Extent, ExtentSet};
use crate::topology::LoopOver;

/// Devices in the picture at most; what is not in it is not free.
const DEVICES_MAX: usize = 1024;
/// Devices on top of each other at most.
const DEPTH_MAX: usize = 64;

/// A device-mapper device, as seen.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    pub(super) table: Table,
    /// Another table waits to be used: what the device maps to is about to change.
    pub(super) is_changing: bool,
}

/// Where the facts come from: the kernel, or a test.
pub(super) trait View {
    /// None for what is no device-mapper device, has no table, or cannot be looked at.
    fn device_mapper(&self, device: DeviceNumber) -> Option<Seen>;
    /// Devices that hold `device`, partitions of it included.
    fn holders(&self, device: DeviceNumber) -> Vec<DeviceNumber>;
    fn loops(&self, device: DeviceNumber) -> Vec<LoopOver>;
    /// For notes.
    fn name(&self, device: DeviceNumber) -> String;
}

/// One user of a range of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Claim {
    /// `on` is what `device` shows from its byte `at` on.
    Through { device: DeviceNumber, on: Extent, at: Bytes },
    /// Needs all of `on`.
    All { on: Extent, who: String },
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Layer {
    length: Bytes,
    claims: Vec<Claim>,
}

/// The picture. Two that are equal say the same of every byte.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Layers {
    origin: DeviceNumber,
    devices: BTreeMap<DeviceNumber, Layer>,
}

impl Layers {
    /// Looks at everything above `origin`.
    pub(super) fn observe(origin: DeviceNumber, view: &dyn View) -> Self {
        let mut devices = BTreeMap::new();
        let mut open = vec![origin];
        while let Some(device) = open.pop() {
            if devices.contains_key(&device) || devices.len() >= DEVICES_MAX {
                continue;
            }
            // The origin's own next table is ours.
            let Some(seen) = view.device_mapper(device) else { continue };
            let layer = look_at(device, seen.table.length().bytes(), view);
            open.extend(layer.claims.iter().filter_map(|claim| match claim {
                Claim::Through { device, .. } => Some(*device),
                Claim::All { .. } => None,
            }));
            devices.insert(device, layer);
        }
        Self { origin, devices }
    }

    /// True where `device` is the origin, or maps to it by `linear` lines alone.
    pub(super) fn reach(&self, device: DeviceNumber) -> bool {
        self.devices.contains_key(&device)
    }

    /// Who claims all of something, in words.
    pub(super) fn objections(&self) -> Vec<String> {
        let claims = self.devices.values().flat_map(|layer| &layer.claims);
        let who = claims.filter_map(|claim| match claim {
            Claim::All { who, .. } => Some(format!("{who}: all of that is copied")),
            Claim::Through { .. } => None,
        });
        who.collect()
    }

    /// The free bytes of the origin, where the filesystem on a device says that `said` is free there.
    pub(super) fn free(&self, said: &BTreeMap<DeviceNumber, ExtentSet>) -> ExtentSet {
        let mut known = BTreeMap::new();
        self.find(self.origin, said, &mut known, 0);
        known.remove(&self.origin).unwrap_or_default()
    }

    /// Puts what is free on `device`, and on all above it, into `known`.
    fn find(
        &self,
        device: DeviceNumber,
        said: &BTreeMap<DeviceNumber, ExtentSet>,
        known: &mut BTreeMap<DeviceNumber, ExtentSet>,
        depth: usize,
    ) {
        let Some(layer) = self.devices.get(&device) else { return };
        let Some(whole) = Extent::new(Bytes::ZERO, layer.length) else { return };
        if known.contains_key(&device) || depth > DEPTH_MAX {
            return;
        }
        let (mut free, mut needed) = (ExtentSet::new(), ExtentSet::new());
        let mut add = |on: Extent, is_free: ExtentSet| {
            needed.extend(is_free.gaps_in(on));
            free.extend(is_free.iter());
        };
        if let Some(said) = said.get(&device) {
            add(whole, said.intersection_with(whole).collect());
        }
        for claim in &layer.claims {
            match claim {
                Claim::Through { device: above, on, at } => {
                    self.find(*above, said, known, depth + 1);
                    add(*on, known.get(above).map(|free| shown(free, *on, *at)).unwrap_or_default());
                }
                Claim::All { on, .. } => add(*on, ExtentSet::new()),
            }
        }
        let free = free.difference(&needed);
        known.insert(device, free.intersection_with(whole).collect());
    }
}

/// The part of `free` from `at` on that is shown in `on`, in bytes of the device below.
fn shown(free: &ExtentSet, on: Extent, at: Bytes) -> ExtentSet {
    let Some(above) = Extent::with_length(at, on.length()) else { return ExtentSet::new() };
    let parts = free.intersection_with(above);
    parts.filter_map(|part| Extent::with_length(on.start() + (part.start() - at), part.length())).collect()
}

fn look_at(device: DeviceNumber, length: Bytes, view: &dyn View) -> Layer {
    let mut claims = Vec::new();
    let Some(whole) = Extent::new(Bytes::ZERO, length) else { return Layer { length, claims } };
    let name = view.name(device);
    for holder in view.holders(device) {
        match view.device_mapper(holder) {
            Some(seen) => match through(device, holder, &seen) {
                Ok(found) => claims.extend(found),
                Err(how) => {
                    let who = format!("{} lies on {name} by {how}", view.name(holder));
                    claims.push(Claim::All { on: whole, who });
                }
            },
            None => claims.push(Claim::All { on: whole, who: format!("{} is on {name}", view.name(holder)) }),
        }
    }
    for over in view.loops(device) {
        let end = over.length.and_then(|length| over.offset.checked_add(length));
        if let Some(on) = Extent::new(over.offset.min(length), end.map_or(length, |end| end.min(length))) {
            claims.push(Claim::All { on, who: format!("{} is on {name}", view.name(over.device)) });
        }
    }
    Layer { length, claims }
}

/// The lines by which `holder` maps to `device`; what stands in the way where they are not all linear.
fn through(device: DeviceNumber, holder: DeviceNumber, seen: &Seen) -> Result<Vec<Claim>, String> {
    if seen.is_changing {
        return Err("a table that is being replaced".to_owned());
    }
    let mut claims = Vec::new();
    for line in seen.table.lines().iter().filter(|line| line.target.devices().contains(&device)) {
        let Target::Linear { offset, .. } = line.target else {
            return Err(format!("a '{}' target", line.target.kind()));
        };
        let on = offset.checked_bytes().and_then(|start| Extent::with_length(start, line.length.bytes()));
        let on = on.ok_or_else(|| "a line behind the end of every device".to_owned())?;
        claims.push(Claim::Through { device: holder, on, at: line.start.bytes() });
    }
    // It holds the device, but not by its table: a metadata device, or a table that is not in use yet.
    if claims.is_empty() { Err("something that its table does not show".to_owned()) } else { Ok(claims) }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::base::units::SECTOR_BYTES;

    const ORIGIN: DeviceNumber = dev(0);

    const fn dev(minor: u32) -> DeviceNumber {
        DeviceNumber { major: 253, minor }
    }

    /// Devices by their tables; who is no device-mapper device holds what `strangers` says.
    #[derive(Debug, Default)]
    struct Machine {
        tables: BTreeMap<DeviceNumber, Table>,
        changing: BTreeSet<DeviceNumber>,
        strangers: Vec<(DeviceNumber, DeviceNumber)>,
        loops: Vec<(DeviceNumber, LoopOver)>,
    }

    impl View for Machine {
        fn device_mapper(&self, device: DeviceNumber) -> Option<Seen> {
            let seen =
                |table: &Table| Seen { table: table.clone(), is_changing: self.changing.contains(&device) };
            self.tables.get(&device).map(seen)
        }
        fn holders(&self, device: DeviceNumber) -> Vec<DeviceNumber> {
            let by_table =
                self.tables.iter().filter(|(_, table)| table.maps_to(device)).map(|(holder, _)| *holder);
            let strangers = self.strangers.iter().filter(|(_, on)| *on == device).map(|(holder, _)| *holder);
            by_table.chain(strangers).collect()
        }
        fn loops(&self, device: DeviceNumber) -> Vec<LoopOver> {
            self.loops.iter().filter(|(on, _)| *on == device).map(|(_, over)| *over).collect()
        }
        fn name(&self, device: DeviceNumber) -> String {
            format!("dm-{}", device.minor)
        }
    }

    impl Machine {
        fn new(tables: &[(u32, &str)]) -> Self {
            let tables = tables.iter().map(|(minor, text)| (dev(*minor), text.parse().unwrap())).collect();
            Self { tables, ..Self::default() }
        }

        /// Free sectors of the origin, as ranges.
        fn free(&self, said: &[(u32, u64, u64)]) -> Vec<(u64, u64)> {
            let mut sets: BTreeMap<DeviceNumber, ExtentSet> = BTreeMap::new();
            for (minor, start, end) in said {
                let extent = Extent::new(Bytes(start * SECTOR_BYTES), Bytes(end * SECTOR_BYTES)).unwrap();
                sets.entry(dev(*minor)).or_default().insert(extent);
            }
            let free = Layers::observe(ORIGIN, self).free(&sets);
            free.iter().map(|it| (it.start().get() / SECTOR_BYTES, it.end().get() / SECTOR_BYTES)).collect()
        }

        /// The oracle, a sector at a time: None where nobody claims it.
        fn says(
            &self,
            device: DeviceNumber,
            sector: u64,
            said: &BTreeMap<DeviceNumber, BTreeSet<u64>>,
        ) -> Option<bool> {
            let table = &self.tables[&device];
            if sector >= table.length().get() {
                return Some(false);
            }
            let mut votes: Vec<bool> =
                said.get(&device).map(|free| free.contains(&sector)).into_iter().collect();
            for (holder, table) in self.tables.iter().filter(|(_, table)| table.maps_to(device)) {
                let whole_lines = table.lines().iter().filter(|line| line.target.devices().contains(&device));
                if whole_lines.clone().any(|line| !matches!(line.target, Target::Linear { .. })) {
                    votes.push(false);
                    continue;
                }
                for line in whole_lines {
                    let Target::Linear { offset, .. } = line.target else { unreachable!() };
                    if (offset.get()..offset.get() + line.length.get()).contains(&sector) {
                        let above = line.start.get() + sector - offset.get();
                        votes.push(self.says(*holder, above, said).unwrap_or(false));
                    }
                }
            }
            (!votes.is_empty()).then(|| votes.iter().all(|vote| *vote))
        }
    }

    /// A stack of devices over an origin of 64 sectors; each device maps to those before it.
    fn machines() -> impl Strategy<Value = Machine> {
        let line = (0u8..9, any::<prop::sample::Index>(), 0u64..60, 1u64..24);
        prop::collection::vec(prop::collection::vec(line, 1..4), 0..6).prop_map(|devices| {
            let mut machine = Machine::new(&[(0, "0 64 linear 8:0 0")]);
            for (at, lines) in devices.into_iter().enumerate() {
                let minor = u32::try_from(at).unwrap() + 1;
                let mut text = Vec::new();
                let mut start = 0;
                for (kind, below, offset, length) in lines {
                    let below = u32::try_from(below.index(at + 1)).unwrap();
                    text.push(match kind {
                        0 => format!("{start} {length} striped 1 8 253:{below} {offset}"),
                        1 => format!("{start} {length} linear 8:99 {offset}"),
                        _ => format!("{start} {length} linear 253:{below} {offset}"),
                    });
                    start += length;
                }
                machine.tables.insert(dev(minor), text.join("\n").parse().unwrap());
            }
            machine
        })
    }

    proptest! {
        #[test]
        fn a_sector_is_free_where_all_who_cover_it_say_so(
            machine in machines(),
            said in prop::collection::vec((0u32..7, 0u64..70, 1u64..70), 0..10),
        ) {
            let mut sectors: BTreeMap<DeviceNumber, BTreeSet<u64>> = BTreeMap::new();
            for (minor, start, length) in &said {
                sectors.entry(dev(*minor)).or_default().extend(*start..start + length);
            }
            let said: Vec<(u32, u64, u64)> = said.iter().map(|(minor, start, length)| (*minor, *start, start + length)).collect();
            let free = machine.free(&said);
            for sector in 0..80 {
                let is_free = free.iter().any(|(start, end)| (*start..*end).contains(&sector));
                prop_assert_eq!(is_free, machine.says(ORIGIN, sector, &sectors) == Some(true), "sector {}", sector);
            }
        }
    }

    #[test]
    fn a_filesystem_on_the_origin_says_it_alone() {
        let machine = Machine::new(&[(0, "0 100 linear 8:0 0")]);
        assert_eq!(machine.free(&[(0, 10, 20), (0, 90, 120)]), [(10, 20), (90, 100)]);
        assert_eq!(machine.free(&[]), []);
    }

    #[test]
    fn partitions_count_by_their_offset_and_the_rest_is_not_free() {
        let machine = Machine::new(&[
            (0, "0 100 linear 8:0 0"),
            (1, "0 40 linear 253:0 2"),
            (2, "0 10 linear 253:0 50\n10 30 linear 8:9 0\n40 5 linear 253:0 90"),
        ]);
        // All of both, which leaves the gaps; the second one's middle is on another disk.
        assert_eq!(machine.free(&[(1, 0, 40), (2, 0, 45)]), [(2, 42), (50, 60), (90, 95)]);
        // One is unmounted, or swap.
        assert_eq!(machine.free(&[(2, 0, 45)]), [(50, 60), (90, 95)]);
    }

    #[test]
    fn what_two_cover_is_free_where_both_say_so() {
        let machine = Machine::new(&[
            (0, "0 100 linear 8:0 0"),
            (1, "0 50 linear 253:0 0"),
            (2, "0 50 linear 253:0 25"),
        ]);
        assert_eq!(machine.free(&[(1, 0, 50)]), [(0, 25)], "the other says nothing");
        assert_eq!(machine.free(&[(1, 0, 50), (2, 0, 10)]), [(0, 35)]);
    }

    #[test]
    fn whoever_is_not_understood_needs_it_all() {
        let stack = [(0, "0 100 linear 8:0 0"), (1, "0 50 linear 253:0 0"), (2, "0 50 linear 253:0 50")];
        let said = [(1, 0, 50), (2, 0, 50)];
        assert_eq!(Machine::new(&stack).free(&said), [(0, 100)]);
        let with = |more: &[(u32, &str)]| Machine::new(&[&stack[..], more].concat());
        assert_eq!(with(&[(3, "0 8 crypt aes 00 0 253:1 0")]).free(&said), [(50, 100)], "a crypt over one");
        assert_eq!(with(&[(3, "0 8 striped 1 8 253:0 90")]).free(&said), []);
        let mut machine = Machine::new(&stack);
        machine.strangers.push((DeviceNumber { major: 9, minor: 0 }, dev(2)));
        assert_eq!(machine.free(&said), [(0, 50)], "md over one");
        let mut machine = Machine::new(&stack);
        machine.changing.insert(dev(1));
        assert_eq!(machine.free(&said), [], "where it will be in a moment is not known");
        let mut machine = Machine::new(&stack);
        machine.changing.insert(dev(0));
        assert_eq!(machine.free(&said), [(0, 100)], "the origin's next table is ours");
        let mut machine = Machine::new(&stack);
        let sector = |sectors: u64| Bytes(sectors * SECTOR_BYTES);
        machine
            .loops
            .push((ORIGIN, LoopOver { device: dev(9), offset: sector(20), length: Some(sector(10)) }));
        assert_eq!(machine.free(&said), [(0, 20), (30, 100)], "a loop device over a part");
        machine.loops[0].1.length = None;
        assert_eq!(machine.free(&said), [(0, 20)], "or over the rest");
        let layers = Layers::observe(ORIGIN, &machine);
        assert_eq!(layers.objections(), ["dm-9 is on dm-0: all of that is copied"]);
    }

    #[test]
    fn devices_without_number_or_in_a_circle_end() {
        let mut machine = Machine::new(&[
            (0, "0 100 linear 253:2 0"),
            (1, "0 100 linear 253:0 0"),
            (2, "0 100 linear 253:1 0"),
        ]);
        assert_eq!(machine.free(&[(2, 0, 100)]), []);
        machine = Machine::new(&[(0, "0 100 linear 8:0 0")]);
        for minor in 1..2000 {
            machine.tables.insert(dev(minor), format!("0 100 linear 253:{} 0", minor - 1).parse().unwrap());
        }
        assert_eq!(machine.free(&[(1999, 0, 100)]), []);
    }
}
