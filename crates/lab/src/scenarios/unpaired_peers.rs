//! Scenarios of those who are not paired.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Result, ensure};
use limosa_protocol::api::{Invitation, PORT};
use serde_json::{Value, json};

use super::Scenario;
use crate::harness::host::Storage;
use crate::harness::lab::{Lab, Topology};
use crate::harness::net;
use crate::harness::steps::{self, Wanted};
use crate::harness::tiny;

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "stranger-gets-nothing",
        proves: "whoever has no certificate of a paired host gets no byte of an answer",
        topology: Topology::default,
        run: stranger,
    },
    Scenario {
        name: "pairing-needs-the-code",
        proves: "a wrong or used code pairs nobody, and a third host learns nothing from it",
        topology: || Topology {
            hosts: vec![("a", Storage::Folder), ("b", Storage::Folder), ("c", Storage::Folder)],
            ..Topology::default()
        },
        run: pairing,
    },
    Scenario {
        name: "paired-host-with-another-certificate",
        proves: "a paired host that comes with another certificate gets nothing, and is given nothing",
        topology: Topology::default,
        run: another_certificate,
    },
];

fn another_certificate(lab: &mut Lab) -> Result<()> {
    steps::agents_ready(lab)?;
    let wanted = Wanted { disks: vec![("qcow2", 16)], ..tiny::working()? };
    for host in ["a", "b"] {
        steps::create(lab.host(host), &Wanted { name: format!("of-{host}"), ..wanted.clone() })?;
    }
    lab.host_mut("b").stop_agent()?;
    lab.host("b").run(&["rm", "-r", "/var/lib/limosa/identity"])?;
    let config = steps::agent_config(lab.host("b"), None, "");
    lab.host_mut("b").start_agent(&config, &[])?;
    for (from, to) in [("a", "b"), ("b", "a")] {
        let path = format!("/v1/vms/of-{from}/move");
        let answer = lab.host(from).api("POST", &path, Some(&json!({"to": to})))?;
        ensure!(answer.status >= 400, "{from} moved a VM to {to}: {answer:?}");
        let seen = steps::look(lab.host(to), &format!("of-{from}"))?;
        ensure!(seen.is_none(), "{to} took a VM of {from}");
        ensure!(steps::look(lab.host(from), &format!("of-{from}"))?.is_some(), "it is gone");
    }
    Ok(())
}

fn stranger(lab: &mut Lab) -> Result<()> {
    steps::agents_ready(lab)?;
    let address = SocketAddr::new(net::host_v4(1, 0)?.into(), PORT);
    for said in
        [&b"GET /v1/vms HTTP/1.1\r\nHost: b\r\n\r\n"[..], &[0; 4096], b"\x16\x03\x01\xff\xff"]
    {
        let said = said.to_vec();
        let got = lab.host("a").namespace().enter(move || {
            let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(2))?;
            stream.set_read_timeout(Some(Duration::from_secs(3)))?;
            stream.write_all(&said)?;
            let mut got = Vec::new();
            // A reset or a timeout are as good an answer as a close.
            let _ = stream.take(65_536).read_to_end(&mut got);
            Ok(crate::harness::exec::lossy(&got))
        })?;
        ensure!(!got.contains("HTTP/1.1 200"), "a stranger was served: {got}");
        ensure!(
            !got.contains("fingerprint") && !got.contains("memory"),
            "a stranger learnt: {got}"
        );
    }
    in_tls(lab)?;
    // And after all that, those who may still can.
    lab.host("b").api::<Value>("GET", "/v1/host", None)?.read::<Value>().map(drop)
}

/// What strangers say once they have a TLS connection, and in which language.
const SAID: [(&str, &str); 3] = [
    ("http/1.1", r"GET /v1/host HTTP/1.1\r\nHost: b\r\n\r\n"),
    (
        "http/1.1",
        r"GET /peer/v1/offers/01890000-0000-7000-8000-000000000000 HTTP/1.1\r\nHost: b\r\n\r\n",
    ),
    ("limosa-channel/1", r"\000\002{}"),
];

/// The same in TLS: without a certificate, with one that nobody knows, and in an
/// old version of it; a paired host is answered by the same means.
fn in_tls(lab: &Lab) -> Result<()> {
    let host = lab.host("a");
    host.run(&[
        "sh",
        "-c",
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes \
                            -keyout /tmp/k -out /tmp/c -subj /CN=a 2>&1",
    ])?;
    let ours =
        "-cert /var/lib/limosa/identity/identity.crt -key /var/lib/limosa/identity/identity.key";
    let address = net::host_v4(1, 0)?;
    let heard = |(alpn, text): (&str, &str), how: &str| {
        host.run(&[
            "sh",
            "-c",
            &format!(
                "(printf '{text}'; sleep 1) | timeout 5 openssl s_client -quiet -connect \
             {address}:{PORT} -alpn {alpn} {how} 2>/dev/null; :"
            ),
        ])
    };
    let answer = heard(SAID[0], &format!("-tls1_3 {ours}"))?;
    ensure!(answer.starts_with("HTTP/1.1 "), "a paired host gets no answer: {answer:?}");
    for said in SAID {
        for how in ["-tls1_3", "-tls1_3 -cert /tmp/c -key /tmp/k", &format!("-tls1_2 {ours}")] {
            let got = heard(said, how)?;
            ensure!(got.is_empty(), "{how} {}: a stranger got {got:?}", said.0);
        }
    }
    host.run(&["rm", "/tmp/c", "/tmp/k"]).map(drop)
}

/// A code that is another one.
fn wrong(code: &str) -> String {
    let turn = |digit: char| if digit == '0' { '1' } else { '0' };
    code.chars().map(|c| if c.is_ascii_digit() { turn(c) } else { c }).collect()
}

fn pairing(lab: &mut Lab) -> Result<()> {
    for name in ["a", "b", "c"] {
        let config = steps::agent_config(lab.host(name), None, "");
        lab.host_mut(name).start_agent(&config, &[])?;
    }
    let (a, b, c) = (lab.host("a"), lab.host("b"), lab.host("c"));
    let address = net::host_v4(1, 0)?.to_string();
    let pair = |code: &str| json!({"address": address, "code": code});
    let refused = c.api("POST", "/v1/hosts/pair", Some(&pair("000000")))?;
    ensure!(refused.status >= 400, "c paired without an invitation: {refused:?}");
    let invitation: Invitation = b.api::<Value>("POST", "/v1/hosts/invite", None)?.read()?;
    let refused = c.api("POST", "/v1/hosts/pair", Some(&pair(&wrong(&invitation.code))))?;
    ensure!(refused.status >= 400, "c paired with a wrong code: {refused:?}");
    a.api("POST", "/v1/hosts/pair", Some(&pair(&invitation.code)))?.read::<Value>()?;
    let refused = c.api("POST", "/v1/hosts/pair", Some(&pair(&invitation.code)))?;
    ensure!(refused.status >= 400, "c paired with a used code: {refused:?}");
    let another: Invitation = b.api::<Value>("POST", "/v1/hosts/invite", None)?.read()?;
    for _ in 0..3 {
        let refused = c.api("POST", "/v1/hosts/pair", Some(&pair(&wrong(&another.code))))?;
        ensure!(refused.status >= 400, "c paired with a wrong code: {refused:?}");
    }
    let refused = c.api("POST", "/v1/hosts/pair", Some(&pair(&another.code)))?;
    ensure!(refused.status >= 400, "c paired after three wrong codes: {refused:?}");
    for (host, others) in [(a, 1), (b, 1), (c, 0)] {
        let known: Vec<Value> = host.api::<Value>("GET", "/v1/hosts", None)?.read()?;
        ensure!(known.len() == others, "{} knows {} hosts", host.name(), known.len());
    }
    let moved = c.api("POST", "/v1/vms/web1/move", Some(&json!({"to": "b"})))?;
    ensure!(moved.status >= 400, "c moves what it does not have to whom it does not know");
    Ok(())
}
