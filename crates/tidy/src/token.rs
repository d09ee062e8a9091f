//! Tokens of a file of code, with their lines.

use ra_ap_rustc_lexer::{DocStyle, LiteralKind, TokenKind, tokenize};

/// What the rules distinguish. Whitespace is left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// An identifier or a keyword.
    Name,
    /// A string literal.
    Text,
    Comment,
    /// `//!` or `/*! */`.
    InnerDoc,
    /// `///` or `/** */`.
    OuterDoc,
    /// A single punctuation character, a number, a lifetime.
    Other,
}

/// A token, with the line at which it begins.
#[derive(Debug, Clone)]
pub(crate) struct Token {
    pub(crate) kind: Kind,
    pub(crate) text: String,
    pub(crate) line: usize,
}

impl Token {
    /// Whether this is the name or the punctuation `text`.
    pub(crate) fn is(&self, text: &str) -> bool {
        matches!(self.kind, Kind::Name | Kind::Other) && self.text == text
    }

    pub(crate) fn is_name(&self) -> bool {
        self.kind == Kind::Name
    }
}

/// Splits `text` into tokens.
pub(crate) fn read(text: &str) -> Vec<Token> {
    let mut tokens = Vec::new();
    let (mut offset, mut line) = (0, 1);
    for token in tokenize(text, ra_ap_rustc_lexer::FrontmatterAllowed::No) {
        let length = usize::try_from(token.len).expect("a file of code is shorter than 4 GiB");
        let piece = &text[offset..offset + length];
        if let Some(kind) = kind(token.kind) {
            tokens.push(Token { kind, text: piece.to_owned(), line });
        }
        line += piece.matches('\n').count();
        offset += length;
    }
    tokens
}

fn kind(kind: TokenKind) -> Option<Kind> {
    Some(match kind {
        TokenKind::Whitespace => return None,
        TokenKind::LineComment { doc_style } | TokenKind::BlockComment { doc_style, .. } => {
            match doc_style {
                None => Kind::Comment,
                Some(DocStyle::Inner) => Kind::InnerDoc,
                Some(DocStyle::Outer) => Kind::OuterDoc,
            }
        }
        TokenKind::Ident | TokenKind::RawIdent => Kind::Name,
        TokenKind::Literal {
            kind: LiteralKind::Str { .. } | LiteralKind::RawStr { .. }, ..
        } => Kind::Text,
        _ => Kind::Other,
    })
}

/// The tokens that the product is built from: no comments, and no item under `#[cfg(test)]`.
pub(crate) fn of_product(tokens: &[Token]) -> Vec<Token> {
    let mut product = without_tests(tokens);
    product.retain(|token| !is_doc(token));
    product
}

/// Without plain comments, and without the items under `#[cfg(test)]`; docs stay.
pub(crate) fn without_tests(tokens: &[Token]) -> Vec<Token> {
    let code: Vec<&Token> = tokens.iter().filter(|token| token.kind != Kind::Comment).collect();
    let mut product = Vec::new();
    let mut at = 0;
    while at < code.len() {
        match attribute_end(&code, at) {
            Some(end) if is_test(&code[at..end]) => at = item_end(&code, end),
            Some(end) => {
                product.extend(code[at..end].iter().map(|token| (*token).clone()));
                at = end;
            }
            None => {
                product.push(code[at].clone());
                at += 1;
            }
        }
    }
    product
}

fn is_doc(token: &Token) -> bool {
    matches!(token.kind, Kind::InnerDoc | Kind::OuterDoc)
}

/// The index after the attribute that begins at `at`.
pub(crate) fn attribute_end(code: &[&Token], at: usize) -> Option<usize> {
    let open = match (code.get(at)?.is("#"), code.get(at + 1)?.is("!")) {
        (true, false) => at + 1,
        (true, true) => at + 2,
        _ => return None,
    };
    code.get(open)?.is("[").then(|| closing(code, open) + 1)
}

fn is_test(attribute: &[&Token]) -> bool {
    let has = |name: &str| attribute.iter().any(|token| token.is(name));
    has("cfg") && has("test") && !has("not")
}

/// The index of the bracket that closes the one at `open`, or the last index.
fn closing(code: &[&Token], open: usize) -> usize {
    let mut depth = 0;
    for (at, token) in code.iter().enumerate().skip(open) {
        if is_open(token) {
            depth += 1;
        } else if is_close(token) {
            depth -= 1;
            if depth == 0 {
                return at;
            }
        }
    }
    code.len() - 1
}

/// The index after the item, the field or the statement that begins at `at`.
fn item_end(code: &[&Token], mut at: usize) -> usize {
    loop {
        at = match attribute_end(code, at) {
            Some(end) => end,
            None if code.get(at).is_some_and(|token| is_doc(token)) => at + 1,
            None => break,
        };
    }
    let is_use = code.get(at).is_some_and(|token| token.is("use"));
    while let Some(token) = code.get(at) {
        if token.is(";") || token.is(",") {
            return at + 1;
        }
        if is_close(token) {
            return at;
        }
        let end = if is_open(token) { closing(code, at) } else { at };
        if token.is("{") && !is_use {
            return end + 1;
        }
        at = end + 1;
    }
    at
}

pub(crate) fn is_open(token: &Token) -> bool {
    token.is("{") || token.is("(") || token.is("[")
}

pub(crate) fn is_close(token: &Token) -> bool {
    token.is("}") || token.is(")") || token.is("]")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_and_kinds_are_those_of_the_text() {
        let tokens = read("//! Head.\n\n/// Doc.\nfn a() { \"text\n//no\" } // why\n");
        let kinds: Vec<(Kind, usize)> = tokens
            .iter()
            .filter(|token| token.kind != Kind::Other)
            .map(|token| (token.kind, token.line))
            .collect();
        assert_eq!(
            kinds,
            [
                (Kind::InnerDoc, 1),
                (Kind::OuterDoc, 3),
                (Kind::Name, 4),
                (Kind::Name, 4),
                (Kind::Text, 4),
                (Kind::Comment, 5),
            ]
        );
    }

    #[test]
    fn tests_are_left_out() {
        let code = "#[cfg(test)] use a::{b, c}; #[cfg(test)] mod t { fn d() {} } #[cfg(not(test))] fn e() {}
            struct F { #[cfg(test)] g: Vec<u8>, h: u8 } #[cfg(all(test, unix))] #[allow(x)] fn i(j: [u8; 4]) { k(); } fn l() {}";
        let names: Vec<String> = of_product(&read(code))
            .into_iter()
            .filter(Token::is_name)
            .map(|token| token.text)
            .collect();
        assert_eq!(names, ["cfg", "not", "test", "fn", "e", "struct", "F", "h", "u8", "fn", "l"]);
    }
}
