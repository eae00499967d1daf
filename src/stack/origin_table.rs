//! The table of an origin while it is being copied.
//!
//! | a range that | leads |
//! |---|---|
//! | is needed and not copied yet | to `preserve`, a device with a single `snapshot-origin` line over `real` |
//! | is free or released | where the origin's own table leads; to `real` if that line is neither `linear` nor `switch` |
//!
//! `snapshot-origin` is on a separate device, which adds a layer to each first write. The reasons: a free or
//! released range then costs no more than without a copy, and every line of the table can be of a kind chosen
//! for its behaviour on a flush. device-mapper sends an empty flush to each line of a table: always before
//! Linux 6.11, and since then unless all lines are known to pass it on. Even flushes sent at once execute one
//! after the other on a disk. So **the first line is `linear` and takes the flush; all others are `switch`
//! with one path**, which maps as `linear` does and requests no flush (`num_flush_bios` in Linux
//! `drivers/md/dm-switch.c`). The flush argument: the first line leads to `preserve` or `real`, whatever kind
//! of range it is. Both pass a flush on to *every* device of the origin's own table, and every line leads to
//! one of these. Flags of a write (FUA, PREFLUSH) are handled by device-mapper as for any table.
//!
//! Measured in emulated guests (6.12 and 6.1), 4 KiB O_DSYNC writes per second: the origin's own table 1,410
//! to 1,790; one line to `preserve` and one past it, both `linear`, 1,130 to 1,310; the second of them
//! `switch`, 1,510 to 1,860. With a thousand lines: 1,260 to 1,550 with `switch`, with `linear` 1,110 on 6.12
//! and 80 on 6.1. If a kernel has no `switch` (every distribution's has it), the lines are `linear`, and few.
//!
//! Invariants of [`LowerDevices::table`]: exactly one line maps each sector. A sector that is neither free
//! nor released leads to `preserve`, so the first write to it preserves its original. The rest leads past
//! `preserve`, as far as the number of lines allows. In doubt (an extent that is cut within a sector, or ends
//! past the device) a sector leads to `preserve`: that costs time, never an original. The first line leads to
//! `preserve` or `real`, so the table always differs from the origin's own. A process that finds it knows
//! that every write went through it.
//!
//! Every line maps a sector to the same sector of the same disk. So a table can be replaced by another one of
//! the same device at any time, with I/O in flight.

use crate::base::limits::{
    ORIGIN_TABLE_FREE_RUNS_FLUSHED_MAX, ORIGIN_TABLE_FREE_RUNS_MAX, ORIGIN_TABLE_RUNS_MAX,
};
use crate::base::units::SECTOR_BYTES;
use crate::base::{Bytes, DeviceNumber, Result, Sectors};
use crate::extent::{Extent, ExtentSet};

use crate::dm::table::{LINES_MAX, Line, Table};
use crate::dm::target::Target;

/// Longest region of a `switch` line: the kernel takes a 32-bit number of sectors. 1 TiB.
const REGION_MAX: Sectors = Sectors(1 << 31);

/// Which targets a table uses, and its limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Form {
    /// All lines but the first are `switch`, so a flush does not reach them.
    pub is_switched: bool,
    /// Most runs that are free, without any released range, and not preserved.
    pub free_runs: usize,
    /// Most runs, preserved or not; at least 1. A run is one line, and one more for each border within it
    /// between lines of the origin's own table.
    pub runs: usize,
}

impl Form {
    /// `is_switched`: the kernel has the target `switch`.
    #[must_use]
    pub fn new(is_switched: bool) -> Self {
        let free_runs =
            if is_switched { ORIGIN_TABLE_FREE_RUNS_MAX } else { ORIGIN_TABLE_FREE_RUNS_FLUSHED_MAX };
        Self { is_switched, free_runs, runs: ORIGIN_TABLE_RUNS_MAX }
    }
}

/// The devices that a stack has below an origin, and the origin's own table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LowerDevices {
    /// The origin's own table.
    pub own: Table,
    /// The device that has that table.
    pub real: DeviceNumber,
    /// The device that is `snapshot-origin` over `real`; None once it has been removed, when nothing leads to
    /// it.
    pub preserve: Option<DeviceNumber>,
}

impl LowerDevices {
    /// True for a table that a copy may have loaded into its origin: a stack table, or the origin's own.
    #[must_use]
    pub fn is_copy_table(&self, table: &Table) -> bool {
        self.is_stack_table(table) || *table == self.own
    }

    /// The origin's table. `free` is not in use, `released` is on the secondary already. If there would be
    /// more runs than `form` allows, the smallest runs of free ranges alone are preserved; when none is left,
    /// the smallest of the other runs.
    ///
    /// A released range that is preserved again gets originals newer than the instant: the originals of a
    /// released range must never be read from the store.
    ///
    /// # Errors
    /// As [`Table::new`], for more lines than a table can have.
    ///
    /// # Panics
    /// If `preserve` was removed: a broken invariant.
    pub fn table(&self, free: &[Extent], released: &[Extent], form: Form) -> Result<Table> {
        let length = self.own.length();
        let released: ExtentSet =
            released.iter().filter_map(|extent| whole_sectors(*extent, length)).collect();
        let mut past: ExtentSet = free.iter().filter_map(|extent| whole_sectors(*extent, length)).collect();
        past.extend(released.iter());
        limit_runs(&mut past, &released, length, Form { runs: form.runs.clamp(1, LINES_MAX), ..form });
        let whole = Extent::new(Bytes::ZERO, length.bytes());
        let preserved: Vec<Extent> = whole.into_iter().flat_map(|whole| past.gaps_in(whole)).collect();
        if preserved.is_empty() {
            return Table::single(length, Target::Linear { device: self.real, offset: Sectors::ZERO });
        }
        let preserve = self.preserve.expect("a table is made only while the stack is complete");
        let mut runs: Vec<(Extent, bool)> = past.iter().map(|extent| (extent, false)).collect();
        runs.extend(preserved.into_iter().map(|extent| (extent, true)));
        runs.sort_unstable();
        let pieces = runs.into_iter().flat_map(|(extent, is_preserved)| {
            let (start, length) = (sectors(extent.start()), sectors(extent.length()));
            if is_preserved { vec![(length, preserve, start)] } else { self.past(start, length) }
        });
        let lines = pieces.enumerate().map(|(index, (length, device, offset))| {
            let target = match index {
                // The line that takes the flush must lead to every disk.
                0 if device == preserve => Target::Linear { device, offset },
                0 => Target::Linear { device: self.real, offset: Sectors::ZERO },
                _ if form.is_switched => Target::Switch { region: length.min(REGION_MAX), device, offset },
                _ => Target::Linear { device, offset },
            };
            (length, target)
        });
        Table::concatenated(lines)
    }

    /// Where a range leads past the snapshot: as (length, device, first sector there), one piece for each
    /// line of the origin's own table.
    fn past(&self, start: Sectors, length: Sectors) -> Vec<(Sectors, DeviceNumber, Sectors)> {
        let end = start + length;
        let lines = self.own.lines();
        let first = lines.partition_point(|line| line.start + line.length <= start);
        let within = lines[first..].iter().take_while(|line| line.start < end);
        let piece = |line: &Line| {
            let from = start.max(line.start);
            let length = end.min(line.start + line.length) - from;
            match destination(line) {
                Some((device, offset)) => (length, device, offset + (from - line.start)),
                None => (length, self.real, from),
            }
        };
        within.map(piece).collect()
    }

    /// True if [`LowerDevices::table`] could have made `table`: its first line leads to `preserve` or `real`,
    /// every other line to one of these or where the origin's own table leads, each sector unshifted.
    #[must_use]
    pub fn is_stack_table(&self, table: &Table) -> bool {
        let is_ours = |line: &Line| leads_to(line, self.preserve) || leads_to(line, Some(self.real));
        let is_past = |line: &Line| {
            let way = destination(line).map(|(device, offset)| (line.length, device, offset));
            way.is_some_and(|way| self.past(line.start, line.length) == [way])
        };
        table.length() == self.own.length()
            && table.lines().first().is_some_and(is_ours)
            && table.lines().iter().all(|line| is_ours(line) || is_past(line))
    }

    /// The ranges of `table` that a write still preserves, as they lead to `preserve`: in order, no two
    /// touching.
    #[must_use]
    pub fn preserved(&self, table: &Table) -> Vec<Extent> {
        let lines = table.lines().iter().filter(|line| leads_to(line, self.preserve));
        let extents = lines.filter_map(|line| Extent::with_length(line.start.bytes(), line.length.bytes()));
        extents.collect::<ExtentSet>().iter().collect()
    }
}

/// Where a line leads, if stack tables use its target.
fn destination(line: &Line) -> Option<(DeviceNumber, Sectors)> {
    match line.target {
        Target::Linear { device, offset } | Target::Switch { device, offset, .. } => Some((device, offset)),
        _ => None,
    }
}

/// True for a line that leads to `device`, each sector unshifted.
fn leads_to(line: &Line, device: Option<DeviceNumber>) -> bool {
    device.is_some_and(|device| destination(line) == Some((device, line.start)))
}

/// The whole sectors of `extent` within the device.
fn whole_sectors(extent: Extent, length: Sectors) -> Option<Extent> {
    let extent = extent.intersection(Extent::new(Bytes::ZERO, length.checked_bytes()?)?)?;
    // No overflow: a device ends at a multiple of a sector, so rounding up stays within it.
    Extent::new(extent.start().align_up(Bytes(SECTOR_BYTES)), extent.end().align_down(Bytes(SECTOR_BYTES)))
}

fn sectors(bytes: Bytes) -> Sectors {
    bytes.to_sectors("a line").expect("extents and the gaps between them consist of whole sectors")
}

/// Removes runs from `past` until the table is within the limits of `form`.
fn limit_runs(past: &mut ExtentSet, released: &ExtentSet, length: Sectors, form: Form) {
    // Runs do not touch, so each is between runs of the other kind, or at an end of the device. Removing a
    // run merges it with these neighbours: that saves as many runs as there are neighbours, whatever else is
    // removed.
    let saved = |run: Extent| {
        usize::from(run.start() > Bytes::ZERO) + usize::from(Some(run.end()) != length.checked_bytes())
    };
    let mut count = 1 + past.iter().map(saved).sum::<usize>();
    let is_free_alone = |run: &Extent| released.intersection_with(*run).next().is_none();
    let mut runs: Vec<Extent> = past.iter().collect();
    let mut free_runs = runs.iter().filter(|run| is_free_alone(run)).count();
    runs.sort_by_key(|run| (!is_free_alone(run), run.length(), run.start()));
    for run in runs {
        if count <= form.runs && free_runs <= form.free_runs {
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

    const PLENTY: Form = Form { is_switched: true, free_runs: 1000, runs: 1000 };

    fn forms() -> impl Strategy<Value = Form> {
        (any::<bool>(), 0usize..6, 1usize..12).prop_map(|(is_switched, free_runs, runs)| Form {
            is_switched,
            free_runs,
            runs,
        })
    }

    fn lower(own: &str) -> LowerDevices {
        LowerDevices { own: own.parse().unwrap(), real: REAL, preserve: Some(PRESERVE) }
    }

    /// An origin of `length` sectors on one disk.
    fn plain(length: u64) -> LowerDevices {
        lower(&format!("0 {length} linear {DISK} 2048"))
    }

    /// Origins of one or several lines, striped, or linear to distinct devices and offsets.
    fn origins(length: std::ops::Range<u64>) -> impl Strategy<Value = LowerDevices> {
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
            LowerDevices { own: Table::concatenated(lines).unwrap(), real: REAL, preserve: Some(PRESERVE) }
        })
    }

    fn is_preserved_line(line: &Line) -> bool {
        destination(line).is_some_and(|(device, _)| device == PRESERVE)
    }

    /// The runs that bypass the snapshot.
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

    /// The oracle: true if every byte of the sector is within the extents.
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

    /// The final place of a sector, through `real` and `preserve`, which do not shift it: a sector of a disk,
    /// or of `real` if that is striped.
    fn place(origin: &LowerDevices, table: &Table, sector: u64) -> (DeviceNumber, u64) {
        let line = lines_at(table, sector)[0];
        match destination(line) {
            Some((device, offset)) => {
                let at = offset.get() + (sector - line.start.get());
                if device == REAL || device == PRESERVE {
                    place(origin, &origin.own, at)
                } else {
                    (device, at)
                }
            }
            None => (REAL, sector),
        }
    }

    proptest! {
        #[test]
        fn every_sector_in_use_and_not_released_is_preserved(
            origin in origins(8..120), free in extents(120), released in extents(120), form in forms(),
        ) {
            let table = origin.table(&free, &released, form).unwrap();
            let length = origin.own.length();
            prop_assert_eq!(table.length(), length);
            let most = form.runs + origin.own.lines().len() - 1;
            prop_assert!(table.lines().len() <= most, "{} lines", table.lines().len());
            let released_part = |run: &Extent| released.iter().any(|it| it.overlaps(*run));
            prop_assert!(past(&table).iter().filter(|run| !released_part(run)).count() <= form.free_runs);
            prop_assert!(origin.is_stack_table(&table) && table != origin.own);
            let other = DeviceNumber { major: 253, minor: 9 };
            let another = LowerDevices { own: origin.own.clone(), real: other, preserve: Some(other) };
            prop_assert!(!another.is_stack_table(&table));
            // One line takes the flush, and it leads to every disk.
            let (first, others) = table.lines().split_first().unwrap();
            let takes_flush = matches!(first.target, Target::Linear { device: REAL | PRESERVE, .. });
            prop_assert!(takes_flush);
            prop_assert!(others.iter().all(|line| (line.target.kind() == "switch") == form.is_switched));
            let preserved = origin.preserved(&table);
            for sector in 0..length.get() {
                let lines = lines_at(&table, sector);
                prop_assert_eq!(lines.len(), 1, "sector {}", sector);
                let is_preserved = is_preserved_line(lines[0]);
                // Each list is rounded inward on its own, so extents that touch within a sector are rounded
                // too.
                if !is_whole_in(&free, sector) && !is_whole_in(&released, sector) {
                    prop_assert!(is_preserved, "sector {} is needed", sector);
                }
                prop_assert_eq!(is_whole_in(&preserved, sector), is_preserved);
                let at = place(&origin, &table, sector);
                prop_assert_eq!(at, place(&origin, &origin.own, sector), "sector {} is another", sector);
            }
        }

        #[test]
        fn below_the_limits_every_free_or_released_sector_bypasses_the_snapshot(origin in origins(8..120), free in extents(120), released in extents(120)) {
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
        fn runs_are_given_up_free_ones_first_then_the_smallest(
            free in extents(120), released in extents(120), form in forms(),
        ) {
            let origin = plain(120);
            let full = origin.table(&free, &released, PLENTY).unwrap();
            let capped = origin.table(&free, &released, form).unwrap();
            let kept = past(&capped);
            let lost: Vec<Extent> = past(&full).into_iter().filter(|run| !kept.contains(run)).collect();
            let released: Vec<Extent> =
                released.iter().filter_map(|it| whole_sectors(*it, Sectors(120))).collect();
            let rank = |run: &Extent| (released.iter().any(|it| it.overlaps(*run)), run.length());
            for (lost, kept) in lost.iter().flat_map(|lost| kept.iter().map(move |kept| (lost, kept))) {
                prop_assert!(rank(lost) <= rank(kept), "{lost} went, {kept} stayed");
            }
            // No more than needed: if the last removed run were kept, there would be too many.
            if let Some(last) = lost.iter().max_by_key(|run| (rank(run), run.start())) {
                let mut more = kept.clone();
                more.push(*last);
                let table = origin.table(&more, &[], PLENTY).unwrap();
                let is_free_alone = |run: &&Extent| !released.iter().any(|it| it.overlaps(**run));
                let free_runs = more.iter().filter(is_free_alone).count();
                prop_assert!(table.lines().len() > form.runs || free_runs > form.free_runs);
            }
        }
    }

    #[test]
    fn the_table_reads_as_the_kernel_has_it() {
        let extent = |start: u64, end: u64| Extent::new(Bytes(start * 512), Bytes(end * 512)).unwrap();
        let origin = lower("0 50 linear 8:16 2048\n50 8 linear 8:32 0\n58 42 striped 2 8 8:16 0 8:32 64");
        let table = |free: &[Extent], released: &[Extent], form| {
            origin.table(free, released, form).unwrap().to_string()
        };
        let (free, released) = ([extent(0, 8), extent(40, 60)], [extent(60, 64)]);
        assert_eq!(
            table(&free, &released, PLENTY),
            "0 8 linear 253:7 0\n8 32 switch 1 32 0 253:8 8\n40 10 switch 1 10 0 8:16 2088\n50 8 switch 1 8 0 8:32 0\n\
             58 6 switch 1 6 0 253:7 58\n64 36 switch 1 36 0 253:8 64"
        );
        let flushed = Form { is_switched: false, ..PLENTY };
        assert_eq!(
            table(&free[1..], &released, flushed),
            "0 40 linear 253:8 0\n40 10 linear 8:16 2088\n50 8 linear 8:32 0\n58 6 linear 253:7 58\n64 36 linear 253:8 64"
        );
        assert_eq!(table(&[], &[], PLENTY), "0 100 linear 253:8 0");
        // All released, and yet not the origin's own table.
        let one = Form { free_runs: 0, runs: 1, ..PLENTY };
        let all = origin.table(&[], &[extent(0, 200)], one).unwrap();
        assert_eq!(all.to_string(), "0 100 linear 253:7 0");
        assert!(origin.preserved(&all).is_empty() && origin.is_stack_table(&all));
        let removed = LowerDevices { preserve: None, ..origin.clone() };
        assert!(
            removed.is_stack_table(&all)
                && !removed.is_stack_table(&table(&[], &[], PLENTY).parse().unwrap())
        );
    }

    #[test]
    fn a_region_of_a_line_fits_the_kernels_number() {
        let long = REGION_MAX.get() * 3;
        let origin = plain(long);
        let free = Extent::new(Bytes(1 << 20), Sectors(long).bytes()).unwrap();
        let table = origin.table(&[free], &[], PLENTY).unwrap();
        let region = |line: &Line| match line.target {
            Target::Switch { region, .. } => Some(region),
            _ => None,
        };
        assert_eq!(table.lines().iter().map(region).collect::<Vec<_>>(), [None, Some(REGION_MAX)]);
    }

    #[test]
    fn a_table_with_another_mapping_is_no_stack_table() {
        let origin = lower("0 8 linear 8:16 2048\n8 8 linear 8:32 0");
        for text in [
            // The origin's own table, whole or split: not a stack table.
            "0 8 linear 8:16 2048\n8 8 linear 8:32 0",
            "0 4 linear 8:16 2048\n4 4 linear 8:16 2052\n8 8 linear 8:32 0",
            "0 8 linear 8:16 2048\n8 8 linear 253:8 8",
            "0 8 switch 1 8 0 253:8 0\n8 8 switch 1 8 0 8:32 8",
            "0 8 switch 2 8 0 253:8 0 253:8 0\n8 8 linear 8:32 0",
            "0 8 linear 253:8 0\n8 8 linear 8:32 8",
            "0 8 linear 253:8 0\n8 8 linear 8:48 0",
            "0 16 linear 253:8 8",
            "0 16 linear 253:9 0",
            "0 8 linear 253:8 0",
            "0 8 linear 253:7 0\n8 8 linear 253:7 16",
            "0 8 linear 253:8 0\n8 8 zero",
            "0 16 snapshot-origin 253:7",
        ] {
            assert!(!origin.is_stack_table(&text.parse().unwrap()), "{text}");
        }
    }
}
