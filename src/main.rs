//! The `tidemark` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    match tidemark::op::hidden::run() {
        Some(code) => code,
        None => tidemark::cli::main(),
    }
}
