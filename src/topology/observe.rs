//! Finds what a device, a file system or memory waits for. Supplies the edges of the [`graph`](super::graph).
//!
//! | node | source |
//! |---|---|
//! | a device | `slaves` in sysfs, the disk of a partition; its [`driver`](super::driver) |
//! | a loop device | the kernel's identity of its file (`LOOP_GET_STATUS64`), never the path by which it was opened |
//! | a file system | its superblock's number, if that is a device; the devices of btrfs and bcachefs; external logs |
//! | an overlay | its layers, if their paths still lead to what the kernel reports |
//! | memory | swap devices and files |
//!
//! Mounts are read from every mount namespace that has a process. A dependency that is hidden is
//! [`Node::Unknown`], with the reason; that includes what we are not permitted to see. A file system of
//! another machine is [`Node::Network`].
//!
//! Dependencies that only a device-mapper table shows (a snapshot's store) are added by the reader of tables.
//! Must not open what it examines, except loop devices, which can be queried in no other way, and paths
//! without any access (`O_PATH`).

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use super::Topology;
use super::driver::{DriverBacking, Drivers};
use super::filesystem::BackingKind;
use super::graph::Node;
use super::loops::LoopBacking;
use super::mount::{Mount, MountTable, unescape};
use crate::base::{DeviceNumber, Result, ResultExt as _};
use crate::sys::path_stat::{FilesystemSizes, Found};

/// The state of the machine at one moment: to be queried, then dropped.
#[derive(Debug)]
pub struct Observer {
    topology: Topology,
    mounts: MountTable,
    drivers: Drivers,
}

impl Observer {
    /// Reads the mounts of every namespace, and the block drivers.
    ///
    /// # Errors
    /// I/O errors of reading our own mounts, and the list of processes.
    pub fn new(topology: Topology) -> Result<Self> {
        let mounts = MountTable::read(&topology)?;
        let drivers = Drivers::read(&topology);
        Ok(Self { topology, mounts, drivers })
    }

    /// What I/O on `node` waits for directly.
    #[must_use]
    pub fn waits_for(&self, node: &Node) -> BTreeSet<Node> {
        match node {
            Node::Device(device) => self.of_device(*device),
            Node::FileSystem(number) => self.of_filesystem(*number),
            Node::Memory => self.of_memory(),
            Node::Network(_) | Node::Unknown(_) => BTreeSet::new(),
        }
    }

    /// The node of `path`: the block device itself, or the file system of anything else. A local disk can
    /// hang as a server can, so a child process does the lookup.
    ///
    /// # Errors
    /// I/O errors of the lookup; [`std::io::ErrorKind::TimedOut`].
    pub fn at(&self, path: &Path) -> Result<Node> {
        let found = Found::with_timeout(path).io_context(|| format!("examining {}", path.display()))?;
        Ok(self.node_of(&found, path))
    }

    fn node_of(&self, found: &Found, path: &Path) -> Node {
        if let Some(device) = found.block_device {
            return Node::Device(device);
        }
        // By the id of its mount, which is unique across namespaces: a btrfs subvolume has a number of its
        // own in `st_dev`.
        match self.mounts.by_id(found.mount) {
            Some(mount) => Node::FileSystem(mount.device),
            None => self.by_number(found.dev, &path.display().to_string()),
        }
    }

    /// The node as text.
    #[must_use]
    pub fn describe(&self, node: &Node) -> String {
        match node {
            Node::Device(device) => self.topology.name(*device),
            Node::FileSystem(number) => match self.mounts.of(*number).next() {
                Some((_, mount)) => format!("the {} at {}", mount.kind, mount.point.display()),
                None => format!("the filesystem {number}"),
            },
            Node::Memory => "memory".to_owned(),
            Node::Network(what) => format!("another machine ({what})"),
            Node::Unknown(why) => why.clone(),
        }
    }

    fn by_number(&self, number: DeviceNumber, of: &str) -> Node {
        if self.mounts.of(number).next().is_some() || self.topology.node(number).exists() {
            Node::FileSystem(number)
        } else {
            Node::Unknown(format!("the filesystem {number}, which no mount shows ({of})"))
        }
    }

    fn of_device(&self, device: DeviceNumber) -> BTreeSet<Node> {
        let node = self.topology.node(device);
        if let Some(disk) = self.topology.disk_of(device) {
            return BTreeSet::from([Node::Device(disk)]);
        }
        let mut found: BTreeSet<Node> =
            self.topology.numbers_in(&node.join("slaves")).into_iter().map(Node::Device).collect();
        match self.drivers.backing(&self.topology, device) {
            DriverBacking::Nothing => {}
            // A loop device allocates memory for each request, and may have to wait for it.
            DriverBacking::File => found.extend([Node::Memory, self.of_loop(device)]),
            DriverBacking::Memory => {
                found.insert(Node::Memory);
            }
            DriverBacking::MemoryAndDevice => {
                found.insert(Node::Memory);
                if let Ok(text) = fs::read_to_string(node.join("backing_dev"))
                    && text.trim() != "none"
                {
                    let path = Path::new(text.trim());
                    found.insert(self.at(path).unwrap_or_else(|_| {
                        let name = self.topology.name(device);
                        Node::Unknown(format!("the device that {name} writes back to ({})", path.display()))
                    }));
                }
            }
            DriverBacking::Nodes(nodes) => found.extend(nodes),
        }
        found
    }

    fn of_loop(&self, device: DeviceNumber) -> Node {
        let name = self.topology.name(device);
        let Some(shown) = self.topology.attached_loop(device) else {
            return Node::Unknown(format!("{name}, which is being set up"));
        };
        let status = match &shown.backing {
            LoopBacking::Known(status) => status,
            LoopBacking::Silent => {
                return Node::Unknown(format!("the file of {name}, whose filesystem does not answer"));
            }
            LoopBacking::Hidden(why) => return Node::Unknown(format!("the file of {name} ({why})")),
        };
        if let Some(device) = shown.device_beneath() {
            return Node::Device(device);
        }
        let number = DeviceNumber::from_dev(status.backing_dev);
        // The path counts only if it leads to that very file. It finds the mount of a subvolume, whose number
        // belongs to no device.
        if let Some(path) = self.topology.backing_path(device)
            && let Ok(found) = self.mounts.stat(&path)
            && (found.dev, found.inode) == (number, status.backing_inode)
        {
            return self.node_of(&found, &path);
        }
        self.by_number(number, &format!("the file of {name}"))
    }

    fn of_filesystem(&self, number: DeviceNumber) -> BTreeSet<Node> {
        let Some((_, mount)) = self.mounts.of(number).next() else {
            // Unmounted everywhere, but still in use.
            return BTreeSet::from([Node::Device(number)]);
        };
        let kind = mount.kind.as_str();
        let on_device = self.topology.node(number).exists().then_some(Node::Device(number));
        let mut found: BTreeSet<Node> = on_device.clone().into_iter().collect();
        match BackingKind::of(kind) {
            BackingKind::Memory => return BTreeSet::from([Node::Memory]),
            BackingKind::Layers => return self.layers(number),
            BackingKind::Devices => return self.of_many_devices(mount),
            BackingKind::OtherMachines => {
                found.insert(Node::Network(format!("{kind} {}", mount.source.display())));
                return found;
            }
            BackingKind::OneDevice if on_device.is_some() => {}
            BackingKind::OneDevice | BackingKind::Hidden => {
                let at = mount.point.display();
                let why = format!("the {kind} at {at} ({number}), which does not report its devices");
                found.insert(Node::Unknown(why));
                return found;
            }
        }
        for device in options(&mount.options, &["logdev", "rtdev"]) {
            found.insert(
                self.at(&device).unwrap_or_else(|_| {
                    Node::Unknown(format!("{} of the {kind} {number}", device.display()))
                }),
            );
        }
        if kind.starts_with("ext") {
            found.extend(self.journals(number));
        }
        found
    }

    /// If ext4 has an external journal, it may be any journal that the kernel has open
    /// (`/proc/fs/jbd2/DEVICE`; an internal one is `DEVICE-INODE`).
    fn journals(&self, number: DeviceNumber) -> Vec<Node> {
        let Ok(entries) = fs::read_dir(self.topology.root.join("proc/fs/jbd2")) else { return Vec::new() };
        let names: Vec<String> =
            entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
        let kernel_name = |device| self.topology.name(device).trim_start_matches("/dev/").replace('/', "!");
        let own = format!("{}-", kernel_name(number));
        let is_within = |name: &String| {
            name.strip_prefix(&own).is_some_and(|inode| inode.bytes().all(|byte| byte.is_ascii_digit()))
        };
        if names.iter().any(is_within) {
            return Vec::new();
        }
        let devices = self.topology.all_devices().into_iter();
        devices.filter(|device| names.contains(&kernel_name(*device))).map(Node::Device).collect()
    }

    /// btrfs names one of its devices as the mount's source, and sysfs has the others; bcachefs names all.
    fn of_many_devices(&self, mount: &Mount) -> BTreeSet<Node> {
        let mut found = BTreeSet::new();
        for source in mount.source.to_string_lossy().split(':') {
            match self.mounts.stat(Path::new(source)).ok().and_then(|found| found.block_device) {
                Some(device) => {
                    let siblings = self.topology.btrfs_devices(device);
                    if mount.kind == "btrfs" && siblings.is_empty() {
                        found.insert(Node::Unknown(format!(
                            "the devices of the btrfs {} on {source}",
                            mount.device
                        )));
                    }
                    found.extend(siblings.into_iter().chain([device]).map(Node::Device));
                }
                None => {
                    found.insert(Node::Unknown(format!(
                        "the devices of the {} {} on {source}",
                        mount.kind, mount.device
                    )));
                }
            }
        }
        found
    }

    /// The layers of an overlay. Their paths are those of the mounting process, in an unknown namespace and
    /// at an unknown time. They count only if they lead to a file system with the same statistics as the
    /// overlay reports. Every file system that a layer may lead to counts. A layer that leads nowhere in any
    /// view is Unknown.
    fn layers(&self, number: DeviceNumber) -> BTreeSet<Node> {
        let mut found: BTreeMap<PathBuf, BTreeSet<Node>> = BTreeMap::new();
        for (view, mount) in self.mounts.of(number) {
            let top = options(&mount.options, &["upperdir"]);
            let lower = options(&mount.options, &["lowerdir", "lowerdir+", "datadir+"]);
            let is_of_view = top.first().or(lower.first()).is_some_and(|first| {
                let sizes = |path: &Path| FilesystemSizes::with_timeout(&view.path(path)).ok();
                let reported = sizes(&mount.point);
                reported.is_some() && reported == sizes(first)
            });
            for layer in top.iter().chain(&lower).chain(&options(&mount.options, &["workdir"])) {
                let nodes = found.entry(layer.clone()).or_default();
                if is_of_view
                    && layer.is_absolute()
                    && let Ok(at) = view.stat(layer)
                    // The same path may also name something within the overlay.
                    && at.dev != number
                {
                    nodes.insert(self.node_of(&at, layer));
                }
            }
        }
        let here = self.describe(&Node::FileSystem(number));
        if found.is_empty() {
            return BTreeSet::from([Node::Unknown(format!("{here} ({number}), whose layers are hidden"))]);
        }
        let or_unknown = |(layer, nodes): (PathBuf, BTreeSet<Node>)| {
            let unknown = || Node::Unknown(format!("a layer of {here} ({number}, {})", layer.display()));
            if nodes.is_empty() { BTreeSet::from([unknown()]) } else { nodes }
        };
        found.into_iter().flat_map(or_unknown).collect()
    }

    fn of_memory(&self) -> BTreeSet<Node> {
        let unknown = |what: String| BTreeSet::from([Node::Unknown(what)]);
        match self.topology.swaps() {
            Err(error) => unknown(format!("swap space ({error})")),
            Ok(swaps) => {
                let at = |path: &PathBuf| {
                    self.at(path)
                        .unwrap_or_else(|_| Node::Unknown(format!("the swap space {}", path.display())))
                };
                swaps.iter().map(at).collect()
            }
        }
    }
}

/// The paths in the options `names` of a mount, in the order of `names`.
fn options(text: &str, names: &[&str]) -> Vec<PathBuf> {
    let of = |name: &&str| {
        let values =
            text.split(',').filter_map(|option| option.split_once('=')).filter(|(key, _)| key == name);
        values.flat_map(|(_, value)| split_paths(value)).collect::<Vec<_>>()
    };
    names.iter().flat_map(of).collect()
}

/// Splits at colons, except after a backslash, which mountinfo shows as `\134`.
fn split_paths(value: &str) -> Vec<PathBuf> {
    use std::ffi::OsString;
    use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
    let (mut paths, mut current) = (Vec::new(), Vec::new());
    let text = unescape(value);
    let mut bytes = text.as_os_str().as_bytes().iter().copied();
    while let Some(byte) = bytes.next() {
        match byte {
            b'\\' => current.extend(bytes.next()),
            b':' => paths.push(std::mem::take(&mut current)),
            _ => current.push(byte),
        }
    }
    paths.push(current);
    paths.into_iter().filter(|path| !path.is_empty()).map(|path| OsString::from_vec(path).into()).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::super::tests::{dev, machine};
    use super::*;

    /// The fake machine with more mounts.
    fn with_mounts(lines: &[&str]) -> (tempfile::TempDir, Observer) {
        let (keep, topology) = machine();
        let file = keep.path().join("proc/self/mountinfo");
        let text = fs::read_to_string(&file).unwrap() + &lines.join("\n");
        fs::write(file, text).unwrap();
        let observer = Observer::new(topology).unwrap();
        (keep, observer)
    }

    fn of_fs(observer: &Observer, number: DeviceNumber) -> BTreeSet<Node> {
        observer.waits_for(&Node::FileSystem(number))
    }

    #[test]
    fn devices_wait_for_what_they_are_made_of() {
        let (_keep, observer) = with_mounts(&[]);
        let of = |device| observer.waits_for(&Node::Device(device));
        assert_eq!(of(dev(253, 0)), BTreeSet::from([Node::Device(dev(8, 1))]));
        assert_eq!(of(dev(8, 1)), BTreeSet::from([Node::Device(dev(8, 0))]));
        assert_eq!(of(dev(8, 0)), BTreeSet::new());
        assert_eq!(of_fs(&observer, dev(8, 2)), BTreeSet::from([Node::Device(dev(8, 2))]));
    }

    /// The fake machine with a disk `number` of `driver`, at `path` below sys/devices.
    fn with_disk(driver: &str, number: DeviceNumber, path: &str) -> (tempfile::TempDir, BTreeSet<Node>) {
        let (keep, topology) = machine();
        add_disk(keep.path(), driver, number, path);
        let found = Observer::new(topology).unwrap().waits_for(&Node::Device(number));
        (keep, found)
    }

    fn add_disk(root: &Path, driver: &str, number: DeviceNumber, path: &str) {
        let node = root.join("sys/devices").join(path);
        fs::create_dir_all(&node).unwrap();
        let name = Path::new(path).file_name().unwrap().to_str().unwrap();
        fs::write(node.join("uevent"), format!("DEVNAME={name}\n")).unwrap();
        std::os::unix::fs::symlink(&node, root.join(format!("sys/dev/block/{number}"))).unwrap();
        let drivers = fs::read_to_string(root.join("proc/devices")).unwrap();
        fs::write(root.join("proc/devices"), format!("{drivers}{:3} {driver}\n", number.major)).unwrap();
    }

    #[test]
    fn a_driver_that_is_not_listed_is_unknown() {
        for (driver, path) in [
            ("zvol", "virtual/block/zd0"),
            ("drbd", "virtual/block/drbd0"),
            ("rnbd_client", "virtual/block/rnbd0"),
            ("blkext", "virtual/block/ublkb0"),
            ("sd", "tcm_loop_0/tcm_loop_adapter_0/host3/target3:0:1/3:0:1:0/block/sdc"),
            ("virtblk", "virtual/vduse/v0/vdpa0/virtio9/block/vdz"),
            ("blkext", "virtual/nvme-subsystem/nvme-subsys0/nvme0n1"),
        ] {
            let (_keep, found) = with_disk(driver, dev(230, 0), path);
            let name = path.rsplit('/').next().unwrap();
            let is_told = |node: &Node| matches!(node, Node::Unknown(what) if what.starts_with(&format!("/dev/{name}")));
            assert!(found.len() == 1 && found.iter().all(is_told), "{driver} {path}: {found:?}");
        }
        // A device number without a driver.
        let (keep, topology) = machine();
        add_disk(keep.path(), "sd", dev(240, 0), "pci0/block/foo0");
        fs::write(keep.path().join("proc/devices"), "Block devices:\n  8 sd\n").unwrap();
        let found = Observer::new(topology).unwrap().waits_for(&Node::Device(dev(240, 0)));
        assert!(matches!(found.first(), Some(Node::Unknown(_))), "{found:?}");
    }

    #[test]
    fn disks_wait_for_nothing() {
        for (driver, path) in [
            ("sd", "pci0000:00/0000:00:1f.2/ata1/host0/target0:0:0/0:0:0:0/block/sdc"),
            ("sd", "pci0000:00/0000:05:00.0/host5/rport-5:0-1/target5:0:0/5:0:0:0/block/sdd"),
            ("virtblk", "pci0000:00/0000:00:02.0/virtio1/block/vda"),
            ("ubd", "platform/uml-blkdev.0/block/ubda"),
            ("mmc", "platform/soc/mmc_host/mmc0/mmc0:0001/block/mmcblk0"),
            ("xvd", "vbd-51712/block/xvda"),
            ("blkext", "LNXSYSTM:00/ndbus0/region0/namespace0.0/block/pmem0"),
        ] {
            let (_keep, found) = with_disk(driver, dev(230, 0), path);
            assert!(found.is_empty(), "{driver} {path}: {found:?}");
        }
    }

    #[test]
    fn a_disk_served_by_another_machine_is_recognized_by_its_sysfs_path() {
        let iscsi = "platform/host3/session1/target3:0:0/3:0:0:0/block/sdc";
        let network = |what: &str| BTreeSet::from([Node::Network(what.to_owned())]);
        let (keep, found) = with_disk("sd", dev(230, 0), iscsi);
        assert_eq!(found, network("iSCSI session1"));
        let connection = keep
            .path()
            .join("sys/devices/platform/host3/session1/connection1:0/iscsi_connection/connection1:0");
        fs::create_dir_all(&connection).unwrap();
        fs::write(connection.join("persistent_address"), "10.0.0.5\n").unwrap();
        let observer = Observer::new(Topology::at(keep.path())).unwrap();
        assert_eq!(observer.waits_for(&Node::Device(dev(230, 0))), network("iSCSI 10.0.0.5"));
        for (driver, path, what) in [
            ("nbd", "virtual/block/nbd0", "nbd"),
            ("rbd", "rbd/0/block/rbd0", "rbd"),
            ("rbd0", "rbd/0/block/rbd0", "rbd"),
            ("aoe", "virtual/block/etherd!e1.1", "aoe"),
            ("sd", "platform/vhci_hcd.0/usb3/3-1/host4/target4:0:0/4:0:0:0/block/sdc", "USB/IP"),
        ] {
            assert_eq!(with_disk(driver, dev(230, 0), path).1, network(what), "{driver} {path}");
        }
    }

    #[test]
    fn an_nvme_namespace_waits_for_all_its_controllers() {
        let of = |disk: &str, controllers: &[(&str, &str)]| {
            let (keep, topology) = machine();
            add_disk(keep.path(), "blkext", dev(230, 0), disk);
            for (path, transport) in controllers {
                let controller = keep.path().join("sys/devices").join(path);
                fs::create_dir_all(&controller).unwrap();
                fs::write(controller.join("transport"), format!("{transport}\n")).unwrap();
                fs::write(controller.join("address"), "traddr=10.0.0.6,trsvcid=4420\n").unwrap();
                let subsystem = keep.path().join("sys/devices/virtual/nvme-subsystem/nvme-subsys0");
                if subsystem.exists() {
                    let link = subsystem.join(controller.file_name().unwrap());
                    std::os::unix::fs::symlink(&controller, link).unwrap();
                }
            }
            Observer::new(topology).unwrap().waits_for(&Node::Device(dev(230, 0)))
        };
        let one = ("pci0000:00/0000:00:04.0/nvme/nvme0", "pcie");
        let far = ("virtual/nvme-fabrics/ctl/nvme1", "tcp");
        let head = "virtual/nvme-subsystem/nvme-subsys0/nvme0n1";
        let network = BTreeSet::from([Node::Network("NVMe tcp 10.0.0.6".to_owned())]);
        assert_eq!(of("pci0000:00/0000:00:04.0/nvme/nvme0/nvme0n1", &[one]), BTreeSet::new());
        assert_eq!(of("virtual/nvme-fabrics/ctl/nvme1/nvme1n1", &[far]), network);
        assert_eq!(of(head, &[one]), BTreeSet::new());
        assert_eq!(of(head, &[one, far]), network);
        let ours = of(head, &[("virtual/nvme-fabrics/ctl/nvme2", "loop")]);
        assert!(matches!(ours.first(), Some(Node::Unknown(_))), "{ours:?}");
    }

    #[test]
    fn disks_of_one_controller_share_one_unknown_node() {
        let (keep, topology) = machine();
        for (minor, path) in [
            (0, "pci0/0000:05:00.0/block/foo0"),
            (1, "pci0/0000:05:00.0/block/foo1"),
            (2, "pci0/0000:06:00.0/block/foo2"),
        ] {
            add_disk(keep.path(), "foo", dev(240, minor), path);
        }
        let observer = Observer::new(topology).unwrap();
        let of = |minor| observer.waits_for(&Node::Device(dev(240, minor)));
        assert_eq!(of(0), of(1));
        assert_ne!(of(0), of(2));
        assert!(matches!(of(0).first(), Some(Node::Unknown(what)) if what.contains("foo")), "{:?}", of(0));
    }

    #[test]
    fn network_file_systems_are_recognized_and_opaque_ones_are_unknown() {
        let kinds = [
            "nfs4",
            "cifs",
            "9p",
            "virtiofs",
            "ceph",
            "fuse.sshfs",
            "zfs",
            "fuse.mergerfs",
            "tmpfs",
            "ecryptfs",
        ];
        let lines: Vec<String> = kinds
            .iter()
            .enumerate()
            .map(|(at, kind)| format!("{} 35 0:{at} / /mnt/{at} rw - {kind} server:/x rw", 100 + at))
            .collect();
        let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
        let (_keep, observer) = with_mounts(&lines);
        for (at, kind) in kinds.iter().enumerate() {
            let found = of_fs(&observer, dev(0, u32::try_from(at).unwrap()));
            let is_right = |node: &Node| match at {
                0..6 => *node == Node::Network(format!("{kind} server:/x")),
                8 => *node == Node::Memory,
                _ => matches!(node, Node::Unknown(_)),
            };
            assert!(found.len() == 1 && found.iter().all(is_right), "{kind}: {found:?}");
        }
        // Shared with other machines, on a visible device.
        let (_keep, observer) = with_mounts(&["99 35 8:16 / /mnt/c rw - ocfs2 /dev/sdb rw"]);
        let network = Node::Network("ocfs2 /dev/sdb".to_owned());
        assert_eq!(of_fs(&observer, dev(8, 16)), BTreeSet::from([Node::Device(dev(8, 16)), network]));
    }

    #[test]
    fn an_overlay_whose_layers_cannot_be_found_is_unknown() {
        let missing =
            "90 35 0:50 / /mnt/o rw - overlay overlay rw,lowerdir=/no/where,upperdir=/neither,workdir=/w";
        let relative = "91 35 0:51 / /mnt/o2 rw - overlay overlay rw,lowerdir=l/A:l/B";
        let (_keep, observer) = with_mounts(&[missing, relative]);
        for minor in [50, 51] {
            let found = of_fs(&observer, dev(0, minor));
            assert!(
                !found.is_empty() && found.iter().all(|node| matches!(node, Node::Unknown(_))),
                "{found:?}"
            );
        }
    }

    #[test]
    fn swap_space_is_what_memory_waits_for() {
        let (keep, observer) = with_mounts(&[]);
        assert_eq!(observer.waits_for(&Node::Memory), BTreeSet::new());
        fs::write(keep.path().join("proc/swaps"), "Filename\tType\n/no/where\\040(deleted) file 1 0 -2\n")
            .unwrap();
        let found = observer.waits_for(&Node::Memory);
        assert!(
            matches!(found.first(), Some(Node::Unknown(what)) if what.contains("/no/where (deleted)")),
            "{found:?}"
        );
    }

    #[test]
    fn a_log_on_another_device_is_waited_for() {
        let (keep, observer) =
            with_mounts(&["99 35 8:16 / /mnt/x rw - xfs /dev/sdb rw,attr2,logdev=/dev/none"]);
        let found = of_fs(&observer, dev(8, 16));
        assert!(found.iter().any(|node| matches!(node, Node::Unknown(what) if what.contains("/dev/none"))));
        // An internal ext4 journal, then none.
        let jbd2 = keep.path().join("proc/fs/jbd2");
        fs::create_dir_all(jbd2.join("sda2-8")).unwrap();
        fs::create_dir_all(jbd2.join("sdb")).unwrap();
        assert_eq!(of_fs(&observer, dev(8, 2)), BTreeSet::from([Node::Device(dev(8, 2))]));
        fs::remove_dir(jbd2.join("sda2-8")).unwrap();
        let both = BTreeSet::from([Node::Device(dev(8, 2)), Node::Device(dev(8, 16))]);
        assert_eq!(of_fs(&observer, dev(8, 2)), both);
    }

    #[test]
    fn paths_in_options_are_split_where_the_overlay_splits_them() {
        let text = "rw,lowerdir=/a\\040b:/c\\134:d::/e,upperdir=/u,lowerdir+=/f";
        let paths = |names: &[&str]| options(text, names);
        assert_eq!(paths(&["lowerdir", "lowerdir+"]), ["/a b", "/c:d", "/e", "/f"].map(PathBuf::from));
        assert_eq!(paths(&["upperdir"]), [PathBuf::from("/u")]);
    }

    #[test]
    fn a_path_is_found_by_its_mount() {
        let observer = Observer::new(Topology::default()).unwrap();
        let meta = fs::metadata("/proc").unwrap();
        assert_eq!(
            observer.at(Path::new("/proc")).unwrap(),
            Node::FileSystem(DeviceNumber::from_dev(meta.dev()))
        );
        assert!(observer.at(Path::new("/no/where")).is_err());
    }
}
