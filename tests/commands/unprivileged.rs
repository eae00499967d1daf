//! What an ordinary user may do, and what is refused, with the reason.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use super::support::{Bench, PROGRAM, Ran, is_root, output, random_seed, undisturbed};

/// The kernel's overflow id, "nobody" almost everywhere.
const NOBODY: u32 = 65534;

/// A bench that an ordinary user may work in, with a copy of the program that this user may run (the build folder may
/// be inaccessible).
fn bench_for_everybody(size: usize) -> Bench {
    let bench = Bench::new(size, random_seed());
    undisturbed(|| fs::copy(PROGRAM, bench.path("program"))).unwrap();
    for (name, mode) in [("program", 0o755), ("origin", 0o644), ("", 0o777)] {
        fs::set_permissions(bench.dir.path().join(name), fs::Permissions::from_mode(mode)).unwrap();
    }
    bench
}

/// Runs the command without privileges: as the user `nobody` if the tests run as root, else as the current user.
fn run_as_ordinary(bench: &Bench, arguments: &[&str]) -> Ran {
    let mut command = Command::new(bench.path("program"));
    command.args(arguments).env_remove("TIDEMARK_LOG").current_dir(bench.dir.path());
    if is_root() {
        command.uid(NOBODY).gid(NOBODY);
    }
    output(command.stdin(Stdio::null())).into()
}

#[test]
fn what_needs_root_is_refused_with_advice() {
    let bench = bench_for_everybody(1000);
    for arguments in [
        vec!["attach", "/dev/null", "--name", "x"],
        vec!["detach", "x"],
        vec!["snapshot", "create", "x"],
        vec!["snapshot", "create", "x", "y", "--name", "monday"],
        vec!["snapshot", "create", "--group", "mail"],
        vec!["snapshot", "list"],
        vec!["snapshot", "show", "x@1"],
        vec!["snapshot", "mount", "x@1", "/mnt"],
        vec!["snapshot", "clone", "x@1"],
        vec!["snapshot", "rollback", "x@1", "--yes"],
        vec!["snapshot", "rollback", "x@1", "--cancel"],
        vec!["snapshot", "delete", "x@1", "--yes"],
        vec!["monitor"],
        vec!["status"],
        vec!["status", "--watch"],
        vec!["recover"],
        vec!["resume"],
    ] {
        let ran = run_as_ordinary(&bench, &arguments);
        assert_eq!((ran.code, ran.stdout.as_str()), (Some(3), ""), "{arguments:?}: {}", ran.stderr);
        assert!(ran.stderr.contains("needs root") && ran.stderr.contains("sudo"), "{}", ran.stderr);
    }
}

#[test]
fn usage_errors_come_before_that() {
    let bench = bench_for_everybody(1000);
    for arguments in [
        vec!["attach", "/dev/null"],
        vec!["attach", "/dev/null", "--name", "a/b"],
        vec!["detach", "-x"],
        vec!["snapshot", "create", "x", "--group", "mail"],
        vec!["copy", "origin", "out.tdm", "--parent", "v3.tdm"],
        vec!["copy", "origin", "out.tdm", "--since", "x", "--originals", "overlay"],
        vec!["archive", "merge", "-", "out.tdm"],
        vec!["archive", "merge", "x.tdm", "-"],
        vec!["snapshot", "show", "x"],
        vec!["snapshot", "mount", "x@1"],
        vec!["snapshot", "clone", "x"],
        vec!["snapshot", "rollback", "x"],
        vec!["snapshot", "rollback", "x@1", "--cancel", "--at-attach"],
        vec!["monitor", "--auto-delete", "newest"],
        vec!["status", "surplus"],
        vec!["recover", "--no-such-option"],
    ] {
        let ran = run_as_ordinary(&bench, &arguments);
        assert_eq!((ran.code, ran.stdout.as_str()), (Some(2), ""), "{arguments:?}: {}", ran.stderr);
    }
}

#[test]
fn files_are_copied_and_restored_by_anybody() {
    let bench = bench_for_everybody(1 << 20);
    for name in ["v3.tdm", "v3-increment.tdm"] {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/archive").join(name);
        fs::copy(golden, bench.path(name)).unwrap();
    }
    for arguments in [
        vec!["copy", "origin", "copy.img", "--verify"],
        vec!["copy", "origin", "copy.tdm"],
        vec!["verify", "copy.tdm", "--against", "origin"],
        vec!["inspect", "copy.tdm"],
        vec!["restore", "copy.tdm", "back.img"],
        vec!["restore", "v3-increment.tdm", "chain.img"],
        vec!["verify", "v3-increment.tdm", "--against", "chain.img", "--parent", "v3.tdm"],
        vec!["archive", "merge", "v3-increment.tdm", "merged.tdm"],
        vec!["restore", "merged.tdm", "merged.img"],
        vec!["copy", "--help"],
        vec!["man"],
        vec!["completions", "bash"],
    ] {
        let ran = run_as_ordinary(&bench, &arguments);
        assert_eq!(ran.code, Some(0), "{arguments:?}: {}", ran.stderr);
    }
    assert!(bench.read("copy.img") == bench.content);
    assert!(bench.read("back.img") == bench.content);
    assert!(bench.read("chain.img") == bench.read("merged.img"));
}

#[test]
fn what_may_not_be_read_is_not_copied() {
    let bench = bench_for_everybody(1000);
    fs::set_permissions(bench.origin(), fs::Permissions::from_mode(0o000)).unwrap();
    if is_root() {
        chown(bench.origin(), Some(0), Some(0)).unwrap();
    }
    let ran = run_as_ordinary(&bench, &["copy", "origin", "copy.img"]);
    assert!(matches!(ran.code, Some(1 | 3)), "{:?} {}", ran.code, ran.stderr);
    assert!(ran.stderr.contains("origin") && ran.stderr.contains("ermission"), "{}", ran.stderr);
    assert_eq!(bench.files(), ["origin", "program"]);
}
