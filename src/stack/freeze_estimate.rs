//! Estimates how long a freeze will take, while nothing is frozen.
//!
//! A freeze (FIFREEZE) cannot be stopped: the kernel waits in it for every write of the filesystem, ignores
//! signals, and a thaw waits until it is done (Linux `fs/super.c`: `freeze_super` holds `s_umount`). So the
//! only way to keep the budget is not to start the freeze. In a freeze the kernel
//! 1. does what syncfs(2) does, for what has become dirty since the last sync;
//! 2. brings the filesystem to rest: at most [`SERIAL_WRITES`] writes, one after the other (ext4 writes back
//!    its journal and marks it empty; xfs forces its log and writes its superblock).
//!
//! The first part takes as long as the last of several syncs beforehand, each of which has less to do than
//! the one before as long as the disk keeps up with the writers. The second part takes [`SERIAL_WRITES`]
//! times the present duration of a write, measured in the sync whose writes were fastest.

use std::time::{Duration, Instant};

use crate::base::{DeviceNumber, Error, Result};
use crate::topology::Topology;

/// Writes that the freeze of one filesystem issues one after the other. Measured with dm-delay below ext4: 9
/// under appends, 14 after one late write.
const SERIAL_WRITES: u32 = 16;

/// Most syncs.
const SYNCS_MAX: u32 = 5;

/// A sync this short is not repeated.
const SYNC_SHORT: Duration = Duration::from_millis(20);

/// The expected duration of a freeze.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Expected {
    /// The last sync.
    sync: Duration,
    /// One write.
    write: Duration,
    /// Number of filesystems.
    count: u32,
}

impl Expected {
    /// The whole freeze.
    pub(super) fn total(self) -> Duration {
        self.sync + self.write * SERIAL_WRITES * self.count
    }

    /// The error for a freeze that exceeds the budget.
    pub(super) fn refusal(self, budget: Duration) -> Error {
        let total = self.total();
        Error::refused(format!(
            "the freeze would hold writers for up to {:.1} s, longer than the freeze budget ({budget:?}): writing back what \
             was dirty took {:.1?}, and one write to the origin takes {:.1?}",
            total.as_secs_f64(),
            self.sync,
            self.write
        ))
        .state("nothing was frozen")
        .next(format!(
            "copy while there is less load, or allow it: --freeze-budget {}s",
            total.as_secs() + 1
        ))
    }
}

/// Runs `sync` until it is no longer getting clearly shorter. Returns the expected duration of a freeze of
/// `count` filesystems on `origins` after that. The origin with the slowest writes counts.
///
/// # Errors
/// Those of `sync`.
pub(super) fn expected_freeze(
    origins: &[DeviceNumber],
    count: usize,
    sync: impl Fn() -> Result<()>,
) -> Result<Expected> {
    let topology = Topology::default();
    let mut last = Duration::MAX;
    let mut write: Option<Duration> = None;
    for _ in 0..SYNCS_MAX {
        let stats = || origins.iter().map(|origin| topology.disk_stat(*origin));
        let (start, before) = (Instant::now(), stats().collect::<Vec<_>>());
        sync()?;
        let took = start.elapsed();
        // The writes of a large sync wait in a queue; those of a freeze are issued one by one. So the fastest
        // counts.
        let means = stats().zip(before).filter_map(|(now, then)| now?.mean_write_since(&then?));
        let mean = means.max();
        write = write.into_iter().chain(mean).min();
        let is_enough = took <= SYNC_SHORT || took > last / 4 * 3;
        last = last.min(took);
        if is_enough {
            break;
        }
    }
    let count = u32::try_from(count).unwrap_or(u32::MAX);
    // If nothing was written, a sync is a flush, which is the longest part of a write.
    Ok(Expected { sync: last, write: write.unwrap_or(last / count.max(1)), count })
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;
    use crate::base::ErrorKind;

    #[test]
    fn a_refusal_gives_the_expected_time() {
        let expected =
            Expected { sync: Duration::from_millis(700), write: Duration::from_millis(50), count: 2 };
        assert_eq!(expected.total(), Duration::from_millis(700 + 50 * 2 * u64::from(SERIAL_WRITES)));
        let error = expected.refusal(Duration::from_millis(500));
        assert_eq!(error.kind(), ErrorKind::Refused);
        assert!(error.to_string().contains("would hold writers for up to 2.3 s"), "{error}");
        assert_eq!(
            error.next_step().unwrap(),
            "copy while there is less load, or allow it: --freeze-budget 3s"
        );
    }

    #[test]
    fn syncs_are_repeated_while_they_become_shorter() {
        let nowhere = DeviceNumber { major: 0, minor: 0 };
        for (times_ms, ran) in
            [(vec![1, 90], 1), (vec![200, 100, 95, 90], 3), (vec![500, 200, 60, 30, 25, 24], 5)]
        {
            let left = RefCell::new(times_ms.into_iter());
            let count = RefCell::new(0);
            expected_freeze(&[nowhere], 1, || {
                *count.borrow_mut() += 1;
                std::thread::sleep(Duration::from_millis(left.borrow_mut().next().unwrap()));
                Ok(())
            })
            .unwrap();
            assert_eq!(*count.borrow(), ran);
        }
        let failed =
            expected_freeze(&[nowhere], 1, || Err(Error::new(ErrorKind::Interrupted, "asked to stop")));
        assert_eq!(failed.unwrap_err().kind(), ErrorKind::Interrupted);
    }
}
