//! Checks the rules of this tree: layers, no circles, small files, a FORMAT.md for every format, one test command, no
//! traces of one machine. Each check is a pure function of files, and has a test that shows that it can fail. Clippy
//! denies long functions, `unsafe` outside `src/sys`, printing below the command line, and exits.

#[path = "tidy/circles.rs"]
mod circles;
#[path = "tidy/code.rs"]
mod code;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The layers, as in the table of `src/lib.rs` (a test compares the two). A module may use those of lower layers.
const LAYERS: &[(&str, u8)] = &[
    ("base", 0),
    ("sys", 0),
    ("format", 1),
    ("extent", 1),
    ("progress", 1),
    ("io", 2),
    ("dm", 2),
    ("record", 2),
    ("topology", 2),
    ("store", 3),
    ("volume", 3),
    ("secondary", 3),
    ("job", 3),
    ("copy", 4),
    ("stack", 4),
    ("restore", 4),
    ("op", 5),
    ("cli", 6),
];

/// Additional permissions between modules of the same layer.
const ALSO_ALLOWED: &[(&str, &str)] = &[("sys", "base")];

/// Exceptions: modules of lower layers that a module must not use. `op` connects these.
const NEVER: &[(&str, &str)] = &[("copy", "dm"), ("copy", "store"), ("copy", "volume"), ("restore", "dm")];

/// Modules that are pure: no I/O, no clock.
const PURE: &[&str] = &["format", "extent"];

const FILE_LINES_MAX: usize = 1000;

/// A file of the tree: its path from the root, with `/`, and its text.
struct Source {
    path: String,
    text: String,
}

impl Source {
    fn code(&self) -> String {
        code::blank_text(&self.text)
    }

    fn is_rust(&self) -> bool {
        self.path.ends_with(".rs")
    }

    /// The module at the crate's root that the file belongs to.
    fn module(&self) -> Option<&str> {
        let inner = self.path.strip_prefix("src/")?;
        Some(inner.split('/').next()?.trim_end_matches(".rs"))
    }

    /// The number of `super::` from the file to the crate's root.
    fn depth(&self) -> usize {
        let parts = self.path.split('/').count() - 1;
        if self.path.ends_with("/mod.rs") { parts - 1 } else { parts }
    }

    fn is_test_file(&self) -> bool {
        self.path.ends_with("/tests.rs") || self.path.contains("/tests/")
    }
}

/// Every text file that belongs to the project.
fn tree() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    let mut folders = vec![root.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("the tree can be listed") {
            let path = entry.expect("the tree can be listed").path();
            let name = path.file_name().expect("an entry has a name").to_string_lossy().into_owned();
            if path.is_dir() {
                if !["target", ".git", "__pycache__", "corpus", "artifacts"].contains(&name.as_str()) {
                    folders.push(path);
                }
            } else if name != "Cargo.lock" && !name.starts_with(".git") {
                files.push(path);
            }
        }
    }
    files.sort();
    let relative =
        |path: &PathBuf| path.strip_prefix(root).expect("it is below").to_string_lossy().into_owned();
    let read = |path: &PathBuf| Some(Source { path: relative(path), text: fs::read_to_string(path).ok()? });
    files.iter().filter_map(read).collect()
}

fn level(module: &str) -> Option<u8> {
    LAYERS.iter().find(|(name, _)| *name == module).map(|(_, level)| *level)
}

fn may_use(user: &str, used: &str) -> bool {
    if user == used || ALSO_ALLOWED.contains(&(user, used)) {
        return true;
    }
    match (level(user), level(used)) {
        (Some(above), Some(below)) => below < above && !NEVER.contains(&(user, used)),
        // Names outside the table (a macro, an item of the root) have no layer.
        (_, None) => true,
        (None, Some(_)) => false,
    }
}

/// Imports go strictly down.
fn check_layers(files: &[Source]) -> Vec<String> {
    let mut faults = Vec::new();
    for file in files.iter().filter(|file| file.is_rust() && file.path.starts_with("src/")) {
        let module = file.module().expect("it is below src");
        if ["lib", "main"].contains(&module) {
            continue;
        }
        if level(module).is_none() {
            faults.push(format!("{}: the module {module} is in no layer", file.path));
        }
        for (used, line) in code::root_modules(&file.code(), file.depth()) {
            if !may_use(module, &used) {
                faults.push(format!("{}:{line}: {module} must not use {used}", file.path));
            }
        }
    }
    faults
}

/// No files use each other in a circle.
fn check_circles(files: &[Source]) -> Vec<String> {
    let inner = files
        .iter()
        .filter(|file| file.is_rust() && file.path.starts_with("src/") && file.path != "src/main.rs");
    let inner: Vec<(&str, &str)> = inner.map(|file| (file.path.as_str(), file.text.as_str())).collect();
    circles::circles(&inner).unwrap_or_else(|fault| vec![fault])
}

/// The table in `src/lib.rs` equals the enforced one.
fn check_layer_table(files: &[Source]) -> Vec<String> {
    let Some(lib) = files.iter().find(|file| file.path == "src/lib.rs") else {
        return vec!["src/lib.rs is missing".to_owned()];
    };
    let mut shown = BTreeSet::new();
    for line in lib.text.lines() {
        let mut cells = line.trim_start_matches("//!").split('|').map(str::trim).skip(1);
        let (Some(layer), Some(module)) = (cells.next(), cells.next()) else { continue };
        let Some(number) = layer.strip_prefix('L').and_then(|text| text.parse::<u8>().ok()) else { continue };
        shown.insert((module.split('`').nth(1).unwrap_or_default().to_owned(), number));
    }
    let enforced: BTreeSet<_> = LAYERS.iter().map(|(name, number)| ((*name).to_owned(), *number)).collect();
    let differing = shown.symmetric_difference(&enforced);
    differing
        .map(|(name, number)| format!("{name} (L{number}) is in only one of lib.rs and tidy.rs"))
        .collect()
}

/// Files stay small.
fn check_sizes(files: &[Source]) -> Vec<String> {
    let is_source = |file: &&Source| {
        file.is_rust()
            || [".sh", ".py"].iter().any(|end| file.path.ends_with(end))
            || file.path.starts_with("scripts/")
            || file.path.starts_with("vm-tests/")
    };
    let sized = files.iter().filter(is_source).map(|file| (&file.path, file.text.lines().count()));
    let large = sized.filter(|(_, lines)| *lines > FILE_LINES_MAX);
    large.map(|(path, lines)| format!("{path}: {lines} lines, more than {FILE_LINES_MAX}")).collect()
}

/// Formats and extents do no I/O and read no clock.
fn check_pure(files: &[Source]) -> Vec<String> {
    let mut faults = Vec::new();
    for file in files.iter().filter(|file| file.is_rust() && file.module().is_some_and(|m| PURE.contains(&m)))
    {
        if file.is_test_file() {
            continue;
        }
        for (number, line) in code::without_tests(&file.code()).lines().enumerate() {
            for word in ["std::fs", "std::time", "std::net", "std::process", "base::clock", "crate::sys"] {
                if line.contains(word) {
                    faults.push(format!("{}:{}: {word} in a pure module", file.path, number + 1));
                }
            }
        }
    }
    faults
}

/// Every format has a description of its bytes.
fn check_formats(files: &[Source]) -> Vec<String> {
    let has_code = |file: &&Source| file.is_rust() && file.code().lines().any(|line| !line.trim().is_empty());
    let mut folders = BTreeSet::new();
    for file in files.iter().filter(has_code) {
        let inner = file.path.strip_prefix("src/format/");
        if let Some((folder, _)) = inner.and_then(|inner| inner.split_once('/')) {
            folders.insert(folder.to_owned());
        }
    }
    let described = |folder: &&String| {
        let wanted = format!("src/format/{folder}/FORMAT.md");
        files.iter().any(|file| file.path == wanted && file.text.lines().count() > 10)
    };
    let missing = folders.iter().filter(|folder| !described(folder));
    missing.map(|folder| format!("src/format/{folder} has no FORMAT.md")).collect()
}

/// `.ci/run` calls the README's test command and nothing else.
fn check_test_command(files: &[Source]) -> Vec<String> {
    let text = |path: &str| files.iter().find(|file| file.path == path).map(|file| file.text.as_str());
    let (Some(ci), Some(readme)) = (text(".ci/run"), text("README.md")) else {
        return vec![".ci/run or README.md is missing".to_owned()];
    };
    let is_preparation = |line: &&str| {
        line.is_empty()
            || line.starts_with('#')
            || line.starts_with("set -")
            || line.starts_with("cd \"$(dirname")
            || *line == "export CI=true"
    };
    let commands: Vec<&str> = ci.lines().map(str::trim).filter(|line| !is_preparation(line)).collect();
    match commands.as_slice() {
        [command] if *command == "./scripts/test" => {
            let bare = |line: &str| line.split(" #").next().unwrap_or_default().trim() == *command;
            let shown = readme.lines().any(bare);
            if shown {
                Vec::new()
            } else {
                vec![format!("README.md does not show {command} on a line of its own")]
            }
        }
        other => vec![format!(".ci/run calls {other:?}, not ./scripts/test alone")],
    }
}

/// No file names a particular machine or package server, or contains a note of unfinished work.
fn check_traces(files: &[Source]) -> Vec<String> {
    // Assembled here, so that this file does not contain them.
    let machine =
        [concat!("/wo", "rk/"), concat!("/ho", "me/"), concat!("/Us", "ers/"), concat!("/mn", "t/c/")];
    let servers = [
        concat!("deb.deb", "ian.org"),
        concat!("security.deb", "ian.org"),
        concat!("archive.ubu", "ntu.com"),
        concat!("static.cra", "tes.io"),
        concat!("index.cra", "tes.io"),
        concat!("py", "pi.org"),
    ];
    let undone = [concat!("tod", "o!("), concat!("unimple", "mented!("), concat!("#[ign", "ore")];
    let mut faults = Vec::new();
    for file in files {
        for (number, line) in file.text.lines().enumerate() {
            let starts_path = |part: &&&str| {
                let before = line.find(**part).map(|at| &line[..at]);
                before.is_some_and(|before| {
                    !before.ends_with(|c: char| c.is_alphanumeric() || "._-/}".contains(c))
                })
            };
            let paths = machine.iter().filter(starts_path);
            let named = servers.iter().filter(|part| line.contains(**part));
            let left = undone.iter().filter(|part| file.is_rust() && line.contains(**part));
            for part in paths.chain(named).chain(left) {
                faults.push(format!("{}:{}: {part}", file.path, number + 1));
            }
        }
    }
    faults
}

/// Every script of a VM case is run by a case.
fn check_case_scripts(files: &[Source]) -> Vec<String> {
    let lists: Vec<&Source> =
        files.iter().filter(|file| file.path.starts_with("vm-tests/cases/") && file.is_rust()).collect();
    // A list names a script's file, or a case with the name of the script.
    let run = |stem: &str| {
        let names = [format!("\"{stem}.sh\""), format!("\"{stem}\"")];
        lists.iter().any(|list| names.iter().any(|name| list.text.contains(name)))
    };
    let unused = |file: &&Source| {
        let stem = file.path.strip_prefix("vm-tests/cases/").and_then(|name| name.strip_suffix(".sh"));
        stem.is_some_and(|stem| !stem.starts_with("lib") && !run(stem))
    };
    files.iter().filter(unused).map(|file| format!("{}: no case runs it", file.path)).collect()
}

fn must_be_clean(faults: &[String]) {
    assert!(faults.is_empty(), "\n{}\n", faults.join("\n"));
}

mod the_tree {
    use super::*;

    #[test]
    fn imports_go_strictly_down() {
        must_be_clean(&check_layers(&tree()));
    }

    #[test]
    fn no_files_use_each_other_in_a_circle() {
        must_be_clean(&check_circles(&tree()));
    }

    #[test]
    fn the_layer_table_is_the_documented_one() {
        must_be_clean(&check_layer_table(&tree()));
    }

    #[test]
    fn files_are_small() {
        must_be_clean(&check_sizes(&tree()));
    }

    #[test]
    fn formats_and_extents_are_pure() {
        must_be_clean(&check_pure(&tree()));
    }

    #[test]
    fn every_format_is_described() {
        must_be_clean(&check_formats(&tree()));
    }

    #[test]
    fn continuous_integration_runs_the_readmes_test_command() {
        must_be_clean(&check_test_command(&tree()));
    }

    #[test]
    fn nothing_knows_one_machine_and_nothing_is_undone() {
        must_be_clean(&check_traces(&tree()));
    }

    #[test]
    fn every_case_script_is_run() {
        must_be_clean(&check_case_scripts(&tree()));
    }
}

/// Each check fails where it should, and accepts similar code that is allowed.
mod the_checks {
    use super::*;

    fn file(path: &str, text: &str) -> Vec<Source> {
        vec![Source { path: path.to_owned(), text: text.to_owned() }]
    }

    #[test]
    fn an_import_upwards_or_sideways_is_a_fault() {
        for (path, text) in [
            ("src/base/units.rs", "use crate::sys::ring;"),
            ("src/format/archive/mod.rs", "use crate::extent::Extent;"),
            ("src/io/engine.rs", "fn f() { crate::copy::run() }"),
            ("src/store/mod.rs", "use crate::{\n    base::Bytes,\n    volume::{Origin, freeze},\n};"),
            ("src/store/mod.rs", "use super::volume;"),
            ("src/store/tail.rs", "use super::super::volume::Origin;"),
            ("src/copy/engine.rs", "use crate::dm::Table;"),
            ("src/other/mod.rs", "use crate::base::Bytes;"),
        ] {
            assert!(!check_layers(&file(path, text)).is_empty(), "{path}: {text}");
        }
    }

    #[test]
    fn an_import_downwards_is_none() {
        for (path, text) in [
            ("src/sys/ring.rs", "use crate::base::units::Bytes;"),
            ("src/op/copy.rs", "use crate::{dm, store, copy::{self, dm_like}};"),
            ("src/io/engine.rs", "use super::block::Read; // crate::cli\nconst S: &str = \"crate::cli\";"),
            ("src/io/deep/engine.rs", "use super::super::cli;"),
            ("src/io/engine.rs", "use crate::io::block;"),
            ("src/lib.rs", "pub use crate::cli;"),
            ("src/main.rs", "use tidemark::cli;"),
        ] {
            must_be_clean(&check_layers(&file(path, text)));
        }
    }

    #[test]
    fn files_that_use_each_other_are_a_fault() {
        let tree = |texts: &[(&str, &str)]| -> Vec<Source> {
            texts.iter().flat_map(|(path, text)| file(path, text)).collect()
        };
        let root = ("src/lib.rs", "mod a;");
        // Each entry has two ways in which a.rs and b.rs use each other.
        for (parent, a, b) in [
            ("mod a; mod b;", "use super::b::B; pub struct A;", "pub struct B; fn f() { super::a::A; }"),
            (
                "mod a; mod b;",
                "use super::b; pub struct A; fn f() { b::g() }",
                "pub fn g(_: crate::a::a::A) {}",
            ),
            // Through a re-export of the folder.
            (
                "mod a; mod b; pub use b::B;",
                "use crate::a::{B}; pub struct A;",
                "use super::a as x; pub struct B(x::A);",
            ),
            (
                "mod a; mod b; pub use b::*;",
                "pub struct A(super::B);",
                "pub struct B; fn f() { vec![super::a::A] }",
            ),
        ] {
            let files = tree(&[root, ("src/a/mod.rs", parent), ("src/a/a.rs", a), ("src/a/b.rs", b)]);
            assert_eq!(check_circles(&files).len(), 1, "{a}");
        }
        let three = [
            root,
            ("src/a/mod.rs", "mod a; pub struct M; mod b { pub fn f() { super::a::A; } }"),
            ("src/a/a.rs", "use super::M; pub struct A;"),
        ];
        assert_eq!(check_circles(&tree(&three)).len(), 1);
        assert_eq!(check_circles(&file("src/a.rs", "fn f( {")).len(), 1);
    }

    #[test]
    fn files_that_use_each_other_one_way_are_none() {
        for (parent, a, b) in [
            ("mod a; mod b; pub use a::A; pub use b::B;", "pub struct A(super::B);", "pub struct B;"),
            // Used only by a test; and an item of the same name in another module.
            (
                "mod a; mod b; mod c { pub struct A; }",
                "use super::b::B; pub struct A; #[cfg(test)] mod tests { use super::super::b; }",
                "pub struct B(super::c::A, std::a::A); #[cfg(test)] mod tests { use super::super::a::A; }",
            ),
            ("mod a; #[cfg(test)] mod b;", "pub struct A(super::b::B);", "pub struct B(super::a::A);"),
        ] {
            let texts =
                [("src/lib.rs", "mod a;"), ("src/a/mod.rs", parent), ("src/a/a.rs", a), ("src/a/b.rs", b)];
            must_be_clean(&check_circles(
                &texts.iter().flat_map(|(path, text)| file(path, text)).collect::<Vec<_>>(),
            ));
        }
    }

    #[test]
    fn a_table_that_differs_is_a_fault() {
        let rows: String =
            LAYERS.iter().map(|(name, level)| format!("//! | L{level} | [`{name}`] | it |\n")).collect();
        must_be_clean(&check_layer_table(&file("src/lib.rs", &rows)));
        assert_eq!(check_layer_table(&file("src/lib.rs", &rows.replace("L6", "L5"))).len(), 2);
        assert!(!check_layer_table(&[]).is_empty());
    }

    #[test]
    fn a_long_file_is_a_fault() {
        assert_eq!(check_sizes(&file("src/a.rs", &"// x\n".repeat(1001))).len(), 1);
        must_be_clean(&check_sizes(&file("src/a.rs", &"// x\n".repeat(1000))));
    }

    #[test]
    fn io_in_a_pure_module_is_a_fault() {
        assert_eq!(check_pure(&file("src/extent/a.rs", "use std::time::Instant;")).len(), 1);
        assert_eq!(check_pure(&file("src/format/x/a.rs", "use std::fs::File;")).len(), 1);
        must_be_clean(&check_pure(&file("src/io/a.rs", "use std::fs::File;")));
    }

    #[test]
    fn a_format_without_a_description_is_a_fault() {
        let mut files = file("src/format/x/mod.rs", "pub struct Header;");
        assert_eq!(check_formats(&files).len(), 1);
        files.extend(file("src/format/x/FORMAT.md", &"line\n".repeat(11)));
        must_be_clean(&check_formats(&files));
        must_be_clean(&check_formats(&file("src/format/y/mod.rs", "//! Only words so far.\n")));
    }

    #[test]
    fn another_command_in_continuous_integration_is_a_fault() {
        let tree = |ci: &str, readme: &str| {
            [file(".ci/run", ci), file("README.md", readme)].into_iter().flatten().collect()
        };
        let both: fn(Vec<Source>) -> usize = |files| check_test_command(&files).len();
        let good =
            "#!/usr/bin/env bash\nset -eu\ncd \"$(dirname \"$0\")/..\"\nexport CI=true\n./scripts/test\n";
        assert_eq!(both(tree(good, "Run:\n\n    ./scripts/test\n")), 0);
        assert_eq!(both(tree(good, "```\n./scripts/test   # everything\n```\n")), 0);
        assert_eq!(both(tree(good, "Run cargo test.\n")), 1);
        assert_eq!(both(tree(good, "./scripts/test --fast\n")), 1);
        assert_eq!(both(tree(&good.replace("test\n", "test --fast\n"), "    ./scripts/test\n")), 1);
        assert_eq!(both(tree(&format!("{good}cargo doc\n"), "    ./scripts/test\n")), 1);
        assert_eq!(both(file(".ci/run", good)), 1);
    }

    #[test]
    fn a_trace_of_one_machine_is_a_fault() {
        assert_eq!(check_traces(&file("docs/a.md", concat!("see /wo", "rk/x\n"))).len(), 1);
        assert_eq!(check_traces(&file("scripts/a", concat!("curl deb.deb", "ian.org\n"))).len(), 1);
        assert_eq!(check_traces(&file("src/a.rs", concat!("tod", "o!()\n"))).len(), 1);
        must_be_clean(&check_traces(&file("a.sh", "cd /memory/work/x\n")));
    }

    #[test]
    fn a_script_that_no_case_runs_is_a_fault() {
        let mut files = file("vm-tests/cases/x.sh", "true");
        assert_eq!(check_case_scripts(&files).len(), 1);
        files.extend(file("vm-tests/cases/mod.rs", "Case::new(\"x\", \"x.sh\")"));
        must_be_clean(&check_case_scripts(&files));
        files.extend(file("vm-tests/cases/xy.sh", "true"));
        assert_eq!(check_case_scripts(&files).len(), 1);
        files.extend(file("vm-tests/cases/y.rs", "case(\"xy\")"));
        must_be_clean(&check_case_scripts(&files));
        must_be_clean(&check_case_scripts(&file("vm-tests/cases/lib_fio.sh", "true")));
    }
}

mod reading_code {
    use super::code::{blank_text, root_modules, without_tests};

    #[test]
    fn text_is_blanked_and_code_is_not() {
        for (source, code) in [
            ("a // } b\nc", "a       \nc"),
            ("a /* } /* } */ } */ b", "a                   b"),
            ("f(\"}\\\"}\") g", "f(      ) g"),
            ("f(r#\"}\"}\"#) g", "f(        ) g"),
            ("f(b\"}\", '}', '\\'', b'}') g", "f(    ,    ,     ,     ) g"),
            ("fn f<'a>(x: &'a str) {}", "fn f<'a>(x: &'a str) {}"),
            ("'outer: loop { break 'outer }", "'outer: loop { break 'outer }"),
            ("let r#type = br_x;", "let r#type = br_x;"),
        ] {
            assert_eq!(blank_text(source), code, "{source}");
        }
    }

    #[test]
    fn modules_are_found_in_every_form() {
        let heads = |source: &str, depth| -> Vec<String> {
            root_modules(&blank_text(source), depth).into_iter().map(|(head, _)| head).collect()
        };
        assert_eq!(heads("use crate::a::b; use crate::{c, d::{e, f}, g as h};", 1), ["a", "c", "d", "g"]);
        assert_eq!(heads("use super::a; use super::super::b;", 2), ["b"]);
        assert_eq!(heads("pub(crate) fn f() { my_crate::g() }", 2), Vec::<String>::new());
    }

    #[test]
    fn only_test_modules_are_left_out() {
        let code =
            without_tests("fn a() {}\n#[cfg(test)]\nmod tests { fn b() {} }\n#[cfg(test)]\nfn c() {}\n");
        assert!(code.contains("fn a") && !code.contains("fn b") && code.contains("fn c"));
    }
}
