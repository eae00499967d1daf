//! What does an origin's table look like while it is being copied?
//!
//! Invariants of [`origin_table`]: every sector is under exactly one line; what is neither free nor
//! released is under `snapshot-origin`, so the first write to it preserves its original; the rest is
//! `linear` at the same offset, as far as the number of lines allows. Every doubt, an extent that is
//! cut within a sector or reaches behind the end, goes to the side of `snapshot-origin`: that costs
//! time, never an original.
//!
//! Both kinds of line pass sectors through unshifted, so that a table can be replaced by another of
//! the same device at any time, with I/O in flight.

use crate::base::limits::{ORIGIN_TABLE_FREE_RUNS_MAX, ORIGIN_TABLE_LINES_MAX};
use crate::base::units::SECTOR_BYTES;
use crate::base::{Bytes, DeviceNumber, Result, Sectors};
use crate::extent::{Extent, ExtentSet};

use super::table::{LINES_MAX, Table};
use super::target::Target;

/// What bounds a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LineLimits {
    /// Runs of free ranges alone that stay `linear`. Every line costs every flush: device-mapper sends an
    /// empty flush to each of them, where one of their targets is not known to pass it on once (Linux
    /// 6.12 knows that of `linear`, not of `snapshot-origin`; before 6.11 of none).
    pub free_runs: usize,
    /// Lines, at least 1.
    pub lines: usize,
}

impl Default for LineLimits {
    fn default() -> Self {
        Self { free_runs: ORIGIN_TABLE_FREE_RUNS_MAX, lines: ORIGIN_TABLE_LINES_MAX }
    }
}

/// The table of an origin of `length` over `real`. `free` is what nobody needs, `released` what is on
/// the secondary already. Where there would be more runs or lines than `limits` allow, the smallest runs of
/// free ranges alone become `snapshot-origin`; when none is left, the smallest of the other runs.
///
/// A released range that is given up preserves originals again, and these are not the instant's:
/// nobody may take originals of a released range from the store.
///
/// # Errors
/// As [`Table::new`], for a length of 0 or one that no device can have.
pub fn origin_table(
    length: Sectors,
    real: DeviceNumber,
    free: &[Extent],
    released: &[Extent],
    limits: LineLimits,
) -> Result<Table> {
    let released: ExtentSet = released.iter().filter_map(|extent| whole_sectors(*extent, length)).collect();
    let mut linear: ExtentSet = free.iter().filter_map(|extent| whole_sectors(*extent, length)).collect();
    linear.extend(released.iter());
    let limits = LineLimits { lines: limits.lines.clamp(1, LINES_MAX), ..limits };
    give_up(&mut linear, &released, length, limits);
    let end = length.checked_bytes().unwrap_or(Bytes::ZERO);
    let mut parts: Vec<(Extent, bool)> = linear.iter().map(|extent| (extent, true)).collect();
    if let Some(whole) = Extent::new(Bytes::ZERO, end) {
        parts.extend(linear.gaps_in(whole).map(|extent| (extent, false)));
    }
    parts.sort_unstable();
    let lines = parts.into_iter().map(|(extent, is_linear)| {
        let (start, length) = (sectors(extent.start()), sectors(extent.length()));
        let through = Target::Linear { device: real, offset: start };
        (length, if is_linear { through } else { Target::SnapshotOrigin { device: real } })
    });
    Table::concatenated(lines)
}

/// True where every line of `table` is one that [`origin_table`] writes over `real`: `linear` at the same
/// offset, or `snapshot-origin`.
#[must_use]
pub fn is_over(table: &Table, real: DeviceNumber) -> bool {
    table.lines().iter().all(|line| match line.target {
        Target::Linear { device, offset } => device == real && offset == line.start,
        Target::SnapshotOrigin { device } => device == real,
        _ => false,
    })
}

/// What a write still preserves: the ranges of `table` that are `snapshot-origin` over `real`, in order,
/// no two touching.
#[must_use]
pub fn preserved(table: &Table, real: DeviceNumber) -> Vec<Extent> {
    let is_preserved = |target: &Target| *target == Target::SnapshotOrigin { device: real };
    let lines = table.lines().iter().filter(|line| is_preserved(&line.target));
    let extents = lines.filter_map(|line| Extent::with_length(line.start.bytes(), line.length.bytes()));
    extents.collect::<ExtentSet>().iter().collect()
}

/// The whole sectors of `extent` that the device has.
fn whole_sectors(extent: Extent, length: Sectors) -> Option<Extent> {
    let extent = extent.intersection(Extent::new(Bytes::ZERO, length.checked_bytes()?)?)?;
    // No overflow: the end of a device is a multiple of a sector, so what is rounded up stays below it.
    Extent::new(extent.start().align_up(Bytes(SECTOR_BYTES)), extent.end().align_down(Bytes(SECTOR_BYTES)))
}

fn sectors(bytes: Bytes) -> Sectors {
    bytes.to_sectors("a line").expect("extents were cut at whole sectors, and so are the gaps between them")
}

/// Takes runs out of `linear` until the table is within `limits`.
fn give_up(linear: &mut ExtentSet, released: &ExtentSet, length: Sectors, limits: LineLimits) {
    // Runs do not touch, so on either side of each is a line of the other kind, or the device's end. Taking
    // a run out joins it with these: it saves as many lines as it has neighbours, whatever else is taken out.
    let saved = |run: Extent| {
        usize::from(run.start() > Bytes::ZERO) + usize::from(Some(run.end()) != length.checked_bytes())
    };
    let mut lines = 1 + linear.iter().map(saved).sum::<usize>();
    let is_free_alone = |run: &Extent| released.intersection_with(*run).next().is_none();
    let mut runs: Vec<Extent> = linear.iter().collect();
    let mut free_runs = runs.iter().filter(|run| is_free_alone(run)).count();
    runs.sort_by_key(|run| (!is_free_alone(run), run.length(), run.start()));
    for run in runs {
        if lines <= limits.lines && free_runs <= limits.free_runs {
            break;
        }
        lines -= saved(run);
        free_runs = free_runs.saturating_sub(1);
        linear.remove(run);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const REAL: DeviceNumber = DeviceNumber { major: 253, minor: 7 };
    const OTHER: DeviceNumber = DeviceNumber { major: 253, minor: 8 };

    const PLENTY: LineLimits = LineLimits { free_runs: 1000, lines: 1000 };

    fn limits() -> impl Strategy<Value = LineLimits> {
        (0usize..6, 1usize..12).prop_map(|(free_runs, lines)| LineLimits { free_runs, lines })
    }

    /// The runs of `linear` lines.
    fn linear(table: &Table) -> Vec<Extent> {
        let lines = table.lines().iter().filter(|line| matches!(line.target, Target::Linear { .. }));
        lines.map(|line| Extent::with_length(line.start.bytes(), line.length.bytes()).unwrap()).collect()
    }

    fn extents(within: u64) -> impl Strategy<Value = Vec<Extent>> {
        let one = (0..within * SECTOR_BYTES, 1..within * SECTOR_BYTES / 4, any::<bool>());
        let extent = one.prop_map(|(start, length, aligned)| {
            let unit = if aligned { SECTOR_BYTES } else { 1 };
            let start = start / unit * unit;
            Extent::with_length(Bytes(start), Bytes(length.next_multiple_of(unit))).unwrap()
        });
        prop::collection::vec(extent, 0..20)
    }

    /// The oracle: does a byte of the sector not lie in any of the extents?
    fn is_whole_in(extents: &[Extent], sector: u64) -> bool {
        let bytes = sector * SECTOR_BYTES..(sector + 1) * SECTOR_BYTES;
        let mut at = bytes.start;
        while at < bytes.end {
            let inside = extents.iter().filter(|it| it.start().get() <= at && at < it.end().get());
            match inside.map(|it| it.end().get()).max() {
                Some(end) => at = end,
                None => return false,
            }
        }
        true
    }

    /// Lines that cover `sector`.
    fn lines_at(table: &Table, sector: u64) -> Vec<&Target> {
        let covers = |line: &&super::super::Line| {
            (line.start.get()..line.start.get() + line.length.get()).contains(&sector)
        };
        table.lines().iter().filter(covers).map(|line| &line.target).collect()
    }

    proptest! {
        #[test]
        fn every_sector_in_use_and_not_released_is_preserved(
            length in 8u64..120, free in extents(120), released in extents(120), limits in limits(),
        ) {
            let table = origin_table(Sectors(length), REAL, &free, &released, limits).unwrap();
            prop_assert_eq!(table.length(), Sectors(length));
            prop_assert!(table.lines().len() <= limits.lines, "{} lines", table.lines().len());
            let released_part = |run: &Extent| released.iter().any(|it| it.overlaps(*run));
            prop_assert!(linear(&table).iter().filter(|run| !released_part(run)).count() <= limits.free_runs);
            prop_assert!(is_over(&table, REAL) && !is_over(&table, OTHER));
            let preserved = preserved(&table, REAL);
            for sector in 0..length {
                let lines = lines_at(&table, sector);
                prop_assert_eq!(lines.len(), 1, "sector {}", sector);
                let is_preserved = *lines[0] == Target::SnapshotOrigin { device: REAL };
                // Each list is rounded inward by itself, extents that touch within a sector included.
                if !is_whole_in(&free, sector) && !is_whole_in(&released, sector) {
                    prop_assert!(is_preserved, "sector {} is needed", sector);
                }
                prop_assert_eq!(is_whole_in(&preserved, sector), is_preserved);
            }
        }

        #[test]
        fn with_lines_to_spare_all_that_may_be_is_linear(length in 8u64..120, free in extents(120), released in extents(120)) {
            let whole = |list: &[Extent]| list.iter().filter_map(|it| whole_sectors(*it, Sectors(length))).collect::<Vec<_>>();
            let (free, released) = (whole(&free), whole(&released));
            let table = origin_table(Sectors(length), REAL, &free, &released, PLENTY).unwrap();
            for sector in 0..length {
                let is_linear = matches!(lines_at(&table, sector)[0], Target::Linear { .. });
                prop_assert_eq!(is_linear, is_whole_in(&free, sector) || is_whole_in(&released, sector));
            }
            let kinds: Vec<&str> = table.lines().iter().map(|line| line.target.kind()).collect();
            prop_assert!(kinds.windows(2).all(|pair| pair[0] != pair[1]), "lines that could be one");
        }

        #[test]
        fn no_run_is_given_up_before_a_smaller_or_freer_one(
            free in extents(120), released in extents(120), limits in limits(),
        ) {
            let length = Sectors(120);
            let full = origin_table(length, REAL, &free, &released, PLENTY).unwrap();
            let capped = origin_table(length, REAL, &free, &released, limits).unwrap();
            let kept = linear(&capped);
            let lost: Vec<Extent> = linear(&full).into_iter().filter(|run| !kept.contains(run)).collect();
            let released: Vec<Extent> = released.iter().filter_map(|it| whole_sectors(*it, length)).collect();
            let rank = |run: &Extent| (released.iter().any(|it| it.overlaps(*run)), run.length());
            for (lost, kept) in lost.iter().flat_map(|lost| kept.iter().map(move |kept| (lost, kept))) {
                prop_assert!(rank(lost) <= rank(kept), "{lost} went, {kept} stayed");
            }
            // No more than needed: with the one that went last, there would be too many lines.
            if let Some(last) = lost.iter().max_by_key(|run| (rank(run), run.start())) {
                let mut more = kept.clone();
                more.push(*last);
                let table = origin_table(length, REAL, &more, &[], PLENTY).unwrap();
                let is_free_alone = |run: &&Extent| !released.iter().any(|it| it.overlaps(**run));
                let free_runs = more.iter().filter(is_free_alone).count();
                prop_assert!(table.lines().len() > limits.lines || free_runs > limits.free_runs);
            }
        }
    }

    #[test]
    fn the_table_reads_as_the_kernel_has_it() {
        let extent = |start: u64, end: u64| Extent::new(Bytes(start * 512), Bytes(end * 512)).unwrap();
        let table =
            origin_table(Sectors(100), REAL, &[extent(0, 8), extent(40, 60)], &[extent(60, 64)], PLENTY);
        assert_eq!(
            table.unwrap().to_string(),
            "0 8 linear 253:7 0\n8 32 snapshot-origin 253:7\n40 24 linear 253:7 40\n64 36 snapshot-origin 253:7"
        );
        assert_eq!(
            origin_table(Sectors(100), REAL, &[], &[], PLENTY).unwrap().to_string(),
            "0 100 snapshot-origin 253:7"
        );
        let all =
            origin_table(Sectors(100), REAL, &[], &[extent(0, 200)], LineLimits { free_runs: 0, lines: 1 })
                .unwrap();
        assert_eq!(all.to_string(), "0 100 linear 253:7 0");
        assert!(preserved(&all, REAL).is_empty() && is_over(&all, REAL));
        assert!(origin_table(Sectors(0), REAL, &[], &[], PLENTY).is_err());
        assert!(origin_table(Sectors(u64::MAX), REAL, &[], &[], PLENTY).is_err());
    }

    #[test]
    fn what_is_shifted_or_goes_elsewhere_is_no_origin_of_ours() {
        for text in [
            "0 8 linear 253:7 8",
            "0 8 linear 253:8 0",
            "0 8 linear 253:7 0\n8 8 linear 253:7 16",
            "0 8 snapshot-origin 253:7\n8 8 zero",
            "0 8 snapshot-origin 253:8",
        ] {
            assert!(!is_over(&text.parse().unwrap(), REAL), "{text}");
        }
    }
}
