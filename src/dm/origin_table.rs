//! What does an origin's table look like while it is being copied?
//!
//! | a range that | is a line | which leads |
//! |---|---|---|
//! | is needed and not copied yet | `linear` | to `preserve`, a device that is one `snapshot-origin` line over `real` |
//! | is free or released | `linear` | to where the origin's own table leads; to `real` where that is not `linear` |
//!
//! Why a device of its own for `snapshot-origin`, one more layer in the way of a first write: device-mapper sends a
//! flush to each line of a table, unless all of them are known to pass it on (`flush_bypasses_map`, Linux 6.11:
//! `linear` is, `snapshot-origin` is not); then each *device* beneath gets one. Measured in an emulated guest (6.12),
//! 4 KiB O_DSYNC writes, 128 lines: 1,016 to 1,285 a second, against 297 to 443 with `snapshot-origin` lines among
//! them. And what is free or released costs no more than without a copy.
//!
//! Invariants of [`Beneath::table`]: every sector is under exactly one line; what is neither free nor
//! released leads to `preserve`, so the first write to it preserves its original; the rest leads past it,
//! as far as the number of lines allows. Every doubt, an extent that is
//! cut within a sector or reaches behind the end, goes to the side of `preserve`: that costs
//! time, never an original. At least one line leads to `preserve` or `real`: the table is never the origin's own, so
//! that whoever finds it knows that no write went by it unseen.
//!
//! Whichever way a sector takes, it is the same sector of the same disk, so that a table can be replaced by another of
//! the same device at any time, with I/O in flight.

use crate::base::limits::{
    ORIGIN_TABLE_FREE_RUNS_FLUSHED_ONCE_MAX, ORIGIN_TABLE_FREE_RUNS_MAX, ORIGIN_TABLE_RUNS_MAX,
};
use crate::base::units::SECTOR_BYTES;
use crate::base::{Bytes, DeviceNumber, Result, Sectors};
use crate::extent::{Extent, ExtentSet};
use crate::sys::kernel;

use super::table::{LINES_MAX, Line, Table};
use super::target::Target;

/// The first kernel that sends a flush through a table of `linear` lines once to each device beneath.
const FLUSHES_ONCE_SINCE: (u32, u32) = (6, 11);

/// What bounds a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LineLimits {
    /// Runs of free ranges alone that are not preserved.
    pub free_runs: usize,
    /// Runs of both kinds, at least 1. A run is a line, and one more for each border between lines of the origin's own
    /// table in it.
    pub runs: usize,
}

impl LineLimits {
    /// As few as what a line costs a flush on the running kernel demands.
    #[must_use]
    pub fn here() -> Self {
        Self::on(kernel::version())
    }

    fn on(kernel: Option<(u32, u32)>) -> Self {
        let once = kernel.is_some_and(|version| version >= FLUSHES_ONCE_SINCE);
        let free_runs =
            if once { ORIGIN_TABLE_FREE_RUNS_FLUSHED_ONCE_MAX } else { ORIGIN_TABLE_FREE_RUNS_MAX };
        Self { free_runs, runs: ORIGIN_TABLE_RUNS_MAX }
    }
}

/// What a stack has beneath an origin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Beneath {
    /// The origin's own table.
    pub own: Table,
    /// The device that has that table.
    pub real: DeviceNumber,
    /// The device that is `snapshot-origin` over `real`; None once it is removed: nothing leads to it then.
    pub preserve: Option<DeviceNumber>,
}

impl Beneath {
    /// The origin's table. `free` is what nobody needs, `released` what is on the secondary already. Where there would
    /// be more runs than `limits` allow, the smallest runs of free ranges alone are preserved; when none is
    /// left, the smallest of the other runs.
    ///
    /// A released range that is given up preserves originals again, and these are not the instant's:
    /// nobody may take originals of a released range from the store.
    ///
    /// # Errors
    /// As [`Table::new`], for more lines than a table can have.
    ///
    /// # Panics
    /// Where `preserve` was removed: a broken invariant.
    pub fn table(&self, free: &[Extent], released: &[Extent], limits: LineLimits) -> Result<Table> {
        let length = self.own.length();
        let released: ExtentSet =
            released.iter().filter_map(|extent| whole_sectors(*extent, length)).collect();
        let mut past: ExtentSet = free.iter().filter_map(|extent| whole_sectors(*extent, length)).collect();
        past.extend(released.iter());
        let limits = LineLimits { runs: limits.runs.clamp(1, LINES_MAX), ..limits };
        give_up(&mut past, &released, length, limits);
        let whole = Extent::new(Bytes::ZERO, length.bytes());
        let preserved: Vec<Extent> = whole.into_iter().flat_map(|whole| past.gaps_in(whole)).collect();
        if preserved.is_empty() {
            return Table::single(length, Target::Linear { device: self.real, offset: Sectors::ZERO });
        }
        let preserve = self.preserve.expect("an origin gets a table while its stack is whole");
        let mut runs: Vec<(Extent, bool)> = past.iter().map(|extent| (extent, false)).collect();
        runs.extend(preserved.into_iter().map(|extent| (extent, true)));
        runs.sort_unstable();
        let lines = runs.into_iter().flat_map(|(extent, is_preserved)| {
            let (start, length) = (sectors(extent.start()), sectors(extent.length()));
            if is_preserved {
                vec![(length, Target::Linear { device: preserve, offset: start })]
            } else {
                self.past(start, length)
            }
        });
        Table::concatenated(lines)
    }

    /// Where a range leads to past the snapshot, in pieces that each lie in one line of the origin's own table.
    fn past(&self, start: Sectors, length: Sectors) -> Vec<(Sectors, Target)> {
        let end = start + length;
        let lines = self.own.lines();
        let first = lines.partition_point(|line| line.start + line.length <= start);
        let within = lines[first..].iter().take_while(|line| line.start < end);
        let piece = |line: &Line| {
            let from = start.max(line.start);
            let target = match line.target {
                Target::Linear { device, offset } => {
                    Target::Linear { device, offset: offset + (from - line.start) }
                }
                _ => Target::Linear { device: self.real, offset: from },
            };
            (end.min(line.start + line.length) - from, target)
        };
        within.map(piece).collect()
    }

    /// True where `table` is one that [`Beneath::table`] makes: each of its lines leads to `preserve`, to `real` or past
    /// them as the origin's own table does, every sector to itself, and one at least to either of these.
    #[must_use]
    pub fn is_under(&self, table: &Table) -> bool {
        let is_ours = |line: &Line| leads_to(line, self.preserve) || leads_to(line, Some(self.real));
        let is_past =
            |line: &Line| self.past(line.start, line.length) == [(line.length, line.target.clone())];
        table.length() == self.own.length()
            && table.lines().iter().any(is_ours)
            && table.lines().iter().all(|line| is_ours(line) || is_past(line))
    }

    /// What a write still preserves: the ranges of `table` that lead to `preserve`, in order, no two touching.
    #[must_use]
    pub fn preserved(&self, table: &Table) -> Vec<Extent> {
        let lines = table.lines().iter().filter(|line| leads_to(line, self.preserve));
        let extents = lines.filter_map(|line| Extent::with_length(line.start.bytes(), line.length.bytes()));
        extents.collect::<ExtentSet>().iter().collect()
    }
}

/// True for a line that leads to `device`, every sector to itself.
fn leads_to(line: &Line, device: Option<DeviceNumber>) -> bool {
    matches!(line.target, Target::Linear { device: to, offset } if Some(to) == device && offset == line.start)
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

/// Takes runs out of `past` until the table is within `limits`.
fn give_up(past: &mut ExtentSet, released: &ExtentSet, length: Sectors, limits: LineLimits) {
    // Runs do not touch, so on either side of each is a run of the other kind, or the device's end. Taking
    // a run out joins it with these: it saves as many runs as it has neighbours, whatever else is taken out.
    let saved = |run: Extent| {
        usize::from(run.start() > Bytes::ZERO) + usize::from(Some(run.end()) != length.checked_bytes())
    };
    let mut count = 1 + past.iter().map(saved).sum::<usize>();
    let is_free_alone = |run: &Extent| released.intersection_with(*run).next().is_none();
    let mut runs: Vec<Extent> = past.iter().collect();
    let mut free_runs = runs.iter().filter(|run| is_free_alone(run)).count();
    runs.sort_by_key(|run| (!is_free_alone(run), run.length(), run.start()));
    for run in runs {
        if count <= limits.runs && free_runs <= limits.free_runs {
            break;
        }
        count -= saved(run);
        free_runs = free_runs.saturating_sub(1);
        past.remove(run);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DISK: DeviceNumber = DeviceNumber { major: 8, minor: 16 };
    const REAL: DeviceNumber = DeviceNumber { major: 253, minor: 7 };
    const PRESERVE: DeviceNumber = DeviceNumber { major: 253, minor: 8 };

    const PLENTY: LineLimits = LineLimits { free_runs: 1000, runs: 1000 };

    fn limits() -> impl Strategy<Value = LineLimits> {
        (0usize..6, 1usize..12).prop_map(|(free_runs, runs)| LineLimits { free_runs, runs })
    }

    fn beneath(own: &str) -> Beneath {
        Beneath { own: own.parse().unwrap(), real: REAL, preserve: Some(PRESERVE) }
    }

    /// An origin of `length` sectors on one disk.
    fn plain(length: u64) -> Beneath {
        beneath(&format!("0 {length} linear {DISK} 2048"))
    }

    /// Origins of one or several lines, linear (to devices and offsets that tell them apart) and striped.
    fn origins(length: std::ops::Range<u64>) -> impl Strategy<Value = Beneath> {
        let cuts = prop::collection::btree_set(1u64..length.end, 0..5);
        let kinds = prop::collection::vec(any::<bool>(), 6);
        (length, cuts, kinds).prop_map(|(length, cuts, kinds)| {
            let mut borders: Vec<u64> = cuts.into_iter().filter(|cut| *cut < length).collect();
            borders.push(length);
            let mut start = 0;
            let lines = borders.iter().zip(kinds).enumerate().map(|(index, (border, is_linear))| {
                let minor = u32::try_from(index).unwrap();
                let device = DeviceNumber { major: 8, minor };
                let offset = Sectors(1000 * u64::from(minor + 1));
                let target = if is_linear {
                    Target::Linear { device, offset }
                } else {
                    Target::Striped { chunk: Sectors(8), stripes: vec![(device, offset); 2] }
                };
                let length = Sectors(border - start);
                start = *border;
                (length, target)
            });
            Beneath { own: Table::concatenated(lines).unwrap(), real: REAL, preserve: Some(PRESERVE) }
        })
    }

    fn is_preserved_line(line: &Line) -> bool {
        matches!(line.target, Target::Linear { device: PRESERVE, .. })
    }

    /// The runs that lead past the snapshot.
    fn past(table: &Table) -> Vec<Extent> {
        let lines = table.lines().iter().filter(|line| !is_preserved_line(line));
        let extents = lines.map(|line| Extent::with_length(line.start.bytes(), line.length.bytes()).unwrap());
        extents.collect::<ExtentSet>().iter().collect()
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
    fn lines_at(table: &Table, sector: u64) -> Vec<&Line> {
        let covers =
            |line: &&Line| (line.start.get()..line.start.get() + line.length.get()).contains(&sector);
        table.lines().iter().filter(covers).collect()
    }

    /// Where a sector ends up, once `real` and `preserve` have passed it on unshifted: a sector of a disk, or of `real`
    /// where that is striped.
    fn place(origin: &Beneath, table: &Table, sector: u64) -> (DeviceNumber, u64) {
        let line = lines_at(table, sector)[0];
        match line.target {
            Target::Linear { device, offset } => {
                let at = offset.get() + (sector - line.start.get());
                if device == REAL || device == PRESERVE {
                    place(origin, &origin.own, at)
                } else {
                    (device, at)
                }
            }
            _ => (REAL, sector),
        }
    }

    proptest! {
        #[test]
        fn every_sector_in_use_and_not_released_is_preserved(
            origin in origins(8..120), free in extents(120), released in extents(120), limits in limits(),
        ) {
            let table = origin.table(&free, &released, limits).unwrap();
            let length = origin.own.length();
            prop_assert_eq!(table.length(), length);
            let most = limits.runs + origin.own.lines().len() - 1;
            prop_assert!(table.lines().len() <= most, "{} lines", table.lines().len());
            let released_part = |run: &Extent| released.iter().any(|it| it.overlaps(*run));
            prop_assert!(past(&table).iter().filter(|run| !released_part(run)).count() <= limits.free_runs);
            prop_assert!(origin.is_under(&table) && table != origin.own);
            let other = DeviceNumber { major: 253, minor: 9 };
            let another = Beneath { own: origin.own.clone(), real: other, preserve: Some(other) };
            prop_assert!(!another.is_under(&table));
            let preserved = origin.preserved(&table);
            for sector in 0..length.get() {
                let lines = lines_at(&table, sector);
                prop_assert_eq!(lines.len(), 1, "sector {}", sector);
                let is_preserved = is_preserved_line(lines[0]);
                // Each list is rounded inward by itself, extents that touch within a sector included.
                if !is_whole_in(&free, sector) && !is_whole_in(&released, sector) {
                    prop_assert!(is_preserved, "sector {} is needed", sector);
                }
                prop_assert_eq!(is_whole_in(&preserved, sector), is_preserved);
                let at = place(&origin, &table, sector);
                prop_assert_eq!(at, place(&origin, &origin.own, sector), "sector {} is another", sector);
            }
        }

        #[test]
        fn with_runs_to_spare_all_that_may_be_leads_past(origin in origins(8..120), free in extents(120), released in extents(120)) {
            let length = origin.own.length();
            let whole = |list: &[Extent]| list.iter().filter_map(|it| whole_sectors(*it, length)).collect::<Vec<_>>();
            let (free, released) = (whole(&free), whole(&released));
            let table = origin.table(&free, &released, PLENTY).unwrap();
            for sector in 0..length.get() {
                let leads_past = !is_preserved_line(lines_at(&table, sector)[0]);
                prop_assert_eq!(leads_past, is_whole_in(&free, sector) || is_whole_in(&released, sector));
            }
            let kinds: Vec<bool> = table.lines().iter().map(is_preserved_line).collect();
            prop_assert!(kinds.windows(2).all(|pair| !(pair[0] && pair[1])), "lines that could be one");
        }

        #[test]
        fn no_run_is_given_up_before_a_smaller_or_freer_one(
            free in extents(120), released in extents(120), limits in limits(),
        ) {
            let origin = plain(120);
            let full = origin.table(&free, &released, PLENTY).unwrap();
            let capped = origin.table(&free, &released, limits).unwrap();
            let kept = past(&capped);
            let lost: Vec<Extent> = past(&full).into_iter().filter(|run| !kept.contains(run)).collect();
            let released: Vec<Extent> =
                released.iter().filter_map(|it| whole_sectors(*it, Sectors(120))).collect();
            let rank = |run: &Extent| (released.iter().any(|it| it.overlaps(*run)), run.length());
            for (lost, kept) in lost.iter().flat_map(|lost| kept.iter().map(move |kept| (lost, kept))) {
                prop_assert!(rank(lost) <= rank(kept), "{lost} went, {kept} stayed");
            }
            // No more than needed: with the one that went last, there would be too many lines.
            if let Some(last) = lost.iter().max_by_key(|run| (rank(run), run.start())) {
                let mut more = kept.clone();
                more.push(*last);
                let table = origin.table(&more, &[], PLENTY).unwrap();
                let is_free_alone = |run: &&Extent| !released.iter().any(|it| it.overlaps(**run));
                let free_runs = more.iter().filter(is_free_alone).count();
                prop_assert!(table.lines().len() > limits.runs || free_runs > limits.free_runs);
            }
        }
    }

    #[test]
    fn the_table_reads_as_the_kernel_has_it() {
        let extent = |start: u64, end: u64| Extent::new(Bytes(start * 512), Bytes(end * 512)).unwrap();
        let origin = beneath("0 50 linear 8:16 2048\n50 8 linear 8:32 0\n58 42 striped 2 8 8:16 0 8:32 64");
        let table =
            |free: &[Extent], released: &[Extent]| origin.table(free, released, PLENTY).unwrap().to_string();
        assert_eq!(
            table(&[extent(0, 8), extent(40, 60)], &[extent(60, 64)]),
            "0 8 linear 8:16 2048\n8 32 linear 253:8 8\n40 10 linear 8:16 2088\n50 8 linear 8:32 0\n\
             58 6 linear 253:7 58\n64 36 linear 253:8 64"
        );
        assert_eq!(table(&[], &[]), "0 100 linear 253:8 0");
        // All released: not the origin's own table.
        let one = LineLimits { free_runs: 0, runs: 1 };
        let all = origin.table(&[], &[extent(0, 200)], one).unwrap();
        assert_eq!(all.to_string(), "0 100 linear 253:7 0");
        assert!(origin.preserved(&all).is_empty() && origin.is_under(&all));
        let removed = Beneath { preserve: None, ..origin.clone() };
        assert!(removed.is_under(&all) && !removed.is_under(&table(&[], &[]).parse().unwrap()));
    }

    #[test]
    fn what_is_shifted_or_goes_elsewhere_is_no_origin_of_ours() {
        let origin = beneath("0 8 linear 8:16 2048\n8 8 linear 8:32 0");
        for text in [
            // Its own, whole or cut: nobody's stack.
            "0 8 linear 8:16 2048\n8 8 linear 8:32 0",
            "0 4 linear 8:16 2048\n4 4 linear 8:16 2052\n8 8 linear 8:32 0",
            "0 8 linear 253:8 0\n8 8 linear 8:32 8",
            "0 8 linear 253:8 0\n8 8 linear 8:48 0",
            "0 16 linear 253:8 8",
            "0 16 linear 253:9 0",
            "0 8 linear 253:8 0",
            "0 8 linear 253:7 0\n8 8 linear 253:7 16",
            "0 8 linear 253:8 0\n8 8 zero",
            "0 16 snapshot-origin 253:7",
        ] {
            assert!(!origin.is_under(&text.parse().unwrap()), "{text}");
        }
    }

    #[test]
    fn a_kernel_that_flushes_once_may_have_more_lines() {
        let runs = |kernel| LineLimits::on(kernel).free_runs;
        assert!(runs(Some((6, 11))) == runs(Some((7, 0))) && runs(Some((6, 11))) > runs(Some((6, 10))));
        assert_eq!(runs(None), runs(Some((6, 1))));
    }
}
