//! A lab host: namespaces held by one long-lived process, private folders, and
//! an agent that believes it is alone on a machine.
//!
//! ```text
//! holder (sleep)   network + mount + UTS + control group namespaces
//!   /var/lib/limosa ◄── WORK/HOST/lib   (or a small ext4 of its own)
//!   /run/limosa     ◄── WORK/HOST/run
//!   /etc/limosa     ◄── WORK/HOST/etc
//!   WORK/HOST/log       logs of the agent, also after its end
//! ```
//!
//! **Invariant.** The product is touched only through its programs.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal};
use serde::de::DeserializeOwned;

use crate::harness::namespace::Namespace;
use crate::harness::record::{self, Record};
use crate::harness::{api, exec, paths};

/// Longest time for one `limosa` command, in seconds; a move may take long.
pub(crate) const LIMOSA_TIMEOUT_S: u32 = 600;
/// Longest time for an agent to answer after its start, in milliseconds.
const AGENT_START_TIMEOUT_MS: u64 = 20_000;
/// Longest time for an agent to end by itself, in milliseconds.
const AGENT_STOP_TIMEOUT_MS: u64 = 20_000;
/// Longest time for a host's file system to be gone after its power, in milliseconds.
const UNMOUNT_TIMEOUT_MS: u64 = 10_000;
/// Image of a file system of a host's own, in the host's folder.
const IMAGE: &str = "lib.ext4";
/// Where the agent's socket appears in a host.
const AGENT_SOCKET: &str = "limosad.sock";

/// What a host's `/var/lib/limosa` lies on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Storage {
    /// A folder on the machine's disk
    Folder,
    /// A file system of its own that can become full
    Limited {
        /// Its size in MiB
        mib: u32,
    },
}

/// What `stat` calls a block, in bytes.
const STAT_BLOCK_BYTES: u64 = 512;

/// A host that is up.
#[derive(Debug)]
pub(crate) struct Host {
    name: String,
    namespace: Namespace,
    dir: PathBuf,
    cgroup: Option<PathBuf>,
    storage: Storage,
    holder: Pid,
    agent: Option<Child>,
}

impl Host {
    /// Makes the host's folders and starts its holder.
    pub(crate) fn create(record: &Record, index: usize, storage: Storage) -> Result<Self> {
        let (name, namespace) = &record.net.hosts[index];
        let dir = record.work.join(name);
        for part in ["lib", "run", "etc", "log", "fault"] {
            std::fs::create_dir_all(dir.join(part))?;
        }
        // The mount points must exist; they are never removed, as removing one
        // would unmount it in every other lab.
        for place in ["/var/lib/limosa", "/run/limosa", "/etc/limosa"] {
            std::fs::create_dir_all(place).with_context(|| format!("making {place}"))?;
        }
        if let Storage::Limited { mib } = storage {
            let image = dir.join(IMAGE);
            File::create(&image)?.set_len(u64::from(mib) << 20)?;
            exec::run("mkfs.ext4", &["-q", "-F", "-m", "0", &image.to_string_lossy()])?;
        }
        let cgroup = record.cgroups.first().map(|parent| parent.join(name));
        if let Some(cgroup) = &cgroup {
            std::fs::create_dir_all(cgroup)
                .with_context(|| format!("making {}", cgroup.display()))?;
        }
        let holder = start_holder(namespace, &dir, name, cgroup.as_deref(), storage)
            .with_context(|| format!("starting host {name}"))?;
        std::fs::write(dir.join("holder"), holder.as_raw_nonzero().to_string())?;
        let (name, namespace) = (name.clone(), namespace.clone());
        Ok(Self { name, namespace, dir, cgroup, storage, holder, agent: None })
    }

    /// Ends all that runs here, at once; nobody here says a last word if the host's
    /// links are cut before.
    pub(crate) fn power_off(&mut self) -> Result<()> {
        self.namespace.empty()?;
        // It is dead already: this reaps it.
        self.kill_agent()
    }

    /// Comes up anew in the host's new network, without its agent. As after a boot,
    /// `/run/limosa` is empty, and no control group is left. The disk has what was
    /// written: the machine's own kernel goes on, so that what was not synced is
    /// there as well.
    pub(crate) fn boot(&mut self) -> Result<()> {
        for entry in std::fs::read_dir(self.run_dir())?.flatten() {
            let path = entry.path();
            if entry.file_type()?.is_dir() {
                std::fs::remove_dir_all(path)?;
            } else {
                std::fs::remove_file(path)?;
            }
        }
        if let Some(cgroup) = &self.cgroup {
            record::remove_cgroup(cgroup);
            std::fs::create_dir_all(cgroup)?;
        }
        self.wait_until_unmounted()?;
        let (cgroup, storage) = (self.cgroup.as_deref(), self.storage);
        self.holder = start_holder(&self.namespace, &self.dir, &self.name, cgroup, storage)
            .with_context(|| format!("booting host {}", self.name))?;
        std::fs::write(self.dir.join("holder"), self.holder.as_raw_nonzero().to_string())?;
        Ok(())
    }

    /// The file system of a host that is off goes a moment after its last process;
    /// mounted twice, it would be damaged.
    fn wait_until_unmounted(&self) -> Result<()> {
        let Storage::Limited { .. } = self.storage else { return Ok(()) };
        let image = self.dir.join(IMAGE).to_string_lossy().into_owned();
        let deadline = Instant::now() + Duration::from_millis(UNMOUNT_TIMEOUT_MS);
        while !exec::run("losetup", &["-j", &image])?.trim().is_empty() {
            ensure!(Instant::now() < deadline, "{image} is still mounted");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// A host of a lab that another process has built.
    pub(crate) fn attach(record: &Record, index: usize) -> Result<Self> {
        let (name, namespace) = &record.net.hosts[index];
        let dir = record.work.join(name);
        let written = std::fs::read_to_string(dir.join("holder")).context("host has no holder")?;
        let holder = Pid::from_raw(written.trim().parse()?).context("bad holder")?;
        ensure!(namespace.pids().contains(&holder), "the holder of host {name} is gone");
        let cgroup = record.cgroups.first().map(|parent| parent.join(name));
        let image = std::fs::metadata(dir.join(IMAGE)).ok();
        let storage = image.map_or(Storage::Folder, |image| Storage::Limited {
            mib: u32::try_from(image.len() >> 20).unwrap_or(u32::MAX),
        });
        let (name, namespace) = (name.clone(), namespace.clone());
        Ok(Self { name, namespace, dir, cgroup, storage, holder, agent: None })
    }

    /// Its short name, also its host name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Its network namespace.
    pub(crate) fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// Logs of the host.
    pub(crate) fn log_dir(&self) -> PathBuf {
        self.dir.join("log")
    }

    /// A command that runs within the host, not yet started.
    pub(crate) fn command(&self, limit_s: u32, program: impl AsRef<OsStr>) -> Command {
        let mut command = exec::limited(limit_s, "nsenter");
        command.args(self.nsenter_args()).arg("--").arg(program);
        command
    }

    /// A command within the host for somebody at a terminal; a shell when `words` is empty.
    pub(crate) fn interactive(&self, args: &[String]) -> Command {
        let mut command = Command::new("nsenter");
        command.args(self.nsenter_args()).arg("--");
        if args.is_empty() {
            command.arg("sh")
        } else {
            command.args(args)
        };
        command
    }

    /// Runs a command within the host and returns its standard output.
    pub(crate) fn run(&self, args: &[&str]) -> Result<String> {
        let (program, args) = args.split_first().context("no command")?;
        let mut command = self.command(exec::COMMAND_TIMEOUT_S, program);
        command.args(args);
        let output = exec::output(&mut command)?;
        exec::stdout_of(&command, &output)
    }

    /// What the host sees as `/run/limosa`.
    pub(crate) fn run_dir(&self) -> PathBuf {
        self.dir.join("run")
    }

    /// Where tests arm the agent's points of failure.
    pub(crate) fn fault_dir(&self) -> PathBuf {
        self.dir.join("fault")
    }

    /// Forgets what was logged so far.
    pub(crate) fn clear_logs(&self) -> Result<()> {
        for entry in std::fs::read_dir(self.log_dir())?.flatten() {
            // Whoever writes it appends.
            File::options().write(true).open(entry.path())?.set_len(0)?;
        }
        Ok(())
    }

    /// Starts a command within the host that ends by itself or with the host.
    pub(crate) fn start(&self, args: &[String], log: &str) -> Result<Child> {
        let log = File::options().create(true).append(true).open(self.log_dir().join(log))?;
        let mut command = self.interactive(args);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).process_group(0);
        command.spawn().context("starting a command in a host")
    }

    /// Process of the agent.
    pub(crate) fn agent_pid(&self) -> Option<u32> {
        Some(self.agent.as_ref()?.id())
    }

    /// Starts `limosad` with that configuration and waits until it answers.
    ///
    /// - `config`: text of `/etc/limosa/limosad.toml`.
    /// - `environment`: further variables, such as points of failure.
    pub(crate) fn start_agent(&mut self, config: &str, environment: &[(&str, &str)]) -> Result<()> {
        self.launch_agent(config, environment)?;
        self.wait_for_agent()
    }

    /// The same without waiting: it may be about to die.
    pub(crate) fn launch_agent(
        &mut self,
        config: &str,
        environment: &[(&str, &str)],
    ) -> Result<()> {
        ensure!(self.agent.is_none(), "the agent of host {} runs already", self.name);
        std::fs::write(self.dir.join("etc/limosad.toml"), config)?;
        let program = paths::product("limosad")?;
        let log = File::options().create(true).append(true).open(self.agent_log_path())?;
        let mut command = Command::new("nsenter");
        command.args(self.nsenter_args()).args(["--", "sh", "-c"]).arg(
            "mkdir -p /sys/fs/cgroup/limosad 2>/dev/null && \
             echo $$ >/sys/fs/cgroup/limosad/cgroup.procs 2>/dev/null; exec \"$0\"",
        );
        command.arg(&program).envs(environment.iter().copied());
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).process_group(0);
        self.agent = Some(command.spawn().context("starting limosad")?);
        Ok(())
    }

    /// Kills the agent at once, as a crash would. Its VMs go on.
    pub(crate) fn kill_agent(&mut self) -> Result<()> {
        let Some(mut child) = self.agent.take() else { return Ok(()) };
        child.kill().context("killing limosad")?;
        child.wait().context("waiting for limosad").map(drop)
    }

    /// Asks the agent to end and waits for it.
    pub(crate) fn stop_agent(&mut self) -> Result<ExitStatus> {
        let mut child = self.agent.take().context("no agent runs")?;
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).context("no process")?;
        rustix::process::kill_process(pid, Signal::TERM)?;
        let deadline = Instant::now() + Duration::from_millis(AGENT_STOP_TIMEOUT_MS);
        loop {
            if let Some(status) = child.try_wait()? {
                return Ok(status);
            }
            if Instant::now() > deadline {
                child.kill()?;
                child.wait()?;
                bail!("limosad of host {} did not end on SIGTERM", self.name);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Whether the agent has ended without being asked; then how.
    pub(crate) fn agent_ended(&mut self) -> Result<Option<ExitStatus>> {
        match self.agent.as_mut() {
            None => Ok(None),
            Some(child) => child.try_wait().context("looking at limosad"),
        }
    }

    /// All that the agent has logged.
    pub(crate) fn agent_log(&self) -> String {
        std::fs::read(self.agent_log_path()).map_or_else(|_| String::new(), |log| exec::lossy(&log))
    }

    /// Asks the host's agent over its socket.
    pub(crate) fn api<B: serde::Serialize>(
        &self,
        method: &str,
        path: &str,
        body: Option<&B>,
    ) -> Result<api::Answer> {
        api::ask(&self.agent_socket(), method, path, body)
            .with_context(|| format!("asking the agent of host {}", self.name))
    }

    /// Runs `limosa` within the host; it may fail.
    pub(crate) fn try_limosa(&self, args: &[&str]) -> Result<Output> {
        let mut command = self.command(LIMOSA_TIMEOUT_S, paths::product("limosa")?);
        exec::output(command.args(args))
    }

    /// Runs `limosa` within the host and returns what it prints.
    pub(crate) fn limosa(&self, args: &[&str]) -> Result<String> {
        let mut command = self.command(LIMOSA_TIMEOUT_S, paths::product("limosa")?);
        command.args(args);
        let output = exec::output(&mut command)?;
        exec::stdout_of(&command, &output).with_context(|| format!("on host {}", self.name))
    }

    /// Runs `limosa … --json` within the host and reads its answer.
    pub(crate) fn limosa_json<T: DeserializeOwned>(&self, args: &[&str]) -> Result<T> {
        let text = self.limosa(&[args, &["--json"]].concat())?;
        serde_json::from_str(&text).with_context(|| {
            format!("limosa {} answered: {}", args.join(" "), exec::tail(&text, 500))
        })
    }

    /// Bytes that a file of the host really takes.
    pub(crate) fn allocated_bytes(&self, path: &str) -> Result<u64> {
        let blocks = self.run(&["stat", "-L", "-c", "%b", path])?;
        Ok(blocks.trim().parse::<u64>()? * STAT_BLOCK_BYTES)
    }

    /// Whether it has cgroups to give.
    pub(crate) fn has_cgroup(&self) -> bool {
        self.cgroup.is_some()
    }

    /// Processes of QEMU in the host.
    pub(crate) fn qemu_pids(&self) -> Vec<Pid> {
        let mut pids = self.namespace.pids();
        pids.retain(|pid| {
            let name = std::fs::read_to_string(format!("/proc/{}/comm", pid.as_raw_nonzero()));
            name.is_ok_and(|name| name.starts_with("qemu-system"))
        });
        pids
    }

    /// Kills every QEMU in the host; returns how many there were.
    pub(crate) fn kill_qemu(&self) -> usize {
        let pids = self.qemu_pids();
        for pid in &pids {
            // It may have ended meanwhile.
            let _ = rustix::process::kill_process(*pid, Signal::KILL);
        }
        pids.len()
    }

    /// What a VM that is gone should not have left here, one line each.
    pub(crate) fn leftovers(&self) -> Result<Vec<String>> {
        let mut found: Vec<String> =
            self.qemu_pids().iter().map(|pid| format!("QEMU runs: process {pid:?}")).collect();
        // Without any VM ever, the folders may not exist.
        let look = "find /var/lib/limosa/vms /run/limosa/vms -mindepth 1 2>/dev/null; \
                    find /sys/fs/cgroup/limosa -mindepth 1 -type d 2>/dev/null; :";
        let files = self.run(&["sh", "-c", look])?;
        found.extend(files.lines().map(|path| format!("file {path}")));
        let taps =
            self.namespace.run(&["sh", "-c", "ls -d /sys/class/net/*/tun_flags 2>/dev/null; :"])?;
        found.extend(taps.lines().map(|path| format!("TAP {path}")));
        Ok(found)
    }

    /// Fails when a VM has left anything here. Waits a little for what is just ending.
    pub(crate) fn assert_clean(&self) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let found = self.leftovers()?;
            if found.is_empty() {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("left behind on host {}:\n  {}", self.name, found.join("\n  "));
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn nsenter_args(&self) -> Vec<String> {
        let pid = self.holder.as_raw_nonzero();
        vec!["-t".into(), pid.to_string(), "-m".into(), "-n".into(), "-u".into(), "-C".into()]
    }

    /// The agent's socket as the lab sees it.
    pub(crate) fn agent_socket(&self) -> PathBuf {
        self.dir.join("run").join(AGENT_SOCKET)
    }

    fn agent_log_path(&self) -> PathBuf {
        self.log_dir().join("limosad.log")
    }

    /// Waits until the agent answers.
    pub(crate) fn wait_for_agent(&mut self) -> Result<()> {
        let deadline = Instant::now() + Duration::from_millis(AGENT_START_TIMEOUT_MS);
        let socket = self.agent_socket();
        loop {
            if std::os::unix::net::UnixStream::connect(&socket).is_ok() {
                return Ok(());
            }
            let ended = self.agent_ended()?;
            if ended.is_some() || Instant::now() > deadline {
                let log = self.agent_log();
                let how = ended.map_or("does not answer".to_owned(), |status| status.to_string());
                self.kill_agent()?;
                bail!("limosad of host {}: {how}: {}", self.name, exec::tail(&log, 2_000));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // Only to reap it; the lab's teardown kills whatever else is left.
        let _ = self.kill_agent();
    }
}

/// Starts the process that holds a host's namespaces.
fn start_holder(
    namespace: &Namespace,
    dir: &Path,
    name: &str,
    cgroup: Option<&Path>,
    storage: Storage,
) -> Result<Pid> {
    let library = match storage {
        Storage::Folder => "mount --bind \"$DIR/lib\" /var/lib/limosa",
        Storage::Limited { .. } => "mount -o loop \"$DIR/lib.ext4\" /var/lib/limosa",
    };
    let inside = format!(
        "set -e; {library}; mount --bind \"$DIR/run\" /run/limosa; \
         mount --bind \"$DIR/etc\" /etc/limosa; hostname \"$NAME\"; \
         if [ -n \"$CGROUP\" ]; then mount -t cgroup2 none /sys/fs/cgroup; \
         mkdir /sys/fs/cgroup/host; echo $$ > /sys/fs/cgroup/host/cgroup.procs; fi; \
         echo ready; exec sleep infinity >/dev/null 2>&1"
    );
    // The control group first: its namespace is rooted where it is made.
    let outside = "[ -z \"$CGROUP\" ] || echo $$ > \"$CGROUP/cgroup.procs\"; \
                   exec ip netns exec \"$NETNS\" unshare --mount --uts --cgroup \
                   --propagation private sh -c \"$INSIDE\"";
    let mut child = Command::new("sh")
        .args(["-c", outside])
        .env("DIR", dir)
        .env("NAME", name)
        .env("CGROUP", cgroup.unwrap_or(Path::new("")))
        .env("NETNS", namespace.name())
        .env("INSIDE", inside)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(File::create(dir.join("log/holder.log"))?)
        .process_group(0)
        .spawn()
        .context("starting the holder")?;
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).context("no process")?;
    let mut line = String::new();
    let stdout = child.stdout.take().context("no output")?;
    BufReader::new(stdout).read_line(&mut line)?;
    if line.trim() != "ready" {
        // It has ended already, or ends with its namespace.
        let said = std::fs::read_to_string(dir.join("log/holder.log")).unwrap_or_default();
        let _ = child.kill();
        let _ = child.wait();
        bail!("the holder said {line:?}: {}", said.trim());
    }
    // Reaps the holder when it is killed, so that no zombie stays in a long run.
    std::thread::Builder::new().name("lab-reaper".to_owned()).spawn(move || child.wait())?;
    Ok(pid)
}
