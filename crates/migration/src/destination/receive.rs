//! Receiving: QEMU waits for its stream, the plane brings RAM and disks.

use std::fs::{OpenOptions, Permissions};
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;

use hyper::body::Bytes;
use limosa_nbd::client::NbdClient;
use limosa_plane::{
    DestinationDisk, DestinationPlane, DestinationSpec, EVENT_COUNT_MAX, Place, PlaneError,
    PlaneEvent, PlaneEvents, RamTarget,
};
use limosa_protocol::migration::Phase;
use limosa_protocol::peer::{self, FileReceived, Receive};
use limosa_qemu::launch::{RAM_BACKEND_ID, disk_node};
use limosa_qemu::{block, migrate, ram};
use tokio::sync::{mpsc, watch};

use super::channels::ConnectionGroup;
use super::place::removable;
use super::{Incoming, Inner};
use limosa_host::failure::{Failure, OrFail, Result, chain};
use limosa_host::token::random_token;
use limosa_host::vm::{files, run};

/// Where QEMU exports the disks, in the VM's folder for sockets.
pub(super) const NBD_SOCKET: &str = "nbd.sock";

/// What the plane needs of QEMU.
pub(super) struct Parts {
    pub(super) ram: Vec<RamTarget>,
    pub(super) disks: Vec<DestinationDisk>,
    pub(super) qemu_incoming: Option<std::os::unix::net::UnixStream>,
}

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
        let migrations = &self.migrations;
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
            super::free(migrations, &self.definition, None, &made).await;
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
            settings: self.migrations.settings.plane(),
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

/// Ends a plane's threads; nobody needs to wait for them.
pub(crate) fn end_plane(plane: Arc<DestinationPlane>) {
    plane.abort();
    std::thread::spawn(move || {
        if let Err(error) = plane.join() {
            tracing::debug!(%error, "the data plane's end");
        }
    });
}

/// Writes the next part of a file of a known size, and syncs the file once it is
/// whole. Returns the length that the file has then.
///
/// On a thread of its own and without a buffer: a part is answered only when the
/// kernel has it, since the next request looks at the file's length.
pub(super) async fn append(
    path: &Path,
    offset: u64,
    part: Bytes,
    size_bytes: u64,
) -> Result<FileReceived> {
    let path = path.to_owned();
    let write = move || append_blocking(&path, offset, &part, size_bytes);
    tokio::task::spawn_blocking(write).await.or_fail("receiving a file")?
}

fn append_blocking(path: &Path, offset: u64, part: &[u8], size_bytes: u64) -> Result<FileReceived> {
    let doing = format!("receiving {}", path.display());
    if size_bytes > peer::FILE_BYTES_MAX {
        return Err(Failure::bad_request(format!("{doing}: {size_bytes} bytes are too many")));
    }
    // The first part makes the file, in a folder that only the agent writes.
    let mut file = OpenOptions::new()
        .append(true)
        .create(offset == 0)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
        .or_fail(&doing)?;
    let here = file.metadata().or_fail(&doing)?.len();
    if offset < here {
        return Ok(FileReceived { received_bytes: here });
    }
    let received_bytes = offset.saturating_add(part.len() as u64);
    if offset > here || received_bytes > size_bytes {
        return Err(Failure::bad_request(format!(
            "{doing}: {} bytes at {offset} of {size_bytes} do not follow the {here} that are here",
            part.len()
        )));
    }
    // QEMU's user reads it, whatever the agent's umask is.
    file.set_permissions(Permissions::from_mode(0o644)).or_fail(&doing)?;
    file.write_all(part).or_fail(&doing)?;
    if received_bytes == size_bytes {
        file.sync_all().or_fail(&doing)?;
        files::sync_folder(path.parent().unwrap_or(path)).or_fail(&doing)?;
    }
    Ok(FileReceived { received_bytes })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: a part whose answer was lost changes nothing when it comes again, and
    /// nothing but the next part is taken.
    #[tokio::test]
    async fn a_file_grows_by_its_next_part_only() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kernel");
        let append = async |offset, part: &'static [u8]| {
            let received = append(&path, offset, Bytes::from_static(part), 6).await;
            received.map(|received| received.received_bytes).ok()
        };
        assert_eq!(append(0, b"abcd").await, Some(4));
        assert_eq!(append(0, b"abcd").await, Some(4));
        assert_eq!(append(5, b"f").await, None);
        assert_eq!(append(4, b"efg").await, None);
        assert_eq!(append(4, b"ef").await, Some(6));
        assert_eq!(append(4, b"ef").await, Some(6));
        assert_eq!(append(6, b"g").await, None);
        assert_eq!(std::fs::read(&path).unwrap(), b"abcdef");
        let too_large = peer::FILE_BYTES_MAX + 1;
        assert!(super::append(&path, 0, Bytes::new(), too_large).await.is_err());
    }

    /// Goal: what is answered is written: a part that follows at once never finds the file
    /// shorter than the answer before it.
    #[tokio::test]
    async fn a_part_is_answered_once_it_is_written() {
        let folder = tempfile::tempdir().unwrap();
        let (part, last) =
            (Bytes::from(vec![7; peer::FILE_PART_BYTES_MAX]), Bytes::from_static(b"x"));
        let part_bytes = part.len() as u64;
        let size_bytes = part_bytes + 1;
        for number in 0..50 {
            let path = folder.path().join(format!("kernel-{number}"));
            let first = append(&path, 0, part.clone(), size_bytes).await.unwrap();
            assert_eq!(first.received_bytes, part_bytes);
            assert_eq!(std::fs::metadata(&path).unwrap().len(), part_bytes);
            let whole = append(&path, part_bytes, last.clone(), size_bytes).await.unwrap();
            assert_eq!(whole.received_bytes, size_bytes);
        }
    }
}
