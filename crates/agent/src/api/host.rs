//! The host itself, the hosts it is paired with, and its operators.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use limosa_auth::trust::certificate_from_pem;
use limosa_auth::{Fingerprint, PeerRole, TrustedPeer};
use limosa_protocol::api::{
    self, Failure as ApiFailure, Host, Invitation, Operator, OperatorRequest, PairRequest,
    PairedHost, Switch,
};
use limosa_protocol::id::{HostName, OperatorName};
use limosa_protocol::version::{PEER_VERSION, PEER_VERSION_MIN};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::{Body, Named, Shared};
use crate::agent::Agent;
use crate::failure::{Failure, OrFail, Result};
use crate::hex::encode_hex;
use crate::host::wire_accelerator;
use crate::pairing;
use crate::store::OperatorRecord;

pub(super) fn routes() -> OpenApiRouter<Arc<Agent>> {
    OpenApiRouter::new()
        .routes(routes!(show))
        .routes(routes!(hosts))
        .routes(routes!(invite))
        .routes(routes!(pair))
        .routes(routes!(unpair))
        .routes(routes!(operators, add_operator))
        .routes(routes!(remove_operator))
}

/// What this host is and can do
#[utoipa::path(get, path = "/v1/host", tag = "host", responses((status = 200, body = Host)))]
async fn show(State(agent): Shared) -> Result<Json<Host>> {
    let memory = memory().or_fail("reading /proc/meminfo")?;
    let switches = agent.host.store.all::<Switch>()?;
    Ok(Json(Host {
        name: agent.host.name.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        peer_versions: (PEER_VERSION_MIN, PEER_VERSION),
        fingerprint: agent.identity.fingerprint().to_string(),
        qemu: api::Qemu {
            binary: agent.host.qemu.binary.clone(),
            version: agent.host.qemu.facts.version.to_string(),
            accelerator: wire_accelerator(agent.host.qemu.accelerator),
            accelerator_reason: agent.host.qemu.accelerator_reason.clone(),
        },
        memory_bytes: memory.0,
        memory_free_bytes: memory.1,
        switches: switches.into_iter().map(|(_, switch)| switch.name).collect(),
    }))
}

/// Memory of the host and what of it is available, in bytes.
pub(crate) fn memory() -> std::io::Result<(u64, u64)> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let field = |name: &str| {
        text.lines()
            .find_map(|line| {
                line.strip_prefix(name)?.split_whitespace().next()?.parse::<u64>().ok()
            })
            .map_or(0, |kib| kib << 10)
    };
    Ok((field("MemTotal:"), field("MemAvailable:")))
}

/// Hosts that this one is paired with
#[utoipa::path(get, path = "/v1/hosts", tag = "host", responses((status = 200, body = Vec<PairedHost>)))]
async fn hosts(State(agent): Shared) -> Result<Json<Vec<PairedHost>>> {
    pairing::list(&agent).map(Json)
}

/// Open an invitation: a one-time code with which one other host may pair
#[utoipa::path(post, path = "/v1/hosts/invite", tag = "host", responses((status = 200, body = Invitation)))]
async fn invite(State(agent): Shared) -> Result<Json<Invitation>> {
    pairing::invite(&agent).map(Json)
}

/// Pair with the host that shows the code
#[utoipa::path(post, path = "/v1/hosts/pair", tag = "host", request_body = PairRequest,
    responses((status = 200, body = PairedHost), (status = 409, body = ApiFailure), (status = 502, body = ApiFailure)))]
async fn pair(State(agent): Shared, Body(request): Body<PairRequest>) -> Result<Json<PairedHost>> {
    pairing::pair(&agent, &request).await.map(Json)
}

/// Stop trusting a host
#[utoipa::path(delete, path = "/v1/hosts/{name}", tag = "host", params(("name" = String, Path)),
    responses((status = 200), (status = 404, body = ApiFailure), (status = 409, body = ApiFailure)))]
async fn unpair(State(agent): Shared, Named(name): Named<HostName>) -> Result<Json<()>> {
    if let Some(migration) = agent.migrations.under_way_with(&name) {
        let (id, vm) = (migration.id, migration.vm);
        return Err(Failure::conflict(match migration.outcome {
            None => format!(
                "a migration with {name} is under way: end it with `limosa migration cancel {id}`"
            ),
            Some(_) => format!(
                "the last move of VM {vm} waits for the word of {name}: if that host is gone for \
                 good, `limosa vm recover {vm}` says what to do without it"
            ),
        }));
    }
    pairing::unpair(&agent, &name).map(Json)
}

/// Operators who may command from afar
#[utoipa::path(get, path = "/v1/operators", tag = "host", responses((status = 200, body = Vec<Operator>)))]
async fn operators(State(agent): Shared) -> Result<Json<Vec<Operator>>> {
    let records = agent.host.store.all::<OperatorRecord>()?;
    let operators = records.into_iter().map(|(name, record)| {
        let name = name.parse().or_fail("reading the state store")?;
        Ok(Operator { name, fingerprint: record.fingerprint })
    });
    operators.collect::<Result<Vec<_>>>().map(Json)
}

/// Let an operator's certificate in
#[utoipa::path(post, path = "/v1/operators", tag = "host", request_body = OperatorRequest,
    responses((status = 200, body = Operator), (status = 400, body = ApiFailure), (status = 409, body = ApiFailure)))]
async fn add_operator(
    State(agent): Shared,
    Body(request): Body<OperatorRequest>,
) -> Result<Json<Operator>> {
    let der = certificate_from_pem(&request.certificate_pem).map_err(|error| {
        Failure::bad_request(format!(
            "{error}: send the file that `limosa operator identity` names"
        ))
    })?;
    let fingerprint = Fingerprint::of_certificate(&der);
    let name = request.name;
    if agent.host.store.get::<OperatorRecord>(name.as_str())?.is_some() {
        return Err(Failure::conflict(format!(
            "there is an operator {name} already: remove that one first, or take another name"
        )));
    }
    if let Some(known) = agent.trust.lookup(&fingerprint) {
        return Err(Failure::conflict(format!(
            "that certificate is {}'s already: give each operator one of their own",
            known.name
        )));
    }
    agent
        .trust
        .insert(TrustedPeer::new(name.to_string(), PeerRole::Operator, der.clone()))
        .map_err(|error| Failure::conflict(error.to_string()))?;
    let record =
        OperatorRecord { fingerprint: fingerprint.to_string(), certificate_hex: encode_hex(&der) };
    if let Err(error) = agent.host.store.put(name.as_str(), &record) {
        agent.trust.remove(name.as_str());
        return Err(error.into());
    }
    Ok(Json(Operator { name, fingerprint: record.fingerprint }))
}

/// Let an operator in no more
#[utoipa::path(delete, path = "/v1/operators/{name}", tag = "host", params(("name" = String, Path)),
    responses((status = 200), (status = 404, body = ApiFailure)))]
async fn remove_operator(
    State(agent): Shared,
    Named(name): Named<OperatorName>,
) -> Result<Json<()>> {
    if agent.host.store.get::<OperatorRecord>(name.as_str())?.is_none() {
        return Err(Failure::not_found(format!("no operator {name}")));
    }
    agent.trust.remove(name.as_str());
    agent.host.store.remove::<OperatorRecord>(name.as_str())?;
    Ok(Json(()))
}
