//! limosad, the Limosa host agent: it runs this host's VMs and moves them.
//!
//! ```text
//! listen ─► api ─► vm, migration ─► limosa-qemu (QMP), limosa-plane (bytes)
//!                      └─► store (what must not be forgotten)
//! ```
//!
//! **Invariants.** QEMU outlives the agent: ending, crashing or upgrading it
//! never stops a VM. Async code waits, threads of the plane move bytes; neither
//! does the other's work.

mod agent;
mod api;
mod args;
mod caller;
mod config;
mod documents;
mod listen;
mod operators;
mod pairing;

use std::sync::Arc;

use anyhow::Context;
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

use crate::agent::Agent;
use crate::args::Arguments;
use crate::config::Config;

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    if let Some(document) = arguments.document {
        return documents::make(document);
    }
    if arguments.openapi {
        use std::io::Write;
        let text = api::document().to_pretty_json()?;
        writeln!(std::io::stdout(), "{text}")?;
        return Ok(());
    }
    let filter = EnvFilter::try_from_env("LIMOSA_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    if arguments.log_json {
        log.json().init();
    } else {
        log.with_target(false).init();
    }
    install_fault_points();
    let config = Config::read(arguments.config.as_deref())?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("limosad")
        .build()
        .context("cannot start the runtime")?;
    runtime.block_on(run(config))
}

/// Makes QEMU's commands fault points, too, in a build for tests that runs under one.
fn install_fault_points() {
    #[cfg(feature = "faults")]
    if limosa_faults::install() {
        use limosa_faults::{Edge, Kind};
        use limosa_qemu::watch::{Moment, watch_commands};
        watch_commands(|command, moment| {
            let edge = match moment {
                Moment::Before => Edge::Before,
                Moment::After => Edge::After,
            };
            Box::pin(async move { limosa_faults::reach(Kind::Qmp, &command, edge).await })
        });
    }
}

async fn run(config: Config) -> anyhow::Result<()> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let agent = Agent::open(config).await?;
    agent.host.restore_switches().await?;
    limosa_host::vm::restore::restore(&agent.host).await?;
    let restored = limosa_migration::restore(&agent.migrations).await?;
    let router = api::router(Arc::clone(&agent));
    let mut servers = tokio::task::JoinSet::new();
    for listener in agent.config.listeners().await? {
        servers.spawn(listen::remote(Arc::clone(&agent), listener, router.clone()));
    }
    // The peer may be asked, and ask back, while this settles.
    limosa_migration::settle(restored);
    tokio::spawn(limosa_migration::run_queue(Arc::clone(&agent.migrations)));
    servers.spawn(listen::local(Arc::clone(&agent), router));
    tracing::info!(
        host = %agent.host.name,
        qemu = %agent.host.qemu.facts.version,
        accelerator = %agent.host.qemu.accelerator,
        reason = agent.host.qemu.accelerator_reason,
        fingerprint = %agent.identity.fingerprint(),
        "limosad is up"
    );
    tokio::select! {
        ended = servers.join_next() => match ended {
            Some(result) => result?.context("a listener ended"),
            None => Ok(()),
        },
        _ = interrupt.recv() => Ok(()),
        _ = terminate.recv() => Ok(()),
    }
}
