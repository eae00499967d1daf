//! Cold copies of regular files, end to end: copy, verify, inspect, restore, compare; and what the user sees if one of
//! them fails. The README's promises 1 (exactness), 5 (no partial result under the final name), 6 (no leftovers), 7
//! (any corruption is detected) and 8 (refusals before changes).

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use super::support::{
    Bench, PROGRAM, Ran, interruptible, json_error, json_lines, noise, ok, output, random_seed, run, spawn,
    tidemark,
};

/// Sizes at edges: less than a sector, not a multiple of 4 KiB, exactly one segment, one byte more, several segments.
const SIZES: &[usize] = &[1, 511, 4096, 1_000_003, 1 << 20, (1 << 20) + 1, (5 << 20) + 513];

#[test]
fn a_raw_copy_is_exact() {
    for size in SIZES {
        let bench = Bench::new(*size, random_seed());
        ok(&["copy", &bench.origin(), &bench.path("copy.img"), "--verify"]);
        assert!(bench.read("copy.img") == bench.content, "{size}");
        bench.assert_origin_untouched();
        assert_eq!(bench.files(), ["copy.img", "origin"], "nothing else is left");
    }
}

#[test]
fn files_have_no_instant_to_share() {
    let bench = Bench::new(1 << 20, random_seed());
    fs::write(bench.path("other"), "x").unwrap();
    fs::create_dir(bench.path("out")).unwrap();
    let ran = run(&["copy", &bench.origin(), &bench.path("other"), &bench.path("out"), "--json"]);
    assert_eq!(ran.code, Some(3), "{}", ran.stderr);
    let message = json_error(&ran)["message"].to_string();
    assert!(message.contains("has no instant to share"), "{message}");
    assert_eq!(fs::read_dir(bench.path("out")).unwrap().count(), 0);
    bench.assert_origin_untouched();
}

#[test]
fn zeros_become_holes() {
    let bench = Bench::new(24 << 20, random_seed());
    ok(&["copy", &bench.origin(), &bench.path("copy.img")]);
    assert!(bench.read("copy.img") == bench.content);
    let metadata = fs::metadata(bench.path("copy.img")).unwrap();
    assert!(metadata.blocks() * 512 <= 18 << 20, "8 of 24 MiB are zeros: {} blocks", metadata.blocks());
}

#[test]
fn an_archive_restores_exactly() {
    for size in SIZES {
        for originals in ["overlay", "append"] {
            let bench = Bench::new(*size, random_seed());
            let archive = bench.path("copy.tdm");
            ok(&[
                "copy",
                &bench.origin(),
                &archive,
                "--originals",
                originals,
                "--segment",
                "64K",
                "--verify",
            ]);
            ok(&["verify", &archive]);
            ok(&["verify", &archive, "--against", &bench.origin()]);
            ok(&["restore", &archive, &bench.path("back.img")]);
            assert!(bench.read("back.img") == bench.content, "{size} {originals}");
            bench.assert_origin_untouched();
            assert_eq!(bench.files(), ["back.img", "copy.tdm", "origin"]);
        }
    }
}

#[test]
fn a_pipe_restores_exactly() {
    for size in SIZES {
        let bench = Bench::new(*size, random_seed());
        let copied = output(&mut tidemark(&["copy", &bench.origin(), "-"]));
        assert_eq!(copied.status.code(), Some(0), "{}", String::from_utf8_lossy(&copied.stderr));
        let ran = feed(&["restore", "-", &bench.path("back.img")], &copied.stdout);
        assert_eq!(ran.code, Some(0), "{}", ran.stderr);
        assert!(bench.read("back.img") == bench.content, "{size}");
        let ran = feed(&["verify", "-"], &copied.stdout);
        assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    }
}

/// Runs with `input` on a pipe. A command that stops reading early is not an error here.
fn feed(arguments: &[&str], input: &[u8]) -> Ran {
    let mut command = tidemark(arguments);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = spawn(&mut command);
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    let writer = thread::spawn(move || stdin.write_all(&input).map_err(|error| error.kind()));
    let output = child.wait_with_output().unwrap();
    let _ = writer.join().unwrap();
    output.into()
}

#[test]
fn inspect_tells_sizes() {
    let bench = Bench::new(3_000_000, random_seed());
    let archive = bench.path("copy.tdm");
    ok(&["copy", &bench.origin(), &archive]);
    let text = ok(&["inspect", &archive]).stdout;
    assert!(text.contains("origin"), "{text}");
    let lines = json_lines(&ok(&["inspect", &archive, "--json"]).stdout);
    assert_eq!(lines.len(), 1);
    assert_eq!(lines[0]["type"], "result");
    assert_eq!(lines[0]["command"], "inspect");
    assert!(lines[0].to_string().contains("3000000"), "{}", lines[0]);
}

#[test]
fn a_name_in_an_archive_does_not_reach_the_terminal_as_it_is() {
    let bench = Bench::new(1 << 16, random_seed());
    let (name, archive) = ("evil\u{1b}[2J\u{9b}1m\u{202e}\nverified: yes", bench.path("copy.tdm"));
    fs::rename(bench.origin(), bench.path(name)).unwrap();
    ok(&["copy", &bench.path(name), &archive]);
    let is_harmless = |text: &str| !text.contains(['\u{1b}', '\u{9b}', '\u{202e}']);
    let text = ok(&["inspect", &archive]).stdout;
    assert!(is_harmless(&text) && !text.contains("\nverified"), "{text:?}");
    assert!(text.contains(r"evil\x1b[2J\x9b1m\u{202e}\x0averified: yes"), "{text:?}");
    let restored = bench.path("back.img");
    for arguments in [vec!["restore", &archive, &restored, "--dry-run"], vec!["restore", &archive, &restored]]
    {
        let ran = ok(&arguments);
        assert!(is_harmless(&ran.stdout) && is_harmless(&ran.stderr), "{}{}", ran.stdout, ran.stderr);
    }
    let text = ok(&["inspect", &archive, "--json"]).stdout;
    assert!(is_harmless(&text), "{text:?}");
    assert_eq!(json_lines(&text)[0]["report"]["superblock"]["origin_name"], name);
    // Error messages contain names of files.
    fs::write(bench.path(name), b"no archive").unwrap();
    let ran = run(&["inspect", &bench.path(name)]);
    assert!(ran.code == Some(4) && is_harmless(&ran.stderr), "{ran:?}", ran = ran.stderr);
}

#[test]
fn json_results_come_last_and_alone_on_standard_output() {
    let bench = Bench::new(2 << 20, random_seed());
    let ran = ok(&["copy", &bench.origin(), &bench.path("copy.tdm"), "--json"]);
    let lines = json_lines(&ran.stdout);
    assert_eq!(lines.last().unwrap()["type"], "result");
    assert_eq!(lines.last().unwrap()["command"], "copy");
    assert!(lines.iter().any(|line| line["type"] == "progress"));
    assert_eq!(ran.stderr, "");
    for arguments in [["restore", "copy.tdm", "back.img"], ["verify", "copy.tdm", "--json"]] {
        let paths = arguments.map(|word| if word.contains('.') { bench.path(word) } else { word.to_owned() });
        let mut words: Vec<&str> = paths.iter().map(String::as_str).collect();
        if !words.contains(&"--json") {
            words.push("--json");
        }
        let lines = json_lines(&ok(&words).stdout);
        assert_eq!(lines.last().unwrap()["type"], "result", "{words:?}");
        assert_eq!(lines.last().unwrap()["command"], words[0], "{words:?}");
    }
}

#[test]
fn a_pipe_carries_nothing_but_the_archive() {
    let bench = Bench::new(1 << 20, random_seed());
    let output = output(&mut tidemark(&["copy", &bench.origin(), "-", "--json"]));
    assert_eq!(output.status.code(), Some(0));
    let lines = json_lines(&String::from_utf8(output.stderr).unwrap());
    assert_eq!(lines.last().unwrap()["type"], "result");
    fs::write(bench.path("piped.tdm"), &output.stdout).unwrap();
    ok(&["verify", &bench.path("piped.tdm")]);
}

#[test]
fn a_closed_standard_output_takes_no_archive() {
    let bench = Bench::new(1 << 20, random_seed());
    // A shell can close it; the standard library cannot start a process with a closed descriptor.
    let shell = |redirection: &str| {
        let line = format!("\"$0\" copy \"$1\" - {redirection}");
        let mut command = std::process::Command::new("sh");
        command.args(["-c", &line]).arg(PROGRAM).arg(bench.origin()).env_remove("TIDEMARK_LOG");
        Ran::from(output(command.stdin(Stdio::null())))
    };
    let ran = shell(">&-");
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
    assert!(ran.stderr.contains("closed"), "{}", ran.stderr);
    // Discarding the output on purpose is not an error.
    let ran = shell(">/dev/null");
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    bench.assert_origin_untouched();
}

#[test]
fn quiet_says_nothing() {
    let bench = Bench::new(1 << 20, random_seed());
    let archive = bench.path("copy.tdm");
    for arguments in [
        vec!["copy", &bench.origin(), &archive, "--quiet"],
        vec!["restore", &archive, &bench.path("back.img"), "-q"],
        vec!["verify", &archive, "-q"],
    ] {
        let ran = ok(&arguments);
        assert_eq!((ran.stdout.as_str(), ran.stderr.as_str()), ("", ""), "{arguments:?}");
    }
    assert_ne!(ok(&["inspect", &archive, "--quiet"]).stdout, "");
}

#[test]
fn what_is_in_the_way_is_replaced_only_on_demand() {
    let bench = Bench::new(1 << 20, random_seed());
    let archive = bench.path("copy.tdm");
    ok(&["copy", &bench.origin(), &archive]);
    for (command, input) in [("copy", bench.origin()), ("restore", archive.clone())] {
        let target = bench.path("target");
        fs::write(&target, b"precious").unwrap();
        let ran = run(&[command, &input, &target]);
        assert_eq!((ran.code, ran.stdout.as_str()), (Some(3), ""), "{command}: {}", ran.stderr);
        assert!(ran.stderr.contains(&target) && ran.stderr.contains("--yes"), "{command}: {}", ran.stderr);
        let ran = run(&[command, &input, &target, "--json"]);
        assert_eq!(json_error(&ran)["kind"], "refused", "{command}");
        assert_eq!(bench.read("target"), b"precious", "{command}");
        bench.assert_origin_untouched();

        ok(&[command, &input, &target, "--yes"]);
        assert!(bench.read("target") == bench.content, "{command}");
        fs::remove_file(&target).unwrap();
    }
    assert_eq!(bench.files(), ["copy.tdm", "origin"]);
}

#[test]
fn a_dry_run_shows_the_plan_and_changes_nothing() {
    let bench = Bench::new(1 << 20, random_seed());
    let archive = bench.path("copy.tdm");
    ok(&["copy", &bench.origin(), &archive]);
    let before = bench.read("copy.tdm");
    for (command, input, target) in [
        ("copy", bench.origin(), bench.path("new.img")),
        ("copy", bench.origin(), archive.clone()),
        ("restore", archive.clone(), bench.path("new.img")),
    ] {
        let ran = ok(&[command, &input, &target, "--dry-run"]);
        assert!(ran.stdout.contains(&input) && ran.stdout.contains(&target), "{command}: {}", ran.stdout);
        let lines = json_lines(&ok(&[command, &input, &target, "--dry-run", "--json"]).stdout);
        assert_eq!((lines.len(), &lines[0]["type"]), (1, &"plan".into()), "{command}");
        assert_eq!(bench.files(), ["copy.tdm", "origin"], "{command}");
        assert!(bench.read("copy.tdm") == before, "{command}");
    }
    bench.assert_origin_untouched();
}

#[test]
fn a_copy_onto_itself_is_refused() {
    let bench = Bench::new(1 << 20, random_seed());
    fs::hard_link(bench.origin(), bench.path("link")).unwrap();
    for target in ["origin", "link"] {
        let ran = run(&["copy", &bench.origin(), &bench.path(target), "--yes"]);
        assert!(matches!(ran.code, Some(2 | 3)), "{target}: {:?} {}", ran.code, ran.stderr);
        bench.assert_origin_untouched();
    }
}

#[test]
fn what_is_neither_file_nor_device_is_no_target() {
    let bench = Bench::new(1000, random_seed());
    let archive = bench.path("copy.tdm");
    ok(&["copy", &bench.origin(), &archive]);
    let pipe = bench.path("pipe");
    nix::unistd::mkfifo(pipe.as_str(), nix::sys::stat::Mode::S_IRWXU).unwrap();
    fs::create_dir(bench.path("directory")).unwrap();
    let link = bench.path("link");
    std::os::unix::fs::symlink("/dev/null", &link).unwrap();
    for target in [pipe, bench.path("directory"), link] {
        for (command, input) in [("copy", bench.origin()), ("restore", archive.clone())] {
            let ran = run(&[command, &input, &target, "--yes"]);
            assert_eq!((ran.code, ran.stdout.as_str()), (Some(3), ""), "{command} {target}: {}", ran.stderr);
            assert!(ran.stderr.contains(&target), "{command}: {}", ran.stderr);
        }
    }
    assert_eq!(bench.files(), ["copy.tdm", "directory", "link", "origin", "pipe"]);
}

#[test]
fn a_corrupted_archive_exits_4_and_leaves_no_file() {
    let bench = Bench::new(300_000, random_seed());
    let good = bench.path("good.tdm");
    ok(&["copy", &bench.origin(), &good, "--segment", "64K"]);
    let bytes = bench.read("good.tdm");
    let step = bytes.len() / 24;
    for at in (0..24).map(|i| i * step + i * 37 % step) {
        let mut bad = bytes.clone();
        bad[at] ^= 0x40;
        fs::write(bench.path("bad.tdm"), &bad).unwrap();
        let ran = run(&["verify", &bench.path("bad.tdm")]);
        assert_eq!((ran.code, ran.stdout.as_str()), (Some(4), ""), "byte {at}: {}", ran.stderr);
        let ran = run(&["restore", &bench.path("bad.tdm"), &bench.path("back.img")]);
        assert_eq!(ran.code, Some(4), "byte {at}: {}", ran.stderr);
        assert_eq!(bench.files(), ["bad.tdm", "good.tdm", "origin"], "byte {at}");
    }
}

#[test]
fn bad_data_is_told_in_json() {
    let bench = Bench::new(1000, random_seed());
    let ran = run(&["verify", &bench.origin(), "--json"]);
    assert_eq!((ran.code, ran.stdout.as_str()), (Some(4), ""));
    assert_eq!(json_error(&ran)["kind"], "bad-data");
}

#[test]
fn a_truncated_archive_exits_4_and_leaves_no_file() {
    let bench = Bench::new(300_000, random_seed());
    ok(&["copy", &bench.origin(), &bench.path("good.tdm"), "--segment", "64K"]);
    let bytes = bench.read("good.tdm");
    for keep in [0, 1, 4095, 4096, bytes.len() / 2, bytes.len() - 4096, bytes.len() - 1] {
        fs::write(bench.path("bad.tdm"), &bytes[..keep]).unwrap();
        for arguments in [
            vec!["verify".to_owned(), bench.path("bad.tdm")],
            vec!["restore".to_owned(), bench.path("bad.tdm"), bench.path("back.img")],
        ] {
            let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
            let ran = run(&words);
            assert_eq!((ran.code, ran.stdout.as_str()), (Some(4), ""), "{keep}: {words:?} {}", ran.stderr);
        }
        let ran = feed(&["restore", "-", &bench.path("back.img")], &bytes[..keep]);
        assert_eq!(ran.code, Some(4), "pipe, {keep}: {}", ran.stderr);
        assert_eq!(bench.files(), ["bad.tdm", "good.tdm", "origin"], "{keep}");
    }
}

#[test]
fn what_is_not_an_archive_exits_4() {
    let bench = Bench::new(100_000, random_seed());
    for command in ["verify", "inspect"] {
        let ran = run(&[command, &bench.origin()]);
        assert_eq!((ran.code, ran.stdout.as_str()), (Some(4), ""), "{command}: {}", ran.stderr);
        assert!(ran.stderr.contains(&bench.origin()), "{command}: {}", ran.stderr);
    }
}

#[test]
fn verify_against_something_else_exits_4() {
    let bench = Bench::new(1 << 20, random_seed());
    let archive = bench.path("copy.tdm");
    ok(&["copy", &bench.origin(), &archive]);
    let mut other = bench.content.clone();
    other[777_777] ^= 1;
    fs::write(bench.path("other"), &other).unwrap();
    let ran = run(&["verify", &archive, "--against", &bench.path("other")]);
    assert_eq!(ran.code, Some(4), "{}", ran.stderr);
    // A difference in a range of zeros is detected too.
    let mut other = bench.content.clone();
    other[1 << 19] = 1;
    fs::write(bench.path("other"), &other).unwrap();
    assert_eq!(run(&["verify", &archive, "--against", &bench.path("other")]).code, Some(4));
    fs::write(bench.path("other"), noise(1000, 5)).unwrap();
    assert!(matches!(run(&["verify", &archive, "--against", &bench.path("other")]).code, Some(3 | 4)));
}

#[test]
fn an_interrupted_copy_exits_130_and_leaves_no_file() {
    for signal in [nix::sys::signal::Signal::SIGINT, nix::sys::signal::Signal::SIGTERM] {
        for target in ["copy.img", "copy.tdm"] {
            let bench = Bench::new(16 << 20, random_seed());
            let mut command =
                interruptible(&["copy", &bench.origin(), &bench.path(target), "--rate", "1M", "--json"]);
            let mut child = spawn(command.stdout(Stdio::piped()).stderr(Stdio::piped()));
            wait_for_data(child.stdout.as_mut().unwrap());
            let id = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
            nix::sys::signal::kill(id, signal).unwrap();
            let start = Instant::now();
            let output = child.wait_with_output().unwrap();
            assert!(start.elapsed() < Duration::from_secs(30), "{:?}", start.elapsed());
            let stderr = String::from_utf8(output.stderr).unwrap();
            assert_eq!(output.status.code(), Some(130), "{signal} {target}: {stderr}");
            assert_eq!(json_lines(&stderr).last().unwrap()["kind"], "interrupted");
            assert_eq!(bench.files(), ["origin"], "{signal} {target}");
            bench.assert_origin_untouched();
        }
    }
}

/// Reads JSON lines until the copy is in its data phase.
fn wait_for_data(stdout: &mut impl Read) {
    let mut seen = Vec::new();
    let mut byte = [0u8];
    while !String::from_utf8_lossy(&seen).contains("\"phase\":\"data\"") {
        assert_eq!(stdout.read(&mut byte).unwrap(), 1, "ended early: {}", String::from_utf8_lossy(&seen));
        seen.push(byte[0]);
    }
}

#[test]
fn a_secondary_in_a_missing_directory_is_an_error() {
    let bench = Bench::new(1000, random_seed());
    let target = bench.path("no/such/dir/copy.img");
    let ran = run(&["copy", &bench.origin(), &target]);
    assert!(matches!(ran.code, Some(1 | 3)), "{:?} {}", ran.code, ran.stderr);
    assert_eq!(ran.stdout, "");
    assert!(ran.stderr.contains(&bench.path("no/such/dir")), "{}", ran.stderr);
    assert_eq!(bench.files(), ["origin"]);
}

#[test]
fn a_closed_pipe_is_an_error() {
    let bench = Bench::new(8 << 20, random_seed());
    let mut command = tidemark(&["copy", &bench.origin(), "-"]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = spawn(&mut command);
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("tidemark:"), "{stderr}");
}

#[test]
fn contradictions_exit_2_and_touch_nothing() {
    let bench = Bench::new(1000, random_seed());
    let (origin, image) = (bench.origin(), bench.path("copy.img"));
    for arguments in [
        vec!["copy", &origin, "-", "--format", "raw"],
        vec!["copy", &origin, "-", "--originals", "overlay"],
        vec!["copy", &origin, "-", "--verify"],
        vec!["copy", &origin, &image, "--originals", "append"],
        vec!["copy", &origin, &image, "--keep-store", "--store-ram", "1M"],
        vec!["copy", &origin, &image, "--chunk", "5000"],
        vec!["copy", &origin, &image, "--chunk", "many"],
        vec!["copy", &origin, &image, "--freeze-budget", "2"],
        vec!["copy", &origin, &image, "--rate", "0"],
        vec!["restore", &origin, "-"],
        vec!["inspect", "-"],
    ] {
        let ran = run(&arguments);
        assert_eq!((ran.code, ran.stdout.as_str()), (Some(2), ""), "{arguments:?}: {}", ran.stderr);
        assert_eq!(bench.files(), ["origin"], "{arguments:?}");
    }
}
