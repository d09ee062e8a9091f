//! Made-up streams, of which the maker knows the parts: any cut of one gives
//! exactly these, and no damage breaks the parser.

use std::path::Path;

use proptest::prelude::*;

use super::ram::{
    FLAG_CONTINUE, FLAG_EOS, FLAG_MEM_SIZE, FLAG_MULTIFD_FLUSH, FLAG_PAGE, FLAG_ZERO,
};
use super::*;

const RAM_ID: u8 = 2;
const BLOCK_PAGES: u64 = 8;
/// The first two go out of band.
const BLOCKS: [&str; 4] = ["ram0", "ram1", "0000:00:02.0/rom", "/rom@etc/acpi/tables"];

#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Parts {
    blocks: Vec<RamBlock>,
    /// Backend, offset, and what the page is filled with; `None` is a zero page.
    pages: Vec<(usize, u64, Option<u8>)>,
    inline: Vec<u8>,
    /// Where each part of the inline bytes ends.
    part_ends: [usize; 3],
    /// Each end with the number of pages before it.
    ends: Vec<(RamSection, usize)>,
}

impl StreamSink for Parts {
    fn block_list(&mut self, blocks: &[RamBlock]) -> io::Result<()> {
        assert!(self.blocks.is_empty());
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
    fn inline(&mut self, part: StreamPart, bytes: &[u8]) -> io::Result<()> {
        assert!(!bytes.is_empty());
        if part != StreamPart::Tail {
            assert_eq!(bytes[bytes.len() - 5], 0x7e, "it ends with a footer");
            assert!(bytes.len() < HEAD_BYTES_MAX);
        }
        self.inline.extend_from_slice(bytes);
        self.part_ends[part as usize] = self.inline.len();
        Ok(())
    }
    fn ram_section_end(&mut self, section: RamSection) -> io::Result<()> {
        self.ends.push((section, self.pages.len()));
        Ok(())
    }
}

/// One element of a RAM section.
#[derive(Debug, Clone)]
enum Element {
    Page { block: usize, page: u64, fill: Option<u8> },
    Flush,
}

/// A stream and the parts that must come out of it.
#[derive(Debug, Clone, Default)]
struct Maker {
    stream: Vec<u8>,
    parts: Parts,
    last_block: Option<usize>,
    /// Where the inline bytes of the section of now begin, if it may be cut.
    section_at: Option<usize>,
}

impl Maker {
    /// Bytes that stay inline.
    fn inline(&mut self, bytes: &[u8]) {
        self.stream.extend_from_slice(bytes);
        self.parts.inline.extend_from_slice(bytes);
    }

    fn name(&mut self, name: &str) {
        self.inline(&[u8::try_from(name.len()).unwrap()]);
        self.inline(name.as_bytes());
    }

    fn header(&mut self, with_subsections: bool) {
        self.inline(b"QEVM\0\0\0\x03\x07\0\0\0\x0cpc-q35-7.2.2");
        if with_subsections {
            for (name, content) in [
                ("configuration/target-page-bits", &[0, 0, 0, 12][..]),
                ("configuration/capabilities", b"\0\0\0\x02\x06events\x0cauto-converg"),
                ("configuration/uuid", b"0123456789abcdef"),
            ] {
                self.inline(&[5]);
                self.name(name);
                self.inline(&[0, 0, 0, 1]);
                self.inline(content);
            }
        }
    }

    fn setup(&mut self) {
        self.inline(&[1, 0, 0, 0, RAM_ID]);
        self.name("ram");
        self.inline(&[0, 0, 0, 0, 0, 0, 0, 4]);
        let used_bytes = BLOCK_PAGES * PAGE_BYTES as u64;
        let total_bytes = BLOCKS.len() as u64 * used_bytes;
        self.inline(&(total_bytes | FLAG_MEM_SIZE).to_be_bytes());
        for name in BLOCKS {
            self.name(name);
            self.inline(&used_bytes.to_be_bytes());
            self.parts.blocks.push(RamBlock { name: name.to_owned(), used_bytes });
        }
        self.end(RamSection::Setup);
        self.parts.part_ends[0] = self.parts.inline.len();
    }

    fn section(&mut self, section: RamSection, elements: &[Element]) {
        let may_be_cut = section == RamSection::Part;
        self.section_at = may_be_cut.then_some(self.parts.inline.len());
        self.inline(&[if section == RamSection::End { 3 } else { 2 }, 0, 0, 0, RAM_ID]);
        for element in elements {
            self.cut();
            match *element {
                Element::Page { block, page, fill } => self.page(block, page, fill),
                Element::Flush => self.inline(&FLAG_MULTIFD_FLUSH.to_be_bytes()),
            }
        }
        self.end(section);
    }

    fn end(&mut self, section: RamSection) {
        self.inline(&FLAG_EOS.to_be_bytes());
        self.parts.ends.push((section, self.parts.pages.len()));
        self.inline(&[0x7e, 0, 0, 0, RAM_ID]);
        if section == RamSection::Part {
            self.parts.part_ends[1] = self.parts.inline.len();
        }
    }

    /// A section that became long is two of them to the destination.
    fn cut(&mut self) {
        let inline = &mut self.parts.inline;
        if self.section_at.is_some_and(|at| inline.len() - at >= INLINE_BYTES_MAX) {
            inline.extend_from_slice(&FLAG_EOS.to_be_bytes());
            inline.extend_from_slice(&[0x7e, 0, 0, 0, RAM_ID]);
            self.section_at = Some(inline.len());
            inline.extend_from_slice(&[2, 0, 0, 0, RAM_ID]);
        }
    }

    /// As QEMU does it: the name only when the block is another one.
    fn page(&mut self, block: usize, page: u64, fill: Option<u8>) {
        let address = page * PAGE_BYTES as u64;
        let kind = if fill.is_some() { FLAG_PAGE } else { FLAG_ZERO };
        let content = fill.map_or(vec![0], |fill| vec![fill; PAGE_BYTES]);
        let name = [&[u8::try_from(BLOCKS[block].len()).unwrap()], BLOCKS[block].as_bytes()];
        let same_block = if self.last_block == Some(block) { FLAG_CONTINUE } else { 0 };
        self.stream.extend_from_slice(&(address | kind | same_block).to_be_bytes());
        if same_block == 0 {
            self.stream.extend_from_slice(&name.concat());
        }
        self.stream.extend_from_slice(&content);
        self.last_block = Some(block);
        if block < 2 {
            self.parts.pages.push((block, address, fill));
        } else {
            self.parts.inline.extend_from_slice(&(address | kind).to_be_bytes());
            self.parts.inline.extend_from_slice(&name.concat());
            self.parts.inline.extend_from_slice(&content);
        }
    }
}

/// A stream as QEMU 10 writes it: with commands around the RAM sections.
fn made(with_subsections: bool, parts: &[Vec<Element>], last: &[Element], tail: &[u8]) -> Maker {
    let mut maker = Maker::default();
    maker.header(with_subsections);
    if with_subsections {
        maker.inline(&[8, 0, 1, 0, 0, 8, 0, 2, 0, 4, 0, 0, 0, 1]);
    }
    maker.setup();
    for part in parts {
        maker.section(RamSection::Part, part);
    }
    if with_subsections {
        maker.inline(&[8, 0, 11, 0, 0]);
    }
    maker.section(RamSection::End, last);
    maker.inline(tail);
    maker.parts.part_ends[2] = maker.parts.inline.len();
    maker
}

fn sample() -> Maker {
    let page = |block, page, fill| Element::Page { block, page, fill };
    let first = vec![
        page(0, 0, Some(1)),
        page(0, 1, None),
        page(2, 0, Some(9)),
        page(2, 1, Some(8)),
        page(1, 7, Some(2)),
        Element::Flush,
        page(2, 2, None),
    ];
    let last = [page(2, 3, Some(4)), page(0, 3, Some(3))];
    made(true, &[first, Vec::new()], &last, b"device state, whatever it is")
}

fn elements() -> impl Strategy<Value = Vec<Element>> {
    let page = (0..BLOCKS.len(), 0..BLOCK_PAGES, any::<Option<u8>>());
    let page = page.prop_map(|(block, page, fill)| Element::Page { block, page, fill });
    prop::collection::vec(prop_oneof![9 => page, 1 => Just(Element::Flush)], 0..30)
}

fn parser() -> StreamParser {
    StreamParser::new(vec!["ram0".to_owned(), "ram1".to_owned()])
}

/// Feeds `bytes` in pieces whose lengths are `cuts`, over and over.
fn feed(bytes: &[u8], cuts: &[usize]) -> (StreamParser, Parts, Result<(), StreamError>) {
    let (mut parser, mut parts, mut rest) = (parser(), Parts::default(), bytes);
    for cut in cuts.iter().cycle() {
        let (piece, after) = rest.split_at(rest.len().min(*cut));
        if let Err(error) = parser.feed(piece, &mut parts) {
            return (parser, parts, Err(error));
        }
        assert!(parser.pending.len() <= PENDING_BYTES_MAX);
        rest = after;
        if rest.is_empty() {
            break;
        }
    }
    (parser, parts, Ok(()))
}

fn refused(bytes: &[u8]) -> StreamError {
    let (mut parser, mut parts, fed) = feed(bytes, &[usize::MAX]);
    let error = fed.expect_err("the stream is refused");
    assert!(parser.feed(b"x", &mut parts).is_err(), "it stays refused");
    assert!(parser.finish().is_err());
    error
}

#[test]
fn pages_go_out_of_band_and_the_rest_stays_in_order() {
    let maker = sample();
    let (parser, parts, fed) = feed(&maker.stream, &[usize::MAX]);
    fed.unwrap();
    parser.finish().unwrap();
    assert_eq!(parts, maker.parts);
    assert_eq!(parser.fed_bytes(), maker.stream.len() as u64);
    assert_eq!(parts.pages.len(), 4);
    assert!(parts.inline.ends_with(b"device state, whatever it is"));
}

/// The pages passed on are what a destination reads without having seen those
/// that were taken out, so parsing the inline bytes again changes nothing.
#[test]
fn what_is_passed_on_is_itself_a_stream() {
    let (_, first, fed) = feed(&sample().stream, &[usize::MAX]);
    fed.unwrap();
    let (parser, second, fed) = feed(&first.inline, &[100]);
    fed.unwrap();
    parser.finish().unwrap();
    assert_eq!(second.inline, first.inline);
    assert_eq!(second.pages, []);
}

#[test]
fn a_device_before_the_end_of_ram_is_named() {
    for (at, kind) in [("start", 1), ("full", 4)] {
        let mut maker = Maker::default();
        maker.header(false);
        maker.inline(&[kind, 0, 0, 0, 9]);
        maker.name("0000:00:04.0/vfio");
        maker.inline(&[0; 8]);
        let error = refused(&maker.stream);
        assert!(matches!(&error, StreamError::Device { .. }), "{at}: {error}");
        assert!(error.to_string().contains("0000:00:04.0/vfio"), "{at}: {error}");
    }
}

#[test]
fn a_capability_that_changes_the_stream_is_named() {
    let mut opening = Maker::default();
    opening.header(false);
    let mut listed = opening.clone();
    listed.inline(b"\x05\x1aconfiguration/capabilities\0\0\0\x01\0\0\0\x01\x0fx-ignore-shared");
    let mut postcopy = opening.clone();
    postcopy.inline(&[8, 0, 3, 0, 16]);
    let mut bitmap_advice = opening.clone();
    bitmap_advice.inline(&[8, 0, 3, 0, 0]);
    let mut bitmaps = opening.clone();
    bitmaps.inline(b"\x01\0\0\0\x07\x0cdirty-bitmap\0\0\0\0\0\0\0\x01");
    let mut xbzrle = opening.clone();
    xbzrle.setup();
    xbzrle.inline(&[2, 0, 0, 0, RAM_ID, 0, 0, 0, 0, 0, 0, 0x10, 0x40]);
    for (maker, name) in [
        (listed, "x-ignore-shared"),
        (postcopy, "postcopy-ram"),
        (bitmap_advice, "dirty-bitmaps"),
        (bitmaps, "dirty-bitmaps"),
        (xbzrle, "xbzrle"),
    ] {
        match refused(&maker.stream) {
            StreamError::Capability { capability, .. } => assert_eq!(capability, name),
            other => panic!("{name}: {other}"),
        }
    }
}

#[test]
fn a_block_list_that_does_not_add_up_is_refused_and_not_passed_on() {
    let list = |total: u64, blocks: &[(&[u8], u64)]| {
        let mut maker = Maker::default();
        maker.header(false);
        maker.inline(b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04");
        let start = maker.stream.len();
        maker.inline(&(total | FLAG_MEM_SIZE).to_be_bytes());
        for (name, used_bytes) in blocks {
            maker.inline(&[u8::try_from(name.len()).unwrap()]);
            maker.inline(name);
            maker.inline(&used_bytes.to_be_bytes());
        }
        let (_, parts, fed) = feed(&maker.stream, &[1]);
        assert!(parts.inline.len() <= start);
        assert_eq!(parts.blocks, []);
        fed.unwrap_err().to_string()
    };
    let names: Vec<String> = (0..300).map(|number| format!("block {number}")).collect();
    let many: Vec<(&[u8], u64)> = names.iter().map(|name| (name.as_bytes(), 4096)).collect();
    assert!(list(0x2000, &[(b"ram0", 0x1000), (b"ram0", 0x1000)]).contains("twice"));
    assert!(list(0x2000, &[(b"ram0", 0x3000)]).contains("12288"));
    assert!(list(0x2000, &[(b"ram0", 0x0800)]).contains("2048"));
    assert!(list(0x2000, &[(b"ram0", 0)]).contains("of 0 bytes"));
    assert!(list(1 << 50, &[(b"ram0", 1 << 50)]).contains("bytes"));
    assert!(list(0x2000, &[(b"ram\xff", 0x2000)]).contains("not text"));
    assert!(list(0x2000, &[(b"ram0", 0x1000), (b"rom", 0x1000)]).contains("\"ram1\""));
    assert!(list(300 * 4096, &many).contains("more than 256"));
    assert!(list(0, &[]).contains("empty"));
}

#[test]
fn a_page_past_its_block_or_of_no_block_is_refused() {
    let page = |header: u64, rest: &[u8]| {
        let mut maker = Maker::default();
        maker.header(false);
        maker.setup();
        maker.inline(&[2, 0, 0, 0, RAM_ID]);
        maker.inline(&header.to_be_bytes());
        maker.inline(rest);
        refused(&maker.stream).to_string()
    };
    assert!(page(BLOCK_PAGES << 12 | FLAG_PAGE, b"\x04ram0").contains("past its end"));
    assert!(page(u64::MAX << 12 | FLAG_ZERO, b"\x04ram0").contains("past its end"));
    assert!(page(FLAG_PAGE, b"\x04ram9").contains("not listed"));
    assert!(page(FLAG_PAGE | FLAG_CONTINUE, b"").contains("not listed"));
    assert!(page(FLAG_ZERO, b"\x04ram0\x01").contains("else than zeroes"));
    assert!(page(FLAG_ZERO | FLAG_PAGE, b"").contains("unknown form"));
    assert!(page(FLAG_MEM_SIZE | 0x1000, b"").contains("unknown form"));
}

#[test]
fn a_sink_that_fails_ends_it() {
    struct Full;
    impl StreamSink for Full {
        fn block_list(&mut self, _: &[RamBlock]) -> io::Result<()> {
            Ok(())
        }
        fn page(&mut self, _: usize, _: u64, _: &[u8; PAGE_BYTES]) -> io::Result<()> {
            Err(io::Error::other("no room"))
        }
        fn zero_page(&mut self, _: usize, _: u64) -> io::Result<()> {
            Ok(())
        }
        fn inline(&mut self, _: StreamPart, _: &[u8]) -> io::Result<()> {
            Ok(())
        }
        fn ram_section_end(&mut self, _: RamSection) -> io::Result<()> {
            Ok(())
        }
    }
    let mut parser = parser();
    let error = parser.feed(&sample().stream, &mut Full).unwrap_err();
    assert!(matches!(error, StreamError::Sink(_)), "{error}");
    assert!(parser.feed(b"", &mut Full).is_err() && parser.finish().is_err());
}

/// Every file that the fuzzer starts from, whole and in single bytes.
#[test]
fn the_fuzz_corpus_is_followed_alike_in_any_cut() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus/stream");
    let mut followed_count = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let bytes = std::fs::read(&path).unwrap();
        for backend in ["ram0", "pc.ram"] {
            let parse = |chunk_bytes| {
                let mut parser = StreamParser::new(vec![backend.to_owned()]);
                let mut parts = Parts::default();
                let fed = bytes.chunks(chunk_bytes).try_for_each(|it| parser.feed(it, &mut parts));
                let fed = fed.map_err(|error| error.to_string());
                (fed, parts.blocks, parts.pages, parser.finish().is_ok())
            };
            let whole = parse(usize::MAX);
            assert_eq!(whole, parse(1), "{path:?}");
            followed_count += usize::from(whole.0.is_ok() && !whole.2.is_empty());
        }
    }
    assert!(followed_count >= 3, "the corpus holds real streams");
}

proptest! {
    #[test]
    fn every_cut_gives_the_parts_that_were_put_in(
        with_subsections in any::<bool>(),
        rounds in prop::collection::vec(elements(), 0..4),
        last in elements(),
        tail in prop::collection::vec(any::<u8>(), 0..9000),
        cuts in prop::collection::vec(prop_oneof![1usize..40, 1usize..20_000], 1..20),
    ) {
        let maker = made(with_subsections, &rounds, &last, &tail);
        let (parser, parts, fed) = feed(&maker.stream, &cuts);
        prop_assert!(fed.is_ok(), "{:?}", fed);
        prop_assert!(parser.finish().is_ok());
        prop_assert_eq!(parts, maker.parts);
    }

    #[test]
    fn a_stream_may_end_only_after_ram(at in any::<prop::sample::Index>()) {
        let maker = sample();
        let tail_bytes = b"device state, whatever it is".len() + 5;
        let end = at.index(maker.stream.len() + 1);
        let (parser, _, fed) = feed(&maker.stream[..end], &[777]);
        prop_assert!(fed.is_ok());
        prop_assert_eq!(parser.finish().is_ok(), end >= maker.stream.len() - tail_bytes);
    }

    #[test]
    fn no_damage_breaks_it(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        in_headers in prop::collection::vec((0usize..400, any::<u8>()), 0..3),
        cuts in prop::collection::vec(1usize..6000, 1..5),
    ) {
        let mut bytes = sample().stream;
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        for (at, value) in in_headers {
            bytes[at] = value;
        }
        let (_, parts, fed) = feed(&bytes, &cuts);
        let (_, whole, fed_whole) = feed(&bytes, &[usize::MAX]);
        prop_assert_eq!(fed.map_err(|e| e.to_string()), fed_whole.map_err(|e| e.to_string()));
        prop_assert_eq!(&parts.pages, &whole.pages);
        for (backend, offset, _) in parts.pages {
            let block = parts.blocks.iter().find(|block| block.name == BLOCKS[backend]);
            prop_assert!(offset + PAGE_BYTES as u64 <= block.unwrap().used_bytes);
        }
    }
}
