//! The contract of every command. A new command is one row in [`COMMANDS`]; a test ensures that none is missing.

use std::path::Path;
use std::process::Stdio;

use super::support::{is_root, json_error, output, run, spawn, tidemark};

/// A command and its arguments.
struct Row {
    name: &'static str,
    /// Required arguments; omitting them is a usage error.
    required: &'static [&'static str],
    /// Arguments that name an input which does not exist ("MISSING" stands for it), if the command reads one.
    missing_input: Option<&'static [&'static str]>,
}

const COMMANDS: &[Row] = &[
    Row {
        name: "attach",
        required: &["DEVICE", "--name", "x"],
        missing_input: Some(&["MISSING", "--name", "tidemark-test-x"]),
    },
    Row { name: "detach", required: &["tidemark-test-no-such-volume"], missing_input: None },
    Row { name: "copy", required: &["ORIGIN", "SECONDARY"], missing_input: Some(&["MISSING", "OUT"]) },
    Row { name: "snapshot", required: &["show", "tidemark-test-none@1"], missing_input: None },
    Row { name: "monitor", required: &[], missing_input: None },
    Row { name: "resume", required: &[], missing_input: None },
    Row { name: "restore", required: &["ARCHIVE", "TARGET"], missing_input: Some(&["MISSING", "OUT"]) },
    Row { name: "verify", required: &["ARCHIVE"], missing_input: Some(&["MISSING"]) },
    Row { name: "inspect", required: &["ARCHIVE"], missing_input: Some(&["MISSING"]) },
    Row {
        name: "archive",
        required: &["merge", "ARCHIVE", "OUT"],
        missing_input: Some(&["merge", "MISSING", "OUT"]),
    },
    Row { name: "status", required: &[], missing_input: None },
    Row { name: "recover", required: &[], missing_input: None },
    Row { name: "doctor", required: &[], missing_input: None },
    Row { name: "completions", required: &["bash"], missing_input: None },
    Row { name: "man", required: &[], missing_input: None },
];

#[test]
fn help_goes_to_standard_output_and_has_examples() {
    for row in COMMANDS {
        for help in ["--help", "-h"] {
            let ran = run(&[row.name, help]);
            assert_eq!(ran.code, Some(0), "{} {help}", row.name);
            assert_eq!(ran.stderr, "", "{} {help}", row.name);
            assert!(ran.stdout.contains("Examples:"), "{} {help}:\n{}", row.name, ran.stdout);
            assert!(ran.stdout.contains(&format!("tidemark {}", row.name)), "{}", row.name);
            assert!(ran.stdout.contains("--json"), "{}", row.name);
        }
    }
}

#[test]
fn the_commands_of_snapshot_keep_the_contract() {
    for (name, required) in [
        ("create", &["tidemark-test-none"][..]),
        ("list", &[]),
        ("show", &["tidemark-test-none@1"]),
        ("mount", &["tidemark-test-none@1", "/mnt"]),
        ("clone", &["tidemark-test-none@1"]),
        ("rollback", &["tidemark-test-none@1"]),
        ("delete", &["tidemark-test-none@1"]),
    ] {
        let ran = run(&["snapshot", name, "--help"]);
        assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""), "{name}");
        assert!(ran.stdout.contains("Examples:") && ran.stdout.contains("--json"), "{name}:\n{}", ran.stdout);
        let mut arguments = vec!["snapshot", name];
        arguments.extend(required);
        arguments.push("--no-such-option");
        let ran = run(&arguments);
        assert_eq!((ran.code, ran.stdout.as_str()), (Some(2), ""), "{name}");
        assert!(ran.stderr.contains("--no-such-option"), "{name}: {}", ran.stderr);
        if !required.is_empty() {
            assert_eq!(run(&["snapshot", name]).code, Some(2), "{name}");
        }
    }
    for bad in ["no-at-sign", "x@", "@1", "x@a b"] {
        assert_eq!(run(&["snapshot", "show", bad]).code, Some(2), "{bad}");
    }
}

#[test]
fn several_origins_have_a_secondary_each() {
    for arguments in [
        &["copy", "a"][..],
        &["copy", "a", "b", "-"],
        &["copy", "dir1/a", "dir2/a", "out"],
        &["copy", "--pair", "a"],
        &["copy", "--pair", "a=-"],
        &["copy", "--pair", "a=b", "c"],
        &["copy", "--pair", "a=b", "--group", "x"],
        &["copy", "--group", "x"],
        &["copy", "--group", "x", "a", "b"],
    ] {
        let ran = run(arguments);
        assert_eq!((ran.code, ran.stdout.as_str()), (Some(2), ""), "{arguments:?}: {}", ran.stderr);
    }
}

#[test]
fn the_table_holds_every_command() {
    let ran = run(&["--help"]);
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""));
    let listed: Vec<&str> = ran
        .stdout
        .lines()
        .skip_while(|line| !line.starts_with("Commands:"))
        .skip(1)
        .take_while(|line| !line.trim().is_empty())
        .filter_map(|line| line.strip_prefix("  ")?.split(' ').next())
        .filter(|word| !word.is_empty())
        .collect();
    let table: Vec<&str> = COMMANDS.iter().map(|row| row.name).collect();
    for name in &listed {
        assert!(table.contains(name), "{name} is not in the contract's table");
    }
    for name in &table {
        assert!(listed.contains(name), "{name} is not in --help");
    }
}

#[test]
fn an_unknown_option_is_named_and_exits_2() {
    for row in COMMANDS {
        let mut arguments = vec![row.name];
        arguments.extend(row.required);
        arguments.push("--no-such-option");
        let ran = run(&arguments);
        assert_eq!(ran.code, Some(2), "{}", row.name);
        assert_eq!(ran.stdout, "", "{}", row.name);
        assert!(ran.stderr.contains("--no-such-option"), "{}: {}", row.name, ran.stderr);

        arguments.push("--json");
        let ran = run(&arguments);
        assert_eq!((ran.code, ran.stdout.as_str()), (Some(2), ""), "{}", row.name);
        let error = json_error(&ran);
        assert_eq!(error["kind"], "usage");
        assert!(error["what"].as_str().unwrap().contains("--no-such-option"), "{error}");
    }
}

#[test]
fn a_missing_argument_exits_2() {
    for row in COMMANDS.iter().filter(|row| !row.required.is_empty()) {
        let ran = run(&[row.name]);
        assert_eq!((ran.code, ran.stdout.as_str()), (Some(2), ""), "{}", row.name);
        let says = ran.stderr.contains("required") || ran.stderr.contains("requires");
        assert!(says, "{}: {}", row.name, ran.stderr);
    }
}

#[test]
fn a_surplus_argument_exits_2() {
    for row in COMMANDS {
        let mut arguments = vec![row.name];
        arguments.extend(row.required);
        arguments.extend(["surplus-one", "surplus-two"]);
        let ran = run(&arguments);
        assert_eq!((ran.code, ran.stdout.as_str()), (Some(2), ""), "{}", row.name);
        assert!(ran.stderr.contains("surplus"), "{}: {}", row.name, ran.stderr);
    }
}

#[test]
fn resume_says_that_there_is_nothing_to_go_on_with() {
    if !is_root() {
        return;
    }
    for arguments in [&["resume", "tidemark-test-no-such-job"][..], &["resume", "zz", "--dry-run"]] {
        let ran = run(arguments);
        assert_eq!((ran.code, ran.stdout.as_str()), (Some(3), ""), "{}", ran.stderr);
        assert!(ran.stderr.contains("no copy to resume"), "{}", ran.stderr);
        assert!(ran.stderr.contains("tidemark status"), "{}", ran.stderr);
    }
}

#[test]
fn a_missing_input_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("missing");
    let missing = missing.to_str().unwrap();
    let out = dir.path().join("out");
    for (row, arguments) in COMMANDS.iter().filter_map(|row| Some((row, row.missing_input?))) {
        let arguments: Vec<&str> = std::iter::once(row.name)
            .chain(arguments.iter().map(|argument| match *argument {
                "MISSING" => missing,
                "OUT" => out.to_str().unwrap(),
                other => other,
            }))
            .collect();
        let ran = run(&arguments);
        assert!(matches!(ran.code, Some(1 | 3)), "{}: {:?} {}", row.name, ran.code, ran.stderr);
        assert_eq!(ran.stdout, "", "{}", row.name);
        // Without root, the missing privilege is reported first.
        let named = ran.stderr.contains(missing) || (row.name == "attach" && !is_root());
        assert!(named, "{}: {}", row.name, ran.stderr);
        assert!(!Path::new(missing).exists() && !out.exists(), "{} made a file", row.name);

        let json: Vec<&str> = arguments.into_iter().chain(["--json"]).collect();
        let ran = run(&json);
        assert_eq!(ran.stdout, "", "{}", row.name);
        json_error(&ran);
    }
}

#[test]
fn version_and_no_command() {
    let ran = run(&["--version"]);
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""));
    assert!(ran.stdout.starts_with("tidemark "));
    let ran = run(&[]);
    assert_eq!((ran.code, ran.stdout.as_str()), (Some(2), ""));
    assert!(ran.stderr.contains("Usage:"));
}

#[test]
fn quiet_and_verbose_exclude_each_other() {
    for row in COMMANDS {
        let mut arguments = vec![row.name];
        arguments.extend(row.required);
        arguments.extend(["--quiet", "-v"]);
        assert_eq!(run(&arguments).code, Some(2), "{}", row.name);
    }
}

#[test]
fn a_bad_log_filter_is_a_usage_error() {
    let output = output(tidemark(&["man"]).env("TIDEMARK_LOG", "a=b=c"));
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("TIDEMARK_LOG"));
}

#[test]
fn doctor_reports_every_check_and_its_verdict() {
    let text = run(&["doctor"]);
    let json = run(&["doctor", "--json"]);
    assert!(matches!(text.code, Some(0 | 3)), "{:?} {}", text.code, text.stderr);
    assert_eq!(json.code, text.code);
    let value: serde_json::Value = serde_json::from_str(&json.stdout).unwrap();
    assert_eq!((value["type"].as_str(), value["command"].as_str()), (Some("result"), Some("doctor")));
    assert_eq!(value["report"]["ready"], text.code == Some(0));
    for check in value["report"]["checks"].as_array().unwrap() {
        assert!(text.stdout.contains(check["name"].as_str().unwrap()), "{check}");
        if check["status"] != "ok" {
            assert!(text.stdout.contains(check["remedy"].as_str().unwrap()), "{check}");
        }
    }
}

#[test]
fn man_pages_are_written_for_each_command() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("man1");
    let ran = run(&["man", target.to_str().unwrap()]);
    assert_eq!((ran.code, ran.stdout.as_str()), (Some(0), ""), "{}", ran.stderr);
    for row in COMMANDS {
        let page = std::fs::read_to_string(target.join(format!("tidemark-{}.1", row.name))).unwrap();
        assert!(page.contains(".TH"), "{}", row.name);
    }
    let main = std::fs::read_to_string(target.join("tidemark.1")).unwrap();
    assert_eq!(run(&["man"]).stdout, main);
}

#[test]
fn completions_exist_for_the_common_shells() {
    for shell in ["bash", "zsh", "fish"] {
        let ran = run(&["completions", shell]);
        assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""), "{shell}");
        for row in COMMANDS {
            assert!(ran.stdout.contains(row.name), "{shell}: {}", row.name);
        }
    }
    assert_eq!(run(&["completions", "no-such-shell"]).code, Some(2));
}

#[test]
fn a_result_that_cannot_be_written_is_an_error() {
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let child = spawn(tidemark(&["man"]).stdout(full).stderr(Stdio::piped()));
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("No space left"));
}
