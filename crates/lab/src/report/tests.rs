//! Reports from made-up numbers.

use super::*;

/// Progress of a move of nine seconds: its disk first, then its memory.
fn samples() -> Vec<Sample> {
    (0..=90u32)
        .map(|n| {
            let at_ms = f64::from(n) * 100.0;
            let disk = u64::from(n.clamp(2, 50) - 2) * 10_400_000;
            let ram = u64::from(n.clamp(50, 82) - 50) * 9_700_000;
            Sample {
                at_ms,
                wire_bytes: [
                    disk,
                    ram,
                    u64::from(n.saturating_sub(82)) * 90_000,
                    (disk + ram) / 90,
                ],
                disk: (disk, 48 * 10_400_000),
                memory: (ram * 3 / 2, 32 * 14_550_000),
            }
        })
        .collect()
}

/// A move with every part that a report can show.
fn made_up() -> Report {
    let span = |name: &str, from_ms: f64, to_ms: f64| Span { name: name.into(), from_ms, to_ms };
    let beats = (0..1800u32)
        .filter(|n| !(1652..1670).contains(n))
        .map(|n| Beat { at_ms: f64::from(n) * 5.0, at_destination: n > 1660 })
        .collect();
    let part = |name: &str, ms: f64| Part { name: name.into(), ms };
    let it = Move {
        vm: "web<1>".into(),
        source: "a".into(),
        destination: "b".into(),
        outcome: "moved".into(),
        total_ms: 9_000.0,
        phases: vec![
            span("prepare", 0.0, 210.0),
            span("mirror", 210.0, 5_020.0),
            span("pre-copy", 5_020.0, 8_262.0),
            span("switchover", 8_262.0, 8_340.0),
            span("retire", 8_340.0, 9_000.0),
        ],
        samples: samples(),
        moved: Pages {
            zero: 98_304,
            unchanged: 1_204,
            difference: 23_881,
            full: 54_020,
            memory_bytes: (465_600_000, 310_400_000),
            disk_bytes: (536_870_912, 499_200_000),
            disk_hole_bytes: 1_610_612_736,
            device_bytes: 720_000,
            wire_bytes: 819_300_000,
        },
        downtime: vec![
            part("stop", 6.1),
            part("final round", 21.4),
            part("device state", 30.2),
            part("commit", 11.0),
            part("resume", 5.7),
        ],
        stopped_at_ms: Some(8_262.0),
        beats,
        beats_lost: 0,
        blackout: Some(span("blackout", 8_255.0, 8_350.0)),
        longest_silence: Some(span("silence", 8_255.0, 8_350.0)),
        client: Some(ClientNoticed {
            sessions: 4,
            answers: 12_345,
            broken: 0,
            wrong: 0,
            longest_gap_ms: 204.0,
        }),
        link_bytes_per_second: Some(125e6),
    };
    Report {
        title: "Limosa demo".into(),
        machine: "2 processors, TCG, 1000 Mbit/s".into(),
        moves: vec![it],
    }
}

/// Writes the pictures for people who want to look at them.
#[test]
fn report_is_written_whole() {
    let report = made_up();
    let page = html(&report);
    if let Some(folder) = std::env::var_os("LIMOSA_LAB_SHOW") {
        let folder = std::path::Path::new(&folder);
        std::fs::write(folder.join("report.html"), &page).unwrap();
        std::fs::write(folder.join("report.svg"), svg(&report.moves[0])).unwrap();
        std::fs::write(folder.join("report.txt"), terminal::text(&report)).unwrap();
    }
    assert!(page.contains("web&lt;1&gt;") && !page.contains("web<1>"));
    for text in ["prepare", "mirror", "pre-copy", "blackout 95.0 ms", "74.4 ms", "819.3 MB"] {
        assert!(page.contains(text), "{text} is missing");
    }
    assert!(!page.contains("NaN") && !page.contains("inf"));
}

/// Goal: what did not happen is left out, and nothing breaks on it.
#[test]
fn a_move_that_stayed_has_a_report_too() {
    let mut report = made_up();
    let it = &mut report.moves[0];
    *it = Move {
        vm: "web1".into(),
        outcome: "stayed".into(),
        total_ms: 0.0,
        samples: vec![Sample::default(); 3],
        ..Move::default()
    };
    let page = html(&report);
    assert!(page.contains("stayed") && !page.contains("NaN") && !page.contains("Switchover"));
    let text = terminal::text(&report);
    assert!(text.contains("stayed in 0.0 ms") && !text.contains("blackout"), "{text}");
}

/// Goal: numbers are read at a glance and rounded at the right places.
#[test]
fn numbers_read_well() {
    assert_eq!(format::bytes(999), "999 B");
    assert_eq!(format::bytes(312_440_000), "312.4 MB");
    assert_eq!(format::bytes(1_000_000_000), "1.00 GB");
    assert_eq!(format::duration(63.14), "63.1 ms");
    assert_eq!(format::duration(999.7), "1.00 s");
    assert_eq!(format::duration(125_000.0), "2 min 05 s");
    assert_eq!(format::count(1_234_567), "1,234,567");
    assert_eq!(format::plural(1, "page"), "1 page");
}

/// Goal: terminals show every phase, however short.
#[test]
fn every_phase_is_in_the_bar() {
    let text = terminal::text(&made_up());
    let bar = text.lines().find(|line| line.contains('█')).unwrap();
    assert!(bar.contains('▒') && bar.contains('▓'), "{text}");
}
