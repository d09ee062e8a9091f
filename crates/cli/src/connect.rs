//! The way to an agent: its local socket, or TLS with both certificates pinned.
//!
//! ```text
//! unix:PATH ──► socket (the kernel tells the agent who we are)
//! https://  ──► pinned? ─yes──────────────────────────────► TLS ─► keep the pin
//!                  └─no─► look at the certificate, ask a person ──┘
//! ```
//!
//! **Invariants.** Nothing is sent to a remote agent before its certificate is
//! confirmed. Where nobody can be asked, an unknown certificate is refused.

use std::error::Error as StdError;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use limosa_auth::tls::{self, PinMismatch};
use limosa_auth::{Fingerprint, Identity};
use limosa_http::BoxIo;
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::client::TlsStream;

use crate::address::Address;
use crate::{known, prompt, show};

/// Longest wait for a connection, in seconds.
const CONNECT_SECONDS_MAX: u64 = 10;

/// Why there is no connection, with the remedy.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    /// Nobody listens on the local socket.
    #[error(
        "limosad does not run on this host (nobody answers at {}): start it with `systemctl start \
         limosad`", path.display()
    )]
    NotRunning { path: PathBuf, source: io::Error },
    /// The local socket is closed to this user.
    #[error(
        "you may not command this host ({}): become root, or join the group limosa", path.display()
    )]
    NotAllowed { path: PathBuf, source: io::Error },
    /// The local socket cannot be used for another reason.
    #[error("cannot connect to {}", path.display())]
    Socket { path: PathBuf, source: io::Error },
    /// The remote host cannot be reached, or does not speak TLS.
    #[error("cannot connect to {address}: see that limosad runs there and the port is open")]
    Unreachable { address: String, source: io::Error },
    /// The remote host says nothing.
    #[error(
        "{address} did not answer within {CONNECT_SECONDS_MAX} s: see that limosad runs there and \
         the port is open"
    )]
    Silent { address: String },
    /// Nobody has confirmed the certificate, and nobody can be asked.
    #[error(
        "the certificate of {address} is not known yet: compare {found} with what `limosa host \
         show` prints on that host, then give it as --fingerprint"
    )]
    Unconfirmed { address: String, found: Fingerprint },
    /// A person said no.
    #[error("the certificate of {address} was not confirmed: nothing was sent")]
    Declined { address: String },
    /// The certificate is not the confirmed one.
    #[error(
        "{address} shows another certificate than the one that was confirmed: it may not be the \
         host you mean\n  expected {}\n  found    {}\nIf that host was installed anew, compare \
         what `limosa host show` prints there and give it as --fingerprint",
        mismatch.expected, mismatch.found
    )]
    Changed { address: String, mismatch: PinMismatch },
    /// The agent does not know our certificate.
    #[error(
        "{address} does not know you: run there `limosa operator add NAME --certificate FILE`, \
         with a copy of {}", certificate.display()
    )]
    Stranger { address: String, certificate: PathBuf },
}

/// Connects to an agent.
///
/// - `given`: the fingerprint that the operator gave, for a remote agent.
pub(crate) async fn connect(address: &Address, given: Option<Fingerprint>) -> Result<BoxIo> {
    match address {
        Address::Local(path) => {
            let stream = UnixStream::connect(path).await;
            Ok(Box::new(stream.map_err(|source| local_error(path.clone(), source))?))
        }
        Address::Remote(address) => Ok(Box::new(remote(address, given).await?)),
    }
}

/// Tells apart why a remote agent cut the connection: TLS 1.3 brings the
/// refusal of a client's certificate only with the first answer.
pub(crate) fn refusal(address: &Address, error: &(dyn StdError + 'static)) -> Option<ConnectError> {
    let Address::Remote(address) = address else { return None };
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(rustls::Error::AlertReceived(
            rustls::AlertDescription::AccessDenied
            | rustls::AlertDescription::BadCertificate
            | rustls::AlertDescription::CertificateUnknown,
        )) = tls_error(error)
        {
            let certificate = known::certificate_file().ok()?;
            return Some(ConnectError::Stranger { address: address.clone(), certificate });
        }
        cause = error.source();
    }
    None
}

fn local_error(path: PathBuf, source: io::Error) -> ConnectError {
    match source.kind() {
        io::ErrorKind::PermissionDenied => ConnectError::NotAllowed { path, source },
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
            ConnectError::NotRunning { path, source }
        }
        _ => ConnectError::Socket { path, source },
    }
}

async fn remote(address: &str, given: Option<Fingerprint>) -> Result<TlsStream<TcpStream>> {
    let identity = known::identity()?;
    let pin = match given {
        Some(fingerprint) => Some(fingerprint),
        None => known::fingerprint(address)?,
    };
    let pin = match pin {
        Some(pin) => pin,
        None => confirm(address, &identity).await?,
    };
    let stream = handshake(address, &identity, pin).await?;
    known::remember(address, pin).context("remembering the agent's certificate")?;
    Ok(stream)
}

/// Asks a person about a certificate that was never seen.
async fn confirm(address: &str, identity: &Identity) -> Result<Fingerprint> {
    // No certificate has this digest, so the handshake ends at the look at the
    // host's certificate: neither ours nor any request is sent.
    let mismatch = match handshake(address, identity, Fingerprint([0; 32])).await {
        Err(ConnectError::Changed { mismatch, .. }) => mismatch,
        Err(error) => return Err(error.into()),
        Ok(_) => anyhow::bail!("{address} shows a certificate that cannot be"),
    };
    let (address, found) = (address.to_owned(), mismatch.found);
    if !prompt::can_ask() {
        return Err(ConnectError::Unconfirmed { address, found }.into());
    }
    show::note(&format!(
        "The certificate of {address} is not known yet. Its fingerprint is\n  {found}\nCompare it \
         with what `limosa host show` prints on that host."
    ));
    match prompt::ask("Is it the same? (yes/no)", "--fingerprint")?.as_str() {
        "yes" => Ok(found),
        _ => Err(ConnectError::Declined { address }.into()),
    }
}

async fn handshake(
    address: &str,
    identity: &Identity,
    pin: Fingerprint,
) -> Result<TlsStream<TcpStream>, ConnectError> {
    let connector =
        tokio_rustls::TlsConnector::from(tls::client_config(identity, pin, tls::ALPN_HTTP));
    let connect = async {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        connector.connect(tls::server_name(), stream).await
    };
    let address = address.to_owned();
    match tokio::time::timeout(Duration::from_secs(CONNECT_SECONDS_MAX), connect).await {
        Err(_) => Err(ConnectError::Silent { address }),
        Ok(Err(source)) => Err(match pin_mismatch(&source) {
            Some(mismatch) => ConnectError::Changed { address, mismatch },
            None => ConnectError::Unreachable { address, source },
        }),
        Ok(Ok(stream)) => Ok(stream),
    }
}

fn pin_mismatch(error: &io::Error) -> Option<PinMismatch> {
    match tls_error(error)? {
        rustls::Error::InvalidCertificate(rustls::CertificateError::Other(other)) => {
            other.0.downcast_ref().copied()
        }
        _ => None,
    }
}

/// The error of TLS within an error of input and output.
fn tls_error<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a rustls::Error> {
    error.downcast_ref::<io::Error>()?.get_ref()?.downcast_ref()
}
