//! Any cut of a stream gives the same parts, and no bytes can break the parser.

use proptest::prelude::*;

use super::*;

#[derive(Debug, Default, PartialEq, Eq)]
struct Parts {
    blocks: Vec<RamBlock>,
    pages: Vec<(usize, u64, Option<u8>)>,
    inline: Vec<u8>,
    ends: Vec<RamSection>,
}

impl StreamSink for Parts {
    fn block_list(&mut self, blocks: &[RamBlock]) -> io::Result<()> {
        self.blocks = blocks.to_vec();
        Ok(())
    }
    fn page(&mut self, backend: usize, offset: u64, page: &[u8; PAGE_BYTES]) -> io::Result<()> {
        self.pages.push((backend, offset, Some(page[7])));
        Ok(())
    }
    fn zero_page(&mut self, backend: usize, offset: u64) -> io::Result<()> {
        self.pages.push((backend, offset, None));
        Ok(())
    }
    fn inline(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.inline.extend_from_slice(bytes);
        Ok(())
    }
    fn ram_section_end(&mut self, section: RamSection) -> io::Result<()> {
        self.ends.push(section);
        Ok(())
    }
}

fn named(out: &mut Vec<u8>, name: &str) {
    out.push(u8::try_from(name.len()).unwrap());
    out.extend_from_slice(name.as_bytes());
}

fn page(out: &mut Vec<u8>, name: Option<&str>, address: u64, fill: Option<u8>) {
    let kind = if fill.is_some() { FLAG_PAGE } else { FLAG_ZERO };
    let again = if name.is_some() { 0 } else { FLAG_CONTINUE };
    out.extend_from_slice(&(address | kind | again).to_be_bytes());
    if let Some(name) = name {
        named(out, name);
    }
    match fill {
        Some(fill) => out.extend_from_slice(&[fill; PAGE_BYTES]),
        None => out.push(0),
    }
}

/// A stream as QEMU 10 writes it: with a command between the RAM sections.
fn stream() -> Vec<u8> {
    let mut out = Vec::new();
    out.extend_from_slice(&MAGIC.to_be_bytes());
    out.extend_from_slice(&VERSION.to_be_bytes());
    out.extend_from_slice(&[7, 0, 0, 0, 3]);
    out.extend_from_slice(b"q35");
    out.extend_from_slice(&[1, 0, 0, 0, 2]);
    named(&mut out, "ram");
    out.extend_from_slice(&[0, 0, 0, 0, 0, 0, 0, 4]);
    out.extend_from_slice(&(5 * PAGE_BYTES as u64 | FLAG_MEM_SIZE).to_be_bytes());
    for (name, pages) in [("ram0", 4), ("rom", 1u64)] {
        named(&mut out, name);
        out.extend_from_slice(&(pages * PAGE_BYTES as u64).to_be_bytes());
    }
    let eos = |out: &mut Vec<u8>| {
        out.extend_from_slice(&FLAG_EOS.to_be_bytes());
        out.extend_from_slice(&[0x7e, 0, 0, 0, 2]);
    };
    eos(&mut out);
    out.extend_from_slice(&[2, 0, 0, 0, 2]);
    page(&mut out, Some("ram0"), 0, Some(1));
    page(&mut out, None, 0x1000, None);
    page(&mut out, Some("rom"), 0, Some(9));
    page(&mut out, Some("ram0"), 0x2000, Some(2));
    eos(&mut out);
    out.extend_from_slice(&[8, 0, 11, 0, 0]);
    out.extend_from_slice(&[3, 0, 0, 0, 2]);
    page(&mut out, Some("ram0"), 0x3000, Some(3));
    eos(&mut out);
    out.extend_from_slice(b"device state, whatever it is");
    out
}

fn parse(stream: &[u8], chunk_bytes: usize) -> Parts {
    let mut parser = StreamParser::new(vec!["ram0".to_owned()]);
    let mut parts = Parts::default();
    for chunk in stream.chunks(chunk_bytes) {
        parser.feed(chunk, &mut parts).unwrap();
    }
    parser.finish().unwrap();
    parts
}

#[test]
fn pages_go_out_of_band_and_the_rest_stays_in_order() {
    let parts = parse(&stream(), usize::MAX);
    assert_eq!(
        parts.pages,
        [(0, 0, Some(1)), (0, 0x1000, None), (0, 0x2000, Some(2)), (0, 0x3000, Some(3))]
    );
    assert_eq!(parts.ends, [RamSection::Setup, RamSection::Part, RamSection::End]);
    assert!(parts.inline.ends_with(b"device state, whatever it is"));
    let rom = parts.inline.windows(3).filter(|window| window == b"rom").count();
    assert_eq!(rom, 2, "once in the list, once before its page");
    assert_eq!(parts.inline.len(), stream().len() - 3 * (8 + PAGE_BYTES) - 3 * 5 - 9);
}

#[test]
fn a_device_before_the_end_of_ram_is_named() {
    let mut bytes = stream()[..16].to_vec();
    bytes.extend_from_slice(&[4, 0, 0, 0, 9]);
    named(&mut bytes, "virtio-mem");
    bytes.extend_from_slice(&[0; 8]);
    let mut parser = StreamParser::new(vec!["ram0".to_owned()]);
    let error = parser.feed(&bytes, &mut Parts::default()).unwrap_err().to_string();
    assert!(error.contains("virtio-mem"), "{error}");
}

#[test]
fn a_stream_that_ends_early_is_not_whole() {
    let stream = stream();
    let mut parser = StreamParser::new(vec!["ram0".to_owned()]);
    parser.feed(&stream[..stream.len() / 2], &mut Parts::default()).unwrap();
    assert!(matches!(parser.finish(), Err(StreamError::Truncated { .. })));
}

proptest! {
    #[test]
    fn every_cut_gives_the_same_parts(chunk_bytes in 1usize..9000) {
        let stream = stream();
        prop_assert_eq!(parse(&stream, chunk_bytes), parse(&stream, usize::MAX));
    }

    #[test]
    fn no_bytes_break_it(
        changes in prop::collection::vec((0usize..20_000, any::<u8>()), 0..20),
        chunk_bytes in 1usize..5000,
    ) {
        let mut bytes = stream();
        for (at, value) in changes {
            let at = at % bytes.len();
            bytes[at] = value;
        }
        let mut parser = StreamParser::new(vec!["ram0".to_owned()]);
        let mut parts = Parts::default();
        for chunk in bytes.chunks(chunk_bytes) {
            if parser.feed(chunk, &mut parts).is_err() {
                break;
            }
        }
        for (_, offset, _) in parts.pages {
            prop_assert!(offset <= 0x3000);
        }
    }
}
