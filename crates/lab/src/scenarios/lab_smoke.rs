//! Scenarios about the lab itself: they run without the product, with a guest
//! that is only a few threads in a host's namespace.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::Scenario;
use crate::harness::capture::Capture;
use crate::harness::client::{self, Client, Talk};
use crate::harness::heartbeat;
use crate::harness::host::Storage;
use crate::harness::lab::{Lab, Topology};
use crate::harness::namespace::Namespace;
use crate::harness::net::{self, CLIENT_V4, Cut, PREFIX_V4_BITS, PREFIX_V6_BITS};

/// The threads' hardware address.
const MAC: [u8; 6] = [0x52, 0x54, 0x00, 0x1a, 0xb0, 0x01];
/// Pause between two of its heartbeats.
const BEAT: Duration = Duration::from_millis(2);

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "lab-links",
        proves: "links join the hosts, can be slowed, cut in two ways and repaired",
        topology: || Topology { links_mbit: vec![Some(1000), Some(100)], ..Topology::default() },
        run: links,
    },
    Scenario {
        name: "lab-hosts",
        proves: "hosts have names, folders and file systems of their own",
        topology: || Topology {
            hosts: vec![("a", Storage::Folder), ("b", Storage::Limited { mib: 64 })],
            ..Topology::default()
        },
        run: hosts,
    },
    Scenario {
        name: "lab-outside-view",
        proves: "client and capture see answers, heartbeats, losses and silence as they are",
        topology: Topology::default,
        run: outside_view,
    },
];

fn links(lab: &mut Lab) -> Result<()> {
    for link in 0..2 {
        join(lab, link)?;
        for how in [Cut::Cable, Cut::Silent] {
            lab.net().cut(link, "b", how)?;
            ensure!(join(lab, link).is_err(), "link {link} works although it is cut: {how:?}");
            join(lab, 1 - link).context("cutting one link broke the other")?;
            lab.net().restore(link, "b")?;
            join(lab, link).with_context(|| format!("mending link {link} after {how:?}"))?;
        }
    }
    let classes = |lab: &Lab| lab.host("a").namespace().tc(&["class", "show", "dev", "mig1"]);
    ensure!(classes(lab)?.contains("rate 100Mbit"), "the speed was not set");
    lab.net().set_speed(1, Some(20))?;
    ensure!(classes(lab)?.contains("rate 20Mbit"), "the speed did not change");
    lab.net().set_speed(1, None)?;
    ensure!(classes(lab)?.is_empty(), "the limit is still there");
    let (received, sent) = lab.net().link_bytes(0, "a")?;
    ensure!(received > 0 && sent > 0, "no bytes were counted");
    Ok(())
}

/// Opens a TCP connection from host a to host b over a link.
fn join(lab: &Lab, link: usize) -> Result<()> {
    let address = SocketAddr::new(net::host_v4(1, link)?.into(), 7999);
    let listener = lab.host("b").namespace().enter(move || Ok(TcpListener::bind(address)?))?;
    lab.host("a").namespace().enter(move || {
        TcpStream::connect_timeout(&address, Duration::from_millis(1500)).map(drop)?;
        drop(listener);
        Ok(())
    })
}

fn hosts(lab: &mut Lab) -> Result<()> {
    for (mine, other) in [("a", "b"), ("b", "a")] {
        let host = lab.host(mine);
        ensure!(host.run(&["hostname"])?.trim() == mine, "wrong host name");
        for place in ["/var/lib/limosa", "/run/limosa", "/etc/limosa"] {
            host.run(&["touch", &format!("{place}/of-{mine}")])?;
            let other = format!("{place}/of-{other}");
            ensure!(host.run(&["test", "-e", &other]).is_err(), "{other} is seen by {mine}");
        }
        // O_DIRECT must work where disks will lie.
        let write = "dd if=/dev/zero of=/var/lib/limosa/direct bs=4096 count=4 oflag=direct";
        host.run(&["sh", "-c", write])?;
        host.assert_clean()?;
        host.run(&["mkdir", "-p", "/var/lib/limosa/vms/x"])?;
        ensure!(!host.leftovers()?.is_empty(), "a leftover was not seen");
    }
    let fill = "dd if=/dev/zero of=/var/lib/limosa/fill bs=1M count=100 2>&1 || :";
    let said = lab.host("b").run(&["sh", "-c", fill])?;
    ensure!(said.contains("No space left"), "the small file system did not become full: {said}");
    Ok(())
}

fn outside_view(lab: &mut Lab) -> Result<()> {
    let next = Arc::new(AtomicU64::new(0));
    let capture = Capture::start(lab.net(), MAC)?;
    let client = Client::start(lab.client(), Talk::with(net::guest_v4(0)))?;
    let first = FakeGuest::start(lab.host("a").namespace(), &next)?;
    client.wait_until_answered(Duration::from_secs(20))?;
    let client_v6 =
        Client::start(lab.client(), Talk { sessions: 1, ..Talk::with(net::guest_v6(0)) });
    ensure!(client_v6.and_then(Client::stop).is_err(), "two clients share the heartbeats");
    let told = client::status::wait(lab.client(), net::guest_v6(0), Duration::from_secs(10))?;
    ensure!(told["errors"] == 0, "the status over IPv6 says {told}");
    std::thread::sleep(Duration::from_millis(200));
    first.stop()?;
    // Three heartbeats get lost on the way between the hosts.
    next.fetch_add(3, Ordering::Relaxed);
    std::thread::sleep(Duration::from_millis(150));
    let second = FakeGuest::start(lab.host("b").namespace(), &next)?;
    std::thread::sleep(Duration::from_millis(300));
    second.stop()?;
    let noticed = client.stop()?;
    let trace = capture.stop()?;
    ensure!(trace.lost_heartbeats().len() == 3, "lost: {:?}", trace.lost_heartbeats());
    ensure!(noticed.heartbeats.lost == 3, "the client counts other losses: {noticed:?}");
    ensure!(!trace.two_copies(), "two copies were seen where none were");
    let blackout = trace.blackout("a", "b").context("no blackout seen")?;
    // It is at least the pause: not an assertion of speed but of measurement.
    ensure!(blackout.ms() >= 150.0, "the blackout is too short: {} ms", blackout.ms());
    let longest = trace.longest_silence().context("no silence seen")?;
    ensure!(longest.ms() >= blackout.ms(), "the longest silence is shorter than the blackout");
    ensure!(noticed.resets() > 0, "the broken sessions were not noticed");
    ensure!(noticed.assert_undisturbed().is_err(), "a disturbance was not noticed");
    ensure!(noticed.tcp.iter().all(|tally| tally.wrong == 0), "echoes were wrong");
    Ok(())
}

/// Threads that behave like the guest's program.
struct FakeGuest {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Result<()>>>,
    namespace: Namespace,
}

impl FakeGuest {
    fn start(namespace: &Namespace, next: &Arc<AtomicU64>) -> Result<Self> {
        let mac = MAC.map(|byte| format!("{byte:02x}")).join(":");
        namespace.ip(&["link", "set", "lan0", "address", &mac])?;
        let v4 = format!("{}/{PREFIX_V4_BITS}", net::guest_v4(0));
        let v6 = format!("{}/{PREFIX_V6_BITS}", net::guest_v6(0));
        namespace.ip(&["addr", "add", &v4, "dev", "lan0"])?;
        namespace.ip(&["addr", "add", &v6, "dev", "lan0"])?;
        let mut guest =
            Self { stop: Arc::default(), threads: Vec::new(), namespace: namespace.clone() };
        let counter = Arc::clone(next);
        guest.add(move |stop| beat(stop, &counter))?;
        guest.add(echo_udp)?;
        guest.add(|stop| serve(stop, client::TCP_ECHO_PORT, echo_tcp))?;
        guest.add(|stop| {
            serve(stop, client::STATUS_PORT, |mut stream| {
                // Unread bytes would turn the close into a reset.
                let _ = stream.read(&mut [0; 512])?;
                stream.write_all(b"HTTP/1.0 200 OK\r\n\r\n{\"errors\": 0}\n")?;
                stream.shutdown(std::net::Shutdown::Both)
            })
        })?;
        Ok(guest)
    }

    fn add(&mut self, work: impl FnOnce(&AtomicBool) -> Result<()> + Send + 'static) -> Result<()> {
        let stop = Arc::clone(&self.stop);
        self.threads.push(self.namespace.thread("lab-fake-guest", move || work(&stop))?);
        Ok(())
    }

    fn stop(mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread.join().map_err(|_| anyhow::anyhow!("the fake guest panicked"))??;
        }
        self.namespace.ip(&["addr", "flush", "dev", "lan0"])?;
        // The host itself goes on to send now and then; no longer as the guest.
        self.namespace.ip(&["link", "set", "lan0", "address", "52:54:00:1a:b0:ff"])?;
        Ok(())
    }
}

fn beat(stop: &AtomicBool, next: &AtomicU64) -> Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    let client: IpAddr = CLIENT_V4.into();
    while !stop.load(Ordering::Relaxed) {
        let sequence = next.fetch_add(1, Ordering::Relaxed);
        let payload = [&heartbeat::MAGIC[..], &sequence.to_le_bytes()].concat();
        socket.send_to(&payload, (client, heartbeat::PORT))?;
        std::thread::sleep(BEAT);
    }
    Ok(())
}

fn echo_udp(stop: &AtomicBool) -> Result<()> {
    let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, client::UDP_ECHO_PORT))?;
    socket.set_read_timeout(Some(Duration::from_millis(20)))?;
    let mut buffer = [0; 512];
    while !stop.load(Ordering::Relaxed) {
        if let Ok((length, from)) = socket.recv_from(&mut buffer) {
            // The client may be gone.
            let _ = socket.send_to(&buffer[..length], from);
        }
    }
    Ok(())
}

fn serve(
    stop: &AtomicBool,
    port: u16,
    answer: impl Fn(TcpStream) -> std::io::Result<()> + Clone + Send + 'static,
) -> Result<()> {
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))?;
    listener.set_nonblocking(true)?;
    let mut open = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let Ok((stream, _)) = listener.accept() else {
            std::thread::sleep(Duration::from_millis(5));
            continue;
        };
        stream.set_nonblocking(false)?;
        open.push(stream.try_clone()?);
        let answer = answer.clone();
        std::thread::spawn(move || answer(stream));
    }
    for stream in open {
        let _ = stream.shutdown(std::net::Shutdown::Both);
    }
    Ok(())
}

fn echo_tcp(mut stream: TcpStream) -> std::io::Result<()> {
    let mut buffer = [0; 4096];
    loop {
        let length = stream.read(&mut buffer)?;
        if length == 0 {
            return Ok(());
        }
        stream.write_all(&buffer[..length])?;
    }
}
