//! How the command ends, and what it says when it fails.
//!
//! | code | meaning |
//! |-----:|---------|
//! | 0 | done; a VM was moved; whoever read our output had enough of it |
//! | 1 | failed, or refused: nothing was moved |
//! | 2 | the command line is wrong |
//! | 3 | the VM stayed at its source |
//! | 4 | in doubt: both copies are stopped until the hosts have settled it |
//! | 130 | left by Ctrl-C; the migration goes on |

use std::process::ExitCode;

use limosa_protocol::api;
use limosa_protocol::migration::{Outcome, Problem};
use serde_json::json;

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

/// Tells of a failure: in words on stderr, and with `json` on stdout too.
pub(crate) fn failed(error: &anyhow::Error, json: bool) -> ExitCode {
    let refused = error.downcast_ref::<Refused>();
    let printed = match refused {
        _ if !json => Ok(()),
        Some(Refused(failure)) => show::json(failure),
        // The agent never said a word, so the code is none of its own.
        None => show::json(&json!({ "code": "no-answer", "message": format!("{error:#}") })),
    };
    match refused {
        Some(Refused(failure)) => tell(failure),
        None => show::note(&format!("limosa: {error:#}")),
    }
    if let Err(error) = printed {
        show::note(&format!("limosa: {error:#}"));
    }
    Exit::Failed.into()
}

fn tell(failure: &api::Failure) {
    show::note(&format!("limosa: {}", failure.message));
    for problem in &failure.problems {
        show::note(&problem_text(problem));
    }
}

/// A problem and its mend, in two lines.
pub(crate) fn problem_text(problem: &Problem) -> String {
    format!("  - {}\n    mend: {}", problem.message, problem.mend)
}
