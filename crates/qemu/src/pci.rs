//! The map of the PCI root bus, which is guest ABI: a guest that moves, or wakes up in
//! another QEMU, must find each device at its address.
//!
//! | slot | device | on |
//! |---|---|---|
//! | 0x00 | host bridge | all |
//! | 0x01 | ISA bridge, IDE, power management | `pc`; free on `q35` |
//! | 0x02 – 0x09 | NICs, in the definition's order | all |
//! | 0x0a – 0x19 | disks, in the definition's order | all |
//! | 0x1a | root ports `rp0` to `rp7`, functions 0 to 7, for devices plugged in later | `q35` |
//! | 0x1b | balloon `bal0` | all |
//! | 0x1c | *reserved:* VGA | |
//! | 0x1d | *reserved:* xhci, with a tablet | |
//! | 0x1e | *reserved:* function 0 virtio-serial (ports: guest agent, Limosa's own), function 1 rng | |
//! | 0x1f | ISA bridge, AHCI, SMBus | `q35`; free on `pc` |
//!
//! CD-ROMs are units of the chipset's IDE or AHCI. `vmgenid` has no PCI address.
//!
//! **Invariants.** Every device of the command line has an explicit bus and address.
//! Ranges never overlap, and a range never changes: its slots belong to it even when
//! they are empty.

/// Slots of the root bus that belong to one kind of device.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Slots {
    first: u8,
    last: u8,
}

/// Slots of a PCI bus.
const SLOT_COUNT: u8 = 32;

pub(crate) const NICS: Slots = Slots { first: 0x02, last: 0x09 };
pub(crate) const DISKS: Slots = Slots { first: 0x0a, last: 0x19 };
pub(crate) const ROOT_PORT_SLOT: u8 = 0x1a;
pub(crate) const BALLOON_SLOT: u8 = 0x1b;
const VGA_SLOT: u8 = 0x1c;
const USB_SLOT: u8 = 0x1d;
const SERIAL_AND_RNG_SLOT: u8 = 0x1e;
const CHIPSET_FIRST: Slots = Slots { first: 0x00, last: 0x01 };
const CHIPSET_LAST: Slots = Slots::one(0x1f);

/// Root ports, one for each function of their slot.
pub(crate) const ROOT_PORT_COUNT: u8 = 8;

/// The whole bus, in its order.
const MAP: [Slots; 9] = [
    CHIPSET_FIRST,
    NICS,
    DISKS,
    Slots::one(ROOT_PORT_SLOT),
    Slots::one(BALLOON_SLOT),
    Slots::one(VGA_SLOT),
    Slots::one(USB_SLOT),
    Slots::one(SERIAL_AND_RNG_SLOT),
    CHIPSET_LAST,
];
const _: () = assert!(covers_each_slot_once(&MAP), "the map has a gap or an overlap");

const fn covers_each_slot_once(map: &[Slots]) -> bool {
    let (mut next, mut index) = (0, 0);
    while index < map.len() {
        if map[index].first != next || map[index].last < next {
            return false;
        }
        next = map[index].last + 1;
        index += 1;
    }
    next == SLOT_COUNT
}

impl Slots {
    const fn one(slot: u8) -> Self {
        Self { first: slot, last: slot }
    }

    /// How many slots there are.
    pub(crate) fn count(self) -> usize {
        self.each().count()
    }

    /// The slots in their order.
    pub(crate) fn each(self) -> impl Iterator<Item = u8> {
        self.first..=self.last
    }
}

/// The buses of a machine's chipset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Chipset {
    /// PCI Express: devices are plugged in below root ports
    Q35,
    /// Conventional PCI: the root bus takes them itself
    I440fx,
}

impl Chipset {
    /// - `machine`: a machine type, versioned or not.
    pub(crate) fn of(machine: &str) -> Self {
        if machine.contains("q35") { Self::Q35 } else { Self::I440fx }
    }

    /// Name of the root bus.
    pub(crate) fn root_bus(self) -> &'static str {
        match self {
            Self::Q35 => "pcie.0",
            Self::I440fx => "pci.0",
        }
    }

    /// How many CD-ROMs the chipset has room for.
    pub(crate) fn cdrom_count_max(self) -> usize {
        match self {
            Self::Q35 => 6,
            Self::I440fx => 4,
        }
    }

    /// Bus and unit of a CD-ROM.
    pub(crate) fn cdrom_address(self, index: usize) -> String {
        match self {
            Self::Q35 => format!("bus=ide.{index},unit=0"),
            Self::I440fx => format!("bus=ide.{},unit={}", index / 2, index % 2),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: a map in which two ranges share a slot, or which forgets one, is noticed.
    #[test]
    fn a_map_with_an_overlap_or_a_gap_is_refused() {
        assert!(covers_each_slot_once(&MAP));
        let mut overlap = MAP;
        overlap[2].first -= 1;
        assert!(!covers_each_slot_once(&overlap));
        let mut gap = MAP;
        gap[1].last -= 1;
        assert!(!covers_each_slot_once(&gap));
        assert!(!covers_each_slot_once(&MAP[..8]));
    }

    /// Goal: addresses are guest ABI; whoever changes one changes this test.
    #[test]
    fn addresses_stay() {
        assert_eq!(NICS.each().collect::<Vec<_>>(), (2..=9).collect::<Vec<_>>());
        assert_eq!(DISKS.each().collect::<Vec<_>>(), (10..=25).collect::<Vec<_>>());
        assert_eq!((ROOT_PORT_SLOT, BALLOON_SLOT), (0x1a, 0x1b));
        assert_eq!(Chipset::of("pc-q35-7.2").cdrom_address(1), "bus=ide.1,unit=0");
        assert_eq!(Chipset::of("pc-i440fx-7.2").cdrom_address(3), "bus=ide.1,unit=1");
    }
}
