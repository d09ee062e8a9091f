//! The report as one HTML page that needs nothing else.

use std::fmt::Write;

use super::canvas::escape;
use super::{Move, Report, format, timeline};

const STYLE: &str = "\
body{margin:0;background:#eef0f3;color:#3d4653;font:14px/1.5 'Inter','Segoe UI','DejaVu Sans',Helvetica,Arial,sans-serif}\
main{max-width:1120px;margin:0 auto;padding:28px 20px}h1{font-size:24px;color:#17202c;margin:0 0 4px}\
.machine{color:#6b7583;margin:0 0 20px}section{background:#fff;border-radius:10px;margin:0 0 24px;padding-bottom:8px;\
box-shadow:0 1px 3px rgba(20,30,45,.12);overflow-x:auto}svg{display:block;width:100%;height:auto;min-width:760px}\
table{border-collapse:collapse;margin:4px 28px 20px}td,th{padding:4px 18px 4px 0;text-align:left;vertical-align:top}\
th{font-weight:600;color:#17202c;white-space:nowrap}";

/// The whole page.
pub(crate) fn html(report: &Report) -> String {
    let mut body = String::new();
    for it in &report.moves {
        // Writing to a string cannot fail.
        let _ = write!(body, "<section>\n{}<table>\n", timeline::svg(it));
        for (name, text) in facts(it) {
            let _ = writeln!(body, "<tr><th>{}</th><td>{}</td></tr>", escape(name), escape(&text));
        }
        body.push_str("</table>\n</section>\n");
    }
    let title = escape(&report.title);
    let machine = escape(&report.machine);
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n\
         <h1>{title}</h1>\n<p class=\"machine\">{machine}</p>\n{body}</main>\n</body>\n</html>\n"
    )
}

/// What the report says in words, by name; the same on the page and in a terminal.
pub(super) fn facts(it: &Move) -> Vec<(&'static str, String)> {
    let pages = &it.moved;
    let phases: Vec<_> = it
        .phases
        .iter()
        .map(|phase| format!("{} {}", phase.name, format::duration(phase.ms())))
        .collect();
    let mut facts = vec![
        ("phases", phases.join(", ")),
        ("on the wire", wire_fact(it)),
        (
            "memory",
            format!(
                "{} full, {} different, {} unchanged, {} zero; {} packed to {}",
                format::plural(pages.full, "page"),
                format::count(pages.difference),
                format::count(pages.unchanged),
                format::count(pages.zero),
                format::bytes(pages.memory_bytes.0),
                format::bytes(pages.memory_bytes.1),
            ),
        ),
        (
            "disk",
            format!(
                "{} packed to {}; {} of holes not sent",
                format::bytes(pages.disk_bytes.0),
                format::bytes(pages.disk_bytes.1),
                format::bytes(pages.disk_hole_bytes),
            ),
        ),
    ];
    if !it.downtime.is_empty() {
        let total: f64 = it.downtime.iter().map(|part| part.ms).sum();
        let parts: Vec<_> =
            it.downtime.iter().map(|part| format!("{} {:.1}", part.name, part.ms)).collect();
        facts.push(("downtime", format!("{}: {}", format::duration(total), parts.join(", "))));
    }
    if let Some(blackout) = &it.blackout {
        let mut text = format!("{} seen from outside", format::duration(blackout.ms()));
        if let Some(silence) = &it.longest_silence {
            let _ = write!(
                text,
                "; longest silence of the whole move {}",
                format::duration(silence.ms())
            );
        }
        facts.push(("blackout", text));
    }
    let seen = u64::try_from(it.beats.len()).unwrap_or(u64::MAX);
    facts.push((
        "heartbeats",
        format!("{} seen, {} lost", format::count(seen), format::count(it.beats_lost)),
    ));
    if let Some(client) = &it.client {
        facts.push((
            "client",
            format!(
                "{}, {} checked, {} broken, {} wrong, longest gap {}",
                format::plural(client.sessions, "TCP session"),
                format::plural(client.answers, "answer"),
                format::count(client.broken),
                format::plural(client.wrong, "byte"),
                format::duration(client.longest_gap_ms),
            ),
        ));
    }
    facts
}

fn wire_fact(it: &Move) -> String {
    let pages = &it.moved;
    let known = pages.disk_bytes.1 + pages.memory_bytes.1 + pages.device_bytes;
    format!(
        "{}: disk {}, memory {}, device state {}, framing {}",
        format::bytes(pages.wire_bytes),
        format::bytes(pages.disk_bytes.1),
        format::bytes(pages.memory_bytes.1),
        format::bytes(pages.device_bytes),
        format::bytes(pages.wire_bytes.saturating_sub(known)),
    )
}
