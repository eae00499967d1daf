//! A device by the kernel's number for it: major and minor.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::error::{Error, Result};

/// A device number. Printed and parsed in the form of the kernel's tables: "253:4".
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DeviceNumber {
    /// Major number: the driver.
    pub major: u32,
    /// Minor number: the device.
    pub minor: u32,
}

impl DeviceNumber {
    /// From `st_dev` or `st_rdev` of stat(2).
    #[must_use]
    pub fn from_dev(dev: libc::dev_t) -> Self {
        Self { major: libc::major(dev), minor: libc::minor(dev) }
    }

    /// As stat(2) and mknod(2) take it.
    #[must_use]
    pub fn to_dev(self) -> libc::dev_t {
        libc::makedev(self.major, self.minor)
    }
}

impl fmt::Display for DeviceNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

impl FromStr for DeviceNumber {
    type Err = Error;
    /// Parses "253:4".
    fn from_str(text: &str) -> Result<Self> {
        text.trim()
            .split_once(':')
            .and_then(|(major, minor)| Some(Self { major: major.parse().ok()?, minor: minor.parse().ok()? }))
            .ok_or_else(|| Error::bad_data(format!("'{text}' is not a device number such as 253:4")))
    }
}

impl TryFrom<String> for DeviceNumber {
    type Error = Error;
    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<DeviceNumber> for String {
    fn from(number: DeviceNumber) -> Self {
        number.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_round_trip() {
        let number = DeviceNumber { major: 253, minor: 70_000 };
        assert_eq!(number.to_string().parse::<DeviceNumber>().unwrap(), number);
        assert_eq!(DeviceNumber::from_dev(number.to_dev()), number);
        for bad in ["", "1", "1:", ":1", "a:b", "1:2:3", "-1:0", "4294967296:0"] {
            assert!(bad.parse::<DeviceNumber>().is_err(), "{bad}");
        }
    }
}
