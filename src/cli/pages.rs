//! Completion scripts and man pages, made from the one definition in [`args`](super::args).

use std::fs;
use std::path::Path;

use clap::{Command, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man;

use super::args::Cli;
use crate::base::{Result, ResultExt};

/// The completion script for `shell`.
#[must_use]
pub fn completions(shell: Shell) -> String {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "tidemark", &mut script);
    String::from_utf8(script).expect("made from UTF-8 names and help")
}

/// The pages: file name and roff text, `tidemark.1` first, then one for each visible command.
///
/// # Errors
/// None in practice: the pages are written to memory.
pub fn man_pages() -> Result<Vec<(String, String)>> {
    let mut root = Cli::command();
    root.build();
    let mut pages = vec![page(&root, "tidemark".to_owned())?];
    for command in root.get_subcommands().filter(|command| !command.is_hide_set()) {
        pages.push(page(command, format!("tidemark-{}", command.get_name()))?);
    }
    Ok(pages)
}

fn page(command: &Command, name: String) -> Result<(String, String)> {
    let mut roff = Vec::new();
    // The manual's title is the page's own name, "tidemark-copy", while its synopsis keeps "tidemark
    // copy", which clap worked out when the tree was built.
    Man::new(command.clone().display_name(name.clone()))
        .render(&mut roff)
        .io_context(|| format!("rendering the man page {name}"))?;
    let text = String::from_utf8_lossy(&roff).into_owned();
    Ok((format!("{name}.1"), text))
}

/// Writes every page into `directory`, which is made if need be; returns how many.
///
/// # Errors
/// The failed write.
pub fn write_man_pages(directory: &Path) -> Result<usize> {
    fs::create_dir_all(directory).io_context(|| format!("making the directory {}", directory.display()))?;
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

    /// Roff writes a hyphen in an option as `\-`.
    fn plain(roff: &str) -> String {
        roff.replace("\\-", "-").replace("\\fB", "").replace("\\fR", "").replace("\\fI", "")
    }

    #[test]
    fn every_command_has_a_page_that_names_its_options() {
        let mut root = Cli::command();
        root.build();
        let pages = man_pages().unwrap();
        for command in root.get_subcommands().filter(|command| !command.is_hide_set()) {
            let name = format!("tidemark-{}.1", command.get_name());
            let text = plain(&pages.iter().find(|page| page.0 == name).expect(&name).1);
            assert!(text.contains("Examples:"), "{name} shows an example");
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
