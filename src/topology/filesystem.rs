//! What do file systems of a kind lie on? One verdict for each kind that is known; what is not listed hides it.

/// What a kind of file system lies on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LiesOn {
    /// Memory.
    Memory,
    /// Another machine serves it, or other machines share it and have to agree.
    OtherMachines,
    /// Its one device, and those that its options name.
    OneDevice,
    /// Devices of which the mount's source names one or all.
    Devices,
    /// File systems: the layers of an overlay.
    Layers,
    /// It does not say.
    Hidden,
}

impl LiesOn {
    /// By the name of the kind, as mountinfo has it.
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

    /// A file system of this kind answers without asking another machine or a process. What is not known to does not; nor
    /// does an overlay, for its layers may be of any kind.
    pub(super) fn answers_by_itself(kind: &str) -> bool {
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
