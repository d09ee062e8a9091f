//! Which accelerator runs a guest.

use std::fmt;

use serde::{Deserialize, Serialize};

/// How vCPUs are run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accelerator {
    /// By the processor
    Kvm,
    /// In software
    Tcg,
}

impl fmt::Display for Accelerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        })
    }
}

impl Accelerator {
    /// Bytes of RAM that QEMU gives a VM of `memory_bytes`.
    ///
    /// Emulated guests get 8 KiB more. QEMU before 9.0 forgets to tell the
    /// emulated processors when it takes over the dirty bitmap of a block whose
    /// size is a multiple of 64 pages: what they write next to pages they have at
    /// hand is lost to the migration (found by comparing RAM after moves with
    /// stock 7.2; repaired in QEMU by "physmem: Fix migration dirty bitmap coherency
    /// with TCG memory access"). For any other size it takes a path without that
    /// fault. All versions get the same size, so that a guest may go between them.
    #[must_use]
    pub const fn ram_bytes(self, memory_bytes: u64) -> u64 {
        match self {
            Self::Kvm => memory_bytes,
            // The step in which QEMU counts RAM.
            Self::Tcg => memory_bytes + (8 << 10),
        }
    }
}

/// A choice and its reason, for people.
#[derive(Debug, Clone)]
pub struct Choice {
    /// What was chosen
    pub accelerator: Accelerator,
    /// Why
    pub reason: String,
}

/// Chooses an accelerator, or takes the wished one.
///
/// That `/dev/kvm` opens says little: in some nested set-ups it does, and then
/// runs a guest in software, wrongly. So the processor must say itself, in
/// `/proc/cpuinfo`, that it can.
#[must_use]
pub fn choose(wish: Option<Accelerator>) -> Choice {
    if let Some(accelerator) = wish {
        return Choice { accelerator, reason: "set in the configuration".to_owned() };
    }
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    if !has_virtualisation(&cpuinfo) {
        let reason = "the processor shows neither vmx nor svm".to_owned();
        return Choice { accelerator: Accelerator::Tcg, reason };
    }
    match std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => Choice {
            accelerator: Accelerator::Kvm,
            reason: "the processor can and /dev/kvm opens".to_owned(),
        },
        Err(error) => Choice {
            accelerator: Accelerator::Tcg,
            reason: format!("/dev/kvm does not open: {error}"),
        },
    }
}

fn has_virtualisation(cpuinfo: &str) -> bool {
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    flags.split_whitespace().any(|flag| matches!(flag, "vmx" | "svm"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_processor_s_own_flags_count() {
        assert!(has_virtualisation("processor: 0\nflags\t\t: fpu vmx sse\n"));
        assert!(has_virtualisation("flags : svm"));
        assert!(!has_virtualisation("flags : fpu svm_lock avx vmxoff"));
        assert!(!has_virtualisation("model name : svm"));
        assert_eq!(choose(Some(Accelerator::Kvm)).accelerator, Accelerator::Kvm);
    }
}
