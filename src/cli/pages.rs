//! Completion scripts and man pages, generated from the one definition in [`args`](super::args).

use std::fs;
use std::path::Path;

use clap::{Command, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man;

use super::args::{Cli, EXIT_CODES, HOOKS};
use crate::base::{Result, ResultExt};

/// The completion script for `shell`.
#[must_use]
pub fn completions(shell: Shell) -> String {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "tidemark", &mut script);
    String::from_utf8(script).expect("generated from UTF-8 names and help")
}

/// The pages as file name and roff text: `tidemark.1` first, then one for each visible command, and for each command of
/// a command.
///
/// # Errors
/// None in practice: the pages are written to memory.
pub fn man_pages() -> Result<Vec<(String, String)>> {
    let mut root = Cli::command();
    root.build();
    let mut pages = vec![page(&root, "tidemark".to_owned())?];
    for command in root.get_subcommands().filter(|command| !command.is_hide_set()) {
        let name = format!("tidemark-{}", command.get_name());
        pages.push(page(command, name.clone())?);
        for inner in command.get_subcommands() {
            pages.push(page(inner, format!("{name}-{}", inner.get_name()))?);
        }
    }
    Ok(pages)
}

fn page(command: &Command, name: String) -> Result<(String, String)> {
    let mut roff = Vec::new();
    let examples = command.get_after_help().map(ToString::to_string).unwrap_or_default();
    // The title is the name of the page, "tidemark-copy", while the synopsis keeps "tidemark copy", which
    // clap derived when the tree was built.
    let bare = command.clone().display_name(name.clone()).after_help(None::<&str>);
    Man::new(bare).render(&mut roff).io_context(|| format!("rendering the man page {name}"))?;
    let mut text = String::from_utf8_lossy(&roff).into_owned();
    text.push('\n');
    let examples = examples.split("\n\nExit codes:").next().unwrap_or_default();
    let examples = examples.strip_prefix("Examples:\n").unwrap_or(examples);
    text.push_str(&literal_section("EXAMPLES", examples));
    if command.get_arguments().any(|argument| argument.get_long() == Some("hook-before")) {
        text.push_str(&literal_section("HOOKS", HOOKS));
    }
    text.push_str(&literal_section("EXIT STATUS", EXIT_CODES));
    if name != "tidemark" {
        text.push_str(".SH SEE ALSO\n\\fBtidemark\\fR(1)\n");
    }
    Ok((format!("{name}.1"), text))
}

/// Verbatim text, line by line.
fn literal_section(title: &str, text: &str) -> String {
    let mut roff = format!(".SH {title}\n.nf\n");
    for line in text.lines() {
        // A line that begins with a dot or a quote would be a roff request.
        roff.push_str("\\&");
        roff.push_str(&line.replace('\\', "\\e").replace('-', "\\-").replace('\'', "\\(aq"));
        roff.push('\n');
    }
    roff.push_str(".fi\n");
    roff
}

/// Writes every page into `directory`, which is created if necessary. Returns how many.
///
/// # Errors
/// The failed write.
pub fn write_man_pages(directory: &Path) -> Result<usize> {
    fs::create_dir_all(directory).io_context(|| format!("creating the directory {}", directory.display()))?;
    let pages = man_pages()?;
    for (name, text) in &pages {
        let path = directory.join(name);
        fs::write(&path, text).io_context(|| format!("writing {}", path.display()))?;
    }
    Ok(pages.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literal_text_stays_literal() {
        assert_eq!(literal_section("T", ".a 'b' \\-"), ".SH T\n.nf\n\\&.a \\(aqb\\(aq \\e\\-\n.fi\n");
    }

    /// Roff writes a hyphen in an option as `\-`.
    fn plain(roff: &str) -> String {
        roff.replace("\\-", "-").replace("\\fB", "").replace("\\fR", "").replace("\\fI", "")
    }

    #[test]
    fn every_command_has_a_page_that_names_its_options() {
        let mut root = Cli::command();
        root.build();
        let pages = man_pages().unwrap();
        let outer = root.get_subcommands().filter(|command| !command.is_hide_set());
        let named = outer.flat_map(|command| {
            let name = format!("tidemark-{}", command.get_name());
            let inner = command.get_subcommands().map({
                let name = name.clone();
                move |inner| (format!("{name}-{}.1", inner.get_name()), inner)
            });
            std::iter::once((format!("{name}.1"), command)).chain(inner).collect::<Vec<_>>()
        });
        for (name, command) in named {
            let text = plain(&pages.iter().find(|page| page.0 == name).expect(&name).1);
            assert!(text.contains("EXAMPLES") && text.contains("EXIT STATUS"), "{name} shows an example");
            assert_eq!(text.contains("TIDEMARK_PID"), text.contains("--hook-after"), "{name}");
            for argument in command.get_arguments().filter(|argument| !argument.is_hide_set()) {
                if let Some(long) = argument.get_long() {
                    assert!(text.contains(&format!("--{long}")), "{name} lacks --{long}:\n{text}");
                }
            }
        }
    }

    #[test]
    fn every_shell_completes_every_option() {
        let mut root = Cli::command();
        root.build();
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let script = completions(shell);
            for command in root.get_subcommands().filter(|command| !command.is_hide_set()) {
                assert!(script.contains(command.get_name()), "{shell}: {}", command.get_name());
                for long in command.get_arguments().filter_map(clap::Arg::get_long) {
                    assert!(script.contains(long), "{shell} lacks {} --{long}", command.get_name());
                }
            }
        }
    }
}
