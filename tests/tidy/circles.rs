//! Finds files that use each other in a circle.
//!
//! A file uses another one if it names an item of that file: by a path, or by a name from a `use`. Names are followed
//! through re-exports (`pub use`) to the file that defines the item; a re-export alone does not count. Tests are left
//! out. Method calls are not seen, because they name no file.

use std::collections::{BTreeMap, BTreeSet};

use syn::visit::{self, Visit};

/// Maximum length of a chain of re-exports.
const REEXPORTS_MAX: usize = 16;

type ModulePath = Vec<String>;

/// A module: the text between its braces, or in its file.
#[derive(Default)]
struct Module {
    /// The index of its file.
    file: usize,
    children: BTreeSet<String>,
    /// Names from `use`, each with its path as written.
    names: BTreeMap<String, ModulePath>,
    /// Paths of `use ...::*`.
    globs: Vec<ModulePath>,
    items: BTreeSet<String>,
    /// Paths in code, and in `use` declarations that are not `pub`.
    used: BTreeSet<ModulePath>,
}

/// Finds every circle among `files`, which are pairs of a path below `src/` and the text. Returns the paths of each
/// circle, and what they use of each other.
///
/// # Errors
/// The file cannot be parsed.
pub fn circles(files: &[(&str, &str)]) -> Result<Vec<String>, String> {
    let mut modules: BTreeMap<ModulePath, Module> = BTreeMap::new();
    for (ix, (path, text)) in files.iter().enumerate() {
        let parsed = syn::parse_file(text).map_err(|error| format!("{path}: {error}"))?;
        read_module(module_of(path), ix, &parsed.items, &mut modules);
    }
    drop_tests(&mut modules);
    let mut edges: BTreeMap<usize, BTreeMap<usize, BTreeSet<String>>> = BTreeMap::new();
    for (at, module) in &modules {
        for path in &module.used {
            let Some(file) = resolve(&modules, at, path, REEXPORTS_MAX) else { continue };
            if file != module.file {
                let used = edges.entry(module.file).or_default().entry(file).or_default();
                used.insert(path.join("::"));
            }
        }
    }
    Ok(describe(files, &edges))
}

fn module_of(path: &str) -> ModulePath {
    let stem = path.trim_start_matches("src/").trim_end_matches(".rs");
    let mut parts: ModulePath = stem.split('/').map(str::to_owned).collect();
    parts.pop_if(|last| last == "mod" || last == "lib");
    parts
}

fn is_test(attributes: &[syn::Attribute]) -> bool {
    let is_test = |attribute: &syn::Attribute| {
        attribute.path().is_ident("cfg")
            && attribute.parse_args::<syn::Path>().is_ok_and(|condition| condition.is_ident("test"))
    };
    attributes.iter().any(is_test)
}

fn read_module(at: ModulePath, file: usize, items: &[syn::Item], modules: &mut BTreeMap<ModulePath, Module>) {
    let mut module = Module { file, ..Module::default() };
    for item in items {
        match item {
            syn::Item::Mod(inner) if !is_test(&inner.attrs) => {
                let name = inner.ident.to_string();
                if let Some((_, content)) = &inner.content {
                    let inside = at.iter().cloned().chain([name.clone()]).collect();
                    read_module(inside, file, content, modules);
                }
                module.children.insert(name);
            }
            syn::Item::Use(import) if !is_test(&import.attrs) => {
                let is_reexport = !matches!(import.vis, syn::Visibility::Inherited);
                module.import(&import.tree, &mut Vec::new(), is_reexport);
            }
            item => module.read_item(item),
        }
    }
    modules.insert(at, module);
}

/// Drops files that no declared module has: they contain only tests.
fn drop_tests(modules: &mut BTreeMap<ModulePath, Module>) {
    let declared: BTreeSet<ModulePath> = modules
        .iter()
        .flat_map(|(at, module)| {
            module.children.iter().map(|child| at.iter().cloned().chain([child.clone()]).collect())
        })
        .collect();
    let has_root = modules.contains_key(&ModulePath::new());
    let is_declared = |at: &ModulePath| (1..=at.len()).all(|length| declared.contains(&at[..length]));
    modules.retain(|at, _| !has_root || is_declared(at));
}

impl Module {
    fn import(&mut self, tree: &syn::UseTree, before: &mut ModulePath, is_reexport: bool) {
        let mut named = |name: String, path: ModulePath| {
            if !is_reexport {
                self.used.insert(path.clone());
            }
            self.names.insert(name, path);
        };
        let with = |last: String| before.iter().cloned().chain([last]).collect::<ModulePath>();
        match tree {
            syn::UseTree::Path(path) => {
                before.push(path.ident.to_string());
                self.import(&path.tree, before, is_reexport);
                before.pop();
            }
            syn::UseTree::Name(name) if name.ident == "self" => {
                named(before.last().cloned().unwrap_or_default(), before.clone());
            }
            syn::UseTree::Name(name) => named(name.ident.to_string(), with(name.ident.to_string())),
            syn::UseTree::Rename(rename) => named(rename.rename.to_string(), with(rename.ident.to_string())),
            syn::UseTree::Glob(_) => self.globs.push(before.clone()),
            syn::UseTree::Group(group) => {
                for tree in &group.items {
                    self.import(tree, before, is_reexport);
                }
            }
        }
    }

    fn read_item(&mut self, item: &syn::Item) {
        let ident = match item {
            syn::Item::Const(it) => Some(&it.ident),
            syn::Item::Enum(it) => Some(&it.ident),
            syn::Item::Fn(it) => Some(&it.sig.ident),
            syn::Item::Static(it) => Some(&it.ident),
            syn::Item::Struct(it) => Some(&it.ident),
            syn::Item::Trait(it) => Some(&it.ident),
            syn::Item::Type(it) => Some(&it.ident),
            syn::Item::Union(it) => Some(&it.ident),
            _ => None,
        };
        self.items.extend(ident.map(ToString::to_string));
        let mut reader = Reader { used: &mut self.used };
        reader.visit_item(item);
    }
}

/// Collects the paths that code names.
struct Reader<'a> {
    used: &'a mut BTreeSet<ModulePath>,
}

impl<'ast> Visit<'ast> for Reader<'_> {
    fn visit_path(&mut self, path: &'ast syn::Path) {
        self.used.insert(path.segments.iter().map(|segment| segment.ident.to_string()).collect());
        visit::visit_path(self, path);
    }

    /// Macro arguments are not parsed: any names joined by `::` count.
    fn visit_macro(&mut self, call: &'ast syn::Macro) {
        let text = call.tokens.to_string().replace(" :: ", "::");
        let is_part = |c: char| c.is_alphanumeric() || c == '_' || c == ':';
        for word in text.split(|c| !is_part(c)).filter(|word| word.contains("::")) {
            self.used.insert(word.split("::").map(str::to_owned).collect());
        }
    }

    fn visit_item_mod(&mut self, _: &'ast syn::ItemMod) {}
}

/// The file of the item that `path` names in the module `at`; None for items outside the tree.
fn resolve(
    modules: &BTreeMap<ModulePath, Module>,
    at: &[String],
    path: &[String],
    reexports_left: usize,
) -> Option<usize> {
    let left = reexports_left.checked_sub(1)?;
    let (first, rest) = path.split_first()?;
    let here = modules.get(at)?;
    match first.as_str() {
        "crate" => return walk(modules, ModulePath::new(), rest, left),
        "self" => return walk(modules, at.to_vec(), rest, left),
        "super" => return resolve_super(modules, at, rest, left),
        _ => {}
    }
    if let Some(named) = here.names.get(first).filter(|named| named.first() != Some(first)) {
        let full: ModulePath = named.iter().chain(rest).cloned().collect();
        return resolve(modules, at, &full, left);
    }
    if here.children.contains(first) || here.items.contains(first) {
        return walk(modules, at.to_vec(), path, left);
    }
    here.globs.iter().find_map(|glob| {
        let full: ModulePath = glob.iter().chain(path).cloned().collect();
        resolve(modules, at, &full, left)
    })
}

fn resolve_super(
    modules: &BTreeMap<ModulePath, Module>,
    at: &[String],
    rest: &[String],
    left: usize,
) -> Option<usize> {
    let (_, parent) = at.split_last()?;
    match rest.first().map(String::as_str) {
        Some("super") => resolve_super(modules, parent, &rest[1..], left),
        _ => walk(modules, parent.to_vec(), rest, left),
    }
}

/// Walks from the module `at` down along `path`, which names modules and then an item.
fn walk(
    modules: &BTreeMap<ModulePath, Module>,
    mut at: ModulePath,
    path: &[String],
    left: usize,
) -> Option<usize> {
    for (ix, name) in path.iter().enumerate() {
        let module = modules.get(&at)?;
        if module.children.contains(name) {
            at.push(name.clone());
        } else if module.items.contains(name) {
            return Some(module.file);
        } else {
            return resolve(modules, &at, &path[ix..], left);
        }
    }
    // A module is not an item; only its items count.
    None
}

/// The files that reach each other.
fn describe(
    files: &[(&str, &str)],
    edges: &BTreeMap<usize, BTreeMap<usize, BTreeSet<String>>>,
) -> Vec<String> {
    let reached = |from: usize| {
        let mut found = BTreeSet::new();
        let mut open = vec![from];
        while let Some(at) = open.pop() {
            let next = edges.get(&at).into_iter().flat_map(|next| next.keys().copied());
            open.extend(next.filter(|file| found.insert(*file)).collect::<Vec<_>>());
        }
        found
    };
    let reaches: Vec<BTreeSet<usize>> = (0..files.len()).map(reached).collect();
    let mut said: BTreeSet<usize> = BTreeSet::new();
    let mut faults = Vec::new();
    for start in 0..files.len() {
        if !reaches[start].contains(&start) || said.contains(&start) {
            continue;
        }
        let circle: BTreeSet<usize> =
            reaches[start].iter().copied().filter(|other| reaches[*other].contains(&start)).collect();
        said.extend(&circle);
        let within = circle.iter().flat_map(|from| {
            let used = edges.get(from).into_iter().flatten();
            used.filter(|(to, _)| circle.contains(to)).map(move |(to, names)| {
                let names: Vec<&str> = names.iter().map(String::as_str).collect();
                format!("  {} uses {}: {}", files[*from].0, files[*to].0, names.join(", "))
            })
        });
        let lines: Vec<String> = within.collect();
        let paths: Vec<&str> = circle.iter().map(|ix| files[*ix].0).collect();
        faults.push(format!("a circle of {}\n{}", paths.join(", "), lines.join("\n")));
    }
    faults
}
