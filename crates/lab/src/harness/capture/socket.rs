//! A packet socket on one switch port, with the kernel's time stamps.
//!
//! The standard library has no packet sockets, and time stamps arrive as
//! ancillary bytes: this is the only place in the capture with `unsafe`.

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result, ensure};

/// Kept from each frame: enough for all headers and a heartbeat.
pub(super) const SNAP_BYTES: usize = 160;
/// Queue in the kernel: several seconds of frames while this thread must wait.
const QUEUE_BYTES: libc::c_int = 8 << 20;
/// Longest wait for a frame before looking whether to stop, in microseconds.
const WAIT_US: libc::suseconds_t = 20_000;
/// Space for one time stamp with its header.
const CONTROL_BYTES: usize = 64;

/// A packet socket that sees what enters at one interface.
#[derive(Debug)]
pub(super) struct PortSocket {
    fd: OwnedFd,
}

/// One frame's measures.
#[derive(Debug, Clone, Copy)]
pub(super) struct Received {
    /// When it entered, in nanoseconds since 1970
    pub(super) at_ns: u64,
    /// Its whole length
    pub(super) bytes: u32,
    /// Length of what was kept
    pub(super) kept_bytes: usize,
}

impl PortSocket {
    /// Opens it on an interface of this thread's network namespace.
    pub(super) fn open(interface: &str) -> Result<Self> {
        let every = u16::try_from(libc::ETH_P_ALL)?.to_be();
        // SAFETY: a plain system call without pointers.
        let raw = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
        ensure!(raw >= 0, "opening a packet socket: {}", io::Error::last_os_error());
        // SAFETY: `raw` is open and nobody else owns it.
        let socket = Self { fd: unsafe { OwnedFd::from_raw_fd(raw) } };
        socket.set(libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, &1)?;
        socket.set(libc::SOL_SOCKET, libc::SO_TIMESTAMPNS, &1)?;
        socket.set(libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &QUEUE_BYTES)?;
        let wait = libc::timeval { tv_sec: 0, tv_usec: WAIT_US };
        socket.set_raw(libc::SOL_SOCKET, libc::SO_RCVTIMEO, &wait)?;
        let name = std::ffi::CString::new(interface)?;
        // SAFETY: `name` ends with a zero byte and outlives the call.
        let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
        ensure!(index > 0, "no interface {interface}");
        // Bound last: before, the socket hears nothing, so nothing of another
        // interface gets in.
        // SAFETY: all-zero bytes are a valid sockaddr_ll.
        let mut address: libc::sockaddr_ll = unsafe { mem::zeroed() };
        address.sll_family = u16::try_from(libc::AF_PACKET)?;
        address.sll_protocol = every;
        address.sll_ifindex = i32::try_from(index)?;
        let length = libc::socklen_t::try_from(size_of_val(&address))?;
        // SAFETY: `address` is initialised and `length` is its size.
        let done =
            unsafe { libc::bind(socket.fd.as_raw_fd(), (&raw const address).cast(), length) };
        ensure!(done == 0, "binding to {interface}: {}", io::Error::last_os_error());
        Ok(socket)
    }

    /// The next frame; `None` when none came for a while.
    pub(super) fn receive(&self, buffer: &mut [u8; SNAP_BYTES]) -> Result<Option<Received>> {
        let mut control = [0u64; CONTROL_BYTES / 8];
        let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: SNAP_BYTES };
        // SAFETY: all-zero bytes are a valid msghdr.
        let mut message: libc::msghdr = unsafe { mem::zeroed() };
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = CONTROL_BYTES;
        // With MSG_TRUNC the answer is the frame's whole length.
        // SAFETY: the message points to buffers that outlive the call, with their sizes.
        let told = unsafe { libc::recvmsg(self.fd.as_raw_fd(), &raw mut message, libc::MSG_TRUNC) };
        let Ok(bytes) = usize::try_from(told) else {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
                // The port may go down and up again: a cut link.
                _ if error.raw_os_error() == Some(libc::ENETDOWN) => Ok(None),
                _ => Err(error).context("receiving a frame"),
            };
        };
        let at_ns = stamp(&message).context("a frame without a time stamp")?;
        let kept_bytes = bytes.min(SNAP_BYTES);
        Ok(Some(Received { at_ns, bytes: u32::try_from(bytes)?, kept_bytes }))
    }

    /// Frames that the kernel dropped since the last question.
    pub(super) fn dropped(&self) -> Result<u32> {
        let mut stats = libc::tpacket_stats { tp_packets: 0, tp_drops: 0 };
        let mut length = libc::socklen_t::try_from(size_of_val(&stats))?;
        // SAFETY: `stats` has `length` bytes and outlives the call.
        let done = unsafe {
            libc::getsockopt(
                self.fd.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_STATISTICS,
                (&raw mut stats).cast(),
                &raw mut length,
            )
        };
        ensure!(done == 0, "asking for dropped frames: {}", io::Error::last_os_error());
        Ok(stats.tp_drops)
    }

    fn set(&self, level: libc::c_int, option: libc::c_int, value: &libc::c_int) -> Result<()> {
        self.set_raw(level, option, value)
    }

    fn set_raw<T>(&self, level: libc::c_int, option: libc::c_int, value: &T) -> Result<()> {
        let length = libc::socklen_t::try_from(size_of::<T>())?;
        let value: *const T = value;
        // SAFETY: `value` is initialised, has `length` bytes and outlives the call.
        let done =
            unsafe { libc::setsockopt(self.fd.as_raw_fd(), level, option, value.cast(), length) };
        ensure!(done == 0, "socket option {option}: {}", io::Error::last_os_error());
        Ok(())
    }
}

/// The time stamp among a message's ancillary parts, in nanoseconds since 1970.
fn stamp(message: &libc::msghdr) -> Option<u64> {
    // SAFETY: the kernel has filled `message`, and its control bytes are still there.
    let mut part = unsafe { libc::CMSG_FIRSTHDR(message) };
    while !part.is_null() {
        // SAFETY: not null, so it points to a whole header within the control bytes.
        let header = unsafe { &*part };
        if header.cmsg_level == libc::SOL_SOCKET && header.cmsg_type == libc::SO_TIMESTAMPNS {
            // SAFETY: for this type the kernel writes a timespec after the
            // header; it need not be aligned.
            let time: libc::timespec =
                unsafe { libc::CMSG_DATA(part).cast::<libc::timespec>().read_unaligned() };
            let seconds = u64::try_from(time.tv_sec).ok()?;
            return seconds.checked_mul(1_000_000_000)?.checked_add(time.tv_nsec.try_into().ok()?);
        }
        // SAFETY: both come from this message.
        part = unsafe { libc::CMSG_NXTHDR(message, part) };
    }
    None
}
