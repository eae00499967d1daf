//! Tests of `scripts/soak`: a seed stands for one possible scenario, and the comparison detects differences. Both are
//! tested in Python: `tests/soak_scenarios.py`.

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
fn a_seed_stands_for_one_scenario_and_a_difference_is_seen() {
    let output = python(&["tests/soak_scenarios.py"]);
    assert!(output.status.success() && said(&output).contains("\nOK"), "{}", said(&output));
}

#[test]
fn what_the_soak_does_not_know_it_refuses_before_it_installs_or_boots_anything() {
    for (arguments, why) in [
        (&[][..], "either --minutes, or --seed and --seeds"),
        (&["--minutes", "1", "--seed", "3"], "either --minutes, or --seed and --seeds"),
        (&["--minutes", "0"], "not above 0"),
        (&["--seeds", "9..3"], "A not above B"),
        (&["--seeds", "9"], "A..B is wanted"),
        (&["--seed", "-3"], "from 0 on"),
    ] {
        let output = python(&[&["scripts/soak"], arguments].concat());
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {}", said(&output));
        assert!(said(&output).contains(why), "{arguments:?}: {}", said(&output));
    }
}
