//! The `tidemark` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    match tidemark::hidden::run() {
        Some(code) => code,
        None => tidemark::main(),
    }
}
