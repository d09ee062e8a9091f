//! Any bytes, cut anywhere, through the parser of QEMU's migration stream.
//!
//! Checks more than "no crash": two cuts of the same bytes give the same parts,
//! every page lies inside its block, and what a rewritten stream gives, when it
//! is parsed again, is itself.

use std::io;

use limosa_qemu::stream::{PAGE_BYTES, RamBlock, RamSection, StreamParser, StreamPart, StreamSink};

/// Backends of which each input is tried with one, and with none.
const BACKENDS: [&str; 2] = ["ram0", "pc.ram"];

#[derive(Debug, PartialEq, Eq)]
struct Parts {
    backend: &'static str,
    blocks: Vec<RamBlock>,
    pages: Vec<(usize, u64, Option<u8>)>,
    inline: Vec<u8>,
    part: StreamPart,
    ends: Vec<RamSection>,
    is_followed: bool,
}

impl Parts {
    fn of(backend: &'static str) -> Self {
        Self {
            backend,
            blocks: Vec::new(),
            pages: Vec::new(),
            inline: Vec::new(),
            part: StreamPart::Head,
            ends: Vec::new(),
            is_followed: false,
        }
    }

    fn check(&self, backend: usize, offset_bytes: u64) {
        assert_eq!(backend, 0);
        let block = self.blocks.iter().find(|block| block.name == self.backend);
        let used_bytes = block.expect("pages come only of listed blocks").used_bytes;
        assert!(offset_bytes.is_multiple_of(PAGE_BYTES as u64));
        assert!(offset_bytes + PAGE_BYTES as u64 <= used_bytes);
    }
}

impl StreamSink for Parts {
    fn block_list(&mut self, blocks: &[RamBlock]) -> io::Result<()> {
        assert!(self.blocks.is_empty() && !blocks.is_empty());
        self.blocks = blocks.to_vec();
        Ok(())
    }
    fn page(&mut self, backend: usize, offset: u64, page: &[u8; PAGE_BYTES]) -> io::Result<()> {
        self.check(backend, offset);
        self.pages.push((backend, offset, Some(page[77])));
        Ok(())
    }
    fn zero_page(&mut self, backend: usize, offset: u64) -> io::Result<()> {
        self.check(backend, offset);
        self.pages.push((backend, offset, None));
        Ok(())
    }
    fn inline(&mut self, part: StreamPart, bytes: &[u8]) -> io::Result<()> {
        assert!(part as usize >= self.part as usize, "a part came again");
        self.part = part;
        self.inline.extend_from_slice(bytes);
        Ok(())
    }
    fn ram_section_end(&mut self, section: RamSection) -> io::Result<()> {
        self.ends.push(section);
        Ok(())
    }
}

fn parse(bytes: &[u8], chunk_bytes: usize, backend: Option<&'static str>) -> Parts {
    let mut parser = StreamParser::new(backend.iter().map(ToString::to_string).collect());
    let mut parts = Parts::of(backend.unwrap_or_default());
    let fed = bytes.chunks(chunk_bytes).try_for_each(|chunk| parser.feed(chunk, &mut parts));
    parts.is_followed = fed.is_ok() && parser.finish().is_ok();
    parts
}

/// Panics when the bytes break something.
pub(crate) fn check(bytes: &[u8]) {
    let sum: usize = bytes.iter().map(|byte| usize::from(*byte)).sum();
    for backend in BACKENDS.map(Some).into_iter().chain([None]) {
        let whole = parse(bytes, usize::MAX, backend);
        let cut = parse(bytes, 1 + sum % 5000, backend);
        assert_eq!(whole.is_followed, cut.is_followed);
        assert_eq!(whole.blocks, cut.blocks);
        assert_eq!(whole.pages, cut.pages);
        assert_eq!(whole.ends, cut.ends);
        if whole.is_followed {
            assert_eq!(whole.inline, cut.inline);
            let repeated = parse(&whole.inline, usize::MAX, backend);
            assert!(repeated.is_followed && repeated.pages.is_empty());
            assert_eq!(repeated.inline, whole.inline);
        }
    }
}
