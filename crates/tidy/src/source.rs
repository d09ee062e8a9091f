//! The files that are checked.

use std::fs;
use std::path::Path;

use crate::token::{self, Token};

/// Folders below the root with files of code or documents. Others (`target`, `.git`, `.lab`) are not ours.
const FOLDERS: [&str; 7] = [".", ".ci", "crates", "docs", "fuzz", "packaging", "scripts"];

/// A file of code, or a document: any other text that people read.
#[derive(Debug)]
pub struct SourceFile {
    /// Relative to the root of the repository, with `/`.
    pub path: String,
    pub text: String,
    /// Empty in a document.
    pub(crate) tokens: Vec<Token>,
}

impl SourceFile {
    /// A file of code with this text.
    pub fn code(path: &str, text: &str) -> SourceFile {
        SourceFile { path: path.to_owned(), text: text.to_owned(), tokens: token::read(text) }
    }

    /// A document with this text.
    pub fn document(path: &str, text: &str) -> SourceFile {
        SourceFile { path: path.to_owned(), text: text.to_owned(), tokens: Vec::new() }
    }
}

/// All that is checked, sorted by path.
#[derive(Debug, Default)]
pub struct Tree {
    pub code: Vec<SourceFile>,
    pub documents: Vec<SourceFile>,
}

impl Tree {
    /// Reads the repository at `root`.
    ///
    /// # Panics
    ///
    /// If a folder or file cannot be read.
    pub fn read(root: &Path) -> Tree {
        let mut tree = Tree::default();
        for folder in FOLDERS {
            tree.add(root, folder);
        }
        tree.code.sort_by(|a, b| a.path.cmp(&b.path));
        tree.documents.sort_by(|a, b| a.path.cmp(&b.path));
        tree
    }

    fn add(&mut self, root: &Path, folder: &str) {
        let entries =
            fs::read_dir(root.join(folder)).unwrap_or_else(|error| panic!("{folder}: {error}"));
        for entry in entries {
            let entry = entry.unwrap_or_else(|error| panic!("{folder}: {error}"));
            let name = entry
                .file_name()
                .into_string()
                .unwrap_or_else(|name| panic!("{}: no UTF-8", name.display()));
            let path = if folder == "." { name } else { format!("{folder}/{name}") };
            let kind = entry.file_type().unwrap_or_else(|error| panic!("{path}: {error}"));
            if kind.is_dir() && folder != "." && !is_foreign(&path) {
                self.add(root, &path);
            } else if kind.is_file() {
                self.add_file(root, &path);
            }
        }
    }

    fn add_file(&mut self, root: &Path, path: &str) {
        let text = || {
            fs::read_to_string(root.join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
        };
        if path.ends_with(".rs") {
            self.code.push(SourceFile::code(path, &text()));
        } else if is_document(path) {
            self.documents.push(SourceFile::document(path, &text()));
        }
    }
}

/// Seeds of the fuzzer and results of a build.
fn is_foreign(path: &str) -> bool {
    path == "fuzz/corpus" || path.ends_with("/target")
}

fn is_document(path: &str) -> bool {
    let is_of_tidy = path == "crates/tidy/exceptions.txt";
    let has_known_end = [".md", ".toml", ".service", ".txt", ".sh", "Makefile"]
        .iter()
        .any(|end| path.ends_with(end));
    let is_script = path.starts_with("scripts/") || path.starts_with(".ci/");
    !is_of_tidy && path != "deny.toml" && (has_known_end || is_script)
}
