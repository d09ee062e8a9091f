//! Where requests come in, and who sent them.
//!
//! ```text
//! unix socket ── peer credentials ──────────────────────► operator API
//! TCP 6600 ── TLS ─┬─ operator's certificate ───────────► operator API
//!                  ├─ paired host's certificate ────────► peer API
//!                  │             └─ limosa-channel/1 ───► data channels
//!                  └─ anybody, while an invitation is open ► pairing
//! ```
//!
//! **Invariant.** What a caller may do is decided by its [`Caller`], which is
//! made here from credentials that the kernel or TLS has proven.

mod places;

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use axum::Router;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use limosa_auth::tls;
use limosa_auth::trust::PeerRole;
use limosa_protocol::id::HostName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio_rustls::LazyConfigAcceptor;

use crate::agent::Agent;
use crate::caller::Caller;
use limosa_migration::peer;
use places::{Handshake, Places};

/// Most connections at a time over the local socket; [`places`] has those over TCP.
const LOCAL_COUNT_MAX: usize = 512;
/// Longest TLS handshake.
const HANDSHAKE_MS_MAX: u64 = 5_000;
/// Longest conversation of a host that pairs.
const PAIRING_MS_MAX: u64 = 60_000;
/// Longest wait for the next request: a control link is kept for a whole migration.
const HEAD_MS_MAX: u64 = 600_000;

/// Serves the local socket until the agent ends.
pub(crate) async fn local(agent: Arc<Agent>, api: Router) -> anyhow::Result<()> {
    let path = agent.config.socket();
    let listener = bind_local(&path, &agent.config.group)
        .with_context(|| format!("cannot listen on {}", path.display()))?;
    let places = Arc::new(Semaphore::new(LOCAL_COUNT_MAX));
    loop {
        let place = Arc::clone(&places).acquire_owned().await?;
        let (stream, _) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors, most likely: others must end first.
                tracing::warn!(%error, "a local connection was not accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (agent, api) = (Arc::clone(&agent), api.clone());
        tokio::spawn(async move {
            match local_caller(&stream, &agent.config.group) {
                Some(caller) => serve(stream, api, caller).await,
                None => tracing::warn!("a local caller is neither root nor in the group"),
            }
            drop(place);
        });
    }
}

fn bind_local(path: &Path, group: &str) -> anyhow::Result<UnixListener> {
    // The lock of its folder is held, so a socket that is there is dead.
    if path.exists() {
        std::fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    if let Some(group) = nix::unistd::Group::from_name(group)? {
        std::os::unix::fs::chown(path, None, Some(group.gid.as_raw()))?;
    }
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))?;
    Ok(listener)
}

/// The caller at the other end of a local connection, if it may command.
fn local_caller(stream: &UnixStream, group: &str) -> Option<Caller> {
    let peer = stream.peer_cred().ok()?;
    let uid = peer.uid();
    let same_user = uid == rustix::process::geteuid().as_raw();
    let in_group = || -> Option<bool> {
        let group = nix::unistd::Group::from_name(group).ok()??;
        if group.gid.as_raw() == peer.gid() {
            return Some(true);
        }
        let user = nix::unistd::User::from_uid(nix::unistd::Uid::from_raw(uid)).ok()??;
        let name = std::ffi::CString::new(user.name).ok()?;
        Some(nix::unistd::getgrouplist(&name, user.gid).ok()?.contains(&group.gid))
    };
    (uid == 0 || same_user || in_group() == Some(true)).then_some(Caller::Local { uid })
}

/// Serves peers and remote operators on one address until the agent ends.
pub(crate) async fn remote(
    agent: Arc<Agent>,
    listener: TcpListener,
    api: Router,
) -> anyhow::Result<()> {
    let places = Arc::new(Places::new());
    loop {
        let place = places.handshake().await?;
        let (stream, address) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "a connection was not accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Some(handshake) = places.begin(address.ip(), place) else {
            tracing::debug!(%address, "too many connections from there say nothing");
            continue;
        };
        let (agent, api, places) = (Arc::clone(&agent), api.clone(), Arc::clone(&places));
        tokio::spawn(async move {
            let connection = Connection { stream, address, handshake };
            if let Err(error) = one_remote(agent, connection, api, &places).await {
                tracing::debug!(%address, error = format!("{error:#}"), "a connection ended");
            }
        });
    }
}

/// A connection that was just accepted.
struct Connection {
    stream: TcpStream,
    address: SocketAddr,
    handshake: Handshake,
}

async fn one_remote(
    agent: Arc<Agent>,
    Connection { stream, address, handshake: held }: Connection,
    api: Router,
    places: &Places,
) -> anyhow::Result<()> {
    peer::tune(&stream)?;
    let handshake = async {
        let acceptor = rustls::server::Acceptor::default();
        let start = LazyConfigAcceptor::new(acceptor, stream).await?;
        let pairs = tls::wants_pairing(&start.client_hello()) && agent.invitation_is_open();
        let config = if pairs {
            tls::pairing_server_config(&agent.identity)
        } else {
            tls::server_config(&agent.identity, &agent.trust)
        };
        anyhow::Ok((pairs, start.into_stream(config).await?))
    };
    let (pairs, stream) =
        tokio::time::timeout(Duration::from_millis(HANDSHAKE_MS_MAX), handshake).await??;
    let connection = stream.get_ref().1;
    if pairs {
        let certificate = tls::peer_certificate(connection).context("no certificate")?;
        let certificate_der = certificate.as_ref().to_vec();
        let _place = places::take(&places.pairing)?;
        drop(held);
        let conversation = crate::api::pairing::router(agent);
        let served = serve(stream, conversation, Caller::Stranger { certificate_der, address });
        tokio::time::timeout(Duration::from_millis(PAIRING_MS_MAX), served).await?;
        return Ok(());
    }
    let fingerprint = tls::peer_fingerprint(connection).context("no certificate")?;
    let peer = agent.trust.lookup(&fingerprint).context("trusted no more")?;
    let of_role = match peer.role {
        PeerRole::Host => &places.hosts,
        PeerRole::Operator => &places.operators,
    };
    let _place = places::take(of_role)?;
    drop(held);
    let is_channel = connection.alpn_protocol() == Some(tls::ALPN_CHANNEL);
    match (peer.role, is_channel) {
        (PeerRole::Host, true) => {
            let name: HostName = peer.name.parse()?;
            limosa_migration::accept_channel(&agent.migrations, &name, stream).await?;
        }
        (PeerRole::Host, false) => {
            serve(stream, api, Caller::Host { name: peer.name.parse()? }).await;
        }
        (PeerRole::Operator, false) => {
            serve(stream, api, Caller::Operator { name: peer.name }).await
        }
        (PeerRole::Operator, true) => anyhow::bail!("an operator opened a data channel"),
    }
    Ok(())
}

async fn serve(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    router: Router,
    caller: Caller,
) {
    let service = router.layer(axum::Extension(caller));
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(Duration::from_millis(HEAD_MS_MAX))
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(service))
        .with_upgrades()
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "a connection ended in the middle");
    }
}
