//! `ready` and `commit`: from the last byte to a running guest.

use std::sync::Arc;
use std::time::Duration;

use limosa_plane::PlaneEvent;
use limosa_protocol::migration::{Outcome as End, Phase};
use limosa_protocol::peer::{Commit, Ready, ReadyRequest, Running, SourceView};
use limosa_protocol::vm::{DiskKind, VmDefinition};
use limosa_qemu::migrate::{self, MigrationStatus};
use limosa_qemu::{block, power, process};

use super::receive::close_plane;
use super::{Incoming, Inner, verify};
use crate::agent::Agent;
use crate::failure::{Failure, OrFail, Outcome, chain};
use crate::migration::outgoing::{end_record, forget_job};
use crate::migration::recover::ask_source;
use crate::net::announce;
use crate::store::{Stage, VmRecord};
use crate::vm::{Qemu, Vm, run, write_definition};

/// How long a ready destination waits for the source's word before it asks.
const ASK_SOURCE_EVERY: Duration = Duration::from_secs(5);
/// How often QEMU is asked whether it has loaded everything; an event would
/// come as fast, and can be lost.
const LOOK_EVERY: Duration = Duration::from_millis(2);

impl Incoming {
    /// Answers once the whole VM is here, equal, and durably so.
    pub(crate) async fn ready(self: &Arc<Self>, request: &ReadyRequest) -> Outcome<Ready> {
        let mut inner = self.inner.lock().await;
        match inner.record.stage {
            Stage::Preparing => {}
            Stage::Ready => return Ok(Ready { epoch: inner.record.epoch }),
            _ => return Err(Failure::conflict("this migration is not being received")),
        }
        self.enter(Phase::Switchover);
        match self.become_ready(&mut inner, request).await {
            Ok(()) => Ok(Ready { epoch: inner.record.epoch }),
            Err(failure) => {
                drop(inner);
                self.fail(failure.to_string()).await;
                Err(failure)
            }
        }
    }

    /// Asks the source now and then: its abort or its commit may have been lost.
    pub(super) fn spawn_source_watch(self: &Arc<Self>) {
        let incoming = Arc::clone(self);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(ASK_SOURCE_EVERY).await;
                let record = incoming.inner.lock().await.record.clone();
                if !matches!(record.stage, Stage::Preparing | Stage::Ready | Stage::Owner) {
                    return;
                }
                match ask_source(&incoming.agent, &record).await {
                    Ok(SourceView::HandedOver { epoch }) => {
                        if let Err(failure) = incoming.commit(&Commit { epoch }).await {
                            tracing::warn!(migration = %incoming.id(), %failure, "taking over");
                        }
                    }
                    Ok(SourceView::Unknown) => {
                        incoming.decline("the source did not hand over").await;
                    }
                    Ok(SourceView::Offered) => {}
                    Err(failure) => {
                        tracing::warn!(migration = %incoming.id(), %failure, "asking the source");
                    }
                }
            }
        });
    }

    async fn become_ready(&self, inner: &mut Inner, request: &ReadyRequest) -> Outcome<()> {
        wait_received(inner, self.offer.running).await?;
        let qemu =
            inner.qemu.clone().ok_or_else(|| Failure::internal("there is no QEMU to load"))?;
        if self.offer.running {
            wait_loaded(&qemu).await?;
        }
        let mut ram_digest = None;
        if let Some(plane) = inner.plane.take() {
            ram_digest = plane.ram_digest();
            close_plane(plane).await?;
        }
        let doing = "closing the destination's disks to the source";
        block::stop_nbd_server(&qemu.qmp).await.or_fail(doing)?;
        if !self.offer.running {
            // Nothing was loaded into it: it only held the images open.
            run::end(&qemu).await?;
            inner.qemu = None;
            inner.record.run = None;
        }
        compare_fully(&self.agent, &inner.definition, ram_digest, request).await?;
        for address in request.addresses.iter().rev() {
            self.vm.addresses.note(*address);
        }
        let configuration =
            crate::vm::files::place(&inner.definition.places.configuration, "configuration")?;
        write_definition(&inner.definition, configuration)?;
        inner.record.paused = request.paused;
        inner.record.stage = Stage::Ready;
        self.agent.store.put(&self.id().to_string(), &inner.record)?;
        Ok(())
    }

    /// The source has handed over: owns the VM and runs it. May be repeated.
    pub(crate) async fn commit(self: &Arc<Self>, commit: &Commit) -> Outcome<Running> {
        let mut inner = self.inner.lock().await;
        let epoch = inner.record.epoch;
        if commit.epoch != epoch {
            return Err(Failure::conflict(format!(
                "epoch {} was handed over and {epoch} is expected",
                commit.epoch
            )));
        }
        match inner.record.stage {
            Stage::Done => return Ok(Running { epoch }),
            // Recorded, and the answer to it was lost: what is left is to run.
            Stage::Owner => {}
            Stage::Ready => self.become_owner(&mut inner)?,
            _ => return Err(Failure::conflict("this migration is not ready")),
        }
        let (vm_record, paused) = (self.vm_record(&inner), inner.record.paused);
        if let Err(failure) = self.take_over(vm_record, inner.qemu.clone(), paused).await {
            let reason = format!("the guest never ran here: {failure}");
            self.give_back(&mut inner, &reason).await;
            drop(inner);
            forget_job(&self.agent, self.id());
            return Err(Failure::conflict(reason));
        }
        inner.qemu = None;
        self.enter(Phase::Retire);
        end_record(&self.job, &mut inner.record, End::Moved, None, (None, Vec::new()));
        inner.record.stage = Stage::Done;
        // Not waited for by the source: the guest runs, and a crash before this
        // is on the disk only repeats a `cont`.
        if let Err(error) = self.agent.store.put(&self.id().to_string(), &inner.record) {
            tracing::error!(migration = %self.id(), %error, "the end was not recorded");
        }
        drop(inner);
        forget_job(&self.agent, self.id());
        Ok(Running { epoch })
    }

    /// Records that the VM belongs to this host.
    fn become_owner(&self, inner: &mut Inner) -> Outcome<()> {
        // Nobody can cancel between here and the record.
        self.job.pass_commit_point()?;
        let mut record = inner.record.clone();
        record.stage = Stage::Owner;
        let vm_record = self.vm_record(inner);
        self.agent.store.put_migration_and_vm(&record, &self.vm.name, Some(&vm_record))?;
        inner.record = record;
        Ok(())
    }

    /// Runs the VM, unless it was paused or off. Fails only when the guest has
    /// not run a single instruction here.
    async fn take_over(&self, record: VmRecord, qemu: Option<Qemu>, paused: bool) -> Outcome<()> {
        let (agent, vm) = (&self.agent, &self.vm);
        let mut of_vm = vm.lock().await;
        if let Some(qemu) = &qemu
            && !paused
        {
            let_run(qemu).await?;
            announce_everywhere(agent, vm, &of_vm.definition).await;
            if let Err(error) = power::announce_self(&qemu.qmp).await {
                tracing::warn!(vm = %vm.name, error = chain(&error), "QEMU did not announce itself");
            }
        }
        of_vm.record = record;
        of_vm.migration = None;
        if let Some(qemu) = qemu {
            run::watch(agent, vm, &mut of_vm, qemu).await;
        }
        Ok(())
    }

    fn vm_record(&self, inner: &Inner) -> VmRecord {
        VmRecord {
            configuration: inner.definition.places.configuration.clone().unwrap_or_default(),
            epoch: inner.record.epoch,
            run: inner.record.run.clone(),
        }
    }
}

/// Lets the guest run. An error means that it surely did not.
async fn let_run(qemu: &Qemu) -> Outcome<()> {
    let doing = "running the guest at the destination";
    if !process::is_alive(&qemu.process) {
        return Err(Failure::internal(format!("{doing}: its QEMU ended; see qemu.log")));
    }
    let Err(refused) = power::cont(&qemu.qmp).await else { return Ok(()) };
    match power::query_status(&qemu.qmp).await {
        Ok(power::RunState::Running) => Ok(()),
        Ok(_) => Err(Failure::internal(format!("{doing}: {}", chain(&refused)))),
        // It ended while or after it ran: the VM is off, and here.
        Err(_) => Ok(()),
    }
}

/// After a restart: a VM that was owned and may not have been let run yet.
pub(crate) async fn go_on_as_owner(agent: &Arc<Agent>, vm: &Arc<Vm>, paused: bool) -> Outcome<()> {
    let inner = vm.lock().await;
    if let Some(qemu) = inner.qemu.as_ref().filter(|_| !paused) {
        let status = power::query_status(&qemu.qmp).await.or_fail("asking QEMU")?;
        if matches!(
            status,
            power::RunState::Paused | power::RunState::Inmigrate | power::RunState::Prelaunch
        ) {
            power::cont(&qemu.qmp).await.or_fail("running the guest at the destination")?;
            announce_everywhere(agent, vm, &inner.definition).await;
        }
    }
    Ok(())
}

async fn announce_everywhere(agent: &Agent, vm: &Vm, definition: &VmDefinition) {
    let addresses = vm.addresses.list();
    for nic in &definition.nics {
        if let (Some(mac), Some(link)) = (nic.mac, run::switch_link(agent, &nic.switch).await) {
            announce::announce(link, mac, &addresses);
        }
    }
}

async fn wait_received(inner: &mut Inner, with_ram: bool) -> Outcome<()> {
    let events = inner
        .events
        .as_mut()
        .ok_or_else(|| Failure::conflict("nothing was received for this migration yet"))?;
    let mut ram = !with_ram;
    let mut disks = false;
    while !(ram && disks) {
        match events.recv().await {
            Some(PlaneEvent::RamDelivered) => ram = true,
            Some(PlaneEvent::DisksEqual) => disks = true,
            Some(PlaneEvent::Failed(error)) => {
                return Err(Failure::internal(format!("receiving: {}", chain(&error))));
            }
            None => return Err(Failure::internal("the data plane ended")),
        }
    }
    Ok(())
}

async fn wait_loaded(qemu: &Qemu) -> Outcome<()> {
    loop {
        let status = migrate::status(&qemu.qmp)
            .await
            .or_fail("the destination's QEMU ended while it loaded the VM; see qemu.log")?;
        match status.status {
            MigrationStatus::Completed => return Ok(()),
            MigrationStatus::Failed | MigrationStatus::Cancelled => {
                return Err(Failure::internal(format!(
                    "the destination's QEMU could not load the VM: {}",
                    status.error_desc.unwrap_or_default()
                )));
            }
            _ => tokio::time::sleep(LOOK_EVERY).await,
        }
    }
}

async fn compare_fully(
    agent: &Agent,
    definition: &VmDefinition,
    ram_digest: Option<u128>,
    request: &ReadyRequest,
) -> Outcome<()> {
    let different = |what: &str| {
        Failure::internal(format!(
            "{what} differs between source and destination: nothing was handed over; this is a \
             fault in Limosa or in a host's memory or disk"
        ))
    };
    if let Some(theirs) = &request.full_ram_digest
        && ram_digest.map(verify::ram_text).as_ref() != Some(theirs)
    {
        return Err(different("RAM"));
    }
    if let Some(theirs) = &request.full_disk_digests {
        let own = definition.disks.iter().filter(|disk| disk.kind == DiskKind::Disk);
        for (disk, theirs) in own.zip(theirs) {
            if verify::disk(agent, disk).await? != *theirs {
                return Err(different(&format!("disk {}", disk.id)));
            }
        }
    }
    Ok(())
}
