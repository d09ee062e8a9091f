//! What the kernel's command line asks of the workload.
//!
//! | word | default | meaning |
//! |------|---------|---------|
//! | `limosa.dirty_mb_s=N` | 20 | memory dirtied, in MB a second |
//! | `limosa.qwords=N` | 8 | words changed in each dirtied page |
//! | `limosa.memory_mib=N` | a third of what is free | self-checking memory |
//! | `limosa.freed_mib=N` | 0 | memory that is filled, and freed on request |
//! | `limosa.disk_kb_s=N` | 1000 | journal written on each disk, in kB a second |
//! | `limosa.client=IP` | 10.78.0.100 | where heartbeats go |

use std::net::{IpAddr, Ipv4Addr};

/// Least and most self-checking memory, in MiB.
const MEMORY_MIB: std::ops::RangeInclusive<u64> = 16..=16 << 10;

/// What the workload does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Settings {
    /// Memory dirtied, in bytes a second
    pub dirty_bytes_s: u64,
    /// Words changed in each dirtied page
    pub qwords: usize,
    /// Self-checking memory
    pub memory_mib: u64,
    /// Memory that is filled, and freed on request
    pub freed_mib: u64,
    /// Journal on each disk, in bytes a second
    pub disk_bytes_s: u64,
    /// Where heartbeats go
    pub client: IpAddr,
}

impl Settings {
    /// Reads them; also returns a complaint for each word that cannot be read.
    ///
    /// - `free_mib`: memory that is free.
    pub(crate) fn parse(line: &str, free_mib: u64) -> (Self, Vec<String>) {
        let mut settings = Self {
            dirty_bytes_s: 20_000_000,
            qwords: 8,
            memory_mib: (free_mib / 3).clamp(*MEMORY_MIB.start(), *MEMORY_MIB.end()),
            freed_mib: 0,
            disk_bytes_s: 1_000_000,
            client: Ipv4Addr::new(10, 78, 0, 100).into(),
        };
        let mut complaints = Vec::new();
        for setting in line.split_whitespace().filter_map(|setting| setting.strip_prefix("limosa."))
        {
            if settings.take(setting).is_none() {
                complaints
                    .push(format!("the command line says limosa.{setting}, which means nothing"));
            }
        }
        (settings, complaints)
    }

    fn take(&mut self, setting: &str) -> Option<()> {
        let (name, value) = setting.split_once('=')?;
        match name {
            "dirty_mb_s" => {
                self.dirty_bytes_s = value.parse::<u64>().ok()?.checked_mul(1_000_000)?
            }
            "qwords" => self.qwords = value.parse().ok()?,
            "memory_mib" => {
                self.memory_mib = value.parse().ok().filter(|mib| MEMORY_MIB.contains(mib))?;
            }
            "freed_mib" => {
                self.freed_mib = value.parse().ok().filter(|mib| mib <= MEMORY_MIB.end())?;
            }
            "disk_kb_s" => self.disk_bytes_s = value.parse::<u64>().ok()?.checked_mul(1_000)?,
            "client" => self.client = value.parse().ok()?,
            _ => return None,
        }
        Some(())
    }
}

/// MiB that `/proc/meminfo` calls available.
pub(crate) fn free_mib(meminfo: &str) -> u64 {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0) >> 10
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: known words are read, and a wrong one is told, never guessed.
    #[test]
    fn settings_are_read_or_reported() {
        let line =
            "console=ttyS0 limosa.dirty_mb_s=200 limosa.client=fd00::1 limosa.qwords=x limosa.y";
        let (settings, complaints) = Settings::parse(line, 300);
        assert_eq!(settings.dirty_bytes_s, 200_000_000);
        assert_eq!(settings.client, "fd00::1".parse::<IpAddr>().unwrap());
        assert_eq!((settings.qwords, settings.memory_mib), (8, 100));
        assert_eq!(complaints.len(), 2);
        assert_eq!(free_mib("MemTotal: 5 kB\nMemAvailable:  204800 kB\n"), 200);
    }
}
