//! What can be typed. The help, the man pages and the completions come from here.
//!
//! This is the low end: it checks each word by itself and touches nothing;
//! [`crate::command`] makes of it what is to be done.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use limosa_auth::Fingerprint;
use limosa_protocol::api::SOCKET_PATH;
use limosa_protocol::id::{DiskId, HostName, OperatorName, SwitchName, VmName};
use limosa_protocol::migration::DOWNTIME_LIMIT_MS_DEFAULT;

use crate::address::Address;

/// Move running virtual machines between Linux hosts, with their disks.
///
/// Results go to stdout, everything else to stderr.
///
/// Exit codes: 0 done or moved, 1 failed, 2 wrong usage, 3 the VM stayed at its source, 4 in doubt,
/// 130 left by Ctrl-C while the migration goes on.
#[derive(Debug, Parser)]
#[command(name = "limosa", version, max_term_width = 100, infer_subcommands = false)]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What every command takes.
#[derive(Debug, Args)]
pub(crate) struct Global {
    /// Print results as JSON on stdout; the progress of a move, and what failed, as JSON lines on
    /// stderr
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// The agent to command: a local socket (unix:PATH), or https://HOST[:PORT]
    #[arg(long, global = true, env = "LIMOSA_AGENT", value_name = "AGENT",
        default_value_t = Address::Local(SOCKET_PATH.into()))]
    pub(crate) agent: Address,
    /// Fingerprint of the remote agent's certificate, as `limosa host show` prints it there
    ///
    /// Without it, the one that was confirmed before counts; an unknown one is asked about on a
    /// terminal and refused elsewhere.
    #[arg(long, global = true, env = "LIMOSA_FINGERPRINT", value_name = "FINGERPRINT")]
    pub(crate) fingerprint: Option<Fingerprint>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Virtual machines: make, run, move
    #[command(subcommand)]
    Vm(Vm),
    /// Migrations: list, show, watch, cancel
    #[command(subcommand)]
    Migration(Migration),
    /// This host and those it is paired with
    #[command(subcommand)]
    Host(Host),
    /// Virtual switches
    #[command(subcommand)]
    Switch(Switch),
    /// Operators who may command from afar
    #[command(subcommand)]
    Operator(Operator),
    /// Print a completion script for a shell
    ///
    /// Exit codes: 0 done, 1 failed, 2 wrong usage.
    Completions {
        /// The shell
        shell: limosa_documents::Shell,
    },
    /// Write the man pages into a folder
    ///
    /// Exit codes: 0 done, 1 failed, 2 wrong usage.
    Man {
        /// The folder; made when missing
        #[arg(value_name = "DIR")]
        folder: PathBuf,
    },
}

/// A VM by its name.
#[derive(Debug, Args)]
pub(crate) struct OneVm {
    /// Name of the VM
    #[arg(value_name = "NAME")]
    pub(crate) vm: VmName,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Vm {
    /// Make a VM from its definition
    ///
    /// Exit codes: 0 made, 1 failed, 2 wrong usage.
    Create {
        /// TOML file, or - for standard input
        file: PathBuf,
    },
    /// List all VMs of the host
    ///
    /// Exit codes: 0 done, 1 failed, 2 wrong usage.
    List,
    /// Show one VM, as a definition that `limosa vm create` would take
    ///
    /// Exit codes: 0 done, 1 failed, 2 wrong usage.
    Show(OneVm),
    /// Start a VM
    ///
    /// Exit codes: 0 it runs, 1 failed, 2 wrong usage.
    Start(OneVm),
    /// Stop a VM: ask its guest to power off
    ///
    /// Exit codes: 0 it is off, 1 failed, 2 wrong usage.
    Stop(Stop),
    /// Stop the vCPUs of a VM
    ///
    /// Exit codes: 0 it is paused, 1 failed, 2 wrong usage.
    Pause(OneVm),
    /// Let the vCPUs of a paused VM run on
    ///
    /// Exit codes: 0 it runs, 1 failed, 2 wrong usage.
    Resume(OneVm),
    /// Delete a VM that is off, with the files in its own places
    ///
    /// Exit codes: 0 deleted, 1 failed or not confirmed, 2 wrong usage.
    Delete {
        #[command(flatten)]
        vm: OneVm,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
    /// Open the serial console; Ctrl-] leaves it
    ///
    /// Without a terminal, standard input is sent, and output is shown until the console ends, or
    /// until input has ended and the console falls silent.
    ///
    /// Exit codes: 0 left, 1 failed, 2 wrong usage.
    Console(OneVm),
    /// Show what is known of a VM whose handover waits for the other host; as a last resort, give
    /// the VM to this host
    ///
    /// Two hosts settle a handover by themselves as soon as both answer. Only when one of them is
    /// gone for good must an operator decide.
    ///
    /// Exit codes: 0 shown or forced, 1 failed or not confirmed, 2 wrong usage.
    Recover {
        #[command(flatten)]
        vm: OneVm,
        /// Give the VM to this host, having made sure that the other one does not run it
        #[arg(long)]
        force_owner: bool,
        /// The VM's name once more, instead of being asked for it
        #[arg(long, value_name = "NAME", requires = "force_owner")]
        confirm: Option<VmName>,
    },
    /// Find everything that stands against a move; touches nothing
    ///
    /// Exit codes: 0 nothing stands against it, 1 something does, or the check failed, 2 wrong usage.
    Compare(MoveOptions),
    /// Move a VM to another host, running or off, with its disks
    ///
    /// Ctrl-C cancels the move and the VM stays at its source; pressed again it leaves the move to
    /// go on by itself.
    ///
    /// Exit codes: 0 moved, 1 refused or failed, 2 wrong usage, 3 stayed at its source, 4 in doubt,
    /// 130 left by Ctrl-C while the move goes on.
    Move {
        #[command(flatten)]
        options: MoveOptions,
        /// Print the migration's id and return at once; the move goes on
        #[arg(long)]
        detach: bool,
    },
}

/// How to stop a VM.
#[derive(Debug, Args)]
pub(crate) struct Stop {
    #[command(flatten)]
    pub(crate) vm: OneVm,
    /// Turn it off at once; the guest is not asked
    #[arg(long)]
    pub(crate) force: bool,
    /// How long to wait for the guest, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    pub(crate) timeout: u32,
}

/// Where and how to move a VM.
#[derive(Debug, Args)]
pub(crate) struct MoveOptions {
    #[command(flatten)]
    pub(crate) vm: OneVm,
    /// Paired host to move it to
    #[arg(long, value_name = "HOST")]
    pub(crate) to: HostName,
    /// Folder at the destination for all of the VM's files
    #[arg(long, value_name = "DIR", value_parser = absolute)]
    pub(crate) storage_path: Option<PathBuf>,
    /// Image path at the destination of one disk; may be repeated
    #[arg(long = "disk", value_name = "ID=PATH", value_parser = disk)]
    pub(crate) disks: Vec<(DiskId, PathBuf)>,
    /// What a virtual switch is called at the destination; may be repeated
    #[arg(long = "switch", value_name = "FROM=TO", value_parser = switch)]
    pub(crate) switches: Vec<(SwitchName, SwitchName)>,
    /// Longest stop of the guest to aim for, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = DOWNTIME_LIMIT_MS_DEFAULT)]
    pub(crate) downtime_limit_ms: u32,
    /// What is compared before the VM runs there
    #[arg(long, value_name = "HOW", default_value = "running")]
    pub(crate) verify: Verify,
    /// Keep the disk images at the source
    #[arg(long)]
    pub(crate) retain_source_disks: bool,
}

/// What is compared before the commit point.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Verify {
    /// Digests that both hosts keep while they work; costs no blackout
    Running,
    /// Besides, all of RAM and every disk again while the guest is stopped
    Full,
}

/// A migration by a word for it.
#[derive(Debug, Args)]
pub(crate) struct OneMigration {
    /// Migration id, a unique prefix of it, or a VM name for that VM's latest migration
    #[arg(value_name = "ID")]
    pub(crate) id_or_vm: String,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Migration {
    /// List all migrations, oldest first
    ///
    /// Exit codes: 0 done, 1 failed, 2 wrong usage.
    List,
    /// Show one migration
    ///
    /// Exit codes: 0 done, 1 failed, 2 wrong usage.
    Show(OneMigration),
    /// Watch a migration until it ends; Ctrl-C only stops watching
    ///
    /// Exit codes: 0 moved, 1 failed, 2 wrong usage, 3 stayed at its source, 4 in doubt, 130 left by
    /// Ctrl-C while the migration goes on.
    Watch(OneMigration),
    /// End a migration before its commit point; the VM stays at its source
    ///
    /// Exit codes: 0 the source was told, 1 failed, 2 wrong usage.
    Cancel(OneMigration),
}

#[derive(Debug, Subcommand)]
pub(crate) enum Host {
    /// Show what the host is and can do
    ///
    /// Exit codes: 0 done, 1 failed, 2 wrong usage.
    Show,
    /// List the hosts it is paired with
    ///
    /// Exit codes: 0 done, 1 failed, 2 wrong usage.
    List,
    /// Print a one-time code with which another host may pair
    ///
    /// Exit codes: 0 done, 1 failed, 2 wrong usage.
    Invite,
    /// Pair with the host where `limosa host invite` printed a code
    ///
    /// Exit codes: 0 paired, 1 failed, 2 wrong usage.
    Pair {
        /// ADDRESS or ADDRESS:PORT of the other host
        address: String,
        /// The code; asked for on the terminal when missing
        #[arg(long)]
        code: Option<String>,
    },
    /// Stop trusting a host
    ///
    /// Exit codes: 0 done, 1 failed, 2 wrong usage.
    Unpair {
        /// Name of the other host
        #[arg(value_name = "NAME")]
        host: HostName,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Switch {
    /// List all virtual switches
    ///
    /// Exit codes: 0 done, 1 failed, 2 wrong usage.
    List,
    /// Make a virtual switch
    ///
    /// Exit codes: 0 made, 1 failed, 2 wrong usage.
    Create {
        /// Name of the switch
        #[arg(value_name = "NAME")]
        switch: SwitchName,
        /// Network interface that joins it to a network
        #[arg(long, value_name = "IFACE")]
        uplink: Option<String>,
    },
    /// Remove a virtual switch that no VM uses
    ///
    /// Exit codes: 0 removed, 1 failed, 2 wrong usage.
    Delete {
        /// Name of the switch
        #[arg(value_name = "NAME")]
        switch: SwitchName,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Operator {
    /// List the operators that the host lets in
    ///
    /// Exit codes: 0 done, 1 failed, 2 wrong usage.
    List,
    /// Let an operator's certificate in
    ///
    /// Exit codes: 0 done, 1 failed, 2 wrong usage.
    Add {
        /// Name for the operator
        name: OperatorName,
        /// The operator's certificate: the file whose path `limosa operator identity` prints for the
        /// operator
        #[arg(long, value_name = "FILE")]
        certificate: PathBuf,
    },
    /// Revoke an operator's access
    ///
    /// Exit codes: 0 done, 1 failed, 2 wrong usage.
    Remove {
        /// Name of the operator
        name: OperatorName,
    },
    /// Show your own certificate, to be let in at a host; made when missing
    ///
    /// Exit codes: 0 done, 1 failed, 2 wrong usage.
    Identity,
}

fn disk(text: &str) -> Result<(DiskId, PathBuf), String> {
    let (id, path) = text.split_once('=').ok_or("write it as ID=PATH")?;
    Ok((id.parse().map_err(|error| format!("{error}"))?, absolute(path)?))
}

fn switch(text: &str) -> Result<(SwitchName, SwitchName), String> {
    let (from, to) = text.split_once('=').ok_or("write it as FROM=TO")?;
    let name = |text: &str| text.parse().map_err(|error| format!("{error}"));
    Ok((name(from)?, name(to)?))
}

/// A path of another host has no folder to start from.
fn absolute(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    if path.is_absolute() {
        Ok(path)
    } else {
        Err("it is a path of the destination: begin it with /".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use clap::{Command, CommandFactory, Parser};

    #[test]
    fn the_command_line_is_consistent() {
        super::Arguments::command().debug_assert();
    }

    /// Goal: no command leaves its user to guess what its exit codes mean.
    #[test]
    fn every_command_lists_its_exit_codes() {
        fn walk(command: &Command) {
            let about = command.get_long_about().map(ToString::to_string).unwrap_or_default();
            if command.get_subcommands().next().is_none() {
                assert!(about.contains("Exit codes: 0"), "{}: {about}", command.get_name());
            }
            command.get_subcommands().for_each(walk);
        }
        walk(&super::Arguments::command());
    }

    #[test]
    fn mappings_are_read_or_refused() {
        let parse = |extra: &[&str]| {
            let arguments = ["limosa", "vm", "move", "web1", "--to", "b"];
            super::Arguments::try_parse_from(arguments.iter().chain(extra)).map(|_| ())
        };
        parse(&["--disk", "root=/a", "--disk", "log=/b=c", "--switch", "lan=wan"]).unwrap();
        for bad in [
            ["--disk", "root"],
            ["--disk", "root=relative"],
            ["--disk", "=/a"],
            ["--switch", "lan="],
            ["--storage-path", "here"],
            ["--verify", "never"],
        ] {
            assert!(parse(&bad).is_err(), "{bad:?}");
        }
    }
}
