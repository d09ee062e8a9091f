//! `limosa operator …`

use anyhow::{Context, Result};
use limosa_protocol::api::{BODY_BYTES_MAX, Operator as View, OperatorRequest};
use serde_json::json;

use super::session::Session;
use crate::args::Operator;
use crate::exit::Exit;
use crate::{known, show};

pub(super) async fn run(session: &Session, command: Operator) -> Result<Exit> {
    let client = &session.client;
    match command {
        Operator::List => {
            let operators: Vec<View> = client.get("/v1/operators").await?;
            session.result(&operators, |operators| {
                let row = |view: &View| vec![view.name.to_string(), view.fingerprint.clone()];
                let rows: Vec<_> = operators.iter().map(row).collect();
                show::table(
                    &["NAME", "FINGERPRINT"],
                    &rows,
                    "no operator is let in from afar: see `limosa operator add --help`",
                )
            })
        }
        Operator::Add { name, certificate } => {
            let bytes_max = u64::try_from(BODY_BYTES_MAX).unwrap_or(u64::MAX);
            let certificate_pem = known::read_limited(&certificate, bytes_max)
                .with_context(|| format!("reading {}", certificate.display()))?;
            // A key handed over by mistake would be known to others for good.
            anyhow::ensure!(
                !certificate_pem.contains("PRIVATE KEY"),
                "{} holds a private key: give the certificate, whose path `limosa operator identity` \
                 prints; nothing was sent",
                certificate.display()
            );
            let request = OperatorRequest { name, certificate_pem };
            let added: View = client.post("/v1/operators", &request).await?;
            session.result(&added, |added| {
                show::note(&format!(
                    "{} may command this host; fingerprint {}",
                    added.name, added.fingerprint
                ));
                Ok(())
            })
        }
        Operator::Remove { name } => {
            client.delete(&format!("/v1/operators/{name}")).await?;
            session.done(&format!("{name} may no longer command this host"))
        }
        Operator::Identity => {
            let identity = known::identity()?;
            let certificate = known::certificate_file()?;
            let fingerprint = identity.fingerprint().to_string();
            let value = json!({ "certificate": certificate, "fingerprint": fingerprint });
            session.result(&value, |_| {
                show::line(&certificate.display().to_string())?;
                show::note(&format!(
                    "fingerprint {fingerprint}\nTo be let in, copy this file to a host and run \
                     there\n  limosa operator add NAME --certificate FILE"
                ));
                Ok(())
            })
        }
    }
}
