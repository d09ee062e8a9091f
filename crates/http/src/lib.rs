//! The one HTTP client of all programs: JSON over a connection that its caller opens.
//!
//! ```text
//! Client ─► pool ─ a kept connection is open ──────────────┐
//!             └ none ─► Connector ─ unix socket │ TCP, TLS ─┴─► request ─► answer
//! ```
//!
//! Calls may run in parallel: the pool opens a connection for each call that finds none.
//!
//! **Invariants.** A request is written to one connection at most: the pool repeats a request
//! only if the kept connection was closed before the first byte. Each answer that is read here
//! has a limit in bytes, each call a limit in time.

mod connector;
mod error;

use std::path::PathBuf;
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::{Method, Request, Response, StatusCode, header};
use hyper_util::client::legacy;
use hyper_util::rt::TokioExecutor;
use limosa_protocol::api;
use serde::de::DeserializeOwned;

use crate::connector::Connector;
pub use crate::connector::{BoxError, BoxIo, Io};
pub use crate::error::{ConnectError, Error};

/// Largest answer that reports a failure, in bytes.
const FAILURE_BYTES_MAX: usize = 1 << 20;

/// Limits of one call.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Longest wait for the whole answer
    pub wait: Duration,
    /// Largest answer, in bytes
    pub answer_bytes: usize,
}

/// An agent, and the connections to it.
#[derive(Clone)]
pub struct Client {
    pool: legacy::Client<Connector, Full<Bytes>>,
    user_agent: &'static str,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("user_agent", &self.user_agent).finish_non_exhaustive()
    }
}

impl Client {
    /// A client whose connections `open` makes.
    pub fn new<F>(user_agent: &'static str, open: impl Fn() -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Result<BoxIo, BoxError>> + Send + 'static,
    {
        // A kept connection has no limit in time: a switchover must not wait for a handshake.
        let pool = legacy::Client::builder(TokioExecutor::new())
            .pool_idle_timeout(None)
            .build(Connector::new(open));
        Self { pool, user_agent }
    }

    /// A client of the agent at a unix socket.
    #[must_use]
    pub fn unix(user_agent: &'static str, path: PathBuf) -> Self {
        Self::new(user_agent, move || {
            let path = path.clone();
            async move { Ok(Box::new(tokio::net::UnixStream::connect(path).await?) as BoxIo) }
        })
    }

    /// A client that has one connection and opens no other.
    pub fn over(user_agent: &'static str, connection: impl Io) -> Self {
        let connection = std::sync::Mutex::new(Some(Box::new(connection) as BoxIo));
        Self::new(user_agent, move || {
            let taken = connection.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
            std::future::ready(taken.ok_or_else(|| "the connection is closed".into()))
        })
    }

    /// A request to the agent, with JSON if it has a body.
    ///
    /// # Errors
    /// If the path is no path.
    pub fn request(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<Request<Full<Bytes>>, Error> {
        // The connector knows the address; the host of the URI is only the key of the pool.
        let mut request = Request::builder()
            .method(method)
            .uri(format!("http://limosa{path}"))
            .header(header::USER_AGENT, self.user_agent);
        if !body.is_empty() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        request.body(Full::new(body)).map_err(|error| Error::Request(Box::new(error)))
    }

    /// Sends a request and gives the head of the answer, whatever its status.
    ///
    /// # Errors
    /// If there is no connection, or no answer.
    pub async fn send(&self, request: Request<Full<Bytes>>) -> Result<Response<Incoming>, Error> {
        self.pool.request(request).await.map_err(Error::from_pool)
    }

    /// Sends a request and reads the whole answer, whatever its status.
    ///
    /// # Errors
    /// If there is no connection, or no answer within the limits.
    pub async fn exchange(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        limits: Limits,
    ) -> Result<(StatusCode, Bytes), Error> {
        let request = self.request(method, path, body)?;
        let exchange = async {
            let answer = self.send(request).await?;
            let status = answer.status();
            Ok((status, collect(answer.into_body(), limits.answer_bytes).await?))
        };
        let exchanged = tokio::time::timeout(limits.wait, exchange).await;
        exchanged.unwrap_or(Err(Error::Silent { wait: limits.wait }))
    }

    /// Sends a request and reads the answer as JSON; an empty one is `null`.
    ///
    /// # Errors
    /// [`Error::Refused`] with the reason of the agent, or as [`Self::exchange`].
    pub async fn call<R: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        limits: Limits,
    ) -> Result<R, Error> {
        let (status, bytes) = self.exchange(method, path, body, limits).await?;
        if !status.is_success() {
            return Err(refusal(status, &bytes));
        }
        let bytes: &[u8] = if bytes.is_empty() { b"null" } else { &bytes };
        serde_json::from_slice(bytes).map_err(Error::NotUnderstood)
    }
}

/// Reads the failure in an answer whose status is no success.
pub async fn read_refusal(answer: Response<Incoming>) -> Error {
    let status = answer.status();
    match collect(answer.into_body(), FAILURE_BYTES_MAX).await {
        Ok(bytes) => refusal(status, &bytes),
        Err(error) => error,
    }
}

fn refusal(status: StatusCode, bytes: &[u8]) -> Error {
    match serde_json::from_slice::<api::Failure>(bytes) {
        Ok(failure) => Error::Refused(failure),
        Err(_) => Error::Status(status),
    }
}

async fn collect(body: Incoming, bytes_max: usize) -> Result<Bytes, Error> {
    let collected = Limited::new(body, bytes_max).collect().await;
    collected.map(http_body_util::Collected::to_bytes).map_err(Error::Answer)
}

#[cfg(test)]
mod tests;
