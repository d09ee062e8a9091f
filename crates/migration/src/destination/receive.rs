//! Receiving: QEMU waits for its stream, the plane brings RAM and disks.

use std::sync::Arc;

use limosa_nbd::client::NbdClient;
use limosa_plane::{
    DestinationDisk, DestinationPlane, DestinationSpec, EVENT_COUNT_MAX, Place, PlaneError,
    PlaneEvent, PlaneEvents, RamTarget,
};
use limosa_protocol::migration::Phase;
use limosa_protocol::peer::{self, Receive};
use limosa_qemu::launch::{RAM_BACKEND_ID, disk_node};
use limosa_qemu::{block, migrate, ram};
use tokio::sync::{mpsc, watch};

use super::connections::ConnectionGroup;
use super::guest::NBD_SOCKET;
use super::incoming::{Incoming, Inner, Parts};
use super::undo::removable;
use limosa_host::failure::{Failure, OrFail, Result, chain};
use limosa_host::token::random_token;
use limosa_host::vm::run;

impl Incoming {
    /// What a plane's failure is told as.
    fn receiving_failed(&self, error: &PlaneError) -> String {
        let disk = |number: u16| {
            let mut mirrored = self.plan.mirrored();
            mirrored.nth(number.into()).map_or_else(String::new, |disk| disk.id.to_string())
        };
        match error {
            PlaneError::Different {
                place: Place::Range { disk: number, from_bytes, to_bytes },
                ..
            } => format!(
                "source and destination differ in disk {}, first in bytes {from_bytes} to \
                 {to_bytes}",
                disk(*number)
            ),
            PlaneError::Different { place, .. } => {
                format!("source and destination differ in {place}")
            }
            error => format!("receiving: {}", chain(error)),
        }
    }

    /// Starts QEMU and gets ready for channels; answers their token.
    pub(crate) async fn receive(self: &Arc<Self>, request: &Receive) -> Result<peer::Receiving> {
        if !(1..=peer::CHANNEL_COUNT_MAX).contains(&request.channel_count) {
            return Err(Failure::bad_request(format!(
                "{} channels: 1 to {} are possible",
                request.channel_count,
                peer::CHANNEL_COUNT_MAX
            )));
        }
        let mut inner = self.inner.lock().await;
        self.driver.expect_preparing()?;
        if let Some((token, channel_count)) = self.connections.expected() {
            if channel_count != request.channel_count {
                return Err(Failure::conflict("this migration receives already"));
            }
            // The answer was lost, and the source asks again.
            return Ok(peer::Receiving { token });
        }
        let started = async {
            let parts = self.start_qemu(&mut inner).await?;
            Ok::<_, Failure>((parts, random_token()?))
        };
        match started.await {
            Ok((parts, token)) => {
                inner.parts = Some(parts);
                self.connections.expect(token.clone(), request.channel_count);
                drop(inner);
                self.spawn_channel_watch();
                Ok(peer::Receiving { token })
            }
            Err(failure) => {
                drop(inner);
                self.fail(failure.to_string()).await;
                Err(failure)
            }
        }
    }

    /// Starts a QEMU that waits for what comes.
    pub(super) async fn start_qemu(&self, inner: &mut Inner) -> Result<Parts> {
        let migrations = &self.context;
        let launched = run::launch(&migrations.host, &self.definition, true).await;
        let noted = match launched {
            Ok(qemu) => match self.driver.note_qemu(&qemu).await {
                Ok(()) => Ok(qemu),
                Err(failure) => {
                    // Given up meanwhile: nobody else knows of it.
                    run::end(&qemu).await?;
                    Err(failure)
                }
            },
            failed => failed,
        };
        if noted.is_err() && !self.driver.still_prepares().await {
            // What was made by a launch that went on after all else was freed.
            let made = removable(&self.plan, inner.made.clone());
            super::undo::free(&self.context.host.folders, &self.definition, None, &made).await;
        }
        let qemu = noted?;
        inner.qemu = Some(qemu.clone());
        let doing = "preparing QEMU at the destination";
        let runtime = migrations.host.folders.runtime_of(&self.definition.name);
        let nbd = runtime.join(NBD_SOCKET);
        block::start_nbd_server(&qemu.qmp, &nbd).await.or_fail(doing)?;
        let mut disks = Vec::new();
        for disk in self.plan.mirrored() {
            let id = disk.id.as_str();
            block::export(&qemu.qmp, &export_id(id), &disk_node(id), id, true)
                .await
                .or_fail(doing)?;
            let client = NbdClient::connect(&nbd, id).or_fail(doing)?;
            if client.size_bytes() != disk.virtual_bytes {
                return Err(Failure::internal(format!(
                    "disk {id} has {} bytes here and {} at the source",
                    client.size_bytes(),
                    disk.virtual_bytes
                )));
            }
            let early = NbdClient::connect(&nbd, id).or_fail(doing)?;
            disks.push(DestinationDisk { target: Box::new(client), early: Some(Box::new(early)) });
        }
        let mut ram = Vec::new();
        let mut qemu_incoming = None;
        if self.plan.moves_memory() {
            migrate::prepare_destination(&qemu.qmp).await.or_fail(doing)?;
            let socket = runtime.join("incoming.sock");
            migrate::start_incoming(&qemu.qmp, &socket).await.or_fail(doing)?;
            qemu_incoming = Some(std::os::unix::net::UnixStream::connect(&socket).or_fail(doing)?);
            let size_bytes = qemu.accelerator.ram_bytes(self.definition.memory_bytes());
            ram.push(RamTarget {
                name: RAM_BACKEND_ID.to_owned(),
                size_bytes,
                memfd: ram::open(&qemu.process, size_bytes).or_fail(doing)?,
            });
        }
        Ok(Parts { ram, disks, qemu_incoming })
    }

    /// All channels are there: bytes may come.
    pub(super) async fn start_plane(self: &Arc<Self>, set: ConnectionGroup) -> Result<()> {
        let mut inner = self.inner.lock().await;
        let Some(parts) = inner.parts.take() else {
            // Two sets came at the same time, or all has arrived.
            return match self.driver.reconnect(set) {
                None => Ok(()),
                Some(_) => Err(Failure::conflict("nothing is received any more")),
            };
        };
        let spec = DestinationSpec {
            channels: set.channels,
            return_path: set.return_path,
            ram: parts.ram,
            disks: parts.disks,
            qemu_incoming: parts.qemu_incoming,
            settings: self.context.settings.plane(),
            read_back: self.plan.verifies_fully(),
        };
        let (plane, from_plane) =
            DestinationPlane::start(spec).or_fail("starting the data plane")?;
        self.driver.hold_plane(plane);
        let (sender, events) = mpsc::channel(EVENT_COUNT_MAX);
        let (lost, losses) = watch::channel(None);
        inner.lost = Some(lost.clone());
        self.job.spawn(Arc::clone(self).take_events(from_plane, lost, sender));
        self.spawn_link_watch(losses);
        inner.events = Some(events);
        self.enter(Phase::Mirror);
        Ok(())
    }
}

impl Incoming {
    /// Takes the plane's events until it is gone: a failure ends the migration, the link's
    /// state goes to `lost`, all others to `others`.
    async fn take_events(
        self: Arc<Self>,
        mut events: PlaneEvents,
        lost: watch::Sender<Option<PlaneError>>,
        others: mpsc::Sender<PlaneEvent>,
    ) {
        while let Some(event) = events.recv().await {
            match event {
                PlaneEvent::LinkLost(error) => drop(lost.send_replace(Some(error))),
                PlaneEvent::LinkBack => drop(lost.send_replace(None)),
                event => {
                    let failed = match &event {
                        PlaneEvent::Failed(error) => Some(self.receiving_failed(error)),
                        _ => None,
                    };
                    if others.send(event).await.is_err() {
                        tracing::debug!("a plane event came after the migration's end");
                    }
                    if let Some(reason) = failed {
                        self.fail(reason).await;
                    }
                }
            }
        }
    }
}

/// Name of a disk's export.
fn export_id(disk: &str) -> String {
    format!("export-{disk}")
}
