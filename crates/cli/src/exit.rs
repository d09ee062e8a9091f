//! How the command ends, and what it says when it fails.
//!
//! | code | meaning |
//! |-----:|---------|
//! | 0 | done; a VM was moved; whoever read our output had enough of it |
//! | 1 | failed, or refused: nothing was moved |
//! | 2 | the command line is wrong |
//! | 3 | the VM stayed at its source |
//! | 4 | in doubt: this host's copy is stopped, and the other host may run it |
//! | 130 | left by Ctrl-C; the migration goes on |

use std::process::ExitCode;

use limosa_protocol::api;
use limosa_protocol::migration::{Outcome, Problem};
use serde_json::{Value, json};

use crate::client::Refused;
use crate::show;

/// How the command ended. Wrong usage (2) ends in clap, before there is one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    Done,
    Failed,
    Stayed,
    InDoubt,
    Left,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(match exit {
            Exit::Done => 0,
            Exit::Failed => 1,
            Exit::Stayed => 3,
            Exit::InDoubt => 4,
            Exit::Left => 130,
        })
    }
}

impl From<Outcome> for Exit {
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Moved => Self::Done,
            Outcome::Stayed => Self::Stayed,
            Outcome::InDoubt => Self::InDoubt,
        }
    }
}

/// Tells of a failure: in words on stderr, or with `json` as one object there, and
/// on stdout as the agent told it, which is the result.
pub(crate) fn failed(error: &anyhow::Error, json: bool) -> ExitCode {
    let refused = error.downcast_ref::<Refused>();
    let printed = match refused {
        _ if !json => Ok(()),
        Some(Refused(failure)) => show::json(failure),
        // The agent never said a word, so the code is none of its own.
        None => show::json(&json!({ "code": "no-answer", "message": format!("{error:#}") })),
    };
    match refused {
        _ if json => show::note(&object(error, refused).to_string()),
        Some(Refused(failure)) => print_failure(failure),
        None => show::note(&format!("limosa: {error:#}")),
    }
    if let Err(error) = printed {
        show::note(&json!({ "error": format!("{error:#}"), "next": null }).to_string());
    }
    Exit::Failed.into()
}

/// A failure as one line of JSON: what went wrong, the remedies when there are
/// problems that have some, and these problems.
fn object(error: &anyhow::Error, refused: Option<&Refused>) -> Value {
    let problems = refused.map_or(&[][..], |Refused(failure)| &failure.problems);
    let own = refused.and_then(|Refused(failure)| failure.remedy.as_deref());
    let of_problems = problems.iter().map(|problem| problem.remedy.as_str());
    let remedies: Vec<&str> = own.into_iter().chain(of_problems).collect();
    let next = (!remedies.is_empty()).then(|| remedies.join("; "));
    json!({ "error": format!("{error:#}"), "next": next, "problems": problems })
}

fn print_failure(failure: &api::Failure) {
    show::note(&format!("limosa: {}", failure.message));
    if let Some(remedy) = &failure.remedy {
        show::note(&format!("  remedy: {remedy}"));
    }
    for problem in &failure.problems {
        show::note(&problem_text(problem));
    }
}

/// A problem and its remedy, in two lines.
pub(crate) fn problem_text(problem: &Problem) -> String {
    format!("  - {}\n    remedy: {}", problem.message, problem.remedy)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: a script reads what failed, each problem, and what to do from one line.
    #[test]
    fn a_failure_is_one_object() {
        let failure = serde_json::from_value(json!({
            "code": "problems",
            "message": "web1 cannot move",
            "problems": [
                { "code": "not-paired", "message": "not paired", "remedy": "pair" },
                { "code": "no-space", "message": "no space", "remedy": "free some" },
            ],
        }));
        let error = anyhow::Error::from(Refused(failure.unwrap()));
        let told = object(&error, error.downcast_ref());
        assert_eq!(told["error"], "web1 cannot move");
        assert_eq!(told["next"], "pair; free some");
        assert_eq!(told["problems"][1]["code"], "no-space");
        assert!(!told.to_string().contains('\n'));

        let told = object(&anyhow::anyhow!("no agent").context("asking"), None);
        assert_eq!(told, json!({ "error": "asking: no agent", "next": null, "problems": [] }));
    }
}
