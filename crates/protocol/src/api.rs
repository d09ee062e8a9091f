//! What operators and the agent say to each other: HTTP with JSON.
//!
//! | request | body | answer |
//! |---------|------|--------|
//! | `GET /v1/host` | | [`Host`] |
//! | `GET /v1/vms` | | list of [`Vm`] |
//! | `POST /v1/vms` | [`crate::vm::VmDefinition`] | [`Vm`] |
//! | `GET`, `DELETE /v1/vms/{name}` | | [`Vm`] |
//! | `POST /v1/vms/{name}/start`, `pause`, `resume` | | [`Vm`] |
//! | `POST /v1/vms/{name}/stop` | [`StopRequest`] | [`Vm`] |
//! | `GET /v1/vms/{name}/console` | upgrade to [`CONSOLE_PROTOCOL`] | raw bytes both ways |
//! | `POST /v1/vms/{name}/compare` | [`crate::migration::MoveRequest`] | [`Comparison`] |
//! | `GET /v1/vms/{name}/recover` | | [`Recovery`] |
//! | `POST /v1/vms/{name}/recover` | [`RecoverRequest`] | [`Recovery`]; gives the VM to this host |
//! | `POST /v1/vms/{name}/move` | [`crate::migration::MoveRequest`] | [`crate::migration::Migration`] |
//! | `GET /v1/migrations` | | list of [`crate::migration::Migration`] |
//! | `GET /v1/migrations/{id}` | | [`crate::migration::Migration`] |
//! | `GET /v1/migrations/{id}/events` | | server-sent events, each a [`crate::migration::Migration`]; ends after the outcome |
//! | `POST /v1/migrations/{id}/cancel` | | [`crate::migration::Migration`] |
//! | `GET`, `POST /v1/switches` | [`Switch`] | list of [`Switch`], [`Switch`] |
//! | `DELETE /v1/switches/{name}` | | |
//! | `GET /v1/hosts` | | list of [`PairedHost`] |
//! | `POST /v1/hosts/invite` | | [`Invitation`] |
//! | `POST /v1/hosts/pair` | [`PairRequest`] | [`PairedHost`] |
//! | `DELETE /v1/hosts/{name}` | | |
//! | `GET`, `POST /v1/operators` | [`OperatorRequest`] | list of [`Operator`], [`Operator`] |
//! | `DELETE /v1/operators/{name}` | | |
//! | `GET /v1/openapi.json` | | OpenAPI 3.1 |
//!
//! Every failure is a [`Failure`] with a status of 400 and above.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::id::{Epoch, HostName, MigrationId, OperatorName, SwitchName, VmName};
use crate::migration::{Note, Problem, Role};
use crate::vm::{Accelerator, VmDefinition};

/// The agent's socket for commands on its own host.
pub const SOCKET_PATH: &str = "/run/limosa/limosad.sock";
/// The agent's TCP port for peers, data channels and remote operators.
pub const PORT: u16 = 6600;
/// Largest JSON body of a request, in bytes.
pub const BODY_BYTES_MAX: usize = 1 << 20;
/// Name in the `Upgrade` header of a console connection.
pub const CONSOLE_PROTOCOL: &str = "limosa-console";

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Failure {
    pub code: FailureCode,
    /// What went wrong
    pub message: String,
    /// What the operator can do about it, when that is known
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
    /// Each single problem, when a check found several
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<Problem>,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)?;
        if let Some(remedy) = &self.remedy {
            write!(f, ": {remedy}")?;
        }
        for problem in &self.problems {
            write!(f, "; {} ({})", problem.message, problem.remedy)?;
        }
        Ok(())
    }
}

/// Kinds of failure that callers treat differently. A code keeps its meaning; the list is in
/// `docs/wire.md`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum FailureCode {
    /// The request itself is wrong (400)
    BadRequest,
    /// The caller may not do this (403)
    Forbidden,
    /// Nothing of that name (404)
    NotFound,
    /// The host is not paired with this one (404)
    NotPaired,
    /// The present condition does not allow it (409)
    Conflict,
    /// A migration, its doubt or its owner keeps the VM from being changed (409)
    VmLocked,
    /// Checks found problems; nothing was touched (422)
    Problems,
    /// Something that should work did not (500)
    Internal,
    /// The state store failed: the agent must be restarted (500)
    StoreFailed,
    /// The record of a paired host cannot be read (500)
    PairingDamaged,
    /// Another host failed (502)
    PeerFailed,
    /// Another host did not answer; it may or may not have done the request (502)
    PeerUnreachable,
}

/// What a host is and can do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Host {
    pub name: HostName,
    /// Version of its agent
    pub version: String,
    /// Oldest and newest peer protocol it speaks
    pub peer_versions: (u32, u32),
    pub fingerprint: String,
    pub qemu: Qemu,
    /// Memory of the host, in bytes
    pub memory_bytes: u64,
    /// Memory not in use, in bytes
    pub memory_free_bytes: u64,
    pub switches: Vec<SwitchName>,
}

/// QEMU of a host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Qemu {
    #[schema(value_type = String)]
    pub binary: PathBuf,
    pub version: String,
    /// Accelerator of new VMs
    pub accelerator: Accelerator,
    /// Why that accelerator was chosen
    pub accelerator_reason: String,
}

/// Whether and how a VM runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Power {
    /// No QEMU
    Off,
    /// vCPUs run
    Running,
    /// vCPUs are stopped by an operator
    Paused,
    /// On its way to another host
    MovingOut,
    /// On its way from another host
    MovingIn,
    /// A handover waits for the other host, which may run the VM; this copy is stopped
    InDoubt,
    /// An operator gave the VM to another host; this old copy is never started
    GivenUp,
    /// QEMU reports a fault (disk error, guest panic)
    Fault,
}

/// A VM as the agent sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Vm {
    /// Everything that makes it
    pub definition: VmDefinition,
    /// Whether and how it runs
    pub power: Power,
    /// Grows with each owner
    pub epoch: Epoch,
    /// Process of its QEMU
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// Accelerator of its QEMU, when it runs
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accelerator: Option<Accelerator>,
    /// Its migration under way
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration: Option<MigrationId>,
    /// Addresses it was seen to use, newest first
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(value_type = Vec<String>)]
    pub addresses: Vec<std::net::IpAddr>,
    /// What is wrong, when something is
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fault: Option<String>,
    /// What this host cannot settle by itself now, and what would
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub doubt: Option<String>,
    /// The host to which an operator gave the VM
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub given_up_to: Option<HostName>,
}

/// What is known of a handover that is not settled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Recovery {
    pub vm: VmName,
    pub migration: MigrationId,
    /// Which half this host does
    pub role: Role,
    /// State of this host's half, as in docs/handover.md
    pub state: String,
    /// What has become of the guest on this host
    pub guest: String,
    /// What cannot be settled now, and what would settle it
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub doubt: Option<String>,
    pub peer_name: HostName,
    /// What it says, asked just now
    pub peer: RecoveryPeer,
    /// What forcing this host as the owner risks
    pub risk: String,
    /// Whether there is anything that an operator could decide here
    pub may_force: bool,
}

/// What the other host says of a handover.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RecoveryPeer {
    /// Whether it answers at all
    pub answers: bool,
    /// It answers, and has never heard of the migration
    pub has_lost_records: bool,
    /// What it says, or why it could not be asked
    pub says: String,
}

/// An operator's decision on a handover.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RecoverRequest {
    /// The VM's name once more, so that no other VM is forced by a slip
    pub confirm: VmName,
}

/// How to stop a VM.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StopRequest {
    /// Turn it off at once; the guest is not asked
    #[serde(default)]
    pub force: bool,
    /// How long to wait for the guest, in seconds
    #[serde(default = "default_stop_timeout")]
    pub timeout_seconds: u32,
}

fn default_stop_timeout() -> u32 {
    60
}

/// What stands against a move; empty when nothing does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Comparison {
    pub vm: VmName,
    /// The host it was compared with
    pub to: HostName,
    /// Everything that was found
    pub problems: Vec<Problem>,
    /// Why the move would have to wait; empty when it would begin at once
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<Note>,
}

/// A virtual switch: a Linux bridge made by the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Switch {
    pub name: SwitchName,
    /// Network interface of the host that joins it to a network
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uplink: Option<String>,
    /// The bridge's name; given by the agent
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bridge: Option<String>,
}

/// A host that this one trusts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PairedHost {
    pub name: HostName,
    /// Where its agent answers, `ADDRESS:PORT`; of one that called, where it called
    /// from, with the port it told
    pub address: String,
    pub fingerprint: String,
}

/// A one-time code with which another host may pair.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Invitation {
    /// To be typed at the other host
    pub code: String,
    /// End of its life, in seconds since 1970
    pub expires_unix_s: u64,
}

/// Wish to pair with another host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PairRequest {
    /// `ADDRESS` or `ADDRESS:PORT` of the other agent
    pub address: String,
    /// The code that the other host shows
    pub code: String,
}

/// Wish to let an operator's certificate in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct OperatorRequest {
    /// Name for the operator
    pub name: OperatorName,
    /// The operator's certificate, PEM
    pub certificate_pem: String,
}

/// An operator who may command this agent from afar.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Operator {
    pub name: OperatorName,
    pub fingerprint: String,
}
