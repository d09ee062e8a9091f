//! `limosa vm …`

use std::path::Path;

use anyhow::{Context, Result};
use limosa_protocol::api::{
    BODY_BYTES_MAX, Comparison, Power, RecoverRequest, Recovery, StopRequest, Vm as View,
};
use limosa_protocol::id::VmName;
use limosa_protocol::migration::{self, Migration, MoveRequest, Role};
use limosa_protocol::vm::{Accelerator, VmDefinition};

use super::migration::{CtrlC, watch};
use super::session::Session;
use crate::args::{MoveOptions, OneVm, Stop, Verify, Vm};
use crate::client::ANSWER_SECONDS_MAX;
use crate::exit::{Exit, problem_text};
use crate::prompt::ask;
use crate::{console, known, show};

pub(super) async fn run(session: &Session, command: Vm) -> Result<Exit> {
    let client = &session.client;
    match command {
        Vm::Create { file } => create(session, &file).await,
        Vm::List => list(session).await,
        Vm::Show(OneVm { vm }) => {
            let view: View = client.get(&path(&vm, "")).await?;
            session.result(&view, about)
        }
        Vm::Start(OneVm { vm }) => order(session, &vm, "start").await,
        Vm::Pause(OneVm { vm }) => order(session, &vm, "pause").await,
        Vm::Resume(OneVm { vm }) => order(session, &vm, "resume").await,
        Vm::Stop(options) => stop(session, &options).await,
        Vm::Delete { vm, yes } => delete(session, &vm.vm, yes).await,
        Vm::Console(OneVm { vm }) => {
            let stream = client.upgrade(&path(&vm, "/console")).await?;
            console::run(vm.as_str(), stream).await?;
            Ok(Exit::Done)
        }
        Vm::Recover { vm, force_owner, confirm } => {
            recover(session, &vm.vm, force_owner, confirm).await
        }
        Vm::Compare(options) => compare(session, &options).await,
        Vm::Move { options, detach } => move_vm(session, &options, detach).await,
    }
}

fn path(vm: &VmName, what: &str) -> String {
    format!("/v1/vms/{vm}{what}")
}

async fn create(session: &Session, file: &Path) -> Result<Exit> {
    let shown =
        if file.as_os_str() == "-" { "standard input".into() } else { file.display().to_string() };
    let bytes_max = u64::try_from(BODY_BYTES_MAX).unwrap_or(u64::MAX);
    let text = known::read_limited(file, bytes_max).with_context(|| format!("reading {shown}"))?;
    let definition: VmDefinition =
        toml::from_str(&text).with_context(|| format!("{shown} does not define a VM"))?;
    definition.check().with_context(|| format!("{shown} does not define a VM"))?;
    let view: View = session.client.post("/v1/vms", &definition).await?;
    told(session, &view)
}

async fn order(session: &Session, vm: &VmName, what: &str) -> Result<Exit> {
    let view: View = session.client.order(&path(vm, &format!("/{what}"))).await?;
    told(session, &view)
}

async fn stop(session: &Session, options: &Stop) -> Result<Exit> {
    let vm = &options.vm.vm;
    let request = StopRequest { force: options.force, timeout_seconds: options.timeout };
    if !options.force && !session.json {
        let limit = show::seconds(options.timeout.into());
        show::note(&format!("asking the guest of {vm} to power off; waiting for at most {limit}"));
    }
    // The answer comes when the VM is off or the guest's time is over.
    let seconds_max = ANSWER_SECONDS_MAX.saturating_add(options.timeout.into());
    let view = session.client.post_within(&path(vm, "/stop"), &request, seconds_max).await?;
    told(session, &view)
}

fn told(session: &Session, view: &View) -> Result<Exit> {
    session.result(view, |view| {
        show::note(&format!("{} is {}", view.definition.name, power(view.power)));
        Ok(())
    })
}

async fn list(session: &Session) -> Result<Exit> {
    let views: Vec<View> = session.client.get("/v1/vms").await?;
    session.result(&views, |views| {
        let rows: Vec<_> = views.iter().map(row).collect();
        show::table(
            &["NAME", "POWER", "MEMORY", "VCPUS", "DISKS", "ADDRESSES"],
            &rows,
            "no VM yet: `limosa vm create FILE` makes one",
        )
    })
}

fn row(view: &View) -> Vec<String> {
    let definition = &view.definition;
    let addresses: Vec<_> = view.addresses.iter().map(ToString::to_string).collect();
    vec![
        definition.name.to_string(),
        power(view.power).to_owned(),
        show::bytes(definition.memory_bytes()),
        definition.vcpus.to_string(),
        definition.disks.len().to_string(),
        if addresses.is_empty() { "-".to_owned() } else { addresses.join(" ") },
    ]
}

/// The definition in TOML; what is no part of it stands in comments before.
fn about(view: &View) -> Result<()> {
    let mut lines = vec![format!("power: {}, epoch {}", power(view.power), view.epoch)];
    if let Some(pid) = view.pid {
        let accelerator = view.accelerator.map_or("an unknown accelerator", Accelerator::as_str);
        lines.push(format!("QEMU: process {pid}, with {accelerator}"));
    }
    if !view.addresses.is_empty() {
        let addresses: Vec<_> = view.addresses.iter().map(ToString::to_string).collect();
        lines.push(format!("addresses: {}", addresses.join(" ")));
    }
    if let Some(migration) = &view.migration {
        lines.push(format!("migration: see `limosa migration watch {migration}`"));
    }
    if let Some(doubt) = &view.doubt {
        lines.push(format!("in doubt: {doubt}"));
    }
    if let Some(owner) = &view.given_up_to {
        lines.push(format!("given up: an operator gave the VM to {owner}"));
    }
    if let Some(fault) = &view.fault {
        // Of several lines each must be a comment.
        lines.extend(format!("fault: {fault}").lines().map(str::to_owned));
    }
    for line in lines {
        show::line(&format!("# {line}"))?;
    }
    show::line(toml::to_string_pretty(&view.definition)?.trim_end())
}

async fn delete(session: &Session, vm: &VmName, yes: bool) -> Result<Exit> {
    if !yes {
        let question =
            format!("Delete VM {vm} with the disks in its own folder, for good? Type its name:");
        if ask(&question, "--yes")? != vm.as_str() {
            show::note("nothing was deleted");
            return Ok(Exit::Failed);
        }
    }
    session.client.delete(&path(vm, "")).await?;
    session.done(&format!("{vm} is deleted"))
}

async fn recover(
    session: &Session,
    vm: &VmName,
    force_owner: bool,
    confirm: Option<VmName>,
) -> Result<Exit> {
    let path = path(vm, "/recover");
    let known: Recovery = session.client.get(&path).await?;
    if !force_owner {
        return session.result(&known, about_recovery);
    }
    // Also who confirms in advance is told what is known, and what is risked; as
    // JSON that is the result.
    if !session.json {
        about_recovery(&known)?;
    }
    let confirm = match confirm {
        Some(name) => name,
        None => {
            let question = format!("Give VM {vm} to this host? Type its name:");
            let typed = ask(&question, "--confirm NAME")?;
            if typed != vm.as_str() {
                show::note("nothing was forced");
                return Ok(Exit::Failed);
            }
            vm.clone()
        }
    };
    let forced: Recovery = session.client.post(&path, &RecoverRequest { confirm }).await?;
    session.result(&forced, |forced| {
        show::note(&format!("{vm} is this host's now ({})", forced.state));
        Ok(())
    })
}

fn about_recovery(known: &Recovery) -> Result<()> {
    let role = match known.role {
        Role::Source => "source",
        Role::Destination => "destination",
    };
    show::line(&format!("VM {}, migration {}", known.vm, known.migration))?;
    show::line(&format!("  here ({role}): {}; the guest {}", known.state, known.guest))?;
    let answers = if known.peer.answers { "answers" } else { "does not answer" };
    show::line(&format!("  {} {answers}: {}", known.peer_name, known.peer.says))?;
    if let Some(doubt) = &known.doubt {
        show::line(&format!("  in doubt: {doubt}"))?;
    }
    if known.may_force {
        show::line(&format!("  risk of --force-owner: {}", known.risk))?;
    } else {
        show::line("  nothing is left for an operator to decide here")?;
    }
    Ok(())
}

fn request(options: &MoveOptions) -> Result<MoveRequest> {
    let request = MoveRequest {
        to: options.to.clone(),
        storage_path: options.storage_path.clone(),
        disks: options.disks.iter().cloned().collect(),
        switches: options.switches.iter().cloned().collect(),
        downtime_limit_ms: options.downtime_limit_ms,
        verify: match options.verify {
            Verify::Running => migration::Verify::Running,
            Verify::Full => migration::Verify::Full,
        },
        retain_source_disks: options.retain_source_disks,
    };
    // Of two places for one thing none is right by itself.
    anyhow::ensure!(request.disks.len() == options.disks.len(), "--disk names a disk twice");
    anyhow::ensure!(
        request.switches.len() == options.switches.len(),
        "--switch names a switch of the source twice"
    );
    Ok(request)
}

async fn compare(session: &Session, options: &MoveOptions) -> Result<Exit> {
    let vm = &options.vm.vm;
    let found: Comparison = session.client.post(&path(vm, "/compare"), &request(options)?).await?;
    session.result(&found, |found| {
        let (vm, to) = (&found.vm, &found.to);
        found
            .notes
            .iter()
            .try_for_each(|note| show::line(&format!("the move would wait: {}", note.message)))?;
        if found.problems.is_empty() {
            return show::line(&format!("nothing stands against moving {vm} to {to}"));
        }
        show::line(&format!("{vm} cannot move to {to}:"))?;
        found.problems.iter().try_for_each(|problem| show::line(&problem_text(problem)))
    })?;
    Ok(if found.problems.is_empty() { Exit::Done } else { Exit::Failed })
}

async fn move_vm(session: &Session, options: &MoveOptions, detach: bool) -> Result<Exit> {
    let vm = &options.vm.vm;
    let begun: Migration = session.client.post(&path(vm, "/move"), &request(options)?).await?;
    if !detach {
        return watch(session, begun.id, CtrlC::Cancels).await;
    }
    session.result(&begun, |begun| {
        show::line(&begun.id.to_string())?;
        show::note(&format!("it goes on by itself; see `limosa migration watch {}`", begun.vm));
        Ok(())
    })
}

fn power(power: Power) -> &'static str {
    match power {
        Power::Off => "off",
        Power::Running => "running",
        Power::Paused => "paused",
        Power::MovingOut => "moving out",
        Power::MovingIn => "moving in",
        Power::InDoubt => "in doubt",
        Power::GivenUp => "given up",
        Power::Fault => "faulty",
    }
}
