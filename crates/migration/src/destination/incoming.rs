//! The state of one migration at its destination, which all steps share.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;

use limosa_host::vm::{Qemu, Vm};
use limosa_plane::{DestinationDisk, PlaneError, PlaneEvent, RamTarget};
use limosa_protocol::id::HostName;
use limosa_protocol::migration::Phase;
use limosa_protocol::peer::{Offer, RetryStarted};
use limosa_protocol::plan::MigrationPlan;
use limosa_protocol::vm::VmDefinition;
use limosa_qemu::ram;
use tokio::sync::{Mutex, mpsc, watch};
use tracing::Span;

use super::connections::Connections;
use crate::context::Context;
use crate::handover::DestinationDriver;
use crate::job::Job;

/// Unit in which the kernel counts what a file takes.
const BLOCK_BYTES: u64 = 512;

/// What the plane needs of QEMU.
pub(super) struct Parts {
    pub(super) ram: Vec<RamTarget>,
    pub(super) disks: Vec<DestinationDisk>,
    pub(super) qemu_incoming: Option<std::os::unix::net::UnixStream>,
}

/// What one migration receives at its destination.
pub(crate) struct Incoming {
    pub(super) context: Arc<Context>,
    pub(super) job: Arc<Job>,
    pub(super) offer: Offer,
    pub(super) definition: VmDefinition,
    /// The plan of the offer with the locations of this host
    pub(super) plan: MigrationPlan,
    pub(super) vm: Arc<Vm>,
    pub(super) driver: Arc<DestinationDriver>,
    pub(super) connections: Connections,
    /// Whose turn it is to write a small file.
    pub(super) file_turn: Mutex<()>,
    /// The last attempt that the source began
    pub(super) attempt: watch::Sender<u32>,
    pub(super) inner: Mutex<Inner>,
}

/// What changes while it goes on.
#[derive(Default)]
pub(super) struct Inner {
    /// Folders and images that were made for the VM.
    pub(super) made: Vec<PathBuf>,
    pub(super) qemu: Option<Qemu>,
    /// What the plane is made of, until it is.
    pub(super) parts: Option<Parts>,
    pub(super) events: Option<mpsc::Receiver<PlaneEvent>>,
    /// Why the link is lost, while it is
    pub(super) lost: Option<watch::Sender<Option<PlaneError>>>,
    /// What the source was told of the attempt that began last
    pub(super) begun: Option<(u32, RetryStarted)>,
    pub(super) arrived: Arrived,
    /// Everything is here; with RAM that was read again, its digests.
    pub(super) settled: Option<Settled>,
}

/// What the plane said has come; kept, for who asks may be cut off and ask again.
#[derive(Default)]
pub(super) struct Arrived {
    pub(super) ram: bool,
    pub(super) disks: bool,
}

/// Everything is here, loaded and flushed.
#[derive(Clone)]
pub(super) struct Settled {
    /// Of RAM that was read again, by part.
    pub(super) ram_digests: Option<Vec<u128>>,
}

impl Incoming {
    /// The host that gives the VM.
    pub(crate) fn source(&self) -> &HostName {
        &self.offer.source
    }

    /// Bytes of guest memory that are still to come.
    pub(crate) fn memory_to_come_bytes(&self) -> u64 {
        if !self.plan.moves_memory() {
            return 0;
        }
        let total = self.definition.memory_bytes();
        // Whoever has the lock now lets QEMU start, or all of it has arrived.
        let Ok(inner) = self.inner.try_lock() else { return 0 };
        let filled = inner.qemu.as_ref().map_or(0, |qemu| {
            let size_bytes = qemu.accelerator.ram_bytes(total);
            let memory = ram::open(&qemu.process, size_bytes);
            let found = memory.ok().and_then(|memory| memory.metadata().ok());
            found.map_or(0, |found| found.blocks() * BLOCK_BYTES)
        });
        total.saturating_sub(filled)
    }

    /// Where images lie, and bytes of each that are still to come.
    pub(crate) fn images_to_come_bytes(&self) -> Vec<(PathBuf, u64)> {
        let to_come = self.plan.images_to_make().map(|(image, disk)| {
            let found = std::fs::metadata(&image.path);
            let here = found.map_or(0, |found| found.blocks() * BLOCK_BYTES);
            let bytes = disk.allocated_bytes.min(disk.virtual_bytes).saturating_sub(here);
            (image.path.clone(), bytes)
        });
        to_come.collect()
    }

    /// The span of this migration.
    pub(crate) fn span(&self) -> Span {
        self.job.span()
    }

    /// Notes a failure and declines: the source finds out when it asks, or by
    /// its channels.
    pub(super) async fn fail(&self, reason: String) {
        self.driver.give_up(&reason).await;
    }

    pub(super) fn enter(&self, phase: Phase) {
        self.job.enter(phase);
    }
}
