//! Units as types, so that sectors cannot be mistaken for bytes, and arithmetic that never wraps.
//!
//! `Add`, `Sub` and `Mul` on these types panic on overflow, which is a broken invariant. Values from disk or
//! from the user go through the `checked_*` functions first, whose failure becomes an error.

use std::fmt;
use std::iter::Sum;
use std::ops::{Add, AddAssign, Mul, Sub, SubAssign};

use serde::{Deserialize, Serialize};

use super::error::{Error, Result};

/// Bytes in a sector, the kernel's unit of block addressing.
pub const SECTOR_BYTES: u64 = 512;

macro_rules! unit {
    ($(#[$meta:meta])* $name:ident) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl $name {
            /// Zero.
            pub const ZERO: Self = Self(0);
            /// The bare number.
            #[must_use]
            pub const fn get(self) -> u64 {
                self.0
            }
            /// Sum, or None if it does not fit 64 bits.
            #[must_use]
            pub fn checked_add(self, other: Self) -> Option<Self> {
                self.0.checked_add(other.0).map(Self)
            }
            /// Difference, or None if it would be negative.
            #[must_use]
            pub fn checked_sub(self, other: Self) -> Option<Self> {
                self.0.checked_sub(other.0).map(Self)
            }
            /// Difference, or zero if it would be negative.
            #[must_use]
            pub fn saturating_sub(self, other: Self) -> Self {
                Self(self.0.saturating_sub(other.0))
            }
        }
        impl Add for $name {
            type Output = Self;
            fn add(self, other: Self) -> Self {
                Self(self.0.checked_add(other.0).expect("sum of two sizes fits 64 bits"))
            }
        }
        impl Sub for $name {
            type Output = Self;
            fn sub(self, other: Self) -> Self {
                Self(self.0.checked_sub(other.0).expect("subtrahend is not larger"))
            }
        }
        impl AddAssign for $name {
            fn add_assign(&mut self, other: Self) {
                *self = *self + other;
            }
        }
        impl SubAssign for $name {
            fn sub_assign(&mut self, other: Self) {
                *self = *self - other;
            }
        }
        impl Mul<u64> for $name {
            type Output = Self;
            fn mul(self, factor: u64) -> Self {
                Self(self.0.checked_mul(factor).expect("product of sizes fits 64 bits"))
            }
        }
        impl Sum for $name {
            fn sum<I: Iterator<Item = Self>>(iter: I) -> Self {
                iter.fold(Self(0), Add::add)
            }
        }
    };
}

unit!(
    /// A count of bytes, or a byte offset on a device or file.
    Bytes
);
unit!(
    /// A count of 512-byte sectors, or a sector offset.
    Sectors
);
unit!(
    /// The index of a chunk of the origin or of the COW store.
    ChunkIx
);
unit!(
    /// The index of a segment of the origin: its offset is index x segment size.
    SegmentIx
);

impl Bytes {
    /// `n` KiB.
    #[must_use]
    pub const fn kib(n: u64) -> Self {
        Self(n * 1024)
    }
    /// `n` MiB.
    #[must_use]
    pub const fn mib(n: u64) -> Self {
        Self(n * 1024 * 1024)
    }
    /// `n` GiB.
    #[must_use]
    pub const fn gib(n: u64) -> Self {
        Self(n * 1024 * 1024 * 1024)
    }
    /// From a length in memory.
    #[must_use]
    pub fn from_len(len: usize) -> Self {
        Self(u64::try_from(len).expect("usize is at most 64 bits on Linux"))
    }
    /// As a length in memory. It panics only on a 32-bit host with an unbounded buffer.
    #[must_use]
    pub fn as_len(self) -> usize {
        usize::try_from(self.0).expect("a buffer length fits usize")
    }
    /// Whole sectors, or an error naming `what` if it is not a multiple of 512.
    pub fn to_sectors(self, what: &str) -> Result<Sectors> {
        if self.0.is_multiple_of(SECTOR_BYTES) {
            Ok(Sectors(self.0 / SECTOR_BYTES))
        } else {
            Err(Error::usage(format!("{what}: {} bytes is not a multiple of 512", self.0)))
        }
    }
    /// Rounded down to a multiple of `unit`.
    #[must_use]
    pub fn align_down(self, unit: Self) -> Self {
        Self(self.0 - self.0 % unit.0)
    }
    /// Rounded up to a multiple of `unit`.
    #[must_use]
    pub fn align_up(self, unit: Self) -> Self {
        Self(self.0.next_multiple_of(unit.0))
    }
    /// True for a multiple of `unit`.
    #[must_use]
    pub fn is_aligned(self, unit: Self) -> bool {
        self.0.is_multiple_of(unit.0)
    }
    /// Parses "4096", "64K", "64KiB", "1M", "1.5GiB" (powers of 1024, any case).
    ///
    /// # Errors
    /// [`ErrorKind::Usage`](super::ErrorKind::Usage) for anything else, or over 64 bits.
    pub fn parse(text: &str) -> Result<Self> {
        let bad = || {
            Error::usage(format!("'{text}' is not a size")).next("write a size as 4096, 64KiB, 1MiB or 2GiB")
        };
        let trimmed = text.trim();
        let split = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
        let (number, suffix) = trimmed.split_at(split);
        let shift = match suffix.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 0u32,
            "k" | "kib" => 10,
            "m" | "mib" => 20,
            "g" | "gib" => 30,
            "t" | "tib" => 40,
            "p" | "pib" => 50,
            _ => return Err(bad()),
        };
        let (whole, fraction) = match number.split_once('.') {
            Some((whole, fraction)) => (whole, fraction),
            None => (number, ""),
        };
        if whole.is_empty() || fraction.len() > 9 || (fraction.is_empty() && number.contains('.')) {
            return Err(bad());
        }
        let whole: u64 = whole.parse().map_err(|_| bad())?;
        let unit = 1u64 << shift;
        let mut total = whole.checked_mul(unit).ok_or_else(bad)?;
        if !fraction.is_empty() {
            let scale = 10u128.pow(u32::try_from(fraction.len()).map_err(|_| bad())?);
            let digits: u128 = fraction.parse().map_err(|_| bad())?;
            let part = u64::try_from(digits * u128::from(unit) / scale).map_err(|_| bad())?;
            total = total.checked_add(part).ok_or_else(bad)?;
        }
        Ok(Self(total))
    }
}

impl Sectors {
    /// In bytes.
    #[must_use]
    pub fn bytes(self) -> Bytes {
        Bytes(self.0) * SECTOR_BYTES
    }
    /// In bytes, or None if the value, read from outside, does not fit.
    #[must_use]
    pub fn checked_bytes(self) -> Option<Bytes> {
        self.0.checked_mul(SECTOR_BYTES).map(Bytes)
    }
}

impl fmt::Display for Bytes {
    /// Human form with at most one decimal: "1.5 GiB", "512 B".
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
        if self.0 < 1024 {
            return write!(f, "{} B", self.0);
        }
        let mut shift = 10u32;
        let mut unit = 0usize;
        while unit + 1 < UNITS.len() && self.0 >> (shift + 10) != 0 {
            shift += 10;
            unit += 1;
        }
        let tenths = (u128::from(self.0) * 10) >> shift;
        if tenths.is_multiple_of(10) {
            write!(f, "{} {}", tenths / 10, UNITS[unit])
        } else {
            write!(f, "{}.{} {}", tenths / 10, tenths % 10, UNITS[unit])
        }
    }
}

impl fmt::Display for Sectors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} sectors", self.0)
    }
}

macro_rules! power_of_two {
    ($(#[$meta:meta])* $name:ident, $min:expr, $max:expr, $what:literal) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[serde(try_from = "u64", into = "u64")]
        pub struct $name(u64);

        impl $name {
            /// Smallest value.
            pub const MIN: Bytes = $min;
            /// Largest value.
            pub const MAX: Bytes = $max;
            /// Checked: a power of two between `MIN` and `MAX`.
            ///
            /// # Errors
            /// [`ErrorKind::Usage`](super::ErrorKind::Usage) otherwise.
            pub fn new(bytes: Bytes) -> Result<Self> {
                if bytes.0.is_power_of_two() && bytes >= Self::MIN && bytes <= Self::MAX {
                    Ok(Self(bytes.0))
                } else {
                    Err(Error::usage(format!(
                        concat!($what, " of {} bytes is not a power of two from {} to {}"),
                        bytes.0, Self::MIN, Self::MAX
                    )))
                }
            }
            /// In bytes.
            #[must_use]
            pub fn bytes(self) -> Bytes {
                Bytes(self.0)
            }
            /// In sectors.
            #[must_use]
            pub fn sectors(self) -> Sectors {
                Sectors(self.0 / SECTOR_BYTES)
            }
            /// How many of these cover `size`, the last one possibly in part.
            #[must_use]
            pub fn count_for(self, size: Bytes) -> u64 {
                size.0.div_ceil(self.0)
            }
        }
        impl TryFrom<u64> for $name {
            type Error = Error;
            fn try_from(bytes: u64) -> Result<Self> {
                Self::new(Bytes(bytes))
            }
        }
        impl From<$name> for u64 {
            fn from(value: $name) -> u64 {
                value.0
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.bytes().fmt(f)
            }
        }
    };
}

power_of_two!(
    /// The unit of copy-on-write, a power of two, at least 4 KiB: zram's logical block is 4 KiB, and the
    /// kernel requires a chunk to be a multiple of the store's block.
    ChunkSize,
    Bytes::kib(4),
    Bytes::mib(1),
    "a chunk"
);
power_of_two!(
    /// The unit that is copied, framed and checksummed.
    SegmentSize,
    Bytes::kib(64),
    Bytes::mib(16),
    "a segment"
);

impl Default for ChunkSize {
    fn default() -> Self {
        Self(4096)
    }
}

impl Default for SegmentSize {
    fn default() -> Self {
        Self(1 << 20)
    }
}

impl ChunkSize {
    /// Where chunk `index` begins, or None if it does not fit 64 bits.
    #[must_use]
    pub fn offset_of(self, index: ChunkIx) -> Option<Bytes> {
        index.0.checked_mul(self.0).map(Bytes)
    }
}

impl SegmentSize {
    /// Where segment `index` begins, or None if it does not fit 64 bits.
    #[must_use]
    pub fn offset_of(self, index: SegmentIx) -> Option<Bytes> {
        index.0.checked_mul(self.0).map(Bytes)
    }
    /// The segment that holds byte `offset`.
    #[must_use]
    pub fn index_of(self, offset: Bytes) -> SegmentIx {
        SegmentIx(offset.0 / self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_parse() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("64K", 65536),
            ("1MiB", 1 << 20),
            ("1.5g", 3 << 29),
            (" 2 TiB ", 2 << 40),
        ] {
            assert_eq!(Bytes::parse(text).unwrap(), Bytes(bytes), "{text}");
        }
        for text in ["", "x", "1.", ".5", "-1", "1MB", "99999999999999999999", "16777216T", "1.0000000001G"] {
            assert!(Bytes::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_print() {
        for (bytes, text) in
            [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (u64::MAX, "15.9 EiB")]
        {
            assert_eq!(Bytes(bytes).to_string(), text);
        }
    }

    #[test]
    fn powers_of_two_are_checked() {
        assert!(ChunkSize::new(Bytes(4096)).is_ok());
        assert!(ChunkSize::new(Bytes(2048)).is_err());
        assert!(SegmentSize::new(Bytes(3 << 20)).is_err());
        assert_eq!(SegmentSize::default().count_for(Bytes((1 << 20) + 1)), 2);
    }
}
