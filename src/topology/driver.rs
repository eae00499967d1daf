//! Does a block device end at a disk, or does its driver reach further than sysfs shows? By the driver, which
//! `/proc/devices` names by the major number.
//!
//! An allow-list: a driver counts as a disk's, or as one whose devices sysfs shows as slaves, because it is known to be.
//! Every other one may lead anywhere, to our origin too, as zvol, drbd, rnbd and ublk may, and is [`Node::Unknown`].
//! Some known drivers carry several ways (SCSI, NVMe, virtio); the device's place in sysfs tells which.
//!
//! An Unknown is one device, or the hardware that serves several: two disks of one controller end at the same
//! node. Devices that no hardware stands behind are never taken together.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use super::Topology;
use super::graph::Node;
use crate::base::DeviceNumber;

/// What a device's driver has beneath it, beside the slaves that sysfs shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Beneath {
    /// Nothing of this machine.
    Nothing,
    /// A file or device: loop devices.
    File,
    /// Memory.
    Memory,
    /// Memory, and a device that it writes back to: zram.
    MemoryAndDevice,
    /// These.
    Nodes(BTreeSet<Node>),
}

/// Disks, and drivers whose devices are all in `slaves`.
const LEAVES: [&str; 14] = [
    "sd",
    "sr",
    "virtblk",
    "xvd",
    "ubd",
    "mmc",
    "dasd",
    "scm",
    "ide",
    "mtip32xx",
    "device-mapper",
    "md",
    "mdp",
    "bcache",
];

/// Made of memory, which has to be found for a write.
const MEMORY: [&str; 2] = ["ramdisk", "nullb"];

/// Served by other machines.
const NETWORK: [&str; 3] = ["nbd", "rbd", "aoe"];

/// How the name of a directory on the way to a device begins where another machine serves it, by USB/IP.
const USB_IP_WAY: &str = "vhci_hcd";

/// The same where it is made by this machine, from anything: a target of the kernel's own, a gadget, a program.
const OWN_WAYS: [&str; 4] = ["tcm_loop", "scst_local", "dummy_hcd", "vduse"];

/// The block drivers of the kernel, by major number.
#[derive(Debug, Default)]
pub(super) struct Drivers(BTreeMap<u32, String>);

impl Drivers {
    /// As the kernel has them now; none where it does not say.
    pub(super) fn read(topology: &Topology) -> Self {
        let text = fs::read_to_string(topology.root.join("proc/devices")).unwrap_or_default();
        let lines = text.lines().skip_while(|line| *line != "Block devices:").skip(1);
        let driver = |line: &str| {
            let (major, name) = line.trim().split_once(' ')?;
            Some((major.parse().ok()?, name.trim().to_owned()))
        };
        Self(lines.filter_map(driver).collect())
    }

    /// What is beneath a device that is no partition.
    pub(super) fn beneath(&self, topology: &Topology, device: DeviceNumber) -> Beneath {
        let place = fs::canonicalize(topology.node(device)).unwrap_or_default();
        let steps: Vec<&str> = place.iter().filter_map(|step| step.to_str()).collect();
        let name = steps.last().copied().unwrap_or_default();
        let Some(driver) = self.0.get(&device.major) else {
            return unknown(topology, device, "whose driver /proc/devices does not tell");
        };
        // Some have a number for each device behind their name.
        let kind = driver.trim_end_matches(|c: char| c.is_ascii_digit());
        let is = |list: &[&str]| list.contains(&driver.as_str()) || list.contains(&kind);
        let leads_by = |way: &str| steps.iter().any(|step| step.starts_with(way));
        if let Some(way) = OWN_WAYS.into_iter().find(|way| leads_by(way)) {
            return unknown(topology, device, &format!("which this machine serves itself ({way})"));
        }
        if leads_by(USB_IP_WAY) {
            return network("USB/IP".to_owned());
        }
        match driver.as_str() {
            "loop" => Beneath::File,
            "zram" => Beneath::MemoryAndDevice,
            "sd" => session(&place).map_or(Beneath::Nothing, |session| network(iscsi(&session))),
            "blkext" if is_numbered(name, "nvme") => of_nvme(topology, device),
            "blkext" if is_numbered(name, "pmem") => Beneath::Nothing,
            _ if is(&MEMORY) => Beneath::Memory,
            _ if is(&NETWORK) => network(kind.to_owned()),
            _ if is(&LEAVES) => Beneath::Nothing,
            _ => {
                let why = format!("whose driver ({driver}) may use other devices of this machine");
                match hardware(&place) {
                    Some(place) => end(Node::Unknown(format!("the hardware at {}, {why}", place.display()))),
                    None => unknown(topology, device, &why),
                }
            }
        }
    }
}

fn end(node: Node) -> Beneath {
    Beneath::Nodes(BTreeSet::from([node]))
}

fn unknown(topology: &Topology, device: DeviceNumber, why: &str) -> Beneath {
    end(Node::Unknown(format!("{} ({device}), {why}", topology.name(device))))
}

fn network(what: String) -> Beneath {
    end(Node::Network(what))
}

/// True for "nvme0n1" of "nvme".
fn is_numbered(name: &str, kind: &str) -> bool {
    name.strip_prefix(kind).is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
}

/// The directory of the iSCSI session that a disk is of.
fn session(place: &Path) -> Option<PathBuf> {
    let is_session = |at: &&Path| {
        at.file_name().and_then(|name| name.to_str()).is_some_and(|name| is_numbered(name, "session"))
    };
    place.ancestors().find(is_session).map(Path::to_owned)
}

/// The machine at the other end, by its address; by the session where that is not shown.
fn iscsi(session: &Path) -> String {
    let name = session.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let connections = fs::read_dir(session).into_iter().flatten().flatten();
    let address = |entry: fs::DirEntry| {
        let connection = entry.path().join("iscsi_connection").join(entry.file_name());
        fs::read_to_string(connection.join("persistent_address")).ok()
    };
    let address =
        connections.filter_map(address).map(|text| text.trim().to_owned()).find(|text| !text.is_empty());
    format!("iSCSI {}", address.unwrap_or(name))
}

/// By the transports of its controllers. The disk lies in its controller's directory or, where several may lead to it,
/// in that of the subsystem, which has links to them.
fn of_nvme(topology: &Topology, device: DeviceNumber) -> Beneath {
    let above = topology.node(device).join("..");
    let mut controllers = vec![above.clone()];
    if !above.join("transport").exists() {
        let entries = fs::read_dir(&above).into_iter().flatten().flatten();
        controllers =
            entries.map(|entry| entry.path()).filter(|path| path.join("transport").exists()).collect();
    }
    if controllers.is_empty() {
        return unknown(topology, device, "none of whose controllers is shown");
    }
    let mut found = BTreeSet::new();
    for controller in controllers {
        let read = |name| fs::read_to_string(controller.join(name)).unwrap_or_default().trim().to_owned();
        match read("transport").as_str() {
            // A fabric of fibre channel is a SAN, as it is for SCSI: its disks are no files of this machine.
            "pcie" | "apple-nvme" | "fc" => {}
            transport @ ("tcp" | "rdma") => {
                let address = read("address");
                let host =
                    address.split(',').find_map(|part| part.strip_prefix("traddr=")).unwrap_or_default();
                found.insert(Node::Network(format!("NVMe {transport} {host}")));
            }
            transport => {
                return unknown(topology, device, &format!("an NVMe device by way of '{transport}'"));
            }
        }
    }
    if found.is_empty() { Beneath::Nothing } else { Beneath::Nodes(found) }
}

/// Where in the machine's hardware a device is, that all its neighbours share; None for one without.
fn hardware(place: &Path) -> Option<PathBuf> {
    let mut steps = place.iter().skip_while(|step| *step != "devices").skip(1).peekable();
    if steps.peek().is_none_or(|first| *first == "virtual") {
        return None;
    }
    let path: PathBuf = steps.collect();
    let above = path.parent()?;
    let above = if above.ends_with("block") { above.parent()? } else { above };
    (above != Path::new("")).then(|| above.to_owned())
}
