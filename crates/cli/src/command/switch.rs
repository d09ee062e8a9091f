//! `limosa switch …`

use anyhow::Result;
use limosa_protocol::api::Switch as View;

use super::session::Session;
use crate::args::Switch;
use crate::exit::Exit;
use crate::show;

pub(super) async fn run(session: &Session, command: Switch) -> Result<Exit> {
    let client = &session.client;
    match command {
        Switch::List => {
            let switches: Vec<View> = client.get("/v1/switches").await?;
            session.result(&switches, |switches| {
                let rows: Vec<_> = switches.iter().map(row).collect();
                show::table(
                    &["NAME", "BRIDGE", "UPLINK"],
                    &rows,
                    "no virtual switch yet: `limosa switch create NAME` makes one",
                )
            })
        }
        Switch::Create { switch, uplink } => {
            let wish = View { name: switch, uplink, bridge: None };
            let made: View = client.post("/v1/switches", &wish).await?;
            session.result(&made, |made| {
                let bridge = made.bridge.as_deref().unwrap_or("made later");
                show::note(&format!("switch {} is made; its bridge is {bridge}", made.name));
                Ok(())
            })
        }
        Switch::Delete { switch } => {
            client.delete(&format!("/v1/switches/{switch}")).await?;
            session.done(&format!("switch {switch} is removed"))
        }
    }
}

fn row(switch: &View) -> Vec<String> {
    let or_dash = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".to_owned());
    vec![switch.name.to_string(), or_dash(&switch.bridge), or_dash(&switch.uplink)]
}
