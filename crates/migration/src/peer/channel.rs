//! Data connections to a paired host: opened here, used by the threads of the plane.

use std::sync::Arc;

use limosa_protocol::peer::{self, CHANNEL_HELLO_BYTES_MAX, ChannelHello};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

use super::connect::{CONNECT_MAX, connect};
use super::{PeerClient, PeerError};
use limosa_faults::{self as faults, Edge, Kind};

/// Most bytes of a data channel that wait in the kernel to be sent: those that are among
/// them when the guest is stopped are blackout. Bytes in flight are not limited here, or a
/// link with a long round trip could not be filled.
const CHANNEL_UNSENT_BYTES_MAX: u32 = 256 << 10;

impl PeerClient {
    /// Opens a data channel or return path, past its hello; `None` when the
    /// destination has everything already.
    pub(crate) async fn open_channel(
        &self,
        hello: &ChannelHello,
    ) -> Result<Option<TlsStream<TcpStream>>, PeerError> {
        faults::reach(Kind::Send, "channel", Edge::Before).await;
        let opened = self.connect_channel(hello).await;
        faults::reach(Kind::Send, "channel", Edge::After).await;
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
        let mut stream = connect(&self.address, &self.channel)
            .await
            .map_err(|what| unreachable(format!("{}: {what}", self.address)))?;
        if let Err(error) = keep_little_unsent(stream.get_ref().0) {
            tracing::warn!(%error, "a channel keeps more bytes unsent than it should");
        }
        let exchange = async {
            stream.write_all(&length.to_be_bytes()).await?;
            stream.write_all(&text).await?;
            stream.flush().await?;
            stream.read_u8().await
        };
        match tokio::time::timeout(CONNECT_MAX, exchange).await {
            Ok(Ok(peer::CHANNEL_ACCEPTED)) => Ok(Some(stream)),
            Ok(Ok(peer::CHANNEL_NOT_NEEDED)) => Ok(None),
            Ok(Ok(_)) => Err(unreachable("an answer that is not understood".to_owned())),
            Ok(Err(error)) => Err(unreachable(error.to_string())),
            Err(_) => Err(unreachable(format!("no answer within {} s", CONNECT_MAX.as_secs()))),
        }
    }
}

/// Bounds the bytes that wait in the kernel.
fn keep_little_unsent(stream: &TcpStream) -> std::io::Result<()> {
    socket2::SockRef::from(stream).set_tcp_notsent_lowat(CHANNEL_UNSENT_BYTES_MAX)
}

/// Makes a channel of a connection, for threads: from here on it blocks.
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
