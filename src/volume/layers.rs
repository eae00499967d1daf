//! Finds the devices that are stacked on an origin, and the bytes of it that they cover. Anything that covers a
//! byte may need it.
//!
//! Each device has claims on its bytes: those of the devices above it. A claim by `linear` lines is as
//! precise as these lines. Anything else (another target, a device that is not device-mapper's, a loop
//! device) claims every byte that it can reach, and never reports a byte as free. Invariants of
//! [`Layers::free`]:
//! - A byte of a device is free if at least one of its claims reports it as free and no claim that covers it
//!   reports otherwise. The filesystem on a device claims all of it.
//! - A byte without a claim is not free: it may be anything (swap, a partition table, LVM metadata).
//! - A byte is not free if its claim was not understood, or is beyond a limit.

use std::collections::BTreeMap;

use crate::base::{Bytes, DeviceNumber};
use crate::dm::{Table, Target};
use crate::extent::{Extent, ExtentSet};
use crate::topology::LoopOver;

/// Most devices examined; the others are not free.
const DEVICES_MAX: usize = 1024;
/// Highest stack of devices.
const DEPTH_MAX: usize = 64;

/// The state of a device-mapper device.
#[derive(Clone, Debug)]
pub(super) struct MappedDevice {
    pub(super) table: Table,
    /// True if it has an inactive table: its mapping is about to change.
    pub(super) is_changing: bool,
}

/// The source of the facts: the kernel, or a test.
pub(super) trait View {
    /// None if it is not a device-mapper device, has no table, or cannot be examined.
    fn device_mapper(&self, device: DeviceNumber) -> Option<MappedDevice>;
    /// The devices that hold `device`, including its partitions.
    fn holders(&self, device: DeviceNumber) -> Vec<DeviceNumber>;
    fn loops(&self, device: DeviceNumber) -> Vec<LoopOver>;
    /// For notes.
    fn name(&self, device: DeviceNumber) -> String;
}

/// A use of a range of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Claim {
    /// `device` maps `on`, starting at its byte `at`.
    Through { device: DeviceNumber, on: Extent, at: Bytes },
    /// All of `on` is needed.
    All { on: Extent, owner: String },
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Layer {
    length: Bytes,
    claims: Vec<Claim>,
}

/// All devices above an origin. Equal values give the same result for every byte.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Layers {
    origin: DeviceNumber,
    devices: BTreeMap<DeviceNumber, Layer>,
}

impl Layers {
    /// Examines everything above `origin`.
    pub(super) fn observe(origin: DeviceNumber, view: &dyn View) -> Self {
        let mut devices = BTreeMap::new();
        let mut open = vec![origin];
        while let Some(device) = open.pop() {
            if devices.contains_key(&device) || devices.len() >= DEVICES_MAX {
                continue;
            }
            // The inactive table of the origin itself is ours, and does not count.
            let Some(seen) = view.device_mapper(device) else { continue };
            let layer = observe_layer(device, seen.table.length().bytes(), view);
            open.extend(layer.claims.iter().filter_map(|claim| match claim {
                Claim::Through { device, .. } => Some(*device),
                Claim::All { .. } => None,
            }));
            devices.insert(device, layer);
        }
        Self { origin, devices }
    }

    /// True if `device` is the origin, or maps to it by `linear` lines alone.
    pub(super) fn contains(&self, device: DeviceNumber) -> bool {
        self.devices.contains_key(&device)
    }

    /// The users that claim everything, as text.
    pub(super) fn objections(&self) -> Vec<String> {
        let claims = self.devices.values().flat_map(|layer| &layer.claims);
        let owners = claims.filter_map(|claim| match claim {
            Claim::All { owner, .. } => Some(format!("{owner}: that range is copied whole")),
            Claim::Through { .. } => None,
        });
        owners.collect()
    }

    /// The free bytes of the origin. `reported` holds what the filesystem on each device reports as free.
    pub(super) fn free(&self, reported: &BTreeMap<DeviceNumber, ExtentSet>) -> ExtentSet {
        let mut known = BTreeMap::new();
        self.find(self.origin, reported, &mut known, 0);
        known.remove(&self.origin).unwrap_or_default()
    }

    /// Computes what is free on `device`, and on everything above it, into `known`.
    fn find(
        &self,
        device: DeviceNumber,
        reported: &BTreeMap<DeviceNumber, ExtentSet>,
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
        if let Some(reported) = reported.get(&device) {
            add(whole, reported.intersection_with(whole).collect());
        }
        for claim in &layer.claims {
            match claim {
                Claim::Through { device: above, on, at } => {
                    self.find(*above, reported, known, depth + 1);
                    add(*on, known.get(above).map(|free| map_down(free, *on, *at)).unwrap_or_default());
                }
                Claim::All { on, .. } => add(*on, ExtentSet::new()),
            }
        }
        let free = free.difference(&needed);
        known.insert(device, free.intersection_with(whole).collect());
    }
}

/// The part of `free`, from `at` on, that maps to `on`, in bytes of the device below.
fn map_down(free: &ExtentSet, on: Extent, at: Bytes) -> ExtentSet {
    let Some(above) = Extent::with_length(at, on.length()) else { return ExtentSet::new() };
    let parts = free.intersection_with(above);
    parts.filter_map(|part| Extent::with_length(on.start() + (part.start() - at), part.length())).collect()
}

fn observe_layer(device: DeviceNumber, length: Bytes, view: &dyn View) -> Layer {
    let mut claims = Vec::new();
    let Some(whole) = Extent::new(Bytes::ZERO, length) else { return Layer { length, claims } };
    let name = view.name(device);
    for holder in view.holders(device) {
        match view.device_mapper(holder) {
            Some(seen) => match through(device, holder, &seen) {
                Ok(found) => claims.extend(found),
                Err(how) => {
                    let owner = format!("{} uses {name} through {how}", view.name(holder));
                    claims.push(Claim::All { on: whole, owner });
                }
            },
            None => {
                claims.push(Claim::All { on: whole, owner: format!("{} is on {name}", view.name(holder)) })
            }
        }
    }
    for over in view.loops(device) {
        let end = over.length.and_then(|length| over.offset.checked_add(length));
        if let Some(on) = Extent::new(over.offset.min(length), end.map_or(length, |end| end.min(length))) {
            claims.push(Claim::All { on, owner: format!("{} is on {name}", view.name(over.device)) });
        }
    }
    Layer { length, claims }
}

/// The lines by which `holder` maps to `device`. An error names what is not linear.
fn through(device: DeviceNumber, holder: DeviceNumber, seen: &MappedDevice) -> Result<Vec<Claim>, String> {
    if seen.is_changing {
        return Err("a table that is being replaced".to_owned());
    }
    let mut claims = Vec::new();
    for line in seen.table.lines().iter().filter(|line| line.target.devices().contains(&device)) {
        let Target::Linear { offset, .. } = line.target else {
            return Err(format!("a '{}' target", line.target.kind()));
        };
        let on = offset.checked_bytes().and_then(|start| Extent::with_length(start, line.length.bytes()));
        let on = on.ok_or_else(|| "a line past the end of every device".to_owned())?;
        claims.push(Claim::Through { device: holder, on, at: line.start.bytes() });
    }
    // Its table does not show why it holds the device: a metadata device, or a table that is not active yet.
    if claims.is_empty() { Err("something that is not in its table".to_owned()) } else { Ok(claims) }
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

    /// Devices by their tables. `other_holders` are (holder, held) pairs of devices that are not
    /// device-mapper's.
    #[derive(Debug, Default)]
    struct Machine {
        tables: BTreeMap<DeviceNumber, Table>,
        changing: BTreeSet<DeviceNumber>,
        other_holders: Vec<(DeviceNumber, DeviceNumber)>,
        loops: Vec<(DeviceNumber, LoopOver)>,
    }

    impl View for Machine {
        fn device_mapper(&self, device: DeviceNumber) -> Option<MappedDevice> {
            let seen = |table: &Table| MappedDevice {
                table: table.clone(),
                is_changing: self.changing.contains(&device),
            };
            self.tables.get(&device).map(seen)
        }
        fn holders(&self, device: DeviceNumber) -> Vec<DeviceNumber> {
            let by_table =
                self.tables.iter().filter(|(_, table)| table.maps_to(device)).map(|(holder, _)| *holder);
            let other_holders =
                self.other_holders.iter().filter(|(_, on)| *on == device).map(|(holder, _)| *holder);
            by_table.chain(other_holders).collect()
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

        /// The free sectors of the origin, as ranges.
        fn free(&self, reported: &[(u32, u64, u64)]) -> Vec<(u64, u64)> {
            let mut sets: BTreeMap<DeviceNumber, ExtentSet> = BTreeMap::new();
            for (minor, start, end) in reported {
                let extent = Extent::new(Bytes(start * SECTOR_BYTES), Bytes(end * SECTOR_BYTES)).unwrap();
                sets.entry(dev(*minor)).or_default().insert(extent);
            }
            let free = Layers::observe(ORIGIN, self).free(&sets);
            free.iter().map(|it| (it.start().get() / SECTOR_BYTES, it.end().get() / SECTOR_BYTES)).collect()
        }

        /// The oracle, for one sector: None if nothing claims it.
        fn oracle(
            &self,
            device: DeviceNumber,
            sector: u64,
            reported: &BTreeMap<DeviceNumber, BTreeSet<u64>>,
        ) -> Option<bool> {
            let table = &self.tables[&device];
            if sector >= table.length().get() {
                return Some(false);
            }
            let mut votes: Vec<bool> =
                reported.get(&device).map(|free| free.contains(&sector)).into_iter().collect();
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
                        votes.push(self.oracle(*holder, above, reported).unwrap_or(false));
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
        fn a_sector_is_free_if_every_layer_that_covers_it_reports_so(
            machine in machines(),
            reported in prop::collection::vec((0u32..7, 0u64..70, 1u64..70), 0..10),
        ) {
            let mut sectors: BTreeMap<DeviceNumber, BTreeSet<u64>> = BTreeMap::new();
            for (minor, start, length) in &reported {
                sectors.entry(dev(*minor)).or_default().extend(*start..start + length);
            }
            let reported: Vec<(u32, u64, u64)> = reported.iter().map(|(minor, start, length)| (*minor, *start, start + length)).collect();
            let free = machine.free(&reported);
            for sector in 0..80 {
                let is_free = free.iter().any(|(start, end)| (*start..*end).contains(&sector));
                prop_assert_eq!(is_free, machine.oracle(ORIGIN, sector, &sectors) == Some(true), "sector {}", sector);
            }
        }
    }

    #[test]
    fn a_filesystem_on_the_origin_alone_decides() {
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
        // Everything in both, except the gaps; the middle of the second one is on another disk.
        assert_eq!(machine.free(&[(1, 0, 40), (2, 0, 45)]), [(2, 42), (50, 60), (90, 95)]);
        // One of them is unmounted, or swap.
        assert_eq!(machine.free(&[(2, 0, 45)]), [(50, 60), (90, 95)]);
    }

    #[test]
    fn a_range_covered_twice_is_free_if_both_report_it_free() {
        let machine = Machine::new(&[
            (0, "0 100 linear 8:0 0"),
            (1, "0 50 linear 253:0 0"),
            (2, "0 50 linear 253:0 25"),
        ]);
        assert_eq!(machine.free(&[(1, 0, 50)]), [(0, 25)], "the other reports nothing");
        assert_eq!(machine.free(&[(1, 0, 50), (2, 0, 10)]), [(0, 35)]);
    }

    #[test]
    fn an_unknown_user_needs_all_that_it_can_reach() {
        let stack = [(0, "0 100 linear 8:0 0"), (1, "0 50 linear 253:0 0"), (2, "0 50 linear 253:0 50")];
        let reported = [(1, 0, 50), (2, 0, 50)];
        assert_eq!(Machine::new(&stack).free(&reported), [(0, 100)]);
        let with = |more: &[(u32, &str)]| Machine::new(&[&stack[..], more].concat());
        assert_eq!(
            with(&[(3, "0 8 crypt aes 00 0 253:1 0")]).free(&reported),
            [(50, 100)],
            "a crypt over one"
        );
        assert_eq!(with(&[(3, "0 8 striped 1 8 253:0 90")]).free(&reported), []);
        let mut machine = Machine::new(&stack);
        machine.other_holders.push((DeviceNumber { major: 9, minor: 0 }, dev(2)));
        assert_eq!(machine.free(&reported), [(0, 50)], "md over one");
        let mut machine = Machine::new(&stack);
        machine.changing.insert(dev(1));
        assert_eq!(machine.free(&reported), [], "its next mapping is not known");
        let mut machine = Machine::new(&stack);
        machine.changing.insert(dev(0));
        assert_eq!(machine.free(&reported), [(0, 100)], "the inactive table of the origin is ours");
        let mut machine = Machine::new(&stack);
        let sector = |sectors: u64| Bytes(sectors * SECTOR_BYTES);
        machine
            .loops
            .push((ORIGIN, LoopOver { device: dev(9), offset: sector(20), length: Some(sector(10)) }));
        assert_eq!(machine.free(&reported), [(0, 20), (30, 100)], "a loop device over a part");
        machine.loops[0].1.length = None;
        assert_eq!(machine.free(&reported), [(0, 20)], "or over the rest");
        let layers = Layers::observe(ORIGIN, &machine);
        assert_eq!(layers.objections(), ["dm-9 is on dm-0: that range is copied whole"]);
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
