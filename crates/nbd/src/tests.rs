//! Our client against our server, and rubbish against both.
//!
//! QEMU's side is in `tests/qemu.rs`.

use std::io::{self, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use crate::client::NbdClient;
use crate::export::Export;
use crate::server::{DiskSink, ServerHandle, converse, serve};
use crate::wire::*;

const SIZE_BYTES: u64 = 1 << 20;

/// A disk in memory, which checks what a sink may count on.
#[derive(Clone)]
struct Memory(Arc<Mutex<Vec<u8>>>);

impl Memory {
    fn new() -> Self {
        Self(Arc::new(Mutex::new(vec![0xaa; usize::try_from(SIZE_BYTES).unwrap()])))
    }
    fn fill(&self, offset: u64, bytes: &[u8]) {
        assert!(!bytes.is_empty());
        let at = usize::try_from(offset).unwrap();
        self.0.lock().unwrap()[at..at + bytes.len()].copy_from_slice(bytes);
    }
}

impl DiskSink for Memory {
    fn write(&mut self, offset: u64, bytes: Vec<u8>) -> io::Result<()> {
        self.fill(offset, &bytes);
        Ok(())
    }
    fn write_zeroes(&mut self, offset: u64, length: u64, _may_unmap: bool) -> io::Result<()> {
        self.fill(offset, &vec![0; usize::try_from(length).unwrap()]);
        Ok(())
    }
    fn discard(&mut self, offset: u64, length: u64) -> io::Result<()> {
        self.fill(offset, &vec![0xdd; usize::try_from(length).unwrap()]);
        Ok(())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn export() -> Export {
    Export { name: "root".to_owned(), size_bytes: SIZE_BYTES }
}

fn served(folder: &Path, sink: impl DiskSink + 'static) -> (std::path::PathBuf, ServerHandle) {
    let socket = folder.join("nbd.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let server = serve(listener, export(), Box::new(sink)).unwrap();
    (socket, server)
}

#[test]
fn our_client_writes_through_our_server() {
    let folder = tempfile::tempdir().unwrap();
    let memory = Memory::new();
    let (socket, server) = served(folder.path(), memory.clone());
    let refused = NbdClient::connect(&socket, "other").err().unwrap();
    assert_eq!(refused.kind(), io::ErrorKind::NotFound);
    let mut client = NbdClient::connect(&socket, "root").unwrap();
    assert_eq!(client.size_bytes(), SIZE_BYTES);
    assert!(client.can_zero());
    for version in 0..50u8 {
        client.write(4096, &[version; 8192]).unwrap();
    }
    client.write_zeroes(0, 4096, true).unwrap();
    client.discard(12288, 1).unwrap();
    client.flush().unwrap();
    assert!(client.write(SIZE_BYTES, &[1]).is_err(), "past the end");
    assert!(client.discard(u64::MAX, u64::MAX).is_err(), "past all ends");
    client.write(SIZE_BYTES - 1, &[7]).unwrap();
    client.flush().unwrap();
    drop(client);
    let mut client = NbdClient::connect(&socket, "root").unwrap();
    client.write(SIZE_BYTES - 2, &[6]).unwrap();
    client.flush().unwrap();
    server.stop_and_join().unwrap();
    assert!(client.flush().is_err(), "the export is gone");
    assert!(UnixStream::connect(&socket).is_err(), "nobody listens");
    let bytes = memory.0.lock().unwrap();
    assert!(bytes[..4096].iter().all(|byte| *byte == 0));
    assert!(bytes[4096..12288].iter().all(|byte| *byte == 49));
    assert_eq!(bytes[12288..12290], [0xdd, 0xaa]);
    assert!(bytes.ends_with(&[0xaa, 6, 7]));
}

/// Takes one write, then fails for want of space.
struct Full(Memory, bool);

impl DiskSink for Full {
    fn write(&mut self, offset: u64, bytes: Vec<u8>) -> io::Result<()> {
        if std::mem::replace(&mut self.1, true) {
            return Err(io::Error::new(io::ErrorKind::StorageFull, "no space there"));
        }
        self.0.write(offset, bytes)
    }
    fn write_zeroes(&mut self, _offset: u64, _length: u64, _may_unmap: bool) -> io::Result<()> {
        panic!("called after it failed")
    }
    fn discard(&mut self, _offset: u64, _length: u64) -> io::Result<()> {
        panic!("called after it failed")
    }
    fn flush(&mut self) -> io::Result<()> {
        panic!("called after it failed")
    }
}

/// Goal: a mirror with a gap in it never looks complete.
#[test]
fn after_the_sinks_first_error_nothing_succeeds() {
    let folder = tempfile::tempdir().unwrap();
    let (socket, server) = served(folder.path(), Full(Memory::new(), false));
    let mut client = NbdClient::connect(&socket, "root").unwrap();
    client.write(0, &[1]).unwrap();
    client.write(1, &[1]).unwrap();
    client.write_zeroes(2, 1, true).unwrap();
    let error = client.flush().unwrap_err();
    assert_eq!(error.raw_os_error(), i32::try_from(ENOSPC).ok());
    assert!(client.flush().is_err() && client.write(0, &[1]).is_err());
    drop(client);
    let mut client = NbdClient::connect(&socket, "root").unwrap();
    let error = client.flush().unwrap_err();
    assert_eq!(error.raw_os_error(), i32::try_from(EIO).ok());
    assert_eq!(server.failure().unwrap().kind(), io::ErrorKind::StorageFull);
    assert!(server.stop_and_join().is_err());
}

/// Waits in each write until it is let go.
struct Waiting {
    began: SyncSender<u64>,
    go: Receiver<()>,
}

impl DiskSink for Waiting {
    fn write(&mut self, offset: u64, _bytes: Vec<u8>) -> io::Result<()> {
        self.began.send(offset).map_err(io::Error::other)?;
        self.go.recv().map_err(io::Error::other)
    }
    fn write_zeroes(&mut self, _offset: u64, _length: u64, _may_unmap: bool) -> io::Result<()> {
        Ok(())
    }
    fn discard(&mut self, _offset: u64, _length: u64) -> io::Result<()> {
        Ok(())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Goal: the sink slows the client down; stopping waits for neither, and what had
/// arrived before the stop does not reach the sink after it.
#[test]
fn a_waiting_sink_holds_the_client_but_not_the_stop() {
    let folder = tempfile::tempdir().unwrap();
    let (began, begins) = sync_channel(64);
    let (let_go, go) = sync_channel(64);
    let (socket, server) = served(folder.path(), Waiting { began, go });
    let mut client = NbdClient::connect(&socket, "root").unwrap();
    for offset in 0..10 {
        client.write(offset, &[1]).unwrap();
    }
    assert_eq!(begins.recv().unwrap(), 0);
    server.stop();
    assert!(client.flush().is_err());
    drop(client);
    let_go.send(()).unwrap();
    assert!(begins.recv().is_err(), "the sink was dropped, after one write");
}

/// Half a request, and then the next client.
#[test]
fn clients_that_break_off_leave_the_export_to_others() {
    let folder = tempfile::tempdir().unwrap();
    let memory = Memory::new();
    let (socket, server) = served(folder.path(), memory.clone());
    let whole = conversation(&[request(0, CMD_WRITE, 0, 64, &[1; 64])]);
    for length in [0, 3, 4, 30, whole.len() - 80, whole.len() - 1] {
        let mut stream = UnixStream::connect(&socket).unwrap();
        stream.write_all(&whole[..length]).unwrap();
    }
    let mut client = NbdClient::connect(&socket, "root").unwrap();
    client.flush().unwrap();
    server.stop_and_join().unwrap();
    assert!(memory.0.lock().unwrap().iter().all(|byte| *byte == 0xaa));
}

fn request(flags: u16, command: u16, offset: u64, bytes: u32, payload: &[u8]) -> Vec<u8> {
    let head = RequestHead { flags, command, cookie: 9, offset, bytes };
    [&head.encode(), payload].concat()
}

/// What a client says: its flags, GO, and requests.
fn conversation(requests: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = 3u32.to_be_bytes().to_vec();
    write_option(&mut bytes, OPT_GO, b"\0\0\0\x04root\0\x01\0\x03").unwrap();
    bytes.extend(requests.concat());
    bytes
}

/// Gives a conversation to a server; its result and the errors of its replies.
fn converse_with(bytes: &[u8], memory: &Memory) -> (io::Result<()>, Vec<u32>) {
    let mut out = Vec::new();
    let result = converse(&mut &bytes[..], &mut out, &export(), &mut memory.clone());
    // The hello, and three answers to GO.
    let replies = out.get(18 + 32 + 34 + 20..).unwrap_or_default();
    let errors = replies.chunks_exact(REPLY_BYTES).map(|reply| {
        assert_eq!(reply[8..], 9u64.to_be_bytes());
        u32::from_be_bytes(reply[4..8].try_into().unwrap())
    });
    (result, errors.collect())
}

/// Goal: each refusal has the number that the protocol gives it, and the next
/// request is found behind it.
#[test]
fn refusals_follow_the_protocol() {
    let over = u32::try_from(SIZE_BYTES).unwrap() + 1;
    let cases = [
        (request(0, CMD_WRITE, SIZE_BYTES - 1, 2, &[0; 2]), ENOSPC),
        (request(0, CMD_WRITE, u64::MAX, 2, &[0; 2]), ENOSPC),
        (request(0, CMD_WRITE, 0, over, &vec![0; over as usize]), ENOSPC),
        (request(CMD_FLAG_NO_HOLE, CMD_WRITE, 0, 2, &[0; 2]), EINVAL),
        (request(0, CMD_WRITE_ZEROES, 1, u32::MAX, &[]), ENOSPC),
        (request(1 << 5, CMD_WRITE_ZEROES, 0, 1, &[]), EINVAL),
        (request(0, CMD_TRIM, SIZE_BYTES, 1, &[]), EINVAL),
        (request(0, CMD_READ, 0, 512, &[]), ENOTSUP),
        (request(1 << 9, CMD_FLUSH, 0, 0, &[]), EINVAL),
        (request(0, 7, 0, 512, &[]), EINVAL),
        (request(0, u16::MAX, 0, 0, &[]), EINVAL),
        (request(0, CMD_WRITE, SIZE_BYTES, 0, &[]), 0),
        (request(CMD_FLAG_FUA, CMD_WRITE, SIZE_BYTES - 2, 2, &[5; 2]), 0),
        (request(CMD_FLAG_FAST_ZERO, CMD_WRITE_ZEROES, 0, 1, &[]), 0),
    ];
    let (requests, expected): (Vec<_>, Vec<_>) = cases.into_iter().unzip();
    let memory = Memory::new();
    let (result, errors) = converse_with(&conversation(&requests), &memory);
    assert_eq!(result.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    assert_eq!(errors, expected);
    assert!(memory.0.lock().unwrap().ends_with(&[0xaa, 5, 5]));
}

#[test]
fn lengths_are_checked_before_memory_is_taken() {
    for (offset, bytes) in [(0, u32::MAX), (0, REQUEST_BYTES_MAX + 1), (u64::MAX, u32::MAX)] {
        let huge = conversation(&[request(0, CMD_WRITE, offset, bytes, &[0; 100])]);
        let (result, errors) = converse_with(&huge, &Memory::new());
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::InvalidData);
        assert!(errors.is_empty());
    }
    let mut option = 3u32.to_be_bytes().to_vec();
    option.extend(OPTION_MAGIC.to_be_bytes());
    option.extend(OPT_GO.to_be_bytes());
    option.extend(u32::MAX.to_be_bytes());
    let (result, _) = converse_with(&option, &Memory::new());
    assert_eq!(result.unwrap_err().kind(), io::ErrorKind::InvalidData);
}

/// The bytes of a fuzzer: the first says whom they are for.
fn replay(bytes: &[u8]) {
    let Some((whom, rest)) = bytes.split_first() else { return };
    if whom % 2 == 0 {
        converse(&mut &rest[..], &mut io::sink(), &export(), &mut Memory::new()).ok();
        return;
    }
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(&rest[..rest.len().min(32 << 10)]).unwrap();
    theirs.shutdown(std::net::Shutdown::Write).unwrap();
    if let Ok(mut client) = NbdClient::over(ours, "root") {
        let size_bytes = client.size_bytes();
        client.write(0, &[1; 512]).ok();
        client.write_zeroes(size_bytes / 2, 1, true).ok();
        client.flush().ok();
    }
}

proptest! {
    #[test]
    fn no_bytes_break_the_server(
        flags in any::<u16>(), command in 0u16..8, offset in any::<u64>(), length in any::<u32>(),
        near in any::<bool>(), rest in prop::collection::vec(any::<u8>(), 0..100),
    ) {
        let (offset, length) =
            if near { (offset % (SIZE_BYTES + 2), length % 64) } else { (offset, length) };
        let first = request(flags, command, offset, length, &rest);
        let second = request(0, CMD_FLUSH, 0, 0, &[]);
        let _ = converse_with(&conversation(&[first, second]), &Memory::new());
        let memory = Memory::new();
        converse(&mut &rest[..], &mut io::sink(), &export(), &mut memory.clone()).ok();
    }

    #[test]
    fn no_bytes_break_the_client(
        flags in any::<u16>(), size in any::<u64>(), maximum in any::<u32>(),
        error in 0u32..3, rest in prop::collection::vec(any::<u8>(), 0..100),
    ) {
        let mut bytes = vec![1];
        bytes.extend(server_says(size, flags, maximum));
        for cookie in 0..3u64 {
            bytes.extend(SIMPLE_REPLY_MAGIC.to_be_bytes());
            bytes.extend(error.to_be_bytes());
            bytes.extend(cookie.to_be_bytes());
        }
        bytes.extend(rest);
        replay(&bytes);
    }
}

/// What a server says, up to transmission.
fn server_says(size_bytes: u64, flags: u16, write_bytes_max: u32) -> Vec<u8> {
    let mut bytes = [MAGIC.to_be_bytes(), OPTION_MAGIC.to_be_bytes()].concat();
    bytes.extend(3u16.to_be_bytes());
    let answer = |kind: u32, content: &[u8]| {
        let mut answer = REPLY_MAGIC.to_be_bytes().to_vec();
        for number in [OPT_GO, kind, length(content).unwrap()] {
            answer.extend(number.to_be_bytes());
        }
        answer.extend(content);
        answer
    };
    let size = [&INFO_EXPORT.to_be_bytes()[..], &size_bytes.to_be_bytes(), &flags.to_be_bytes()];
    bytes.extend(answer(REP_INFO, &size.concat()));
    let mut blocks = INFO_BLOCK_SIZE.to_be_bytes().to_vec();
    for number in [1, 512, write_bytes_max] {
        blocks.extend(number.to_be_bytes());
    }
    bytes.extend(answer(REP_INFO, &blocks));
    bytes.extend(answer(REP_ACK, &[]));
    bytes
}
