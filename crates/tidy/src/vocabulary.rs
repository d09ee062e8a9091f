//! Words that are not used, because the field has another; see `docs/vocabulary.md`.

use crate::finding::Finding;
use crate::source::SourceFile;
use crate::token::Kind;

/// As a segment of an identifier: of `snake_case` or of `CamelCase`.
const IN_NAMES: [Banned; 12] = [
    Banned { word: "mend", forms: &["mend", "mends"], instead: "remedy" },
    Banned { word: "hand", forms: &["hand", "hands"], instead: "driver, handover" },
    Banned { word: "word", forms: &["word", "words"], instead: "message, status" },
    Banned { word: "again", forms: &["again"], instead: "retry, resume" },
    Banned { word: "tell", forms: &["tell", "tells"], instead: "report, notify, send" },
    Banned { word: "hear", forms: &["hear", "hears"], instead: "receive" },
    Banned { word: "halt", forms: &["halt", "halts", "halted"], instead: "shutdown, cancel" },
    Banned { word: "stand", forms: &["stand"], instead: "status, is_paused" },
    Banned { word: "stands", forms: &["stands"], instead: "is_paused" },
    Banned { word: "story", forms: &["story", "stories"], instead: "scenario" },
    Banned { word: "outlet", forms: &["outlet", "outlets"], instead: "sender, writer" },
    Banned { word: "dealer", forms: &["dealer", "dealers"], instead: "dispatcher" },
];

/// In comments, strings and documents.
const IN_TEXTS: [Banned; 4] = [
    Banned { word: "mend", forms: &["mend", "mends"], instead: "remedy" },
    Banned { word: "story", forms: &["story", "stories"], instead: "scenario" },
    Banned { word: "hand-over", forms: &["hand-over", "hand-overs"], instead: "handover" },
    Banned { word: "stands", forms: &["guest stands"], instead: "the guest is paused" },
];

/// This list itself.
const LIST: &str = "crates/tidy/src/vocabulary.rs";

struct Banned {
    /// Part of the rule's name.
    word: &'static str,
    forms: &'static [&'static str],
    instead: &'static str,
}

/// Checks names, comments and strings of a file of code.
pub fn check_code(file: &SourceFile, findings: &mut Vec<Finding>) {
    if file.path == LIST {
        return;
    }
    for token in &file.tokens {
        match token.kind {
            Kind::Name => check_name(file, token.line, &token.text, findings),
            Kind::Other => {}
            Kind::Text | Kind::Comment | Kind::InnerDoc | Kind::OuterDoc => {
                check_text(file, token.line, &token.text, findings);
            }
        }
    }
}

/// Checks a text that is no code.
pub fn check_document(file: &SourceFile, findings: &mut Vec<Finding>) {
    check_text(file, 1, &file.text, findings);
}

fn check_name(file: &SourceFile, line: usize, name: &str, findings: &mut Vec<Finding>) {
    for segment in segments(name) {
        for banned in IN_NAMES.iter().filter(|banned| banned.forms.contains(&segment.as_str())) {
            findings.push(Finding {
                path: file.path.clone(),
                line,
                rule: format!("name:{}", banned.word),
                amount: 1,
                message: format!("`{name}`: say {}", banned.instead),
            });
        }
    }
}

fn check_text(file: &SourceFile, first_line: usize, text: &str, findings: &mut Vec<Finding>) {
    for (index, line) in text.lines().enumerate() {
        let line_lower = line.to_lowercase();
        for banned in &IN_TEXTS {
            for form in banned.forms {
                for _ in 0..occurrences(&line_lower, form) {
                    findings.push(Finding {
                        path: file.path.clone(),
                        line: first_line + index,
                        rule: format!("text:{}", banned.word),
                        amount: 1,
                        message: format!("\"{form}\": say {}", banned.instead),
                    });
                }
            }
        }
    }
}

/// The parts of a name in lower case: `_` and a capital after a small letter or a digit part them.
fn segments(name: &str) -> Vec<String> {
    let mut segments = vec![String::new()];
    let mut after_small = false;
    for letter in name.chars() {
        if letter == '_' || (letter.is_uppercase() && after_small) {
            segments.push(String::new());
        }
        if letter != '_' {
            segments.last_mut().expect("there is a first segment").extend(letter.to_lowercase());
        }
        after_small = !letter.is_uppercase();
    }
    segments.retain(|segment| !segment.is_empty());
    segments
}

/// How often `word` is in `text` as a whole word.
fn occurrences(text: &str, word: &str) -> usize {
    let is_apart =
        |neighbour: Option<char>| neighbour.is_none_or(|letter| !letter.is_alphanumeric());
    text.match_indices(word)
        .filter(|(at, _)| {
            is_apart(text[..*at].chars().next_back())
                && is_apart(text[at + word.len()..].chars().next())
        })
        .count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(code: &str) -> Vec<String> {
        let mut findings = Vec::new();
        check_code(&SourceFile::code("a.rs", code), &mut findings);
        findings.into_iter().map(|finding| finding.rule).collect()
    }

    #[test]
    fn a_banned_word_is_found_as_a_segment_of_a_name() {
        assert_eq!(rules("fn pairing_mend() {}"), ["name:mend"]);
        assert_eq!(rules("struct SourceHand;"), ["name:hand"]);
        assert_eq!(rules("const STORIES: u8 = 0;"), ["name:story"]);
        assert_eq!(rules("let hand_over = 1;"), ["name:hand"]);
    }

    #[test]
    fn a_part_of_a_segment_is_no_word() {
        assert_eq!(
            rules("fn handover(handle: Handle, intellect: u8, history: Standing) {}"),
            [""; 0]
        );
    }

    #[test]
    fn texts_are_read_in_comments_and_strings() {
        assert_eq!(
            rules("// The hand-over.\nlet a = \"no mend; amend\"; /// While the guest stands."),
            ["text:hand-over", "text:mend", "text:stands"]
        );
    }
}
