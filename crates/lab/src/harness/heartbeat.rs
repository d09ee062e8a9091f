//! The guest's heartbeat as it looks on the wire.
//!
//! The guest sends one UDP datagram to the client every few milliseconds:
//!
//! | offset | bytes | field |
//! |-------:|------:|-------|
//! |      0 |     4 | magic `b"LMHB"` |
//! |      4 |     8 | sequence number, little-endian, from 0 |
//! |     12 |     8 | drawn at each boot, so that boots are told apart; may be missing |
//!
//! What follows is not looked at.

/// UDP port of the client to which heartbeats go.
pub(crate) const PORT: u16 = 7003;
/// Beginning of each heartbeat.
pub(crate) const MAGIC: [u8; 4] = *b"LMHB";
/// Bytes of an Ethernet header.
const ETHERNET_BYTES: usize = 14;
/// Bytes of a UDP header.
const UDP_BYTES: usize = 8;
/// Protocol number of UDP.
const UDP: u8 = 17;

/// The sequence number in a heartbeat's payload.
pub(crate) fn sequence(payload: &[u8]) -> Option<u64> {
    let rest = payload.strip_prefix(&MAGIC)?;
    Some(u64::from_le_bytes(rest.get(..8)?.try_into().ok()?))
}

/// What tells boots apart in a heartbeat's payload; 0 when it is missing.
fn boot(payload: &[u8]) -> u64 {
    let bytes = payload.get(12..20).and_then(|bytes| bytes.try_into().ok());
    bytes.map_or(0, u64::from_le_bytes)
}

/// The sequence number and the boot when a whole Ethernet frame is a heartbeat.
pub(crate) fn in_frame(frame: &[u8]) -> Option<(u64, u64)> {
    let kind = u16::from_be_bytes([*frame.get(12)?, *frame.get(13)?]);
    let packet = frame.get(ETHERNET_BYTES..)?;
    let datagram = match kind {
        0x0800 if packet.get(9) == Some(&UDP) => {
            let header_bytes = usize::from(packet.first()? & 0x0f) * 4;
            packet.get(header_bytes..)?
        }
        0x86dd if packet.get(6) == Some(&UDP) => packet.get(40..)?,
        _ => return None,
    };
    let port = u16::from_be_bytes([*datagram.get(2)?, *datagram.get(3)?]);
    let payload = datagram.get(UDP_BYTES..).filter(|_| port == PORT)?;
    Some((sequence(payload)?, boot(payload)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame_v4(port: u16, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; 12];
        frame.extend([0x08, 0x00, 0x45]);
        frame.extend([0; 8]);
        frame.push(UDP);
        frame.extend([0; 10]);
        frame.extend([0x12, 0x34]);
        frame.extend(port.to_be_bytes());
        frame.extend([0; 4]);
        frame.extend(payload);
        frame
    }

    /// Goal: heartbeats are found, and nothing shorter or different is mistaken for one.
    #[test]
    fn finds_heartbeats_only() {
        let payload = [&MAGIC[..], &77u64.to_le_bytes(), b"more"].concat();
        let frame = frame_v4(PORT, &payload);
        assert_eq!(in_frame(&frame), Some((77, 0)));
        let whole_payload = [&payload[..12], &5u64.to_le_bytes()].concat();
        assert_eq!(in_frame(&frame_v4(PORT, &whole_payload)), Some((77, 5)));
        assert_eq!(in_frame(&frame_v4(PORT + 1, &payload)), None);
        assert_eq!(in_frame(&frame_v4(PORT, b"LMHC12345678")), None);
        let whole = ETHERNET_BYTES + 20 + UDP_BYTES + MAGIC.len() + 8;
        for cut in 0..whole {
            assert_eq!(in_frame(&frame[..cut]), None, "cut at {cut}");
        }
    }
}
