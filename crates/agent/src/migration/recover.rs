//! After a restart, and when the other host does not answer: what the records
//! say is looked at, the peer is asked, and the VM ends on exactly one host.
//!
//! | record here | what is done |
//! |-------------|--------------|
//! | source, offered | undone: the guest goes on here |
//! | source, handed-over | in doubt: commit repeated until the peer answers |
//! | destination, preparing | declined: all that was made is removed |
//! | destination, declined | what was made and is not yet removed is removed |
//! | destination, ready | the source is asked: handed over → run, else decline |
//! | destination, owner | the guest is let run, if it was not yet |

use std::sync::Arc;
use std::time::Duration;

use limosa_protocol::id::Epoch;
use limosa_protocol::migration::{Outcome as End, Phase, Role};
use limosa_protocol::peer::{Commit, PeerView, Running, SourceView};
use limosa_qemu::process;

use super::incoming::{self, go_on_as_owner};
use super::job::Job;
use super::outgoing::{clean_qemu, end_record, forget_job, free_source, left_behind};
use crate::agent::Agent;
use crate::failure::{Failure, OrFail, Outcome};
use crate::peer_link::{PeerError, PeerLink};
use crate::store::{MigrationRecord, Stage, VmRecord};
use crate::vm::{Qemu, Vm, run};

/// How often a peer that does not answer is asked again.
const ASK_EVERY: Duration = Duration::from_secs(1);

/// A source that handed over and does not know yet whether the VM runs there.
pub(crate) struct InDoubt {
    pub(crate) agent: Arc<Agent>,
    pub(crate) vm: Arc<Vm>,
    pub(crate) job: Arc<Job>,
    pub(crate) link: PeerLink,
    pub(crate) record: MigrationRecord,
    pub(crate) qemu: Option<Qemu>,
}

/// Keeps every VM that was handed over from being touched, before anybody can
/// ask for it.
pub(crate) async fn fence(agent: &Arc<Agent>) -> anyhow::Result<()> {
    for (_, record) in agent.store.all::<MigrationRecord>()? {
        if let (Role::Source, Stage::HandedOver, Ok(vm)) =
            (record.view.role, record.stage, agent.vm(&record.view.vm))
        {
            let mut inner = vm.lock().await;
            inner.in_doubt = true;
            inner.migration = Some((record.view.id, Role::Source));
        }
    }
    Ok(())
}

/// Settles all migrations that the store calls unfinished.
pub(crate) async fn recover(agent: &Arc<Agent>) -> anyhow::Result<()> {
    for (id, record) in agent.store.all::<MigrationRecord>()? {
        if !matches!(record.stage, Stage::Done | Stage::Declined) {
            // What was read may so far be only in the kernel's memory, when a
            // sync failed before the restart.
            agent.store.put(&id, &record)?;
        }
        let settled = match (record.view.role, record.stage) {
            (Role::Destination, Stage::Declined) if !record.made.is_empty() => {
                let why = record.view.reason.clone().unwrap_or_default();
                decline(agent, record, &why).await
            }
            (_, Stage::Done | Stage::Declined) => Ok(()),
            (Role::Source, Stage::Offered) => source_offered(agent, record).await,
            (Role::Source, _) => source_handed_over(agent, record).await,
            (Role::Destination, Stage::Owner) => destination_owner(agent, record).await,
            (Role::Destination, Stage::Ready) => {
                destination_ready(agent, record);
                Ok(())
            }
            (Role::Destination, _) => {
                decline(agent, record, "the destination's agent was restarted").await
            }
        };
        if let Err(failure) = settled {
            tracing::error!(migration = id, %failure, "an unfinished migration was not settled");
        }
    }
    Ok(())
}

/// The guest goes on here, as before.
async fn source_offered(agent: &Arc<Agent>, mut record: MigrationRecord) -> Outcome<()> {
    let job = Job::of_view(record.view.clone());
    let mut reason = "the source's agent was restarted; the VM stays".to_owned();
    if let Some(helper) = record.run.take() {
        // It only read the disks of a VM that is off.
        if process::is_alive(&helper.process) {
            process::kill(&helper.process).await.or_fail("ending a QEMU that read disks")?;
        }
    } else if let Ok(vm) = agent.vm(&record.view.vm) {
        let inner = vm.lock().await;
        if inner.in_doubt {
            // A later migration handed it over: nothing of this one counts.
            return Ok(());
        }
        inner.expect_answering()?;
        match &inner.qemu {
            Some(qemu) => clean_qemu(qemu, !record.paused).await?,
            None => "the agent was restarted, and QEMU of the VM has ended".clone_into(&mut reason),
        }
    }
    if let Ok(link) = PeerLink::new(agent, record.peer()) {
        let id = record.view.id;
        let told = reason.clone();
        tokio::spawn(async move {
            let abort = limosa_protocol::peer::Abort { reason: told };
            let path = format!("/peer/v1/migrations/{id}/abort");
            // If it does not hear this, it asks back and finds no offer.
            link.post::<_, PeerView>(&path, &abort).await.ok();
        });
    }
    end_record(&job, &mut record, End::Stayed, Some(reason), (None, Vec::new()));
    Ok(agent.store.put(&record.view.id.to_string(), &record)?)
}

async fn source_handed_over(agent: &Arc<Agent>, record: MigrationRecord) -> Outcome<()> {
    let vm = agent.vm(&record.view.vm)?;
    let link = PeerLink::new(agent, record.peer())?;
    let job = Arc::new(Job::of_view(record.view.clone()));
    agent.migrations.add(Arc::clone(&job), None)?;
    job.pass_commit_point()?;
    let mut inner = vm.lock().await;
    inner.migration = Some((record.view.id, Role::Source));
    let qemu = inner.qemu.clone();
    drop(inner);
    let in_doubt = InDoubt { agent: Arc::clone(agent), vm, job, link, record, qemu };
    tokio::spawn(settle_source(in_doubt));
    Ok(())
}

/// Repeats the commit until the destination says what became of the VM.
pub(crate) async fn settle_source(mut doubt: InDoubt) {
    doubt.vm.lock().await.in_doubt = true;
    let commit = Commit { epoch: doubt.record.epoch };
    let path = format!("/peer/v1/migrations/{}/commit", doubt.job.id());
    let mut reason_told = false;
    loop {
        match doubt.link.post::<_, Running>(&path, &commit).await {
            Ok(_running) => return moved(doubt).await,
            Err(PeerError::Refused(failure)) => {
                if let Some(why) = has_declined(&doubt).await {
                    return taken_back(doubt, &why).await;
                }
                // Also a destination that knows nothing of it: it was ready when
                // we handed over, so it has lost its records, and may run the VM.
                if !std::mem::replace(&mut reason_told, true) {
                    tell_in_doubt(&mut doubt, &failure.message);
                }
            }
            Err(PeerError::Unreachable(why)) => {
                if !std::mem::replace(&mut reason_told, true) {
                    tell_in_doubt(&mut doubt, &why);
                }
            }
        }
        tokio::time::sleep(ASK_EVERY).await;
    }
}

fn tell_in_doubt(doubt: &mut InDoubt, why: &str) {
    let destination = doubt.link.name();
    let reason = format!(
        "handed over to {destination}, which does not say whether the VM runs ({why}); the copy \
         here stays stopped. It settles by itself when {destination} answers"
    );
    tracing::warn!(migration = %doubt.job.id(), reason, "in doubt");
    doubt.job.tell_in_doubt(reason);
    doubt.record.view = doubt.job.view();
    if let Err(error) = doubt.agent.store.put(&doubt.job.id().to_string(), &doubt.record) {
        tracing::error!(%error, "the doubt was not recorded");
    }
}

/// Whether the destination gave the VM up without running it.
async fn has_declined(doubt: &InDoubt) -> Option<String> {
    let path = format!("/peer/v1/migrations/{}", doubt.job.id());
    match doubt.link.get::<PeerView>(&path).await {
        Ok(PeerView::Declined { reason }) => Some(reason),
        _ => None,
    }
}

async fn moved(mut doubt: InDoubt) {
    doubt.job.enter(Phase::Retire);
    let mut inner = doubt.vm.lock().await;
    inner.qemu = None;
    let retain = doubt.record.retain_source_disks;
    let qemu = doubt.qemu.as_ref();
    let left = free_source(&doubt.agent, &inner.definition, qemu, retain).await;
    end_record(&doubt.job, &mut doubt.record, End::Moved, left_behind(&left), (None, Vec::new()));
    let stored = doubt.agent.store.put_migration_and_vm(&doubt.record, &doubt.vm.name, None);
    if let Err(error) = stored {
        tracing::error!(migration = %doubt.job.id(), %error, "the end was not recorded");
    }
    doubt.agent.drop_vm(&doubt.vm.name);
    drop(inner);
    forget_job(&doubt.agent, doubt.job.id());
}

/// The destination ran nothing and never will: the VM is ours again.
async fn taken_back(mut doubt: InDoubt, why: &str) {
    let mut inner = doubt.vm.lock().await;
    // Past the declined epoch, so that no repeated message fits any more.
    inner.record.epoch = Epoch(doubt.record.epoch.0 + 1);
    let reason = format!("the destination gave the VM back: {why}");
    end_record(&doubt.job, &mut doubt.record, End::Stayed, Some(reason), (None, Vec::new()));
    let stored = doubt.agent.store.put_migration_and_vm(
        &doubt.record,
        &doubt.vm.name,
        Some::<&VmRecord>(&inner.record),
    );
    if let Err(error) = stored {
        // Not recorded is not ours: the guest stays stopped until a restart.
        tracing::error!(migration = %doubt.job.id(), %error, "the way back was not recorded");
        return;
    }
    inner.in_doubt = false;
    inner.migration = None;
    if let Some(qemu) = &doubt.qemu {
        let cleaned = if inner.qemu.is_some() {
            clean_qemu(qemu, !doubt.record.paused).await
        } else {
            run::end(qemu).await
        };
        if let Err(failure) = cleaned {
            tracing::error!(vm = %doubt.vm.name, %failure, "the guest was not let run again");
        }
    }
    drop(inner);
    forget_job(&doubt.agent, doubt.job.id());
}

async fn destination_owner(agent: &Arc<Agent>, mut record: MigrationRecord) -> Outcome<()> {
    let vm = agent.vm(&record.view.vm)?;
    go_on_as_owner(agent, &vm, record.paused).await?;
    let job = Job::of_view(record.view.clone());
    end_record(&job, &mut record, End::Moved, None, (None, Vec::new()));
    Ok(agent.store.put(&record.view.id.to_string(), &record)?)
}

/// Asks the source until it says whether it handed over.
fn destination_ready(agent: &Arc<Agent>, record: MigrationRecord) {
    let agent = Arc::clone(agent);
    tokio::spawn(async move {
        let id = record.view.id;
        let ended = loop {
            match ask_source(&agent, &record).await {
                Ok(SourceView::HandedOver { epoch }) if epoch == record.epoch => {
                    break own(&agent, record).await;
                }
                Ok(SourceView::Offered) => {}
                Ok(SourceView::HandedOver { .. } | SourceView::Unknown) => {
                    break decline(&agent, record, "the source did not hand over").await;
                }
                Err(failure) => tracing::warn!(migration = %id, %failure, "asking the source"),
            }
            tokio::time::sleep(ASK_EVERY).await;
        };
        if let Err(failure) = ended {
            tracing::error!(migration = %id, %failure, "a ready migration was not settled");
        }
    });
}

pub(crate) async fn ask_source(agent: &Agent, record: &MigrationRecord) -> Outcome<SourceView> {
    let link = PeerLink::new(agent, record.peer())?;
    Ok(link.get(&format!("/peer/v1/offers/{}", record.view.id)).await?)
}

/// The source handed over: becomes the owner, as a commit would have done.
async fn own(agent: &Arc<Agent>, mut record: MigrationRecord) -> Outcome<()> {
    let alive = record.run.as_ref().is_none_or(|run| process::is_alive(&run.process));
    if !alive {
        // Nothing of the guest ran here; the source still holds all of it.
        return decline(agent, record, "the destination's QEMU ended before it ran").await;
    }
    let definition = record
        .definition
        .clone()
        .ok_or_else(|| Failure::internal("a ready migration without a definition"))?;
    let qemu = match &record.run {
        Some(run) => Some(run::connect_again(agent, &definition, run).await?),
        None => None,
    };
    let vm_record = VmRecord {
        configuration: definition.places.configuration.clone().unwrap_or_default(),
        epoch: record.epoch,
        run: record.run.clone(),
    };
    let vm = Arc::new(Vm::new(definition.clone(), vm_record.clone()));
    record.stage = Stage::Owner;
    agent.store.put_migration_and_vm(&record, &vm.name, Some(&vm_record))?;
    agent.add_vm(Arc::clone(&vm))?;
    if let Some(qemu) = qemu {
        let mut inner = vm.lock().await;
        run::watch(agent, &vm, &mut inner, qemu).await;
    }
    destination_owner(agent, record).await
}

async fn decline(agent: &Agent, mut record: MigrationRecord, why: &str) -> Outcome<()> {
    // First the record, then the files: see `Incoming::give_back`.
    record.stage = Stage::Declined;
    record.view.reason = Some(why.to_owned());
    agent.store.put(&record.view.id.to_string(), &record)?;
    let mut left = Vec::new();
    if let Some(run) = record.run.take()
        && process::is_alive(&run.process)
    {
        process::kill(&run.process).await.or_fail("ending the QEMU of a declined migration")?;
    }
    if let Some(definition) = &record.definition {
        left = incoming::free(agent, definition, None, &record.made).await;
    }
    let mut reason = why.to_owned();
    if !left.is_empty() {
        reason = format!("{reason}; left here, to be removed by hand: {}", left.join("; "));
    }
    let job = Job::of_view(record.view.clone());
    end_record(&job, &mut record, End::Stayed, Some(reason), (None, Vec::new()));
    record.stage = Stage::Declined;
    record.made.clear();
    Ok(agent.store.put(&record.view.id.to_string(), &record)?)
}
