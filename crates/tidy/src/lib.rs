//! Checks of the source tree that no compiler does.
//!
//! | rule | refuses | module |
//! |---|---|---|
//! | `name:WORD` | a banned word as a segment of an identifier | [`vocabulary`] |
//! | `text:WORD` | a banned word in a comment, a string or a document | [`vocabulary`] |
//! | `length` | files over 500 lines | [`shape`] |
//! | `functions` | functions over 70 lines, signature to closing brace | [`shape`] |
//! | `head` | files of code without a `//!` head | [`shape`] |
//! | `docs` | public types, functions and traits of libraries without a doc comment | [`shape`] |
//! | `circle` | imports between the files of a crate that lead back to the importer | [`circles`] |
//! | `arrow` | a crate that uses a crate which it may not use | [`arrows`] |
//!
//! The one test, `tests/tidy.rs`, compares the findings with `exceptions.txt`. An exception is a file, a rule and the
//! greatest amount that is accepted; its list only shrinks.
//!
//! Code is read as the tokens of rustc's own lexer, not as a syntax tree: comments are needed, and paths inside of macro
//! calls count.

pub mod arrows;
pub mod circles;
pub mod exceptions;
mod finding;
mod modules;
pub mod shape;
mod source;
mod token;
pub mod vocabulary;

use std::path::Path;

pub use finding::Finding;
pub use source::{SourceFile, Tree};

/// All findings in the repository at `root`.
///
/// # Panics
///
/// If the repository cannot be read.
pub fn check(root: &Path) -> Vec<Finding> {
    let tree = Tree::read(root);
    let mut findings = Vec::new();
    for file in &tree.code {
        vocabulary::check_code(file, &mut findings);
        shape::check(file, &mut findings);
    }
    for document in &tree.documents {
        vocabulary::check_document(document, &mut findings);
    }
    circles::check(&tree, &mut findings);
    arrows::check(&tree, &mut findings);
    findings
}
