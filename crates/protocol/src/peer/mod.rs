//! What two agents say to each other on the control link: HTTPS with JSON.
//!
//! The source asks, the destination answers:
//!
//! | # | request | body | answer |
//! |--:|---------|------|--------|
//! | 1 | `POST /peer/v1/compare` | [`Offer`] | [`OfferAnswer`] |
//! | 2 | `POST /peer/v1/migrations` | [`Offer`] | [`OfferAnswer`]; no problems: place is made |
//! | 3 | `PUT /peer/v1/migrations/{id}/files/{name}/{offset}` | a part of kernel, initial RAM disk or UEFI's variables | [`FileReceived`]; may be repeated |
//! | 4 | `POST /peer/v1/migrations/{id}/receive` | [`Receive`] | [`Receiving`]; channels may connect |
//! | 5 | `POST /peer/v1/migrations/{id}/verify` | [`VerifyRequest`] | [`Digests`], only with full verification |
//! | 6 | `POST /peer/v1/migrations/{id}/ready` | [`ReadyRequest`] | [`DestinationVote`] |
//! | 7 | `POST /peer/v1/migrations/{id}/commit` | [`Commit`] | [`DestinationVote`]; may be repeated |
//! | 8 | `POST /peer/v1/migrations/{id}/retired` | [`Retired`] | [`DestinationVote`]; may be repeated |
//! | – | `POST /peer/v1/migrations/{id}/retry` | [`RetryRequest`] | [`RetryStarted`]: 5 and 6 are tried again; may be repeated |
//! | – | `POST /peer/v1/migrations/{id}/stays` | [`Stays`] | [`DestinationVote`]; instead of 5 to 8, may be repeated |
//! | – | `GET /peer/v1/migrations/{id}` | | [`DestinationVote`] |
//! | – | `GET /peer/v1/offers/{id}` | | [`SourceDecision`]: the destination asks back |
//!
//! **Invariant.** Only [`DestinationVote::Ready`] allows the source to commit,
//! only [`Commit`] or [`SourceDecision::Commit`] the destination to run.

mod message;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::handover::Committed;
use crate::id::{Epoch, HostName, MigrationId, SwitchName};
use crate::migration::Problem;
use crate::plan::MigrationPlan;
use crate::vm::{Accelerator, Mac, NIC_COUNT_MAX, VmDefinition};

pub use message::{Message, Method, RetryPolicy};

/// Name of the ALPN protocol of data channels and return paths.
pub const CHANNEL_ALPN: &[u8] = b"limosa-channel/1";
/// Largest [`ChannelHello`], in bytes of JSON.
pub const CHANNEL_HELLO_BYTES_MAX: u16 = 1024;
/// Most data channels of one migration.
pub const CHANNEL_COUNT_MAX: u8 = 16;
/// Largest file that travels beside the disks (kernel, initial RAM disk, UEFI's
/// variables), in bytes.
pub const FILE_BYTES_MAX: u64 = 512 << 20;
/// Largest part of such a file in one request, in bytes. It is what a lost link
/// has sent again at most.
pub const FILE_PART_BYTES_MAX: usize = 4 << 20;

/// Most addresses that are remembered of one card of a guest.
pub const NIC_ADDRESS_COUNT_MAX: usize = 32;
/// Most addresses of one guest.
pub const GUEST_ADDRESS_COUNT_MAX: usize = NIC_COUNT_MAX * NIC_ADDRESS_COUNT_MAX;

/// A VM is offered to the destination.
///
/// `peer_version` stays where and what it is in every version to come: it is
/// read before the rest, which another version may have changed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Offer {
    /// Peer protocol of the source
    pub peer_version: u32,
    pub migration: MigrationId,
    pub source: HostName,
    /// The epoch at which the source owns the VM
    pub epoch: Epoch,
    /// The VM as it is at the source
    pub definition: VmDefinition,
    /// What moves, from where to where; the destination completes it with its own locations
    pub plan: MigrationPlan,
    /// Folder at the destination for everything of the VM; default: its own VM folder
    pub storage_path: Option<PathBuf>,
    /// Virtual switches of the source and their names at the destination
    pub switches: BTreeMap<SwitchName, SwitchName>,
    /// Version of the source's QEMU: major, minor, micro
    pub qemu_version: (u32, u32, u32),
    /// Accelerator of the VM's QEMU, or of the source when the VM is off
    pub accelerator: Accelerator,
    /// CPU features that the guest sees, for models that follow the host
    pub cpu_features: Vec<String>,
    /// CPU features of the model that the source lacks, so the guest does too
    pub cpu_lacking: Vec<String>,
    /// Files that travel beside the disks: name and size
    pub files: Vec<(String, u64)>,
}

/// What the destination says of an offer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OfferAnswer {
    /// Everything that stands against it
    pub problems: Vec<Problem>,
    /// No further migration may begin at the destination: it has not taken the offer, and the
    /// source tries later
    pub is_full: bool,
}

/// Everything is in place: get ready for channels.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Receive {
    /// Data channels that the source will open
    pub channel_count: u8,
}

/// The destination waits for channels.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Receiving {
    /// Presented by each channel; a secret of this migration
    pub token: String,
}

/// First message of a channel, after its TLS handshake: be16 length, then JSON.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ChannelHello {
    pub migration: MigrationId,
    /// The token of [`Receiving`]
    pub token: String,
    /// Which set of connections it belongs to, from 1; a later one takes the
    /// place of those before
    pub set: u32,
    /// What this connection is for
    pub role: ChannelRole,
}

/// The destination's answer to a hello: frames may follow.
pub const CHANNEL_ACCEPTED: u8 = 1;
/// The destination's answer to a hello: it has everything already.
pub const CHANNEL_NOT_NEEDED: u8 = 2;

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ChannelRole {
    /// Frames from the source to the destination
    Channel(u8),
    /// Acknowledgements from the destination to the source
    ReturnPath,
}

/// Read everything again, or a part of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyRequest {
    pub attempt: u32,
    /// Only this
    pub part: Option<Part>,
}

/// What really stands in RAM and images, read again while the guest is stopped:
/// digests of equal parts, see [`Part::cut`]. Of a [`Part`] only its own.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Digests {
    /// RAM, if it moves
    pub ram: Vec<String>,
    /// Each disk's content, in the definition's order
    pub disks: Vec<Vec<String>>,
}

/// A part of RAM or of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// Number of the disk in the definition's order; none for RAM
    pub disk: Option<u16>,
    /// Where it begins, in bytes
    pub from_bytes: u64,
    /// Where it ends, in bytes
    pub to_bytes: u64,
}

impl Part {
    /// Most parts that one is cut into.
    pub const COUNT_MAX: u64 = 256;

    /// Bytes of the smallest part: a page of RAM, or a block of a disk.
    #[must_use]
    pub fn unit_bytes(&self) -> u64 {
        if self.disk.is_some() { 64 << 10 } else { 4 << 10 }
    }

    /// Whether it is not worth cutting.
    #[must_use]
    pub fn is_smallest(&self) -> bool {
        self.to_bytes.saturating_sub(self.from_bytes) <= self.unit_bytes()
    }

    /// Its parts, all equal but for the last.
    pub fn cut(&self) -> impl Iterator<Item = Self> + use<> {
        let whole = *self;
        let bytes = whole.to_bytes.saturating_sub(whole.from_bytes);
        let step = bytes.div_ceil(Self::COUNT_MAX).next_multiple_of(whole.unit_bytes());
        let next = move |from: &u64| from.checked_add(step).filter(|from| *from < whole.to_bytes);
        std::iter::successors((bytes > 0).then_some(whole.from_bytes), next).map(
            move |from_bytes| Self {
                from_bytes,
                to_bytes: from_bytes.saturating_add(step).min(whole.to_bytes),
                ..whole
            },
        )
    }
}

/// Everything was sent: is it there?
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ReadyRequest {
    pub attempt: u32,
    /// The guest is to stay paused
    pub paused: bool,
    /// Addresses the guest was seen to use, newest first; of more than
    /// [`GUEST_ADDRESS_COUNT_MAX`] the rest is not looked at
    pub addresses: Vec<GuestAddress>,
}

/// The link was away for too long, and the guest runs on at the source: what the
/// destination's QEMU has loaded, or may have, is of no use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RetryRequest {
    pub attempt: u32,
}

/// The destination receives again, over new channels.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RetryStarted {
    /// Pages that it does not have any more, block and number of each: they are zero there
    pub changed: Vec<(u8, u32)>,
}

/// An address that a guest was seen to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestAddress {
    /// The card that used it
    pub mac: Mac,
    pub address: IpAddr,
}

/// How much of a file has arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileReceived {
    /// From its beginning; the next part begins there
    pub received_bytes: u64,
}

/// The source has handed over, durably: made of the proof of it, or read from the
/// wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Commit {
    epoch: Epoch,
}

impl Commit {
    /// Says what is proven.
    #[must_use]
    pub fn of(committed: &Committed) -> Self {
        Self { epoch: committed.epoch() }
    }

    /// The epoch handed over.
    #[must_use]
    pub fn epoch(self) -> Epoch {
        self.epoch
    }
}

/// The source has the VM, and keeps it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Stays {
    /// The epoch at which it owns the VM
    pub epoch: Epoch,
    pub reason: String,
}

/// The source is out of the VM for good.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Retired {
    /// The epoch at which the destination owns it
    pub epoch: Epoch,
}

/// What the destination has to say of the handover; see `docs/handover.md`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "vote")]
pub enum DestinationVote {
    /// No record of this migration: it never came here, or the records are lost
    Unknown,
    /// It receives, or is just about to decide: ask again
    Undecided,
    /// It holds everything, durably, and waits for the commit
    Ready {
        /// Epoch it would own
        epoch: Epoch,
        /// Of which attempt it holds everything
        attempt: u32,
    },
    /// It owns the VM, which runs or is off there
    Running {
        /// Epoch it owns
        epoch: Epoch,
    },
    /// It gave up, ran nothing and never will
    Declined {
        /// Epoch it gave up
        epoch: Epoch,
        reason: String,
    },
}

/// What the source has to say of the handover; see `docs/handover.md`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "decision")]
pub enum SourceDecision {
    /// No record of this migration: it never came here, or the records are lost
    Unknown,
    /// Nothing is decided yet: ask again
    Undecided,
    /// It has handed over, durably: run
    Commit(Commit),
    /// It has the VM: do not run it
    Stays {
        /// Epoch it owns
        epoch: Epoch,
    },
    /// It is out of the VM for good
    Retired {
        /// Epoch at which the destination owns it
        epoch: Epoch,
    },
}
