//! Medians of several runs, as a table to read and to copy.

use super::Measured;
use crate::{print_line, report};

/// Prints a line for each guest and way of moving it: medians of what converged.
pub(super) fn show(all: &[(&str, Measured)]) {
    let mut groups: Vec<(&str, &str, Vec<&Measured>)> = Vec::new();
    for (guest, one) in all {
        match groups.iter_mut().find(|(of, how, _)| of == guest && *how == one.how) {
            Some((_, _, own)) => own.push(one),
            None => groups.push((guest, &one.how, vec![one])),
        }
    }
    print_line(
        "\nmedians\n| guest | | total | disk | memory | on the wire | blackout | converged |",
    );
    print_line("|---|---|---|---|---|---|---|---|");
    for (guest, how, own) in groups {
        let (run_count, count) = (own.len(), own.iter().filter(|one| one.converged).count());
        // Those of one that never converges are of the time until it was cancelled.
        let own: Vec<_> = own.into_iter().filter(|one| one.converged || count == 0).collect();
        let of = |get: fn(&Measured) -> f64| median(own.iter().map(|one| get(one)).collect());
        let wire = report::format::bytes(
            median(own.iter().map(|one| one.wire_bytes).collect()).unwrap_or_default(),
        );
        print_line(&format!(
            "| {guest} | {how} | {:.1} s | {:.1} s | {:.1} s | {wire} | {} | {count} of {} |",
            of(|one| one.total_s).unwrap_or(f64::NAN),
            of(|one| one.mirror_s).unwrap_or(f64::NAN),
            of(|one| one.memory_s).unwrap_or(f64::NAN),
            median(own.iter().filter_map(|one| one.blackout_ms).collect())
                .map_or("-".to_owned(), |ms| format!("{ms:.0} ms")),
            run_count,
        ));
    }
}

/// The middle one; of an even number the lower of the two.
fn median<T: PartialOrd + Copy>(mut values: Vec<T>) -> Option<T> {
    values.sort_by(|a, b| a.partial_cmp(b).unwrap_or(std::cmp::Ordering::Equal));
    values.get(values.len().checked_sub(1)? / 2).copied()
}

#[cfg(test)]
mod tests {
    use super::median;

    #[test]
    fn the_middle_one() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4, 1, 3, 2]), Some(2));
        assert_eq!(median::<u8>(vec![]), None);
    }
}
