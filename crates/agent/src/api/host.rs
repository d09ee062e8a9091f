//! The host itself, the hosts it is paired with, and its operators.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use limosa_protocol::api::{
    self, Failure as ApiFailure, Host, Invitation, Operator, OperatorRequest, PairRequest,
    PairedHost, Switch,
};
use limosa_protocol::id::{HostName, OperatorName};
use limosa_protocol::version::{PEER_VERSION, PEER_VERSION_MIN};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::extract::{Body, Named, Shared};
use super::failure::Result;
use crate::agent::Agent;
use crate::{operators, pairing};
use limosa_host::failure::OrFail;
use limosa_host::memory::Memory;
use limosa_host::wire_accelerator;

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
    let memory = Memory::read().or_fail("reading /proc/meminfo")?;
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
        memory_bytes: memory.total_bytes,
        memory_free_bytes: memory.available_bytes,
        switches: switches.into_iter().map(|(_, switch)| switch.name).collect(),
    }))
}

/// Hosts that this one is paired with
#[utoipa::path(get, path = "/v1/hosts", tag = "host", responses((status = 200, body = Vec<PairedHost>)))]
async fn hosts(State(agent): Shared) -> Result<Json<Vec<PairedHost>>> {
    Ok(Json(pairing::list(&agent)?))
}

/// Open an invitation: a one-time code with which one other host may pair
#[utoipa::path(post, path = "/v1/hosts/invite", tag = "host", responses((status = 200, body = Invitation)))]
async fn invite(State(agent): Shared) -> Result<Json<Invitation>> {
    Ok(Json(pairing::invite(&agent)?))
}

/// Pair with the host that shows the code
#[utoipa::path(post, path = "/v1/hosts/pair", tag = "host", request_body = PairRequest,
    responses((status = 200, body = PairedHost), (status = 409, body = ApiFailure), (status = 502, body = ApiFailure)))]
async fn pair(State(agent): Shared, Body(request): Body<PairRequest>) -> Result<Json<PairedHost>> {
    Ok(Json(pairing::pair(&agent, &request).await?))
}

/// Stop trusting a host
#[utoipa::path(delete, path = "/v1/hosts/{name}", tag = "host", params(("name" = String, Path)),
    responses((status = 200), (status = 404, body = ApiFailure), (status = 409, body = ApiFailure)))]
async fn unpair(State(agent): Shared, Named(name): Named<HostName>) -> Result<Json<()>> {
    Ok(Json(pairing::unpair(&agent, &name)?))
}

/// Operators who may command from afar
#[utoipa::path(get, path = "/v1/operators", tag = "host", responses((status = 200, body = Vec<Operator>)))]
async fn operators(State(agent): Shared) -> Result<Json<Vec<Operator>>> {
    Ok(Json(operators::list(&agent.host.store)?))
}

/// Let an operator's certificate in
#[utoipa::path(post, path = "/v1/operators", tag = "host", request_body = OperatorRequest,
    responses((status = 200, body = Operator), (status = 400, body = ApiFailure), (status = 409, body = ApiFailure)))]
async fn add_operator(
    State(agent): Shared,
    Body(request): Body<OperatorRequest>,
) -> Result<Json<Operator>> {
    Ok(Json(operators::add(&agent.host.store, &agent.trust, request)?))
}

/// Let an operator in no more
#[utoipa::path(delete, path = "/v1/operators/{name}", tag = "host", params(("name" = String, Path)),
    responses((status = 200), (status = 404, body = ApiFailure)))]
async fn remove_operator(
    State(agent): Shared,
    Named(name): Named<OperatorName>,
) -> Result<Json<()>> {
    Ok(Json(operators::remove(&agent.host.store, &agent.trust, &name)?))
}
