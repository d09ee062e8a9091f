//! Requests to an agent: HTTP with JSON, over whatever [`crate::connect`] opens.
//!
//! **Invariants.** Each request has a connection of its own and a limit in time;
//! each answer has a limit in bytes. A refusal of the agent is a [`Refused`],
//! with its own words; everything else that fails is between us and it.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::handshake;
use hyper::{Method, Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use limosa_auth::Fingerprint;
use limosa_protocol::api::{BODY_BYTES_MAX, CONSOLE_PROTOCOL, Failure};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::connect::{self, Address};

/// Largest answer, in bytes.
const ANSWER_BYTES_MAX: usize = 64 << 20;
/// Largest answer that tells of a failure, in bytes.
const FAILURE_BYTES_MAX: usize = 1 << 20;
/// Longest wait for an answer, in seconds, unless the request itself waits.
pub(crate) const ANSWER_SECONDS_MAX: u64 = 120;

/// The agent refused, with its own words.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.message)]
pub(crate) struct Refused(pub(crate) Failure);

/// An agent to ask.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    address: Address,
    fingerprint: Option<Fingerprint>,
}

/// One request.
struct Ask {
    method: Method,
    path: String,
    body: Bytes,
    /// Wish to go on with raw bytes
    upgrade: bool,
}

impl Client {
    /// - `fingerprint`: of a remote agent's certificate, if the operator gave it.
    pub(crate) fn new(address: Address, fingerprint: Option<Fingerprint>) -> Self {
        Self { address, fingerprint }
    }

    pub(crate) async fn get<R: DeserializeOwned>(&self, path: &str) -> Result<R> {
        self.ask(Method::GET, path, Bytes::new(), ANSWER_SECONDS_MAX).await
    }

    pub(crate) async fn delete(&self, path: &str) -> Result<()> {
        // Whatever comes with a success has nothing more to say.
        let _: serde::de::IgnoredAny =
            self.ask(Method::DELETE, path, Bytes::new(), ANSWER_SECONDS_MAX).await?;
        Ok(())
    }

    /// An order that needs no words.
    pub(crate) async fn order<R: DeserializeOwned>(&self, path: &str) -> Result<R> {
        self.ask(Method::POST, path, Bytes::new(), ANSWER_SECONDS_MAX).await
    }

    pub(crate) async fn post<R: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<R> {
        self.post_within(path, body, ANSWER_SECONDS_MAX).await
    }

    pub(crate) async fn post_within<R: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
        seconds_max: u64,
    ) -> Result<R> {
        let body = serde_json::to_vec(body)?;
        anyhow::ensure!(
            body.len() <= BODY_BYTES_MAX,
            "the request has {} bytes: an agent takes at most {BODY_BYTES_MAX}",
            body.len()
        );
        self.ask(Method::POST, path, body.into(), seconds_max).await
    }

    /// A stream of server-sent events; it has no limit in time.
    pub(crate) async fn stream(&self, path: &str) -> Result<Incoming> {
        let ask = Ask::new(Method::GET, path, Bytes::new());
        Ok(in_time(ANSWER_SECONDS_MAX, self.send(ask)).await?.into_body())
    }

    /// A connection of raw bytes to a console; it has no limit in time.
    pub(crate) async fn upgrade(&self, path: &str) -> Result<TokioIo<hyper::upgrade::Upgraded>> {
        let ask = Ask { upgrade: true, ..Ask::new(Method::GET, path, Bytes::new()) };
        let answer = in_time(ANSWER_SECONDS_MAX, self.send(ask)).await?;
        anyhow::ensure!(
            answer.status() == StatusCode::SWITCHING_PROTOCOLS,
            "the agent did not open the console: are limosa and limosad of one version?"
        );
        Ok(TokioIo::new(hyper::upgrade::on(answer).await?))
    }

    async fn ask<R: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        seconds_max: u64,
    ) -> Result<R> {
        let ask = Ask::new(method, path, body);
        let bytes = in_time(seconds_max, async {
            collect(self.send(ask).await?.into_body(), ANSWER_BYTES_MAX).await
        })
        .await?;
        // An answer without a word is the JSON of nothing.
        let bytes: &[u8] = if bytes.is_empty() { b"null" } else { &bytes };
        serde_json::from_slice(bytes)
            .context("the agent's answer is not understood: are limosa and limosad of one version?")
    }

    async fn send(&self, ask: Ask) -> Result<Response<Incoming>> {
        let mut request = Request::builder()
            .method(ask.method)
            .uri(ask.path)
            .header(header::HOST, "limosa")
            .header(header::USER_AGENT, concat!("limosa/", env!("CARGO_PKG_VERSION")));
        if !ask.body.is_empty() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        if ask.upgrade {
            request = request
                .header(header::CONNECTION, "upgrade")
                .header(header::UPGRADE, CONSOLE_PROTOCOL);
        }
        let request = request.body(Full::new(ask.body))?;
        let stream = connect::connect(&self.address, self.fingerprint).await?;
        let answer = async {
            let (mut sender, connection) = handshake(TokioIo::new(stream)).await?;
            tokio::spawn(connection.with_upgrades());
            sender.send_request(request).await
        };
        let answer =
            answer.await.map_err(|error| match connect::refusal(&self.address, &error) {
                Some(refusal) => anyhow::Error::from(refusal),
                None => anyhow::Error::from(error).context(
                    "the agent gave no answer: its log says more (`journalctl -u limosad`)",
                ),
            })?;
        let status = answer.status();
        if status.is_success() || (ask.upgrade && status == StatusCode::SWITCHING_PROTOCOLS) {
            return Ok(answer);
        }
        let bytes = collect(answer.into_body(), FAILURE_BYTES_MAX).await?;
        match serde_json::from_slice::<Failure>(&bytes) {
            Ok(failure) => Err(Refused(failure).into()),
            Err(_) => bail!("the agent answered {status}, without a reason"),
        }
    }
}

impl Ask {
    fn new(method: Method, path: &str, body: Bytes) -> Self {
        Self { method, path: path.to_owned(), body, upgrade: false }
    }
}

async fn collect(body: Incoming, bytes_max: usize) -> Result<Bytes> {
    let collected = Limited::new(body, bytes_max).collect().await;
    // The error is a box that anyhow cannot take as it is.
    let collected = collected.map_err(|error| anyhow::anyhow!("{error}"));
    Ok(collected.context("the agent's answer broke off")?.to_bytes())
}

async fn in_time<R>(seconds_max: u64, work: impl Future<Output = Result<R>>) -> Result<R> {
    match tokio::time::timeout(Duration::from_secs(seconds_max), work).await {
        Ok(result) => result,
        Err(_) => {
            bail!("the agent gave no answer within {seconds_max} s; it may still do what was asked")
        }
    }
}
