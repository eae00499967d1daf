//! Which settings of a block device's queue did an administrator make, and are they still in force?
//!
//! A change of a device-mapper table computes the limits of the queue anew from what lies beneath
//! (`dm_table_set_restrictions` in Linux `drivers/md/dm-table.c`) and drops what an administrator has set with that. Put back
//! after every change are the read-ahead (also lvm2's `--readahead`) and the largest request. Others that are dropped (seen
//! on 6.12: `discard_max_bytes`, `write_cache`; so is `rotational`) tell what the table can do as well: with another table
//! the old value may be wrong, so they are put back with the table that they were made for.

use std::fs;
use std::path::PathBuf;

use crate::base::DeviceNumber;

/// The files, below the directory of the queue.
const FILES: [&str; 5] =
    ["read_ahead_kb", "max_sectors_kb", "discard_max_bytes", "write_cache", "rotational"];

/// Of those, the first ones are right with any table.
const ANY_TABLE: usize = 2;

/// Settings as they were at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueueSettings {
    directory: PathBuf,
    /// In the order of [`FILES`]; None for one that cannot be read.
    values: [Option<String>; FILES.len()],
}

impl QueueSettings {
    /// Of the device with this number.
    #[must_use]
    pub fn read(number: DeviceNumber) -> Self {
        Self::read_in(PathBuf::from(format!("/sys/dev/block/{number}/queue")))
    }

    fn read_in(directory: PathBuf) -> Self {
        let values = FILES.map(|file| fs::read_to_string(directory.join(file)).ok());
        Self { directory, values }
    }

    /// Writes what is no longer so of that which is right with any table. The kernel may wait for the device's I/O in
    /// flight: not while the device is suspended. Answers the files that could not be written: their settings are lost.
    #[must_use]
    pub fn put_back(&self) -> Vec<PathBuf> {
        self.put_back_first(ANY_TABLE)
    }

    /// As [`QueueSettings::put_back`], but everything: the table is the one that it was read with.
    #[must_use]
    pub fn put_back_all(&self) -> Vec<PathBuf> {
        self.put_back_first(FILES.len())
    }

    fn put_back_first(&self, count: usize) -> Vec<PathBuf> {
        let now = Self::read_in(self.directory.clone());
        let mut lost = Vec::new();
        for (file, (before, now)) in FILES.iter().zip(self.values.iter().zip(&now.values)).take(count) {
            let path = self.directory.join(file);
            if let Some(value) = before
                && before != now
                && fs::write(&path, value).is_err()
            {
                lost.push(path);
            }
        }
        lost
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_changed_is_put_back_and_nothing_else_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = |file: &str| dir.path().join(file);
        fs::write(path(FILES[0]), "4096\n").unwrap();
        fs::write(path(FILES[1]), "64\n").unwrap();
        fs::write(path(FILES[3]), "write through\n").unwrap();
        let settings = QueueSettings::read_in(dir.path().to_owned());
        fs::write(path(FILES[0]), "128\n").unwrap();
        fs::write(path(FILES[3]), "write back\n").unwrap();
        assert!(settings.put_back().is_empty());
        assert_eq!(fs::read_to_string(path(FILES[0])).unwrap(), "4096\n");
        // What depends on the table waits for it.
        assert_eq!(fs::read_to_string(path(FILES[3])).unwrap(), "write back\n");
        assert!(settings.put_back_all().is_empty());
        assert_eq!(fs::read_to_string(path(FILES[3])).unwrap(), "write through\n");
        // A file that is gone is not made.
        fs::remove_file(path(FILES[1])).unwrap();
        let settings = QueueSettings::read_in(dir.path().to_owned());
        assert!(settings.put_back().is_empty());
        assert!(!path(FILES[1]).exists());
    }

    #[test]
    fn what_cannot_be_put_back_is_told() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(FILES[0]), "4096\n").unwrap();
        let settings = QueueSettings::read_in(dir.path().to_owned());
        drop(dir);
        assert_eq!(settings.put_back(), [settings.directory.join(FILES[0])]);
    }
}
