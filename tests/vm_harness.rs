//! The part of the VM harness that is pure, tested without a guest: which lines of a kernel's log are
//! complaints.

#[path = "../vm-tests/harness/kernel_log.rs"]
mod kernel_log;

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
