//! The control link to a paired host: HTTPS on one kept connection.
//!
//! A switchover must not wait for a new TLS handshake, so a [`PeerLink`] keeps
//! its connection and makes a new one only when that one broke.

use std::sync::Arc;
use std::time::Duration;

use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1::SendRequest;
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use limosa_auth::{Fingerprint, tls};
use limosa_protocol::api::{BODY_BYTES_MAX, PORT};
use limosa_protocol::id::HostName;
use limosa_protocol::peer::{CHANNEL_ALPN, CHANNEL_HELLO_BYTES_MAX, ChannelHello, FileReceived};
use limosa_protocol::{api, peer};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Mutex;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::agent::Agent;
use crate::failure::{Failure, chain};
use crate::fault::{self, Edge, Kind};
use crate::store::{PeerRecord, StoreError};

/// Longest wait for a connection and its handshake.
const CONNECT_MS_MAX: u64 = 5_000;
/// Longest wait for an answer, where the caller names no other.
const ANSWER_MS_MAX: u64 = 30_000;
/// Longest wait until a part of a file is there.
const FILE_PART_MS_MAX: u64 = 60_000;
/// A peer that acknowledges nothing for this long is gone.
const SILENCE_MS_MAX: u32 = 10_000;
/// Most bytes of a data channel that wait in the kernel to be sent: what is among
/// them when the guest is stopped is blackout. Bytes on their way are TCP's to
/// count, or a far link could not be filled.
const CHANNEL_UNSENT_BYTES_MAX: u32 = 256 << 10;

/// Why a peer gave no result.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum PeerError {
    /// It was asked nothing: something on this host is wrong.
    #[error("{0}")]
    Here(String),
    /// It may or may not have done what was asked.
    #[error("{0}")]
    Unreachable(String),
    /// It answered, and refused.
    #[error("{}", .0.message)]
    Refused(api::Failure),
}

impl From<PeerError> for Failure {
    fn from(error: PeerError) -> Self {
        match error {
            PeerError::Here(message) => Self::internal(message),
            PeerError::Unreachable(message) => Self::peer(message),
            PeerError::Refused(failure) => Self(failure),
        }
    }
}

/// Why there is no link to a host.
#[derive(Debug)]
pub(crate) enum NoLink {
    /// The two were never paired, or are no more.
    NotPaired,
    /// Its record cannot be read.
    Damaged,
    /// No record can be read.
    Store(Failure),
}

/// How a host is paired, for people.
pub(crate) fn pairing_remedy(name: &HostName) -> String {
    format!("run `limosa host invite` on {name}, then `limosa host pair ADDRESS` here")
}

type Body = BoxBody<Bytes, std::io::Error>;

/// A connection to one paired host, made when it is needed.
pub(crate) struct PeerLink {
    name: HostName,
    address: String,
    control: TlsConnector,
    channel: TlsConnector,
    sender: Mutex<Option<SendRequest<Body>>>,
}

impl PeerLink {
    /// A link to a paired host.
    pub(crate) fn new(agent: &Agent, name: &HostName) -> Result<Self, Failure> {
        Self::open(agent, name).map_err(|error| match error {
            NoLink::NotPaired => Failure::not_found(format!(
                "no host {name} is paired with this one: {}",
                pairing_remedy(name)
            )),
            NoLink::Damaged => Failure::internal(format!(
                "what is recorded of host {name} is damaged: `limosa host unpair {name}`, then \
                 pair again"
            )),
            NoLink::Store(failure) => failure,
        })
    }

    /// The same, with the reason told apart.
    pub(crate) fn open(agent: &Agent, name: &HostName) -> Result<Self, NoLink> {
        let recorded = agent.store.get(name.as_str());
        let record: PeerRecord = match recorded {
            Ok(record) => record.ok_or(NoLink::NotPaired)?,
            Err(StoreError::Record { .. }) => return Err(NoLink::Damaged),
            Err(error) => return Err(NoLink::Store(error.into())),
        };
        let expected: Fingerprint = record.fingerprint.parse().map_err(|_| NoLink::Damaged)?;
        let connector =
            |alpn: &[u8]| TlsConnector::from(tls::client_config(&agent.identity, expected, alpn));
        Ok(Self {
            name: name.clone(),
            address: record.address,
            control: connector(tls::ALPN_HTTP),
            channel: connector(CHANNEL_ALPN),
            sender: Mutex::new(None),
        })
    }

    /// The host at the other end.
    pub(crate) fn name(&self) -> &HostName {
        &self.name
    }

    /// Asks and waits for the answer.
    pub(crate) async fn post<B: Serialize, R: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
    ) -> Result<R, PeerError> {
        self.post_within(path, body, ANSWER_MS_MAX).await
    }

    /// Asks and waits for the answer, at most `limit_ms`.
    pub(crate) async fn post_within<B: Serialize, R: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
        limit_ms: u64,
    ) -> Result<R, PeerError> {
        let bytes = serde_json::to_vec(body)
            .map_err(|error| PeerError::Here(format!("cannot write {path}: {error}")))?;
        let body = Full::new(Bytes::from(bytes)).map_err(|never| match never {}).boxed();
        self.request(Method::POST, path, body, limit_ms).await
    }

    /// Asks without a body.
    pub(crate) async fn get<R: DeserializeOwned>(&self, path: &str) -> Result<R, PeerError> {
        self.get_within(path, ANSWER_MS_MAX).await
    }

    /// Asks without a body and waits for the answer, at most `limit_ms`.
    pub(crate) async fn get_within<R: DeserializeOwned>(
        &self,
        path: &str,
        limit_ms: u64,
    ) -> Result<R, PeerError> {
        let body = Full::new(Bytes::new()).map_err(|never| match never {}).boxed();
        self.request(Method::GET, path, body, limit_ms).await
    }

    /// Sends a part of a file.
    pub(crate) async fn put_part(
        &self,
        path: &str,
        part: Bytes,
    ) -> Result<FileReceived, PeerError> {
        let body = Full::new(part).map_err(|never| match never {}).boxed();
        self.request(Method::PUT, path, body, FILE_PART_MS_MAX).await
    }

    async fn request<R: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Body,
        limit_ms: u64,
    ) -> Result<R, PeerError> {
        let name = fault::message(&method, path);
        fault::reach(Kind::Send, &name, Edge::Before).await;
        let result = self.exchange(method, path, body, limit_ms).await;
        fault::reach(Kind::Send, &name, Edge::After).await;
        result
    }

    async fn exchange<R: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Body,
        limit_ms: u64,
    ) -> Result<R, PeerError> {
        let mut sender = self.sender.lock().await;
        let unreachable = |what: String| {
            PeerError::Unreachable(format!("{} at {}: {what}", self.name, self.address))
        };
        // A kept connection that the peer closed is found out here, before a
        // request is given to it: repeating a request is never a guess.
        let mut kept = sender.take();
        let is_open = match &mut kept {
            Some(kept) => kept.ready().await.is_ok() && !kept.is_closed(),
            None => false,
        };
        let mut ready = match kept.filter(|_| is_open) {
            Some(kept) => kept,
            None => self.connect_control().await?,
        };
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "limosa")
            .header("content-type", "application/json")
            .body(body)
            .map_err(|error| unreachable(error.to_string()))?;
        let exchange = async {
            let answer =
                ready.send_request(request).await.map_err(|error| unreachable(chain(&error)))?;
            let status = answer.status();
            let bytes = Limited::new(answer.into_body(), BODY_BYTES_MAX)
                .collect()
                .await
                .map_err(|error| unreachable(error.to_string()))?
                .to_bytes();
            if !status.is_success() {
                return Err(match serde_json::from_slice::<api::Failure>(&bytes) {
                    Ok(failure) => PeerError::Refused(failure),
                    Err(_) => unreachable(format!("answered {status}")),
                });
            }
            serde_json::from_slice(&bytes)
                .map_err(|error| unreachable(format!("an answer that is not understood: {error}")))
        };
        let result = tokio::time::timeout(Duration::from_millis(limit_ms), exchange)
            .await
            .unwrap_or_else(|_| Err(unreachable(format!("no answer within {limit_ms} ms"))));
        if !matches!(result, Err(PeerError::Unreachable(_))) {
            *sender = Some(ready);
        }
        result
    }

    async fn connect_control(&self) -> Result<SendRequest<Body>, PeerError> {
        let stream = self.connect(&self.control).await?;
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| PeerError::Unreachable(chain(&error)))?;
        tokio::spawn(connection);
        Ok(sender)
    }

    async fn connect(&self, tls: &TlsConnector) -> Result<TlsStream<TcpStream>, PeerError> {
        connect(&self.address, tls).await.map_err(|what| {
            PeerError::Unreachable(format!("{} at {}: {what}", self.name, self.address))
        })
    }

    /// Opens a data channel or return path, past its hello; `None` when the
    /// destination has everything already.
    pub(crate) async fn open_channel(
        &self,
        hello: &ChannelHello,
    ) -> Result<Option<TlsStream<TcpStream>>, PeerError> {
        fault::reach(Kind::Send, "channel", Edge::Before).await;
        let opened = self.connect_channel(hello).await;
        fault::reach(Kind::Send, "channel", Edge::After).await;
        opened
    }

    async fn connect_channel(
        &self,
        hello: &ChannelHello,
    ) -> Result<Option<TlsStream<TcpStream>>, PeerError> {
        let unreachable = |what: String| {
            PeerError::Unreachable(format!("a data channel to {}: {what}", self.name))
        };
        let text = serde_json::to_vec(hello).map_err(|error| PeerError::Here(error.to_string()))?;
        let length = u16::try_from(text.len())
            .ok()
            .filter(|length| *length <= CHANNEL_HELLO_BYTES_MAX)
            .ok_or_else(|| PeerError::Here("a channel's hello is too long".to_owned()))?;
        let mut stream = self.connect(&self.channel).await?;
        if let Err(error) = keep_little_unsent(stream.get_ref().0) {
            tracing::warn!(%error, "a channel keeps more unsent than it should");
        }
        let exchange = async {
            stream.write_all(&length.to_be_bytes()).await?;
            stream.write_all(&text).await?;
            stream.flush().await?;
            stream.read_u8().await
        };
        match tokio::time::timeout(Duration::from_millis(CONNECT_MS_MAX), exchange).await {
            Ok(Ok(peer::CHANNEL_ACCEPTED)) => Ok(Some(stream)),
            Ok(Ok(peer::CHANNEL_NOT_NEEDED)) => Ok(None),
            Ok(Ok(_)) => Err(unreachable("an answer that is not understood".to_owned())),
            Ok(Err(error)) => Err(unreachable(error.to_string())),
            Err(_) => Err(unreachable(format!("no answer within {CONNECT_MS_MAX} ms"))),
        }
    }
}

/// Connects to an agent: TCP with keep-alives of its own, then TLS.
pub(crate) async fn connect(
    address: &str,
    tls: &TlsConnector,
) -> Result<TlsStream<TcpStream>, String> {
    let work = async {
        let stream = TcpStream::connect(address)
            .await
            .map_err(|error| format!("{error}: is limosad running there, and the port open?"))?;
        tune(&stream).map_err(|error| error.to_string())?;
        tls.connect(tls::server_name(), stream).await.map_err(|error| chain(&error))
    };
    tokio::time::timeout(Duration::from_millis(CONNECT_MS_MAX), work)
        .await
        .unwrap_or_else(|_| Err(format!("no connection within {CONNECT_MS_MAX} ms")))
}

/// Settings of every connection between hosts: no delay, and a dead peer is
/// noticed in seconds.
pub(crate) fn tune(stream: &TcpStream) -> std::io::Result<()> {
    let socket = socket2::SockRef::from(stream);
    socket.set_tcp_nodelay(true)?;
    let keepalive = socket2::TcpKeepalive::new()
        .with_time(Duration::from_secs(3))
        .with_interval(Duration::from_secs(2))
        .with_retries(3);
    socket.set_tcp_keepalive(&keepalive)?;
    socket.set_tcp_user_timeout(Some(Duration::from_millis(SILENCE_MS_MAX.into())))
}

/// Bounds what waits in the kernel to be sent.
fn keep_little_unsent(stream: &TcpStream) -> std::io::Result<()> {
    socket2::SockRef::from(stream).set_tcp_notsent_lowat(CHANNEL_UNSENT_BYTES_MAX)
}

/// Completes an address with the usual port.
pub(crate) fn with_port(address: &str) -> String {
    if address.parse::<std::net::SocketAddr>().is_ok() {
        return address.to_owned();
    }
    if let Ok(bare) = address.parse::<std::net::IpAddr>() {
        return std::net::SocketAddr::new(bare, PORT).to_string();
    }
    match address.rsplit_once(':') {
        Some((_, port)) if port.parse::<u16>().is_ok() => address.to_owned(),
        _ => format!("{address}:{PORT}"),
    }
}

/// Hands a channel over to threads: from here on it blocks.
pub(crate) fn into_blocking(
    stream: TcpStream,
    connection: rustls::Connection,
) -> std::io::Result<limosa_plane::ChannelIo> {
    let socket = stream.into_std()?;
    socket.set_nonblocking(false)?;
    socket.set_read_timeout(Some(limosa_plane::SILENCE_MAX))?;
    let closer = Arc::new(socket.try_clone()?);
    let io: Box<dyn limosa_plane::ReadWrite + Send> = match connection {
        rustls::Connection::Client(tls) => Box::new(rustls::StreamOwned::new(tls, socket)),
        rustls::Connection::Server(tls) => Box::new(rustls::StreamOwned::new(tls, socket)),
    };
    let shutdown = Box::new(move || {
        // A socket that is already closed needs no closing.
        drop(closer.shutdown(std::net::Shutdown::Both));
    });
    Ok(limosa_plane::ChannelIo { io, shutdown })
}

#[cfg(test)]
mod tests {
    use super::with_port;

    #[test]
    fn addresses_get_their_port() {
        for (given, full) in [
            ("10.0.0.1", "10.0.0.1:6600"),
            ("10.0.0.1:7", "10.0.0.1:7"),
            ("fd00::1", "[fd00::1]:6600"),
            ("[fd00::1]:7", "[fd00::1]:7"),
            ("host2", "host2:6600"),
            ("host2:7", "host2:7"),
        ] {
            assert_eq!(with_port(given), full);
        }
    }
}
