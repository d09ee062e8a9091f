//! Which crate may use which: the declared order, against the manifests.
//!
//! ```text
//! protocol  qemu  nbd  faults  documents
//!     └──┬────┴────┴─────┴─────────┘
//!   plane  auth ──► http
//!       └──┬─────────┘
//!        host ──► migration ──► agent          cli: protocol, auth, http          lab: protocol, http, faults
//! ```

use crate::finding::Finding;
use crate::source::Tree;

/// Each crate with those that it may use. A crate that is not named here may use none, and none may use it.
const ARROWS: [(&str, &[&str]); 15] = [
    ("protocol", &[]),
    ("qemu", &[]),
    ("nbd", &[]),
    ("faults", &[]),
    ("documents", &[]),
    ("workload", &[]),
    ("tidy", &[]),
    ("auth", &["protocol"]),
    ("plane", &["protocol", "qemu", "nbd"]),
    ("http", &["protocol", "auth"]),
    ("host", &["protocol", "qemu", "nbd", "auth", "plane", "faults"]),
    ("migration", &["protocol", "qemu", "nbd", "auth", "plane", "http", "host", "faults"]),
    (
        "agent",
        &[
            "protocol",
            "qemu",
            "nbd",
            "auth",
            "plane",
            "http",
            "host",
            "migration",
            "faults",
            "documents",
        ],
    ),
    ("cli", &["protocol", "auth", "http", "documents"]),
    ("lab", &["protocol", "http", "faults"]),
];

/// Checks the manifests of all crates. Tests may use what they like.
pub fn check(tree: &Tree, findings: &mut Vec<Finding>) {
    for document in &tree.documents {
        let parts: Vec<&str> = document.path.split('/').collect();
        if let ["crates", name, "Cargo.toml"] = parts[..] {
            findings.extend(arrows(name, &document.path, &document.text));
        }
    }
}

fn arrows(name: &str, path: &str, manifest: &str) -> Vec<Finding> {
    let allowed = ARROWS
        .iter()
        .find(|(crate_name, _)| *crate_name == name)
        .map_or(&[][..], |(_, allowed)| allowed);
    let mut findings = Vec::new();
    let mut section = "";
    for (index, line) in manifest.lines().enumerate() {
        if line.starts_with('[') {
            section = line.trim();
        }
        let used = line.strip_prefix("limosa-").and_then(|rest| rest.split(['.', ' ', '=']).next());
        if let Some(used) =
            used.filter(|used| section == "[dependencies]" && !allowed.contains(used))
        {
            findings.push(Finding {
                path: path.to_owned(),
                line: index + 1,
                rule: "arrow".to_owned(),
                amount: 1,
                message: format!(
                    "`{name}` may not use `{used}`: turn the arrow, or decide on it (`tidy/src/arrows.rs`, ARCHITECTURE.md)"
                ),
            });
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_declared_arrows_pass() {
        let manifest = "[package]\nname = \"limosa-auth\"\n[dependencies]\nlimosa-protocol.workspace = true\nlimosa-agent = \
                        { path = \"..\" }\n[dev-dependencies]\nlimosa-lab.workspace = true\n";
        let lines = |name: &str| {
            arrows(name, "", manifest).into_iter().map(|finding| finding.line).collect::<Vec<_>>()
        };
        assert_eq!(lines("auth"), [5]);
        assert_eq!(lines("unknown"), [4, 5]);
    }

    #[test]
    fn the_declared_order_has_no_circle() {
        for (at, (_, used)) in ARROWS.iter().enumerate() {
            for used in *used {
                assert!(
                    ARROWS[..at].iter().any(|(earlier, _)| earlier == used),
                    "{used} is declared after its user"
                );
            }
        }
    }
}
