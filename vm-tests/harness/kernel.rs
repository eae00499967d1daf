//! The kernels that `scripts/setup` provides: their folders and modules.

use std::fs;
use std::path::{Path, PathBuf};

/// A kernel that `scripts/setup` provides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kernel {
    /// 6.12 as a user-mode kernel: an ordinary process at native speed, with one processor.
    UserMode,
    /// Debian's stock 6.12 under QEMU, with two processors.
    Main,
    /// Debian 12's 6.1 under QEMU, the oldest supported kernel.
    Oldest,
}

/// What runs a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Machine {
    /// The kernel is a program of the host.
    UserMode,
    /// An emulated or virtual machine.
    Qemu,
}

impl Machine {
    /// Its name for the scripts.
    pub fn name(self) -> &'static str {
        match self {
            Machine::UserMode => "um",
            Machine::Qemu => "qemu",
        }
    }
}

impl Kernel {
    /// All of them, in the order of the columns of `--list`.
    pub const ALL: [Kernel; 3] = [Kernel::UserMode, Kernel::Main, Kernel::Oldest];

    /// Its name in the names of runs, and of its folder `target/vm/kernel-NAME`.
    pub fn name(self) -> &'static str {
        match self {
            Kernel::UserMode => "um",
            Kernel::Main => "6.12",
            Kernel::Oldest => "6.1",
        }
    }

    /// The series that `uname -r` begins with.
    pub fn series(self) -> &'static str {
        match self {
            Kernel::UserMode | Kernel::Main => "6.12",
            Kernel::Oldest => "6.1",
        }
    }

    /// What runs it.
    pub fn machine(self) -> Machine {
        match self {
            Kernel::UserMode => Machine::UserMode,
            Kernel::Main | Kernel::Oldest => Machine::Qemu,
        }
    }

    /// Its folder: `boot/` holds the image, `lib/modules/` lists the modules that are loadable or built in.
    pub fn folder(self, vm: &Path) -> PathBuf {
        vm.join(format!("kernel-{}", self.name()))
    }

    /// What becomes the guest's `/lib/modules`.
    pub fn modules(self, vm: &Path) -> PathBuf {
        self.folder(vm).join("lib/modules")
    }

    /// The file to boot; None if `scripts/setup` could not provide the kernel.
    pub fn image(self, vm: &Path) -> Option<PathBuf> {
        let prefix = match self.machine() {
            Machine::UserMode => "linux",
            Machine::Qemu => "vmlinuz",
        };
        let entries = fs::read_dir(self.folder(vm).join("boot")).ok()?;
        entries
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix)))
    }

    /// The first of `modules` that is neither built in nor loadable.
    pub fn absent_module<'names>(self, vm: &Path, modules: &'names [String]) -> Option<&'names String> {
        let known = self.known_modules(vm);
        modules.iter().find(|module| !known.lines().any(|line| names_module(line, module)))
    }

    /// `modules.dep` and `modules.builtin`, concatenated.
    fn known_modules(self, vm: &Path) -> String {
        let version =
            fs::read_dir(self.modules(vm)).ok().and_then(|mut entries| Some(entries.next()?.ok()?.path()));
        let Some(version) = version else { return String::new() };
        let read = |name: &str| fs::read_to_string(version.join(name)).unwrap_or_default();
        format!("{}{}", read("modules.dep"), read("modules.builtin"))
    }
}

/// Whether a line of `modules.dep` or `modules.builtin` is about the module.
fn names_module(line: &str, module: &str) -> bool {
    let path = line.split(':').next().unwrap_or_default();
    let file = path.rsplit('/').next().unwrap_or_default();
    let name = file.split(".ko").next().unwrap_or_default();
    name.replace('_', "-") == module.replace('_', "-")
}
