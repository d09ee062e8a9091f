//! The life of a process: started, known again, ended.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};

use super::*;
use crate::power::{self, RunState};
use crate::process::{ProcessError, ProcessId};
use crate::quirk::VERSION_MIN;

#[tokio::test]
async fn a_binary_says_what_it_can_do() {
    for binary in qemu_binaries() {
        let facts = facts(&binary).await;
        assert!(facts.version >= VERSION_MIN);
        let q35 = facts.resolve_machine("q35").expect("an alias").to_owned();
        assert!(q35.starts_with("pc-q35-"), "{q35}");
        assert_eq!(facts.resolve_machine(&q35), Some(&*q35));
        assert_eq!(facts.resolve_machine("pc-q35-99.0"), None);
        assert!(facts.machines().any(|machine| machine == "pc-q35-7.2"));
        assert_eq!(facts.missing_commands(), [""; 0]);
        assert_eq!(facts.lacking_features("qemu64"), Some(Vec::new()));
        assert_eq!(facts.lacking_features("no-such-model"), None);
        assert!(facts.cpu_features("max").iter().any(|feature| feature == "sse2"));
        assert!(facts.cpu_features("qemu64").is_empty());
        assert_eq!(facts.cpu_features("qemu64,+avx2"), ["avx2"]);
        for name in ["microvm", "isapc", "none"] {
            assert_eq!(facts.resolve_machine(name), None, "{name} has no version");
        }
    }

    let nothing = probe::probe(Path::new("/bin/true"), Accelerator::Tcg, None).await;
    assert!(matches!(nothing, Err(probe::ProbeError::Qmp { .. })), "{nothing:?}");
    // What it says of its own fate is told.
    let other = probe::probe(Path::new("/bin/cat"), Accelerator::Tcg, None).await;
    let told = other.expect_err("no QEMU").to_string();
    assert!(told.contains("cat: invalid option"), "{told}");
}

/// Scenario: a QEMU runs as another user, in a session of its own; it is found
/// again by its number and start time, and nobody else is taken for it.
#[tokio::test]
async fn a_qemu_is_recognised_until_it_ends() {
    let folder = folder();
    let qemu = start(folder.path(), &spec(folder.path(), Vec::new())).await;
    let id = qemu.process.id.clone();
    let socket = folder.path().join(launch::QMP_SOCKET);
    let status = std::fs::read_to_string(format!("/proc/{}/status", id.pid)).expect("its status");
    let uid = nobody().map_or(rustix::process::geteuid().as_raw(), |user| user.uid).to_string();
    let uids = status.lines().find_map(|line| line.strip_prefix("Uid:")).expect("its users");
    assert!(uids.split_whitespace().all(|found| found == uid), "{uids}");
    let pid = rustix::process::Pid::from_raw(id.pid.try_into().expect("a number"));
    assert_eq!(rustix::process::getsid(pid).ok(), pid, "it leads a session");
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", id.pid)).expect("its limits");
    assert!(limits.contains("Max core file size        0 "), "{limits}");

    assert_eq!(power::query_status(&qemu.qmp).await.expect("an answer"), RunState::Prelaunch);
    power::cont(&qemu.qmp).await.expect("it runs");
    assert_eq!(power::query_status(&qemu.qmp).await.expect("an answer"), RunState::Running);
    power::stop(&qemu.qmp).await.expect("it stops");
    assert_eq!(power::query_status(&qemu.qmp).await.expect("an answer"), RunState::Paused);
    power::announce_self(&qemu.qmp).await.expect("it announces");

    let copy: ProcessId =
        serde_json::from_str(&serde_json::to_string(&id).expect("text")).expect("an id");
    assert!(process::is_alive(&copy));
    let other = ProcessId { start_time_ticks: id.start_time_ticks + 1, ..id.clone() };
    assert!(!process::is_alive(&other), "the number alone proves nothing");
    process::kill(&other).await.expect("nothing to do");
    assert!(process::is_alive(&id), "another process was meant");

    process::kill(&id).await.expect("it ends");
    qemu.qmp.wait_closed().await;
    assert!(qemu.qmp.is_closed() && !process::is_alive(&id));
    process::wait_exit(&id, START_MAX).await.expect("it is gone");
    let gone = process::connect(&id, &socket, Duration::ZERO).await;
    assert!(matches!(gone, Err(ProcessError::Silent(_))), "{gone:?}");
    // No zombie stays; the runtime reaps it in its own time.
    while Path::new(&format!("/proc/{}", id.pid)).exists() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Goal: the memory of a guest is the memfd that was created for it, also for an agent
/// that has restarted and knows no more than QEMU's process, and its size is sealed.
#[tokio::test]
async fn guest_ram_is_the_inherited_memfd() {
    for binary in qemu_binaries() {
        let folder = folder();
        let mut vm = spec(folder.path(), vec![]);
        // The size of an emulated guest, which is no whole MiB.
        vm.ram_bytes = Accelerator::Tcg.ram_bytes(RAM_BYTES);
        let created = ram::create(vm.ram_bytes).expect("memory");
        let agents_own: File = created.try_clone().expect("a descriptor").into();
        let qemu = start_with_ram(&binary, folder.path(), &vm, created).await;
        // The firmware writes into memory once the guest runs.
        power::cont(&qemu.qmp).await.expect("it runs");

        let found = ram::open(&qemu.process.id, vm.ram_bytes).expect("its memory");
        let metadata = |file: &File| file.metadata().expect("its metadata");
        assert_eq!(metadata(&found).ino(), metadata(&agents_own).ino());
        while metadata(&found).blocks() == 0 {
            assert!(process::is_alive(&qemu.process.id));
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert!(found.set_len(0).is_err() && found.set_len(vm.ram_bytes * 2).is_err());
        let other = ram::open(&qemu.process.id, RAM_BYTES);
        assert!(matches!(other, Err(ProcessError::NoRam { .. })), "{other:?}");
        process::kill(&qemu.process.id).await.expect("it ends");
        found.read_exact_at(&mut [0], vm.ram_bytes - 1).expect("memory outlives QEMU");
    }
}

/// Scenario: the agent goes and comes back; QEMU runs on, and another process that
/// answers at its socket is not taken for it.
#[tokio::test]
async fn only_the_process_itself_is_reconnected_to() {
    let folder = folder();
    let Running { process, qmp } = start(folder.path(), &spec(folder.path(), Vec::new())).await;
    let socket = folder.path().join(launch::QMP_SOCKET);
    power::cont(&qmp).await.expect("it runs");
    // QEMU speaks to one client at a time: the first goes before the next comes.
    drop(qmp);
    let qmp = process::connect(&process.id, &socket, START_MAX).await.expect("it answers");
    assert_eq!(power::query_status(&qmp).await.expect("an answer"), RunState::Running);
    drop(qmp);
    let other = ProcessId { pid: std::process::id(), start_time_ticks: 1 };
    let stranger = process::connect(&other, &socket, START_MAX).await;
    assert!(
        matches!(stranger, Err(ProcessError::Stranger { found }) if found == Some(process.id.pid)),
        "{stranger:?}"
    );
    let qmp = process::connect(&process.id, &socket, START_MAX).await.expect("it answers");
    power::quit(&qmp).await.expect("it quits");
    process::wait_exit(&process.id, START_MAX).await.expect("it is gone");
}

#[tokio::test]
async fn a_qemu_that_does_not_start_says_why() {
    let folder = folder();
    let args = vec!["-machine".into(), "no-such-machine".into()];
    let process = spawn(folder.path(), &qemu_binary(), args, InheritedFds::default()).await;
    let ready = process.wait_ready(&folder.path().join(launch::QMP_SOCKET), START_MAX).await;
    match ready {
        Err(ProcessError::Ended { log }) => {
            assert!(log.contains("unsupported machine type"), "{log}")
        }
        other => panic!("{other:?}"),
    }
    let mut spec = ProcessSpec {
        binary: "/no/such/program".into(),
        args: Vec::new(),
        user: None,
        cgroup: None,
        stderr_log: folder.path().join("log"),
        inherited: InheritedFds::default(),
    };
    assert!(matches!(process::spawn(&spec).await, Err(ProcessError::Start { .. })));
    for _ in 0..=process::INHERITED_COUNT_MAX {
        spec.inherited.add(File::open("/dev/null").expect("it is there").into());
    }
    assert!(matches!(process::spawn(&spec).await, Err(ProcessError::TooMany { .. })));
}

/// Scenario: a child gets the descriptors it was given, at the promised numbers,
/// and no other; one that cannot start writes nothing into them.
#[tokio::test]
async fn a_child_inherits_what_it_was_given_and_nothing_else() {
    let folder = folder();
    let given = |text: &str| -> OwnedFd {
        let path = folder.path().join(text);
        File::create(&path).expect("a file").write_all(text.as_bytes()).expect("written");
        File::open(path).expect("a file").into()
    };
    // One that the agent inherited from a careless parent.
    let stray = File::open("/dev/null").expect("it is there");
    rustix::io::fcntl_setfd(&stray, rustix::io::FdFlags::empty()).expect("it stays open");
    let mut inherited = InheritedFds::default();
    let script = format!(
        "cat /dev/fd/{} /dev/fd/{}; echo; ls -m /proc/$$/fd; sleep 60",
        inherited.add(given("a")),
        inherited.add(given("b"))
    );
    let args = vec!["-c".into(), script.into()];
    let child = spawn(folder.path(), Path::new("/bin/sh"), args, inherited).await;
    let log = folder.path().join("qemu.log");
    while !process::log_tail(&log).contains("0, 1") {
        assert!(process::is_alive(&child.id), "{}", process::log_tail(&log));
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(process::log_tail(&log), "ab; 0, 1, 10, 11, 2");
    process::kill(&child.id).await.expect("it ends");

    let path = folder.path().join("tap");
    let mut inherited = InheritedFds::default();
    for _ in 0..process::INHERITED_COUNT_MAX {
        inherited.add(File::create(&path).expect("a file").into());
    }
    let spec = ProcessSpec {
        binary: "/no/such/program".into(),
        args: Vec::new(),
        user: None,
        cgroup: None,
        stderr_log: folder.path().join("log"),
        inherited,
    };
    assert!(matches!(process::spawn(&spec).await, Err(ProcessError::Start { .. })));
    assert_eq!(std::fs::metadata(&path).expect("a file").len(), 0);
}
