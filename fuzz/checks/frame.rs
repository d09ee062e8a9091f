//! Any bytes, as the frames of a data channel.
//!
//! Checks more than "no crash": what was accepted keeps the limits, and is on the
//! wire again as it was, so that no two spellings mean the same.

use limosa_protocol::frame::{
    Ack, DigestsHeader, DiskHeader, FrameError, FrameHeader, FrameKind, HEADER_BYTES,
    PLAIN_BYTES_MAX, PageForm, PageHeader, RamStart, Resume, WIRE_BYTES_MAX,
};

/// Panics when the bytes break something.
pub(crate) fn check(bytes: &[u8]) {
    let mut rest = bytes;
    while let Some(header) = rest.first_chunk::<HEADER_BYTES>() {
        let Ok(header) = FrameHeader::decode(header) else { break };
        assert_eq!(rest[..HEADER_BYTES], header.encode());
        let wire_bytes = usize::try_from(header.wire_bytes).expect("it is limited");
        let plain_bytes = usize::try_from(header.plain_bytes).expect("it is limited");
        assert!(wire_bytes <= WIRE_BYTES_MAX && plain_bytes <= PLAIN_BYTES_MAX);
        rest = &rest[HEADER_BYTES..];
        let content = &rest[..wire_bytes.min(rest.len())];
        payload(header.kind, content);
        rest = &rest[content.len()..];
    }
    // Whatever it said of itself: the receiver is told the kind by a stranger.
    for kind in [
        FrameKind::Pages,
        FrameKind::DiskWrite,
        FrameKind::Ack,
        FrameKind::Resume,
        FrameKind::Digests,
    ] {
        payload(kind, bytes);
    }
}

fn payload(kind: FrameKind, content: &[u8]) {
    match kind {
        FrameKind::Pages => pages(content),
        FrameKind::DiskWrite | FrameKind::DiskZero | FrameKind::DiskDiscard => disk(content),
        FrameKind::Ack => ack(content),
        FrameKind::Digests => {
            let mut rest = content;
            if let Ok(head) = DigestsHeader::decode(&mut rest) {
                assert!(rest.len().is_multiple_of(16));
                assert_eq!(content[..DigestsHeader::BYTES], head.encode());
            }
        }
        FrameKind::Resume => {
            let repeated = Resume::decode(content).map(|resume| resume.encode());
            assert!(repeated.is_err() || repeated.is_ok_and(|repeated| repeated == content));
        }
        FrameKind::RamStart => {
            let repeated = RamStart::decode(content).map(|start| start.encode());
            assert!(repeated.is_err() || repeated.is_ok_and(|repeated| repeated == content));
        }
        FrameKind::Stream
        | FrameKind::StreamEnd
        | FrameKind::Tail
        | FrameKind::Release
        | FrameKind::KeepAlive
        | FrameKind::RamBarrier
        | FrameKind::DiskBarrier => {}
    }
}

fn pages(content: &[u8]) {
    let mut rest = content;
    let mut repeated = Vec::new();
    let error = loop {
        let before = rest;
        match PageHeader::decode(&mut rest) {
            Ok((head, page)) => {
                assert_eq!(page.len(), usize::from(head.content_bytes));
                assert!(head.form != PageForm::Zero || page.is_empty());
                head.encode_into(&mut repeated);
                repeated.extend_from_slice(page);
            }
            Err(error) => {
                assert_eq!(rest, before, "nothing is taken off by an error");
                break error;
            }
        }
    };
    assert_eq!(content[..repeated.len()], repeated[..]);
    assert!(!rest.is_empty() || error == FrameError::Short);
}

fn disk(content: &[u8]) {
    let mut rest = content;
    let Ok(head) = DiskHeader::decode(&mut rest) else {
        assert_eq!(rest, content);
        return;
    };
    assert!(head.offset_bytes.checked_add(head.length_bytes).is_some());
    assert_eq!(content[..DiskHeader::BYTES], head.encode());
    assert_eq!(rest, &content[DiskHeader::BYTES..]);
}

fn ack(content: &[u8]) {
    if let Ok(ack) = Ack::decode(content) {
        assert!(ack.ram.at.max(ack.disk.at) <= ack.applied);
        assert_eq!(content, ack.encode());
    }
}
