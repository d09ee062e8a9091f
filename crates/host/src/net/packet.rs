//! Raw frames on one link: the sockets below [`super::announce`] and
//! [`super::learn`].

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::net::{AddressFamily, Protocol, SocketFlags, SocketType};

/// Opens a socket that sends and receives whole Ethernet frames on a link.
///
/// - `index`: the link's index.
///
/// # Errors
/// The kernel's: the right to raw sockets is missing, or the link is gone.
pub(super) fn open(index: u32) -> io::Result<OwnedFd> {
    // Protocol 0: nothing is received until the socket is bound to its link.
    let socket = rustix::net::socket_with(
        AddressFamily::PACKET,
        SocketType::RAW,
        SocketFlags::NONBLOCK | SocketFlags::CLOEXEC,
        None::<Protocol>,
    )?;
    // SAFETY: `sockaddr_ll` is plain old data for which all zeroes is valid.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = u16::try_from(libc::AF_PACKET).map_err(io::Error::other)?;
    address.sll_protocol = u16::try_from(libc::ETH_P_ALL).map_err(io::Error::other)?.to_be();
    address.sll_ifindex = i32::try_from(index).map_err(io::Error::other)?;
    let length = libc::socklen_t::try_from(size_of_val(&address)).map_err(io::Error::other)?;
    // SAFETY: the address outlives the call and the length is its own.
    let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
    if bound < 0 { Err(io::Error::last_os_error()) } else { Ok(socket) }
}
