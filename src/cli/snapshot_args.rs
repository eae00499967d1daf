//! The arguments of `tidemark snapshot`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum, ValueHint};

use super::options::{Consent, HookOptions, parse_time};
use crate::base::Bytes;

/// `tidemark snapshot`.
#[derive(Clone, Debug, Args)]
#[command(subcommand_required = true, arg_required_else_help = false, disable_help_subcommand = true)]
#[command(after_help = "Examples:
  tidemark snapshot create data --name monday
  tidemark snapshot create data wal --name tuesday
  tidemark snapshot list
  tidemark snapshot mount data@monday /mnt/monday
  tidemark snapshot delete data@monday")]
pub struct SnapshotArgs {
    /// What to do.
    #[command(subcommand)]
    pub command: SnapshotCommand,
}

/// The commands of `tidemark snapshot`.
#[derive(Clone, Debug, Subcommand)]
pub enum SnapshotCommand {
    /// Keep what attached volumes hold at one instant, as /dev/mapper/VOLUME@NAME
    Create(CreateArgs),
    /// List snapshots, the oldest first
    List(ListArgs),
    /// Show one snapshot, and how much of its store is its own
    Show(ShowArgs),
    /// Mount a snapshot read-only, or a clone, with the options that its filesystem needs
    Mount(MountArgs),
    /// Make a writable image of a snapshot, as /dev/mapper/VOLUME@NAME
    Clone(CloneArgs),
    /// Let a volume show a snapshot again, and go on from there; its other snapshots stay
    Rollback(RollbackArgs),
    /// Delete snapshots and clones of one volume
    Delete(DeleteArgs),
}

/// Where a store goes.
#[derive(Clone, Debug, Args)]
pub struct StoreOptions {
    /// Directory for the file of its COW store, on another filesystem [default: /var/lib/tidemark]
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath, help_heading = "COW store")]
    pub store: Option<PathBuf>,
    /// Size of each COW store [default: a fifth of the volume]
    #[arg(long, value_name = "SIZE", value_parser = Bytes::parse, help_heading = "COW store")]
    pub store_size: Option<Bytes>,
}

/// `tidemark snapshot create`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "Examples:
  tidemark snapshot create data
  tidemark snapshot create data wal --name monday
  tidemark snapshot create --group mail
  tidemark snapshot create data --name monday --store /mnt/fast --store-size 20GiB
  tidemark snapshot create data --exclude /srv/cache --exclude '*.iso'
  tidemark snapshot create data --dry-run

Snapshots of several volumes have one instant: every filesystem is frozen and
every volume suspended before the first is released. All of them are created,
or none, even if the command is killed or the power fails. They share a name;
each is deleted by itself. --store-size and --chunk apply to each store. Hooks
run once: TIDEMARK_ORIGIN is the first volume, TIDEMARK_ORIGINS all of them,
separated by spaces.

What is left out reads as zeros in the snapshot, and writes to it cost no
copy-on-write as long as every snapshot of the volume leaves it out. Paths are
those at which files are mounted now; of several volumes, each takes those that
are on it. Bytes go with one volume. A volume cannot be rolled back to such a
snapshot; files that it holds can (snapshot rollback --only).

With --json, the report of one volume is an object with 'snapshot'. That of
several has 'group' (the id that they share), 'instant', 'frozen_ms',
'suspended_ms', and 'snapshots', an array of such objects. The plan of several
(--dry-run) has 'snapshots' and 'filesystems'.

A group that has a name is a table of /etc/tidemark/groups.toml, which only
root may be able to write. All but 'volumes' may be absent:
  [group.mail]
  volumes = [\"data\", \"wal\"]
  freeze-budget = \"5s\"
  hook-before = \"CMD\"
  hook-frozen = \"CMD\"
  hook-after = \"CMD\"
  hook-timeout = \"1m\"")]
pub struct CreateArgs {
    /// The names of attached volumes: the snapshots of several have one instant, and all exist or none
    #[arg(value_name = "VOLUME", required_unless_present = "group")]
    pub volumes: Vec<PathBuf>,
    /// The volumes, hooks and freeze budget of this group in /etc/tidemark/groups.toml; options given here come first
    #[arg(long, value_name = "NAME", conflicts_with = "volumes")]
    pub group: Option<String>,
    /// The snapshot's name, the same for all volumes [default: the first number that is free]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Of all files, keep only this file, all below this directory, all that match this pattern, or these bytes: /PATH,
    /// '/PATH/*.db', '*.db', bytes:START+LENGTH; with metadata, so that the snapshot can be mounted
    #[arg(long, value_name = "WHAT", help_heading = "Subset")]
    pub include: Vec<String>,
    /// Do not keep these files or bytes, named in the same way, even if they are included
    #[arg(long, value_name = "WHAT", help_heading = "Subset")]
    pub exclude: Vec<String>,
    /// The store.
    #[command(flatten)]
    pub store: StoreOptions,
    /// Unit of copy-on-write, a power of two from 4KiB; all snapshots of a volume have the same [default: 4KiB]
    #[arg(long, value_name = "SIZE", value_parser = Bytes::parse, help_heading = "COW store")]
    pub chunk: Option<Bytes>,
    /// Longest time for which filesystems may be frozen and volumes suspended, from the first to the last [default: 2s]
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    pub freeze_budget: Option<Duration>,
    /// The hooks.
    #[command(flatten)]
    pub hooks: HookOptions,
    /// Show the plan, change nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// `tidemark snapshot list`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "Examples:
  tidemark snapshot list
  tidemark snapshot list data --json")]
pub struct ListArgs {
    /// The volume's name [default: every volume]
    #[arg(value_name = "VOLUME")]
    pub volume: Option<String>,
}

/// `tidemark snapshot show`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "Examples:
  tidemark snapshot show data@monday")]
pub struct ShowArgs {
    /// The snapshot
    #[arg(value_name = "VOLUME@NAME")]
    pub snapshot: String,
}

/// `tidemark snapshot mount`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "Examples:
  tidemark snapshot mount data@monday /mnt/monday")]
pub struct MountArgs {
    /// The snapshot
    #[arg(value_name = "VOLUME@NAME")]
    pub snapshot: String,
    /// An existing directory
    #[arg(value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub directory: PathBuf,
}

/// `tidemark snapshot clone`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "Examples:
  tidemark snapshot clone data@monday --name test
  tidemark snapshot mount data@test /mnt/test")]
pub struct CloneArgs {
    /// The snapshot
    #[arg(value_name = "VOLUME@NAME")]
    pub snapshot: String,
    /// The clone's name [default: the next free number]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// The store.
    #[command(flatten)]
    pub store: StoreOptions,
    /// Show the plan, change nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// `tidemark snapshot rollback`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "Examples:
  umount /srv && tidemark snapshot rollback data@monday --yes && mount /srv
  tidemark snapshot rollback root@before-upgrade --at-attach --yes && reboot
  tidemark snapshot rollback data@monday --only /srv/mail/anna --only /srv/x.db

With --only the volume stays mounted. A file or directory is copied out of the
snapshot and takes the place of the present one by one rename; what was created
in that directory since is gone. Processes that have it open keep the former
one, and so do other hard links. The filesystem needs room for the copy. To be
able to go back once more, create a snapshot first. Bytes are put back only if
no filesystem and no other device uses the volume.")]
pub struct RollbackArgs {
    /// The snapshot
    #[arg(value_name = "VOLUME@NAME")]
    pub snapshot: String,
    /// Roll back when the volume is attached next, at boot: for a volume that cannot be unmounted
    #[arg(long, conflicts_with = "no_wait")]
    pub at_attach: bool,
    /// Cancel a rollback that was planned with --at-attach
    #[arg(long, conflicts_with_all = ["at_attach", "no_wait", "reserve", "store", "dry_run", "yes"])]
    pub cancel: bool,
    /// What may be written to the volume while the snapshot is merged [default: anything, for which the newest
    /// snapshot's store gets all the space that it can need]
    #[arg(long, value_name = "SIZE", value_parser = Bytes::parse, help_heading = "COW store")]
    pub reserve: Option<Bytes>,
    /// Directory for the files of the rollback [default: that of the snapshot's store]
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath, help_heading = "COW store")]
    pub store: Option<PathBuf>,
    /// Only this file or directory, or these bytes (bytes:START+LENGTH), while the rest of the volume goes on; may be
    /// repeated
    #[arg(long, value_name = "PATH|BYTES", conflicts_with_all = ["at_attach", "cancel", "reserve", "store", "no_wait"])]
    pub only: Vec<String>,
    /// Return as soon as the volume can be used; the kernel goes on merging
    #[arg(long)]
    pub no_wait: bool,
    /// Confirmation.
    #[command(flatten)]
    pub consent: Consent,
}

/// `tidemark snapshot delete`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "Examples:
  tidemark snapshot delete data@monday
  tidemark snapshot delete data@1 data@2 --yes")]
pub struct DeleteArgs {
    /// The snapshots
    #[arg(value_name = "VOLUME@NAME", required = true)]
    pub snapshots: Vec<String>,
    /// Confirmation.
    #[command(flatten)]
    pub consent: Consent,
}

/// `tidemark monitor`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "Examples:
  tidemark monitor --install-unit && systemctl daemon-reload && systemctl enable --now tidemark-monitor
  tidemark monitor --auto-delete oldest
  tidemark monitor --hook 'logger -p daemon.crit \"$TIDEMARK_MESSAGE\"'")]
pub struct MonitorArgs {
    /// What may be deleted if the store of a volume's newest snapshot would fill otherwise
    #[arg(long, value_enum, value_name = "WHICH")]
    pub auto_delete: Option<AutoDeleteArg>,
    /// Command to run when a store is enlarged or nearly full, and when a snapshot is lost or deleted to make room:
    /// TIDEMARK_EVENT is grown, nearly-full, lost or deleted; TIDEMARK_SNAPSHOT and TIDEMARK_MESSAGE say which and why
    #[arg(long, value_name = "CMD", value_hint = ValueHint::CommandString)]
    pub hook: Option<String>,
    /// Write the systemd unit tidemark-monitor.service, and do nothing else
    #[arg(long, conflicts_with = "hook")]
    pub install_unit: bool,
}

/// `--auto-delete`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum AutoDeleteArg {
    /// The volume's oldest snapshot that is not in use, but never its newest
    Oldest,
}
