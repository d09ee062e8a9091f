//! The memory of this host.

/// What the kernel reports of its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    pub total_bytes: u64,
    /// What new programs can use without swapping
    pub available_bytes: u64,
}

impl Memory {
    /// Reads `/proc/meminfo`.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn read() -> std::io::Result<Self> {
        std::fs::read_to_string("/proc/meminfo").map(|text| Self::parse(&text))
    }

    fn parse(text: &str) -> Self {
        let bytes = |name: &str| {
            text.lines()
                .find_map(|line| {
                    line.strip_prefix(name)?.split_whitespace().next()?.parse::<u64>().ok()
                })
                .map_or(0, |kib| kib << 10)
        };
        Self { total_bytes: bytes("MemTotal:"), available_bytes: bytes("MemAvailable:") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_in_kib() {
        let text = "MemTotal:       24594412 kB\nMemFree:  100 kB\nMemAvailable:   2048 kB\n";
        let memory = Memory { total_bytes: 24_594_412 << 10, available_bytes: 2 << 20 };
        assert_eq!(Memory::parse(text), memory);
    }
}
