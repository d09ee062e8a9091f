//! Which moves begin, and when: at once, or as room comes.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use limosa_host::failure::Result;
use limosa_host::vm::Vm;
use limosa_protocol::id::MigrationId;
use limosa_protocol::migration::{Migration, MoveRequest, Note, ProblemCode, QueueReason, Role};
use uuid::Uuid;

use crate::job::Job;
use crate::migrations::Migrations;
use crate::queue::Entry;
use crate::{preflight, source};

/// How often waiting moves are tried. A destination does not report that it has room.
const TRY_EVERY: Duration = Duration::from_secs(2);

/// What became of an attempt to start a waiting move.
enum Attempt {
    Left,
    Waits(Note),
}

/// Moves a VM: begins at once if both hosts have room and nothing waits before it.
pub async fn request_move(
    migrations: &Arc<Migrations>,
    vm: &Arc<Vm>,
    request: MoveRequest,
) -> Result<Migration> {
    let queue = &migrations.queue;
    queue.expect_free(&vm.name)?;
    let preflight = preflight::preflight(migrations, vm, &request).await?;
    preflight.expect_possible(vm, &request)?;
    let id = MigrationId(Uuid::now_v7());
    let to = request.to.clone();
    let job = Job::new(
        id,
        vm.name.clone(),
        Role::Source,
        migrations.context.host.name.clone(),
        to.clone(),
    );
    let job = Arc::new(job);
    let why = preflight.notes.into_iter().next().or_else(|| queue.behind(&to));
    let slot = if why.is_none() { migrations.reserve() } else { None };
    match slot {
        Some(slot) => source::begin(migrations, vm, request, &job, slot).await,
        None => {
            let why = why.unwrap_or_else(|| migrations.source_full());
            queue.push(&migrations.context.host.store, &job, request, why)
        }
    }
}

/// Starts waiting moves as room comes, for as long as the agent runs.
pub async fn run(migrations: Arc<Migrations>) {
    let queue = &migrations.queue;
    loop {
        if queue.waiting().is_empty() {
            queue.changed().await;
        } else {
            tokio::time::timeout(TRY_EVERY, queue.changed()).await.ok();
        }
        if let Err(failure) = try_all(&migrations).await {
            tracing::error!(%failure, "the queue of moves is not worked on");
        }
    }
}

/// Tries each waiting move once, oldest first.
async fn try_all(migrations: &Arc<Migrations>) -> Result<()> {
    let queue = &migrations.queue;
    let mut held_up = BTreeSet::new();
    for entry in queue.waiting() {
        if migrations.is_full() {
            return Ok(());
        }
        if held_up.contains(&entry.request.to) {
            continue;
        }
        let id = entry.job.id();
        match try_one(migrations, &entry).await {
            Ok(Attempt::Left) => {}
            Ok(Attempt::Waits(why)) => {
                queue.keep_waiting(&migrations.context.host.store, id, why)?;
                held_up.insert(entry.request.to);
            }
            Err(failure) => queue.end(&migrations.context.host.store, id, failure.to_string())?,
        }
    }
    Ok(())
}

/// Starts a waiting move if it can; an error ends it.
async fn try_one(migrations: &Arc<Migrations>, entry: &Entry) -> Result<Attempt> {
    let (queue, id) = (&migrations.queue, entry.job.id());
    let vm = migrations.context.host.vm(&entry.job.view().vm)?;
    let preflight = preflight::preflight(migrations, &vm, &entry.request).await?;
    if let Some(problem) = preflight.only_problem(ProblemCode::Unreachable) {
        // After a restart of both hosts one is up before the other.
        let message = problem.message.clone();
        return Ok(Attempt::Waits(Note { code: QueueReason::DestinationUnreachable, message }));
    }
    preflight.expect_possible(&vm, &entry.request)?;
    if let Some(why) = preflight.notes.into_iter().next() {
        return Ok(Attempt::Waits(why));
    }
    let Some(slot) = migrations.reserve() else {
        return Ok(Attempt::Waits(migrations.source_full()));
    };
    if queue.start(id) {
        source::begin(migrations, &vm, entry.request.clone(), &entry.job, slot).await?;
        queue.forget(&migrations.context.host.store, id)?;
    }
    Ok(Attempt::Left)
}
