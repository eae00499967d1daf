//! Groups of volumes that have a name: `/etc/tidemark/groups.toml`.
//!
//! ```toml
//! [group.mail]
//! volumes = ["data", "wal"]
//! freeze-budget = "5s"
//! hook-frozen = "/usr/local/sbin/note-instant"
//! hook-timeout = "1m"
//! ```
//!
//! The file decides which commands run as root, so only root may be able to write it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use toml::Spanned;

use super::options::parse_time;
use crate::base::{Error, ErrorKind, Result, ResultExt as _};
use crate::op::attach::check_name;
use crate::op::request::{HOOK_TIMEOUT, Hooks};
use crate::sys::privilege::require_root;

/// The file.
pub const GROUPS_PATH: &str = "/etc/tidemark/groups.toml";

/// Longest file that is read, bytes.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// A group, as its file describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Group {
    /// The volumes, at least one; each once.
    pub volumes: Vec<PathBuf>,
    /// Longest time for which it may be held; None if the file does not say.
    pub freeze_budget: Option<Duration>,
    /// Its hooks.
    pub hooks: Hooks,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    #[serde(default)]
    group: BTreeMap<String, GroupTable>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct GroupTable {
    volumes: Spanned<Vec<Spanned<String>>>,
    freeze_budget: Option<Spanned<String>>,
    hook_timeout: Option<Spanned<String>>,
    hook_before: Option<String>,
    hook_frozen: Option<String>,
    hook_after: Option<String>,
}

/// The group `name`.
///
/// # Errors
/// [`ErrorKind::Refused`] if there is no such file or group, or if another user than root can write the file;
/// [`ErrorKind::BadData`] for a file that is not as it should be, with its path and the line; I/O errors.
pub fn find(name: &str) -> Result<Group> {
    require_root("using a group")?;
    find_in(Path::new(GROUPS_PATH), name)
}

fn find_in(path: &Path, name: &str) -> Result<Group> {
    let text = read(path, name)?;
    parse(&text)
        .map_err(|(line, what)| {
            Error::new(ErrorKind::BadData, format!("{}, line {line}: {what}", path.display()))
                .state("nothing was changed")
                .next("correct that line")
        })
        .and_then(|mut groups| {
            let known: Vec<String> = groups.keys().cloned().collect();
            groups.remove(name).ok_or_else(|| {
                let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
                Error::refused(format!("{} has no group '{name}'", path.display()))
                    .state("nothing was changed")
                    .next(format!("name one of its groups ({known}), or add [group.{name}] with its volumes"))
            })
        })
}

fn read(path: &Path, name: &str) -> Result<String> {
    let what = || format!("reading {}", path.display());
    let mut file = match File::open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(Error::refused(format!("there is no file {}", path.display()))
                .state("nothing was changed")
                .next(format!(
                    "name the volumes, or write it: [group.{name}] and volumes = [\"data\", \"wal\"]"
                )));
        }
        file => file.io_context(what)?,
    };
    let meta = file.metadata().io_context(what)?;
    if meta.uid() != 0 || meta.mode() & 0o022 != 0 {
        return Err(Error::refused(format!(
            "{} can be written by others than root, and its hooks run as root",
            path.display()
        ))
        .state("nothing was changed")
        .next(format!("chown root {0}; chmod go-w {0}", path.display())));
    }
    if meta.len() > FILE_BYTES_MAX {
        return Err(Error::new(ErrorKind::BadData, format!("{} is longer than 1 MiB", path.display())));
    }
    let mut text = String::new();
    file.by_ref().take(FILE_BYTES_MAX).read_to_string(&mut text).io_context(what)?;
    Ok(text)
}

/// The groups by name. An error is a line, from 1, and what is wrong with it.
fn parse(text: &str) -> Result<BTreeMap<String, Group>, (usize, String)> {
    let line_of =
        |at: usize| text.as_bytes()[..at.min(text.len())].iter().filter(|byte| **byte == b'\n').count() + 1;
    let document: Document = toml::from_str(text).map_err(|error| {
        let at = error.span().map_or(0, |span| span.start);
        (line_of(at), error.message().to_owned())
    })?;
    let group = |(name, table): (String, GroupTable)| {
        let bad = |at: usize, what: String| (line_of(at), format!("group '{name}': {what}"));
        let at = table.volumes.span().start;
        let mut volumes: Vec<PathBuf> = Vec::new();
        for volume in table.volumes.get_ref() {
            check_name(volume.get_ref()).map_err(|error| bad(volume.span().start, error.to_string()))?;
            if volumes.iter().any(|known| known.as_os_str() == volume.get_ref().as_str()) {
                return Err(bad(
                    volume.span().start,
                    format!("the volume {} is there twice", volume.get_ref()),
                ));
            }
            volumes.push(volume.get_ref().into());
        }
        if volumes.is_empty() {
            return Err(bad(at, "it has no volumes".to_owned()));
        }
        let time = |key: &str, text: Option<&Spanned<String>>| {
            let parsed = text.map(|text| {
                parse_time(text.get_ref()).map_err(|error| bad(text.span().start, format!("{key}: {error}")))
            });
            parsed.transpose()
        };
        let freeze_budget = time("freeze-budget", table.freeze_budget.as_ref())?;
        let hooks = Hooks {
            before: table.hook_before,
            frozen: table.hook_frozen,
            after: table.hook_after,
            timeout: time("hook-timeout", table.hook_timeout.as_ref())?.unwrap_or(HOOK_TIMEOUT),
        };
        Ok((name, Group { volumes, freeze_budget, hooks }))
    };
    document.group.into_iter().map(group).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    const TEXT: &str = r#"# Tidemark
[group.mail]
volumes = ["data", "wal"]
freeze-budget = "500ms"
hook-frozen = "true"
hook-timeout = "1m"

[group.one]
volumes = ["x"]
"#;

    #[test]
    fn groups_are_read() {
        let groups = parse(TEXT).unwrap();
        assert_eq!(groups.keys().collect::<Vec<_>>(), ["mail", "one"]);
        let mail = &groups["mail"];
        assert_eq!(mail.volumes, [PathBuf::from("data"), PathBuf::from("wal")]);
        assert_eq!(mail.freeze_budget, Some(Duration::from_millis(500)));
        assert_eq!(mail.hooks.frozen.as_deref(), Some("true"));
        assert_eq!(mail.hooks.timeout, Duration::from_secs(60));
        assert_eq!((groups["one"].freeze_budget, &groups["one"].hooks), (None, &Hooks::default()));
        assert!(parse("").unwrap().is_empty());
    }

    #[test]
    fn an_error_names_the_line() {
        for (text, line, word) in [
            ("[group.a]\nvolumes = [\"x\"\n\nrubbish", 4, ""),
            ("[group.a]\nvolumes = [\"x\"]\nfreeze-bugdet = \"2s\"\n", 3, "freeze-bugdet"),
            ("[group.a]\nvolumes = [\"x\"]\nfreeze-budget = 2\n", 3, "string"),
            ("[group.a]\nvolumes = [\"x\"]\nfreeze-budget = \"2\"\n", 3, "not a time"),
            ("[group.a]\nvolumes = [\"x\"]\nhook-timeout = \"never\"\n", 3, "hook-timeout: "),
            ("[group.a]\nvolumes = [\n  \"x\",\n  \"../y\",\n]\n", 4, "cannot be a volume's name"),
            ("[group.a]\nvolumes = [\n  \"x\",\n  \"x\",\n]\n", 4, "twice"),
            ("\n[group.a]\nvolumes = []\n", 3, "no volumes"),
            ("\n[group.a]\nhook-after = \"x\"\n", 2, "volumes"),
            ("[groups.a]\nvolumes = [\"x\"]\n", 1, "groups"),
            ("[group.a]\nvolumes = [\"x\"]\n[group.a]\nvolumes = [\"y\"]\n", 3, "a"),
        ] {
            let (found, what) = parse(text).map(|_| ()).unwrap_err();
            assert!(found == line && what.contains(word), "{text}: line {found}: {what}");
        }
    }

    #[test]
    fn a_group_is_found_or_those_that_exist_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("groups.toml");
        assert_eq!(find_in(&path, "mail").unwrap_err().kind(), ErrorKind::Refused);
        std::fs::write(&path, TEXT).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).unwrap();
        let error = find_in(&path, "mail").unwrap_err();
        assert!(error.to_string().contains("written by others"), "{error}");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        // Only a file of root's is read any further.
        if std::fs::metadata(&path).unwrap().uid() != 0 {
            return;
        }
        assert_eq!(find_in(&path, "mail").unwrap().volumes.len(), 2);
        let error = find_in(&path, "web").unwrap_err();
        assert!(error.next_step().unwrap().contains("mail, one"), "{error}");
        std::fs::write(&path, "[group.mail]\nvolumes = 3\n").unwrap();
        let error = find_in(&path, "mail").unwrap_err();
        assert!(error.to_string().contains("groups.toml, line 2"), "{error}");
    }
}
