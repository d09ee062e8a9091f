//! Tells the network where a VM is now.
//!
//! After a switchover the frames for the guest still go to the source until
//! every switch on the way has seen a frame *from* the guest's MAC arrive from
//! the destination, and neighbours believe what they cached. So the destination
//! sends, out of its switch, for each MAC a RARP request (any switch learns from
//! it), for each IPv4 address a gratuitous ARP, and for each IPv6 address an
//! unsolicited neighbour advertisement (RFC 4861, 7.2.6).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use limosa_protocol::peer::GuestAddress;
use limosa_protocol::vm::Mac;

use super::packet;

/// When the announcements are repeated, in milliseconds after the first: frames
/// can be lost, and a switch's port may need a moment.
const REPEAT_AFTER_MS: [u64; 4] = [50, 150, 350, 800];

/// Which addresses are announced for which card: those that were seen with it.
///
/// - `cards`: link and address of each.
/// - `seen`: newest first. One that was seen with two cards of one link belongs
///   to the newer: neighbours on that link believe in one card for an address.
pub fn by_card(cards: &[(u32, Mac)], seen: &[GuestAddress]) -> Vec<(u32, Mac, Vec<IpAddr>)> {
    let link_of = |mac: Mac| cards.iter().find(|card| card.1 == mac).map(|card| card.0);
    let mut all: Vec<_> = cards.iter().map(|(link, mac)| (*link, *mac, Vec::new())).collect();
    let mut said = Vec::new();
    for GuestAddress { mac, address } in seen {
        let Some(link) = link_of(*mac) else { continue };
        if said.contains(&(link, *address)) {
            continue;
        }
        said.push((link, *address));
        if let Some((.., addresses)) = all.iter_mut().find(|card| card.1 == *mac) {
            addresses.push(*address);
        }
    }
    all
}

/// Announces a NIC from a link: at once, and some times more in the background.
///
/// Problems are logged only: the guest runs either way.
pub fn announce(link: u32, mac: Mac, addresses: &[IpAddr]) {
    let mut frames = vec![rarp(mac)];
    frames.extend(addresses.iter().map(|address| match address {
        IpAddr::V4(address) => gratuitous_arp(mac, *address),
        IpAddr::V6(address) => neighbour_advertisement(mac, *address),
    }));
    let socket = match packet::open(link) {
        Ok(socket) => socket,
        Err(error) => {
            tracing::warn!(%mac, %error, "cannot announce the guest's addresses");
            return;
        }
    };
    let send = move || {
        for frame in &frames {
            if let Err(error) = rustix::net::send(&socket, frame, rustix::net::SendFlags::empty()) {
                tracing::warn!(%mac, %error, "an announcement was not sent");
            }
        }
    };
    send();
    tokio::spawn(async move {
        let mut slept_ms = 0;
        for after_ms in REPEAT_AFTER_MS {
            tokio::time::sleep(Duration::from_millis(after_ms - slept_ms)).await;
            slept_ms = after_ms;
            send();
        }
    });
}

fn ethernet(to: [u8; 6], from: Mac, kind: u16, body: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(14 + body.len().max(46));
    frame.extend_from_slice(&to);
    frame.extend_from_slice(&from.0);
    frame.extend_from_slice(&kind.to_be_bytes());
    frame.extend_from_slice(body);
    // The least Ethernet frame, without its checksum, has 60 bytes.
    frame.resize(frame.len().max(60), 0);
    frame
}

const BROADCAST: [u8; 6] = [0xff; 6];

/// Body of an ARP or RARP packet for IPv4 over Ethernet.
fn arp_body(operation: u16, mac: Mac, sender: Ipv4Addr, target_mac: [u8; 6]) -> Vec<u8> {
    let mut body = vec![0, 1, 8, 0, 6, 4];
    body.extend_from_slice(&operation.to_be_bytes());
    body.extend_from_slice(&mac.0);
    body.extend_from_slice(&sender.octets());
    body.extend_from_slice(&target_mac);
    body.extend_from_slice(&sender.octets());
    body
}

fn rarp(mac: Mac) -> Vec<u8> {
    ethernet(BROADCAST, mac, 0x8035, &arp_body(3, mac, Ipv4Addr::UNSPECIFIED, mac.0))
}

fn gratuitous_arp(mac: Mac, address: Ipv4Addr) -> Vec<u8> {
    ethernet(BROADCAST, mac, 0x0806, &arp_body(1, mac, address, [0; 6]))
}

fn neighbour_advertisement(mac: Mac, address: Ipv6Addr) -> Vec<u8> {
    let all_nodes = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    // Type 136, flag "override", the address, option "target link-layer address".
    let mut message = vec![136, 0, 0, 0, 0x20, 0, 0, 0];
    message.extend_from_slice(&address.octets());
    message.extend_from_slice(&[2, 1]);
    message.extend_from_slice(&mac.0);
    let checksum = icmpv6_checksum(address, all_nodes, &message);
    message[2..4].copy_from_slice(&checksum.to_be_bytes());
    // Version 6; payload of 32 bytes of ICMPv6; hop limit 255.
    let mut packet = vec![0x60, 0, 0, 0, 0, 32, 58, 255];
    packet.extend_from_slice(&address.octets());
    packet.extend_from_slice(&all_nodes.octets());
    packet.extend_from_slice(&message);
    ethernet([0x33, 0x33, 0, 0, 0, 1], mac, 0x86dd, &packet)
}

fn icmpv6_checksum(from: Ipv6Addr, to: Ipv6Addr, message: &[u8]) -> u16 {
    let mut pseudo = Vec::new();
    pseudo.extend_from_slice(&from.octets());
    pseudo.extend_from_slice(&to.octets());
    pseudo.extend_from_slice(&u32::try_from(message.len()).unwrap_or(0).to_be_bytes());
    pseudo.extend_from_slice(&[0, 0, 0, 58]);
    pseudo.extend_from_slice(message);
    let mut sum: u32 = pseudo
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |low| u32::from(*low)))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: Mac = Mac([0x52, 0x54, 0, 1, 2, 3]);

    /// Goal: no card is announced with an address of another one.
    #[test]
    fn each_card_is_announced_with_its_own_addresses() {
        let (one, two, other) = (MAC, Mac([0x52, 0x54, 0, 1, 2, 4]), Mac([2, 0, 0, 0, 0, 1]));
        let seen = |mac, last| GuestAddress { mac, address: IpAddr::from([10, 0, 0, last]) };
        let address = |last| IpAddr::from([10, 0, 0, last]);
        let list = [seen(two, 2), seen(one, 1), seen(one, 2), seen(other, 9)];
        // On one link the newest card has an address that both used.
        assert_eq!(
            by_card(&[(7, one), (7, two)], &list),
            [(7, one, vec![address(1)]), (7, two, vec![address(2)])]
        );
        // On two links they are two addresses.
        assert_eq!(
            by_card(&[(7, one), (8, two)], &list),
            [(7, one, vec![address(1), address(2)]), (8, two, vec![address(2)])]
        );
        assert_eq!(by_card(&[(7, one)], &[]), [(7, one, vec![])]);
    }

    #[test]
    fn arp_frames_are_as_the_standards_draw_them() {
        let frame = gratuitous_arp(MAC, Ipv4Addr::new(10, 0, 0, 9));
        assert_eq!(frame.len(), 60);
        assert_eq!(&frame[..6], &BROADCAST);
        assert_eq!(&frame[12..22], &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        assert_eq!(&frame[28..32], &[10, 0, 0, 9]);
        assert_eq!(&frame[38..42], &[10, 0, 0, 9]);
        assert_eq!(&rarp(MAC)[12..14], &[0x80, 0x35]);
    }

    /// The checksum over a packet that holds its own checksum is zero.
    #[test]
    fn the_advertisement_is_summed_right() {
        let address = "fd00::9".parse().unwrap();
        let frame = neighbour_advertisement(MAC, address);
        let all_nodes = "ff02::1".parse().unwrap();
        assert_eq!(frame.len(), 14 + 40 + 32);
        assert_eq!(icmpv6_checksum(address, all_nodes, &frame[54..]), 0);
    }
}
