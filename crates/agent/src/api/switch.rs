//! Virtual switches.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use limosa_protocol::api::{Failure as ApiFailure, Switch};
use limosa_protocol::id::SwitchName;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::extract::{Body, Named, Shared};
use super::failure::Result;
use crate::agent::Agent;

pub(super) fn routes() -> OpenApiRouter<Arc<Agent>> {
    OpenApiRouter::new().routes(routes!(list, create)).routes(routes!(delete))
}

/// All virtual switches
#[utoipa::path(get, path = "/v1/switches", tag = "switch", responses((status = 200, body = Vec<Switch>)))]
async fn list(State(agent): Shared) -> Result<Json<Vec<Switch>>> {
    Ok(Json(agent.host.switches()?))
}

/// Make a virtual switch
#[utoipa::path(post, path = "/v1/switches", tag = "switch", request_body = Switch,
    responses((status = 200, body = Switch), (status = 400, body = ApiFailure), (status = 409, body = ApiFailure)))]
async fn create(State(agent): Shared, Body(switch): Body<Switch>) -> Result<Json<Switch>> {
    Ok(Json(agent.host.create_switch(switch).await?))
}

/// Remove a virtual switch that no VM uses
#[utoipa::path(delete, path = "/v1/switches/{name}", tag = "switch", params(("name" = String, Path)),
    responses((status = 200), (status = 404, body = ApiFailure), (status = 409, body = ApiFailure)))]
async fn delete(State(agent): Shared, Named(name): Named<SwitchName>) -> Result<Json<()>> {
    Ok(Json(agent.host.delete_switch(&name).await?))
}
