//! `limosa-lab`: hosts from namespaces, real guests, scenarios from end to end.
//!
//! ```text
//! main ─► scenarios ─► harness ─► limosad, limosa   the product, only by its programs
//!   ├───► faults (chaos) ─► harness                 moves with faults: make chaos
//!   ├───► demo, bench ────► harness
//!   └───► report                                    terminal and timeline: make demo
//! ```

mod bench;
mod demo;
mod faults;
mod harness;
mod report;
mod scenarios;

use std::io::Write;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

use crate::harness::lab::{Lab, Topology};
use crate::harness::{host, paths, record, signals};

/// Hosts from namespaces for demonstrations and tests of Limosa.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    order: Order,
}

#[derive(Debug, Subcommand)]
enum Order {
    /// Build a lab that stays
    Up {
        /// Speed of each migration link in Mbit/s, repeatable; 0 is without limit
        #[arg(long = "link", default_value = "1000")]
        links_mbit: Vec<u32>,
        /// Number of hosts
        #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=4))]
        hosts: u8,
    },
    /// Take down the lab that stays, and everything that dead runs left behind
    Down {
        /// Take down this one only
        #[arg(long)]
        id: Option<String>,
    },
    /// Run a command in a host of the lab that stays
    Enter {
        /// Which lab, when there are several
        #[arg(long)]
        id: Option<String>,
        /// Short name of the host
        host: String,
        /// The command; a shell when missing
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Show a VM that moves there and back, with a report
    Demo,
    /// Measure Limosa against stock QEMU
    Bench {
        /// How often each comparison is made
        #[arg(long, default_value_t = 3)]
        times: u32,
        /// Measure stock QEMU alone, without KVM
        #[arg(long)]
        stock_only: bool,
    },
    /// Move a VM again and again while drawn faults strike
    Chaos(faults::chaos::Request),
    /// Run all scenarios over and over
    Soak {
        /// For how long
        #[arg(long, default_value_t = 120)]
        minutes: u32,
    },
    /// Run one scenario
    Scenario {
        /// Its name
        name: String,
    },
    /// Run all scenarios
    Scenarios {
        /// Only those whose name contains this
        #[arg(long)]
        only: Option<String>,
        /// Only say which there are
        #[arg(long)]
        list: bool,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match signals::install().and_then(|()| perform(arguments.order)) {
        Ok(code) => code,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "limosa-lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn perform(order: Order) -> Result<ExitCode> {
    match order {
        Order::Up { links_mbit, hosts } => up(&links_mbit, hosts)?,
        Order::Down { id } => down(id.as_deref())?,
        Order::Enter { id, host, command } => return enter(id.as_deref(), &host, &command),
        Order::Bench { times, stock_only } => bench::run(times, stock_only)?,
        Order::Demo => demo::run()?,
        Order::Chaos(request) => {
            return Ok(if faults::chaos::run(&request)? {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            });
        }
        Order::Soak { minutes } => scenarios::soak::run(minutes)?,
        Order::Scenarios { list: true, .. } => {
            for scenario in scenarios::all() {
                print_line(&format!("{:<28} {}", scenario.name, scenario.proves));
            }
        }
        Order::Scenarios { only, list: false } => {
            let count = scenarios::run_all(only.as_deref())?;
            // No further line: the count is the last one.
            return Ok(if count.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        Order::Scenario { name } => {
            let named = scenarios::all().into_iter().find(|scenario| scenario.name == name);
            let scenario = named.with_context(|| format!("there is no scenario {name}"))?;
            scenarios::run_one(scenario, &paths::lab_dir().join("failed").join(&name))?;
            print_line(&format!("{name}: passed"));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn up(links_mbit: &[u32], hosts: u8) -> Result<()> {
    let names = ["a", "b", "c", "d"];
    let topology = Topology {
        hosts: names[..usize::from(hosts)]
            .iter()
            .map(|name| (*name, host::Storage::Folder))
            .collect(),
        links_mbit: links_mbit.iter().map(|mbit| (*mbit > 0).then_some(*mbit)).collect(),
    };
    let id = Lab::up(&topology)?.keep()?;
    print_line(&format!(
        "lab {id} is up; try: limosa-lab enter a -- ip address; then: limosa-lab down"
    ));
    Ok(())
}

fn down(id: Option<&str>) -> Result<()> {
    record::remove_leftovers();
    let chosen = |record: &record::Record| match id {
        Some(id) => record.id == id,
        None => record.owner.is_none(),
    };
    for record in record::Record::all().into_iter().filter(chosen) {
        record.teardown().with_context(|| format!("taking down lab {}", record.id))?;
        print_line(&format!("lab {} is down", record.id));
    }
    Ok(())
}

fn enter(id: Option<&str>, host: &str, args: &[String]) -> Result<ExitCode> {
    let lab = Lab::attach(id)?;
    let known = lab.hosts().iter().find(|known| known.name() == host);
    let host = known.with_context(|| format!("the lab has no host {host}"))?;
    let status = host.interactive(args).status().context("entering the host")?;
    Ok(ExitCode::from(u8::try_from(status.code().unwrap_or(1)).unwrap_or(1)))
}

/// Writes a line to the standard output; a reader who left is no failure.
fn print_line(line: &str) {
    let _ = writeln!(std::io::stdout(), "{line}");
}
