//! Decides whether a place may wait for an origin: by the [`graph`] of this machine, with the edges that only
//! device-mapper tables show.
//!
//! A write through a `snapshot-origin` waits for the store of every snapshot of that device, LVM's as well as
//! ours: the kernel finds the snapshots by the device below, and sysfs shows no such edge. Inactive tables
//! count too.
//!
//! A view of one moment; a process that changes what it shows holds the host's admission lock meanwhile.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use crate::base::{DeviceNumber, Error, Result};
use crate::dm::{Dm, Slot, Target};
use crate::topology::graph::{self, Answer, Node};
use crate::topology::{Observer, Topology};

/// The dependencies of this machine at one moment: to be queried, then dropped.
#[derive(Debug)]
pub struct WaitGraph {
    observer: Observer,
    /// What a device waits for in addition to what sysfs shows.
    stores: BTreeMap<DeviceNumber, BTreeSet<Node>>,
    /// Nodes that were queried before.
    known: RefCell<BTreeMap<Node, BTreeSet<Node>>>,
}

impl WaitGraph {
    /// Reads mounts and tables.
    ///
    /// # Errors
    /// I/O errors of reading mountinfo; the kernel's.
    pub fn observe(dm: &Dm) -> Result<Self> {
        let observer = Observer::new(Topology::default())?;
        Ok(Self { observer, stores: stores(&targets(dm)?), known: RefCell::default() })
    }

    /// The node of `path`.
    ///
    /// # Errors
    /// I/O errors of the lookup.
    pub fn at(&self, path: &Path) -> Result<Node> {
        self.observer.at(path)
    }

    /// May `from` wait for `origin`? Nodes in `excluded` are not followed.
    #[must_use]
    pub fn may_wait(&self, from: &Node, origin: DeviceNumber, excluded: &[Node]) -> Answer {
        let mut waits_for = |node: &Node| {
            let mut known = self.known.borrow_mut();
            known.entry(node.clone()).or_insert_with(|| self.waits_for(node)).clone()
        };
        graph::may_wait(from, &Node::Device(origin), excluded, &mut waits_for)
    }

    fn waits_for(&self, node: &Node) -> BTreeSet<Node> {
        let mut found = self.observer.waits_for(node);
        if let Node::Device(device) = node
            && let Some(stores) = self.stores.get(device)
        {
            found.extend(stores.iter().cloned());
        }
        found
    }

    /// A path as text.
    #[must_use]
    pub fn describe(&self, path: &[Node]) -> String {
        let words: Vec<String> = path.iter().map(|node| self.observer.describe(node)).collect();
        words.join(" -> ")
    }
}

/// Each device with the targets of its tables; None if a table cannot be read.
type Targets = Vec<(DeviceNumber, Option<Vec<Target>>)>;

fn targets(dm: &Dm) -> Result<Targets> {
    let mut found = Vec::new();
    for (name, number) in dm.list()? {
        let mut targets = Some(Vec::new());
        for slot in [Slot::Active, Slot::Inactive] {
            match dm.table(&name, slot) {
                Ok(table) => {
                    let lines = table.iter().flat_map(|table| table.lines()).map(|line| line.target.clone());
                    targets.iter_mut().for_each(|targets| targets.extend(lines.clone()));
                }
                // Removed meanwhile, so it waits for nothing.
                Err(_) if dm.info(&name)?.is_none_or(|info| info.number != number) => {}
                Err(_) => targets = None,
            }
        }
        found.push((number, targets));
    }
    Ok(found)
}

fn stores(targets: &Targets) -> BTreeMap<DeviceNumber, BTreeSet<Node>> {
    let all = || {
        let lines = targets.iter().filter_map(|(device, lines)| Some((*device, lines.as_ref()?)));
        lines.flat_map(|(device, lines)| lines.iter().map(move |target| (device, target)))
    };
    let snapshots: Vec<(DeviceNumber, DeviceNumber, DeviceNumber)> = all()
        .filter_map(|(device, target)| snapshot(target).map(|(of, store)| (of, device, store)))
        .collect();
    let mut found: BTreeMap<DeviceNumber, BTreeSet<Node>> = BTreeMap::new();
    for (device, target) in all() {
        // A snapshot that is being merged writes to its origin, and acts as the origin's target.
        let of = match target {
            Target::SnapshotOrigin { device } => Some(*device),
            Target::Other { kind, .. } if kind == "snapshot-merge" => snapshot(target).map(|(of, _)| of),
            _ => None,
        };
        for (_, snapshot, store) in snapshots.iter().filter(|(on, _, _)| Some(*on) == of) {
            found.entry(device).or_default().extend([Node::Device(*snapshot), Node::Device(*store)]);
        }
    }
    for (device, _) in targets.iter().filter(|(_, lines)| lines.is_none()) {
        let why = Node::Unknown(format!("device-mapper device {device}, whose table cannot be read"));
        found.entry(*device).or_default().insert(why);
    }
    found
}

/// The device that a target is a snapshot of, and its store.
fn snapshot(target: &Target) -> Option<(DeviceNumber, DeviceNumber)> {
    match target {
        Target::Snapshot { origin, cow, .. } => Some((*origin, *cow)),
        Target::Other { kind, .. } if kind == "snapshot-merge" => match target.devices()[..] {
            [origin, store, ..] => Some((origin, store)),
            _ => None,
        },
        _ => None,
    }
}

/// The refusal of `what`, whose I/O must not wait for the origin; None if the answer is no. `other_machines`:
/// it may wait for other machines.
#[must_use]
pub fn refusal(waits: &WaitGraph, what: &str, answer: &Answer, other_machines: bool) -> Option<Error> {
    let (message, path) = match answer {
        Answer::No => return None,
        Answer::Network(_) if other_machines => return None,
        Answer::Yes(path) => (format!("{what} would wait for the origin itself"), path),
        Answer::Unknown(path) => {
            (format!("whether {what} would wait for the origin itself cannot be determined"), path)
        }
        Answer::Network(path) => {
            (format!("{what} would be on another machine, and writes to the origin would wait for it"), path)
        }
    };
    Some(Error::refused(format!("{message}: {}", waits.describe(path))).state("nothing was changed"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn dev(minor: u32) -> DeviceNumber {
        DeviceNumber { major: 253, minor }
    }

    fn edges(tables: &[(u32, &str, &str)]) -> BTreeMap<DeviceNumber, BTreeSet<Node>> {
        let targets = tables
            .iter()
            .map(|(minor, kind, text)| (dev(*minor), Some(vec![Target::parse(kind, text)])))
            .collect();
        stores(&targets)
    }

    #[test]
    fn an_origin_waits_for_the_stores_of_all_its_snapshots() {
        let device = |minor| Node::Device(dev(minor));
        let tables = [
            (0, "linear", "253:2 0"),
            (2, "snapshot-origin", "253:1"),
            (3, "snapshot", "253:1 253:4 P 8"),
            (5, "snapshot", "253:1 253:6 PO 8"),
            (7, "snapshot", "253:9 253:8 P 8"),
        ];
        let expected = BTreeSet::from([3, 4, 5, 6].map(device));
        assert_eq!(edges(&tables), BTreeMap::from([(dev(2), expected)]));
        let merging = [(2, "snapshot-merge", "253:1 253:4 P 8"), (5, "snapshot", "253:1 253:6 P 8")];
        assert_eq!(edges(&merging)[&dev(2)], BTreeSet::from([2, 4, 5, 6].map(device)));
    }

    #[test]
    fn an_unreadable_table_is_unknown() {
        let found = stores(&vec![(dev(0), None)]);
        assert!(matches!(found[&dev(0)].first(), Some(Node::Unknown(_))));
    }
}
