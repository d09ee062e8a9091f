//! Learns which addresses a guest uses, by listening on its TAP.
//!
//! Only ARP and ICMPv6 frames reach the agent (the kernel filters the others),
//! so that a busy guest costs nothing. What is learnt is used for one thing: to
//! announce the guest after a switchover.

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use limosa_protocol::vm::Mac;
use socket2::{SockFilter, SockRef};
use tokio::io::unix::AsyncFd;

use super::packet;

/// Most addresses remembered for a guest; the one not seen for longest goes.
const ADDRESS_COUNT_MAX: usize = 32;

/// Most bytes looked at in a frame: an ICMPv6 neighbour message and its headers.
const FRAME_BYTES_MAX: usize = 128;

/// Addresses that a guest was seen to use, newest first.
#[derive(Clone, Default, Debug)]
pub(crate) struct Addresses(Arc<Mutex<VecDeque<IpAddr>>>);

impl Addresses {
    /// The addresses, newest first.
    pub(crate) fn list(&self) -> Vec<IpAddr> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().copied().collect()
    }

    /// Notes an address as used just now.
    pub(crate) fn note(&self, address: IpAddr) {
        let mut addresses = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        addresses.retain(|known| *known != address);
        addresses.push_front(address);
        addresses.truncate(ADDRESS_COUNT_MAX);
    }
}

/// Listens on a TAP until the link is gone.
///
/// - `link`: index of the TAP.
/// - `mac`: the guest's address on it; frames from any other are not believed.
pub(crate) async fn listen(link: u32, mac: Mac, addresses: Addresses) -> std::io::Result<()> {
    let socket = packet::open(link)?;
    // ldh [12]; jeq ARP; jeq IPv6; ldb [20]; jeq ICMPv6; else drop.
    let filter = [
        SockFilter::new(0x28, 0, 0, 12),
        SockFilter::new(0x15, 3, 0, 0x0806),
        SockFilter::new(0x15, 0, 3, 0x86dd),
        SockFilter::new(0x30, 0, 0, 20),
        SockFilter::new(0x15, 0, 1, 58),
        SockFilter::new(0x06, 0, 0, 128),
        SockFilter::new(0x06, 0, 0, 0),
    ];
    SockRef::from(&socket).attach_filter(&filter)?;
    // SAFETY: the `OwnedFd` keeps the descriptor open for as long as it is
    // registered.
    let socket: AsyncFd<OwnedFd> = unsafe { AsyncFd::register(socket) }?;
    let mut frame = [0; FRAME_BYTES_MAX];
    loop {
        let mut ready = socket.readable().await?;
        let received = ready.try_io(|socket| {
            let (length, _) = rustix::net::recv(
                socket.get_ref(),
                &mut frame[..],
                rustix::net::RecvFlags::empty(),
            )?;
            Ok(length)
        });
        match received {
            Ok(Ok(length)) => {
                if let Some(address) = source_address(&frame[..length.min(FRAME_BYTES_MAX)], mac) {
                    addresses.note(address);
                }
            }
            Ok(Err(error)) => return Err(error),
            Err(_would_block) => {}
        }
    }
}

/// The address that the sender of a frame calls its own, if the sender is `mac`.
fn source_address(frame: &[u8], mac: Mac) -> Option<IpAddr> {
    if frame.get(6..12)? != mac.0 {
        return None;
    }
    match frame.get(12..14)? {
        [0x08, 0x06] => {
            let address = Ipv4Addr::from(<[u8; 4]>::try_from(frame.get(28..32)?).ok()?);
            (!address.is_unspecified() && !address.is_broadcast() && !address.is_multicast())
                .then_some(IpAddr::V4(address))
        }
        [0x86, 0xdd] => {
            let address = Ipv6Addr::from(<[u8; 16]>::try_from(frame.get(22..38)?).ok()?);
            (!address.is_unspecified() && !address.is_multicast()).then_some(IpAddr::V6(address))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: Mac = Mac([0x52, 0x54, 0, 1, 2, 3]);

    #[test]
    fn only_the_guest_itself_is_believed() {
        let mut frame = vec![0xff; 6];
        frame.extend_from_slice(&MAC.0);
        frame.extend_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        frame.extend_from_slice(&MAC.0);
        frame.extend_from_slice(&[10, 0, 0, 9]);
        assert_eq!(source_address(&frame, MAC), Some("10.0.0.9".parse().unwrap()));
        assert_eq!(source_address(&frame, Mac([2, 0, 0, 0, 0, 1])), None);
        for length in 0..frame.len() {
            assert_eq!(source_address(&frame[..length], MAC), None);
        }
    }

    #[test]
    fn the_list_is_bounded_and_newest_first() {
        let addresses = Addresses::default();
        for last in 0..100 {
            addresses.note(IpAddr::from([10, 0, 0, last]));
        }
        addresses.note(IpAddr::from([10, 0, 0, 80]));
        let list = addresses.list();
        assert_eq!(list.len(), ADDRESS_COUNT_MAX);
        assert_eq!(list[0], IpAddr::from([10, 0, 0, 80]));
        assert_eq!(list[1], IpAddr::from([10, 0, 0, 99]));
    }
}
