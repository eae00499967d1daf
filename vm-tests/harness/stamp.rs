//! Records which cases need not run again: those that passed with the same binary, scripts, harness and kernel.
//!
//! A stamp is a file in `target/vm/passed` that contains a digest of all of these. It is a convenience on one machine,
//! not evidence: a fresh clone has none.

use std::collections::BTreeSet;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::case::{Case, Depth};
use super::kernel::Kernel;

/// The digests that all cases share, computed once.
pub struct Stamps {
    repo: PathBuf,
    folder: PathBuf,
    cases: PathBuf,
    harness: u64,
    binary: u64,
}

impl Stamps {
    /// Reads the harness, the guest's scripts and the binary under test.
    pub fn new(repo: &Path, vm: &Path, binary: &Path) -> Result<Stamps> {
        let folder = vm.join("passed");
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let cases = repo.join("vm-tests/cases");
        let mut files = BTreeSet::new();
        for part in ["vm-tests/harness", "vm-tests/guest"] {
            list(&repo.join(part), &mut files)?;
        }
        // Shared libraries count for every case.
        let mut shared = BTreeSet::new();
        list(&cases, &mut shared)?;
        files.extend(shared.into_iter().filter(|path| {
            path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with("lib"))
        }));
        files.insert(repo.join("scripts/vm-image"));
        let mut hasher = DefaultHasher::new();
        for path in &files {
            read(path)?.hash(&mut hasher);
        }
        Ok(Stamps {
            repo: repo.to_owned(),
            folder,
            cases,
            harness: hasher.finish(),
            binary: digest(&read(binary)?),
        })
    }

    /// The digest of everything that this case depends on.
    pub fn digest(&self, case: &Case, kernel: Kernel, depth: Depth, vm: &Path) -> Result<String> {
        let mut hasher = DefaultHasher::new();
        format!("{case:?}").hash(&mut hasher);
        for phase in &case.phases {
            read(&self.cases.join(&phase.script))?.hash(&mut hasher);
        }
        let mut files = BTreeSet::new();
        for folder in &case.folders {
            list(&self.repo.join(folder), &mut files)?;
        }
        for path in &files {
            read(path)?.hash(&mut hasher);
        }
        // Another version of a kernel has another folder.
        let image = kernel.image(vm).and_then(|image| fs::canonicalize(image).ok());
        (self.harness, kernel.name(), depth.name(), image).hash(&mut hasher);
        if case.uses_binary {
            self.binary.hash(&mut hasher);
        }
        Ok(format!("{:016x}", hasher.finish()))
    }

    /// Whether the case has passed with this digest.
    pub fn passed(&self, run_name: &str, digest: &str) -> bool {
        fs::read_to_string(self.folder.join(run_name)).is_ok_and(|stored| stored == digest)
    }

    /// Records a pass.
    pub fn record(&self, run_name: &str, digest: &str) {
        // If a stamp cannot be written, the case only runs again.
        let _ = fs::write(self.folder.join(run_name), digest);
    }

    /// Removes an earlier pass: the case is about to run.
    pub fn forget(&self, run_name: &str) {
        let _ = fs::remove_file(self.folder.join(run_name));
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

fn digest(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    hasher.finish()
}

fn list(folder: &Path, files: &mut BTreeSet<PathBuf>) -> Result<()> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?;
    for entry in entries {
        let path = entry.with_context(|| format!("cannot list {}", folder.display()))?.path();
        if path.is_dir() {
            list(&path, files)?;
        } else {
            files.insert(path);
        }
    }
    Ok(())
}
