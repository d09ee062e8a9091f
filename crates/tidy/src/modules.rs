//! The modules of a crate: the items that each defines, the names that each imports, and the paths that it uses.
//!
//! Read from tokens. Paths that go through methods, fields or the type of a value are not seen; nor need they be: a file
//! that uses a type names it somewhere. `#[path]` is not followed: only tests use it.

use std::collections::{BTreeMap, BTreeSet};

use crate::source::SourceFile;
use crate::token::{self, Token};

/// Names that re-exports and aliases lead through, at most; more is a circle of imports.
const IMPORT_DEPTH_MAX: usize = 16;

/// Of [`Crate::modules`].
type ModuleIndex = usize;

/// A module, which is a file, or a part of one.
#[derive(Debug, Default)]
struct Module {
    file: String,
    parent: Option<ModuleIndex>,
    children: BTreeMap<String, ModuleIndex>,
    items: BTreeSet<String>,
    imports: Vec<Import>,
    paths: Vec<(usize, Vec<String>)>,
}

/// A leaf of a `use`.
#[derive(Debug)]
struct Import {
    path: Vec<String>,
    /// None for `*`.
    name: Option<String>,
    is_reexport: bool,
    line: usize,
}

/// A use of something that another file of the crate defines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Edge {
    pub(crate) from: String,
    pub(crate) to: String,
    pub(crate) line: usize,
    /// As written.
    pub(crate) path: String,
}

/// The modules below one root file.
#[derive(Debug)]
pub(crate) struct Crate {
    modules: Vec<Module>,
}

impl Crate {
    /// Reads the crate whose root is the file `root`.
    pub(crate) fn read(files: &BTreeMap<&str, &SourceFile>, root: &str) -> Crate {
        let mut this = Crate { modules: Vec::new() };
        let folder = root.rsplit_once('/').map_or("", |(folder, _)| folder);
        this.add_file(files, root, None, folder);
        this
    }

    /// `folder` is where the files of its children are.
    fn add_file(
        &mut self,
        files: &BTreeMap<&str, &SourceFile>,
        path: &str,
        parent: Option<ModuleIndex>,
        folder: &str,
    ) -> ModuleIndex {
        let index = self.add(path, parent);
        if let Some(file) = files.get(path) {
            self.read_items(files, &token::of_product(&file.tokens), index, folder);
        }
        index
    }

    fn add(&mut self, file: &str, parent: Option<ModuleIndex>) -> ModuleIndex {
        self.modules.push(Module { file: file.to_owned(), parent, ..Module::default() });
        self.modules.len() - 1
    }

    fn read_items(
        &mut self,
        files: &BTreeMap<&str, &SourceFile>,
        code: &[Token],
        index: ModuleIndex,
        folder: &str,
    ) {
        let mut at = 0;
        let mut depth = 0;
        while let Some(token) = code.get(at) {
            if token.is("use") {
                let end = code[at..]
                    .iter()
                    .position(|token| token.is(";"))
                    .map_or(code.len(), |length| at + length);
                let is_reexport = at
                    .checked_sub(1)
                    .is_some_and(|before| code[before].is("pub") || code[before].is(")"));
                let imports = UseTree { code: &code[at + 1..end], is_reexport, at: 0 }.leaves();
                self.modules[index].imports.extend(imports);
                at = end + 1;
                continue;
            }
            if depth == 0 && token.is("mod") {
                at = self.read_module(files, code, at, index, folder);
                continue;
            }
            if depth == 0
                && let Some(name) = item_name(code, at)
            {
                self.modules[index].items.insert(name);
            }
            if token::is_open(token) {
                depth += 1;
            } else if token::is_close(token) {
                depth -= 1;
            }
            at = match path_at(code, at) {
                Some(path) => {
                    let end = at + 3 * path.len() - 2;
                    self.modules[index].paths.push((token.line, path));
                    end
                }
                None => at + 1,
            };
        }
    }

    /// Reads the `mod` at `at`; returns the index after it.
    fn read_module(
        &mut self,
        files: &BTreeMap<&str, &SourceFile>,
        code: &[Token],
        at: usize,
        parent: ModuleIndex,
        folder: &str,
    ) -> usize {
        let Some(name) = code.get(at + 1).map(|name| name.text.clone()) else { return code.len() };
        let inner = format!("{folder}/{name}");
        if code.get(at + 2).is_some_and(|token| token.is("{")) {
            let end = closing(code, at + 2);
            let file = self.modules[parent].file.clone();
            let child = self.add(&file, Some(parent));
            self.modules[parent].children.insert(name, child);
            self.read_items(files, &code[at + 3..end], child, &inner);
            return end + 1;
        }
        let paths = [format!("{inner}.rs"), format!("{inner}/mod.rs")];
        if let Some(path) = paths.iter().find(|path| files.contains_key(path.as_str())) {
            let child = self.add_file(files, path, Some(parent), &inner);
            self.modules[parent].children.insert(name, child);
        }
        at + 3
    }

    /// All uses between files. `mod` lines and re-exports do not count.
    pub(crate) fn edges(&self) -> Vec<Edge> {
        let mut edges = Vec::new();
        for (index, module) in self.modules.iter().enumerate() {
            let mut add = |line: usize, path: &[String], to: Option<&str>| {
                if let Some(to) = to.filter(|to| *to != module.file) {
                    let (from, to) = (module.file.clone(), to.to_owned());
                    edges.push(Edge { from, to, line, path: path.join("::") });
                }
            };
            for import in module.imports.iter().filter(|import| !import.is_reexport) {
                let whole = || {
                    self.module_at(index, &import.path)
                        .map(|module| self.modules[module].file.as_str())
                };
                let to = self.resolve(index, &import.path, 0);
                add(
                    import.line,
                    &import.path,
                    if import.name.is_none() { to.or_else(whole) } else { to },
                );
            }
            for (line, path) in &module.paths {
                add(*line, path, self.resolve(index, path, 0));
            }
        }
        edges
    }

    /// The file that defines the item to which `path` leads from a module; none if it leads to a module or out of the
    /// crate.
    fn resolve(&self, from: ModuleIndex, path: &[String], depth: usize) -> Option<&str> {
        let (mut module, rest) = self.start(from, path)?;
        for (at, name) in rest.iter().enumerate() {
            let this = &self.modules[module];
            let is_last = at + 1 == rest.len();
            match this.children.get(name) {
                Some(child) if !(is_last && this.items.contains(name)) => module = *child,
                _ if this.items.contains(name) => return Some(&this.file),
                _ if depth == IMPORT_DEPTH_MAX => return None,
                _ => return self.resolve_import(module, &rest[at..], depth),
            }
        }
        None
    }

    /// What the imports of a module make of `path`.
    fn resolve_import(&self, module: ModuleIndex, path: &[String], depth: usize) -> Option<&str> {
        let imports = &self.modules[module].imports;
        let named = imports.iter().filter(|import| import.name.as_ref() == Some(&path[0]));
        let found = named.map(|import| [&import.path, &path[1..]].concat()).find_map(|target| {
            let is_same = target == path;
            if is_same { None } else { self.resolve(module, &target, depth + 1) }
        });
        found.or_else(|| {
            imports
                .iter()
                .filter(|import| import.name.is_none())
                .find_map(|import| self.resolve(module, &[&import.path, path].concat(), depth + 1))
        })
    }

    /// The module to which `path` leads, by `mod` lines alone.
    fn module_at(&self, from: ModuleIndex, path: &[String]) -> Option<ModuleIndex> {
        let (module, rest) = self.start(from, path)?;
        rest.iter()
            .try_fold(module, |module, name| self.modules[module].children.get(name).copied())
    }

    /// Where a path begins, and what is left of it then.
    fn start<'a>(
        &self,
        from: ModuleIndex,
        path: &'a [String],
    ) -> Option<(ModuleIndex, &'a [String])> {
        let mut module = from;
        for (at, name) in path.iter().enumerate() {
            match name.as_str() {
                "crate" => module = 0,
                "self" => {}
                "super" => module = self.modules[module].parent?,
                _ => return Some((module, &path[at..])),
            }
        }
        Some((module, &[]))
    }
}

/// The name of the item whose keyword is at `at`.
fn item_name(code: &[Token], at: usize) -> Option<String> {
    const KEYWORDS: [&str; 8] =
        ["fn", "struct", "enum", "union", "trait", "type", "const", "static"];
    let mut name = at + 1;
    if code[at].is("macro_rules") {
        name += 1;
    } else if !KEYWORDS.iter().any(|keyword| code[at].is(keyword)) {
        return None;
    }
    if code.get(name)?.is("mut") {
        name += 1;
    }
    let token = code.get(name)?;
    let is_keyword =
        KEYWORDS.iter().chain(&["unsafe", "extern", "async"]).any(|keyword| token.is(keyword));
    (token.is_name() && !is_keyword).then(|| token.text.clone())
}

/// The path with at least two names that begins at `at`.
fn path_at(code: &[Token], at: usize) -> Option<Vec<String>> {
    let is_continued = at
        .checked_sub(1)
        .is_some_and(|before| code[before].is(":") && at >= 2 && code[at - 2].is(":"));
    if is_continued || !code[at].is_name() {
        return None;
    }
    let mut path = vec![code[at].text.clone()];
    let mut next = at + 1;
    while code.get(next).is_some_and(|token| token.is(":"))
        && code.get(next + 1).is_some_and(|token| token.is(":"))
    {
        let Some(name) = code.get(next + 2).filter(|token| token.is_name()) else { break };
        path.push(name.text.clone());
        next += 3;
    }
    (path.len() > 1).then_some(path)
}

fn closing(code: &[Token], open: usize) -> usize {
    let mut depth = 0;
    for (at, token) in code.iter().enumerate().skip(open) {
        if token::is_open(token) {
            depth += 1;
        } else if token::is_close(token) {
            depth -= 1;
            if depth == 0 {
                return at;
            }
        }
    }
    code.len() - 1
}

/// The tokens of a `use`, without `use` and `;`.
struct UseTree<'a> {
    code: &'a [Token],
    is_reexport: bool,
    at: usize,
}

impl UseTree<'_> {
    fn leaves(mut self) -> Vec<Import> {
        let mut imports = Vec::new();
        self.read(&[], &mut imports);
        imports
    }

    /// Reads one branch, whose path begins with `prefix`.
    fn read(&mut self, prefix: &[String], imports: &mut Vec<Import>) {
        let mut path = prefix.to_vec();
        let mut name = None;
        let mut line = 0;
        while let Some(token) = self.code.get(self.at) {
            line = token.line;
            self.at += 1;
            if token.is("{") {
                while self.code.get(self.at).is_some_and(|token| !token.is("}")) {
                    self.read(&path, imports);
                }
                self.at += 1;
                name = None;
                path.clear();
            } else if token.is("*") {
                imports.push(Import {
                    path: path.clone(),
                    name: None,
                    is_reexport: self.is_reexport,
                    line,
                });
                path.clear();
            } else if token.is("as") {
                name = self.code.get(self.at).map(|alias| alias.text.clone());
                self.at += 1;
            } else if token.is(",") {
                break;
            } else if token.is("}") {
                self.at -= 1;
                break;
            } else if token.is("self")
                && !path.is_empty()
                && !path.iter().all(|name| name == "super")
            {
                name = path.last().cloned();
            } else if token.is_name() {
                path.push(token.text.clone());
                name = Some(token.text.clone());
            }
        }
        if let (Some(name), false) = (name, path.is_empty()) {
            imports.push(Import { path, name: Some(name), is_reexport: self.is_reexport, line });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn edges(files: &[(&str, &str)]) -> Vec<(String, String, String)> {
        let files: Vec<SourceFile> = files
            .iter()
            .map(|(path, code)| SourceFile::code(&format!("src/{path}"), code))
            .collect();
        let by_path = files.iter().map(|file| (file.path.as_str(), file)).collect();
        let edges = Crate::read(&by_path, "src/lib.rs").edges();
        let short = |path: &str| path.trim_start_matches("src/").to_owned();
        edges.into_iter().map(|edge| (short(&edge.from), short(&edge.to), edge.path)).collect()
    }

    fn edge(from: &str, to: &str, path: &str) -> (String, String, String) {
        (from.to_owned(), to.to_owned(), path.to_owned())
    }

    #[test]
    fn imports_and_paths_are_edges_and_modules_and_reexports_are_not() {
        let files = [
            ("lib.rs", "mod a; mod b; pub use b::B; pub const C: u8 = 0;"),
            ("a.rs", "use crate::{C, b}; fn f(x: b::B) { info!(\"{}\", b::inner::D) }"),
            ("b/mod.rs", "pub mod inner; pub struct B;"),
            (
                "b/inner.rs",
                "use super::B as Other; use std::fmt; pub const D: u8 = 0; #[cfg(test)] use crate::C;",
            ),
        ];
        assert_eq!(
            edges(&files),
            [
                edge("a.rs", "lib.rs", "crate::C"),
                edge("a.rs", "b/mod.rs", "b::B"),
                edge("a.rs", "b/inner.rs", "b::inner::D"),
                edge("b/inner.rs", "b/mod.rs", "super::B"),
            ]
        );
    }

    #[test]
    fn reexports_globs_and_parts_of_files_lead_to_the_definition() {
        let files = [
            ("lib.rs", "mod a; mod b; mod c { pub fn f() { super::b::g() } }"),
            (
                "a.rs",
                "use crate::b::*; use crate::b::H; use crate::c::f; fn a() { self::b() } fn b() {}",
            ),
            ("b.rs", "mod y; pub use self::y::{H, self}; pub fn g() {}"),
            ("b/y.rs", "pub struct H; pub fn g() { super::g::<u8>() }"),
        ];
        assert_eq!(
            edges(&files),
            [
                edge("a.rs", "b.rs", "crate::b"),
                edge("a.rs", "b/y.rs", "crate::b::H"),
                edge("a.rs", "lib.rs", "crate::c::f"),
                edge("b/y.rs", "b.rs", "super::g"),
                edge("lib.rs", "b.rs", "super::b::g"),
            ]
        );
    }
}
