//! After a restart of the agent: every unsettled migration's machine is made
//! again of its record, before anybody can ask for its VM; then it goes on.
//!
//! | record | guest's QEMU | first |
//! |--------|--------------|-------|
//! | source, offered or owner | any | the guest goes on here; *stays* is said |
//! | source, handed-over | stands | *commit* is said until it is answered |
//! | destination, preparing | stands or gone | declined, and freed |
//! | destination, ready or declined | any | the source is asked |
//! | destination, owner | stands / runs / gone | it is let run / nothing / the source is asked |

use std::sync::Arc;

use limosa_protocol::handover::{DestinationAction, Guest, Receipt, SourceAction, Stage, persist};
use limosa_protocol::migration::Role;
use limosa_protocol::vm::VmDefinition;
use limosa_qemu::power::{self, RunState};
use limosa_qemu::process::{self, ProcessId};

use super::{DestinationDriver, Durable, Handover, SourceDriver, VmChange};
use crate::migrations::Migrations;
use limosa_host::failure::{Failure, OrFail, Result};
use limosa_host::store::{MigrationRecord, VmRecord};
use limosa_host::vm::{Qemu, Vm, cgroup, run};

/// A machine that was made again, and what it orders first.
enum RestoredDriver {
    Source(Arc<SourceDriver>, Vec<SourceAction>),
    Destination(Arc<DestinationDriver>, Vec<DestinationAction>),
}

/// The migrations that a restart found unsettled, before anything is done about them.
pub struct Restored(Vec<RestoredDriver>);

/// Makes the machines of all unsettled migrations, whose VMs are fenced from here on, and fills
/// the queue; nothing is done yet.
pub async fn restore(migrations: &Arc<Migrations>) -> anyhow::Result<Restored> {
    let mut all = Vec::new();
    for (id, record) in migrations.context.host.store.all::<MigrationRecord>()? {
        if record.is_ended() {
            continue;
        }
        let vm = record.view.vm.clone();
        match restore_one(migrations, record).await {
            Ok(restored) => all.push(restored),
            Err(failure) => {
                tracing::error!(migration = id, %vm, %failure, "it cannot be settled");
                // Nobody may work with a VM whose owner is not known.
                if let Ok(vm) = migrations.context.host.vm(&vm) {
                    let why = format!("its migration {id} cannot be settled: {failure}");
                    vm.lock().await.unusable.get_or_insert(why);
                }
            }
        }
    }
    migrations.queue.restore(&migrations.context.host.store)?;
    Ok(Restored(all))
}

async fn restore_one(
    migrations: &Arc<Migrations>,
    mut record: MigrationRecord,
) -> Result<RestoredDriver> {
    // What was read may so far be only in the kernel's memory, when a sync
    // failed before the restart.
    let read = record.handover;
    // The VM's record was written in one step with it, and is as uncertain.
    let vm = match migrations.context.host.store.get::<VmRecord>(record.view.vm.as_str())? {
        Some(of_vm) => VmChange::Put(of_vm),
        None => VmChange::Remove,
    };
    let mut store = Durable { store: &migrations.context.host.store, migration: &mut record, vm };
    let receipt = persist(&mut store, read)?;
    match record.view.role {
        Role::Source => restore_source(migrations, record, receipt).await,
        Role::Destination => restore_destination(migrations, record, receipt).await,
    }
}

async fn restore_source(
    migrations: &Arc<Migrations>,
    record: MigrationRecord,
    receipt: Receipt,
) -> Result<RestoredDriver> {
    let vm = migrations.context.host.vm(&record.view.vm)?;
    let is_told = record.view.ended_unix_ms.is_some();
    let mut of_vm = vm.lock().await;
    let (guest, qemu) = if record.is_off() {
        end_reader(&record, &of_vm.definition).await?;
        (Guest::Off, None)
    } else {
        match (&of_vm.qemu, record.handover.stage) {
            (Some(qemu), Stage::HandedOver) => (Guest::Stopped, Some(qemu.clone())),
            (Some(qemu), _) => (Guest::Running, Some(qemu.clone())),
            // It lives and does not answer: it has the guest, which stands if it
            // was handed over.
            (None, Stage::HandedOver) if of_vm.expect_answering().is_err() => {
                (Guest::Stopped, None)
            }
            (None, _) if of_vm.expect_answering().is_err() => (Guest::Running, None),
            (None, _) => (Guest::Gone, None),
        }
    };
    let (driver, actions) =
        SourceDriver::restore(&migrations.context, &vm, record, receipt, guest, qemu)?;
    if !is_told {
        driver.note_restart().await;
    }
    of_vm.lock = driver.initial_lock();
    migrations.add_restored(Handover::Source(Arc::clone(&driver)));
    Ok(RestoredDriver::Source(driver, actions))
}

/// Ends a QEMU that only read the disks of a VM that is off.
async fn end_reader(record: &MigrationRecord, definition: &VmDefinition) -> Result<()> {
    let ended = match record.run.as_ref().filter(|run| process::is_alive(&run.process)) {
        Some(run) => {
            process::kill(&run.process).await.or_fail("ending a QEMU that only read disks")
        }
        None => Ok(()),
    };
    cgroup::remove_of(definition);
    ended
}

async fn restore_destination(
    migrations: &Arc<Migrations>,
    mut record: MigrationRecord,
    receipt: Receipt,
) -> Result<RestoredDriver> {
    if record.handover.stage == Stage::Preparing {
        let why = "the destination's agent was restarted before everything had arrived";
        record.view.reason.get_or_insert_with(|| why.to_owned());
    }
    let definition = record
        .definition
        .clone()
        .ok_or_else(|| Failure::internal("its record has no definition of the VM"))?;
    let is_owner = record.handover.stage == Stage::Owner;
    let vm = match migrations.context.host.vm(&definition.name) {
        Ok(vm) if is_owner => vm,
        _ => {
            // The name is taken until it is settled.
            let of_vm = VmRecord {
                configuration: definition.places.configuration.clone().unwrap_or_default(),
                epoch: record.handover.epoch,
                run: record.run.clone(),
                given_up_to: None,
            };
            let vm = Arc::new(Vm::new(definition.clone(), of_vm));
            migrations.context.host.vms.add(&migrations.context.host.name, Arc::clone(&vm))?;
            vm
        }
    };
    let (guest, qemu) = look_at_destination(migrations, &vm, &record).await;
    let mut of_vm = vm.lock().await;
    let (driver, actions) = DestinationDriver::restore(
        &migrations.context,
        &vm,
        record,
        receipt,
        guest,
        qemu,
        definition,
    )?;
    of_vm.lock = driver.initial_lock();
    migrations.add_restored(Handover::Destination(Arc::clone(&driver)));
    Ok(RestoredDriver::Destination(driver, actions))
}

/// What has become of the QEMU that received. "Running" unless the guest surely
/// never ran here.
async fn look_at_destination(
    migrations: &Migrations,
    vm: &Vm,
    record: &MigrationRecord,
) -> (Guest, Option<Qemu>) {
    if record.is_off() {
        let definition = vm.lock().await.definition.clone();
        if let Err(failure) = end_reader(record, &definition).await {
            tracing::error!(vm = %vm.name, %failure, "it holds the images open");
        }
        if record.run.is_none() {
            run::end_unrecorded(&migrations.context.host.folders, &definition).await;
        }
        return (Guest::Off, None);
    }
    let found = vm.lock().await.qemu.clone();
    let qemu = match (found, &record.run) {
        (Some(qemu), _) => Some(qemu),
        (None, Some(run)) if process::is_alive(&run.process) => {
            let definition = vm.lock().await.definition.clone();
            match run::reconnect(&migrations.context.host.folders, &definition, run).await {
                Ok(qemu) => Some(qemu),
                Err(failure) => {
                    tracing::error!(vm = %vm.name, %failure, "QEMU runs and does not answer");
                    return (end_unless_owner(vm, record, &run.process).await, None);
                }
            }
        }
        (None, Some(_)) => return (Guest::Gone, None),
        (None, None) => {
            run::end_unrecorded(&migrations.context.host.folders, &vm.lock().await.definition)
                .await;
            return (Guest::Gone, None);
        }
    };
    let Some(qemu) = qemu else { return (Guest::Gone, None) };
    if record.has_run {
        // One that stands was paused by its users.
        return (Guest::Running, Some(qemu));
    }
    // Before `owner` nothing lets it run; after it a guest that stands has not
    // run yet.
    let expect_paused = match power::query_status(&qemu.qmp).await {
        Ok(status) => matches!(
            status,
            RunState::Paused | RunState::Inmigrate | RunState::Prelaunch | RunState::Postmigrate
        ),
        Err(_) => false,
    };
    (if expect_paused { Guest::Stopped } else { Guest::Running }, Some(qemu))
}

/// What becomes of a QEMU that received and does not answer any more. Before
/// `owner` its guest never ran: without it the source is who has the VM.
async fn end_unless_owner(vm: &Vm, record: &MigrationRecord, process: &ProcessId) -> Guest {
    if record.handover.stage == Stage::Owner {
        return Guest::Running;
    }
    match process::kill(process).await {
        Ok(()) => Guest::Gone,
        Err(error) => {
            tracing::error!(vm = %vm.name, %error, "QEMU was not ended");
            Guest::Running
        }
    }
}

/// Lets restored machines go on; peers may be asked, and ask back, from here.
pub fn settle(restored: Restored) {
    for one in restored.0 {
        let job = Arc::clone(match &one {
            RestoredDriver::Source(source, _) => source.job(),
            RestoredDriver::Destination(destination, _) => destination.job(),
        });
        job.spawn(async move {
            match one {
                RestoredDriver::Source(driver, actions) => {
                    let messages = driver.go_on(actions).await;
                    driver.finish(messages).await;
                }
                RestoredDriver::Destination(driver, actions) => {
                    driver.go_on(actions).await;
                    driver.spawn_settling();
                    driver.job().cancelled().await;
                    driver.give_up("cancelled by an operator of the destination").await;
                }
            }
        });
    }
}
