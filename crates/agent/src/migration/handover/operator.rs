//! What an operator is told of an unsettled hand-over, and the decision that
//! only an operator can take.

use std::sync::Arc;

use limosa_protocol::api::{Recovery, RecoveryPeer};
use limosa_protocol::handover::Guest;
use limosa_protocol::id::VmName;
use limosa_protocol::peer::{DestinationWord, SourceWord};

use super::HandOver;
use crate::agent::{Agent, now_unix_ms};
use crate::failure::{Failure, Outcome};

/// What is known of a VM's hand-over on both hosts, and what forcing it here
/// would risk.
pub(crate) async fn recovery(agent: &Arc<Agent>, vm: &VmName) -> Outcome<Recovery> {
    let hand = unsettled(agent, vm).await?;
    let standing = hand.standing();
    let peer = match &hand {
        HandOver::Source(hand) => match hand.look_at_peer().await {
            Ok(word) => answered(destination_text(&word), word == DestinationWord::Unheard),
            Err(error) => unanswered(error.to_string()),
        },
        HandOver::Destination(hand) => match hand.look_at_peer().await {
            Ok(word) => answered(source_text(&word), word == SourceWord::Unheard),
            Err(error) => unanswered(error.to_string()),
        },
    };
    let view = hand.job().view();
    let guest = match &hand {
        HandOver::Source(hand) => hand.guest().await,
        HandOver::Destination(hand) => hand.guest().await,
    };
    Ok(Recovery {
        vm: vm.clone(),
        migration: hand.id(),
        role: view.role,
        state: standing.state.to_owned(),
        guest: guest_text(guest).to_owned(),
        doubt: standing.doubt.map(|doubt| hand.doubt_text(doubt)),
        peer_name: hand.peer(),
        peer,
        risk: risk(&hand, guest),
        may_force: may_force(&hand),
    })
}

fn answered(text: &str, has_lost_records: bool) -> RecoveryPeer {
    RecoveryPeer { answers: true, has_lost_records, says: text.to_owned() }
}

fn unanswered(text: String) -> RecoveryPeer {
    RecoveryPeer { answers: false, has_lost_records: false, says: text }
}

/// Gives the VM to this host. The operator has made sure that the other host
/// does not run it; nothing here can.
pub(crate) async fn force_owner(agent: &Arc<Agent>, vm: &VmName, by: &str) -> Outcome<Recovery> {
    let before = recovery(agent, vm).await?;
    if before.peer.answers && !before.peer.has_lost_records {
        return Err(Failure::conflict(format!(
            "{} answers ({}): the two hosts settle this by themselves within seconds; nothing was \
             forced",
            before.peer_name, before.peer.says
        )));
    }
    if !before.may_force {
        return Err(Failure::conflict(format!(
            "VM {vm} is {} here: there is nothing that an operator could decide",
            before.state
        )));
    }
    let hand = unsettled(agent, vm).await?;
    let by = format!("{by}, {} ms since 1970", now_unix_ms());
    tracing::warn!(%vm, migration = %hand.id(), by, "an operator gives the VM to this host");
    match &hand {
        HandOver::Source(hand) => hand.force_owner(by).await?,
        HandOver::Destination(hand) => hand.force_owner(by).await?,
    }
    Ok(Recovery {
        state: hand.standing().state.to_owned(),
        doubt: hand.standing().doubt.map(|doubt| hand.doubt_text(doubt)),
        may_force: false,
        ..before
    })
}

async fn unsettled(agent: &Arc<Agent>, vm: &VmName) -> Outcome<HandOver> {
    let found = agent.vm(vm)?;
    let hand = found.lock().await.hand_over.clone();
    hand.ok_or_else(|| {
        Failure::conflict(format!(
            "VM {vm} needs no recovery: no migration of it waits for another host"
        ))
    })
}

fn may_force(hand: &HandOver) -> bool {
    match (hand, hand.standing().state) {
        (HandOver::Source(_), state) => matches!(state, "handed-over" | "keeping"),
        (HandOver::Destination(_), state) => matches!(state, "ready" | "owner"),
    }
}

fn guest_text(guest: Guest) -> &'static str {
    match guest {
        Guest::Running => "runs here, or ran here since the migration began",
        Guest::Stopped => "stands here, its memory complete",
        Guest::Gone => "its QEMU has ended here: only its disks are left",
        Guest::Off => "was off when it began to move: its disks are all of it",
    }
}

fn risk(hand: &HandOver, guest: Guest) -> String {
    let peer = hand.peer();
    if hand.standing().is_ours && !guest.is_absent() {
        return format!(
            "the VM runs here, and its next move or start then waits for no word of {peer}. If an \
             operator also gives it to {peer}, it runs twice: do not do both"
        );
    }
    let lost = match (hand, hand.standing().state) {
        (HandOver::Source(_), "handed-over") => {
            format!("what the guest did on {peer} since it was handed over is lost")
        }
        (HandOver::Destination(_), "ready") => {
            format!(
                "what the guest did on {peer} after this copy, should {peer} have kept it, is lost"
            )
        }
        _ => "nothing is lost that this host's disks do not lack already".to_owned(),
    };
    let start = if guest.is_absent() {
        "; the VM is then started anew from the disks here with `limosa vm start`"
    } else {
        ""
    };
    format!(
        "if the VM still runs on {peer}, it then runs twice, and its two copies part for good: \
         make sure that {peer} is powered off, or that no QEMU of this VM runs there. Not hearing \
         of it is not knowing. Forced here, {lost}{start}"
    )
}

fn destination_text(word: &DestinationWord) -> &'static str {
    match word {
        DestinationWord::Unheard => "it has never heard of this migration: it has lost its records",
        DestinationWord::Undecided => "it is receiving, or just about to decide",
        DestinationWord::Ready { .. } => "it holds the whole VM and waits for the hand-over",
        DestinationWord::Running { .. } => "it owns the VM",
        DestinationWord::Declined { .. } => "it gave the VM up and never ran it",
    }
}

fn source_text(word: &SourceWord) -> &'static str {
    match word {
        SourceWord::Unheard => "it has never heard of this migration: it has lost its records",
        SourceWord::Undecided => "it has not decided yet",
        SourceWord::Commit { .. } => "it has handed the VM over",
        SourceWord::Stays { .. } => "it has the VM",
        SourceWord::Retired { .. } => "it is out of the VM for good",
    }
}
