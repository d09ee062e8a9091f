//! Sizes of files and functions, heads of modules, docs of public items.

use crate::finding::Finding;
use crate::source::SourceFile;
use crate::token::{self, Kind, Token};

/// The lines of a file of code, at most.
pub const FILE_LINES_MAX: usize = 500;

/// The lines of a function, from its signature to its closing brace, at most.
pub const FUNCTION_LINES_MAX: usize = 70;

/// Checks a file of code.
pub fn check(file: &SourceFile, findings: &mut Vec<Finding>) {
    let mut find = |rule: &str, line: usize, amount: usize, message: String| {
        findings.push(Finding {
            path: file.path.clone(),
            line,
            rule: rule.to_owned(),
            amount,
            message,
        });
    };
    let lines = file.text.lines().count();
    if lines > FILE_LINES_MAX {
        let message = format!("{lines} lines, {FILE_LINES_MAX} are allowed: split it by idea");
        find("length", 1, lines - FILE_LINES_MAX, message);
    }
    for function in functions(&file.tokens) {
        if function.lines > FUNCTION_LINES_MAX {
            let message = format!(
                "`{}` has {} lines, {FUNCTION_LINES_MAX} are allowed: split it by idea",
                function.name, function.lines
            );
            find("functions", function.line, function.lines - FUNCTION_LINES_MAX, message);
        }
    }
    if !file
        .tokens
        .iter()
        .find(|token| token.kind != Kind::Comment)
        .is_some_and(|token| token.kind == Kind::InnerDoc)
    {
        find(
            "head",
            1,
            1,
            "begin it with `//!`: what it is, a picture where something flows, its invariants"
                .to_owned(),
        );
    }
    if is_of_library(&file.path) {
        for item in undocumented(&file.tokens) {
            find("docs", item.line, 1, format!("`{}` is public and has no doc comment", item.text));
        }
    }
}

struct Function {
    name: String,
    line: usize,
    lines: usize,
}

/// All functions with a body, also those inside of others.
fn functions(tokens: &[Token]) -> Vec<Function> {
    let mut functions = Vec::new();
    for (at, token) in tokens.iter().enumerate() {
        let Some(name) = tokens.get(at + 1).filter(|next| token.is("fn") && next.is_name()) else {
            continue;
        };
        if let Some(end) = body_end(tokens, at) {
            functions.push(Function {
                name: name.text.clone(),
                line: token.line,
                lines: end.line - token.line + 1,
            });
        }
    }
    functions
}

/// The brace that closes the body of the function whose `fn` is at `at`; none if it has no body.
fn body_end(tokens: &[Token], at: usize) -> Option<&Token> {
    let mut depth = 0;
    let mut is_in_body = false;
    for token in &tokens[at..] {
        if depth == 0 && token.is(";") {
            return None;
        }
        if token::is_open(token) {
            is_in_body |= depth == 0 && token.is("{");
            depth += 1;
        } else if token::is_close(token) {
            depth -= 1;
            if depth == 0 && is_in_body {
                return Some(token);
            }
        }
    }
    None
}

/// A library's public items are read by those who use it from another crate.
fn is_of_library(path: &str) -> bool {
    let program = ["agent", "cli", "lab", "workload"]
        .iter()
        .any(|name| path.starts_with(&format!("crates/{name}/")));
    path.starts_with("crates/") && path.contains("/src/") && !program
}

/// The names of public types, functions and traits without a doc comment, and those of functions in public traits.
fn undocumented(tokens: &[Token]) -> Vec<Token> {
    let product = token::without_tests(tokens);
    let code: Vec<&Token> = product.iter().collect();
    let mut found = Vec::new();
    let mut reader = ItemReader::default();
    let mut at = 0;
    while at < code.len() {
        match token::attribute_end(&code, at) {
            Some(end) => at = end,
            None => {
                found.extend(reader.read(code[at], code.get(at + 1).copied()));
                at += 1;
            }
        }
    }
    found
}

/// Follows the tokens of a file: what has been read of the item that begins, and how deep it is.
#[derive(Default)]
struct ItemReader {
    is_documented: bool,
    is_public: bool,
    depth: usize,
    /// Of the public trait that is open: the depth of its functions.
    trait_depth: Option<usize>,
}

impl ItemReader {
    /// The name of the item if it should be documented and is not.
    fn read(&mut self, token: &Token, next: Option<&Token>) -> Option<Token> {
        let is_any = |names: &[&str]| names.iter().any(|name| token.is(name));
        if token.kind == Kind::OuterDoc {
            self.is_documented = true;
        } else if token.is("pub") {
            self.is_public = !next.is_some_and(|next| next.is("("));
        } else if is_any(&["unsafe", "async", "const", "extern"])
            && next.is_some_and(|next| !next.is("{"))
        {
            // A modifier: the keyword follows.
        } else if is_any(&["fn", "struct", "enum", "union", "trait", "type"]) {
            let counts = self.is_public || (token.is("fn") && self.trait_depth == Some(self.depth));
            let name = next.filter(|next| counts && !self.is_documented && next.is_name());
            if token.is("trait") && self.is_public {
                self.trait_depth = Some(self.depth + 1);
            }
            (self.is_documented, self.is_public) = (false, false);
            return name.cloned();
        } else {
            self.skip(token);
        }
        None
    }

    fn skip(&mut self, token: &Token) {
        (self.is_documented, self.is_public) = (false, false);
        if token::is_open(token) {
            self.depth += 1;
        } else if token::is_close(token) {
            self.depth = self.depth.saturating_sub(1);
            self.trait_depth = self.trait_depth.filter(|trait_depth| *trait_depth <= self.depth);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(path: &str, code: &str) -> Vec<(String, usize)> {
        let mut findings = Vec::new();
        check(&SourceFile::code(path, code), &mut findings);
        findings.into_iter().map(|finding| (finding.rule, finding.amount)).collect()
    }

    #[test]
    fn a_file_without_a_head_is_found() {
        assert_eq!(rules("a.rs", "// A comment.\nfn a() {}"), [("head".to_owned(), 1)]);
        assert_eq!(rules("a.rs", "// A comment.\n//! Head.\nfn a() {}"), []);
    }

    #[test]
    fn lines_of_files_and_functions_are_counted() {
        let body = "\n".repeat(FUNCTION_LINES_MAX);
        assert_eq!(
            rules("a.rs", &format!("//! Head.\nfn a(b: [u8; 2]) {{{body}}}")),
            [("functions".to_owned(), 1)]
        );
        assert_eq!(rules("a.rs", &format!("//! Head.\nfn a() {{{}}}", &body[1..])), []);
        let file = "\n".repeat(FILE_LINES_MAX + 2);
        assert_eq!(
            rules("a.rs", &format!("//! Head.{file}trait A {{ fn a(); }}")),
            [("length".to_owned(), 3)]
        );
    }

    #[test]
    fn public_items_of_libraries_are_documented() {
        let code =
            "//! Head.\npub struct A { pub a: u8 }\n/// B.\n#[derive(Debug)]\npub enum B { C }\n
            pub(crate) fn d() {} impl A { pub const fn e() {} } pub const F: u8 = 0;
            /// G.\npub trait G { fn h(); /// I.\n fn i() {} } impl G for A { fn h() {} }
            #[cfg(test)] mod tests { pub fn j() {} }";
        let names: Vec<String> =
            undocumented(&token::read(code)).into_iter().map(|name| name.text).collect();
        assert_eq!(names, ["A", "e", "h"]);
        assert_eq!(rules("crates/protocol/src/a.rs", code).len(), 3);
        assert_eq!(rules("crates/agent/src/a.rs", code), []);
    }
}
