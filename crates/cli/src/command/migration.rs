//! `limosa migration …`, and following a move to its end.

use anyhow::{Result, bail};
use limosa_protocol::id::MigrationId;
use limosa_protocol::migration::{Migration as View, Outcome};
use tokio::signal::unix::{SignalKind, signal};

use super::session::Session;
use crate::args::Migration;
use crate::client::Client;
use crate::events::{Follower, News};
use crate::exit::Exit;
use crate::progress::Progress;
use crate::{show, summary};

pub(super) async fn run(session: &Session, command: Migration) -> Result<Exit> {
    match command {
        Migration::List => list(session).await,
        Migration::Show(one) => {
            let view = find(session, &one.id_or_vm).await?;
            session.result(&view, |view| show::line(&summary::text(view)))
        }
        Migration::Watch(one) => {
            let id = find(session, &one.id_or_vm).await?.id;
            watch(session, id, CtrlC::Leaves).await
        }
        Migration::Cancel(one) => {
            let view = find(session, &one.id_or_vm).await?;
            let view = cancel(&session.client, view.id).await?;
            session.result(&view, |view| {
                show::note(&match view.outcome {
                    Some(Outcome::Stayed) => {
                        format!("cancelled: {} stays at {}", view.vm, view.source)
                    }
                    Some(outcome) => format!("it has ended already: {}", outcome.as_str()),
                    None => format!(
                        "cancelling: {} stays at {}; `limosa migration watch {}` tells when it is \
                         done",
                        view.vm, view.source, view.id
                    ),
                });
                Ok(())
            })
        }
    }
}

async fn cancel(client: &Client, id: MigrationId) -> Result<View> {
    client.order(&format!("/v1/migrations/{id}/cancel")).await
}

async fn list(session: &Session) -> Result<Exit> {
    let views: Vec<View> = session.client.get("/v1/migrations").await?;
    session.result(&views, |views| {
        let rows: Vec<_> = views.iter().map(row).collect();
        show::table(
            &["ID", "VM", "FROM", "TO", "STATUS", "TIME", "DOWNTIME"],
            &rows,
            "no migration yet: `limosa vm move --help` tells how to begin one",
        )
    })
}

fn row(view: &View) -> Vec<String> {
    let summary = view.summary.as_ref();
    let downtime = summary.and_then(|summary| summary.downtime.as_ref());
    let dash = || "-".to_owned();
    vec![
        view.id.to_string(),
        view.vm.to_string(),
        view.source.to_string(),
        view.destination.to_string(),
        view.status().to_owned(),
        summary.map_or_else(dash, |summary| show::millis(summary.total_ms)),
        downtime.map_or_else(dash, |downtime| format!("{:.0} ms", downtime.total_ms)),
    ]
}

/// A migration by its id, the beginning of it, or its VM.
async fn find(session: &Session, id_or_vm: &str) -> Result<View> {
    if let Ok(id) = id_or_vm.parse::<MigrationId>() {
        return session.client.get(&format!("/v1/migrations/{id}")).await;
    }
    let views: Vec<View> = session.client.get("/v1/migrations").await?;
    let of_vm = views.iter().filter(|view| view.vm.as_str() == id_or_vm);
    if let Some(view) = of_vm.max_by_key(|view| (view.started_unix_ms, view.id)) {
        return Ok(view.clone());
    }
    let beginning = id_or_vm.to_ascii_lowercase();
    let begins = |view: &&View| !id_or_vm.is_empty() && view.id.to_string().starts_with(&beginning);
    let found: Vec<&View> = views.iter().filter(begins).collect();
    match found.as_slice() {
        [] => bail!("no migration {id_or_vm:?}: `limosa migration list` shows those there are"),
        [view] => Ok((*view).clone()),
        several => {
            bail!("{} migrations begin with {id_or_vm}: write more of the id", several.len())
        }
    }
}

/// What Ctrl-C does to a migration that is watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CtrlC {
    /// The first one cancels it, the second one leaves it to go on
    Cancels,
    /// It only ends the watching
    Leaves,
}

/// Leaves a migration that goes on. Its result is where it stands; people have
/// seen that, and are told how to look again.
fn left(
    session: &Session,
    progress: Progress,
    view: Option<&View>,
    next_step: &str,
) -> Result<Exit> {
    progress.end(false);
    if session.json {
        show::json(&view)?;
    } else {
        show::note(next_step);
    }
    Ok(Exit::Left)
}

/// Follows a migration to its end and shows its summary.
pub(super) async fn watch(session: &Session, id: MigrationId, mut ctrl_c: CtrlC) -> Result<Exit> {
    let mut interrupts = signal(SignalKind::interrupt())?;
    let mut follower = Follower::new(session.client.clone(), id);
    let mut progress = Progress::new(session.json);
    let mut cancelling = None;
    let mut in_trouble = false;
    let mut last = None;
    let view = loop {
        tokio::select! {
            news = follower.next() => match news? {
                News::View(view) => {
                    in_trouble = false;
                    progress.show(&view);
                    if view.outcome.is_some() {
                        break view;
                    }
                    last = Some(view);
                }
                News::Trouble(error) if !in_trouble => {
                    in_trouble = true;
                    progress.say(&format!("{error:#}\nThe migration may go on; asking again."));
                }
                News::Trouble(_) => {}
            },
            _ = interrupts.recv() => match ctrl_c {
                CtrlC::Leaves => {
                    let next_step = format!("\nIt goes on: `limosa migration watch {id}` looks again.");
                    return left(session, progress, last.as_deref(), &next_step);
                }
                CtrlC::Cancels => {
                    ctrl_c = CtrlC::Leaves;
                    progress.say("\nCancelling; Ctrl-C again leaves the move to go on by itself.");
                    let client = session.client.clone();
                    // Beside the rest, so that the second Ctrl-C is not kept waiting.
                    cancelling = Some(tokio::spawn(async move { cancel(&client, id).await }));
                }
            },
            asked = async { cancelling.as_mut().expect("checked by the branch").await },
                if cancelling.is_some() =>
            {
                cancelling = None;
                if let Err(error) = asked? {
                    progress.say(&format!("It cannot be cancelled: {error:#}"));
                }
            }
        }
    };
    progress.end(true);
    session.result(&view, |view| show::line(&summary::text(view)))?;
    Ok(view.outcome.map_or(Exit::Failed, Exit::from))
}
