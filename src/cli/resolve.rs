//! Turns arguments into requests: fills in defaults and rejects contradictions, once.
//!
//! Uses only the arguments: whether the system can execute the request is checked by `op`. One exception: the last of
//! more than two names has to be a directory, because a surplus name is an error of the command line.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::args::{
    AttachArgs, CopyArgs, DetachArgs, FormatArg, InspectArgs, LvmLockArg, MergeArgs, OnFullArg, OrderArg,
    OriginalsArg, RestoreArgs, StatusArgs, VerifyArgs,
};
use super::groups::{self, Group};
use crate::base::{Bytes, ChunkSize, Error, Result, SegmentSize};
use crate::copy::Order;
use crate::format::SecondaryForm;
use crate::op::attach::check_name;
use crate::op::copy::plan::check_units;
use crate::op::request::{
    AttachRequest, CopyRequest, DetachRequest, InspectRequest, MergeRequest, OnFull, Originals,
    RestoreRequest, StoreRequest, VerifyRequest,
};
use crate::restore::ArchiveSource;
use crate::secondary::SecondaryTarget;
use crate::topology::check_answers;
use crate::volume::lvm_lock::LvmScope;
use crate::volume::subset::{Selector, Subset};

/// The extension that makes a secondary an archive by default.
const ARCHIVE_EXTENSION: &str = "tdm";

/// Longest time of a freeze, if neither the command line nor the group says otherwise.
pub const FREEZE_BUDGET: Duration = Duration::from_secs(2);

/// Default interval of `status --watch`, as for watch(1).
const WATCH_INTERVAL: Duration = Duration::from_secs(2);

/// Shortest interval: each status costs system calls.
const WATCH_INTERVAL_MIN: Duration = Duration::from_millis(100);

fn is_dash(path: &Path) -> bool {
    path.as_os_str() == "-"
}

/// True if the secondary is `-`: standard output then carries the archive.
#[must_use]
pub fn is_pipe(args: &CopyArgs) -> bool {
    matches!(args.paths.as_slice(), [_, secondary] if is_dash(secondary))
}

/// `tidemark copy`: a request for each origin.
///
/// # Errors
/// [`ErrorKind::Usage`](crate::base::ErrorKind::Usage) for values out of range and for contradictory options;
/// as [`groups::find`].
pub fn copy(args: &CopyArgs) -> Result<Vec<CopyRequest>> {
    if args.group.is_some() && args.paths.len() != 1 {
        return Err(Error::usage("--group needs one directory for the copies, and no origin"));
    }
    let group = args.group.as_deref().map(groups::find).transpose()?;
    let pairs = pairs_of(args, group.as_ref())?;
    let group = group.unwrap_or_default();
    pairs.iter().map(|(origin, secondary)| copy_of(args, &group, origin, secondary)).collect()
}

/// The origins, each with its secondary.
fn pairs_of(args: &CopyArgs, group: Option<&Group>) -> Result<Vec<(PathBuf, PathBuf)>> {
    if !args.pair.is_empty() {
        return args.pair.iter().map(|pair| parse_pair(pair)).collect();
    }
    match (args.paths.as_slice(), group) {
        ([directory], Some(group)) => in_directory(args, &group.volumes, directory),
        ([origin, secondary], None) => Ok(vec![(origin.clone(), secondary.clone())]),
        ([origins @ .., directory], None) if origins.len() > 1 => in_directory(args, origins, directory),
        _ => Err(Error::usage("a copy needs an origin and a secondary").next("see 'tidemark copy --help'")),
    }
}

/// `ORIGIN=SECONDARY`.
fn parse_pair(text: &str) -> Result<(PathBuf, PathBuf)> {
    let (origin, secondary) = text.split_once('=').ok_or_else(|| {
        Error::usage(format!("--pair {text}: there is no =")).next("write ORIGIN=SECONDARY")
    })?;
    reject_dash(Path::new(secondary), "the secondary of one of several origins")?;
    Ok((origin.into(), secondary.into()))
}

/// Each of `origins` with a file in `directory`.
fn in_directory(args: &CopyArgs, origins: &[PathBuf], directory: &Path) -> Result<Vec<(PathBuf, PathBuf)>> {
    reject_dash(directory, "the directory for several copies")?;
    check_answers(directory)?;
    if !directory.is_dir() {
        return Err(Error::usage(format!(
            "{} is not a directory: several origins need one",
            directory.display()
        ))
        .next("name a directory, or the secondaries with --pair ORIGIN=SECONDARY"));
    }
    let end = if args.format == Some(FormatArg::Raw) { "img" } else { ARCHIVE_EXTENSION };
    let mut pairs: Vec<(PathBuf, PathBuf)> = Vec::new();
    for origin in origins {
        reject_dash(origin, "the origin")?;
        let mut name = origin.file_name().unwrap_or_default().to_owned();
        name.push(format!(".{end}"));
        let secondary = directory.join(name);
        if let Some((other, _)) = pairs.iter().find(|(_, known)| *known == secondary) {
            return Err(Error::usage(format!(
                "{} and {} would both be copied to {}",
                other.display(),
                origin.display(),
                secondary.display()
            ))
            .next("name the secondaries with --pair ORIGIN=SECONDARY"));
        }
        pairs.push((origin.clone(), secondary));
    }
    Ok(pairs)
}

/// The request for one origin.
fn copy_of(args: &CopyArgs, group: &Group, origin: &Path, secondary: &Path) -> Result<CopyRequest> {
    reject_dash(origin, "the origin")?;
    let format = format_of(args, secondary);
    let originals = originals_of(args, format)?;
    if is_pipe(args) && args.verify {
        return Err(Error::usage("--verify cannot read back what was written to standard output")
            .next("omit --verify, and run 'tidemark verify' where the archive is stored"));
    }
    let chunk = args.chunk.map(ChunkSize::new).transpose()?.unwrap_or_default();
    let segment = args.segment.map(SegmentSize::new).transpose()?;
    check_units(segment.unwrap_or_default(), chunk)?;
    reject_zero(args.rate, "--rate")?;
    reject_zero(args.region, "--region")?;
    Ok(CopyRequest {
        origin: origin.to_owned(),
        secondary: target_of(secondary),
        format,
        originals,
        store: store_of(args)?,
        chunk,
        segment,
        region: args.region,
        order: args.order.map(|order| match order {
            OrderArg::Physical => Order::Physical,
            OrderArg::Hot => Order::Hot,
        }),
        all: args.all,
        subset: subset_of(&args.include, &args.exclude)?,
        on_full: match args.on_full {
            OnFullArg::Abort => OnFull::Abort,
            OnFullArg::Hold => OnFull::Hold,
        },
        hold_budget: args.hold_budget,
        rate: args.rate,
        impact: args.impact.into(),
        verify: args.verify,
        waits_for_disks: !args.no_wait,
        freeze_budget: args.freeze_budget.or(group.freeze_budget).unwrap_or(FREEZE_BUDGET),
        lvm_lock: match args.lvm_lock {
            LvmLockArg::Change => LvmScope::Change,
            LvmLockArg::Copy => LvmScope::Copy,
        },
        hooks: args.hooks.or(&group.hooks),
        since: args.since.clone(),
        parents: args.parent.clone(),
        sample: args.sample,
        replace: args.consent.yes,
    })
    .and_then(reject_raw_pipe)
    .and_then(reject_sample_of_archive)
    .and_then(reject_hook_under_lock)
}

/// What of an origin `--include` and `--exclude` choose.
///
/// # Errors
/// As [`Selector::parse`].
pub(super) fn subset_of(include: &[String], exclude: &[String]) -> Result<Subset> {
    Ok(Subset { include: selectors("--include", include)?, exclude: selectors("--exclude", exclude)? })
}

/// The files and bytes that `option` names.
///
/// # Errors
/// As [`Selector::parse`].
pub(super) fn selectors(option: &str, texts: &[String]) -> Result<Vec<Selector>> {
    texts.iter().map(|text| Selector::parse(text).map_err(|error| error.context(option))).collect()
}

/// The hook's LVM commands would wait for the copy, while the copy waits for the hook.
fn reject_hook_under_lock(request: CopyRequest) -> Result<CopyRequest> {
    if request.lvm_lock == LvmScope::Copy && request.hooks.after.is_some() {
        return Err(Error::usage(
            "--lvm-lock copy cannot be used with --hook-after: LVM commands of the hook would wait for the \
             end of the copy",
        )
        .next("use --lvm-lock change, or run the command after the copy"));
    }
    Ok(request)
}

fn reject_sample_of_archive(request: CopyRequest) -> Result<CopyRequest> {
    if request.sample.is_some() && request.format == SecondaryForm::Archive {
        return Err(Error::usage("--sample is of a raw secondary, and this increment is an archive")
            .next("omit --sample: archives are checked as they are read"));
    }
    Ok(request)
}

fn reject_raw_pipe(request: CopyRequest) -> Result<CopyRequest> {
    if request.secondary == SecondaryTarget::Pipe && request.format == SecondaryForm::Raw {
        return Err(Error::usage(
            "--format raw cannot go to standard output: originals are not known until all data has been read",
        )
        .next("use --format archive for -, and 'tidemark restore - FILE' at the other end"));
    }
    Ok(request)
}

fn format_of(args: &CopyArgs, secondary: &Path) -> SecondaryForm {
    match args.format {
        Some(FormatArg::Raw) => SecondaryForm::Raw,
        Some(FormatArg::Archive) => SecondaryForm::Archive,
        None if is_pipe(args) => SecondaryForm::Archive,
        None if secondary.extension().is_some_and(|end| end == ARCHIVE_EXTENSION) => SecondaryForm::Archive,
        None => SecondaryForm::Raw,
    }
}

fn originals_of(args: &CopyArgs, format: SecondaryForm) -> Result<Originals> {
    match args.originals {
        Some(OriginalsArg::Append) if format == SecondaryForm::Raw => {
            Err(Error::usage("--originals append needs an archive: a raw secondary has no place for them")
                .next("use --format archive, or --originals overlay"))
        }
        Some(OriginalsArg::Overlay) if is_pipe(args) => {
            Err(Error::usage("--originals overlay cannot be used with -: a pipe cannot be written again")
                .next("use --originals append, the default for -"))
        }
        Some(OriginalsArg::Overlay) if args.since.is_some() && format == SecondaryForm::Archive => {
            Err(Error::usage(
                "--originals overlay cannot be used with --since: what an increment has packed is not rewritten",
            )
            .next("use --originals append, the default with --since"))
        }
        Some(OriginalsArg::Append) => Ok(Originals::Append),
        None if is_pipe(args) => Ok(Originals::Append),
        None if args.since.is_some() && format == SecondaryForm::Archive => Ok(Originals::Append),
        Some(OriginalsArg::Overlay) | None => Ok(Originals::Overlay),
    }
}

fn store_of(args: &CopyArgs) -> Result<StoreRequest> {
    if let Some(store) = &args.store {
        reject_dash(store, "the store")?;
    }
    reject_zero(args.store_size, "--store-size")?;
    let ram = match args.store_ram {
        Some(ram) if args.keep_store && ram > Bytes::ZERO => {
            return Err(Error::usage(
                "--keep-store and --store-ram contradict each other: memory cannot be kept",
            )
            .next("omit --store-ram, or set it to 0"));
        }
        None if args.keep_store => Some(Bytes::ZERO),
        ram => ram,
    };
    if let (Some(ram), Some(size)) = (ram, args.store_size)
        && ram > size
    {
        return Err(Error::usage(format!("--store-ram {ram} is larger than --store-size {size}"))
            .next("the RAM head is a part of the store: make it smaller, or the store larger"));
    }
    Ok(StoreRequest { tail: args.store.clone(), size_max: args.store_size, ram, keep: args.keep_store })
}

fn reject_zero(size: Option<Bytes>, option: &str) -> Result<()> {
    if size == Some(Bytes::ZERO) {
        return Err(Error::usage(format!("{option} must not be 0")));
    }
    Ok(())
}

pub fn reject_dash(path: &Path, what: &str) -> Result<()> {
    if path.as_os_str().is_empty() {
        return Err(Error::usage(format!("{what} is an empty name")));
    }
    if is_dash(path) {
        return Err(Error::usage(format!("{what} cannot be -")).next("name a file or a device"));
    }
    Ok(())
}

fn target_of(path: &Path) -> SecondaryTarget {
    if is_dash(path) { SecondaryTarget::Pipe } else { SecondaryTarget::Path(path.to_owned()) }
}

fn source_of(path: &Path) -> ArchiveSource {
    if is_dash(path) { ArchiveSource::Pipe } else { ArchiveSource::Path(path.to_owned()) }
}

/// How often `status --watch` prints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WatchSettings {
    /// Time between two reports.
    pub interval: Duration,
    /// How many reports; None: until interrupted.
    pub count: Option<u64>,
}

/// `tidemark status --watch`, or None for a single report.
///
/// # Errors
/// [`ErrorKind::Usage`](crate::base::ErrorKind::Usage) for an interval below [`WATCH_INTERVAL_MIN`].
pub fn status(args: &StatusArgs) -> Result<Option<WatchSettings>> {
    let interval = args.interval.unwrap_or(WATCH_INTERVAL);
    if interval < WATCH_INTERVAL_MIN {
        return Err(Error::usage(format!(
            "--interval of {interval:?} is too short: the status changes only twice a second"
        ))
        .next(format!("use {WATCH_INTERVAL_MIN:?} or more")));
    }
    Ok(args.watch.then_some(WatchSettings { interval, count: args.count }))
}

/// `tidemark attach`.
///
/// # Errors
/// [`ErrorKind::Usage`](crate::base::ErrorKind::Usage) for a bad name.
pub fn attach(args: &AttachArgs) -> Result<AttachRequest> {
    reject_dash(&args.device, "the device")?;
    check_name(&args.name)?;
    Ok(AttachRequest {
        device: args.device.clone(),
        name: args.name.clone(),
        install_unit: args.install_unit,
    })
}

/// `tidemark detach`.
///
/// # Errors
/// [`ErrorKind::Usage`](crate::base::ErrorKind::Usage) for a bad name.
pub fn detach(args: &DetachArgs) -> Result<DetachRequest> {
    let name = volume_name(&args.name)?;
    Ok(DetachRequest {
        name: name.to_owned(),
        keep_snapshots: args.keep_snapshots,
        keep_unit: args.keep_unit,
    })
}

/// A volume's name, typed with or without /dev/mapper/.
///
/// # Errors
/// [`ErrorKind::Usage`](crate::base::ErrorKind::Usage) for a bad name.
pub fn volume_name(typed: &str) -> Result<&str> {
    let name = typed.strip_prefix("/dev/mapper/").unwrap_or(typed);
    check_name(name).map(|()| name)
}

/// `tidemark restore`.
///
/// # Errors
/// [`ErrorKind::Usage`](crate::base::ErrorKind::Usage) for `-` as the target.
pub fn restore(args: &RestoreArgs) -> Result<RestoreRequest> {
    reject_dash(&args.target, "the target")?;
    Ok(RestoreRequest {
        archive: source_of(&args.archive),
        target: args.target.clone(),
        parents: args.parents.parent.clone(),
        replace: args.consent.yes,
    })
}

/// `tidemark verify`.
///
/// # Errors
/// [`ErrorKind::Usage`](crate::base::ErrorKind::Usage) for `-` as the file to compare with.
pub fn verify(args: &VerifyArgs) -> Result<VerifyRequest> {
    if let Some(against) = &args.against {
        reject_dash(against, "--against")?;
    }
    Ok(VerifyRequest {
        archive: source_of(&args.archive),
        against: args.against.clone(),
        parents: args.parents.parent.clone(),
    })
}

/// `tidemark archive merge`.
///
/// # Errors
/// [`ErrorKind::Usage`](crate::base::ErrorKind::Usage) for `-`: parents are found beside a file.
pub fn merge(args: &MergeArgs) -> Result<MergeRequest> {
    reject_dash(&args.archive, "the archive")?;
    reject_dash(&args.merged, "the new archive")?;
    Ok(MergeRequest {
        archive: args.archive.clone(),
        merged: args.merged.clone(),
        parents: args.parents.parent.clone(),
        replace: args.consent.yes,
    })
}

/// `tidemark inspect`.
///
/// # Errors
/// [`ErrorKind::Usage`](crate::base::ErrorKind::Usage) for `-`, as the index is at the end of an archive.
pub fn inspect(args: &InspectArgs) -> Result<InspectRequest> {
    reject_dash(&args.archive, "the archive")?;
    Ok(InspectRequest { archive: PathBuf::from(&args.archive) })
}

#[cfg(test)]
mod tests {
    use clap::{Args, Command, FromArgMatches};

    use super::*;
    use crate::base::ErrorKind;

    fn parse<T: Args + FromArgMatches>(line: &str) -> T {
        let words = std::iter::once("tidemark").chain(line.split_whitespace());
        let matches = T::augment_args(Command::new("tidemark")).try_get_matches_from(words).unwrap();
        T::from_arg_matches(&matches).unwrap()
    }

    fn one(line: &str) -> Result<CopyRequest> {
        copy(&parse(line)).map(|mut requests| requests.remove(0))
    }

    #[test]
    fn several_origins_have_a_secondary_each() {
        let pairs = |line: &str| -> Vec<String> {
            let requests = copy(&parse(line)).unwrap();
            let shown = |request: &CopyRequest| match &request.secondary {
                SecondaryTarget::Path(path) => {
                    format!("{} to {} {:?}", request.origin.display(), path.display(), request.format)
                }
                SecondaryTarget::Pipe => unreachable!(),
            };
            requests.iter().map(shown).collect()
        };
        assert_eq!(
            pairs("data /dev/vg/wal /tmp"),
            ["data to /tmp/data.tdm Archive", "/dev/vg/wal to /tmp/wal.tdm Archive"]
        );
        assert_eq!(
            pairs("data wal /tmp --format raw"),
            ["data to /tmp/data.img Raw", "wal to /tmp/wal.img Raw"]
        );
        assert_eq!(
            pairs("--pair data=/dev/sdc --pair wal=w=x.tdm"),
            ["data to /dev/sdc Raw", "wal to w=x.tdm Archive"]
        );
        for line in [
            "data",
            "data wal -",
            "data - /tmp",
            "data wal /tmp/tidemark-test-no-such-directory",
            "/dev/a/home /dev/b/home /tmp",
            "--pair data",
            "--pair data=-",
            "--pair data=",
        ] {
            assert_eq!(copy(&parse(line)).unwrap_err().kind(), ErrorKind::Usage, "{line}");
        }
    }

    #[test]
    fn format_and_originals_default_by_name() {
        use Originals::{Append, Overlay};
        use SecondaryForm::{Archive, Raw};
        for (line, format, originals) in [
            ("data out.img", Raw, Overlay),
            ("data out.tdm", Archive, Overlay),
            ("data out.tdm --format raw", Raw, Overlay),
            ("data out.img --format archive --originals append", Archive, Append),
            ("data -", Archive, Append),
            ("data - --originals append", Archive, Append),
            ("data /dev/sdc", Raw, Overlay),
        ] {
            let request = one(line).unwrap();
            assert_eq!((request.format, request.originals), (format, originals), "{line}");
        }
    }

    #[test]
    fn contradictions_are_usage_errors() {
        for line in [
            "data - --format raw",
            "data - --originals overlay",
            "data - --verify",
            "data out.img --originals append",
            "data out.tdm --format raw --originals append",
            "data out.img --keep-store --store-ram 64M",
            "data out.img --store-ram 2G --store-size 1G",
            "data out.img --store-size 0",
            "data out.img --rate 0",
            "data out.img --chunk 3000",
            "data out.img --segment 100K",
            "data out.img --chunk 1M --segment 64K",
            "data out.img --store -",
            "- out.img",
        ] {
            let error = one(line).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Usage, "{line}: {error}");
        }
    }

    #[test]
    fn status_runs_once_without_watch() {
        assert_eq!(status(&parse("")).unwrap(), None);
        let looks = |line: &str| status(&parse(line)).map(Option::unwrap);
        assert_eq!(looks("--watch").unwrap(), WatchSettings { interval: WATCH_INTERVAL, count: None });
        let expected = WatchSettings { interval: Duration::from_millis(500), count: Some(3) };
        assert_eq!(looks("--watch --interval 500ms --count 3").unwrap(), expected);
        assert_eq!(looks("--watch --interval 99ms").unwrap_err().kind(), ErrorKind::Usage);
    }

    #[test]
    fn the_impact_is_what_was_asked_for() {
        use crate::copy::Impact;
        for (line, impact) in [
            ("data out.img", Impact::DEFAULT),
            ("data out.img --impact low", Impact::Low),
            ("data out.img --impact medium", Impact::Medium),
            ("data out.img --impact none --rate 1M", Impact::None),
        ] {
            assert_eq!(one(line).unwrap().impact, impact, "{line}");
        }
    }

    #[test]
    fn a_sample_is_of_a_raw_secondary() {
        use crate::copy::sample::Sample;
        let raw = |line| one(line).unwrap();
        assert_eq!(raw("data out.img --since mon").sample, None);
        assert_eq!(raw("data out.img --since mon --sample all").sample, Some(Sample::All));
        assert_eq!(raw("data /dev/x --since mon --sample 0.05").sample, Some(Sample::Millionths(50_000)));
        assert_eq!(raw("data /dev/x --since mon").originals, Originals::Overlay);
        let error = copy(&parse("data out.tdm --since mon --sample all")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage);
    }

    #[test]
    fn a_kept_store_has_no_ram_head() {
        assert_eq!(one("data out.img --keep-store").unwrap().store.ram, Some(Bytes::ZERO));
        assert_eq!(one("data out.img").unwrap().store.ram, None);
    }

    #[test]
    fn volume_names_are_checked() {
        for name in ["data", "a", "vg-data_1.2", "9"] {
            let args = AttachArgs { device: "/dev/x".into(), name: name.into(), install_unit: false };
            assert_eq!(attach(&args).unwrap().name, name);
        }
        let long = "x".repeat(65);
        for name in ["", ".", "..", "-x", "a/b", "a b", "ä", "a\n", "control", &long] {
            let args = AttachArgs { device: "/dev/x".into(), name: name.into(), install_unit: false };
            assert_eq!(attach(&args).unwrap_err().kind(), ErrorKind::Usage, "{name}");
        }
        assert_eq!(
            detach(&DetachArgs { name: "/dev/mapper/data".into(), keep_snapshots: false, keep_unit: false })
                .unwrap()
                .name,
            "data"
        );
    }

    #[test]
    fn dashes_are_pipes_only_where_they_can_be() {
        assert_eq!(restore(&parse("- out.img")).unwrap().archive, ArchiveSource::Pipe);
        assert_eq!(restore(&parse("in.tdm -")).unwrap_err().kind(), ErrorKind::Usage);
        assert_eq!(inspect(&parse("-")).unwrap_err().kind(), ErrorKind::Usage);
        assert_eq!(verify(&parse("-")).unwrap().archive, ArchiveSource::Pipe);
    }
}
