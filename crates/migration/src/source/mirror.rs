//! `mirror`: QEMU copies each disk into an NBD export of this agent, whose
//! blocks cross on the channels; from `ready` on both sides stay equal.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use limosa_nbd::Export;
use limosa_nbd::server;
use limosa_plane::PlaneEvent;
use limosa_protocol::id::DiskId;
use limosa_protocol::plan::DiskItem;
use limosa_qemu::block::{self, MirrorSync};
use limosa_qemu::launch::disk_node;

use super::outgoing::{Outgoing, plane_failure};
use super::rate::{Rate, transfer};
use super::socket;
use super::undo::{end_mirrors, mirror_name};
use limosa_host::failure::{Failure, OrFail, Result};

/// How often progress is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// The same while the guest is paused.
const STOPPED_LOOK_EVERY: Duration = Duration::from_millis(1);
/// Least time for QEMU to answer.
const ANSWER_MIN: Duration = Duration::from_millis(100);
/// Longest wait, before the guest is stopped again, for what its disks are behind.
const CATCH_UP_MAX: Duration = Duration::from_secs(30);
/// What may be left then, for each disk.
const BEHIND_BYTES: u64 = 1 << 20;
/// Blocks that a mirror handles at a time, in bytes.
const GRANULARITY_BYTES: u32 = 64 << 10;

impl Outgoing {
    /// Waits until little is left of what the guest wrote, for it was stopped before for
    /// more; not for ever, as it may go on writing.
    pub(super) async fn catch_up(&mut self) -> Result<()> {
        let deadline = Instant::now() + CATCH_UP_MAX;
        while Instant::now() < deadline {
            self.check_exports()?;
            let jobs = self.answered(block::jobs(&self.qemu.qmp)).await?;
            let jobs = jobs.or_fail("asking QEMU for its mirrors")?;
            if jobs.iter().all(|job| job.len.saturating_sub(job.offset) <= BEHIND_BYTES) {
                break;
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        Ok(())
    }

    /// Waits until a stopped guest's disks are equal on both sides.
    pub(super) async fn wait_mirrored(&self) -> Result<()> {
        loop {
            let jobs = block::jobs(&self.qemu.qmp).await.or_fail("asking QEMU for its mirrors")?;
            if jobs.iter().all(|job| job.ready && job.offset >= job.len) {
                return Ok(());
            }
            tokio::time::sleep(STOPPED_LOOK_EVERY).await;
        }
    }

    pub(super) async fn mirror(&mut self) -> Result<()> {
        let disks: Vec<DiskItem> = self.plan().mirrored().cloned().collect();
        for (index, disk) in (0..).zip(&disks) {
            self.start_mirror(index, disk).await?;
        }
        self.wait_ready().await
    }

    /// Waits until all disks are equal, and stay so.
    pub(super) async fn wait_ready(&mut self) -> Result<()> {
        let disks = self.disk_ids();
        let mut rates: Vec<Rate> = disks.iter().map(|_| Rate::new()).collect();
        let mut wire = Rate::new();
        loop {
            self.check_exports()?;
            let jobs = self.answered(block::jobs(&self.qemu.qmp)).await?;
            let jobs = jobs.or_fail("asking QEMU for its mirrors")?;
            let mut all_ready = true;
            for (id, rate) in disks.iter().zip(&mut rates) {
                let name = mirror_name(id);
                let job = jobs.iter().find(|job| job.id == name).ok_or_else(|| {
                    Failure::internal(format!("the mirror of disk {id} ended by itself"))
                })?;
                if let Some(error) = &job.error {
                    return Err(Failure::internal(format!("mirroring disk {id}: {error}")));
                }
                all_ready &= job.ready;
                let moment = transfer(job.offset, job.len, rate);
                self.job.progress(|progress| {
                    progress.disks.insert(id.clone(), moment);
                });
            }
            self.report_moved(&mut wire);
            if all_ready {
                return Ok(());
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Waits for an answer of QEMU. It gives none, and its guest is paused, while it waits for
    /// what its mirrors have under way: before it stops the guest, and when the guest
    /// resets a disk. With the link slow or lost that may take forever, so the queues accept
    /// those writes past their limit once the guest was paused for its downtime limit.
    pub(super) async fn answered<T>(&self, ask: impl Future<Output = T>) -> Result<T> {
        let plane = self.plane()?;
        let mut ask = std::pin::pin!(ask);
        match tokio::time::timeout(self.downtime_limit().max(ANSWER_MIN), &mut ask).await {
            Ok(answer) => Ok(answer),
            Err(_elapsed) => {
                plane.set_backpressure(false);
                let answer = ask.await;
                plane.set_backpressure(true);
                Ok(answer)
            }
        }
    }

    pub(super) fn disk_ids(&self) -> Vec<DiskId> {
        self.plan().mirrored().map(|disk| disk.id.clone()).collect()
    }

    async fn start_mirror(&mut self, index: u16, disk: &DiskItem) -> Result<()> {
        let id = &disk.id;
        let doing = format!("mirroring disk {id}");
        let socket = self.mirror_socket(usize::from(index));
        let listener = socket::listen(&socket).or_fail(&doing)?;
        let plane = self.plane()?;
        let sink = plane.disk_sink(index).or_fail(&doing)?;
        let export = Export { name: id.to_string(), size_bytes: disk.virtual_bytes };
        self.exports.push(server::serve(listener, export, sink).or_fail(&doing)?);
        self.mirror_into(id, &socket, MirrorSync::Full).await
    }

    /// Starts QEMU's job, into an export that is served.
    async fn mirror_into(&self, id: &DiskId, socket: &Path, sync: MirrorSync) -> Result<()> {
        let (doing, name) = (format!("mirroring disk {id}"), mirror_name(id));
        let qmp = &self.qemu.qmp;
        block::add_nbd_node(qmp, &name, socket, id.as_str()).await.or_fail(&doing)?;
        block::start_mirror(qmp, &name, &disk_node(id.as_str()), &name, sync, GRANULARITY_BYTES)
            .await
            .or_fail(&doing)
    }

    /// Mirrors again what is not mirrored any more, before the guest runs on. A
    /// disk that was equal gets only what is written from now on.
    pub(super) async fn restart_mirrors(&mut self) -> Result<()> {
        block::activate_all(&self.qemu.qmp).await.or_fail("taking the disks back")?;
        end_mirrors(&self.qemu).await?;
        self.mirrors_end = false;
        for (index, id) in self.disk_ids().iter().enumerate() {
            let sync = if self.mirrored.remove(id) { MirrorSync::None } else { MirrorSync::Full };
            self.mirror_into(id, &self.mirror_socket(index), sync).await?;
        }
        Ok(())
    }

    fn mirror_socket(&self, index: usize) -> PathBuf {
        self.context.host.folders.runtime_of(&self.vm.name).join(format!("m{index}.sock"))
    }

    /// Fails when the data plane or an export failed.
    pub(super) fn check_exports(&mut self) -> Result<()> {
        if let Some(events) = &mut self.events {
            while let Ok(event) = events.try_recv() {
                if let PlaneEvent::Failed(error) | PlaneEvent::Different(error) = &event {
                    self.differs = matches!(event, PlaneEvent::Different(_));
                    return Err(plane_failure(error));
                }
            }
        }
        Ok(())
    }

    /// Tells what moved so far.
    pub(super) fn report_moved(&self, wire: &mut Rate) {
        let Some(plane) = &self.plane else { return };
        let moved = plane.moved();
        let per_second = wire.update(moved.wire_bytes);
        self.job.progress(|progress| {
            progress.moved = moved;
            progress.wire_bytes_per_second = per_second;
        });
    }
}
