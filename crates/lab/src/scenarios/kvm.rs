//! The one scenario with KVM: a boot sector, which runs also where KVM is itself
//! emulated and no Linux comes up in it.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use limosa_protocol::migration::Outcome;
use serde_json::{Value, json};

use super::{Scenario, Skipped};
use crate::harness::host::Host;
use crate::harness::lab::{Lab, Topology};
use crate::harness::steps;

const VM: &str = "kvm1";
/// Characters of the guest that are looked at on each host.
const LOOKED_AT: usize = 12;
/// Longest wait for one of them.
const CHARACTER_TIMEOUT: Duration = Duration::from_secs(30);

/// Counts in memory at 0x8000, and at each 65536th step writes the low six bits
/// of the upper half to the serial port, as a character from `0` on:
///
/// ```text
///       xor ax, ax        31 c0
///       mov ds, ax        8e d8
/// step: inc dword [8000h] 66 ff 06 00 80
///       mov ax, [8000h]   a1 00 80
///       test ax, ax       85 c0
///       jnz step          75 f4
///       mov al, [8002h]   a0 02 80
///       and al, 3fh       24 3f
///       add al, '0'       04 30
///       mov dx, 3f8h      ba f8 03
///       out dx, al        ee
///       jmp step          eb e7
/// ```
const CODE: &[u8] = &[
    0x31, 0xc0, 0x8e, 0xd8, 0x66, 0xff, 0x06, 0x00, 0x80, 0xa1, 0x00, 0x80, 0x85, 0xc0, 0x75, 0xf4,
    0xa0, 0x02, 0x80, 0x24, 0x3f, 0x04, 0x30, 0xba, 0xf8, 0x03, 0xee, 0xeb, 0xe7,
];

pub(super) const SCENARIOS: &[Scenario] = &[Scenario {
    name: "kvm-boot-sector-moves",
    proves: "a guest under KVM moves with its memory and counts on",
    topology: Topology::default,
    run: boot_sector,
}];

fn boot_sector(lab: &mut Lab) -> Result<()> {
    let opened = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm");
    if let Err(error) = opened {
        return Err(Skipped(format!("/dev/kvm does not open: {error}")).into());
    }
    for host in lab.hosts_mut() {
        // In a lab nobody has a group for it, and the agent tries it at once.
        host.run(&["chmod", "0666", "/dev/kvm"])?;
        let config = steps::agent_config(host, None, "accelerator = \"kvm\"\n");
        host.start_agent(&config, &[])?;
    }
    steps::join(lab)?;
    start(lab.host("a"))?;
    let before = listen(lab.host("a"))?;
    let full = json!({"verify": "full"});
    let migration = steps::begin_move(lab.host("a"), VM, "b", &full)?;
    let ended = steps::follow(lab.host("a"), &migration, steps::MOVE_TIMEOUT)?;
    let last = ended.last().context("nothing was said about the move")?;
    ensure!(last.outcome == Some(Outcome::Moved), "it did not move: {:?}", last.reason);
    steps::assert_only_at(lab, VM, "b")?;
    let after = listen(lab.host("b"))?;
    let step = |pair: &[u8]| pair[1].wrapping_sub(pair[0]) % 64 == 1;
    for heard in [&before, &after] {
        ensure!(heard.windows(2).all(step), "the guest miscounts: {heard:?}");
    }
    Ok(())
}

fn start(host: &Host) -> Result<()> {
    let mut sector = CODE.to_vec();
    sector.resize(1 << 20, 0);
    sector[510] = 0x55;
    sector[511] = 0xaa;
    let image = host.run_dir().join("kvm.raw");
    std::fs::write(&image, sector)?;
    host.run(&["mkdir", "-p", "/var/lib/limosa/images"])?;
    host.run(&["mv", "/run/limosa/kvm.raw", "/var/lib/limosa/images/kvm.raw"])?;
    let definition = json!({
        "name": VM,
        "memory_mib": 64,
        "machine": "q35",
        // The one that also an emulated KVM can do.
        "cpu": "qemu64",
        "disks": [{"id": "d0", "format": "raw", "path": "/var/lib/limosa/images/kvm.raw"}],
    });
    host.api("POST", "/v1/vms", Some(&definition))?.read::<Value>()?;
    steps::power(host, VM, "start").map(drop)
}

/// Characters that the guest says on its console; the first ones may be the BIOS's.
fn listen(host: &Host) -> Result<Vec<u8>> {
    let socket = host.run_dir().join("vms").join(VM).join("console.sock");
    let mut console = UnixStream::connect(&socket).context("opening the console")?;
    console.set_read_timeout(Some(CHARACTER_TIMEOUT))?;
    let mut heard = Vec::new();
    let mut one = [0];
    while heard.len() < LOOKED_AT {
        console.read_exact(&mut one).context("the guest says nothing")?;
        heard.push(one[0]);
    }
    Ok(heard)
}
