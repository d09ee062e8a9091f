//! TCP and TLS connections to other agents.

use std::time::Duration;

use limosa_auth::tls;
use limosa_protocol::api::PORT;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use limosa_host::failure::chain;

/// Longest wait for a connection and its handshake.
pub(super) const CONNECT_MAX: Duration = Duration::from_secs(5);
/// A peer that acknowledges nothing for this long is gone.
const SILENCE_MAX: Duration = Duration::from_secs(10);

/// Connects to an agent: TCP with keep-alives of its own, then TLS.
pub async fn connect(address: &str, tls: &TlsConnector) -> Result<TlsStream<TcpStream>, String> {
    let work = async {
        let stream = TcpStream::connect(address)
            .await
            .map_err(|error| format!("{error}: is limosad running there, and the port open?"))?;
        tune(&stream).map_err(|error| error.to_string())?;
        tls.connect(tls::server_name(), stream).await.map_err(|error| chain(&error))
    };
    tokio::time::timeout(CONNECT_MAX, work)
        .await
        .unwrap_or_else(|_| Err(format!("no connection within {} s", CONNECT_MAX.as_secs())))
}

/// Settings of every connection between hosts: no delay, and a dead peer is
/// noticed in seconds.
pub fn tune(stream: &TcpStream) -> std::io::Result<()> {
    let socket = socket2::SockRef::from(stream);
    socket.set_tcp_nodelay(true)?;
    let keepalive = socket2::TcpKeepalive::new()
        .with_time(Duration::from_secs(3))
        .with_interval(Duration::from_secs(2))
        .with_retries(3);
    socket.set_tcp_keepalive(&keepalive)?;
    socket.set_tcp_user_timeout(Some(SILENCE_MAX))
}

/// Completes an address with the usual port.
pub fn with_port(address: &str) -> String {
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
