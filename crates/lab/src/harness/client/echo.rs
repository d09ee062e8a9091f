//! The client's threads: each sends, receives and compares until told to stop.

use std::io::{self, Read, Write};
use std::net::{Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::{TCP_ECHO_PORT, Talk, Tally, UDP_ECHO_PORT};
use crate::harness::heartbeat;

/// Bytes of one exchange on a TCP session.
const EXCHANGE_BYTES: usize = 512;
/// Longest wait for a TCP answer; beyond, a user would call the connection dead.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// Wait for one read, so that a stop is noticed soon.
const POLL: Duration = Duration::from_millis(50);
/// Pause after a connection failed.
const RETRY_PAUSE: Duration = Duration::from_millis(100);
/// Beginning of the client's own datagrams.
const DATAGRAM_MAGIC: [u8; 4] = *b"LMUD";

/// Keeps one TCP session open, and opens it again when it breaks.
pub(super) fn tcp(talk: Talk, index: usize, stop: &AtomicBool, tally: &Mutex<Tally>) -> Result<()> {
    let address = SocketAddr::new(talk.guest, TCP_ECHO_PORT);
    while !stop.load(Ordering::Relaxed) {
        let Ok(mut stream) = TcpStream::connect_timeout(&address, Duration::from_secs(2)) else {
            // Not yet up, or gone: a session that never was cannot break.
            std::thread::sleep(RETRY_PAUSE);
            continue;
        };
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(POLL))?;
        stream.set_write_timeout(Some(ANSWER_TIMEOUT))?;
        if let Err(error) = exchange_on(&mut stream, talk, index, stop, tally) {
            locked(tally)?.broke(&error);
        }
    }
    locked(tally)?.close_gap();
    Ok(())
}

/// Exchanges until told to stop; an error is a broken connection.
fn exchange_on(
    stream: &mut TcpStream,
    talk: Talk,
    index: usize,
    stop: &AtomicBool,
    tally: &Mutex<Tally>,
) -> io::Result<()> {
    let mut sent = [0; EXCHANGE_BYTES];
    let mut got = [0; EXCHANGE_BYTES];
    let mut seed = u64::try_from(index).unwrap_or(0).wrapping_add(1);
    while !stop.load(Ordering::Relaxed) {
        fill(&mut sent, &mut seed);
        stream.write_all(&sent)?;
        if !read_answer(stream, &mut got, stop)? {
            return Ok(());
        }
        let wrong = sent.iter().zip(&got).filter(|(sent, got)| sent != got).count();
        let mut tally = tally.lock().map_err(|_| io::Error::other("a thread panicked"))?;
        if wrong == 0 {
            tally.answered(EXCHANGE_BYTES);
        } else {
            tally.wrong += u64::try_from(wrong).unwrap_or(u64::MAX);
        }
        drop(tally);
        std::thread::sleep(Duration::from_millis(talk.pause_ms));
    }
    Ok(())
}

/// Fills `got`; `false` when told to stop before.
fn read_answer(stream: &mut TcpStream, got: &mut [u8], stop: &AtomicBool) -> io::Result<bool> {
    let deadline = Instant::now() + ANSWER_TIMEOUT;
    let mut filled = 0;
    while filled < got.len() {
        match stream.read(&mut got[filled..]) {
            Ok(0) => {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "closed by the guest"));
            }
            Ok(count) => filled += count,
            Err(error) if is_timeout(&error) => {
                if stop.load(Ordering::Relaxed) {
                    return Ok(false);
                }
                if Instant::now() > deadline {
                    return Err(io::Error::new(io::ErrorKind::TimedOut, "no answer for 30 s"));
                }
            }
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}

/// Sends numbered datagrams and counts those that come back.
pub(super) fn udp(talk: Talk, stop: &AtomicBool, tally: &Mutex<Tally>) -> Result<()> {
    let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)).context("binding a UDP socket")?;
    let address = SocketAddr::new(mapped(talk.guest), UDP_ECHO_PORT);
    let pause = Duration::from_millis(talk.pause_ms.max(1));
    socket.set_read_timeout(Some(pause))?;
    let mut number: u64 = 0;
    let mut buffer = [0; 64];
    // Only from the first answer on: before, the guest is not up.
    let mut first = None;
    while !stop.load(Ordering::Relaxed) {
        let mut datagram = DATAGRAM_MAGIC.to_vec();
        datagram.extend(number.to_le_bytes());
        number += 1;
        // Without a route or neighbour it fails at once: the same as lost.
        let _ = socket.send_to(&datagram, address);
        let next = Instant::now() + pause;
        while Instant::now() < next {
            let Ok((length, _)) = socket.recv_from(&mut buffer) else { continue };
            let mut tally = locked(tally)?;
            match own_number(&buffer[..length]) {
                Some(back) if back < number => {
                    let first = *first.get_or_insert(back);
                    tally.answered(length);
                    tally.lost = (number - first).saturating_sub(tally.exchanges);
                }
                _ => tally.wrong += 1,
            }
        }
    }
    locked(tally)?.close_gap();
    Ok(())
}

/// Counts heartbeats.
pub(super) fn receive_beats(stop: &AtomicBool, tally: &Mutex<Tally>) -> Result<()> {
    let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, heartbeat::PORT))
        .context("binding for heartbeats")?;
    socket.set_read_timeout(Some(POLL))?;
    let mut buffer = [0; 512];
    let mut highest: Option<u64> = None;
    while !stop.load(Ordering::Relaxed) {
        let length = match socket.recv_from(&mut buffer) {
            Ok((length, _)) => length,
            Err(error) if is_timeout(&error) => continue,
            Err(error) => return Err(error).context("receiving heartbeats"),
        };
        let mut tally = locked(tally)?;
        match heartbeat::sequence(&buffer[..length]) {
            Some(sequence) if highest.is_none_or(|highest| sequence > highest) => {
                tally.lost += highest.map_or(0, |highest| sequence - highest - 1);
                highest = Some(sequence);
                tally.answered(length);
            }
            // Twice, backwards or unreadable.
            _ => tally.wrong += 1,
        }
    }
    locked(tally)?.close_gap();
    Ok(())
}

fn own_number(datagram: &[u8]) -> Option<u64> {
    Some(u64::from_le_bytes(datagram.strip_prefix(&DATAGRAM_MAGIC)?.try_into().ok()?))
}

fn mapped(address: std::net::IpAddr) -> std::net::IpAddr {
    match address {
        std::net::IpAddr::V4(v4) => v4.to_ipv6_mapped().into(),
        v6 @ std::net::IpAddr::V6(_) => v6,
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted
    )
}

/// Bytes that never repeat between exchanges (xorshift64).
fn fill(bytes: &mut [u8], seed: &mut u64) {
    for chunk in bytes.chunks_mut(8) {
        *seed ^= *seed << 13;
        *seed ^= *seed >> 7;
        *seed ^= *seed << 17;
        chunk.copy_from_slice(&seed.to_le_bytes()[..chunk.len()]);
    }
}

fn locked(tally: &Mutex<Tally>) -> Result<std::sync::MutexGuard<'_, Tally>> {
    tally.lock().map_err(|_| anyhow::anyhow!("a thread of the client panicked"))
}
