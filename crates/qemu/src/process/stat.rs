//! The state of a process as the kernel reports it in `/proc/PID/stat`.

/// The fields of `/proc/PID/stat` that tell processes apart and show their end.
pub(super) struct ProcessStat {
    pub(super) start_time_ticks: u64,
    pub(super) has_ended: bool,
}

pub(super) fn process_stat(pid: u32) -> Option<ProcessStat> {
    parse_stat(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// Reads a line of `/proc/PID/stat` (`proc_pid_stat(5)`).
fn parse_stat(line: &str) -> Option<ProcessStat> {
    // The name in parentheses may hold anything, so the fields are counted from
    // its end: state is the third of all, the number of threads the 20th, start time
    // the 22nd.
    let (_, fields) = line.rsplit_once(") ")?;
    let mut fields = fields.split(' ');
    let state = fields.next()?;
    let threads: u32 = fields.nth(16)?.parse().ok()?;
    let start_time_ticks = fields.nth(1)?.parse().ok()?;
    // The first thread of a killed process may be a zombie while another one still
    // holds the files open, and with them the locks of the images.
    let has_ended = state == "X" || (state == "Z" && threads <= 1);
    Some(ProcessStat { start_time_ticks, has_ended })
}

#[cfg(test)]
mod tests {
    use super::parse_stat;

    #[test]
    fn a_zombie_with_threads_has_not_ended() {
        let line = |state: &str, threads: u32| {
            let before = "0 1 1 0 -1 4194304 9 0 0 0 1 1 0 0 20 0";
            format!("77 (qemu (a) b) {state} {before} {threads} 0 4711 0 0\n")
        };
        for (state, threads, has_ended) in
            [("S", 4, false), ("R", 1, false), ("Z", 2, false), ("Z", 1, true), ("X", 1, true)]
        {
            let stat = parse_stat(&line(state, threads)).expect("a line of the kernel's form");
            assert_eq!(stat.has_ended, has_ended, "{state} with {threads} threads");
            assert_eq!(stat.start_time_ticks, 4711);
        }
        assert!(parse_stat("77 (qemu) Z 1 2").is_none(), "a line that is cut off");
    }
}
