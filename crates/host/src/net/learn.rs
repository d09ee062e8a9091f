//! Learns which addresses a guest uses, by listening on its TAP.
//!
//! Only ARP and ICMPv6 frames reach the agent (the kernel filters the others),
//! so that a busy guest costs nothing. What is learnt is used for one thing: to
//! announce the guest after a switchover.

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use limosa_protocol::peer::{GUEST_ADDRESS_COUNT_MAX, GuestAddress, NIC_ADDRESS_COUNT_MAX};
use limosa_protocol::vm::{Mac, Nic};
use socket2::{SockFilter, SockRef};
use tokio::io::unix::AsyncFd;

use super::packet;

/// Most bytes looked at in a frame: an ICMPv6 neighbour message and its headers.
const FRAME_BYTES_MAX: usize = 128;

/// Addresses that a guest was seen to use, each with its card, newest first. At
/// most [`NIC_ADDRESS_COUNT_MAX`] for each card; the one not seen for longest
/// goes.
#[derive(Clone, Default, Debug)]
pub struct Addresses(Arc<Mutex<VecDeque<GuestAddress>>>);

impl Addresses {
    /// The addresses with their cards, newest first.
    pub fn seen(&self) -> Vec<GuestAddress> {
        self.lock().iter().copied().collect()
    }

    /// The addresses alone, newest first, each once.
    pub fn list(&self) -> Vec<IpAddr> {
        let mut list = Vec::new();
        for GuestAddress { address, .. } in self.lock().iter() {
            if !list.contains(address) {
                list.push(*address);
            }
        }
        list
    }

    /// Notes an address as used by a card just now.
    pub fn note(&self, mac: Mac, address: IpAddr) {
        let mut addresses = self.lock();
        let seen = GuestAddress { mac, address };
        addresses.retain(|known| *known != seen);
        addresses.push_front(seen);
        let of_card = addresses.iter().filter(|known| known.mac == mac).count();
        if of_card > NIC_ADDRESS_COUNT_MAX
            && let Some(oldest) = addresses.iter().rposition(|known| known.mac == mac)
        {
            addresses.remove(oldest);
        }
    }

    /// Takes what another host saw of the guest: only of its own cards, and only
    /// what a card can use.
    pub fn take(&self, seen: &[GuestAddress], nics: &[Nic]) {
        let known = &seen[..seen.len().min(GUEST_ADDRESS_COUNT_MAX)];
        for GuestAddress { mac, address } in known.iter().rev() {
            if nics.iter().any(|nic| nic.mac == Some(*mac)) && is_of_one_station(*address) {
                self.note(*mac, *address);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<GuestAddress>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether one station can have an address.
fn is_of_one_station(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => {
            !(v4.is_unspecified() || v4.is_broadcast() || v4.is_multicast() || v4.is_loopback())
        }
        IpAddr::V6(v6) => !(v6.is_unspecified() || v6.is_multicast() || v6.is_loopback()),
    }
}

/// Listens on a TAP until the link is gone.
///
/// - `link`: index of the TAP.
/// - `mac`: the guest's address on it; frames from any other are not believed.
pub async fn listen(link: u32, mac: Mac, addresses: Addresses) -> std::io::Result<()> {
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
                    addresses.note(mac, address);
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
    let address = match frame.get(12..14)? {
        [0x08, 0x06] => IpAddr::V4(Ipv4Addr::from(<[u8; 4]>::try_from(frame.get(28..32)?).ok()?)),
        [0x86, 0xdd] => IpAddr::V6(Ipv6Addr::from(<[u8; 16]>::try_from(frame.get(22..38)?).ok()?)),
        _ => return None,
    };
    is_of_one_station(address).then_some(address)
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

    /// Goal: a busy card does not push out what is known of a quiet one.
    #[test]
    fn the_list_is_bounded_for_each_card_and_newest_first() {
        let (addresses, quiet) = (Addresses::default(), Mac([0x52, 0x54, 0, 1, 2, 4]));
        let address = |last| IpAddr::from([10, 0, 0, last]);
        addresses.note(quiet, address(80));
        for last in 0..100 {
            addresses.note(MAC, address(last));
        }
        addresses.note(MAC, address(80));
        let seen = addresses.seen();
        assert_eq!(seen.len(), NIC_ADDRESS_COUNT_MAX + 1);
        assert_eq!(seen[0], GuestAddress { mac: MAC, address: address(80) });
        assert_eq!(seen[1], GuestAddress { mac: MAC, address: address(99) });
        assert_eq!(seen.last(), Some(&GuestAddress { mac: quiet, address: address(80) }));
        assert_eq!(addresses.list().len(), NIC_ADDRESS_COUNT_MAX);
    }

    /// Goal: another host cannot have this one announce what is not the guest's.
    #[test]
    fn only_cards_of_the_definition_are_taken_over() {
        let nic = Nic { switch: "lan".parse().unwrap(), mac: Some(MAC) };
        let seen = |mac, address: &str| GuestAddress { mac, address: address.parse().unwrap() };
        let addresses = Addresses::default();
        let theirs = [
            seen(MAC, "10.0.0.2"),
            seen(Mac([2, 0, 0, 0, 0, 1]), "10.0.0.3"),
            seen(MAC, "224.0.0.1"),
            seen(MAC, "::"),
            seen(MAC, "fd00::9"),
        ];
        addresses.take(&theirs, &[nic]);
        assert_eq!(addresses.seen(), [theirs[0], theirs[4]]);
    }
}
