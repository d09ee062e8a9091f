//! The life of one QEMU process, which outlives the agent that started it.
//!
//! A process is known by its number and its start time ([`ProcessId`]), because
//! numbers are used again. It is waited for and killed through a pidfd, which
//! works alike for a child and for one that an earlier agent started.
//!
//! **Invariants.** QEMU leads its own session: signals to the agent do not reach
//! it. Of the agent's descriptors it inherits only those it is given, not even one
//! that the agent itself inherited. An answer on its QMP socket counts only when
//! the kernel says that it comes from it.

mod stat;

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsRawFd, BorrowedFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Gid, Pid, PidfdFlags, Signal, Uid};
use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;

use crate::qmp::{Qmp, QmpError};
use stat::{ProcessStat, process_stat};

/// Value of `-sandbox`: no obsolete system calls, no more rights, no other programs, and
/// no more of the host than QEMU is given.
pub(crate) const SANDBOX: &str =
    "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";
/// Number of the first descriptor that QEMU inherits.
const INHERITED_FD_FIRST: RawFd = 10;
/// Numbers from here on are free in a child that was just forked.
const SPARE_FD_FIRST: RawFd = 200;
/// Most descriptors that QEMU can inherit.
pub const INHERITED_COUNT_MAX: usize = 16;
/// Times a start is tried whose descriptors collide.
const START_COUNT_MAX: u32 = 5;
/// Bytes of the end of QEMU's log that go into an error.
const LOG_TAIL_BYTES: u64 = 1024;

/// The descriptors that QEMU inherits.
#[derive(Debug, Default)]
pub struct InheritedFds(Vec<OwnedFd>);

impl InheritedFds {
    /// Adds a descriptor and returns the number that QEMU finds it under.
    pub fn add(&mut self, fd: OwnedFd) -> RawFd {
        self.0.push(fd);
        inherited_fd(self.0.len() - 1)
    }
}

/// Number of the inherited descriptor at `index`.
fn inherited_fd(index: usize) -> RawFd {
    // `spawn` refuses more than `INHERITED_COUNT_MAX`; the fallback is never open.
    RawFd::try_from(index).map_or(-1, |index| INHERITED_FD_FIRST + index)
}

/// One process, for as long as the machine is up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Its number
    pub pid: u32,
    /// When it began, in clock ticks since the machine's start
    pub start_time_ticks: u64,
}

/// As whom a process runs.
#[derive(Debug, Clone)]
pub struct User {
    /// User
    pub uid: u32,
    /// Group
    pub gid: u32,
    /// Further groups
    pub groups: Vec<u32>,
}

/// What is to be started, and how.
pub struct ProcessSpec {
    /// The program
    pub binary: PathBuf,
    /// Its arguments
    pub args: Vec<OsString>,
    /// As whom; `None` as the agent's user
    pub user: Option<User>,
    /// cgroup (version 2) to put it into
    pub cgroup: Option<PathBuf>,
    /// File that takes its output, anew at each start
    pub stderr_log: PathBuf,
    /// Descriptors to inherit
    pub inherited: InheritedFds,
}

/// Why a process could not be started or ended.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// The program did not start.
    #[error("cannot start {}", binary.display())]
    Start {
        /// The program
        binary: PathBuf,
        /// Why
        #[source]
        source: io::Error,
    },
    /// Its log cannot be written.
    #[error("cannot write its log {}", path.display())]
    Log {
        /// The file
        path: PathBuf,
        /// Why
        #[source]
        source: io::Error,
    },
    /// It ended before it answered.
    #[error("it ended at once, and its log ends with: {log}")]
    Ended {
        /// The end of its log
        log: String,
    },
    /// It does not answer.
    #[error("it does not answer")]
    Silent(#[source] QmpError),
    /// Another process answers in its place.
    #[error("its QMP socket is answered by another process ({})", found.unwrap_or(0))]
    Stranger {
        /// Number of the other, if known
        found: Option<u32>,
    },
    /// More descriptors than there are numbers for.
    #[error("{count} descriptors are more than the {INHERITED_COUNT_MAX} it can inherit")]
    TooMany {
        /// How many
        count: usize,
    },
    /// It still runs.
    #[error("process {pid} still runs after {} s", limit.as_secs())]
    StillRuns {
        /// Its number
        pid: u32,
        /// How long it was waited for
        limit: Duration,
    },
    /// The kernel refused.
    #[error("the kernel refused to work on process {pid}")]
    Kernel {
        /// Its number
        pid: u32,
        /// Why
        #[source]
        source: io::Error,
    },
    /// The memory of a guest was not found.
    #[error("process {pid} has no shared memory of {size_bytes} bytes")]
    NoRam {
        /// Its number
        pid: u32,
        /// What was looked for
        size_bytes: u64,
    },
}

/// A process that was just started.
#[derive(Debug)]
pub struct QemuProcess {
    /// Which one
    pub id: ProcessId,
    log: PathBuf,
}

/// Starts a process.
///
/// # Errors
/// [`ProcessError::Start`], [`ProcessError::Log`], [`ProcessError::TooMany`]. A
/// cgroup that cannot be used is logged, and the process runs without it.
#[expect(clippy::unused_async, reason = "needs a runtime to reap the child")]
pub async fn spawn(spec: &ProcessSpec) -> Result<QemuProcess, ProcessError> {
    let count = spec.inherited.0.len();
    if count > INHERITED_COUNT_MAX {
        return Err(ProcessError::TooMany { count });
    }
    let at_start = |source| ProcessError::Start { binary: spec.binary.clone(), source };
    let mut tries = 1;
    let mut child = loop {
        let placeholders = occupy_inherited().map_err(at_start)?;
        let started = command(spec)?.spawn();
        drop(placeholders);
        match started {
            Ok(child) => break child,
            Err(error) if is_collision(&error) && tries < START_COUNT_MAX => tries += 1,
            Err(error) => return Err(at_start(error)),
        }
    };
    let pid = child.id().ok_or_else(|| at_start(io::Error::other("it is gone already")))?;
    if let Some(group) = &spec.cgroup
        && let Err(error) = std::fs::write(group.join("cgroup.procs"), pid.to_string())
    {
        tracing::warn!(pid, group = %group.display(), %error, "not in a cgroup of its own");
    }
    // Not waited for yet, so at least its entry is there.
    let ProcessStat { start_time_ticks, .. } = process_stat(pid)
        .ok_or_else(|| at_start(io::Error::other("its start time cannot be read")))?;
    // Waited for, so that it does not stay as a zombie.
    tokio::spawn(async move { child.wait().await });
    Ok(QemuProcess { id: ProcessId { pid, start_time_ticks }, log: spec.stderr_log.clone() })
}

fn command(spec: &ProcessSpec) -> Result<tokio::process::Command, ProcessError> {
    let at_log = |source| ProcessError::Log { path: spec.stderr_log.clone(), source };
    let log = OpenOptions::new()
        .create(true)
        .write(true)
        .truncate(true)
        .mode(0o600)
        // QEMU's user may own the folder, and must not choose what is emptied.
        .custom_flags(libc::O_NOFOLLOW)
        .open(&spec.stderr_log)
        .map_err(at_log)?;
    let mut command = tokio::process::Command::new(&spec.binary);
    command
        .args(&spec.args)
        .stdin(Stdio::null())
        .stdout(Stdio::from(log.try_clone().map_err(at_log)?))
        .stderr(Stdio::from(log))
        .current_dir("/")
        .kill_on_drop(false);
    let fds: Vec<RawFd> = spec.inherited.0.iter().map(AsRawFd::as_raw_fd).collect();
    let user = spec.user.as_ref().map(ChildUser::new);
    // SAFETY: between fork and exec only system calls are made; nothing
    // allocates, locks or unwinds.
    unsafe { command.pre_exec(move || become_qemu(&fds, user.as_ref())) };
    Ok(command)
}

/// Has a helper program run as another user, who may do less than the agent.
pub(crate) fn run_as(command: &mut tokio::process::Command, user: Option<&User>) {
    let Some(user) = user.map(ChildUser::new) else { return };
    // SAFETY: between fork and exec only system calls are made; nothing
    // allocates, locks or unwinds.
    unsafe { command.pre_exec(move || user.assume()) };
}

/// Has a helper program killed when this process is, which cannot do it itself
/// then. To be started by the main thread: it is that thread's end which counts. After
/// [`run_as`], which would undo it.
pub(crate) fn end_with_parent(command: &mut tokio::process::Command) {
    let signal = Some(Signal::KILL);
    let set = move || Ok(rustix::process::set_parent_process_death_signal(signal)?);
    // SAFETY: between fork and exec only a system call is made; nothing allocates,
    // locks or unwinds.
    unsafe { command.pre_exec(set) };
}

/// Holds the numbers that QEMU's descriptors will have, as far as they are free.
///
/// The standard library opens a pipe by which the child says that its `exec`
/// failed. Were it opened at one of these numbers, the child would put a TAP in
/// its place, and write into the TAP.
fn occupy_inherited() -> io::Result<Vec<OwnedFd>> {
    let null = File::open("/dev/null")?;
    let mut held = Vec::new();
    loop {
        let fd = rustix::io::fcntl_dupfd_cloexec(&null, INHERITED_FD_FIRST)?;
        let is_past = inherited_fd(INHERITED_COUNT_MAX) <= fd.as_raw_fd();
        held.push(fd);
        if is_past {
            return Ok(held);
        }
    }
}

/// Whether a start failed because that pipe got such a number all the same:
/// another thread closed one at the wrong moment.
fn is_collision(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EBUSY)
}

/// In the child: a session of its own, the given descriptors, the given user.
fn become_qemu(fds: &[RawFd], user: Option<&ChildUser>) -> io::Result<()> {
    rustix::process::setsid()?;
    let no_core = rustix::process::Rlimit { current: Some(0), maximum: Some(0) };
    rustix::process::setrlimit(rustix::process::Resource::Core, no_core)?;
    close_at_exec()?;
    let mut spares = [-1; INHERITED_COUNT_MAX];
    // Through spare numbers: a given descriptor may have the number of another.
    for (spare, fd) in spares.iter_mut().zip(fds) {
        // SAFETY: the parent holds the descriptor open until the child has called `exec`.
        let fd = unsafe { BorrowedFd::borrow_raw(*fd) };
        *spare = rustix::io::fcntl_dupfd_cloexec(fd, SPARE_FD_FIRST)?.into_raw_fd();
    }
    for (to, spare) in (INHERITED_FD_FIRST..).zip(spares.iter().take(fds.len())) {
        if is_report_pipe(to) {
            return Err(io::Error::from_raw_os_error(libc::EBUSY));
        }
        // SAFETY: both are plain numbers to the kernel, and nothing between fork and
        // exec uses the descriptor that had the number `to`.
        check(unsafe { libc::dup2(*spare, to) })?;
    }
    user.map_or(Ok(()), ChildUser::assume)
}

/// A user as system calls name it. Made before the fork, for it allocates.
struct ChildUser {
    uid: Uid,
    gid: Gid,
    groups: Vec<Gid>,
}

impl ChildUser {
    fn new(user: &User) -> Self {
        let groups = user.groups.iter().copied().map(Gid::from_raw).collect();
        Self { uid: Uid::from_raw(user.uid), gid: Gid::from_raw(user.gid), groups }
    }

    /// In the child: becomes this user. The kernel forgets a signal for the parent's end.
    ///
    /// The calls change one thread, and a child that was just forked has one.
    fn assume(&self) -> io::Result<()> {
        rustix::thread::set_thread_groups(&self.groups)?;
        rustix::thread::set_thread_gid(self.gid)?;
        // Last, because it gives up the right to the other two.
        Ok(rustix::thread::set_thread_uid(self.uid)?)
    }
}

/// Marks every descriptor past standard error to be closed at `exec`. Limosa opens
/// none that is not, but the program that started the agent may have left it some.
fn close_at_exec() -> io::Result<()> {
    let first = libc::STDERR_FILENO.unsigned_abs() + 1;
    let flags = libc::c_int::try_from(libc::CLOSE_RANGE_CLOEXEC).unwrap_or(0);
    // SAFETY: a system call on numbers, which closes nothing yet.
    check(unsafe { libc::close_range(first, libc::c_uint::MAX, flags) }).map(drop)
}

/// Whether a number may be that of the pipe in [`occupy_inherited`]: the writing
/// end of a pipe.
fn is_report_pipe(fd: RawFd) -> bool {
    // SAFETY: all bytes zero are a valid `stat`.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: `stat` is valid for writes; for a number that is not open, which no
    // `BorrowedFd` may have, the kernel answers with an error.
    let known = unsafe { libc::fstat(fd, &raw mut stat) } == 0;
    // SAFETY: a system call on a number, as above.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
    known
        && stat.st_mode & libc::S_IFMT == libc::S_IFIFO
        && flags & libc::O_ACCMODE == libc::O_WRONLY
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

impl QemuProcess {
    /// Connects to its QMP socket once it listens.
    ///
    /// # Errors
    /// [`ProcessError::Ended`] with the end of its log, or [`ProcessError::Silent`].
    pub async fn wait_ready(&self, socket: &Path, limit: Duration) -> Result<Qmp, ProcessError> {
        tokio::select! {
            qmp = connect(&self.id, socket, limit) => match qmp {
                Err(ProcessError::Silent(_)) if !is_alive(&self.id) => Err(self.ended()),
                qmp => qmp,
            },
            Ok(()) = wait_exit(&self.id, limit) => Err(self.ended()),
        }
    }

    fn ended(&self) -> ProcessError {
        ProcessError::Ended { log: log_tail(&self.log) }
    }
}

/// Connects to the QMP socket of a process that runs already, and makes sure
/// that it is this very process that answers there.
///
/// # Errors
/// [`ProcessError::Silent`] and [`ProcessError::Stranger`].
pub async fn connect(id: &ProcessId, socket: &Path, limit: Duration) -> Result<Qmp, ProcessError> {
    let qmp = Qmp::connect(socket, limit).await.map_err(ProcessError::Silent)?;
    // Its number first, then that the number is still its own.
    if qmp.peer_pid() == Some(id.pid) && is_alive(id) {
        Ok(qmp)
    } else {
        Err(ProcessError::Stranger { found: qmp.peer_pid() })
    }
}

/// The end of a log, on one line.
#[must_use]
pub fn log_tail(path: &Path) -> String {
    let read = || -> io::Result<String> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL_BYTES)))?;
        let mut bytes = Vec::new();
        file.take(LOG_TAIL_BYTES).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).trim().replace('\n', "; "))
    };
    read().unwrap_or_else(|error| format!("(its log cannot be read: {error})"))
}

/// Whether this very process runs. A killed process runs until its last thread has
/// closed its files.
#[must_use]
pub fn is_alive(id: &ProcessId) -> bool {
    process_stat(id.pid)
        .is_some_and(|stat| stat.start_time_ticks == id.start_time_ticks && !stat.has_ended)
}

/// All processes of a control group; none when there is no such group.
#[must_use]
pub fn in_cgroup(group: &Path) -> Vec<ProcessId> {
    let listed = std::fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
    let pids = listed.lines().filter_map(|line| line.parse().ok());
    pids.filter_map(|pid| {
        let ProcessStat { start_time_ticks, .. } = process_stat(pid)?;
        Some(ProcessId { pid, start_time_ticks })
    })
    .collect()
}

/// A pidfd of the process; `None` when it is gone.
fn pidfd(id: &ProcessId) -> Result<Option<OwnedFd>, ProcessError> {
    let at = |source| ProcessError::Kernel { pid: id.pid, source };
    let raw = i32::try_from(id.pid).map_err(|error| at(io::Error::other(error)))?;
    let Some(pid) = Pid::from_raw(raw) else { return Ok(None) };
    match rustix::process::pidfd_open(pid, PidfdFlags::NONBLOCK) {
        // Looked at after the pidfd is open: from now on the number is ours.
        Ok(fd) => Ok(is_alive(id).then_some(fd)),
        Err(rustix::io::Errno::SRCH) => Ok(None),
        Err(error) => Err(at(error.into())),
    }
}

/// Kills a process, if it is still that one, and waits a moment for its end.
///
/// # Errors
/// [`ProcessError::Kernel`] and [`ProcessError::StillRuns`].
pub async fn kill(id: &ProcessId) -> Result<(), ProcessError> {
    let Some(fd) = pidfd(id)? else { return Ok(()) };
    match rustix::process::pidfd_send_signal(&fd, Signal::KILL) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => {}
        Err(error) => return Err(ProcessError::Kernel { pid: id.pid, source: error.into() }),
    }
    wait_exit(id, Duration::from_secs(10)).await
}

/// Waits for the end of a process.
///
/// # Errors
/// [`ProcessError::StillRuns`] after `limit`.
pub async fn wait_exit(id: &ProcessId, limit: Duration) -> Result<(), ProcessError> {
    let Some(fd) = pidfd(id)? else { return Ok(()) };
    let at = |source| ProcessError::Kernel { pid: id.pid, source };
    // SAFETY: an `OwnedFd` upholds I/O safety: its descriptor stays open, and the same,
    // until the `AsyncFd` has dropped it.
    let fd = unsafe { AsyncFd::register_with_interest(fd, tokio::io::Interest::READABLE) }
        .map_err(|error| at(error.into()))?;
    match tokio::time::timeout(limit, fd.readable()).await {
        Ok(Ok(_exited)) => Ok(()),
        Ok(Err(error)) => Err(at(error)),
        Err(_) => Err(ProcessError::StillRuns { pid: id.pid, limit }),
    }
}
