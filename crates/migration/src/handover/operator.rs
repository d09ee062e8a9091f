//! What an operator is told of an unsettled handover, and the decision that
//! only an operator can take.

use std::sync::Arc;

use limosa_protocol::api::{Recovery, RecoveryPeer};
use limosa_protocol::handover::{Doubt, Guest};
use limosa_protocol::id::VmName;
use limosa_protocol::peer::{DestinationVote, SourceDecision};

use super::Handover;
use super::status::Status;
use crate::migrations::Migrations;
use limosa_host::clock::now_unix_ms;
use limosa_host::failure::{Failure, Result};

/// What is known of a VM's handover on both hosts, and what forcing it here
/// would risk.
pub async fn recovery(migrations: &Arc<Migrations>, vm: &VmName) -> Result<Recovery> {
    let driver = unsettled(migrations, vm)?;
    let status = driver.status();
    let peer = match &driver {
        Handover::Source(driver) => match driver.look_at_peer().await {
            Ok(vote) => answered(destination_text(&vote), vote == DestinationVote::Unknown),
            Err(error) => unanswered(error.to_string()),
        },
        Handover::Destination(driver) => match driver.look_at_peer().await {
            Ok(vote) => answered(source_text(&vote), vote == SourceDecision::Unknown),
            Err(error) => unanswered(error.to_string()),
        },
    };
    let view = driver.job().view();
    let guest = match &driver {
        Handover::Source(driver) => driver.guest().await,
        Handover::Destination(driver) => driver.guest().await,
    };
    Ok(Recovery {
        vm: vm.clone(),
        migration: driver.id(),
        role: view.role,
        state: status.state.to_owned(),
        guest: guest_text(guest).to_owned(),
        doubt: status.doubt.map(|doubt| driver.doubt_text(doubt)),
        peer_name: driver.peer(),
        peer,
        risk: risk(&driver, guest),
        may_force: status.may_force_owner,
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
///
/// - `confirmed`: the name that the operator repeated.
/// - `by`: who the operator is, for the record.
pub async fn force_owner(
    migrations: &Arc<Migrations>,
    vm: &VmName,
    confirmed: &VmName,
    by: &str,
) -> Result<Recovery> {
    if confirmed != vm {
        return Err(Failure::bad_request(format!(
            "VM {vm} is to be forced and {confirmed} was confirmed: nothing was done"
        )));
    }
    let before = recovery(migrations, vm).await?;
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
    let driver = unsettled(migrations, vm)?;
    expect_files(migrations, vm).await?;
    let by = format!("{by}, {} ms since 1970", now_unix_ms());
    tracing::warn!(%vm, migration = %driver.id(), by, "an operator gives the VM to this host");
    match &driver {
        Handover::Source(driver) => driver.force_owner(by).await?,
        Handover::Destination(driver) => driver.force_owner(by).await?,
    }
    Ok(Recovery {
        state: driver.status().state.to_owned(),
        doubt: driver.status().doubt.map(|doubt| driver.doubt_text(doubt)),
        may_force: false,
        ..before
    })
}

fn unsettled(migrations: &Migrations, vm: &VmName) -> Result<Handover> {
    migrations.context.host.vm(vm)?;
    migrations.unsettled(vm).ok_or_else(|| {
        Failure::conflict(format!(
            "VM {vm} needs no recovery: no migration of it waits for another host"
        ))
    })
}

/// Fails when the disks are not here any more: a source may have begun to free
/// them when its agent ended.
async fn expect_files(migrations: &Arc<Migrations>, vm: &VmName) -> Result<()> {
    let found = migrations.context.host.vm(vm)?;
    let of_vm = found.lock().await;
    for disk in &of_vm.definition.disks {
        if let Some(image) = disk.path.as_ref().filter(|image| !image.exists()) {
            return Err(Failure::conflict(format!(
                "disk {} of VM {vm} is not here any more ({}): this host has no whole copy to \
                 give; nothing was forced",
                disk.id,
                image.display()
            )));
        }
    }
    Ok(())
}

/// Fails when an operator's decision cannot be taken.
pub(super) fn expect_forcible(status: Status) -> Result<()> {
    if status.may_force_owner {
        return Ok(());
    }
    Err(Failure::conflict(format!(
        "nothing was forced: a migration that is {} needs no operator",
        status.state
    )))
}

/// Fails when a decision may or may not be recorded.
pub(super) fn expect_recorded(status: Status) -> Result<()> {
    match status.doubt {
        Some(Doubt::UnknownDurability) => Err(Failure::internal(
            "the decision may or may not be recorded, because the state store failed: look at its \
             disk, restart limosad here, and then see `limosa vm recover` again",
        )),
        _ => Ok(()),
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

fn risk(driver: &Handover, guest: Guest) -> String {
    let peer = driver.peer();
    if driver.status().is_ours && !guest.is_absent() {
        return format!(
            "the VM runs here, and its next move or start then waits for no word of {peer}. If an \
             operator also gives it to {peer}, it runs twice: do not do both"
        );
    }
    let lost = match driver.status().doubt {
        Some(Doubt::CommitUnanswered) => {
            format!("what the guest did on {peer} since it was handed over is lost")
        }
        Some(Doubt::CommitUnheard) => format!(
            "what the guest did on {peer} after this copy, should {peer} have kept it, is lost"
        ),
        Some(Doubt::GivenBack) => format!(
            "what the guest did on {peer} since this copy was given back is lost; and should \
             {peer} ever come back, it may start its copy without asking: delete that one first"
        ),
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

fn destination_text(answer: &DestinationVote) -> &'static str {
    match answer {
        DestinationVote::Unknown => "it has never heard of this migration: it has lost its records",
        DestinationVote::Undecided => "it is receiving, or just about to decide",
        DestinationVote::Ready { .. } => "it holds the whole VM and waits for the handover",
        DestinationVote::Running { .. } => "it owns the VM",
        DestinationVote::Declined { .. } => "it gave the VM up and never ran it",
    }
}

fn source_text(answer: &SourceDecision) -> &'static str {
    match answer {
        SourceDecision::Unknown => "it has never heard of this migration: it has lost its records",
        SourceDecision::Undecided => "it has not decided yet",
        SourceDecision::Commit { .. } => "it has handed the VM over",
        SourceDecision::Stays { .. } => "it has the VM",
        SourceDecision::Retired { .. } => "it is out of the VM for good",
    }
}
