//! Requests to an agent: HTTP with JSON, over whatever [`crate::connect`] opens.
//!
//! **Invariants.** Each request has a limit in time; each answer has a limit in bytes. A refusal of the agent is a [`Refused`],
//! with its own words; everything else that fails is between us and it.

use std::time::Duration;

use anyhow::{Result, bail};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{self, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use limosa_auth::Fingerprint;
use limosa_http::Limits;
use limosa_protocol::api::{BODY_BYTES_MAX, CONSOLE_PROTOCOL, Failure};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::address::Address;
use crate::connect;

const USER_AGENT: &str = concat!("limosa/", env!("CARGO_PKG_VERSION"));
/// Largest answer, in bytes.
const ANSWER_BYTES_MAX: usize = 64 << 20;
/// Longest wait for an answer, in seconds, unless the request itself waits.
pub(crate) const ANSWER_SECONDS_MAX: u64 = 120;

/// The agent refused, with its own words.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.message)]
pub(crate) struct Refused(pub(crate) Failure);

/// An agent to ask.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    http: limosa_http::Client,
    address: Address,
}

impl Client {
    /// - `fingerprint`: of a remote agent's certificate, if the operator gave it.
    pub(crate) fn new(address: Address, fingerprint: Option<Fingerprint>) -> Self {
        let to = address.clone();
        let http = limosa_http::Client::new(USER_AGENT, move || {
            let to = to.clone();
            async move { Ok(connect::connect(&to, fingerprint).await?) }
        });
        Self { http, address }
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
        let request = self.http.request(Method::GET, path, Bytes::new())?;
        let answer = self.open(request).await?;
        if answer.status().is_success() {
            return Ok(answer.into_body());
        }
        Err(self.explain(limosa_http::read_refusal(answer).await))
    }

    /// A connection of raw bytes to a console; it has no limit in time.
    pub(crate) async fn upgrade(&self, path: &str) -> Result<TokioIo<hyper::upgrade::Upgraded>> {
        let mut request = self.http.request(Method::GET, path, Bytes::new())?;
        let headers = request.headers_mut();
        headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(header::UPGRADE, HeaderValue::from_static(CONSOLE_PROTOCOL));
        let answer = self.open(request).await?;
        match answer.status() {
            StatusCode::SWITCHING_PROTOCOLS => Ok(TokioIo::new(hyper::upgrade::on(answer).await?)),
            status if status.is_success() => {
                bail!("the agent did not open the console: are limosa and limosad of one version?")
            }
            _ => Err(self.explain(limosa_http::read_refusal(answer).await)),
        }
    }

    async fn open(&self, request: Request<Full<Bytes>>) -> Result<Response<Incoming>> {
        let wait = Duration::from_secs(ANSWER_SECONDS_MAX);
        let sent = tokio::time::timeout(wait, self.http.send(request)).await;
        sent.unwrap_or(Err(limosa_http::Error::Silent { wait }))
            .map_err(|error| self.explain(error))
    }

    async fn ask<R: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        seconds_max: u64,
    ) -> Result<R> {
        let wait = Duration::from_secs(seconds_max);
        let limits = Limits { wait, answer_bytes: ANSWER_BYTES_MAX };
        self.http.call(method, path, body, limits).await.map_err(|error| self.explain(error))
    }

    /// Adds to an error what the operator can do.
    fn explain(&self, error: limosa_http::Error) -> anyhow::Error {
        use limosa_http::Error;
        if let Some(refusal) = connect::refusal(&self.address, &error) {
            return refusal.into();
        }
        match error {
            Error::Refused(failure) => Refused(failure).into(),
            Error::Silent { wait } => anyhow::anyhow!(
                "the agent gave no answer within {} s; it may still do what was asked",
                wait.as_secs()
            ),
            Error::Status(status) => {
                anyhow::anyhow!("the agent answered {status}, without a reason")
            }
            error @ Error::Broken(_) => anyhow::Error::from(error)
                .context("the agent gave no answer: its log says more (`journalctl -u limosad`)"),
            error @ Error::Answer(_) => {
                anyhow::Error::from(error).context("the agent's answer broke off")
            }
            error @ Error::NotUnderstood(_) => anyhow::Error::from(error).context(
                "the agent's answer is not understood: are limosa and limosad of one version?",
            ),
            error @ (Error::Connect(_) | Error::Request(_)) => error.into(),
        }
    }
}
