//! Requests to an agent: over its local socket, or HTTPS with certificates.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use limosa_auth::{Fingerprint, Identity, tls};
use limosa_protocol::api::{CONSOLE_PROTOCOL, Failure, PORT};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

/// Largest answer, in bytes.
const ANSWER_BYTES_MAX: usize = 64 << 20;
/// Longest wait for a connection.
const CONNECT_MAX: Duration = Duration::from_secs(10);

/// The agent refused, with its own words.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.message)]
pub(crate) struct Refused(pub(crate) Failure);

/// Where the agent is.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    place: Place,
}

#[derive(Debug, Clone)]
enum Place {
    Local(PathBuf),
    Remote { address: String, fingerprint: Fingerprint },
}

impl Client {
    /// - `agent`: `unix:PATH` or `https://HOST[:PORT]`.
    pub(crate) fn new(agent: &str, fingerprint: Option<&str>) -> Result<Self> {
        if let Some(path) = agent.strip_prefix("unix:") {
            return Ok(Self { place: Place::Local(path.into()) });
        }
        let Some(host) = agent.strip_prefix("https://") else {
            bail!("{agent:?} is no agent: use unix:PATH or https://HOST[:PORT]");
        };
        let Some(fingerprint) = fingerprint else {
            bail!(
                "give --fingerprint with the agent's fingerprint: `limosa host show` prints it on \
                 that host"
            );
        };
        let host = host.trim_end_matches('/');
        let has_port = host.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
        let address = if has_port { host.to_owned() } else { format!("{host}:{PORT}") };
        let fingerprint = fingerprint.parse().context("--fingerprint")?;
        Ok(Self { place: Place::Remote { address, fingerprint } })
    }

    pub(crate) async fn get<R: DeserializeOwned>(&self, path: &str) -> Result<R> {
        self.ask(Method::GET, path, Bytes::new()).await
    }

    pub(crate) async fn delete(&self, path: &str) -> Result<()> {
        self.ask(Method::DELETE, path, Bytes::new()).await
    }

    pub(crate) async fn post<B: Serialize, R: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
    ) -> Result<R> {
        self.ask(Method::POST, path, serde_json::to_vec(body)?.into()).await
    }

    async fn ask<R: DeserializeOwned>(&self, method: Method, path: &str, body: Bytes) -> Result<R> {
        let answer = self.send(method, path, body, false).await?;
        let bytes = Limited::new(answer.into_body(), ANSWER_BYTES_MAX)
            .collect()
            .await
            .map_err(|error| anyhow::anyhow!("the agent's answer was cut off: {error}"))?
            .to_bytes();
        serde_json::from_slice(&bytes)
            .context("the agent's answer is not understood: are limosa and limosad of one version?")
    }

    /// A stream of server-sent events.
    pub(crate) async fn stream(&self, path: &str) -> Result<Incoming> {
        Ok(self.send(Method::GET, path, Bytes::new(), false).await?.into_body())
    }

    /// A connection of raw bytes to a console.
    pub(crate) async fn upgrade(&self, path: &str) -> Result<TokioIo<hyper::upgrade::Upgraded>> {
        let answer = self.send(Method::GET, path, Bytes::new(), true).await?;
        Ok(TokioIo::new(hyper::upgrade::on(answer).await?))
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        upgrade: bool,
    ) -> Result<Response<Incoming>> {
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "limosa")
            .header("content-type", "application/json");
        if upgrade {
            request = request.header("connection", "upgrade").header("upgrade", CONSOLE_PROTOCOL);
        }
        let request = request.body(Full::new(body))?;
        let mut sender = self.connect().await?;
        let answer = sender.send_request(request).await.context("the agent gave no answer")?;
        let status = answer.status();
        if status.is_success() || (upgrade && status == StatusCode::SWITCHING_PROTOCOLS) {
            return Ok(answer);
        }
        let bytes = Limited::new(answer.into_body(), ANSWER_BYTES_MAX)
            .collect()
            .await
            .map_err(|error| anyhow::anyhow!("the agent's answer was cut off: {error}"))?
            .to_bytes();
        match serde_json::from_slice::<Failure>(&bytes) {
            Ok(failure) => Err(Refused(failure).into()),
            Err(_) => bail!("the agent answered {status}"),
        }
    }

    async fn connect(&self) -> Result<SendRequest<Full<Bytes>>> {
        match &self.place {
            Place::Local(path) => {
                let stream =
                    UnixStream::connect(path).await.map_err(|error| local(path, &error))?;
                speak(stream).await
            }
            Place::Remote { address, fingerprint } => {
                let identity = identity()?;
                let config = tls::client_config(&identity, *fingerprint, tls::ALPN_HTTP);
                let connect = async {
                    let stream = TcpStream::connect(address).await?;
                    let connector = tokio_rustls::TlsConnector::from(config);
                    connector.connect(tls::server_name(), stream).await
                };
                let stream = tokio::time::timeout(CONNECT_MAX, connect)
                    .await
                    .with_context(|| format!("no connection to {address} in time"))?
                    .with_context(|| {
                        format!(
                            "cannot connect to {address}: does limosad run there, and does it \
                                 know you (`limosa operator add`)?"
                        )
                    })?;
                speak(stream).await
            }
        }
    }
}

fn local(path: &Path, error: &std::io::Error) -> anyhow::Error {
    let shown = path.display();
    match error.kind() {
        std::io::ErrorKind::PermissionDenied => {
            anyhow::anyhow!("you may not use {shown}: become root, or a member of the group limosa")
        }
        std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused => anyhow::anyhow!(
            "limosad does not run here ({shown}: {error}): start it with `systemctl start limosad`"
        ),
        _ => anyhow::anyhow!("cannot connect to {shown}: {error}"),
    }
}

async fn speak(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
) -> Result<SendRequest<Full<Bytes>>> {
    let (sender, connection) = handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection.with_upgrades());
    Ok(sender)
}

/// Folder of the user's own certificate.
pub(crate) fn identity_folder() -> Result<PathBuf> {
    let base = match std::env::var_os("XDG_CONFIG_HOME") {
        Some(folder) => PathBuf::from(folder),
        None => PathBuf::from(std::env::var_os("HOME").context("HOME is not set")?).join(".config"),
    };
    Ok(base.join("limosa"))
}

/// The user's own certificate, made when missing.
pub(crate) fn identity() -> Result<Identity> {
    let name = std::env::var("USER").unwrap_or_else(|_| "operator".to_owned());
    let checked: limosa_protocol::id::HostName =
        name.parse().or_else(|_| "operator".parse()).context("a name for your certificate")?;
    Ok(Identity::load_or_create(&identity_folder()?, checked.as_str())?)
}
