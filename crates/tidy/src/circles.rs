//! Circles of imports between the files of a crate.
//!
//! An edge is a `use` of an item, or a path to it, that another file of the crate defines. `mod` lines and re-exports do
//! not count; a child's `super::Item` does; `#[cfg(test)]` is left out. A file may import another unless edges lead back
//! from there: then neither can be read, tested or moved without the other.
//!
//! The lab and its guest's program are left out: they are programs of tests, which nothing builds on.

use std::collections::{BTreeMap, BTreeSet};

use crate::finding::Finding;
use crate::modules::{Crate, Edge};
use crate::source::{SourceFile, Tree};

/// Checks all crates but those of the lab.
pub fn check(tree: &Tree, findings: &mut Vec<Finding>) {
    let files: BTreeMap<&str, &SourceFile> =
        tree.code.iter().map(|file| (file.path.as_str(), file)).collect();
    let is_root = |path: &str| {
        let parts: Vec<&str> = path.split('/').collect();
        matches!(parts[..], ["crates", name, "src", "lib.rs" | "main.rs"] if !["lab", "workload"].contains(&name))
    };
    for root in files.keys().filter(|path| is_root(path)) {
        findings.extend(circles(&Crate::read(&files, root).edges()));
    }
}

/// The edges that lie on a circle, one for each pair of files.
fn circles(edges: &[Edge]) -> Vec<Finding> {
    let mut targets: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for edge in edges {
        targets.entry(&edge.from).or_default().insert(&edge.to);
    }
    let mut seen = BTreeSet::new();
    let mut findings = Vec::new();
    for edge in edges {
        if seen.insert((&edge.from, &edge.to)) && leads(&targets, &edge.to, &edge.from) {
            findings.push(Finding {
                path: edge.from.clone(),
                line: edge.line,
                rule: "circle".to_owned(),
                amount: 1,
                message: format!("`{}` is in {}, which leads back here", edge.path, edge.to),
            });
        }
    }
    findings
}

/// Whether edges lead from `from` to `to`.
fn leads(targets: &BTreeMap<&str, BTreeSet<&str>>, from: &str, to: &str) -> bool {
    let mut reached = BTreeSet::from([from]);
    let mut open = vec![from];
    while let Some(file) = open.pop() {
        if file == to {
            return true;
        }
        open.extend(targets.get(file).into_iter().flatten().filter(|next| reached.insert(**next)));
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn edge(from: &str, to: &str) -> Edge {
        Edge { from: from.to_owned(), to: to.to_owned(), line: 1, path: format!("{from} to {to}") }
    }

    #[test]
    fn only_edges_that_lead_back_are_found() {
        let edges = [
            edge("a", "b"),
            edge("b", "c"),
            edge("c", "a"),
            edge("c", "d"),
            edge("e", "a"),
            edge("a", "b"),
        ];
        let found: Vec<String> =
            circles(&edges).into_iter().map(|finding| finding.message).collect();
        assert_eq!(
            found,
            [
                "`a to b` is in b, which leads back here",
                "`b to c` is in c, which leads back here",
                "`c to a` is in a, which leads back here",
            ]
        );
    }
}
