//! What the outside talks to.
//!
//! | port | protocol | what |
//! |-----:|----------|------|
//! | 7000 | TCP | echo |
//! | 7001 | UDP | echo |
//! | 7002 | TCP | HTTP: `GET /` the report; `GET /check` after all memory and all disks were compared; `GET /free` frees the memory of [`crate::freed`] |
//! | 7003 of the client | UDP | heartbeats, one each 5 ms: `LMHB`, a u64 LE that counts, a u64 LE of this boot |

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use crate::freed::Filled;
use crate::report::Report;
use crate::settings::Settings;

const ECHO_TCP_PORT: u16 = 7000;
const ECHO_UDP_PORT: u16 = 7001;
const STATUS_PORT: u16 = 7002;
const HEARTBEAT_PORT: u16 = 7003;
/// Time between two heartbeats.
const HEARTBEAT_EVERY: Duration = Duration::from_millis(5);
/// Longest wait for a question, and for a check of everything.
const QUESTION_TIMEOUT: Duration = Duration::from_secs(2);
const CHECK_TIMEOUT: Duration = Duration::from_secs(60);

/// Starts a thread for each.
pub(crate) fn start(settings: &Settings, report: &Arc<Report>, filled: Filled) -> io::Result<()> {
    let echo = TcpListener::bind((Ipv6Addr::UNSPECIFIED, ECHO_TCP_PORT))?;
    crate::spawn("echo-tcp", move || accept(&echo, "echo", |stream| drop(echo_tcp(stream))))?;
    let datagrams = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, ECHO_UDP_PORT))?;
    crate::spawn("echo-udp", move || echo_udp(&datagrams))?;
    let questions = TcpListener::bind((Ipv6Addr::UNSPECIFIED, STATUS_PORT))?;
    let (shared, filled) = (Arc::clone(report), Arc::new(filled));
    crate::spawn("status", move || {
        accept(&questions, "answer", move |stream| drop(answer(stream, &shared, &filled)));
    })?;
    let client = match settings.client {
        IpAddr::V4(v4) => SocketAddr::new(v4.to_ipv6_mapped().into(), HEARTBEAT_PORT),
        v6 @ IpAddr::V6(_) => SocketAddr::new(v6, HEARTBEAT_PORT),
    };
    let heart = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0))?;
    let report = Arc::clone(report);
    crate::spawn("heartbeat", move || beat(&heart, client, &report)).map(drop)
}

fn accept(listener: &TcpListener, name: &str, work: impl Fn(TcpStream) + Clone + Send + 'static) {
    for stream in listener.incoming().flatten() {
        let work = work.clone();
        // Without a thread for it the connection is closed: the client sees that.
        let _ = crate::spawn(name, move || work(stream));
    }
}

fn echo_tcp(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = [0; 4096];
    loop {
        let length = stream.read(&mut buffer)?;
        if length == 0 {
            return Ok(());
        }
        stream.write_all(&buffer[..length])?;
    }
}

fn echo_udp(socket: &UdpSocket) {
    let mut buffer = [0; 2048];
    loop {
        if let Ok((length, from)) = socket.recv_from(&mut buffer) {
            // As lost as any datagram.
            let _ = socket.send_to(&buffer[..length], from);
        }
    }
}

fn answer(mut stream: TcpStream, report: &Report, filled: &Filled) -> io::Result<()> {
    stream.set_read_timeout(Some(QUESTION_TIMEOUT))?;
    let mut question = [0; 512];
    let length = stream.read(&mut question)?;
    if question[..length].starts_with(b"GET /free ") {
        filled.free();
    }
    if question[..length].starts_with(b"GET /check ") {
        let wanted = report.sweeps.ask();
        let until = std::time::Instant::now() + CHECK_TIMEOUT;
        while report.sweeps.done() < wanted {
            if std::time::Instant::now() > until {
                report.fault("memory and disks could not be compared in time");
                break;
            }
            std::thread::sleep(HEARTBEAT_EVERY);
        }
    }
    let body = report.json();
    let head = "HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n";
    stream.write_all(format!("{head}{body}\n").as_bytes())
}

fn beat(socket: &UdpSocket, client: SocketAddr, report: &Report) {
    let boot = crate::mix::fresh_seed();
    for sequence in 0_u64.. {
        let mut datagram = b"LMHB".to_vec();
        datagram.extend(sequence.to_le_bytes());
        datagram.extend(boot.to_le_bytes());
        // No route, no neighbour: the outside counts what is missing.
        let _ = socket.send_to(&datagram, client);
        std::thread::sleep(HEARTBEAT_EVERY);
        if report.is_stopping() {
            return;
        }
    }
}
