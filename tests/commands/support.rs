//! Running the command, and made-up data.

use std::process::{Command, Output, Stdio};

/// The command with these arguments, nothing on standard input, no log options inherited.
pub fn tidemark(arguments: &[&str]) -> Command {
    let mut command = Command::new(assert_cmd::cargo::cargo_bin!("tidemark"));
    command.args(arguments).env_remove("TIDEMARK_LOG").stdin(Stdio::null());
    command
}

/// What came of it.
pub struct Ran {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

pub fn run(arguments: &[&str]) -> Ran {
    tidemark(arguments).output().unwrap().into()
}

/// The one JSON line of type `error` that standard error must consist of.
pub fn json_error(ran: &Ran) -> serde_json::Value {
    assert_eq!(ran.stderr.lines().count(), 1, "one line: {}", ran.stderr);
    let value: serde_json::Value = serde_json::from_str(&ran.stderr).unwrap();
    assert_eq!(value["tidemark"], 1);
    assert_eq!(value["type"], "error");
    assert_eq!(value["exit_code"], ran.code.unwrap());
    value
}
