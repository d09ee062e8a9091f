//! Frames round trip, and every frame that breaks a bound is refused.

use proptest::prelude::*;

use super::*;

#[test]
fn heads_come_back_as_they_went() {
    for kind in FrameKind::ALL {
        let header = FrameHeader { kind, packed: true, wire_bytes: 7, plain_bytes: 99 };
        assert_eq!(FrameHeader::decode(&header.encode()), Ok(header));
    }
    let disk = DiskHeader { disk: 3, may_unmap: true, offset_bytes: 1 << 40, length_bytes: 77 };
    assert_eq!(DiskHeader::decode(&mut &disk.encode()[..]), Ok(disk));
    let ram = Barrier { at: 7, digest: [5; 32] };
    let ack = Ack { channel: 9, applied: 8, ram, disk: Barrier::default() };
    assert_eq!(Ack::decode(&ack.encode()), Ok(ack));
    let early = Ack { applied: 6, ..ack };
    assert_eq!(Ack::decode(&early.encode()), Err(FrameError::Range("ack")));
    let (resume, start) = (Resume { received: 1 << 40 }, RamStart { stream: 3 });
    assert_eq!(Resume::decode(&resume.encode()), Ok(resume));
    assert_eq!(RamStart::decode(&start.encode()), Ok(start));
    let mut payload = Vec::new();
    let page = PageHeader { index: 8, block: 1, form: PageForm::Difference, content_bytes: 3 };
    page.encode_into(&mut payload);
    payload.extend_from_slice(b"abcrest");
    let mut rest = &payload[..];
    assert_eq!(PageHeader::decode(&mut rest), Ok((page, &b"abc"[..])));
    assert_eq!(rest, b"rest");
}

#[test]
fn announced_lengths_are_limited() {
    let good = FrameHeader { kind: FrameKind::Pages, packed: true, wire_bytes: 1, plain_bytes: 1 };
    for (at, value) in [(8, u32::MAX), (12, u32::MAX), (12, 2 << 20)] {
        let mut bytes = good.encode();
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        assert_eq!(FrameHeader::decode(&bytes), Err(FrameError::Range("length")));
    }
}

proptest! {
    #[test]
    fn no_bytes_break_a_decoder(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
        if let Some(header) = bytes.first_chunk::<HEADER_BYTES>()
            && let Ok(header) = FrameHeader::decode(header) {
            prop_assert!(header.plain_bytes as usize <= PLAIN_BYTES_MAX);
        }
        let mut rest = &bytes[..];
        while PageHeader::decode(&mut rest).is_ok() {}
        DiskHeader::decode(&mut &bytes[..]).ok();
        Ack::decode(&bytes).ok();
        Resume::decode(&bytes).ok();
        RamStart::decode(&bytes).ok();
    }
}
