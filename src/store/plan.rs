//! Plans the size of a store and its parts. Shown by `--dry-run`.

use std::fs;

use serde::{Deserialize, Serialize};

use crate::base::{Bytes, ChunkSize, Error, ErrorKind, Result};

use super::place::TailPlace;
use super::size;

/// The request for a store, with every name resolved.
#[derive(Clone, Debug)]
pub struct StoreConfig {
    /// The origin's device-mapper name, from which the name of the store's device is derived.
    pub origin_name: String,
    /// The volume's name, for the UUID.
    pub volume: String,
    /// The store's id, the name of its record (see [`new_id`](crate::dm::naming::new_id)). A job with one store has the
    /// same id.
    pub id: String,
    /// The id of the job, for the UUID and the name of the store's device.
    pub job: String,
    /// Size of the origin.
    pub origin_bytes: Bytes,
    /// Unit of copy-on-write.
    pub chunk: ChunkSize,
    /// The place of the tail.
    pub place: TailPlace,
    /// Largest size of head and tail together; None: the most that the origin can need.
    pub size_max: Option<Bytes>,
    /// Size of the RAM head, zero for none; None: derived from the available memory.
    pub ram: Option<Bytes>,
    /// How many stores of the job share the available memory.
    pub ram_shares: u64,
    /// Keep the store after the copy.
    pub keep: bool,
}

/// What will be created, as `--dry-run` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StorePlan {
    /// The place of the tail.
    pub place: TailPlace,
    /// The RAM head; zero for none.
    pub head_bytes: Bytes,
    /// The tail at creation.
    pub tail_bytes: Bytes,
    /// Largest size of head and tail together.
    pub total_bytes_max: Bytes,
    /// Unit of copy-on-write.
    pub chunk: ChunkSize,
    /// The store is kept after the copy.
    pub keep: bool,
}

impl StoreConfig {
    /// Checks the configuration against the system and sets the sizes. Changes nothing. Does not check
    /// whether the tail's place may wait for the origin.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] for impossible sizes, [`ErrorKind::NoSpace`] if the tail's place is too small.
    pub fn plan(&self) -> Result<StorePlan> {
        let worst = size::worst_case(self.origin_bytes, self.chunk)?;
        let least = size::smallest(self.chunk);
        let total_max = match self.size_max {
            Some(wanted) if wanted < least => {
                return Err(Error::usage(format!(
                    "a store of {wanted} with chunks of {} is too small",
                    self.chunk
                ))
                .next(format!("--store-size must be at least {least}")));
            }
            Some(wanted) => wanted.align_down(size::STORE_UNIT).min(worst.max(least)),
            None => worst.max(least),
        };
        let head_bytes = self.head_bytes(total_max)?;
        let room = self.place.available()?;
        let tail_max = total_max - head_bytes;
        let tail_bytes = match &self.place {
            TailPlace::Device { .. } => room.min(tail_max),
            _ => size::first_tail(self.origin_bytes, tail_max).min(room),
        };
        let least_tail = match &self.place {
            TailPlace::Device { .. } => size::TAIL_BYTES_MIN,
            _ => size::TAIL_FIRST_REFUSED_BELOW.min(tail_max),
        };
        if tail_bytes < least_tail || head_bytes + tail_bytes < least {
            return Err(Error::new(
                ErrorKind::NoSpace,
                format!("{} has {room} for the store, which needs {least_tail}", self.place.path().display()),
            )
            .state("nothing was changed")
            .next("choose another place with --store"));
        }
        let total_bytes_max = match &self.place {
            TailPlace::Device { .. } => head_bytes + tail_bytes,
            _ => total_max,
        };
        Ok(StorePlan {
            place: self.place.clone(),
            head_bytes,
            tail_bytes,
            total_bytes_max,
            chunk: self.chunk,
            keep: self.keep,
        })
    }

    fn head_bytes(&self, total_max: Bytes) -> Result<Bytes> {
        let tail_least = size::TAIL_BYTES_MIN;
        match self.ram {
            Some(Bytes::ZERO) => Ok(Bytes::ZERO),
            Some(_) if self.keep => {
                Err(Error::usage("a store that is kept has no RAM head")
                    .next("omit --store-ram or --keep-store"))
            }
            Some(wanted) => {
                let wanted = wanted.align_up(size::STORE_UNIT);
                if wanted + tail_least > total_max {
                    return Err(Error::usage(format!(
                        "--store-ram {wanted} leaves no space on disk in a store of at most {total_max}"
                    ))
                    .next("make --store-ram smaller or --store-size larger"));
                }
                Ok(wanted)
            }
            None if self.keep => Ok(Bytes::ZERO),
            None => {
                let half = Bytes(total_max.get() / 2).align_down(size::STORE_UNIT);
                let share = Bytes(memory_available().get() / self.ram_shares.max(1));
                Ok(size::head_default(share).min(half))
            }
        }
    }
}

/// Memory available without swapping (`MemAvailable`); zero if the kernel does not report it.
fn memory_available() -> Bytes {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    parse_available(&text).unwrap_or(Bytes::ZERO)
}

fn parse_available(text: &str) -> Option<Bytes> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024).map(Bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::DeviceNumber;
    use crate::dm::naming;

    fn config(place: TailPlace) -> StoreConfig {
        StoreConfig {
            origin_name: "data".to_owned(),
            volume: "data".to_owned(),
            id: naming::new_id(),
            job: naming::new_id(),
            origin_bytes: Bytes::gib(10),
            chunk: ChunkSize::default(),
            place,
            size_max: None,
            ram: None,
            ram_shares: 1,
            keep: false,
        }
    }

    fn device(bytes: Bytes) -> TailPlace {
        TailPlace::Device { path: "/dev/x".into(), number: DeviceNumber { major: 8, minor: 16 }, bytes }
    }

    #[test]
    fn sizes_follow_the_request() {
        let mut c = config(device(Bytes::mib(100)));
        c.ram = Some(Bytes::mib(8));
        let plan = c.plan().unwrap();
        assert_eq!((plan.head_bytes, plan.tail_bytes), (Bytes::mib(8), Bytes::mib(100)));
        assert_eq!(plan.total_bytes_max, Bytes::mib(108));

        c.size_max = Some(Bytes::mib(20));
        assert_eq!(c.plan().unwrap().tail_bytes, Bytes::mib(12));

        c.size_max = Some(Bytes::mib(8));
        assert_eq!(c.plan().unwrap_err().kind(), ErrorKind::Usage);
        c.size_max = Some(Bytes::kib(4));
        assert_eq!(c.plan().unwrap_err().kind(), ErrorKind::Usage);

        let mut c = config(TailPlace::Directory(std::env::temp_dir()));
        c.ram = Some(Bytes::ZERO);
        let plan = c.plan().unwrap();
        assert_eq!(plan.head_bytes, Bytes::ZERO);
        assert_eq!(plan.tail_bytes, Bytes::mib(256));
        assert_eq!(plan.total_bytes_max, size::worst_case(Bytes::gib(10), c.chunk).unwrap());
    }

    #[test]
    fn stores_of_one_job_share_the_memory() {
        let mut c = config(device(Bytes::gib(4)));
        let alone = c.plan().unwrap().head_bytes;
        c.ram_shares = 1 << 40;
        assert!(alone > Bytes::ZERO);
        assert_eq!(c.plan().unwrap().head_bytes, Bytes::ZERO);
    }

    #[test]
    fn a_small_origin_gets_a_small_store() {
        let mut c = config(TailPlace::Directory(std::env::temp_dir()));
        c.origin_bytes = Bytes::mib(16);
        c.ram = Some(Bytes::ZERO);
        let plan = c.plan().unwrap();
        assert_eq!(plan.tail_bytes, plan.total_bytes_max);
        assert!(plan.tail_bytes <= Bytes::mib(18));
    }

    #[test]
    fn a_kept_store_is_all_on_disk() {
        let mut c = config(device(Bytes::gib(1)));
        c.keep = true;
        assert_eq!(c.plan().unwrap().head_bytes, Bytes::ZERO);
        c.ram = Some(Bytes::mib(8));
        assert_eq!(c.plan().unwrap_err().kind(), ErrorKind::Usage);
    }

    #[test]
    fn a_device_that_is_too_small_is_no_space() {
        let mut c = config(device(Bytes::kib(512)));
        c.ram = Some(Bytes::ZERO);
        assert_eq!(c.plan().unwrap_err().kind(), ErrorKind::NoSpace);
    }

    #[test]
    fn available_memory_is_read() {
        let text = "MemTotal:       24683520 kB\nMemFree: 1 kB\nMemAvailable:   1024 kB\n";
        assert_eq!(parse_available(text), Some(Bytes::mib(1)));
        assert_eq!(parse_available("MemAvailable: x kB"), None);
        assert_eq!(parse_available(""), None);
        assert!(memory_available() > Bytes::ZERO);
    }
}
