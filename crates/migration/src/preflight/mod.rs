//! What stands against a move: everything at once, before anything is touched.
//!
//! ```text
//! source       the VM, its files, what of this host is attached ─┐
//! destination  names, switches, paths, space, QEMU, CPU ─────────┴─► one list
//! ```
//!
//! The destination is asked whatever the source found, so that nobody fixes one
//! thing only to be told of the next.

mod destination;
mod problem;
mod source;
mod storage;

use std::sync::Arc;

use limosa_protocol::api::FailureCode;
use limosa_protocol::id::{HostName, MigrationId};
use limosa_protocol::migration::{MoveRequest, Note, Problem, ProblemCode, QueueReason};
use limosa_protocol::peer::Offer;
use uuid::Uuid;

pub(crate) use destination::{Placed, check_offer, place_offer, read_offer};
pub(crate) use source::movable;

use self::problem::problem;
use crate::migrations::Migrations;
use crate::peer::{NoPeer, PeerClient, PeerError, pairing_remedy};
use limosa_host::failure::{Failure, Result};
use limosa_host::vm::{Inner, Vm};

/// What preflight found.
pub(crate) struct Preflight {
    /// Everything that stands against the move
    pub(crate) problems: Vec<Problem>,
    /// Why the move would have to wait
    pub(crate) notes: Vec<Note>,
}

impl Preflight {
    /// The problem of a kind, if there is no other.
    pub(crate) fn only_problem(&self, code: ProblemCode) -> Option<&Problem> {
        match self.problems.as_slice() {
            [problem] if problem.code == code => Some(problem),
            _ => None,
        }
    }

    /// Fails when anything stands against the move.
    pub(crate) fn expect_possible(&self, vm: &Vm, request: &MoveRequest) -> Result<()> {
        if self.problems.is_empty() {
            return Ok(());
        }
        Err(Failure::problems(
            format!("VM {} cannot move to {} yet; nothing was touched", vm.name, request.to),
            self.problems.clone(),
        ))
    }
}

/// Compares a VM with a destination.
pub(crate) async fn preflight(
    migrations: &Arc<Migrations>,
    vm: &Arc<Vm>,
    request: &MoveRequest,
) -> Result<Preflight> {
    let mut notes = Vec::new();
    if migrations.is_full() {
        notes.push(migrations.source_full());
    }
    // A copy, so that looking at images keeps nobody from the VM.
    let inner = vm.lock().await.clone();
    let mut problems = source::check(migrations, &inner, request).await;
    let (offer, unusable) =
        source::describe(migrations, &inner, request, MigrationId(Uuid::now_v7())).await?;
    problems.extend(unusable);
    if request.to == migrations.context.host.name {
        return Ok(Preflight { problems, notes });
    }
    let link = match PeerClient::open(
        &migrations.context.host.store,
        &migrations.context.identity,
        &request.to,
    ) {
        Ok(link) => link,
        Err(error) => {
            problems.push(not_linked(&request.to, error)?);
            return Ok(Preflight { problems, notes });
        }
    };
    match link.compare(&offer).await {
        Ok(answer) => {
            add_answer(&mut problems, answer.problems);
            notes.extend(answer.is_full.then(|| destination_full(&request.to)));
        }
        Err(error) => problems.push(no_answer(&request.to, &error)),
    }
    Ok(Preflight { problems, notes })
}

/// Why a move waits while its destination is full.
pub(crate) fn destination_full(to: &HostName) -> Note {
    let message = format!("as many migrations as possible are under way at {to}");
    Note { code: QueueReason::DestinationFull, message }
}

/// The destination names a CD-ROM too, but knows less of it than this host.
fn add_answer(problems: &mut Vec<Problem>, theirs: Vec<Problem>) {
    let is_told = problems.iter().any(|problem| problem.code == ProblemCode::HostAttached);
    let is_new = |found: &Problem| !is_told || found.code != ProblemCode::HostAttached;
    problems.extend(theirs.into_iter().filter(is_new));
}

/// There is no link to be had to a host.
fn not_linked(to: &HostName, error: NoPeer) -> Result<Problem> {
    match error {
        NoPeer::NotPaired(_) => Ok(problem(
            ProblemCode::NotPaired,
            format!("no host {to} is paired with this one"),
            pairing_remedy(to),
        )),
        NoPeer::Damaged(_) => Ok(problem(
            ProblemCode::PairingDamaged,
            format!("what this host recorded of {to} when they were paired is damaged"),
            format!("run `limosa host unpair {to}` here, then pair the two again"),
        )),
        NoPeer::Store(error) => Err(error.into()),
    }
}

/// The destination did not look at the offer.
fn no_answer(to: &HostName, error: &PeerError) -> Problem {
    let failure = match error {
        // What was wrong here says so itself.
        PeerError::Unreachable(_) | PeerError::Here(_) => {
            return problem(
                ProblemCode::Unreachable,
                format!("host {to} gave no answer: {error}"),
                format!(
                    "see that limosad runs on {to} and its port is open; if {to} was set up anew, \
                     unpair and pair again"
                ),
            );
        }
        PeerError::Refused(failure) => failure,
    };
    match failure.code {
        FailureCode::NotFound => problem(
            ProblemCode::PeerVersion,
            format!("Limosa on {to} does not know how to compare: {error}"),
            "upgrade Limosa on the host that has the older one",
        ),
        FailureCode::Forbidden => problem(
            ProblemCode::NotPaired,
            format!("{to} does not take this host for one that it is paired with: {error}"),
            format!("run `limosa host unpair {to}` here, then {}", pairing_remedy(to)),
        ),
        _ => problem(
            ProblemCode::Refused,
            format!("{to} refused to look at the VM: {error}"),
            format!("see the log of limosad on {to}; it says what failed there"),
        ),
    }
}

/// Says all that the destination must know of a VM.
pub(crate) async fn make_offer(
    migrations: &Migrations,
    inner: &Inner,
    request: &MoveRequest,
    migration: MigrationId,
) -> Result<Offer> {
    let (offer, unusable) = source::describe(migrations, inner, request, migration).await?;
    if unusable.is_empty() {
        return Ok(offer);
    }
    Err(Failure::problems("the VM's files changed meanwhile; nothing was touched", unusable))
}

#[cfg(test)]
mod tests {
    use limosa_protocol::api;

    use super::*;
    use limosa_host::store::StoreError;

    fn host() -> HostName {
        "host2".parse().unwrap()
    }

    /// Goal: a host that answers is never called unreachable.
    #[test]
    fn a_refusal_is_not_silence() {
        let refused = |code| {
            let (message, problems) = ("why".to_owned(), Vec::new());
            PeerError::Refused(api::Failure { code, message, remedy: None, problems })
        };
        for (error, code) in [
            (PeerError::Unreachable("no route".to_owned()), ProblemCode::Unreachable),
            (refused(FailureCode::BadRequest), ProblemCode::Refused),
            (refused(FailureCode::Internal), ProblemCode::Refused),
            (refused(FailureCode::NotFound), ProblemCode::PeerVersion),
            (refused(FailureCode::Forbidden), ProblemCode::NotPaired),
        ] {
            let told = no_answer(&host(), &error);
            assert_eq!(told.code, code, "{told:?}");
            assert!(!told.remedy.is_empty());
        }
    }

    #[test]
    fn a_damaged_pairing_is_told_apart_from_none() {
        let told = not_linked(&host(), NoPeer::NotPaired(host())).unwrap();
        assert_eq!(told.code, ProblemCode::NotPaired);
        let told = not_linked(&host(), NoPeer::Damaged(host())).unwrap();
        assert_eq!(told.code, ProblemCode::PairingDamaged);
        assert!(told.remedy.contains("host unpair host2"), "{told:?}");
        let failed = NoPeer::Store(StoreError::Failed);
        assert!(not_linked(&host(), failed).is_err());
    }

    #[test]
    fn a_cdrom_is_told_once() {
        let attached = || problem(ProblemCode::HostAttached, "a CD-ROM", "take it out");
        let taken = || problem(ProblemCode::NameTaken, "a name", "delete it");
        let mut problems = vec![attached()];
        add_answer(&mut problems, vec![attached(), taken()]);
        assert_eq!(problems, [attached(), taken()]);
        let mut problems = Vec::new();
        add_answer(&mut problems, vec![attached()]);
        assert_eq!(problems, [attached()]);
    }
}
