//! Starting QEMU for a VM, watching it, and finding it again after a restart
//! of the agent.

use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::Duration;

use limosa_protocol::vm::{Cache, DiskKind, VmDefinition};
use limosa_qemu::launch::{
    self, BootSpec, CacheMode, DiskSpec, KernelSpec, LaunchSpec, NicSpec, UefiSpec,
};
use limosa_qemu::process::{self, InheritedFds, ProcessSpec};
use limosa_qemu::{power, qmp::Qmp, ram};

use super::{Inner, Qemu, Vm, cgroup, create, files};
use crate::failure::{Failure, OrFail, Result, chain};
use crate::net::{Net, learn, tap_name};
use crate::store::{RunRecord, Store, VmRecord};
use crate::{Folders, Host, HostQemu};
use limosa_faults::{self as faults, Edge, Kind};

/// Longest wait for a QEMU that was just started to answer.
const QEMU_START: Duration = Duration::from_secs(20);
/// Longest wait for a QEMU that runs already to answer a restarted agent.
const QEMU_ANSWER: Duration = Duration::from_secs(5);
/// Longest wait for a QEMU's end once it closed its socket.
const QEMU_EXIT: Duration = Duration::from_secs(10);

/// Starts QEMU for a VM, its vCPUs stopped.
///
/// - `incoming`: it waits for a migration.
pub async fn launch(host: &Host, definition: &VmDefinition, incoming: bool) -> Result<Qemu> {
    faults::reach(Kind::Host, "launch", Edge::Before).await;
    let launched = spawn(host, definition, incoming).await;
    faults::reach(Kind::Host, "launch", Edge::After).await;
    launched
}

async fn spawn(host: &Host, definition: &VmDefinition, incoming: bool) -> Result<Qemu> {
    let runtime = host.folders.runtime_of(&definition.name);
    make_runtime_folder(&host.qemu, &runtime)?;
    let mut inherited = InheritedFds::default();
    let ram_bytes = host.qemu.accelerator.ram_bytes(definition.memory_bytes());
    let memfd = ram::create(ram_bytes).or_fail("creating the memory of a guest")?;
    let ram_fd = inherited.add(memfd);
    let nics = plug_nics(&host.net, definition, &mut inherited).await?;
    let spec = LaunchSpec {
        name: definition.name.to_string(),
        uuid: definition.uuid.unwrap_or_default().to_string(),
        ram_bytes,
        ram_fd,
        vcpus: definition.vcpus,
        machine: definition.machine.clone(),
        cpu: definition.cpu.clone(),
        accelerator: host.qemu.accelerator,
        boot: boot_spec(&host.qemu, definition)?,
        disks: disk_specs(&host.qemu, definition)?,
        nics,
        runtime_dir: runtime.clone(),
        incoming,
    };
    let arguments = launch::command_line(&spec, &host.qemu.facts)
        .or_fail(&format!("VM {} cannot be started by this QEMU", definition.name))?;
    let configuration = files::place(&definition.places.configuration, "configuration")?;
    let group = cgroup::make(definition);
    let spawned = process::spawn(&ProcessSpec {
        binary: host.qemu.binary.clone(),
        args: arguments,
        user: host.qemu.user.clone(),
        cgroup: group.clone(),
        stderr_log: configuration.join("qemu.log"),
        inherited,
    })
    .await
    .or_fail(&format!("starting QEMU for VM {}", definition.name));
    let process = spawned.inspect_err(|_| cgroup::remove(group.as_deref()))?;
    let started = process.wait_ready(&runtime.join(launch::QMP_SOCKET), QEMU_START).await;
    let qmp = match started {
        Ok(qmp) => qmp,
        Err(error) => {
            process::kill(&process.id).await.ok();
            process::wait_exit(&process.id, QEMU_EXIT).await.ok();
            cgroup::remove(group.as_deref());
            return Err(Failure::internal(format!(
                "QEMU for VM {} did not start: {}",
                definition.name,
                chain(&error)
            )));
        }
    };
    Ok(Qemu { process: process.id, qmp, accelerator: host.qemu.accelerator, cgroup: group })
}

/// Ends a QEMU and waits until it is gone. Its guest's memory is lost.
pub async fn end(qemu: &Qemu) -> Result<()> {
    // Asked to quit it closes its images well; it is killed if it will not.
    let asked = tokio::time::timeout(Duration::from_secs(3), power::quit(&qemu.qmp)).await;
    let gone = asked.is_ok_and(|asked| asked.is_ok())
        && process::wait_exit(&qemu.process, QEMU_EXIT).await.is_ok();
    if !gone {
        process::kill(&qemu.process).await.or_fail("ending QEMU")?;
        process::wait_exit(&qemu.process, QEMU_EXIT).await.or_fail("ending QEMU")?;
    }
    cgroup::remove(qemu.cgroup.as_deref());
    Ok(())
}

fn make_runtime_folder(qemu: &HostQemu, runtime: &std::path::Path) -> Result<()> {
    let doing = format!("making {}", runtime.display());
    // Sockets of a QEMU that is gone would be in the way.
    if runtime.exists() {
        std::fs::remove_dir_all(runtime).or_fail(&doing)?;
    }
    std::fs::create_dir_all(runtime).or_fail(&doing)?;
    std::fs::set_permissions(runtime, std::fs::Permissions::from_mode(0o700)).or_fail(&doing)?;
    qemu.give_file(runtime).or_fail(&doing)
}

async fn plug_nics(
    net: &Net,
    definition: &VmDefinition,
    inherited: &mut InheritedFds,
) -> Result<Vec<NicSpec>> {
    let uuid = definition.uuid.unwrap_or_default();
    let mut specs = Vec::new();
    for (index, nic) in definition.nics.iter().enumerate() {
        let tap = net.make_tap(&tap_name(uuid, index), &nic.switch).await?;
        let mac = nic.mac.ok_or_else(|| Failure::internal("a NIC without a MAC address"))?;
        specs.push(NicSpec {
            id: format!("nic{index}"),
            mac: mac.to_string(),
            tap_fd: inherited.add(tap),
        });
    }
    Ok(specs)
}

fn boot_spec(qemu: &HostQemu, definition: &VmDefinition) -> Result<BootSpec> {
    let boot = &definition.boot;
    let uefi = match files::uefi_variables(definition)? {
        Some(variables) => {
            qemu.give_file(&variables).or_fail("giving UEFI's variables to QEMU")?;
            Some(UefiSpec { code: qemu.uefi_code.clone(), variables })
        }
        None => None,
    };
    let kernel = boot.kernel.as_ref().map(|kernel| KernelSpec {
        kernel: kernel.clone(),
        initrd: boot.initrd.clone(),
        append: boot.append.clone(),
    });
    Ok(BootSpec { uefi, kernel })
}

fn disk_specs(qemu: &HostQemu, definition: &VmDefinition) -> Result<Vec<DiskSpec>> {
    let spec = |disk: &limosa_protocol::vm::Disk| {
        let path = files::image(disk)?.to_owned();
        let is_disk = disk.kind == DiskKind::Disk;
        if is_disk {
            qemu.give_file(&path).or_fail(&format!(
                "VM {} cannot be started: its image {}",
                definition.name,
                path.display()
            ))?;
        }
        Ok(DiskSpec {
            id: disk.id.to_string(),
            path,
            format: create::format_of(disk.format),
            cache: match disk.cache {
                Cache::None => CacheMode::None,
                Cache::Writeback => CacheMode::Writeback,
                Cache::Writethrough => CacheMode::Writethrough,
                Cache::Directsync => CacheMode::Directsync,
            },
            discard: disk.discard,
            read_only: !is_disk,
        })
    };
    definition.disks.iter().map(spec).collect()
}

/// Starts a VM that is off.
pub async fn start(host: &Arc<Host>, vm: &Arc<Vm>) -> Result<()> {
    let mut inner = vm.lock_for_change().await?;
    if inner.qemu.is_some() {
        return Err(Failure::conflict(format!("VM {} is on already", vm.name)));
    }
    inner.expect_owned()?;
    inner.expect_cold_start()?;
    let qemu = launch(host, &inner.definition, false).await?;
    let started = async {
        record(&host.store, vm, &mut inner, &qemu)?;
        power::cont(&qemu.qmp).await.or_fail(&format!("starting VM {}", vm.name))
    };
    if let Err(failure) = started.await {
        end(&qemu).await?;
        forget(&host.store, vm, &mut inner)?;
        return Err(failure);
    }
    watch(host, vm, &mut inner, qemu).await;
    tracing::info!(vm = %vm.name, accelerator = %host.qemu.accelerator, "started");
    Ok(())
}

/// Writes down which QEMU is the VM's.
pub fn record(store: &Store, vm: &Vm, inner: &mut Inner, qemu: &Qemu) -> Result<()> {
    inner.record.run = Some(run_record(qemu));
    Ok(store.put::<VmRecord>(vm.name.as_str(), &inner.record)?)
}

/// What is written down of a QEMU.
pub fn run_record(qemu: &Qemu) -> RunRecord {
    RunRecord {
        process: qemu.process.clone(),
        accelerator: qemu.accelerator,
        cgroup: qemu.cgroup.clone(),
    }
}

/// Notes that the VM's QEMU is gone.
fn forget(store: &Store, vm: &Vm, inner: &mut Inner) -> Result<()> {
    inner.qemu = None;
    if inner.record.run.take().is_some() {
        store.put::<VmRecord>(vm.name.as_str(), &inner.record)?;
    }
    Ok(())
}

/// Makes a QEMU the VM's, and watches it and the addresses its guest uses.
pub async fn watch(host: &Arc<Host>, vm: &Arc<Vm>, inner: &mut Inner, qemu: Qemu) {
    inner.qemu = Some(qemu.clone());
    inner.fault = None;
    listen_for_addresses(&host.net, vm, &inner.definition).await;
    let (host, vm) = (Arc::clone(host), Arc::clone(vm));
    tokio::spawn(async move {
        qemu.qmp.wait_closed().await;
        let ended = process::wait_exit(&qemu.process, QEMU_EXIT).await;
        let mut inner = vm.lock().await;
        if ended.is_ok() {
            note_end(&host.store, &vm, &mut inner, &qemu);
        } else if inner.has(&qemu) {
            inner.fault = Some(format!(
                "QEMU (process {}) closed its socket and still runs: end it with \
                 `limosa vm stop --force {}`",
                qemu.process.pid, vm.name
            ));
        }
    });
}

/// Notes that a QEMU ended, if it is still the VM's.
pub(super) fn note_end(store: &Store, vm: &Vm, inner: &mut Inner, qemu: &Qemu) {
    if !inner.has(qemu) {
        return;
    }
    cgroup::remove(qemu.cgroup.as_deref());
    if let Err(failure) = forget(store, vm, inner) {
        tracing::error!(vm = %vm.name, %failure, "the VM's end was not recorded");
    }
    tracing::info!(vm = %vm.name, "QEMU ended");
    vm.qemu_ends.send_replace(Some(qemu.process.clone()));
}

async fn listen_for_addresses(net: &Net, vm: &Arc<Vm>, definition: &VmDefinition) {
    let uuid = definition.uuid.unwrap_or_default();
    for (index, nic) in definition.nics.iter().enumerate() {
        let name = tap_name(uuid, index);
        let (Ok(Some(link)), Some(mac)) = (net.index(&name).await, nic.mac) else {
            tracing::warn!(vm = %vm.name, tap = name, "the addresses of a NIC are not learnt");
            continue;
        };
        let addresses = vm.addresses.clone();
        tokio::spawn(async move {
            // Ends with the TAP, which goes with its QEMU.
            if let Err(error) = learn::listen(link, mac, addresses).await {
                tracing::debug!(tap = name, %error, "no longer learning addresses");
            }
        });
    }
}

/// Finds the QEMU of a VM again after a restart of the agent.
pub async fn reattach(host: &Arc<Host>, vm: &Arc<Vm>) {
    let mut inner = vm.lock().await;
    let Some(run) = inner.record.run.clone() else {
        end_unrecorded(&host.folders, &inner.definition).await;
        return;
    };
    if !process::is_alive(&run.process) {
        tracing::warn!(vm = %vm.name, "QEMU ended while the agent was away");
        cgroup::remove(run.cgroup.as_deref());
        if let Err(failure) = forget(&host.store, vm, &mut inner) {
            tracing::error!(vm = %vm.name, %failure, "the VM's end was not recorded");
        }
        return;
    }
    match reconnect(&host.folders, &inner.definition, &run).await {
        Ok(qemu) => {
            tracing::info!(vm = %vm.name, pid = qemu.process.pid, "found again");
            watch(host, vm, &mut inner, qemu).await;
        }
        Err(failure) => {
            tracing::error!(vm = %vm.name, %failure, "QEMU runs and does not answer");
            inner.fault = Some(failure.to_string());
        }
    }
}

/// Connects to a recorded QEMU that is alive.
pub async fn reconnect(
    folders: &Folders,
    definition: &VmDefinition,
    run: &RunRecord,
) -> Result<Qemu> {
    let socket = folders.runtime_of(&definition.name).join(launch::QMP_SOCKET);
    let qmp = process::connect(&run.process, &socket, QEMU_ANSWER).await.or_fail(&format!(
        "the QEMU of VM {} (process {}) does not answer at {}",
        definition.name,
        run.process.pid,
        socket.display()
    ))?;
    Ok(Qemu {
        process: run.process.clone(),
        qmp,
        accelerator: run.accelerator,
        cgroup: run.cgroup.clone(),
    })
}

/// Ends every QEMU that was started for a VM but not recorded: the agent died in
/// between, and its guest never ran.
pub async fn end_unrecorded(folders: &Folders, definition: &VmDefinition) {
    let name = &definition.name;
    // One that has not got as far as its socket is found by its cgroup.
    if let Some(group) = cgroup::of(definition) {
        for process in process::in_cgroup(&group) {
            tracing::warn!(vm = %name, pid = process.pid, "ending a QEMU that was not recorded");
            if let Err(error) = process::kill(&process).await {
                tracing::error!(vm = %name, error = chain(&error), "it does not end");
            }
        }
        cgroup::remove(Some(&group));
    }
    let socket = folders.runtime_of(name).join(launch::QMP_SOCKET);
    let Ok(qmp) = Qmp::connect(&socket, QEMU_ANSWER).await else { return };
    tracing::warn!(vm = %name, "ending a QEMU that was started and not recorded");
    if let Err(error) = power::quit(&qmp).await {
        tracing::error!(vm = %name, error = chain(&error), "it does not end");
    }
}

/// Index of the link on which a switch of this host can be spoken on.
pub async fn switch_link(net: &Net, switch: &limosa_protocol::id::SwitchName) -> Option<u32> {
    net.index(&Net::bridge_name(switch)).await.ok().flatten()
}
