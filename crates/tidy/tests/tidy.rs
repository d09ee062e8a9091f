//! The source tree keeps the rules that `limosa_tidy` lists, but for what `exceptions.txt` accepts.
//!
//! `TIDY_WRITE=1` writes that list anew, `TIDY_STRICT=1` also refuses exceptions that are not needed any more.

use std::env;
use std::fs;
use std::path::Path;

use limosa_tidy::Finding;
use limosa_tidy::exceptions::Amounts;

#[test]
fn the_tree_is_tidy() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let list = root.join("crates/tidy/exceptions.txt");
    let findings = limosa_tidy::check(&root);
    let found = Amounts::of(&findings);
    let accepted = Amounts::read(&fs::read_to_string(&list).expect("exceptions.txt can be read"))
        .expect("exceptions.txt is well-formed");
    if env::var_os("TIDY_WRITE").is_some() {
        return write(&list, &found, &accepted);
    }
    let mut text = String::new();
    for (path, rule) in found.beyond(&accepted) {
        for finding in
            findings.iter().filter(|finding| finding.path == path && finding.rule == rule)
        {
            text.push_str(&line(finding));
        }
    }
    assert!(
        text.is_empty(),
        "not tidy (correct it; if only files moved, TIDY_WRITE=1 writes the list anew):\n{text}"
    );
    let stale = accepted.beyond(&found);
    let is_strict = env::var_os("TIDY_STRICT").is_some();
    assert!(
        !is_strict || stale.is_empty(),
        "exceptions.txt accepts more than there is (TIDY_WRITE=1 shrinks it): {stale:?}"
    );
}

fn line(finding: &Finding) -> String {
    format!("{}:{}: {}: {}\n", finding.path, finding.line, finding.rule, finding.message)
}

/// Files move, so entries may appear; what all files have together may not become more.
fn write(list: &Path, found: &Amounts, accepted: &Amounts) {
    let grown = found.grown_rules(accepted);
    assert!(
        grown.is_empty(),
        "there is more of this than exceptions.txt accepts in all: {grown:?}"
    );
    fs::write(list, found.write()).expect("exceptions.txt can be written");
}
