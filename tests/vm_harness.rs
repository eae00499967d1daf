//! Tests of the parts of the VM harness that need no guest: complaints in a kernel's log, and parallel runs.

#[path = "../vm-tests/harness/kernel_log.rs"]
mod kernel_log;
#[path = "../vm-tests/harness/pool.rs"]
mod pool;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex};
use std::time::Duration;

use kernel_log::complaint;

#[test]
fn a_quiet_boot_does_not_complain() {
    let log = "[    0.1] Linux version 6.12\n[    1.0] device-mapper: snapshots: Invalidating snapshot: Error reading/writing.\n\
               [    2.0] Buffer I/O error on dev dm-3, logical block 5, lost async page write\n";
    assert_eq!(complaint(log, &[]), None);
}

#[test]
fn each_kind_of_report_is_noticed() {
    for line in [
        "[ 3.1] WARNING: CPU: 1 PID: 77 at drivers/md/dm.c:512 dm_io+0x1/0x2",
        "[ 3.1] BUG: kernel NULL pointer dereference, address: 0000000000000008",
        "[ 3.1] kernel BUG at drivers/md/dm-snap.c:1000!",
        "[ 3.1] Oops: 0000 [#1] PREEMPT SMP NOPTI",
        "[ 3.1] INFO: task kworker/0:1:33 blocked for more than 60 seconds.",
        "[ 3.1] rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:",
        "[ 3.1] watchdog: BUG: soft lockup - CPU#0 stuck for 26s!",
        "[ 3.1] Kernel panic - not syncing: Attempted to kill init!",
    ] {
        let log = format!("[ 1.0] fine\n{line}\n[ 4.0] fine\n");
        assert_eq!(complaint(&log, &[]), Some(line));
    }
}

#[test]
fn a_case_may_provoke_one_complaint_and_no_other() {
    let log = "[1.0] WARNING: expected here\n[2.0] WARNING: not expected\n";
    assert_eq!(complaint(log, &["expected here".to_owned()]), Some("[2.0] WARNING: not expected"));
}

/// A regression: the queue was once locked while a guest ran, so that only one ran at a time.
#[test]
fn as_many_run_at_once_as_are_asked_for() {
    const AT_ONCE: usize = 3;
    const GIVEN_UP: Duration = Duration::from_secs(30);
    let (inside, changed) = (Mutex::new(0), Condvar::new());
    let met = Mutex::new(0);
    pool::for_each(
        AT_ONCE,
        1,
        0..AT_ONCE,
        |_| false,
        |_, _| {
            let mut count = pool::locked(&inside);
            *count += 1;
            changed.notify_all();
            let (_count, waited) = changed.wait_timeout_while(count, GIVEN_UP, |it| *it < AT_ONCE).unwrap();
            *pool::locked(&met) += usize::from(!waited.timed_out());
        },
    );
    assert_eq!(*pool::locked(&met), AT_ONCE);
}

#[test]
fn each_of_those_at_work_has_a_number_of_its_own() {
    const WORKERS: usize = 3;
    let busy = Mutex::new([false; WORKERS]);
    pool::for_each(
        WORKERS,
        1,
        0..30,
        |_| false,
        |worker, _| {
            assert!(
                !std::mem::replace(&mut pool::locked(&busy)[worker], true),
                "two at once are worker {worker}"
            );
            std::thread::sleep(Duration::from_millis(1));
            pool::locked(&busy)[worker] = false;
        },
    );
}

#[test]
fn every_item_is_worked_on_once() {
    for workers in [0, 1, 2, 9] {
        let done = Mutex::new(Vec::new());
        pool::for_each(workers, 1, 0..7, |item| item % 3 == 0, |_, item| pool::locked(&done).push(item));
        let mut done = done.into_inner().unwrap();
        done.sort_unstable();
        assert_eq!(done, (0..7).collect::<Vec<_>>(), "{workers} workers");
    }
}

#[test]
fn no_more_heavy_items_are_worked_on_at_once_than_allowed() {
    let (inside, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
    pool::for_each(
        4,
        2,
        0..40,
        |item| item % 2 == 0,
        |_, item| {
            if item % 2 == 0 {
                most.fetch_max(inside.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                std::thread::sleep(Duration::from_millis(1));
                inside.fetch_sub(1, Ordering::SeqCst);
            }
        },
    );
    assert_eq!(most.load(Ordering::SeqCst), 2);
}
