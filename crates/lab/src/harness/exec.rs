//! Runs commands of the machine (`ip`, `tc`, `nsenter`, …) with a time limit.
//!
//! **Invariant.** No command of the lab waits without an end: each one runs
//! under `timeout`, which kills it and whatever hangs in it.

use std::ffi::OsStr;
use std::process::{Child, Command, Output, Stdio};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal};

/// Longest time for one ordinary command, in seconds.
pub(crate) const COMMAND_TIMEOUT_S: u32 = 60;
/// Exit code by which `timeout` says that it killed the command.
const TIMED_OUT_CODE: i32 = 124;
/// Longest part of a command's output that an error repeats, in bytes.
const SHOWN_BYTES_MAX: usize = 4_000;

/// A command that is killed after `limit_s` seconds.
pub(crate) fn limited(limit_s: u32, program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("timeout");
    command.arg("-k").arg("2").arg(limit_s.to_string()).arg(program).stdin(Stdio::null());
    command
}

/// Sends a signal to what [`limited`] runs, once: `timeout` would pass it on twice.
pub(crate) fn signal_limited(timeout: &Child, signal: Signal) -> Result<()> {
    let pid = timeout.id();
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
    let child = children.split_whitespace().next().context("it has ended already")?;
    let child = Pid::from_raw(child.parse()?).context("no process")?;
    Ok(rustix::process::kill_process(child, signal)?)
}

/// Runs `program` with `args` and returns what it wrote to its standard output.
pub(crate) fn run<S: AsRef<OsStr>>(program: &str, args: &[S]) -> Result<String> {
    let mut command = limited(COMMAND_TIMEOUT_S, program);
    command.args(args);
    let output = output(&mut command)?;
    stdout_of(&command, &output)
}

/// Runs a command that may fail; an error only when it could not run at all.
pub(crate) fn output(command: &mut Command) -> Result<Output> {
    let output = command.output().with_context(|| format!("starting {}", shown(command)))?;
    if output.status.code() == Some(TIMED_OUT_CODE) {
        bail!("took too long and was killed: {}", shown(command));
    }
    Ok(output)
}

/// The standard output of a command that succeeded; else an error with all it said.
pub(crate) fn stdout_of(command: &Command, output: &Output) -> Result<String> {
    if !output.status.success() {
        bail!(
            "{} ended with {}: {}",
            shown(command),
            output.status,
            tail(&format!("{}{}", lossy(&output.stderr), lossy(&output.stdout)), SHOWN_BYTES_MAX)
        );
    }
    Ok(lossy(&output.stdout))
}

/// Bytes as text, whatever they are.
pub(crate) fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The last `bytes_max` bytes of a text, from the beginning of a character.
pub(crate) fn tail(text: &str, bytes_max: usize) -> &str {
    let mut start = text.len().saturating_sub(bytes_max);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    text[start..].trim()
}

fn shown(command: &Command) -> String {
    // The first arguments are "-k 2 LIMIT" of timeout: not interesting.
    let skipped = if command.get_program() == "timeout" { 3 } else { 0 };
    let args: Vec<_> = command.get_args().skip(skipped).map(|arg| arg.to_string_lossy()).collect();
    args.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: a failing or endless command becomes an error that names it.
    #[test]
    fn failures_name_the_command() {
        assert_eq!(run("echo", &["a", "b"]).unwrap(), "a b\n");
        let error = run("sh", &["-c", "echo broken >&2; exit 3"]).unwrap_err().to_string();
        assert!(error.contains("broken") && error.contains("exit 3"), "{error}");
        let mut endless = limited(1, "sleep");
        let error = output(endless.arg("600")).unwrap_err().to_string();
        assert!(error.contains("sleep 600"), "{error}");
    }

    /// Goal: cutting a text never splits a character.
    #[test]
    fn tail_keeps_characters_whole() {
        assert_eq!(tail("abcdef", 3), "def");
        assert_eq!(tail("aää", 3), "ä");
        assert_eq!(tail("short", 100), "short");
    }
}
