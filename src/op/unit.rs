//! Units of systemd that Tidemark installs on request.

use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use crate::base::{Result, ResultExt as _};

/// The systemd directory for an administrator's units.
pub const UNIT_DIR: &str = "/etc/systemd/system";

/// The unit of `tidemark monitor`.
const MONITOR: &str = "tidemark-monitor.service";

/// Writes the unit `name`; `text` gets the path of this program.
///
/// # Errors
/// I/O errors.
pub fn write(name: &str, text: impl FnOnce(&Path) -> String) -> Result<PathBuf> {
    let program = std::env::current_exe().io_context(|| "finding this program's own path".to_owned())?;
    let path = Path::new(UNIT_DIR).join(name);
    let what = || format!("writing {}", path.display());
    fs::create_dir_all(UNIT_DIR).io_context(what)?;
    let mut options = OpenOptions::new();
    let mut file =
        options.write(true).create(true).truncate(true).mode(0o644).open(&path).io_context(what)?;
    file.write_all(text(&program).as_bytes()).io_context(what)?;
    file.sync_all().io_context(what)?;
    File::open(UNIT_DIR).and_then(|directory| directory.sync_all()).io_context(what)?;
    Ok(path)
}

/// Writes the unit that monitors the stores of snapshots.
///
/// # Errors
/// I/O errors.
pub fn write_monitor(auto_delete: bool) -> Result<PathBuf> {
    write(MONITOR, |program| monitor_text(program, auto_delete))
}

fn monitor_text(program: &Path, auto_delete: bool) -> String {
    let option = if auto_delete { " --auto-delete oldest" } else { "" };
    format!(
        "[Unit]\n\
         Description=Tidemark: stores of snapshots\n\
         RequiresMountsFor=/var/lib/tidemark /run\n\
         \n\
         [Service]\n\
         Type=notify\n\
         NotifyAccess=main\n\
         ExecStart={} monitor{option}\n\
         Restart=on-failure\n\
         WatchdogSec=60\n\
         OOMScoreAdjust=-900\n\
         \n\
         [Install]\n\
         WantedBy=multi-user.target\n",
        program.display()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_monitors_unit_notifies_and_is_restarted() {
        let text = monitor_text(Path::new("/usr/bin/tidemark"), true);
        assert!(text.contains("Type=notify\n"));
        assert!(text.contains("ExecStart=/usr/bin/tidemark monitor --auto-delete oldest\n"));
        assert!(monitor_text(Path::new("/x"), false).contains("ExecStart=/x monitor\n"));
    }
}
