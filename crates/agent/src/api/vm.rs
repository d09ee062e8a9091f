//! VMs: making, looking, running, console, moving.

use std::sync::Arc;

use axum::body::Body as HttpBody;
use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::response::Response;
use axum::{Extension, Json};
use futures_util::future::join_all;
use hyper_util::rt::TokioIo;
use limosa_protocol::api::{
    CONSOLE_PROTOCOL, Comparison, Failure as ApiFailure, RecoverRequest, Recovery, StopRequest, Vm,
};
use limosa_protocol::id::VmName;
use limosa_protocol::migration::{Migration, MoveRequest};
use limosa_protocol::vm::VmDefinition;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::extract::{Body, Named, Shared};
use super::failure::Result;
use crate::agent::Agent;
use crate::caller::Caller;
use limosa_host::failure::{Failure, OrFail};
use limosa_host::vm::console::Console;
use limosa_host::vm::{create, power};

pub(super) fn routes() -> OpenApiRouter<Arc<Agent>> {
    OpenApiRouter::new()
        .routes(routes!(list, create_vm))
        .routes(routes!(show, delete))
        .routes(routes!(start))
        .routes(routes!(stop))
        .routes(routes!(pause))
        .routes(routes!(resume))
        .routes(routes!(console))
        .routes(routes!(compare))
        .routes(routes!(move_vm))
        .routes(routes!(recovery, recover))
}

/// All VMs of this host
#[utoipa::path(get, path = "/v1/vms", tag = "vm", responses((status = 200, body = Vec<Vm>)))]
async fn list(State(agent): Shared) -> Json<Vec<Vm>> {
    // Beside each other: one that makes us wait does so for itself alone.
    Json(join_all(agent.host.vms.all().iter().map(|vm| vm.view())).await)
}

/// Make a VM
#[utoipa::path(post, path = "/v1/vms", tag = "vm", request_body = VmDefinition,
    responses((status = 200, body = Vm), (status = 400, body = ApiFailure), (status = 409, body = ApiFailure)))]
async fn create_vm(State(agent): Shared, Body(definition): Body<VmDefinition>) -> Result<Json<Vm>> {
    let vm = create::create(&agent.host, definition).await?;
    Ok(Json(vm.view().await))
}

/// One VM
#[utoipa::path(get, path = "/v1/vms/{name}", tag = "vm", params(("name" = String, Path)),
    responses((status = 200, body = Vm), (status = 404, body = ApiFailure)))]
async fn show(State(agent): Shared, Named(name): Named<VmName>) -> Result<Json<Vm>> {
    Ok(Json(agent.host.vm(&name)?.view().await))
}

/// Delete a VM that is off, with the files in its own places
#[utoipa::path(delete, path = "/v1/vms/{name}", tag = "vm", params(("name" = String, Path)),
    responses((status = 200), (status = 404, body = ApiFailure), (status = 409, body = ApiFailure)))]
async fn delete(State(agent): Shared, Named(name): Named<VmName>) -> Result<Json<()>> {
    Ok(Json(limosa_migration::delete_vm(&agent.migrations, &agent.host.vm(&name)?).await?))
}

/// Start a VM
#[utoipa::path(post, path = "/v1/vms/{name}/start", tag = "vm", params(("name" = String, Path)),
    responses((status = 200, body = Vm), (status = 404, body = ApiFailure), (status = 409, body = ApiFailure)))]
async fn start(State(agent): Shared, Named(name): Named<VmName>) -> Result<Json<Vm>> {
    let vm = agent.host.vm(&name)?;
    limosa_migration::start_vm(&agent.migrations, &vm).await?;
    Ok(Json(vm.view().await))
}

/// Stop a VM: ask its guest, or turn it off
#[utoipa::path(post, path = "/v1/vms/{name}/stop", tag = "vm", params(("name" = String, Path)), request_body = StopRequest,
    responses((status = 200, body = Vm), (status = 404, body = ApiFailure), (status = 409, body = ApiFailure)))]
async fn stop(
    State(agent): Shared,
    Named(name): Named<VmName>,
    Body(request): Body<StopRequest>,
) -> Result<Json<Vm>> {
    let vm = agent.host.vm(&name)?;
    power::stop(&agent.host, &vm, &request).await?;
    Ok(Json(vm.view().await))
}

/// Stop the vCPUs
#[utoipa::path(post, path = "/v1/vms/{name}/pause", tag = "vm", params(("name" = String, Path)),
    responses((status = 200, body = Vm), (status = 404, body = ApiFailure), (status = 409, body = ApiFailure)))]
async fn pause(State(agent): Shared, Named(name): Named<VmName>) -> Result<Json<Vm>> {
    let vm = agent.host.vm(&name)?;
    power::pause(&vm).await?;
    Ok(Json(vm.view().await))
}

/// Let the vCPUs run on
#[utoipa::path(post, path = "/v1/vms/{name}/resume", tag = "vm", params(("name" = String, Path)),
    responses((status = 200, body = Vm), (status = 404, body = ApiFailure), (status = 409, body = ApiFailure)))]
async fn resume(State(agent): Shared, Named(name): Named<VmName>) -> Result<Json<Vm>> {
    let vm = agent.host.vm(&name)?;
    power::resume(&agent.host, &vm).await?;
    Ok(Json(vm.view().await))
}

/// The serial console: raw bytes both ways after an upgrade to `limosa-console`
#[utoipa::path(get, path = "/v1/vms/{name}/console", tag = "vm", params(("name" = String, Path)),
    responses((status = 101), (status = 404, body = ApiFailure), (status = 409, body = ApiFailure)))]
async fn console(
    State(agent): Shared,
    Named(name): Named<VmName>,
    request: Request,
) -> Result<Response> {
    let wanted = request.headers().get(header::UPGRADE).and_then(|value| value.to_str().ok());
    if wanted != Some(CONSOLE_PROTOCOL) {
        let wrong = format!("the console is raw bytes: ask for an upgrade to {CONSOLE_PROTOCOL}");
        return Err(Failure::bad_request(wrong).into());
    }
    let console = Console::open(&agent.host.folders, &*agent.host.vm(&name)?).await?;
    tokio::spawn(async move {
        match hyper::upgrade::on(request).await {
            Ok(upgraded) => console.serve(TokioIo::new(upgraded)).await,
            Err(error) => tracing::debug!(%error, "a console was not opened"),
        }
    });
    let upgrade = Response::builder()
        .status(StatusCode::SWITCHING_PROTOCOLS)
        .header(header::CONNECTION, "upgrade")
        .header(header::UPGRADE, CONSOLE_PROTOCOL)
        .body(HttpBody::empty());
    Ok(upgrade.or_fail("opening the console")?)
}

/// Find everything that stands against a move; nothing is touched
#[utoipa::path(post, path = "/v1/vms/{name}/compare", tag = "vm", params(("name" = String, Path)), request_body = MoveRequest,
    responses((status = 200, body = Comparison), (status = 404, body = ApiFailure)))]
async fn compare(
    State(agent): Shared,
    Named(name): Named<VmName>,
    Body(request): Body<MoveRequest>,
) -> Result<Json<Comparison>> {
    let vm = agent.host.vm(&name)?;
    Ok(Json(agent.migrations.compare(&vm, request).await?))
}

/// What is known of a handover that is not settled, on both hosts
#[utoipa::path(get, path = "/v1/vms/{name}/recover", tag = "vm", params(("name" = String, Path)),
    responses((status = 200, body = Recovery), (status = 404, body = ApiFailure), (status = 409, body = ApiFailure)))]
async fn recovery(State(agent): Shared, Named(name): Named<VmName>) -> Result<Json<Recovery>> {
    Ok(Json(limosa_migration::recovery(&agent.migrations, &name).await?))
}

/// Give a VM to this host, the other one being gone; it may then run twice if it is not
#[utoipa::path(post, path = "/v1/vms/{name}/recover", tag = "vm", params(("name" = String, Path)), request_body = RecoverRequest,
    responses((status = 200, body = Recovery), (status = 404, body = ApiFailure), (status = 409, body = ApiFailure)))]
async fn recover(
    State(agent): Shared,
    Extension(caller): Extension<Caller>,
    Named(name): Named<VmName>,
    Body(request): Body<RecoverRequest>,
) -> Result<Json<Recovery>> {
    let by = caller.to_string();
    Ok(Json(limosa_migration::force_owner(&agent.migrations, &name, &request.confirm, &by).await?))
}

/// Move a VM to another host; the answer comes at once, the work is a job that may wait in a queue
#[utoipa::path(post, path = "/v1/vms/{name}/move", tag = "vm", params(("name" = String, Path)), request_body = MoveRequest,
    responses((status = 200, body = Migration), (status = 404, body = ApiFailure), (status = 409, body = ApiFailure), (status = 422, body = ApiFailure)))]
async fn move_vm(
    State(agent): Shared,
    Named(name): Named<VmName>,
    Body(request): Body<MoveRequest>,
) -> Result<Json<Migration>> {
    let vm = agent.host.vm(&name)?;
    Ok(Json(limosa_migration::request_move(&agent.migrations, &vm, request).await?))
}
