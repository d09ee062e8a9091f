//! Any bytes, as a client's to the NBD server or as a server's to the client.
//!
//! The first byte says whom the rest is for. Checks more than "no crash": what
//! reaches the sink lies inside the export and is not empty, nothing reaches it
//! after it failed, and the client never believes in more success than it was told.

use std::io::{self, Write};
use std::os::unix::net::UnixStream;

use limosa_nbd::Export;
use limosa_nbd::client::NbdClient;
use limosa_nbd::server::{DiskSink, converse};

const SIZE_BYTES: u64 = 1 << 20;
/// Fits a socket, so that nobody has to read at the same time.
const CLIENT_BYTES_MAX: usize = 32 << 10;
/// How a reply begins.
const REPLY_MAGIC: [u8; 4] = 0x6744_6698_u32.to_be_bytes();

struct Checking {
    left_until_failure: u32,
    failed: bool,
}

impl Checking {
    fn range(&mut self, offset: u64, length: u64) -> io::Result<()> {
        assert!(length > 0 && offset.checked_add(length).is_some_and(|end| end <= SIZE_BYTES));
        self.flush()
    }
}

impl DiskSink for Checking {
    fn write(&mut self, offset: u64, bytes: Vec<u8>) -> io::Result<()> {
        self.range(offset, bytes.len() as u64)
    }
    fn write_zeroes(&mut self, offset: u64, length: u64, _may_unmap: bool) -> io::Result<()> {
        self.range(offset, length)
    }
    fn discard(&mut self, offset: u64, length: u64) -> io::Result<()> {
        self.range(offset, length)
    }
    fn flush(&mut self) -> io::Result<()> {
        assert!(!self.failed, "called after it failed");
        self.failed = self.left_until_failure == 0;
        self.left_until_failure = self.left_until_failure.saturating_sub(1);
        if self.failed { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }
}

fn client_receives(bytes: &[u8]) {
    let Ok((ours, mut theirs)) = UnixStream::pair() else { return };
    let bytes = &bytes[..bytes.len().min(CLIENT_BYTES_MAX)];
    theirs.write_all(bytes).expect("a socket takes that much");
    theirs.shutdown(std::net::Shutdown::Write).expect("it is open");
    let Ok(mut client) = NbdClient::over(ours, "root") else { return };
    let size_bytes = client.size_bytes();
    let wrote = size_bytes >= 512 && client.write(size_bytes - 512, &[1; 512]).is_ok();
    if client.flush().is_ok() && wrote {
        let replies = bytes.windows(4).filter(|bytes| *bytes == REPLY_MAGIC).count();
        assert!(replies >= 2, "two replies were in there");
    }
}

/// Panics when the bytes break something.
pub(crate) fn check(bytes: &[u8]) {
    let Some((whom, rest)) = bytes.split_first() else { return };
    if whom % 2 == 1 {
        client_receives(rest);
        return;
    }
    let export = Export { name: "root".to_owned(), size_bytes: SIZE_BYTES };
    let mut sink = Checking { left_until_failure: u32::from(whom / 2), failed: false };
    let mut answers = Vec::new();
    converse(&mut &rest[..], &mut answers, &export, &mut sink).ok();
}
