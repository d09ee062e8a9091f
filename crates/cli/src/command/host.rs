//! `limosa host …`, `switch …` and `operator …`

use anyhow::{Context, Result};
use limosa_protocol::api::{
    Host as View, Invitation, Operator as OperatorView, OperatorRequest, PairRequest, PairedHost,
    Switch as SwitchView,
};
use serde_json::json;

use super::{Session, ask};
use crate::args::{Host, Operator, Switch};
use crate::client;
use crate::exit::Exit;
use crate::show;

pub(super) async fn run(session: &Session, command: Host) -> Result<Exit> {
    let client = &session.client;
    match command {
        Host::Show => {
            let host: View = client.get("/v1/host").await?;
            if session.json {
                show::json(&host)?;
            } else {
                about(&host)?;
            }
        }
        Host::List => {
            let hosts: Vec<PairedHost> = client.get("/v1/hosts").await?;
            if session.json {
                show::json(&hosts)?;
            } else {
                let rows: Vec<_> = hosts
                    .into_iter()
                    .map(|host| vec![host.name.to_string(), host.address, host.fingerprint])
                    .collect();
                show::table(&["NAME", "ADDRESS", "FINGERPRINT"], &rows)?;
            }
        }
        Host::Invite => {
            let invitation: Invitation = client.post("/v1/hosts/invite", &json!(null)).await?;
            if session.json {
                show::json(&invitation)?;
            } else {
                show::line(&invitation.code)?;
                show::note(
                    "Type this code at the other host, within ten minutes:\n  \
                     limosa host pair ADDRESS-OF-THIS-HOST",
                );
            }
        }
        Host::Pair { address, code } => {
            let code = match code {
                Some(code) => code,
                None => ask(&format!("Code that `limosa host invite` shows at {address}:"))?,
            };
            let request = PairRequest { address, code };
            let host: PairedHost = client.post("/v1/hosts/pair", &request).await?;
            if session.json {
                show::json(&host)?;
            } else {
                show::note(&format!("paired with {} ({})", host.name, host.fingerprint));
            }
        }
        Host::Unpair { host } => {
            client.delete(&format!("/v1/hosts/{host}")).await?;
            done(session, &format!("{host} is trusted no more"))?;
        }
    }
    Ok(Exit::Done)
}

fn about(host: &View) -> Result<()> {
    let switches: Vec<_> = host.switches.iter().map(ToString::to_string).collect();
    for (what, value) in [
        ("name", host.name.to_string()),
        ("version", host.version.clone()),
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
        ("switches", switches.join(" ")),
    ] {
        show::line(&format!("{what:<12}{value}"))?;
    }
    Ok(())
}

fn done(session: &Session, text: &str) -> Result<()> {
    if session.json {
        show::json(&json!(null))
    } else {
        show::note(text);
        Ok(())
    }
}

pub(super) async fn switch(session: &Session, command: Switch) -> Result<Exit> {
    let client = &session.client;
    match command {
        Switch::List => {
            let switches: Vec<SwitchView> = client.get("/v1/switches").await?;
            if session.json {
                show::json(&switches)?;
            } else {
                let rows: Vec<_> = switches
                    .into_iter()
                    .map(|switch| {
                        vec![
                            switch.name.to_string(),
                            switch.bridge.unwrap_or_default(),
                            switch.uplink.unwrap_or_default(),
                        ]
                    })
                    .collect();
                show::table(&["NAME", "BRIDGE", "UPLINK"], &rows)?;
            }
        }
        Switch::Create { switch, uplink } => {
            let wish = SwitchView { name: switch, uplink, bridge: None };
            let made: SwitchView = client.post("/v1/switches", &wish).await?;
            if session.json {
                show::json(&made)?;
            } else {
                let bridge = made.bridge.unwrap_or_default();
                show::note(&format!("{} is the bridge {bridge}", made.name));
            }
        }
        Switch::Delete { switch } => {
            client.delete(&format!("/v1/switches/{switch}")).await?;
            done(session, &format!("{switch} is removed"))?;
        }
    }
    Ok(Exit::Done)
}

pub(super) async fn operator(
    session: &impl Fn() -> Result<Session>,
    command: Operator,
) -> Result<Exit> {
    match command {
        Operator::List => {
            let session = session()?;
            let operators: Vec<OperatorView> = session.client.get("/v1/operators").await?;
            if session.json {
                show::json(&operators)?;
            } else {
                let rows: Vec<_> = operators
                    .into_iter()
                    .map(|operator| vec![operator.name.to_string(), operator.fingerprint])
                    .collect();
                show::table(&["NAME", "FINGERPRINT"], &rows)?;
            }
        }
        Operator::Add { name, certificate } => {
            let session = session()?;
            let certificate_pem = std::fs::read_to_string(&certificate)
                .with_context(|| format!("reading {}", certificate.display()))?;
            let request = OperatorRequest { name, certificate_pem };
            let added: OperatorView = session.client.post("/v1/operators", &request).await?;
            if session.json {
                show::json(&added)?;
            } else {
                show::note(&format!(
                    "{} ({}) may command this host",
                    added.name, added.fingerprint
                ));
            }
        }
        Operator::Remove { name } => {
            let session = session()?;
            session.client.delete(&format!("/v1/operators/{name}")).await?;
            done(&session, &format!("{name} is let in no more"))?;
        }
        Operator::Identity => {
            let identity = client::identity()?;
            let file = client::identity_folder()?.join(limosa_auth::identity::CERTIFICATE_FILE);
            let session = session()?;
            if session.json {
                show::json(&json!({
                    "certificate": file,
                    "fingerprint": identity.fingerprint().to_string(),
                }))?;
            } else {
                show::line(&file.display().to_string())?;
                show::note(&format!("fingerprint {}", identity.fingerprint()));
            }
        }
    }
    Ok(Exit::Done)
}
