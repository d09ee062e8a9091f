//! `switchover` here: from the last byte to *ready*, and to a running guest.

use std::time::Duration;

use limosa_plane::PlaneEvent;
use limosa_protocol::migration::{Phase, Role};
use limosa_protocol::peer::{DestinationVote, Digests, Part, ReadyRequest, VerifyRequest};
use limosa_qemu::block;
use limosa_qemu::migrate::{self, MigrationStatus};

use super::incoming::{Incoming, Inner, Settled};
use super::verify;
use limosa_host::failure::{Failure, OrFail, Result, chain};
use limosa_host::vm::{Qemu, run};

/// How often QEMU is asked whether it has loaded everything; an event would
/// come as fast, and can be lost.
const LOOK_EVERY: Duration = Duration::from_millis(2);

impl Incoming {
    /// Reads everything again that is here, or a part of it; only once all of it
    /// is.
    pub(crate) async fn verify(&self, request: &VerifyRequest) -> Result<Digests> {
        let mut inner = self.inner.lock().await;
        self.driver.expect_preparing()?;
        let read = tokio::select! {
            biased;
            () = self.is_over(request.attempt) => Ok(None),
            read = self.read_contents(&mut inner, request.part) => read.map(Some),
        };
        match read {
            Ok(Some(digests)) => Ok(digests),
            Ok(None) => Err(Failure::conflict("the source tries again")),
            Err(failure) => {
                drop(inner);
                self.fail(failure.to_string()).await;
                Err(failure)
            }
        }
    }

    async fn read_contents(&self, inner: &mut Inner, part: Option<Part>) -> Result<Digests> {
        let settled = self.settle(inner).await?;
        let contents = verify::Contents {
            img: &self.context.host.qemu.img,
            definition: &self.definition,
            qemu: inner.qemu.as_ref(),
            plan: &self.plan,
            side: Role::Destination,
        };
        if let Some(part) = part {
            return contents.part(part).await;
        }
        // RAM as it was before devices were loaded into it.
        let ram = settled.ram_digests.unwrap_or_default();
        let ram = ram.into_iter().map(verify::ram_text).collect();
        Ok(Digests { ram, disks: contents.disks().await? })
    }

    /// Answers once the whole VM is here, equal, and durably so.
    pub(crate) async fn ready(&self, request: &ReadyRequest) -> DestinationVote {
        let mut inner = self.inner.lock().await;
        if self.driver.expect_preparing().is_err() {
            return self.driver.vote().await;
        }
        let became = tokio::select! {
            biased;
            () = self.is_over(request.attempt) => Ok(false),
            became = self.become_ready(&mut inner, request) => became.map(|()| true),
        };
        match became {
            Ok(true) => self.driver.complete(request.attempt, request.paused).await,
            Ok(false) => self.driver.vote().await,
            Err(failure) => self.driver.give_up(&failure.to_string()).await,
        }
    }

    async fn become_ready(&self, inner: &mut Inner, request: &ReadyRequest) -> Result<()> {
        self.enter(Phase::Switchover);
        self.settle(inner).await?;
        self.vm.addresses.take(&request.addresses, &self.definition.nics);
        Ok(())
    }

    /// Waits until all has arrived, is loaded, and the disks are flushed and
    /// closed to the source. Once an attempt.
    async fn settle(&self, inner: &mut Inner) -> Result<Settled> {
        if let Some(settled) = &inner.settled {
            return Ok(settled.clone());
        }
        wait_received(inner, self.plan.moves_memory()).await?;
        let qemu =
            inner.qemu.clone().ok_or_else(|| Failure::internal("there is no QEMU to load"))?;
        // QEMU has its whole stream: the plane lets go while it is loaded.
        tokio::try_join!(self.rest(inner), async {
            if self.plan.moves_memory() { wait_loaded(&qemu).await } else { Ok(()) }
        },)?;
        let doing = "closing the destination's disks to the source";
        block::stop_nbd_server(&qemu.qmp).await.or_fail(doing)?;
        if !self.plan.moves_memory() {
            // Nothing was loaded into it: it only held the images open.
            run::end(&qemu).await?;
            inner.qemu = None;
            self.driver.forget_reader().await;
        }
        let ram_digests = self.driver.plane().and_then(|plane| plane.ram_digests());
        Ok(inner.settled.insert(Settled { ram_digests }).clone())
    }
}

async fn wait_received(inner: &mut Inner, with_ram: bool) -> Result<()> {
    let Inner { arrived, events, .. } = inner;
    let events = events
        .as_mut()
        .ok_or_else(|| Failure::conflict("nothing was received for this migration yet"))?;
    while !(arrived.disks && (arrived.ram || !with_ram)) {
        match events.recv().await {
            Some(PlaneEvent::RamDelivered) => arrived.ram = true,
            Some(PlaneEvent::DisksEqual(_)) => arrived.disks = true,
            // Told to sources, or to others here.
            Some(PlaneEvent::Different(_) | PlaneEvent::LinkLost(_) | PlaneEvent::LinkBack) => {}
            Some(PlaneEvent::Failed(error)) => {
                return Err(Failure::internal(format!("receiving: {}", chain(&error))));
            }
            None => return Err(Failure::internal("the data plane ended")),
        }
    }
    Ok(())
}

async fn wait_loaded(qemu: &Qemu) -> Result<()> {
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
