//! The HTTP API: routes, who may call them, and their OpenAPI document.
//!
//! `/v1/…` is for operators (local or by certificate), `/peer/v1/…` for paired
//! hosts; see [`crate::listen`] for how a caller is known. The document is
//! generated from the handlers: their paths, types, and the failures of each;
//! those that any request may end with are added to all of them here.

mod extract;
mod failure;
mod host;
mod migration;
pub(crate) mod pairing;
mod peer;
mod switch;
mod vm;

use std::sync::Arc;

use axum::extract::{DefaultBodyLimit, Request};
use axum::middleware::{self, Next};
use axum::response::Response;
use axum::routing::get;
use axum::{Extension, Json, Router};
use limosa_protocol::api::BODY_BYTES_MAX;
use utoipa::{OpenApi, openapi};
use utoipa_axum::router::OpenApiRouter;

use self::failure::{Rejection, Result};
use crate::agent::Agent;
use crate::caller::Caller;
use limosa_host::failure::{Failure, OrFail};

#[derive(OpenApi)]
#[openapi(info(
    title = "Limosa host agent",
    description = "Moves running virtual machines between Linux hosts, with their disks.",
    license(name = "Apache-2.0", identifier = "Apache-2.0")
))]
struct Document;

fn operator_routes() -> OpenApiRouter<Arc<Agent>> {
    OpenApiRouter::with_openapi(Document::openapi())
        .merge(host::routes())
        .merge(vm::routes())
        .merge(switch::routes())
        .merge(migration::routes())
}

/// The OpenAPI document.
pub(crate) fn document() -> openapi::OpenApi {
    with_failures_of_all(operator_routes().into_openapi())
}

/// Adds to each operation the failures that do not come from its handler: a
/// request that is not understood, a caller who may not command, and what should
/// have worked.
fn with_failures_of_all(mut document: openapi::OpenApi) -> openapi::OpenApi {
    let failure = |description: &str| {
        let body = openapi::ContentBuilder::new()
            .schema(Some(openapi::Ref::from_schema_name("Failure")))
            .build();
        openapi::ResponseBuilder::new()
            .description(description)
            .content("application/json", body)
            .build()
    };
    for item in document.paths.paths.values_mut() {
        let methods = [&mut item.get, &mut item.post, &mut item.put, &mut item.delete];
        for operation in methods.into_iter().flatten() {
            let takes_input = operation.parameters.is_some() || operation.request_body.is_some();
            let responses = &mut operation.responses.responses;
            let mut add = |status: &str, description: &str| {
                let entry = responses.entry(status.to_owned());
                entry.or_insert_with(|| failure(description).into());
            };
            if takes_input {
                add("400", "The request itself is wrong");
            }
            add("403", "The caller may not do this");
            add("500", "Something that should work did not");
        }
    }
    document
}

/// All routes for known callers.
pub(crate) fn router(agent: Arc<Agent>) -> Router {
    let (operators, document) = operator_routes().split_for_parts();
    let document = Arc::new(with_failures_of_all(document));
    let operators = operators
        .route("/v1/openapi.json", get(move || async move { Json(document.as_ref().clone()) }))
        .layer(middleware::from_fn(operators_only));
    let peers = peer::routes().layer(middleware::from_fn(hosts_only));
    operators
        .merge(peers)
        .fallback(async || {
            Rejection::from(Failure::not_found("no such path: see /v1/openapi.json"))
        })
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .layer(middleware::from_fn(to_the_end))
        .with_state(agent)
}

/// Lets a request that has begun come to its end, also when whoever asked is
/// gone: half a change of a VM or of a handover would be worse than an answer
/// that nobody reads.
async fn to_the_end(request: Request, next: Next) -> Result<Response> {
    let work = tokio::spawn(next.run(request));
    Ok(work.await.or_fail("a request ended in the middle")?)
}

async fn operators_only(
    Extension(caller): Extension<Caller>,
    request: Request,
    next: Next,
) -> Result<Response> {
    match caller {
        Caller::Local { .. } | Caller::Operator { .. } => Ok(next.run(request).await),
        Caller::Host { .. } | Caller::Stranger { .. } => Err(Failure::forbidden(
            "a host's certificate does not command: use an operator's, see `limosa operator add`",
        )
        .into()),
    }
}

async fn hosts_only(
    Extension(caller): Extension<Caller>,
    request: Request,
    next: Next,
) -> Result<Response> {
    match caller {
        Caller::Host { .. } => Ok(next.run(request).await),
        _ => Err(Failure::forbidden("only for paired hosts").into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: the document names every path of the API's table.
    #[test]
    fn the_document_is_complete() {
        let document = document();
        for path in [
            "/v1/host",
            "/v1/vms",
            "/v1/vms/{name}",
            "/v1/vms/{name}/start",
            "/v1/vms/{name}/stop",
            "/v1/vms/{name}/pause",
            "/v1/vms/{name}/resume",
            "/v1/vms/{name}/console",
            "/v1/vms/{name}/compare",
            "/v1/vms/{name}/move",
            "/v1/vms/{name}/recover",
            "/v1/migrations",
            "/v1/migrations/{id}",
            "/v1/migrations/{id}/events",
            "/v1/migrations/{id}/cancel",
            "/v1/switches",
            "/v1/switches/{name}",
            "/v1/hosts",
            "/v1/hosts/invite",
            "/v1/hosts/pair",
            "/v1/hosts/{name}",
            "/v1/operators",
            "/v1/operators/{name}",
        ] {
            assert!(document.paths.paths.contains_key(path), "{path}");
        }
    }

    /// Goal: a failure that a handler answers with is one the document names.
    #[test]
    fn the_document_names_failures() {
        let document = serde_json::to_value(document()).unwrap();
        for (path, method, statuses) in [
            ("/v1/host", "get", &["403", "500"][..]),
            ("/v1/hosts/pair", "post", &["400", "403", "409", "500", "502"]),
            ("/v1/hosts/{name}", "delete", &["400", "403", "404", "409", "500"]),
            ("/v1/vms/{name}/console", "get", &["400", "403", "404", "409", "500"]),
            ("/v1/vms/{name}/recover", "post", &["400", "403", "404", "409", "500"]),
        ] {
            let responses = document["paths"][path][method]["responses"].as_object().unwrap();
            let failures: Vec<&str> =
                responses.keys().map(String::as_str).filter(|status| *status >= "400").collect();
            assert_eq!(failures, statuses, "{method} {path}");
        }
    }
}
