//! Decides whether a block device ends at a disk, or its driver uses more than sysfs shows. Decided by the driver's
//! name, which `/proc/devices` gives for the major number.
//!
//! An allow-list: only listed drivers count as a disk's, or as having all their devices among the slaves in
//! sysfs. Any other driver (zvol, drbd, rnbd, ublk) may lead anywhere, even to our origin, and is
//! [`Node::Unknown`]. Some listed drivers have several transports (SCSI, NVMe, virtio); the device's path in
//! sysfs shows which.
//!
//! An Unknown names one device, or the hardware that serves several: two disks of one controller share a
//! node. Devices without hardware never share one.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use super::Topology;
use super::graph::Node;
use crate::base::DeviceNumber;

/// What a device's driver uses, besides the slaves in sysfs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum DriverBacking {
    /// Nothing on this machine.
    Nothing,
    /// A file or device, for loop devices.
    File,
    /// Memory.
    Memory,
    /// Memory and a writeback device, for zram.
    MemoryAndDevice,
    /// These nodes.
    Nodes(BTreeSet<Node>),
}

/// Drivers of disks, and drivers whose devices are all in `slaves`.
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

/// Drivers backed by memory, which a write has to allocate.
const MEMORY: [&str; 2] = ["ramdisk", "nullb"];

/// Drivers whose devices are served by other machines.
const NETWORK: [&str; 3] = ["nbd", "rbd", "aoe"];

/// Prefix of a sysfs directory on a device's path if another machine serves it by USB/IP.
const USB_IP_WAY: &str = "vhci_hcd";

/// The same if this machine itself serves the device, from anything: a kernel target, a gadget, a program.
const OWN_WAYS: [&str; 4] = ["tcm_loop", "scst_local", "dummy_hcd", "vduse"];

/// The block drivers of the kernel, by major number.
#[derive(Debug, Default)]
pub(super) struct Drivers(BTreeMap<u32, String>);

impl Drivers {
    /// The drivers at present; empty if the kernel does not list them.
    pub(super) fn read(topology: &Topology) -> Self {
        let text = fs::read_to_string(topology.root.join("proc/devices")).unwrap_or_default();
        let lines = text.lines().skip_while(|line| *line != "Block devices:").skip(1);
        let driver = |line: &str| {
            let (major, name) = line.trim().split_once(' ')?;
            Some((major.parse().ok()?, name.trim().to_owned()))
        };
        Self(lines.filter_map(driver).collect())
    }

    /// What the driver of a device uses. Not for partitions.
    pub(super) fn backing(&self, topology: &Topology, device: DeviceNumber) -> DriverBacking {
        let place = fs::canonicalize(topology.node(device)).unwrap_or_default();
        let steps: Vec<&str> = place.iter().filter_map(|step| step.to_str()).collect();
        let name = steps.last().copied().unwrap_or_default();
        let Some(driver) = self.0.get(&device.major) else {
            return unknown(topology, device, "whose driver is not in /proc/devices");
        };
        // Some drivers append a number to their name for each device.
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
            "loop" => DriverBacking::File,
            "zram" => DriverBacking::MemoryAndDevice,
            "sd" => session(&place).map_or(DriverBacking::Nothing, |session| network(iscsi(&session))),
            "blkext" if is_numbered(name, "nvme") => of_nvme(topology, device),
            "blkext" if is_numbered(name, "pmem") => DriverBacking::Nothing,
            _ if is(&MEMORY) => DriverBacking::Memory,
            _ if is(&NETWORK) => network(kind.to_owned()),
            _ if is(&LEAVES) => DriverBacking::Nothing,
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

fn end(node: Node) -> DriverBacking {
    DriverBacking::Nodes(BTreeSet::from([node]))
}

fn unknown(topology: &Topology, device: DeviceNumber, why: &str) -> DriverBacking {
    end(Node::Unknown(format!("{} ({device}), {why}", topology.name(device))))
}

fn network(what: String) -> DriverBacking {
    end(Node::Network(what))
}

/// True for "nvme0n1" of "nvme".
fn is_numbered(name: &str, kind: &str) -> bool {
    name.strip_prefix(kind).is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
}

/// The directory of a disk's iSCSI session.
fn session(place: &Path) -> Option<PathBuf> {
    let is_session = |at: &&Path| {
        at.file_name().and_then(|name| name.to_str()).is_some_and(|name| is_numbered(name, "session"))
    };
    place.ancestors().find(is_session).map(Path::to_owned)
}

/// The address of the other machine; the name of the session if there is no address.
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

/// Decided by the transports of its controllers. The disk is in its controller's directory, or with multipath
/// in that of the subsystem, which links to all its controllers.
fn of_nvme(topology: &Topology, device: DeviceNumber) -> DriverBacking {
    let above = topology.node(device).join("..");
    let mut controllers = vec![above.clone()];
    if !above.join("transport").exists() {
        let entries = fs::read_dir(&above).into_iter().flatten().flatten();
        controllers =
            entries.map(|entry| entry.path()).filter(|path| path.join("transport").exists()).collect();
    }
    if controllers.is_empty() {
        return unknown(topology, device, "whose controllers are not in sysfs");
    }
    let mut found = BTreeSet::new();
    for controller in controllers {
        let read = |name| fs::read_to_string(controller.join(name)).unwrap_or_default().trim().to_owned();
        match read("transport").as_str() {
            // A fibre channel fabric is a SAN, as for SCSI: its disks are not files of this machine.
            "pcie" | "apple-nvme" | "fc" => {}
            transport @ ("tcp" | "rdma") => {
                let address = read("address");
                let host =
                    address.split(',').find_map(|part| part.strip_prefix("traddr=")).unwrap_or_default();
                found.insert(Node::Network(format!("NVMe {transport} {host}")));
            }
            transport => {
                return unknown(
                    topology,
                    device,
                    &format!("an NVMe device with the transport '{transport}'"),
                );
            }
        }
    }
    if found.is_empty() { DriverBacking::Nothing } else { DriverBacking::Nodes(found) }
}

/// The hardware of a device, shared by its neighbours, as a path in sysfs; None for a device without
/// hardware.
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
