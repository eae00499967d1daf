//! The VM cases: each boots a real kernel in its own guest and runs a script there as root. The guest is a user-mode
//! kernel at native speed, or a stock kernel under QEMU; `--list` shows which case runs where.
//!
//! ```text
//! cargo test --release --features vm --test vm -- [FILTER...] [OPTION...]
//!
//!   FILTER     only the runs whose name contains one of these; a full name (CASE-KERNEL) runs in any depth
//!   --kernel K only the runs on this kernel: um, 6.12 or 6.1
//!   --list     show which case runs where and what it needs, run nothing
//!   --full     every case on every kernel that can run it, not only on the cheapest and the most realistic one
//!   --all      also run what passed before with the same binary, script, harness and kernel
//!   --bench    the measurements instead of the tests; scripts/bench reads their results
//!   --jobs N   processors to use: a user-mode guest takes one, QEMU two
//!   --keep     also keep the disks of cases that pass
//! ```
//!
//! `TIDEMARK_SEED` repeats a run's seed; `TIDEMARK_NO_SKIP=1` or `CI=true` makes a skip a failure;
//! `TIDEMARK_VM_ACCEL` is `tcg` or `kvm` (probed if unset); `TIDEMARK_VM_TIME_SCALE` multiplies the time limits for a
//! slow machine. The last line is `N passed, N failed, N skipped`.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a test runner speaks on stdout")]

mod cases;
mod harness;

use std::process::ExitCode;

fn main() -> ExitCode {
    let options = match harness::Options::parse(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(message) => {
            eprintln!("vm: {message:#}");
            return ExitCode::from(2);
        }
    };
    match harness::run(cases::all(), &options) {
        Ok(tally) => {
            if !options.only_lists() {
                println!("{tally}");
            }
            if tally.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(message) => {
            eprintln!("vm: {message:#}");
            ExitCode::FAILURE
        }
    }
}
