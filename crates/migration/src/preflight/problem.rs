//! What stands against a move, one item of it.

use limosa_protocol::id::HostName;
use limosa_protocol::migration::{Problem, ProblemCode};
use limosa_qemu::quirk::VERSION_MIN;
use limosa_qemu::version::Version;

/// A problem and how to solve it.
pub(super) fn problem(
    code: ProblemCode,
    message: impl Into<String>,
    remedy: impl Into<String>,
) -> Problem {
    Problem { code, message: message.into(), remedy: remedy.into() }
}

/// Whether a host's QEMU can do what Limosa needs of it.
pub(super) fn check_qemu(host: &HostName, version: Version, missing: &[&str]) -> Option<Problem> {
    let wanted = format!("install QEMU {VERSION_MIN} or newer on {host}, then restart limosad");
    if version < VERSION_MIN {
        let what = format!("QEMU of {host} is {version}, older than {VERSION_MIN}");
        return Some(problem(ProblemCode::QemuVersion, what, wanted));
    }
    (!missing.is_empty()).then(|| {
        let what = format!("QEMU {version} of {host} lacks what is needed: {}", missing.join(", "));
        let remedy = format!("{wanted}; if it is newer already, upgrade Limosa");
        problem(ProblemCode::QemuVersion, what, remedy)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> HostName {
        "b".parse().unwrap()
    }

    #[test]
    fn a_qemu_too_old_or_without_a_command_is_told() {
        let version = |major, minor| Version { major, minor, micro: 0 };
        let told = check_qemu(&host(), version(7, 1), &[]).unwrap();
        assert_eq!(told.code, ProblemCode::QemuVersion);
        assert!(told.message.contains("7.1.0") && told.remedy.contains("7.2.0"), "{told:?}");
        let told = check_qemu(&host(), version(12, 0), &["migrate_cancel"]).unwrap();
        assert!(told.message.contains("migrate_cancel"), "{told:?}");
        assert_eq!(check_qemu(&host(), version(7, 2), &[]), None);
        assert_eq!(check_qemu(&host(), version(11, 0), &[]), None);
    }
}
