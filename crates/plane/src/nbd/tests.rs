//! Our client and QEMU's against our server, and rubbish against both.

use std::os::unix::net::UnixListener;
use std::process::Command;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use super::client::NbdClient;
use super::server::{DiskSink, Export, handshake, serve, transmission};
use super::*;

/// A disk in memory.
#[derive(Clone)]
struct Memory(Arc<Mutex<Vec<u8>>>);

impl Memory {
    fn new(size_bytes: usize) -> Self {
        Self(Arc::new(Mutex::new(vec![0xaa; size_bytes])))
    }
    fn fill(&self, offset: u64, bytes: &[u8]) {
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
    fn discard(&mut self, _offset: u64, _length: u64) -> io::Result<()> {
        Ok(())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn export() -> Export {
    Export { name: "root".to_owned(), size_bytes: 1 << 20 }
}

#[test]
fn our_client_writes_through_our_server() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("nbd.sock");
    let memory = Memory::new(1 << 20);
    let listener = UnixListener::bind(&socket).unwrap();
    let server = serve(listener, export(), Box::new(memory.clone())).unwrap();
    assert!(NbdClient::connect(&socket, "other").is_err());
    let mut client = NbdClient::connect(&socket, "root").unwrap();
    assert_eq!(client.size_bytes(), 1 << 20);
    for version in 0..50u8 {
        client.write(4096, &[version; 8192]).unwrap();
    }
    client.write_zeroes(0, 4096, true).unwrap();
    client.flush().unwrap();
    assert!(client.write(1 << 20, &[1]).is_err(), "past the end");
    {
        let bytes = memory.0.lock().unwrap();
        assert!(bytes[..4096].iter().all(|byte| *byte == 0));
        assert!(bytes[4096..12288].iter().all(|byte| *byte == 49));
        assert!(bytes[12288..].iter().all(|byte| *byte == 0xaa));
    }
    drop(client);
    server.stop();
}

/// QEMU's own tool writes an image into the server.
#[test]
fn qemu_writes_through_our_server() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("nbd.sock");
    let image = folder.path().join("image.raw");
    let content: Vec<u8> = (0..1u32 << 20).map(|at| (at / 977) as u8).collect();
    std::fs::write(&image, &content).unwrap();
    let memory = Memory::new(1 << 20);
    let listener = UnixListener::bind(&socket).unwrap();
    let server = serve(listener, export(), Box::new(memory.clone())).unwrap();
    let status = Command::new("qemu-img")
        .args(["convert", "-n", "-f", "raw", "-O", "raw"])
        .arg(&image)
        .arg(format!("nbd+unix:///root?socket={}", socket.display()))
        .status()
        .expect("qemu-img of Debian's qemu-utils is needed");
    assert!(status.success());
    assert!(*memory.0.lock().unwrap() == content);
    server.stop();
}

fn replay(bytes: &[u8]) {
    let mut memory = Memory::new(1 << 20);
    let mut reader = bytes;
    if handshake(&mut reader, &mut io::sink(), &export()).unwrap_or(false) {
        transmission(&mut reader, &mut io::sink(), &export(), &mut memory).ok();
    }
    let mut reader = bytes;
    transmission(&mut reader, &mut io::sink(), &export(), &mut memory).ok();
}

proptest! {
    #[test]
    fn no_bytes_break_the_server(
        flags in any::<u16>(), command in 0u16..8, offset in any::<u64>(), length in any::<u32>(),
        rest in prop::collection::vec(any::<u8>(), 0..100),
    ) {
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&REQUEST_MAGIC.to_be_bytes());
        bytes.extend_from_slice(&flags.to_be_bytes());
        bytes.extend_from_slice(&command.to_be_bytes());
        bytes.extend_from_slice(&[0; 8]);
        bytes.extend_from_slice(&offset.to_be_bytes());
        bytes.extend_from_slice(&length.to_be_bytes());
        bytes.extend_from_slice(&rest);
        replay(&bytes);
        replay(&rest);
    }
}
