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

/// The unit of volume `name`.
#[must_use]
pub fn volume_unit(name: &str) -> String {
    format!("tidemark-volume-{name}.service")
}

/// Writes the unit that attaches volume `name` at every boot, before local filesystems are mounted. `stores`: the
/// directories of the stores of its snapshots.
///
/// # Errors
/// I/O errors.
pub fn write_volume(name: &str, device: &Path, stores: &[PathBuf]) -> Result<PathBuf> {
    write(&volume_unit(name), |program| volume_text(name, device, program, stores))
}

/// Writes the unit of volume `name` again if it is installed. Returns its path then.
///
/// # Errors
/// I/O errors.
pub fn rewrite_volume(name: &str, device: &Path, stores: &[PathBuf]) -> Result<Option<PathBuf>> {
    let is_installed = Path::new(UNIT_DIR).join(volume_unit(name)).exists();
    is_installed.then(|| write_volume(name, device, stores)).transpose()
}

/// A volume with snapshots is attached once their records and stores can be read, so it cannot be ordered before all
/// local mounts. Its own mount waits for it (`x-systemd.requires` in /etc/fstab). When it stops, it is detached in
/// order.
fn volume_text(name: &str, device: &Path, program: &Path, stores: &[PathBuf]) -> String {
    let device_unit = escape(device);
    let (before, needs, stop) = if stores.is_empty() {
        ("local-fs-pre.target ", String::new(), String::new())
    } else {
        let stores: Vec<String> = stores.iter().map(|path| path.display().to_string()).collect();
        (
            "",
            format!("RequiresMountsFor=/var/lib/tidemark {}\n", stores.join(" ")),
            format!("ExecStop={} detach {name} --keep-snapshots --keep-unit\n", program.display()),
        )
    };
    format!(
        "[Unit]\n\
         Description=Tidemark volume {name}\n\
         DefaultDependencies=no\n\
         BindsTo={device_unit}.device\n\
         After={device_unit}.device\n\
         Before={before}local-fs.target shutdown.target\n\
         Conflicts=shutdown.target\n\
         {needs}\n\
         [Service]\n\
         Type=oneshot\n\
         RemainAfterExit=yes\n\
         ExecStart={} attach {} --name {name}\n\
         {stop}\n\
         [Install]\n\
         RequiredBy=local-fs-pre.target\n",
        program.display(),
        device.display()
    )
}

/// Escapes a path for a systemd unit name: '/' becomes '-'; any character except letters, digits, ':', '_' and '.'
/// becomes `\xNN` (systemd.unit(5)).
fn escape(path: &Path) -> String {
    let text = path.to_string_lossy();
    let mut name = String::new();
    for (index, byte) in text.trim_matches('/').bytes().enumerate() {
        match byte {
            b'/' => name.push('-'),
            b'.' if index > 0 => name.push('.'),
            byte if byte.is_ascii_alphanumeric() || b":_".contains(&byte) => name.push(char::from(byte)),
            byte => name.push_str(&format!("\\x{byte:02x}")),
        }
    }
    name
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
    fn unit_names_are_escaped_as_systemd_does() {
        // The output of systemd-escape --path.
        assert_eq!(escape(Path::new("/dev/disk/by-id/wwn-0x5000")), "dev-disk-by\\x2did-wwn\\x2d0x5000");
        assert_eq!(escape(Path::new("/dev/sdb1")), "dev-sdb1");
        let text = volume_text("data", Path::new("/dev/sdb1"), Path::new("/usr/bin/tidemark"), &[]);
        assert!(text.contains("ExecStart=/usr/bin/tidemark attach /dev/sdb1 --name data\n"));
        assert!(text.contains("BindsTo=dev-sdb1.device\n"));
        assert!(text.contains("Before=local-fs-pre.target local-fs.target") && !text.contains("ExecStop"));
    }

    #[test]
    fn a_volume_with_snapshots_waits_for_their_stores_and_is_detached_in_order() {
        let stores = [PathBuf::from("/mnt/fast"), PathBuf::from("/var/lib/tidemark")];
        let text = volume_text("data", Path::new("/dev/sdb1"), Path::new("/usr/bin/tidemark"), &stores);
        assert!(text.contains("RequiresMountsFor=/var/lib/tidemark /mnt/fast /var/lib/tidemark\n"));
        assert!(text.contains("ExecStop=/usr/bin/tidemark detach data --keep-snapshots --keep-unit\n"));
        // /var may be mounted only after local-fs-pre.target.
        assert!(text.contains("Before=local-fs.target shutdown.target\n"));
    }

    #[test]
    fn the_monitors_unit_notifies_and_is_restarted() {
        let text = monitor_text(Path::new("/usr/bin/tidemark"), true);
        assert!(text.contains("Type=notify\n"));
        assert!(text.contains("ExecStart=/usr/bin/tidemark monitor --auto-delete oldest\n"));
        assert!(monitor_text(Path::new("/x"), false).contains("ExecStart=/x monitor\n"));
    }
}
