//! Which lines of a kernel's log are complaints that fail a case?
//!
//! The list names the heads of the kernel's own reports (a warning, an oops, a lock-up, a hung task), not
//! every line of level "error": device errors are what the fault cases are about.

/// Parts of lines that begin a kernel report.
pub const COMPLAINTS: &[&str] = &[
    "WARNING: ",
    "BUG: ",
    "kernel BUG at",
    "Oops: ",
    "Oops[",
    "general protection fault",
    "Kernel panic - ",
    "unable to handle kernel",
    "INFO: task ",
    "detected stall",
    "self-detected stall",
    "soft lockup",
    "hard LOCKUP",
    "possible circular locking",
    "possible recursive locking",
    "inconsistent lock state",
    "list_add corruption",
    "list_del corruption",
    "refcount_t: ",
    "UBSAN: ",
    "KASAN: ",
    "page allocation failure",
    "Out of memory: Killed process",
    "sleeping function called",
    "Bad page state",
    "bad unlock balance",
];

/// Most lines that are looked at: a log beyond it is itself a complaint.
const LINES_MAX: usize = 1_000_000;

/// The first line that complains and holds none of `tolerated`.
pub fn complaint<'log>(log: &'log str, tolerated: &[String]) -> Option<&'log str> {
    for (number, line) in log.lines().enumerate() {
        if number >= LINES_MAX {
            return Some("the kernel's log is longer than a million lines");
        }
        let complains = COMPLAINTS.iter().any(|part| line.contains(part));
        if complains && !tolerated.iter().any(|part| line.contains(part.as_str())) {
            return Some(line.trim());
        }
    }
    None
}
