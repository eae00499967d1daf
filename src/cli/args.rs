//! The command line: the one definition from which help, man pages and completions are generated.
//!
//! Makes no decisions; [`resolve`](super::resolve) turns the arguments into requests, once.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};
use clap_complete::Shell;

use super::options::{Consent, HookOptions, parse_sample, parse_time};
use super::snapshot_args::{MonitorArgs, SnapshotArgs};
use crate::base::Bytes;
use crate::copy::Impact;
use crate::copy::sample::Sample;

const ROOT_EXAMPLES: &str = "Examples:
  tidemark doctor
  tidemark attach /dev/sdb1 --name data
  tidemark copy /dev/mapper/data /backup/data.tdm
  tidemark verify data.tdm
  tidemark restore data.tdm /dev/sdc
  tidemark completions bash > /usr/share/bash-completion/completions/tidemark
  tidemark man /usr/local/share/man/man1";

/// The meaning of the exit codes, for help and man pages (`ErrorKind::exit_code` defines them).
pub const EXIT_CODES: &str = "  0    done
  1    failed: I/O, no space, the kernel, the store, a hook, a time limit
  2    usage: the command line cannot be carried out as written
  3    refused: the state of the system forbids it, nothing was changed
  4    data is bad: checksum, magic, truncation, a difference
  130  interrupted, and everything put back";

/// Exact copies of live Linux block devices with the stock kernel.
#[derive(Debug, Parser)]
#[command(name = "tidemark", version, propagate_version = true, disable_help_subcommand = true)]
#[command(after_help = format!("{ROOT_EXAMPLES}\n\nExit codes:\n{EXIT_CODES}"))]
pub struct Cli {
    /// Options that every command has.
    #[command(flatten)]
    pub global: Global,
    /// The command.
    #[command(subcommand)]
    pub command: Command,
}

/// Options that every command has.
#[derive(Clone, Copy, Debug, Args)]
pub struct Global {
    /// Print one JSON object per line instead of text
    #[arg(long, global = true, help_heading = "Output")]
    pub json: bool,
    /// Print no progress and no report, only warnings and errors
    #[arg(long, short, global = true, help_heading = "Output", conflicts_with = "verbose")]
    pub quiet: bool,
    /// Log more to standard error; repeat for more (TIDEMARK_LOG overrides it)
    #[arg(long, short, global = true, help_heading = "Output", action = clap::ArgAction::Count)]
    pub verbose: u8,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a device a volume, which can then be copied while it is mounted
    Attach(AttachArgs),
    /// Make a volume an ordinary device again
    Detach(DetachArgs),
    /// Copy a device, in use or not, as it is at one instant
    Copy(Box<CopyArgs>),
    /// Keep snapshots of an attached volume: create, list, show, mount, delete
    Snapshot(Box<SnapshotArgs>),
    /// Finish a copy whose process was killed
    Resume(ResumeArgs),
    /// Restore an archive to a device or file
    Restore(RestoreArgs),
    /// Check every block of an archive, and optionally compare it with a device or file
    Verify(VerifyArgs),
    /// Show the contents of an archive
    Inspect(InspectArgs),
    /// Work with archives: merge
    Archive(ArchiveArgs),
    /// Enlarge the stores of snapshots before they fill, and warn; runs until it is stopped
    Monitor(MonitorArgs),
    /// Show volumes, snapshots, copies and restores in progress, and leftovers
    Status(StatusArgs),
    /// Undo what a killed run left in place
    #[command(after_help = "Examples:
  tidemark recover
  tidemark recover --json

A partial file whose disk or server does not answer for 20 s is left in
place: repair the disk or server, and run 'tidemark recover' again.")]
    Recover,
    /// Report what this machine lacks for copying live volumes, and how to get it
    #[command(after_help = "Examples:
  tidemark doctor
  tidemark doctor --json")]
    Doctor,
    /// Print the completion script for a shell
    #[command(after_help = "Examples:
  tidemark completions bash > /usr/share/bash-completion/completions/tidemark
  tidemark completions zsh > /usr/local/share/zsh/site-functions/_tidemark")]
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Print the man page, or write one page for each command
    #[command(after_help = "Examples:
  tidemark man | man -l -
  tidemark man /usr/local/share/man/man1")]
    Man {
        /// Write tidemark.1, tidemark-copy.1 and so on into this directory
        #[arg(value_name = "DIR", value_hint = ValueHint::DirPath)]
        directory: Option<PathBuf>,
    },
}

/// `tidemark copy`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "Examples:
  tidemark copy /dev/mapper/data /backup/data.tdm
  tidemark copy data /dev/sdc --yes --verify
  tidemark copy /dev/vg0/home - | ssh backup 'cat > home.tdm'
  tidemark copy data data.img --format raw --rate 100MiB --store /mnt/fast
  tidemark copy data data.tdm --dry-run
  tidemark copy data@monday monday.tdm
  tidemark copy data@tuesday --since monday tuesday.tdm
  tidemark copy data --since monday /dev/sdc --yes
  tidemark copy data wal /backup
  tidemark copy --pair data=/dev/sdc --pair wal=/backup/wal.tdm
  tidemark copy --group mail /backup

From each rotating disk one copy reads at a time: another one waits for its
turn before its instant, while nothing is frozen ('tidemark status' shows it).

Several origins are copied from one instant: all filesystems are frozen and
all volumes suspended before the first is released; if one cannot be, nothing
is copied. They must be volumes or other device-mapper devices. Each has a
store of its own in the directory --store, and the options for stores apply
to each. Origins on one rotating disk are copied one after the other, others
side by side. If one copy fails after the instant (its store overflows, its
secondary is full), the others are finished: the report says what became of
each, and the exit status is that of the gravest failure (4, 1, 3, 130 in
this order). A signal gives up all that have not ended. Such a copy cannot be
resumed; after a crash, 'tidemark recover' puts back all origins. --include
and --exclude apply to each origin. Hooks run once: TIDEMARK_ORIGIN is the
first origin, TIDEMARK_ORIGINS all of them, separated by spaces.

With --json, each line of progress has 'origin', and the report 'instant' and
'origins', an array of objects with 'origin', 'secondary', 'copy' (the report
of that copy, or null) and 'error' (or null).")]
#[command(override_usage = "tidemark copy [OPTIONS] <ORIGIN> <SECONDARY>
       tidemark copy [OPTIONS] <ORIGIN>... <DIRECTORY>
       tidemark copy [OPTIONS] --pair <ORIGIN=SECONDARY>...
       tidemark copy [OPTIONS] --group <NAME> <DIRECTORY>")]
pub struct CopyArgs {
    /// The origin (a volume's name, a device, or a regular file) and the secondary (a device, a file, or - for an
    /// archive on standard output). Or several origins and a directory, in which each gets the file NAME.tdm (NAME.img
    /// with --format raw)
    #[arg(value_name = "ORIGIN SECONDARY", value_hint = ValueHint::AnyPath, required_unless_present = "pair",
        conflicts_with = "pair")]
    pub paths: Vec<PathBuf>,
    /// One of several origins with a secondary of its own; to be repeated. The first = separates them
    #[arg(long, value_name = "ORIGIN=SECONDARY", help_heading = "Several origins")]
    pub pair: Vec<String>,
    /// The volumes, hooks and freeze budget of this group in /etc/tidemark/groups.toml (see 'tidemark snapshot create
    /// --help'); options given here come first
    #[arg(long, value_name = "NAME", conflicts_with = "pair", help_heading = "Several origins")]
    pub group: Option<String>,
    /// Form of the secondary [default: archive where the name ends in .tdm or is -, else raw]
    #[arg(long, value_enum)]
    pub format: Option<FormatArg>,
    /// What to do with originals: what chunks held at the instant, where they were written after it [default:
    /// overlay; append for -]
    #[arg(long, value_enum)]
    pub originals: Option<OriginalsArg>,
    /// Where the COW store continues on disk: a directory, new file or block device of this machine that is
    /// not on the origin [default: /var/lib/tidemark]
    #[arg(long, value_name = "PATH|DEVICE", value_hint = ValueHint::AnyPath, help_heading = "COW store")]
    pub store: Option<PathBuf>,
    /// Largest size of the COW store [default: what the origin needs in the worst case]
    #[arg(long, value_name = "SIZE", value_parser = Bytes::parse, help_heading = "COW store")]
    pub store_size: Option<Bytes>,
    /// Size of the RAM head, the first part of the COW store; 0 for none [default: a sixteenth of the available
    /// memory, at most 256MiB]
    #[arg(long, value_name = "SIZE", value_parser = Bytes::parse, help_heading = "COW store")]
    pub store_ram: Option<Bytes>,
    /// Keep the COW store after the copy; it then has no RAM head
    #[arg(long, help_heading = "COW store")]
    pub keep_store: bool,
    /// If the store is about to fill and cannot grow: abort the copy, or hold the origin's writers, up to
    /// five seconds at a time, until the copier has caught up
    #[arg(long, value_enum, default_value = "abort", help_heading = "COW store")]
    pub on_full: OnFullArg,
    /// Longest time for which --on-full hold may hold writers in total
    #[arg(long, value_name = "TIME", value_parser = parse_time, default_value = "30s", help_heading = "COW store")]
    pub hold_budget: Duration,
    /// Unit of copy-on-write, a power of two [default: 4KiB]
    #[arg(long, value_name = "SIZE", value_parser = Bytes::parse, help_heading = "COW store")]
    pub chunk: Option<Bytes>,
    /// Unit of copying and framing, a power of two [default: 1MiB]
    #[arg(long, value_name = "SIZE", value_parser = Bytes::parse)]
    pub segment: Option<Bytes>,
    /// Also copy and preserve the free space of mounted filesystems
    #[arg(long)]
    pub all: bool,
    /// Of all files, copy only this file, all below this directory, all that match this pattern, or these bytes:
    /// /PATH, '/PATH/*.db', '*.db', bytes:START+LENGTH; with metadata, so that the copy can be mounted
    #[arg(long, value_name = "WHAT", help_heading = "Subset")]
    pub include: Vec<String>,
    /// Do not copy these files or bytes, named in the same way, even if they are included
    #[arg(long, value_name = "WHAT", help_heading = "Subset")]
    pub exclude: Vec<String>,
    /// Copy regions by their offset on the origin, or those with the most writes first; regions of the
    /// filesystems' logs always come first [default: hot; physical for an origin that is not in use]
    #[arg(long, value_enum)]
    pub order: Option<OrderArg>,
    /// Size of a region, the part of the origin that is released from copy-on-write at once when it is copied
    /// [default: a 128th of the origin, from 4MiB to 1GiB]
    #[arg(long, value_name = "SIZE", value_parser = Bytes::parse)]
    pub region: Option<Bytes>,
    /// Copy at most this many bytes per second
    #[arg(long, value_name = "SIZE", value_parser = Bytes::parse)]
    pub rate: Option<Bytes>,
    /// How far the copier is throttled to limit the latency of applications on the origin
    #[arg(long, value_enum, default_value_t = ImpactArg::from(Impact::DEFAULT))]
    pub impact: ImpactArg,
    /// Read the secondary again and compare checksums
    #[arg(long)]
    pub verify: bool,
    /// Do not wait while another copy reads from a rotating disk of the origin: both then take longer than one after
    /// the other
    #[arg(long)]
    pub no_wait: bool,
    /// Copy only what changed since this kept snapshot of the volume: into an archive that continues the archive of
    /// that snapshot, or onto a raw secondary that holds a copy of it, in place
    #[arg(long, value_name = "SNAPSHOT", help_heading = "Increments")]
    pub since: Option<String>,
    /// The archive that is continued, or a directory in which it is looked for by its identity; may be repeated
    /// [default: the directory of SECONDARY]
    #[arg(long, value_name = "PATH", value_hint = ValueHint::AnyPath, requires = "since", help_heading = "Increments")]
    pub parent: Vec<PathBuf>,
    /// How much of a raw secondary is read before it is updated, to see whether it still holds the copy: a fraction of
    /// its segments (0.05), or all [default: 0.01, but at least 459 segments]. What will be changed is read in any case
    #[arg(long, value_name = "FRACTION", value_parser = parse_sample, requires = "since", help_heading = "Increments")]
    pub sample: Option<Sample>,
    /// Longest time for which filesystems may be frozen and the origin suspended, for the instant and for
    /// restoring the origin's table [default: 2s]
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    pub freeze_budget: Option<Duration>,
    /// How long LVM commands that change the volume group have to wait, if the origin is an LVM volume
    #[arg(long, value_enum, default_value = "change")]
    pub lvm_lock: LvmLockArg,
    /// The hooks.
    #[command(flatten)]
    pub hooks: HookOptions,
    /// Confirmation.
    #[command(flatten)]
    pub consent: Consent,
}

/// About hooks, for the man pages of the commands that have them.
pub const HOOKS: &str = "\
Each hook is run with sh -c, in a process group of its own. Its output goes to standard error.

  --hook-before  before anything is frozen. If it fails, nothing is frozen or copied.
  --hook-frozen  at the instant, while the filesystems are frozen and the origin is suspended: it must not write to
                 them. If it fails, the instant is given up.
  --hook-after   after the thaw. It runs whenever --hook-before was started: also if that failed or was killed, if the
                 instant failed, and if a signal ended the command. Its failure is a warning.

Time limits: --hook-before and --hook-after are killed, with all that they started, after --hook-timeout; --hook-frozen
when the freeze budget has run out. The watchdog thaws the filesystems and resumes the origin at that time whatever
becomes of the hook or of this command. After a signal, --hook-after has ten more seconds.

A hook that copies from a disk that this command reads needs 'copy --no-wait': otherwise it waits for this command.

If this command itself is killed (SIGKILL), --hook-after does not run, unless 'tidemark resume' continues the copy. What
must not stay undone has to watch for that itself, as the ready-made hooks do.

Environment:
  TIDEMARK_ORIGIN        the device or file that is copied, or the volume (of a group, the first)
  TIDEMARK_ORIGINS       all of them, separated by spaces; of copy only if there are several
  TIDEMARK_ORIGIN_BELOW  --hook-frozen of copy only: the device to read, since the origin is suspended
  TIDEMARK_ORIGINS_BELOW of several origins, all of these, in the order of TIDEMARK_ORIGINS
  TIDEMARK_HOOK          before, frozen or after
  TIDEMARK_PID           the process of this command

Ready-made hooks are in /usr/lib/tidemark/hooks. Each explains itself at its top, and if it is run without arguments.
They end what they began by themselves if this command is killed, and at a limit (--limit SECONDS).
  postgresql before|after  PostgreSQL in backup mode: a checkpoint right before the instant, and the labels of a base
                           backup (--labels DIR). A copy of all of a server's data at one instant needs neither: to
                           PostgreSQL it is a power cut, from which it recovers by design
  mariadb before|after     MariaDB in BACKUP STAGE BLOCK_COMMIT: tables without transactions (MyISAM, Aria) are whole.
                           InnoDB alone needs no hook. Commits wait from before to after
  redis before             a fresh dump. Not needed with an append-only file
  qemu-guest before|after  the filesystems of a virtual machine frozen by its guest agent (--socket PATH)
  systemd-unit before|after
                           units stopped, and those started again that were active (--unit NAME)";

/// `tidemark resume`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "Examples:
  tidemark status
  tidemark resume
  tidemark resume 3f2a

The instant stays the same, and nothing that is on the secondary is copied
again. A copy can be resumed as long as the kernel's snapshot exists: not
after a reboot, and not after 'tidemark recover' (which gives up the copy).
A copy to a pipe cannot be resumed. If the secondary does not answer for
20 s, resume is refused, and the copy stays as it was.")]
pub struct ResumeArgs {
    /// The job's id, or its beginning [default: the only copy that can be resumed]
    #[arg(value_name = "JOB")]
    pub job: Option<String>,
    /// Make all checks, including the secondary's identity, show what would be done, and change nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// `--format`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FormatArg {
    /// Byte for byte, like the origin
    Raw,
    /// Checksummed segments, sparse, restored by `tidemark restore`
    Archive,
}

/// `--order`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OrderArg {
    /// By their offset on the origin
    Physical,
    /// Those with the most writes first
    Hot,
}

/// `--on-full`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnFullArg {
    /// Abort the copy; the origin stays in use
    Abort,
    /// Hold the origin's writers, up to five seconds at a time
    Hold,
}

/// `--lvm-lock`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LvmLockArg {
    /// While the volume's table is changed; a command that changes the volume in between makes the copy fail
    Change,
    /// Until the copy ends; while such a command waits, lvs and similar commands wait too
    Copy,
}

/// `--originals`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OriginalsArg {
    /// Apply originals to the copied data
    Overlay,
    /// Append originals to the archive, and let restore apply them (archives only)
    Append,
}

/// `--impact`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ImpactArg {
    /// I/O of applications takes at most a quarter longer than without the copier, as far as throttling helps
    Low,
    /// I/O of applications takes at most twice as long, as far as throttling helps
    Medium,
    /// The copier reads as fast as it can
    None,
}

impl From<Impact> for ImpactArg {
    fn from(impact: Impact) -> Self {
        match impact {
            Impact::Low => Self::Low,
            Impact::Medium => Self::Medium,
            Impact::None => Self::None,
        }
    }
}

impl From<ImpactArg> for Impact {
    fn from(impact: ImpactArg) -> Self {
        match impact {
            ImpactArg::Low => Self::Low,
            ImpactArg::Medium => Self::Medium,
            ImpactArg::None => Self::None,
        }
    }
}

/// `tidemark status`.
#[derive(Clone, Copy, Debug, Args)]
#[command(after_help = "Examples:
  tidemark status
  tidemark status --watch
  tidemark status --watch --interval 10s --count 6 --json")]
pub struct StatusArgs {
    /// Exit with status 1 if a snapshot is lost, if its store is nearly full, or if stores are not monitored
    #[arg(long, conflicts_with = "watch")]
    pub check: bool,
    /// Repeat until interrupted
    #[arg(long)]
    pub watch: bool,
    /// Time between two reports [default: 2s]
    #[arg(long, value_name = "TIME", value_parser = parse_time, requires = "watch")]
    pub interval: Option<Duration>,
    /// Stop after this many reports
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), requires = "watch")]
    pub count: Option<u64>,
}

/// `tidemark attach`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "Examples:
  tidemark attach /dev/sdb1 --name data
  tidemark attach /dev/sdb1 --name data --install-unit")]
pub struct AttachArgs {
    /// The block device, not mounted
    #[arg(value_hint = ValueHint::AnyPath)]
    pub device: PathBuf,
    /// The volume's name: the device is used as /dev/mapper/NAME from now on
    #[arg(long, value_name = "NAME")]
    pub name: String,
    /// Write a systemd unit that attaches it at every boot
    #[arg(long)]
    pub install_unit: bool,
}

/// `tidemark detach`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "Examples:
  tidemark detach data
  tidemark detach data --keep-snapshots")]
pub struct DetachArgs {
    /// The volume's name
    pub name: String,
    /// Detach a volume that has snapshots: attaching it again puts them together, if nothing has written to the
    /// device meanwhile
    #[arg(long)]
    pub keep_snapshots: bool,
    /// Leave the systemd unit in place: for its own ExecStop
    #[arg(long)]
    pub keep_unit: bool,
}

/// `tidemark restore`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "Examples:
  tidemark restore data.tdm /dev/sdc --yes
  tidemark restore data.tdm data.img
  ssh backup 'cat home.tdm' | tidemark restore - /dev/vg0/home --yes")]
pub struct RestoreArgs {
    /// The archive, or - for standard input
    #[arg(value_name = "ARCHIVE|-", value_hint = ValueHint::FilePath)]
    pub archive: PathBuf,
    /// The block device or file to restore to
    #[arg(value_name = "DEVICE|FILE", value_hint = ValueHint::AnyPath)]
    pub target: PathBuf,
    /// What the archive was made from
    #[command(flatten)]
    pub parents: ParentArgs,
    /// Confirmation.
    #[command(flatten)]
    pub consent: Consent,
}

/// `tidemark verify`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "Examples:
  tidemark verify data.tdm
  tidemark verify data.tdm --against /dev/sdc")]
pub struct VerifyArgs {
    /// The archive, or - for standard input; or a raw secondary that increments can update, which is compared with what
    /// was recorded of it
    #[arg(value_name = "ARCHIVE", value_hint = ValueHint::FilePath)]
    pub archive: PathBuf,
    /// Also compare the archive with this device or file
    #[arg(long, value_name = "DEVICE|FILE", value_hint = ValueHint::AnyPath)]
    pub against: Option<PathBuf>,
    /// What the archive was made from
    #[command(flatten)]
    pub parents: ParentArgs,
}

/// Where the parents of an increment are.
#[derive(Clone, Debug, Args)]
pub struct ParentArgs {
    /// An archive that ARCHIVE, an increment, continues, or a directory in which such archives are looked for by their
    /// identity; may be repeated [default: the directory of ARCHIVE]
    #[arg(long, value_name = "PATH", value_hint = ValueHint::AnyPath)]
    pub parent: Vec<PathBuf>,
}

/// `tidemark archive`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "Examples:
  tidemark archive merge friday.tdm week.tdm")]
#[command(subcommand_required = true, arg_required_else_help = false, disable_help_subcommand = true)]
pub struct ArchiveArgs {
    /// The command
    #[command(subcommand)]
    pub command: ArchiveCommand,
}

/// The commands of `tidemark archive`.
#[derive(Clone, Debug, Subcommand)]
pub enum ArchiveCommand {
    /// Make one whole archive of an increment and the archives that it continues
    #[command(after_help = "Examples:
  tidemark archive merge friday.tdm week.tdm
  tidemark archive merge friday.tdm week.tdm --parent /backup/old --dry-run

The archives of the chain stay as they are. Increments that continue ARCHIVE
can be restored with the new archive as well, if ARCHIVE is of a kept
snapshot.")]
    Merge(MergeArgs),
}

/// `tidemark archive merge`.
#[derive(Clone, Debug, Args)]
pub struct MergeArgs {
    /// The increment whose content the new archive gets
    #[arg(value_name = "ARCHIVE", value_hint = ValueHint::FilePath)]
    pub archive: PathBuf,
    /// The new archive
    #[arg(value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub merged: PathBuf,
    /// What the archive was made from
    #[command(flatten)]
    pub parents: ParentArgs,
    /// Confirmation.
    #[command(flatten)]
    pub consent: Consent,
}

/// `tidemark inspect`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "Examples:
  tidemark inspect data.tdm
  tidemark inspect data.tdm --json")]
pub struct InspectArgs {
    /// The archive, or a raw secondary that increments can update
    #[arg(value_hint = ValueHint::FilePath)]
    pub archive: PathBuf,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definitions_are_sound() {
        Cli::command().debug_assert();
    }
}
