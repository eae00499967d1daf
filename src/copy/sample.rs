//! Which segments of a secondary are read to see whether it still holds a copy, and how likely a change is missed.
//!
//! Pure. Segments are drawn without replacement, so the number of changed ones among those that are read has a
//! hypergeometric distribution.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::base::numbers;

/// By default at least this many segments are read: if 1 in 100 of many segments has changed, that is missed with a
/// probability of 0.99^459, which is below 0.01.
const DEFAULT_MIN: u64 = 459;

/// By default at least this share is read, in millionths.
const DEFAULT_MILLIONTHS: u32 = 10_000;

const MILLION: u32 = 1_000_000;

/// How much of a secondary is read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sample {
    /// 1 in 100 segments, but at least 459.
    #[default]
    Usual,
    /// This many of a million segments, rounded up.
    Millionths(u32),
    /// Every segment.
    All,
}

impl Sample {
    /// Parses "all", or a fraction above 0 and up to 1 with at most six decimals.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        if text == "all" {
            return Some(Self::All);
        }
        let (whole, decimals) = text.split_once('.').unwrap_or((text, ""));
        let is_number = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
        if !is_number(whole)
            || !is_number(decimals)
            || decimals.len() > 6
            || text.len() > 8
            || whole.is_empty()
        {
            return None;
        }
        let millionths = whole.parse::<u32>().ok()?.checked_mul(MILLION)?;
        let millionths = millionths + format!("{decimals:0<6}").parse::<u32>().ok()?;
        (1..=MILLION).contains(&millionths).then_some(Self::Millionths(millionths))
    }

    /// How many of `total` segments are read.
    #[must_use]
    pub fn count(self, total: u64) -> u64 {
        let share = |millionths: u32| {
            let count = (u128::from(total) * u128::from(millionths)).div_ceil(u128::from(MILLION));
            u64::try_from(count).unwrap_or(total).min(total)
        };
        match self {
            Self::Usual => share(DEFAULT_MILLIONTHS).max(DEFAULT_MIN.min(total)),
            Self::Millionths(millionths) => share(millionths),
            Self::All => total,
        }
    }
}

/// `count` different numbers below `total`, evenly distributed, in ascending order (Floyd's algorithm).
#[must_use]
pub fn choose(count: u64, total: u64, seed: u64) -> BTreeSet<u64> {
    let mut numbers = numbers::from_seed(seed);
    let mut chosen = BTreeSet::new();
    for last in total.saturating_sub(count)..total {
        let number = numbers.next().map_or(last, |number| number % (last + 1));
        if !chosen.insert(number) {
            chosen.insert(last);
        }
    }
    chosen
}

/// The probability that `read` of `total` segments, drawn at random, hold none of `changed` changed ones.
#[must_use]
pub fn miss_probability(total: u64, read: u64, changed: u64) -> f64 {
    if changed > total.saturating_sub(read) {
        return 0.0;
    }
    // C(total - changed, read) / C(total, read), factor by factor.
    let factor = |at: u64| as_float(total - read - at) / as_float(total - at);
    (0..changed).map(factor).product()
}

#[allow(clippy::cast_precision_loss)] // a count of segments is below 2^22
fn as_float(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fractions_are_read_exactly() {
        for (text, sample) in [
            ("all", Some(Sample::All)),
            ("1", Some(Sample::Millionths(1_000_000))),
            ("1.0", Some(Sample::Millionths(1_000_000))),
            ("0.25", Some(Sample::Millionths(250_000))),
            ("0.000001", Some(Sample::Millionths(1))),
            ("0", None),
            ("0.0000001", None),
            ("1.000001", None),
            ("2", None),
            ("-1", None),
            ("", None),
            (".5", None),
            ("1e-3", None),
            ("half", None),
            ("4294967297", None),
        ] {
            assert_eq!(Sample::parse(text), sample, "{text}");
        }
    }

    #[test]
    fn counts_are_rounded_up_and_never_more_than_all() {
        for (sample, total, count) in [
            (Sample::Usual, 10, 10),
            (Sample::Usual, 1000, 459),
            (Sample::Usual, 1_000_000, 10_000),
            (Sample::Millionths(1), 10, 1),
            (Sample::Millionths(250_000), 10, 3),
            (Sample::Millionths(1_000_000), 10, 10),
            (Sample::All, 10, 10),
            (Sample::All, 0, 0),
            (Sample::Usual, 0, 0),
        ] {
            assert_eq!(sample.count(total), count, "{sample:?} of {total}");
        }
    }

    #[test]
    fn each_number_is_chosen_as_often_as_any_other() {
        let mut seen = [0u32; 20];
        for seed in 0..20_000 {
            let chosen = choose(5, 20, seed);
            assert!(chosen.len() == 5 && chosen.iter().all(|number| *number < 20));
            chosen.iter().for_each(|number| seen[usize::try_from(*number).unwrap()] += 1);
        }
        // 5,000 expected; the standard deviation is 61.
        assert!(seen.iter().all(|count| (4700..5300).contains(count)), "{seen:?}");
        assert_eq!(choose(7, 7, 1).len(), 7);
        assert!(choose(0, 7, 1).is_empty());
    }

    /// The stated probability against the definition, and against what happens.
    #[test]
    fn a_change_is_missed_as_often_as_stated() {
        // All subsets of a small set.
        for (total, read, changed) in
            [(10u32, 3u32, 2u32), (8, 4, 1), (9, 5, 4), (6, 1, 6), (7, 0, 3), (7, 7, 1)]
        {
            let subsets = (0u32..1 << total).filter(|set| set.count_ones() == read);
            let (mut all, mut missed) = (0.0f64, 0.0f64);
            for set in subsets {
                all += 1.0;
                missed += f64::from(u8::from(set & ((1 << changed) - 1) == 0));
            }
            let stated = miss_probability(total.into(), read.into(), changed.into());
            assert!((stated - missed / all).abs() < 1e-12, "{total} {read} {changed}: {stated}");
        }
        // 2,000 draws; the standard deviation of the share is at most 0.0112.
        for (total, read, changed) in [(1000, 100, 10), (1000, 459, 3), (200, 20, 30)] {
            let is_missed = |seed: &u64| choose(read, total, *seed).iter().all(|number| *number >= changed);
            let missed = (0..2000u64).filter(is_missed).count();
            let share = f64::from(u32::try_from(missed).unwrap()) / 2000.0;
            let stated = miss_probability(total, read, changed);
            assert!((share - stated).abs() < 0.045, "{total} {read} {changed}: {share}, stated {stated}");
        }
        assert!(miss_probability(1_000_000, Sample::Usual.count(1_000_000), 10_000) < 1e-40);
        assert!(miss_probability(45_900, Sample::Usual.count(45_900), 459) < 0.01);
        assert!(miss_probability(100, 100, 1).abs() < f64::EPSILON);
    }
}
