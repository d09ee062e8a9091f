//! The NBD server and client against stock QEMU: its mirror job and tools write
//! into our server, and our client writes into its exports.
//!
//! `LIMOSA_TEST_QEMU` names another QEMU than the one in `PATH`; a machine
//! without one cannot run these tests, and says so.

#![expect(clippy::unwrap_used, reason = "a test that cannot be set up may panic")]

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use limosa_nbd::Export;
use limosa_nbd::client::NbdClient;
use limosa_nbd::server::{DiskSink, ServerHandle, serve};
use rustix::fs::{FallocateFlags, fallocate};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
/// Longest wait for anything; only a test that failed gets there.
const PATIENCE: Duration = Duration::from_secs(120);

/// One operation that reached the sink.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operation {
    Write { offset: u64, length: u64 },
    Zero { offset: u64, length: u64, may_unmap: bool },
    Discard { offset: u64, length: u64 },
    Flush,
}

/// A disk at the other end: a sparse file, and what was done to it.
#[derive(Clone)]
struct Disk {
    file: Arc<File>,
    log: Arc<Mutex<Vec<Operation>>>,
    /// Writes fail when they come to more
    write_bytes_max: u64,
}

impl Disk {
    fn new(path: &Path, size_bytes: u64) -> Self {
        let file = File::options().read(true).write(true).create(true).truncate(true).open(path);
        let file = file.unwrap();
        file.set_len(size_bytes).unwrap();
        Self { file: Arc::new(file), log: Arc::default(), write_bytes_max: u64::MAX }
    }

    fn log(&self, operation: Operation) {
        self.log.lock().unwrap().push(operation);
    }

    fn written_bytes(&self) -> u64 {
        let log = self.log.lock().unwrap();
        log.iter()
            .map(|op| if let Operation::Write { length, .. } = op { *length } else { 0 })
            .sum()
    }

    fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(fallocate(&self.file, how, offset, length)?)
    }
}

impl DiskSink for Disk {
    fn write(&mut self, offset: u64, bytes: Vec<u8>) -> io::Result<()> {
        self.log(Operation::Write { offset, length: bytes.len() as u64 });
        if self.written_bytes() > self.write_bytes_max {
            return Err(io::Error::new(io::ErrorKind::StorageFull, "no space at the destination"));
        }
        self.file.write_all_at(&bytes, offset)
    }
    fn write_zeroes(&mut self, offset: u64, length: u64, may_unmap: bool) -> io::Result<()> {
        self.log(Operation::Zero { offset, length, may_unmap });
        self.punch(offset, length)
    }
    fn discard(&mut self, offset: u64, length: u64) -> io::Result<()> {
        self.log(Operation::Discard { offset, length });
        self.punch(offset, length)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.log(Operation::Flush);
        Ok(())
    }
}

/// A child that does not outlive its test.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// A QEMU without a guest, driven over QMP.
struct Qemu {
    process: Process,
    qmp: BufReader<UnixStream>,
    events: Vec<Value>,
}

impl Qemu {
    /// Starts one with an image as its node `disk`.
    fn start(folder: &Path, format: &str, image: &Path) -> Self {
        let program = std::env::var_os("LIMOSA_TEST_QEMU").unwrap_or("qemu-system-x86_64".into());
        let socket = folder.join("qmp.sock");
        let node = json!({
            "driver": format, "node-name": "disk", "discard": "unmap",
            "file": { "driver": "file", "filename": image, "discard": "unmap" },
        });
        let child = Command::new(program)
            .args(["-machine", "none", "-nodefaults", "-display", "none", "-S"])
            .args(["-blockdev", &node.to_string()])
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", socket.display()))
            .spawn()
            .expect("QEMU is needed: qemu-system-x86 of Debian");
        let process = Process(child);
        let stream = connect(&socket);
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut qemu = Self { process, qmp: BufReader::new(stream), events: Vec::new() };
        qemu.line();
        qemu.execute("qmp_capabilities", &json!({}));
        qemu
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.qmp.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    fn execute(&mut self, command: &str, arguments: &Value) -> Value {
        let request = json!({ "execute": command, "arguments": arguments }).to_string();
        self.qmp.get_mut().write_all(request.as_bytes()).unwrap();
        loop {
            let answer = self.line();
            assert!(answer.get("error").is_none(), "{command}: {answer}");
            match answer.get("return") {
                Some(value) => return value.clone(),
                None => self.events.push(answer),
            }
        }
    }

    /// The next event of that name, from the last one that was asked for.
    fn event(&mut self, names: &[&str]) -> Value {
        let mut seen = std::mem::take(&mut self.events).into_iter();
        while let Some(event) = seen.next() {
            if names.iter().any(|name| event["event"] == *name) {
                self.events = seen.collect();
                return event;
            }
        }
        loop {
            let event = self.line();
            if names.iter().any(|name| event["event"] == *name) {
                return event;
            }
        }
    }

    /// Begins to mirror `disk`, as the agent does.
    fn mirror(&mut self, socket: &Path) {
        let target = json!({
            "driver": "nbd", "node-name": "target", "export": "root",
            "server": { "type": "unix", "path": socket },
            "discard": "unmap", "detect-zeroes": "unmap",
        });
        self.execute("blockdev-add", &target);
        let mirror = json!({
            "job-id": "mirror", "device": "disk", "target": "target", "sync": "full",
            "granularity": 64 << 10,
        });
        self.execute("blockdev-mirror", &mirror);
    }

    /// A writer that stands where a guest's device does: above the filter that a
    /// mirror, which starts later, puts on the disk. (What goes straight to the
    /// node goes past the filter, and from QEMU 8.2 on the mirror misses it.)
    fn guest(&mut self, folder: &Path) -> NbdClient {
        let socket = folder.join("guest.sock");
        let address = json!({ "type": "unix", "data": { "path": socket } });
        self.execute("nbd-server-start", &json!({ "addr": address }));
        let export = json!({
            "type": "nbd", "id": "guest", "node-name": "disk", "name": "guest", "writable": true,
        });
        self.execute("block-export-add", &export);
        NbdClient::connect(&socket, "guest").unwrap()
    }

    fn quit(mut self) {
        self.execute("quit", &json!({}));
        assert!(self.process.0.wait().unwrap().success());
    }
}

/// Connects as soon as somebody listens.
fn connect(socket: &Path) -> UnixStream {
    let since = Instant::now();
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return stream,
            Err(error) => assert!(since.elapsed() < PATIENCE, "{}: {error}", socket.display()),
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    let output = output.expect("QEMU's tools are needed: qemu-utils of Debian");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {said}{complaint}");
    said
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The lowest byte of a number.
fn byte(number: u64) -> u8 {
    number.to_le_bytes()[0]
}

/// Bytes without a stretch of zeroes.
fn noise(length: u64, seed: u8) -> Vec<u8> {
    (0..length)
        .map(|at| byte(at % 251) ^ byte(at >> 13))
        .map(|byte| byte.wrapping_add(seed))
        .collect()
}

/// A raw image with data here and there, also across its blocks' borders.
fn sparse_image(folder: &Path, size_bytes: u64) -> PathBuf {
    let path = folder.join("source.raw");
    let file = File::create(&path).unwrap();
    file.set_len(size_bytes).unwrap();
    let noise = noise(3 * MIB, 0);
    for (offset, bytes) in [(0, 512), (5 * MIB - 700, 1400), (300 * MIB + 4096, noise.len())] {
        file.write_all_at(&noise[..bytes], offset).unwrap();
    }
    file.write_all_at(&noise[..8192], size_bytes - 8192).unwrap();
    path
}

fn served(folder: &Path, disk: &Disk, size_bytes: u64) -> (PathBuf, ServerHandle) {
    let socket = folder.join("nbd.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let export = Export { name: "root".to_owned(), size_bytes };
    (socket, serve(listener, export, Box::new(disk.clone())).unwrap())
}

/// Goal: QEMU's mirror, with a guest that writes, zeroes and discards meanwhile,
/// gives an equal disk; what is a hole stays one and does not cross.
fn mirror_is_equal_and_sparse(format: &str) {
    let size_bytes = 1024 * MIB;
    let folder = tempfile::tempdir().unwrap();
    let raw = sparse_image(folder.path(), size_bytes);
    let image = if format == "raw" {
        raw
    } else {
        let image = folder.path().join("source.qcow2");
        run("qemu-img", &["convert", "-f", "raw", "-O", format, text(&raw), text(&image)]);
        image
    };
    let copy = folder.path().join("copy.raw");
    let disk = Disk::new(&copy, size_bytes);
    let (socket, server) = served(folder.path(), &disk, size_bytes);
    let mut qemu = Qemu::start(folder.path(), format, &image);
    let mut guest = qemu.guest(folder.path());
    qemu.mirror(&socket);
    guest.write(700 * MIB, &noise(MIB, 1)).unwrap();
    qemu.event(&["BLOCK_JOB_READY"]);
    let bulk_count = disk.log.lock().unwrap().len();
    assert!(disk.written_bytes() < 6 * MIB, "only data crosses: {}", disk.written_bytes());
    guest.write(300 * MIB, &noise(2 * MIB, 2)).unwrap();
    guest.write(5000, &noise(3000, 3)).unwrap();
    guest.write_zeroes(301 * MIB, MIB, true).unwrap();
    guest.write_zeroes(302 * MIB, 64 << 10, false).unwrap();
    guest.write(900 * MIB, &vec![0; at(MIB)]).unwrap();
    guest.discard(700 * MIB, MIB / 2).unwrap();
    guest.flush().unwrap();
    qemu.execute("block-job-cancel", &json!({ "device": "mirror" }));
    let end = qemu.event(&["BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED"]);
    assert_eq!(end["event"], "BLOCK_JOB_COMPLETED");
    assert!(end["data"].get("error").is_none(), "{end}");
    qemu.execute("blockdev-del", &json!({ "node-name": "target" }));
    drop(guest);
    qemu.quit();
    server.stop_and_join().unwrap();
    if let Ok(path) = std::env::var("LIMOSA_TEST_NBD_LOG") {
        let log = disk.log.lock().unwrap();
        let lines: Vec<_> = log.iter().map(|operation| format!("{operation:?}\n")).collect();
        let (bulk, later) = lines.split_at(bulk_count);
        let all = format!("{}--- ready ---\n{}", bulk.concat(), later.concat());
        std::fs::write(format!("{path}.{format}"), all).unwrap();
    }
    run("qemu-img", &["compare", "-f", format, "-F", "raw", text(&image), text(&copy)]);
    let allocated_bytes = disk.file.metadata().unwrap().blocks() * 512;
    assert!(allocated_bytes < 8 * MIB, "holes stay holes: {allocated_bytes}");
}

#[test]
fn a_mirror_of_a_raw_image_is_equal_and_sparse() {
    mirror_is_equal_and_sparse("raw");
}

#[test]
fn a_mirror_of_a_qcow2_image_is_equal_and_sparse() {
    mirror_is_equal_and_sparse("qcow2");
}

/// Goal: when the destination takes no more, the mirror fails by itself and the
/// source's disk goes on.
#[test]
fn a_sink_that_fails_fails_the_mirror_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let image = sparse_image(folder.path(), 512 * MIB);
    let mut disk = Disk::new(&folder.path().join("copy.raw"), 512 * MIB);
    disk.write_bytes_max = MIB;
    let (socket, server) = served(folder.path(), &disk, 512 * MIB);
    let mut qemu = Qemu::start(folder.path(), "raw", &image);
    let mut guest = qemu.guest(folder.path());
    qemu.mirror(&socket);
    let end = qemu.event(&["BLOCK_JOB_READY", "BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED"]);
    assert_eq!(end["event"], "BLOCK_JOB_COMPLETED");
    assert_eq!(end["data"]["error"], "No space left on device");
    assert_eq!(server.failure().unwrap().kind(), io::ErrorKind::StorageFull);
    guest.write(MIB, &noise(MIB, 4)).unwrap();
    guest.flush().unwrap();
    drop(guest);
    server.stop();
    qemu.quit();
    let mut read = vec![0; at(MIB)];
    File::open(&image).unwrap().read_exact_at(&mut read, MIB).unwrap();
    assert!(read == noise(MIB, 4));
}

/// QEMU's tools find the export by its name and as the default one, and write a
/// disk whose size is no multiple of anything.
#[test]
fn qemus_tools_write_into_our_server() {
    let folder = tempfile::tempdir().unwrap();
    let size_bytes = 3 * MIB + 1536;
    let (source, copy) = (folder.path().join("source.raw"), folder.path().join("copy.raw"));
    let content: Vec<u8> = (0..size_bytes).map(|at| byte(at / 977)).collect();
    std::fs::write(&source, &content).unwrap();
    let disk = Disk::new(&copy, size_bytes);
    let (socket, server) = served(folder.path(), &disk, size_bytes);
    let url = format!("nbd+unix:///root?socket={}", socket.display());
    let default = format!("nbd+unix:///?socket={}", socket.display());
    run("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", text(&source), &url]);
    assert!(std::fs::read(&copy).unwrap() == content);
    run("qemu-io", &["-f", "raw", "-c", "write -f -P 0x55 1000 3", &default]);
    assert_eq!(std::fs::read(&copy).unwrap()[999..1004], [1, 0x55, 0x55, 0x55, 1]);
    let listed = run("qemu-nbd", &["-L", "-k", text(&socket)]);
    assert!(listed.contains("export: 'root'") && listed.contains("zeroes"), "{listed}");
    let refused = Command::new("qemu-io").args(["-f", "raw", "-c", "read 0 512", &url]).output();
    let refused = refused.unwrap();
    let said = String::from_utf8_lossy(&refused.stdout) + String::from_utf8_lossy(&refused.stderr);
    assert!(said.contains("read failed"), "{said}");
    server.stop_and_join().unwrap();
}

/// Numbers from a seed (a linear congruential generator's upper bits).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        (self.0 >> 33) % limit
    }
}

fn at(number: u64) -> usize {
    usize::try_from(number).unwrap()
}

/// Goal: whatever overlaps in flight, the disk is what the calls say, in their order.
/// Method: the same calls, from a seed, on an array in memory.
#[test]
fn our_client_keeps_order_on_qemus_export() {
    for format in ["raw", "qcow2"] {
        let size_bytes = 64 * MIB;
        let folder = tempfile::tempdir().unwrap();
        let (image, socket) = (folder.path().join("image"), folder.path().join("nbd.sock"));
        run("qemu-img", &["create", "-f", format, text(&image), &size_bytes.to_string()]);
        let child = Command::new("qemu-nbd")
            .args(["-t", "-f", format, "-x", "root", "--discard=unmap", "-k"])
            .args([&socket, &image])
            .stdout(Stdio::null())
            .spawn();
        let _process = Process(child.expect("QEMU's tools are needed: qemu-utils of Debian"));
        connect(&socket);
        let missing = NbdClient::connect(&socket, "other").err().unwrap();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
        let mut client = NbdClient::connect(&socket, "root").unwrap();
        assert_eq!((client.size_bytes(), client.can_zero()), (size_bytes, true));

        let seed = 7;
        let mut numbers = Numbers(seed);
        let mut model = vec![0; at(size_bytes)];
        for step in 0..3000u64 {
            // Most of it in one place, so that much overlaps.
            let offset = numbers.below(if step % 8 == 0 { size_bytes - 3 * MIB } else { MIB });
            let length = 1 + numbers.below(if step % 50 == 0 { 3 * MIB } else { 9000 });
            let range = &mut model[at(offset)..at(offset + length)];
            if numbers.below(5) == 0 {
                range.fill(0);
                client.write_zeroes(offset, length, step % 2 == 0).unwrap();
            } else {
                range.fill((step % 255) as u8 + 1);
                client.write(offset, range).unwrap();
            }
        }
        client.flush().unwrap();
        // A whole disk in one call, and then what the rest of the test expects.
        client.write_zeroes(0, size_bytes, true).unwrap();
        client.discard(0, size_bytes).unwrap();
        client.write(0, &model[..at(40 * MIB)]).unwrap();
        client.write(40 * MIB, &model[at(40 * MIB)..]).unwrap();
        client.flush().unwrap();
        drop(client);
        let copy = folder.path().join("copy.raw");
        run("qemu-img", &["convert", "-U", "-f", format, "-O", "raw", text(&image), text(&copy)]);
        assert!(std::fs::read(&copy).unwrap() == model, "{format}, seed {seed}");
    }
}

/// Goal: a server that dies is an error, at the latest at the flush, and nobody hangs.
#[test]
fn our_client_finds_that_the_server_died() {
    let folder = tempfile::tempdir().unwrap();
    let (image, socket) = (folder.path().join("image.raw"), folder.path().join("nbd.sock"));
    File::create(&image).unwrap().set_len(64 * MIB).unwrap();
    let child = Command::new("qemu-nbd")
        .args(["-t", "-f", "raw", "-x", "root", "-k"])
        .args([&socket, &image])
        .stdout(Stdio::null())
        .spawn();
    let process = Process(child.expect("QEMU's tools are needed: qemu-utils of Debian"));
    connect(&socket);
    let mut client = NbdClient::connect(&socket, "root").unwrap();
    client.write(0, &[1; 4096]).unwrap();
    drop(process);
    let written = client.write(0, &[2; 4096]);
    assert!(written.is_err() || client.flush().is_err());
    assert!(client.flush().is_err());
}
