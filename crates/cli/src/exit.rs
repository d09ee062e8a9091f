//! How the command ends.
//!
//! | code | meaning |
//! |-----:|---------|
//! | 0 | done; a VM was moved |
//! | 1 | failed |
//! | 2 | the command line is wrong |
//! | 3 | the VM stayed at its source |
//! | 4 | in doubt: both copies are stopped until the hosts have settled it |

use std::process::ExitCode;

use limosa_protocol::api;
use limosa_protocol::migration::Outcome;

use crate::client::Refused;

/// How the command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    Done,
    Failed,
    Stayed,
    InDoubt,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(match exit {
            Exit::Done => 0,
            Exit::Failed => 1,
            Exit::Stayed => 3,
            Exit::InDoubt => 4,
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

/// Tells of a failure.
pub(crate) fn failed(error: &anyhow::Error, json: bool) -> ExitCode {
    let pipe = error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<std::io::Error>())
        .any(|cause| cause.kind() == std::io::ErrorKind::BrokenPipe);
    if pipe {
        // Whoever read our output had enough.
        return Exit::Done.into();
    }
    match error.downcast_ref::<Refused>() {
        Some(Refused(failure)) if json => {
            let text = serde_json::to_string_pretty(failure).unwrap_or_default();
            crate::show::line(&text).ok();
            tell(failure);
        }
        Some(Refused(failure)) => tell(failure),
        None => crate::show::note(&format!("limosa: {error:#}")),
    }
    Exit::Failed.into()
}

fn tell(failure: &api::Failure) {
    crate::show::note(&format!("limosa: {}", failure.message));
    for problem in &failure.problems {
        crate::show::note(&format!("  - {}\n    mend: {}", problem.message, problem.mend));
    }
}
