//! Tests of `scripts/bench`: its arithmetic, which is tested in Python (`tests/bench_figures.py`), and its refusal of
//! unknown arguments.

use std::process::{Command, Output};

fn python(arguments: &[&str]) -> Output {
    Command::new("python3")
        .args(arguments)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("python3 is there: scripts/setup installs it")
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&[output.stdout.as_slice(), &output.stderr].concat()).into_owned()
}

#[test]
fn the_measurements_arithmetic_is_right() {
    let output = python(&["tests/bench_figures.py"]);
    assert!(output.status.success() && said(&output).contains("\nOK"), "{}", said(&output));
}

#[test]
fn what_the_bench_does_not_know_it_refuses_before_it_installs_or_boots_anything() {
    for (arguments, why) in [
        (&["warm"][..], "neither cold, live nor vm"),
        (&["vm", "--loads", "a,e"], "different ones of uniform"),
        (&["vm", "--loads", "a,uniform"], "different ones of uniform"),
        (&["vm", "--profile", "fast"], "different ones of normal"),
        (&["vm", "--variant", "lvm=--order hot"], "a new name"),
        (&["vm", "--rounds", "1000"], "1 to 100 rounds"),
        (&["vm", "--rounds", "0"], "1 to 100 rounds"),
        (&["vm", "--volume-mib", "100"], "at least 256 MiB"),
        (&["live", "--profile", "normal"], "different ones of ssd"),
        (&["live", "--scheduler", "kyber"], "invalid choice"),
        (&["live", "--build", "old=/nowhere/tidemark"], "is no program"),
        (&["live", "--build", "old=/proc/self/exe", "--variant", "old=--all"], "a name of its own"),
        (&["live", "--disk", "shared"], "unrecognized arguments"),
        (&["cold", "--rounds", "0"], "at least one round"),
    ] {
        let output = python(&[&["scripts/bench"], arguments].concat());
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {}", said(&output));
        assert!(said(&output).contains(why), "{arguments:?}: {}", said(&output));
    }
}
