//! What is accepted although a rule refuses it: a list that only shrinks.
//!
//! A line is `PATH RULE AMOUNT`; the amount is the greatest that is accepted.

use std::collections::BTreeMap;
use std::fmt::Write;

use crate::finding::Finding;

/// Of one file and one rule.
type Key = (String, String);

/// The amounts that are accepted, or found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Amounts(BTreeMap<Key, usize>);

impl Amounts {
    /// Reads a list.
    ///
    /// # Errors
    ///
    /// The line that is no exception.
    pub fn read(text: &str) -> Result<Amounts, String> {
        let lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
        let amounts =
            lines.map(|line| parse(line).ok_or_else(|| format!("no `PATH RULE AMOUNT`: {line}")));
        Ok(Amounts(amounts.collect::<Result<_, _>>()?))
    }

    /// The sums of what was found.
    pub fn of(findings: &[Finding]) -> Amounts {
        let mut amounts = BTreeMap::new();
        for finding in findings {
            *amounts.entry((finding.path.clone(), finding.rule.clone())).or_default() +=
                finding.amount;
        }
        Amounts(amounts)
    }

    /// As a list, sorted.
    pub fn write(&self) -> String {
        let mut text = String::from(
            "# What the tidy test accepts: `PATH RULE AMOUNT`, sorted. The list only shrinks; after files moved,\n\
             # `TIDY_WRITE=1 cargo test -p limosa-tidy` writes it anew.\n",
        );
        for ((path, rule), amount) in &self.0 {
            writeln!(text, "{path} {rule} {amount}").expect("a string takes all text");
        }
        text
    }

    /// Of these amounts, those that are greater than `accepted` allows.
    pub fn beyond(&self, accepted: &Amounts) -> Vec<(&str, &str)> {
        self.0
            .iter()
            .filter(|(key, amount)| **amount > accepted.0.get(*key).copied().unwrap_or(0))
            .map(|((path, rule), _)| (path.as_str(), rule.as_str()))
            .collect()
    }

    /// The rules whose amounts over all files are greater here than in `other`.
    pub fn grown_rules(&self, other: &Amounts) -> Vec<String> {
        let (new, old) = (self.by_rule(), other.by_rule());
        new.into_iter()
            .filter(|(rule, amount)| *amount > old.get(rule).copied().unwrap_or(0))
            .map(|(rule, _)| rule)
            .collect()
    }

    fn by_rule(&self) -> BTreeMap<String, usize> {
        let mut sums = BTreeMap::new();
        for ((_, rule), amount) in &self.0 {
            *sums.entry(rule.clone()).or_default() += amount;
        }
        sums
    }
}

fn parse(line: &str) -> Option<(Key, usize)> {
    let mut parts = line.split(' ');
    let key = (parts.next()?.to_owned(), parts.next()?.to_owned());
    let amount = parts.next()?.parse().ok()?;
    parts.next().is_none().then_some((key, amount))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(text: &str) -> Amounts {
        Amounts::read(text).expect("the list is well-formed")
    }

    #[test]
    fn lists_are_read_as_they_are_written() {
        let amounts = list("# comment\nb.rs length 3\n\na.rs name:hear 2\n");
        assert!(amounts.write().ends_with("a.rs name:hear 2\nb.rs length 3\n"));
        assert_eq!(list(&amounts.write()), amounts);
        assert!(Amounts::read("a.rs length").is_err());
        assert!(Amounts::read("a.rs length 3 4").is_err());
    }

    #[test]
    fn more_than_is_accepted_is_found() {
        let accepted = list("a length 3\nb length 3\nd length 1");
        let found = list("a length 3\nb length 4\nc length 1");
        assert_eq!(found.beyond(&accepted), [("b", "length"), ("c", "length")]);
        assert_eq!(accepted.beyond(&found), [("d", "length")]);
    }

    #[test]
    fn amounts_may_move_but_not_grow() {
        let old = list("a length 3\nb length 3\nb head 1");
        assert_eq!(list("c length 6").grown_rules(&old), [""; 0]);
        assert_eq!(list("c length 7\nc head 1").grown_rules(&old), ["length"]);
    }
}
