//! `limosa migration …`, and following a move.

use std::time::Duration;

use anyhow::{Result, bail};
use limosa_protocol::id::MigrationId;
use limosa_protocol::migration::Migration as View;
use serde_json::json;

use super::Session;
use crate::args::Migration;
use crate::events::Events;
use crate::exit::Exit;
use crate::progress::Progress;
use crate::{show, summary};

/// How often a migration is asked for whose events broke off.
const ASK_EVERY: Duration = Duration::from_millis(500);

pub(super) async fn run(session: &Session, command: Migration) -> Result<Exit> {
    match command {
        Migration::List => list(session).await,
        Migration::Show { id } => {
            let view = find(session, &id).await?;
            if session.json {
                show::json(&view)?;
            } else {
                show::line(&summary::text(&view))?;
            }
            Ok(Exit::Done)
        }
        Migration::Watch { id } => {
            let id = find(session, &id).await?.id;
            watch(session, id, false).await
        }
        Migration::Cancel { id } => {
            let id = find(session, &id).await?.id;
            let view: View =
                session.client.post(&format!("/v1/migrations/{id}/cancel"), &json!(null)).await?;
            if session.json {
                show::json(&view)?;
            } else {
                show::note(&format!("{} stays on {}", view.vm, view.source));
            }
            Ok(Exit::Done)
        }
    }
}

async fn list(session: &Session) -> Result<Exit> {
    let views: Vec<View> = session.client.get("/v1/migrations").await?;
    if session.json {
        show::json(&views)?;
        return Ok(Exit::Done);
    }
    let rows: Vec<Vec<String>> = views
        .iter()
        .map(|view| {
            let outcome = view.outcome.map_or(view.phase.as_str(), |outcome| outcome.as_str());
            let downtime = view.summary.as_ref().and_then(|summary| summary.downtime.as_ref());
            vec![
                view.id.to_string(),
                view.vm.to_string(),
                view.source.to_string(),
                view.destination.to_string(),
                outcome.to_owned(),
                view.summary.as_ref().map_or(String::new(), |all| show::millis(all.total_ms)),
                downtime.map_or(String::new(), |parts| format!("{:.0} ms", parts.total_ms)),
            ]
        })
        .collect();
    show::table(&["ID", "VM", "FROM", "TO", "STATUS", "TIME", "DOWNTIME"], &rows)?;
    Ok(Exit::Done)
}

/// A migration by its id, the beginning of it, or its VM.
async fn find(session: &Session, word: &str) -> Result<View> {
    let views: Vec<View> = session.client.get("/v1/migrations").await?;
    if let Some(view) = views.iter().rev().find(|view| view.vm.as_str() == word) {
        return Ok(view.clone());
    }
    let mut found: Vec<View> =
        views.into_iter().filter(|view| view.id.to_string().starts_with(word)).collect();
    match found.len() {
        0 => bail!("no migration {word}: `limosa migration list` shows those there are"),
        1 => Ok(found.remove(0)),
        count => bail!("{count} migrations begin with {word}: write more of the id"),
    }
}

/// Follows a migration to its end.
///
/// - `own`: it was begun by this command, so Ctrl-C cancels it.
pub(super) async fn watch(session: &Session, id: MigrationId, own: bool) -> Result<Exit> {
    let mut progress = Progress::new(session.json);
    let mut cancelled = false;
    let view = {
        let follow = follow(session, id, &mut progress);
        tokio::pin!(follow);
        loop {
            tokio::select! {
                view = &mut follow => break view?,
                _ = tokio::signal::ctrl_c() => {
                    if !own || cancelled {
                        show::note(&format!("\nit goes on; `limosa migration watch {id}`"));
                        return Ok(Exit::Failed);
                    }
                    cancelled = true;
                    show::note("\ncancelling; Ctrl-C again leaves it to go on");
                    let path = format!("/v1/migrations/{id}/cancel");
                    let asked: Result<View> = session.client.post(&path, &json!(null)).await;
                    if let Err(error) = asked {
                        show::note(&format!("{error:#}"));
                    }
                }
            }
        }
    };
    progress.end();
    if session.json {
        show::json(&view)?;
    } else {
        show::line(&summary::text(&view))?;
    }
    Ok(view.outcome.map_or(Exit::Failed, Exit::from))
}

async fn follow(session: &Session, id: MigrationId, progress: &mut Progress) -> Result<View> {
    let mut told = false;
    loop {
        match session.client.stream(&format!("/v1/migrations/{id}/events")).await {
            Ok(body) => {
                let mut events = Events::new(body);
                while let Ok(Some(view)) = events.next().await {
                    progress.show(&view);
                    if view.outcome.is_some() {
                        return Ok(view);
                    }
                }
            }
            Err(error) if error.is::<crate::client::Refused>() => return Err(error),
            Err(error) => {
                if !told {
                    told = true;
                    progress.say(&format!("{error:#}; asking on"));
                }
            }
        }
        tokio::time::sleep(ASK_EVERY).await;
    }
}
