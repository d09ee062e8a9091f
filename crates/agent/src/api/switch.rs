//! Virtual switches.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use limosa_protocol::api::{Failure as ApiFailure, Switch};
use limosa_protocol::id::SwitchName;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::{Body, Named, Shared};
use crate::agent::Agent;
use crate::failure::{Failure, Result};
use crate::net::Net;

pub(super) fn routes() -> OpenApiRouter<Arc<Agent>> {
    OpenApiRouter::new().routes(routes!(list, create)).routes(routes!(delete))
}

/// All virtual switches
#[utoipa::path(get, path = "/v1/switches", tag = "switch", responses((status = 200, body = Vec<Switch>)))]
async fn list(State(agent): Shared) -> Result<Json<Vec<Switch>>> {
    let switches = agent.host.store.all::<Switch>()?;
    Ok(Json(switches.into_iter().map(|(_, switch)| switch).collect()))
}

/// Make a virtual switch
#[utoipa::path(post, path = "/v1/switches", tag = "switch", request_body = Switch,
    responses((status = 200, body = Switch), (status = 400, body = ApiFailure), (status = 409, body = ApiFailure)))]
async fn create(State(agent): Shared, Body(mut switch): Body<Switch>) -> Result<Json<Switch>> {
    let name = switch.name.clone();
    let _placing = agent.host.allocation_lock.lock().await;
    if agent.host.store.get::<Switch>(name.as_str())?.is_some() {
        return Err(Failure::conflict(format!("there is a virtual switch {name} already")));
    }
    let bridge = Net::bridge_name(&name);
    if let Some(uplink) = &switch.uplink {
        agent.host.net.link(uplink).await?;
    }
    let was_there = agent.host.net.index(&bridge).await?.is_some();
    switch.bridge = Some(bridge);
    let made = agent.host.net.ensure_bridge(&name, switch.uplink.as_deref()).await;
    if let Err(failure) = made.and_then(|_| Ok(agent.host.store.put(name.as_str(), &switch)?)) {
        // One that was there before may carry VMs.
        if !was_there {
            agent.host.net.remove_bridge(&name).await?;
        }
        return Err(failure);
    }
    Ok(Json(switch))
}

/// Remove a virtual switch that no VM uses
#[utoipa::path(delete, path = "/v1/switches/{name}", tag = "switch", params(("name" = String, Path)),
    responses((status = 200), (status = 404, body = ApiFailure), (status = 409, body = ApiFailure)))]
async fn delete(State(agent): Shared, Named(name): Named<SwitchName>) -> Result<Json<()>> {
    let _placing = agent.host.allocation_lock.lock().await;
    if agent.host.store.get::<Switch>(name.as_str())?.is_none() {
        return Err(Failure::not_found(format!("no virtual switch {name}")));
    }
    for vm in agent.host.vms.all() {
        if vm.reserved.nics.iter().any(|nic| nic.switch == name) {
            return Err(Failure::conflict(format!("VM {} is plugged into {name}", vm.name)));
        }
    }
    agent.host.net.remove_bridge(&name).await?;
    agent.host.store.remove::<Switch>(name.as_str())?;
    Ok(Json(()))
}
