//! The lines of a kernel's log that are complaints and fail a case.
//!
//! The list contains the first lines of the kernel's own reports (a warning, an oops, a lock-up, a hung task), not
//! every line of level "error": fault cases provoke device errors.

/// Parts of lines that start a kernel report.
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

/// Maximum number of lines checked: a longer log is itself a complaint.
const LINES_MAX: usize = 1_000_000;

/// The first complaint that contains none of `tolerated`.
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
