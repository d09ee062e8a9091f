//! A real QEMU's stream, taken apart and put together again in another QEMU.
//!
//! ```text
//! source QEMU ──unix──► StreamParser ── pages ──► memfd of the destination QEMU
//!                                    └─ inline ─unix─► destination QEMU
//! ```
//!
//! Needs `qemu-system-x86_64`, and neither root nor a network. The program named
//! by `LIMOSA_TEST_QEMU` and the machine type by `LIMOSA_TEST_MACHINE` are taken
//! instead: QEMU 10 with a machine type of 10.0 sends a command more.

#![expect(clippy::unwrap_used, reason = "a test ends at what it did not expect")]

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use limosa_qemu::stream::{PAGE_BYTES, RamBlock, RamSection, StreamParser, StreamPart, StreamSink};
use serde_json::{Value, json};

const RAM_BYTES: usize = 64 << 20;
const RAM_PAGES: usize = RAM_BYTES / PAGE_BYTES;
/// Generous: a TCG machine on a busy build host.
const WAIT_MAX: Duration = Duration::from_secs(60);

/// One QEMU with stopped vCPUs, ended when dropped.
struct Qemu {
    child: Child,
    qmp: BufReader<UnixStream>,
}

impl Qemu {
    fn start(folder: &Path, role: &str, extra: &[&str]) -> Self {
        let socket = folder.join(format!("{role}.qmp"));
        let program = std::env::var_os("LIMOSA_TEST_QEMU");
        let program = program.unwrap_or_else(|| "qemu-system-x86_64".into());
        let machine = std::env::var("LIMOSA_TEST_MACHINE").unwrap_or("pc-q35-7.2".to_owned());
        let mut child = Command::new(&program)
            .args(["-m", "64M", "-machine"])
            .arg(format!("{machine},memory-backend=ram0,accel=tcg"))
            .args(["-object", "memory-backend-memfd,id=ram0,size=64M,share=on"])
            .args(["-S", "-nodefaults", "-display", "none", "-qmp"])
            .arg(format!("unix:{},server=on,wait=off", socket.display()))
            .args(extra)
            .stdin(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("{} does not start: {error}", program.display()));
        let stream = wait_for("QEMU's QMP socket", || {
            assert!(child.try_wait().unwrap().is_none(), "QEMU ended at once");
            UnixStream::connect(&socket).ok()
        });
        stream.set_read_timeout(Some(WAIT_MAX)).unwrap();
        let mut qemu = Self { child, qmp: BufReader::new(stream) };
        qemu.read();
        qemu.execute("qmp_capabilities", &json!({}));
        qemu
    }

    fn read(&mut self) -> Value {
        let mut line = String::new();
        self.qmp.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    fn execute(&mut self, command: &str, arguments: &Value) -> Value {
        let request = json!({ "execute": command, "arguments": arguments });
        self.qmp.get_mut().write_all(request.to_string().as_bytes()).unwrap();
        loop {
            let answer = self.read();
            if let Some(value) = answer.get("return") {
                return value.clone();
            }
            assert!(answer.get("error").is_none(), "{command}: {answer}");
        }
    }

    fn wait_completed(&mut self) {
        wait_for("the migration to complete", || {
            let answer = self.execute("query-migrate", &json!({}));
            assert_ne!(answer["status"], "failed", "{answer}");
            (answer["status"] == "completed").then_some(())
        });
    }

    /// The guest's RAM, which anyone who may open the memfd shares with QEMU.
    fn memfd(&self) -> File {
        let folder = PathBuf::from(format!("/proc/{}/fd", self.child.id()));
        let mut files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        let is_memfd = |path: &PathBuf| {
            fs::read_link(path).is_ok_and(|to| to.to_string_lossy().starts_with("/memfd:memory-"))
        };
        let path = files.find(is_memfd).expect("QEMU has its RAM in a memfd");
        File::options().read(true).write(true).open(path).unwrap()
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn wait_for<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(start.elapsed() < WAIT_MAX, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The destination's side, and a note of all that came.
struct Destination {
    ram: File,
    inline: UnixStream,
    blocks: Vec<RamBlock>,
    seen: Vec<bool>,
    full_pages: usize,
    zero_pages: usize,
    ends: Vec<RamSection>,
}

impl Destination {
    fn mark(&mut self, backend: usize, offset_bytes: u64) {
        assert_eq!(backend, 0);
        let page = usize::try_from(offset_bytes).unwrap() / PAGE_BYTES;
        assert!(!std::mem::replace(&mut self.seen[page], true), "page {page} of a stopped guest");
    }
}

impl StreamSink for Destination {
    fn block_list(&mut self, blocks: &[RamBlock]) -> io::Result<()> {
        self.blocks = blocks.to_vec();
        Ok(())
    }
    fn page(&mut self, backend: usize, offset: u64, page: &[u8; PAGE_BYTES]) -> io::Result<()> {
        self.mark(backend, offset);
        self.full_pages += 1;
        self.ram.write_all_at(page, offset)
    }
    fn zero_page(&mut self, backend: usize, offset: u64) -> io::Result<()> {
        self.mark(backend, offset);
        self.zero_pages += 1;
        Ok(())
    }
    fn inline(&mut self, _part: StreamPart, bytes: &[u8]) -> io::Result<()> {
        self.inline.write_all(bytes)
    }
    fn ram_section_end(&mut self, section: RamSection) -> io::Result<()> {
        self.ends.push(section);
        Ok(())
    }
}

/// Lengths of chunks, the same ones in each run.
struct Lengths(u64);

impl Lengths {
    fn next(&mut self) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let limit = [3, 100, 5_000, 70_000, 300_000][usize::try_from(self.0 >> 60).unwrap() % 5];
        1 + usize::try_from(self.0 >> 33).unwrap() % limit
    }
}

/// A page that says where it is; every seventh one is filled.
fn fill(ram: &File) -> usize {
    let filled = (0..RAM_PAGES).step_by(7);
    for page in filled.clone() {
        let content = u64::try_from(page).unwrap().to_be_bytes().repeat(PAGE_BYTES / 8);
        // All zeroes in page 0 would be a zero page.
        let content = if page == 0 { vec![0xa5; PAGE_BYTES] } else { content };
        ram.write_all_at(&content, u64::try_from(page * PAGE_BYTES).unwrap()).unwrap();
    }
    filled.count()
}

fn whole(ram: &File) -> Vec<u8> {
    let mut bytes = vec![0; RAM_BYTES];
    ram.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn moves(extra: &[&str], seed: u64) -> Vec<RamBlock> {
    let folder = tempfile::tempdir().unwrap();
    let mut source = Qemu::start(folder.path(), "source", extra);
    let extra = [extra, &["-incoming", "defer"]].concat();
    let mut destination = Qemu::start(folder.path(), "destination", &extra);
    let source_ram = source.memfd();
    let filled_pages = fill(&source_ram);

    let incoming = folder.path().join("incoming");
    let uri = format!("unix:{}", incoming.display());
    destination.execute("migrate-incoming", &json!({ "uri": uri }));
    let mut sink = Destination {
        ram: destination.memfd(),
        inline: UnixStream::connect(&incoming).unwrap(),
        blocks: Vec::new(),
        seen: vec![false; RAM_PAGES],
        full_pages: 0,
        zero_pages: 0,
        ends: Vec::new(),
    };
    let outgoing = folder.path().join("outgoing");
    let listener = UnixListener::bind(&outgoing).unwrap();
    source.execute("migrate", &json!({ "uri": format!("unix:{}", outgoing.display()) }));
    let (mut stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(WAIT_MAX)).unwrap();

    let mut parser = StreamParser::new(vec!["ram0".to_owned()]);
    let (mut lengths, mut buffer) = (Lengths(seed), vec![0; 512 << 10]);
    loop {
        let length = lengths.next();
        let read = stream.read(&mut buffer[..length]).unwrap();
        if read == 0 {
            break;
        }
        parser.feed(&buffer[..read], &mut sink).unwrap_or_else(|error| panic!("{error}"));
    }
    parser.finish().unwrap();
    source.wait_completed();
    destination.wait_completed();

    assert!(sink.seen.iter().all(|seen| *seen), "a page of ram0 never came");
    assert!(sink.full_pages >= filled_pages, "{} pages", sink.full_pages);
    assert_eq!(sink.full_pages + sink.zero_pages, RAM_PAGES);
    assert_eq!(sink.ends.first(), Some(&RamSection::Setup));
    assert_eq!(sink.ends.last(), Some(&RamSection::End));
    assert!(whole(&source_ram) == whole(&sink.ram), "RAM of source and destination differ");
    destination.execute("cont", &json!({}));
    assert_eq!(destination.execute("query-status", &json!({}))["status"], "running");
    sink.blocks
}

/// Goal: a machine with nothing but RAM and firmware arrives.
#[test]
fn a_bare_machine_arrives() {
    let blocks = moves(&[], 1);
    let names: Vec<&str> = blocks.iter().map(|block| block.name.as_str()).collect();
    assert!(names.contains(&"pc.bios"), "{names:?}");
    let ram = blocks.iter().find(|block| block.name == "ram0").unwrap();
    assert_eq!(ram.used_bytes, u64::try_from(RAM_BYTES).unwrap());
}

/// Goal: RAM of devices (a display's, option ROMs) stays inline and arrives.
#[test]
fn a_machine_with_devices_arrives() {
    let devices = ["-device", "VGA", "-device", "virtio-net-pci", "-device", "virtio-balloon-pci"];
    let blocks = moves(&devices, 2);
    assert!(blocks.iter().any(|block| block.name.ends_with("vga.vram")), "{blocks:?}");
    assert!(blocks.len() > 5, "{blocks:?}");
}
