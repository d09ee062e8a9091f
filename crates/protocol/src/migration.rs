//! What can be said about one migration: request, problems, progress, summary.
//!
//! ```text
//! prepare ─► mirror ─► pre-copy ─► switchover ══commit══► retire ─► moved
//!    └──────────┴──────────┴───────────┘                    └─► in-doubt
//!                 stayed
//! ```

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::id::{DiskId, HostName, MigrationId, SwitchName, VmName};

/// Longest downtime to aim for when none is given, in milliseconds.
pub const DOWNTIME_LIMIT_MS_DEFAULT: u32 = 300;

/// Where a migration stands.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Both hosts are checked; nothing of the VM has moved
    Prepare,
    /// Disks are copied while the guest uses them
    Mirror,
    /// RAM is copied in rounds while the guest runs
    PreCopy,
    /// The guest is stopped here and runs there
    Switchover,
    /// The source frees what the VM held
    Retire,
}

impl Phase {
    /// The phase as everyone writes it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Prepare => "prepare",
            Self::Mirror => "mirror",
            Self::PreCopy => "pre-copy",
            Self::Switchover => "switchover",
            Self::Retire => "retire",
        }
    }
}

/// How a migration ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The VM is at the destination
    Moved,
    /// The VM is at the source, as before
    Stayed,
    /// The commit may have happened and the other host does not answer: the copy
    /// here is stopped, and the other host may run the VM
    InDoubt,
}

impl Outcome {
    /// The outcome as everyone writes it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Moved => "moved",
            Self::Stayed => "stayed",
            Self::InDoubt => "in-doubt",
        }
    }
}

/// Which half of a migration a host does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// The host that gives the VM
    Source,
    /// The host that receives it
    Destination,
}

impl Role {
    /// The role as everyone writes it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }
}

/// How a VM is to be moved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MoveRequest {
    /// Paired host to move to
    pub to: HostName,
    /// Folder at the destination for everything of the VM; default: its own VM folder
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub storage_path: Option<PathBuf>,
    /// Image paths at the destination of single disks
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schema(value_type = BTreeMap<String, String>)]
    pub disks: BTreeMap<DiskId, PathBuf>,
    /// Virtual switches of the source and what they are called at the destination
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schema(value_type = BTreeMap<String, String>)]
    pub switches: BTreeMap<SwitchName, SwitchName>,
    /// Longest downtime to aim for, in milliseconds
    #[serde(default = "default_downtime")]
    pub downtime_limit_ms: u32,
    /// How much is compared before the commit point
    #[serde(default)]
    pub verify: Verify,
    /// Keep the disk images at the source
    #[serde(default)]
    pub retain_source_disks: bool,
}

fn default_downtime() -> u32 {
    DOWNTIME_LIMIT_MS_DEFAULT
}

/// How much is compared before the commit point.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Verify {
    /// Digests that both hosts kept while they worked; costs no blackout
    #[default]
    Running,
    /// Besides, all of RAM and every disk are read again on both hosts while
    /// the guest is stopped; the blackout grows with the VM's size
    Full,
}

/// Something that stands against a move, and its remedy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// Which kind of problem
    pub code: ProblemCode,
    /// What is wrong, with names and numbers
    pub message: String,
    /// What to do about it
    pub remedy: String,
}

/// Kinds of problem that a comparison finds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ProblemCode {
    /// The destination has a VM of that name or identity
    NameTaken,
    /// A virtual switch is missing at the destination
    SwitchMissing,
    /// A MAC address is already in use at the destination
    MacTaken,
    /// Not enough disk space
    NoSpace,
    /// Not enough memory
    NoMemory,
    /// The destination's CPU lacks features of the VM's CPU model
    CpuFeatures,
    /// The destination's accelerator differs
    Accelerator,
    /// The destination's QEMU does not know the VM's machine type
    MachineType,
    /// The destination lacks the VM's firmware
    FirmwareMissing,
    /// QEMU of either host is too old, or lacks a command that Limosa needs
    QemuVersion,
    /// A file or device of the source host is attached
    HostAttached,
    /// A file of the VM is missing at the source, cannot be read, or is too large
    FileUnusable,
    /// A folder or file at the destination is in the way
    NotEmpty,
    /// A path at the destination cannot be used
    BadPath,
    /// The hosts are not paired
    NotPaired,
    /// What this host recorded of the other one cannot be read
    PairingDamaged,
    /// The peer could not be reached
    Unreachable,
    /// The peer answered, and refused to look
    Refused,
    /// The agents' versions do not understand each other
    PeerVersion,
    /// The VM is busy or in a condition that does not move
    Busy,
    /// The source and the destination are the same host
    SameHost,
    /// A kind that only a newer agent knows; the message says it
    #[serde(other)]
    Other,
}

/// Something that delays a move and does not stand against it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Note {
    /// Which kind of delay
    pub code: QueueReason,
    /// What delays it, with names and numbers
    pub message: String,
}

/// Why a move waits in the queue of its source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum QueueReason {
    /// As many migrations as possible are under way at the source
    SourceFull,
    /// As many migrations as possible are under way at the destination
    DestinationFull,
    /// The destination cannot be reached since the move was queued
    DestinationUnreachable,
}

/// A move that waits in the queue of its source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Queued {
    /// Why it waits
    pub code: QueueReason,
    /// The same with names and numbers
    pub reason: String,
    /// Since when, in milliseconds since 1970
    pub since_unix_ms: u64,
}

/// Bytes of one kind of work: how far, how fast, how long still.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize, ToSchema)]
pub struct Transfer {
    /// Bytes done
    pub done_bytes: u64,
    /// Bytes in all; may grow while the guest writes
    pub total_bytes: u64,
    /// Bytes done per second, lately
    pub rate_bytes_per_second: u64,
    /// Seconds until done at that rate, when known
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub left_seconds: Option<u64>,
}

/// What moved, by kind. Page counts are pages of 4 KiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct Moved {
    /// Pages that hold only zeroes: nothing or a mark was sent
    pub zero_pages: u64,
    /// Pages that were dirtied but equal what was sent before: nothing was sent
    pub unchanged_pages: u64,
    /// Pages sent as differences to the version sent before
    pub difference_pages: u64,
    /// Pages sent whole
    pub full_pages: u64,
    /// Bytes of all pages that were sent, their heads included, before compression
    pub ram_payload_bytes: u64,
    /// The same after compression
    pub ram_packed_bytes: u64,
    /// Those of differences alone before compression, their heads included
    #[serde(default)]
    pub difference_payload_bytes: u64,
    /// The same after compression, which packs all kinds together: their share
    #[serde(default)]
    pub difference_packed_bytes: u64,
    /// Those of full pages alone before compression, their heads included
    #[serde(default)]
    pub full_payload_bytes: u64,
    /// The same after compression, likewise
    #[serde(default)]
    pub full_packed_bytes: u64,
    /// Bytes of device state and other parts of QEMU's stream
    pub stream_bytes: u64,
    /// Disk bytes before compression, without holes
    pub disk_payload_bytes: u64,
    /// The same after compression
    pub disk_packed_bytes: u64,
    /// Disk bytes that are holes or zeroes: nothing or a mark was sent
    pub disk_zero_bytes: u64,
    /// All bytes given to the channels, headers included
    pub wire_bytes: u64,
    /// Those of them that were given again after the link was lost
    #[serde(default)]
    pub resent_bytes: u64,
}

/// A moment of a migration.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, ToSchema)]
pub struct Progress {
    /// Each disk's mirror
    #[schema(value_type = BTreeMap<String, Transfer>)]
    pub disks: BTreeMap<DiskId, Transfer>,
    /// RAM, this round and the ones before
    pub memory: Transfer,
    /// Pre-copy round, from 1
    pub round: u64,
    /// Pages of 4 KiB dirtied per second
    pub dirty_pages_per_second: u64,
    /// Bytes per second on the wire, lately
    pub wire_bytes_per_second: u64,
    /// What moved so far
    pub moved: Moved,
    /// While there is no link to the other host
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link_loss: Option<LinkLoss>,
    /// How often the link was lost so far
    #[serde(default)]
    pub link_loss_count: u32,
    /// How often the guest was stopped for its switchover, and let run on at the
    /// source because not everything arrived in time
    #[serde(default)]
    pub given_up_switchover_count: u32,
}

/// The link between the hosts is lost, and the migration waits for it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct LinkLoss {
    /// What broke
    pub reason: String,
    /// When, in milliseconds since 1970
    pub since_unix_ms: u64,
    /// When it is given up, in milliseconds since 1970
    pub until_unix_ms: u64,
}

/// The parts of a switchover, in milliseconds by the source agent's clock.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize, ToSchema)]
pub struct Downtime {
    /// vCPUs stopped, at the time that QEMU gives to it, until all mirrors had ended
    pub stop_ms: f64,
    /// The last pages, until the source's QEMU was done
    pub final_round_ms: f64,
    /// Until the destination had everything, loaded, equal, flushed and durable
    pub device_state_ms: f64,
    /// The source's durable record, which is the commit point
    pub commit_ms: f64,
    /// From the commit point until the destination said that it runs
    pub resume_ms: f64,
    /// The whole of it
    pub total_ms: f64,
}

/// One summary at the end.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, ToSchema)]
pub struct Summary {
    /// From the moment the VM was taken for the move, past the first check, to
    /// the end; of a move that a restarted agent settles, from that start
    pub total_ms: u64,
    /// Time spent in each phase
    #[schema(value_type = BTreeMap<String, u64>)]
    pub phase_ms: BTreeMap<Phase, u64>,
    /// What moved, by kind
    pub moved: Moved,
    /// vCPUs stopped until running, in parts; only of a move that succeeded, and
    /// missing if its guest did not run or an agent was restarted meanwhile
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime: Option<Downtime>,
    /// Pre-copy rounds
    pub rounds: u64,
    /// How often the link was lost and came back
    #[serde(default)]
    pub link_loss_count: u32,
    /// See [`Progress::given_up_switchover_count`]
    #[serde(default)]
    pub given_up_switchover_count: u32,
    /// What was compared before the commit point
    pub proofs: Vec<String>,
}

/// One migration as the agents tell it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Migration {
    /// The same number on both hosts
    pub id: MigrationId,
    /// The VM
    pub vm: VmName,
    /// Which half this host does
    pub role: Role,
    /// Host that gives the VM
    pub source: HostName,
    /// Host that receives it
    pub destination: HostName,
    /// Where it stands, or stood when it ended
    pub phase: Phase,
    /// How it ended; missing while it goes on
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome: Option<Outcome>,
    /// Why it did not end as wished, and what to do
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// While it waits for room and nothing of it has begun
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queued: Option<Queued>,
    /// Start, in milliseconds since 1970; of one that waited, when its wait was over
    pub started_unix_ms: u64,
    /// End, in milliseconds since 1970
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_unix_ms: Option<u64>,
    /// The latest moment
    pub progress: Progress,
    /// At the end
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub summary: Option<Summary>,
}

impl Migration {
    /// Its state in one word: how it ended, `queued`, or its phase.
    #[must_use]
    pub fn status(&self) -> &'static str {
        match (self.outcome, &self.queued) {
            (Some(outcome), _) => outcome.as_str(),
            (None, Some(_)) => "queued",
            (None, None) => self.phase.as_str(),
        }
    }
}
