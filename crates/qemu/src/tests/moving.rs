//! Mirrors and migrations between two real QEMUs, without anything in between.

use std::os::unix::fs::FileExt;

use tokio::sync::broadcast;

use super::*;
use crate::block::{self, MirrorSync};
use crate::migrate::{self, MigrationStatus, SourceParameters};
use crate::power::{self, RunState};
use crate::qmp::{QmpError, QmpEvent};

const JOB: &str = "mirror-root";
const EXPORT: &str = "export-root";
const GRANULARITY_BYTES: u32 = 65_536;

/// The binaries of a source and of its destination.
type Qemus = [PathBuf; 2];

/// Each QEMU to itself, and the older to the newer.
fn every_way() -> Vec<Qemus> {
    let old = qemu_binary();
    let mut ways = vec![[old.clone(), old.clone()]];
    if let Some(new) = newer_qemu() {
        ways.extend([[new.clone(), new.clone()], [old, new]]);
    }
    ways
}

/// A source and a waiting destination, each with its folder and its disk.
struct Pair {
    source: Running,
    destination: Running,
    folders: [tempfile::TempDir; 2],
}

impl Pair {
    async fn start(qemus: &Qemus, format: ImageFormat, content: impl Fn(&Path)) -> Self {
        let folders = [folder(), folder()];
        let disks = [folders[0].path().join("disk"), folders[1].path().join("disk")];
        content(&disks[0]);
        let size = std::fs::metadata(&disks[0]).expect("a disk").len();
        match format {
            ImageFormat::Raw => {
                std::fs::File::create(&disks[1])
                    .and_then(|file| file.set_len(size))
                    .expect("a disk");
                let all = std::fs::Permissions::from_mode(0o666);
                std::fs::set_permissions(&disks[1], all).expect("its permissions");
            }
            ImageFormat::Qcow2 => make_image(&disks[1], format, &[]),
        }
        let there = spec(folders[0].path(), vec![disk(&disks[0], format)]);
        let mut here = spec(folders[1].path(), vec![disk(&disks[1], format)]);
        here.incoming = true;
        let source = start_as(&qemus[0], folders[0].path(), &there).await;
        let destination = start_as(&qemus[1], folders[1].path(), &here).await;
        Self { source, destination, folders }
    }

    fn disk(&self, index: usize) -> PathBuf {
        self.folders[index].path().join("disk")
    }

    async fn start_mirror(&self) {
        let socket = self.folders[1].path().join("nbd.sock");
        let node = launch::disk_node("root");
        let (from, to) = (&self.source.qmp, &self.destination.qmp);
        block::start_nbd_server(to, &socket).await.expect("an NBD server");
        block::export(to, EXPORT, &node, "root", true).await.expect("an export");
        block::add_nbd_node(from, JOB, &socket, "root").await.expect("a node");
        block::start_mirror(from, JOB, &node, JOB, MirrorSync::Full, GRANULARITY_BYTES)
            .await
            .expect("a job");
    }

    async fn stop_export(&self) {
        block::stop_nbd_server(&self.destination.qmp).await.expect("it stops");
    }

    async fn start_migration(&self) -> broadcast::Receiver<QmpEvent> {
        let socket = self.folders[1].path().join("migrate.sock");
        let (from, to) = (&self.source.qmp, &self.destination.qmp);
        migrate::prepare_destination(to).await.expect("a destination");
        migrate::start_incoming(to, &socket).await.expect("it listens");
        let events = from.events();
        migrate::prepare_source(from, &SourceParameters { downtime_limit_ms: 300 })
            .await
            .expect("a source");
        migrate::start_outgoing(from, &socket).await.expect("it sends");
        events
    }
}

/// Waits until both sides of the mirror are equal.
async fn wait_mirrored(qmp: &Qmp) {
    loop {
        let jobs = block::jobs(qmp).await.expect("jobs");
        let job = jobs.iter().find(|job| job.id == JOB).expect("the mirror");
        assert_eq!(job.error, None);
        if job.ready {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn wait_for(events: &mut broadcast::Receiver<QmpEvent>, want: MigrationStatus) {
    loop {
        let event = events.recv().await.expect("an event");
        match migrate::migration_event(&event) {
            Some(found) if found == want => return,
            Some(MigrationStatus::Failed) => panic!("it failed: {event:?}"),
            _ => {}
        }
    }
}

async fn state(qemu: &Running) -> RunState {
    power::query_status(&qemu.qmp).await.expect("an answer")
}

async fn end(qemu: Running) {
    power::quit(&qemu.qmp).await.expect("it quits");
    process::wait_exit(&qemu.process.id, START_MAX).await.expect("it is gone");
}

fn assert_equal_images(format: ImageFormat, one: &Path, other: &Path) {
    let compared = Command::new("qemu-img")
        .args(["compare", "-f", format.as_str(), "-F", format.as_str()])
        .args([one, other])
        .output()
        .expect("qemu-img (Debian: qemu-utils)");
    assert!(compared.status.success(), "{compared:?}");
}

/// Scenario: a disk is mirrored into another QEMU's export, the mirror is ended
/// well, and both images hold the same, also after a first mirror was cancelled.
#[tokio::test]
async fn a_mirror_that_is_ended_well_leaves_equal_images() {
    for qemus in every_way() {
        mirrors(&qemus).await;
    }
}

async fn mirrors(qemus: &Qemus) {
    for format in [ImageFormat::Qcow2, ImageFormat::Raw] {
        let writes = ["write -P 7 1M 3M", "write -P 9 39M 64k"];
        let pair = Pair::start(qemus, format, |path| make_image(path, format, &writes)).await;
        let qmp = &pair.source.qmp;
        pair.start_mirror().await;
        assert!(block::nodes(qmp).await.expect("nodes").contains(&JOB.to_owned()));
        block::force_cancel(qmp, JOB).await.ok();
        while !block::jobs(qmp).await.expect("jobs").is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        block::remove_node(qmp, JOB).await.expect("it goes");
        pair.stop_export().await;

        pair.start_mirror().await;
        wait_mirrored(qmp).await;
        let jobs = block::jobs(qmp).await.expect("jobs");
        assert!(jobs[0].ready && jobs[0].error.is_none() && jobs[0].offset == jobs[0].len);
        block::complete_mirror_without_pivot(qmp, JOB).await.expect("it ends well");
        block::remove_node(qmp, JOB).await.expect("it goes");
        assert!(block::jobs(qmp).await.expect("jobs").is_empty());
        let nodes = block::nodes(qmp).await.expect("nodes");
        assert!(nodes.contains(&launch::disk_node("root")) && !nodes.contains(&JOB.to_owned()));
        pair.stop_export().await;
        let disks = [pair.disk(0), pair.disk(1)];
        let Pair { source, destination, folders } = pair;
        end(source).await;
        end(destination).await;
        assert_equal_images(format, &disks[0], &disks[1]);
        drop(folders);
    }
}

/// Scenario: the destination dies under a mirror. The mirror's end is a failure,
/// and the source's guest goes on.
#[tokio::test]
async fn a_mirror_whose_destination_dies_has_failed() {
    for qemus in every_way() {
        loses_the_destination(&qemus).await;
    }
}

async fn loses_the_destination(qemus: &Qemus) {
    let pair = Pair::start(qemus, ImageFormat::Raw, make_counting_disk).await;
    let qmp = &pair.source.qmp;
    power::cont(qmp).await.expect("the guest runs");
    pair.start_mirror().await;
    wait_mirrored(qmp).await;
    process::kill(&pair.destination.process.id).await.expect("it ends");
    // A mirror that has nothing left to send may end well all the same, unless
    // it flushes; one that never becomes ready must not.
    let ended = block::complete_mirror_without_pivot(qmp, JOB).await;
    assert!(ended.is_err(), "the target is gone");
    block::remove_node(qmp, JOB).await.expect("it goes");
    let gone = block::complete_mirror_without_pivot(qmp, JOB).await;
    assert!(matches!(gone, Err(QmpError::Command { .. })), "{gone:?}");
    assert!(block::jobs(qmp).await.expect("jobs").is_empty());
    assert_eq!(state(&pair.source).await, RunState::Running);
}

/// Scenario: a running guest moves, disk and memory; the source could take it back
/// after its migration completed, and the destination can run it.
#[tokio::test]
async fn a_guest_moves_and_could_still_come_back() {
    for qemus in every_way() {
        moves(&qemus).await;
    }
}

async fn moves(qemus: &Qemus) {
    let pair = Pair::start(qemus, ImageFormat::Raw, make_counting_disk).await;
    let (from, to) = (&pair.source.qmp, &pair.destination.qmp);
    power::cont(from).await.expect("the guest runs");
    pair.start_mirror().await;
    wait_mirrored(from).await;
    wait_counting(&pair.source).await;

    let mut arrived = to.events();
    let mut events = pair.start_migration().await;
    wait_for(&mut events, MigrationStatus::PreSwitchover).await;
    let status = migrate::status(from).await.expect("an answer");
    assert_eq!(status.status, MigrationStatus::PreSwitchover);
    assert!(status.ram.is_some());
    assert_eq!(state(&pair.source).await, RunState::FinishMigrate);
    block::complete_mirror_without_pivot(from, JOB).await.expect("it ends well");
    block::remove_node(from, JOB).await.expect("it goes");
    migrate::continue_from_pre_switchover(from).await.expect("it goes on");
    wait_for(&mut events, MigrationStatus::Completed).await;
    wait_for(&mut arrived, MigrationStatus::Completed).await;
    assert_ne!(state(&pair.destination).await, RunState::Running, "not before it is told");
    assert_equal_ram(&pair);

    pair.stop_export().await;
    // At once: QEMU says that it completed before it lets the vCPUs run.
    power::cont(from).await.expect("the way home");
    assert_eq!(state(&pair.source).await, RunState::Running);
    wait_counting(&pair.source).await;
    power::stop(from).await.expect("it stops");
    power::cont(to).await.expect("the destination runs it");
    assert_eq!(state(&pair.destination).await, RunState::Running);
    wait_counting(&pair.destination).await;
    power::announce_self(to).await.expect("it announces");
    let disks = [pair.disk(0), pair.disk(1)];
    let Pair { source, destination, folders } = pair;
    end(source).await;
    end(destination).await;
    assert_equal_images(ImageFormat::Raw, &disks[0], &disks[1]);
    drop(folders);
}

/// Scenario: a migration is cancelled when the guest is stopped already. It goes
/// on at the source, and a second try to another destination succeeds.
#[tokio::test]
async fn a_cancelled_migration_leaves_the_guest_and_another_can_follow() {
    for qemus in every_way() {
        cancels_and_moves(&qemus).await;
    }
}

async fn cancels_and_moves(qemus: &Qemus) {
    let pair = Pair::start(qemus, ImageFormat::Raw, make_counting_disk).await;
    let from = &pair.source.qmp;
    power::cont(from).await.expect("the guest runs");
    let mut events = pair.start_migration().await;
    wait_for(&mut events, MigrationStatus::PreSwitchover).await;
    migrate::cancel(from).await.expect("it is given up");
    wait_for(&mut events, MigrationStatus::Cancelled).await;
    power::cont(from).await.expect("the guest goes on");
    wait_counting(&pair.source).await;

    let folder = folder();
    let mut second = spec(folder.path(), vec![disk(&pair.disk(1), ImageFormat::Raw)]);
    second.incoming = true;
    let Pair { source, destination, folders } = pair;
    process::kill(&destination.process.id).await.expect("it ends");
    let destination = start_as(&qemus[1], folder.path(), &second).await;
    let pair =
        Pair { source, destination, folders: [folders.into_iter().next().expect("one"), folder] };
    let mut arrived = pair.destination.qmp.events();
    let mut events = pair.start_migration().await;
    wait_for(&mut events, MigrationStatus::PreSwitchover).await;
    migrate::continue_from_pre_switchover(&pair.source.qmp).await.expect("it goes on");
    wait_for(&mut events, MigrationStatus::Completed).await;
    wait_for(&mut arrived, MigrationStatus::Completed).await;
    assert_equal_ram(&pair);
}

fn memory_of(qemu: &Running) -> std::fs::File {
    ram::open(&qemu.process.id, RAM_BYTES).expect("its RAM")
}

/// Waits until the guest has counted on in its memory.
async fn wait_counting(qemu: &Running) {
    let memory = memory_of(qemu);
    let look = || {
        let mut count = [0; 4];
        memory.read_exact_at(&mut count, 0x7e00).expect("memory");
        u32::from_le_bytes(count)
    };
    let first = look();
    while look() == first {
        assert_eq!(state(qemu).await, RunState::Running);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn assert_equal_ram(pair: &Pair) {
    let read = |qemu: &Running| {
        let mut bytes = vec![0; usize::try_from(RAM_BYTES).expect("it fits")];
        memory_of(qemu).read_exact_at(&mut bytes, 0).expect("memory");
        bytes
    };
    let (here, there) = (read(&pair.source), read(&pair.destination));
    assert!(here == there, "the memories differ");
    assert!(here.iter().any(|byte| *byte != 0), "there is something in them");
    let other = ram::open(&pair.source.process.id, RAM_BYTES + 4096);
    assert!(matches!(other, Err(process::ProcessError::NoRam { .. })), "{other:?}");
}
