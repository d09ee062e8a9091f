//! `limosa host …`

use std::time::SystemTime;

use anyhow::Result;
use limosa_protocol::api::{Host as View, Invitation, PairRequest, PairedHost};

use super::session::Session;
use crate::args::Host;
use crate::exit::Exit;
use crate::prompt::ask;
use crate::show;

pub(super) async fn run(session: &Session, command: Host) -> Result<Exit> {
    let client = &session.client;
    match command {
        Host::Show => {
            let host: View = client.get("/v1/host").await?;
            session.result(&host, about)
        }
        Host::List => {
            let hosts: Vec<PairedHost> = client.get("/v1/hosts").await?;
            session.result(&hosts, |hosts| {
                let rows: Vec<_> = hosts.iter().map(row).collect();
                show::table(
                    &["NAME", "ADDRESS", "FINGERPRINT"],
                    &rows,
                    "paired with no host yet: run `limosa host invite` on the other one",
                )
            })
        }
        Host::Invite => {
            let invitation: Invitation = client.order("/v1/hosts/invite").await?;
            session.result(&invitation, |invitation| {
                show::line(&invitation.code)?;
                show::note(&format!(
                    "Valid once{}. On the other host, run\n  limosa host pair \
                     ADDRESS-OF-THIS-HOST",
                    validity(invitation)
                ));
                Ok(())
            })
        }
        Host::Pair { address, code } => {
            let code = match code {
                Some(code) => code,
                None => {
                    let question = format!("Code that `limosa host invite` prints on {address}:");
                    ask(&question, "--code")?
                }
            };
            let request = PairRequest { address, code };
            let host: PairedHost = client.post("/v1/hosts/pair", &request).await?;
            session.result(&host, |host| {
                show::note(&format!(
                    "paired with {}; its fingerprint is {}",
                    host.name, host.fingerprint
                ));
                Ok(())
            })
        }
        Host::Unpair { host } => {
            client.delete(&format!("/v1/hosts/{host}")).await?;
            session.done(&format!(
                "{host} is no longer trusted; unpair this host there too, to end both sides"
            ))
        }
    }
}

/// For how long a code lives, when the clocks let us tell.
fn validity(invitation: &Invitation) -> String {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    match invitation.expires_unix_s.saturating_sub(now.as_secs()) {
        0 => String::new(),
        left => format!(", for {}", show::seconds(left)),
    }
}

fn row(host: &PairedHost) -> Vec<String> {
    vec![host.name.to_string(), host.address.clone(), host.fingerprint.clone()]
}

fn about(host: &View) -> Result<()> {
    let switches: Vec<_> = host.switches.iter().map(ToString::to_string).collect();
    let (oldest, newest) = host.peer_versions;
    for (what, value) in [
        ("name", host.name.to_string()),
        ("version", format!("{} (speaks peer versions {oldest} to {newest})", host.version)),
        ("fingerprint", host.fingerprint.clone()),
        ("qemu", format!("{} ({})", host.qemu.version, host.qemu.binary.display())),
        ("accelerator", format!("{}: {}", host.qemu.accelerator, host.qemu.accelerator_reason)),
        (
            "memory",
            format!(
                "{} of {} free",
                show::bytes(host.memory_free_bytes),
                show::bytes(host.memory_bytes)
            ),
        ),
        ("switches", if switches.is_empty() { "none".to_owned() } else { switches.join(" ") }),
    ] {
        show::line(&format!("{what:<12} {value}"))?;
    }
    Ok(())
}
