//! VMs: making, looking, running, console, moving.

use std::sync::Arc;
use std::time::Duration;

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
use limosa_qemu::launch::CONSOLE_SOCKET;
use tokio::net::UnixStream;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::{Body, Named, Shared};
use crate::agent::Agent;
use crate::caller::Caller;
use crate::failure::{Failure, OrFail, Result};
use crate::migration::{self, handover};
use crate::vm::{create, power};

/// How long a console that was just left may take to be closed.
const CONSOLE_FREE_WAIT: Duration = Duration::from_secs(1);

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
    migration::delete_vm(&agent.migrations, &agent.host.vm(&name)?).await.map(Json)
}

/// Start a VM
#[utoipa::path(post, path = "/v1/vms/{name}/start", tag = "vm", params(("name" = String, Path)),
    responses((status = 200, body = Vm), (status = 404, body = ApiFailure), (status = 409, body = ApiFailure)))]
async fn start(State(agent): Shared, Named(name): Named<VmName>) -> Result<Json<Vm>> {
    let vm = agent.host.vm(&name)?;
    migration::start_vm(&agent.migrations, &vm).await?;
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
        return Err(Failure::bad_request(format!(
            "the console is raw bytes: ask for an upgrade to {CONSOLE_PROTOCOL}"
        )));
    }
    let vm = agent.host.vm(&name)?;
    vm.lock().await.running()?;
    // QEMU would let a second one connect, and keep it waiting without a word.
    let only = tokio::time::timeout(CONSOLE_FREE_WAIT, Arc::clone(&vm.console).lock_owned());
    let only = only.await.map_err(|_| {
        Failure::conflict(format!(
            "the console of VM {name} is open already: leave it there first, with Ctrl-]"
        ))
    })?;
    let socket = agent.host.folders.runtime_of(&name).join(CONSOLE_SOCKET);
    let mut serial = UnixStream::connect(&socket)
        .await
        .or_fail(&format!("connecting to the console of VM {name}"))?;
    tokio::spawn(async move {
        match hyper::upgrade::on(request).await {
            Ok(upgraded) => {
                let mut operator = TokioIo::new(upgraded);
                // Either side's end is the normal end of a console.
                tokio::io::copy_bidirectional(&mut operator, &mut serial).await.ok();
            }
            Err(error) => tracing::debug!(%error, "a console was not opened"),
        }
        drop(only);
    });
    Response::builder()
        .status(StatusCode::SWITCHING_PROTOCOLS)
        .header(header::CONNECTION, "upgrade")
        .header(header::UPGRADE, CONSOLE_PROTOCOL)
        .body(HttpBody::empty())
        .or_fail("opening the console")
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
    let preflight = migration::compare::preflight(&agent.migrations, &vm, &request).await?;
    let (problems, notes) = (preflight.problems, preflight.notes);
    Ok(Json(Comparison { vm: name, to: request.to, problems, notes }))
}

/// What is known of a handover that is not settled, on both hosts
#[utoipa::path(get, path = "/v1/vms/{name}/recover", tag = "vm", params(("name" = String, Path)),
    responses((status = 200, body = Recovery), (status = 404, body = ApiFailure), (status = 409, body = ApiFailure)))]
async fn recovery(State(agent): Shared, Named(name): Named<VmName>) -> Result<Json<Recovery>> {
    handover::recovery(&agent.migrations, &name).await.map(Json)
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
    if request.confirm != name {
        return Err(Failure::bad_request(format!(
            "VM {name} is to be forced and {} was confirmed: nothing was done",
            request.confirm
        )));
    }
    handover::force_owner(&agent.migrations, &name, &caller.to_string()).await.map(Json)
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
    migration::queue::request_move(&agent.migrations, &vm, request).await.map(Json)
}
