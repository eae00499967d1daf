//! What backs each kind of file system. One entry for each known kind; any other kind counts as hidden.

/// The backing of a kind of file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BackingKind {
    /// Memory.
    Memory,
    /// Another machine serves it, or it is shared with other machines and needs their agreement.
    OtherMachines,
    /// Its single device, and the devices that its options name.
    OneDevice,
    /// Several devices; the mount's source names one or all of them.
    Devices,
    /// Other file systems: the layers of an overlay.
    Layers,
    /// Not known.
    Hidden,
}

impl BackingKind {
    /// The backing for a kind as named in mountinfo.
    pub(super) fn of(kind: &str) -> Self {
        match kind {
            "tmpfs" | "ramfs" | "devtmpfs" | "hugetlbfs" | "rootfs" => Self::Memory,
            "nfs" | "nfs4" | "cifs" | "smb3" | "smbfs" | "9p" | "virtiofs" | "ceph" | "afs" | "coda"
            | "lustre" | "orangefs" | "pvfs2" | "beegfs" | "gpfs" | "vboxsf" | "vmhgfs" | "hostfs"
            | "gfs2" | "ocfs2" | "fuse.sshfs" | "fuse.glusterfs" => Self::OtherMachines,
            "ext2" | "ext3" | "ext4" | "xfs" | "vfat" | "exfat" | "msdos" | "ntfs3" | "f2fs" | "nilfs2"
            | "iso9660" | "squashfs" => Self::OneDevice,
            "btrfs" | "bcachefs" => Self::Devices,
            "overlay" => Self::Layers,
            _ => Self::Hidden,
        }
    }

    /// True if a file system of this kind answers without asking another machine or a process. False for an
    /// unknown kind, and for an overlay, as its layers may be of any kind.
    pub(super) fn answers_locally(kind: &str) -> bool {
        match Self::of(kind) {
            Self::Memory | Self::OneDevice | Self::Devices => true,
            Self::OtherMachines | Self::Layers => false,
            Self::Hidden => matches!(
                kind,
                "proc"
                    | "sysfs"
                    | "devpts"
                    | "cgroup"
                    | "cgroup2"
                    | "mqueue"
                    | "debugfs"
                    | "tracefs"
                    | "securityfs"
                    | "configfs"
                    | "pstore"
                    | "bpf"
                    | "efivarfs"
                    | "binfmt_misc"
                    | "selinuxfs"
                    | "nsfs"
                    | "zfs"
            ),
        }
    }
}
