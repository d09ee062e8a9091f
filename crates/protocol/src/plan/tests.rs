//! Who may free what, for every combination of item, side and outcome.

use std::collections::BTreeSet;

use super::*;

const CARRIERS: [DiskCarrier; 3] =
    [DiskCarrier::Mirror, DiskCarrier::AlreadyThere, DiskCarrier::None];
const KINDS: [LocationKind; 2] = [LocationKind::File, LocationKind::Device];
const REACHES: [Reach; 2] = [Reach::OneHost, Reach::BothHosts];
const SIDES: [Role; 2] = [Role::Source, Role::Destination];
const OUTCOMES: [Outcome; 3] = [Outcome::Moved, Outcome::Stayed, Outcome::InDoubt];

fn location(path: &str, kind: LocationKind, reach: Reach) -> Location {
    Location { kind, path: path.into(), format: DiskFormat::Raw, reach }
}

fn item(source: Location, destination: Option<Location>, carrier: DiskCarrier) -> DiskItem {
    DiskItem {
        id: "root".parse().unwrap(),
        source,
        destination,
        carrier,
        virtual_bytes: 1 << 20,
        allocated_bytes: 0,
    }
}

fn plan(disk: DiskItem, is_local: bool, retain_source_disks: bool) -> MigrationPlan {
    MigrationPlan {
        peer: (!is_local).then(|| "b".parse().unwrap()),
        memory: MemoryItem { bytes: 1 << 20, carrier: MemoryCarrier::PreCopy },
        disks: vec![disk],
        policy: Policy { downtime_limit_ms: 300, verify: Verify::Running, retain_source_disks },
    }
}

/// Every plan with one disk: carriers, locations, reach, paths, peer or none.
fn plans() -> Vec<MigrationPlan> {
    let mut ends = Vec::new();
    for kind in KINDS {
        for reach in REACHES {
            for path in ["/a", "/b"] {
                ends.push(location(path, kind, reach));
            }
        }
    }
    let mut plans = Vec::new();
    for source in &ends {
        for destination in ends.iter().cloned().map(Some).chain([None]) {
            for carrier in CARRIERS {
                for (is_local, retain) in
                    [(false, false), (false, true), (true, false), (true, true)]
                {
                    let disk = item(source.clone(), destination.clone(), carrier);
                    plans.push(plan(disk, is_local, retain));
                }
            }
        }
    }
    plans
}

/// What a path really is: storage of one host, or storage that both reach. Several paths may
/// lead to the latter, so the worst case is that all do.
fn storage(plan: &MigrationPlan, side: Role, at: &Location) -> String {
    match (at.reach, side) {
        _ if plan.peer.is_none() => format!("source:{}", at.path.display()),
        (Reach::BothHosts, _) => "shared".to_owned(),
        (Reach::OneHost, Role::Source) => format!("source:{}", at.path.display()),
        (Reach::OneHost, Role::Destination) => format!("destination:{}", at.path.display()),
    }
}

/// Goal: no combination of removals at both ends takes the owner's disk.
/// Method: a world of storages; each host removes all that it may, and tries to remove
/// both paths besides.
#[test]
fn the_owners_disk_is_never_freed() {
    for plan in plans() {
        let disk = &plan.disks[0];
        for outcome in OUTCOMES {
            let mut freed = BTreeSet::new();
            for side in SIDES {
                let wished = vec![PathBuf::from("/a"), PathBuf::from("/b")];
                for path in plan.without_kept(side, outcome, wished) {
                    if let Some(at) = disk.location(side).filter(|at| at.path == path) {
                        freed.insert(storage(&plan, side, at));
                    }
                }
                for path in plan.freeable(side, outcome) {
                    let at = disk.location(side).filter(|at| at.path == path).unwrap();
                    assert_eq!(at.kind, LocationKind::File, "{plan:?}");
                    freed.insert(storage(&plan, side, at));
                }
            }
            let owners: &[Role] = match outcome {
                Outcome::Moved if disk.carrier == DiskCarrier::None => &[Role::Source],
                Outcome::Moved => &[Role::Destination],
                Outcome::Stayed => &[Role::Source],
                Outcome::InDoubt => &SIDES,
            };
            for owner in owners {
                if let Some(at) = disk.location(*owner) {
                    let own = storage(&plan, *owner, at);
                    assert!(!freed.contains(&own), "{outcome:?} frees {own}: {plan:?}");
                }
            }
            if disk.carrier != DiskCarrier::Mirror {
                assert!(freed.is_empty(), "there is one copy: {plan:?}");
            }
        }
    }
}

/// Goal: the disk of a VM that stays is never removed at the source, also without a peer.
#[test]
fn only_the_copy_that_nobody_owns_is_freed() {
    for plan in plans() {
        for (side, outcome) in
            [(Role::Source, Outcome::Stayed), (Role::Destination, Outcome::Moved)]
        {
            assert_eq!(plan.freeable(side, outcome).count(), 0, "{plan:?}");
        }
        for side in SIDES {
            assert_eq!(plan.freeable(side, Outcome::InDoubt).count(), 0, "{plan:?}");
        }
    }
}

/// Goal: an image of its own is freed where it is not needed any more, and only there.
#[test]
fn a_mirrored_file_is_freed_at_one_end() {
    let file = |path: &str| Location::file(path.into(), DiskFormat::Raw);
    let disk = item(file("/a"), Some(file("/a")), DiskCarrier::Mirror);
    let moving = plan(disk.clone(), false, false);
    assert!(moving.freeable(Role::Source, Outcome::Moved).eq([Path::new("/a")]));
    assert!(moving.freeable(Role::Destination, Outcome::Stayed).eq([Path::new("/a")]));
    let retained = plan(disk.clone(), false, true);
    assert_eq!(retained.freeable(Role::Source, Outcome::Moved).count(), 0);
    assert_eq!(retained.freeable(Role::Destination, Outcome::Stayed).count(), 1);
    // The source does not know where the destination put it.
    let unplaced = plan(DiskItem { destination: None, ..disk.clone() }, false, false);
    assert_eq!(unplaced.freeable(Role::Source, Outcome::Moved).count(), 1);
    // The same file at both ends of one host is one copy.
    let local = plan(disk, true, false);
    assert_eq!(local.freeable(Role::Source, Outcome::Moved).count(), 0);
    let local = plan(item(file("/a"), Some(file("/b")), DiskCarrier::Mirror), true, false);
    assert!(local.freeable(Role::Source, Outcome::Moved).eq([Path::new("/a")]));
}

/// Goal: what is no disk of the plan is removed as before.
#[test]
fn paths_that_are_no_disks_are_not_kept() {
    let file = |path: &str| Location::file(path.into(), DiskFormat::Raw);
    let shared = item(file("/a"), Some(file("/b")), DiskCarrier::AlreadyThere);
    let plan = plan(shared, false, false);
    let wished = || vec![PathBuf::from("/a"), PathBuf::from("/b"), PathBuf::from("/vm.toml")];
    let left = plan.without_kept(Role::Source, Outcome::Moved, wished());
    assert_eq!(left, [PathBuf::from("/b"), PathBuf::from("/vm.toml")]);
    let left = plan.without_kept(Role::Destination, Outcome::Stayed, wished());
    assert_eq!(left, [PathBuf::from("/a"), PathBuf::from("/vm.toml")]);
}

/// Goal: a plan from the wire that does not fit its VM, or that this version cannot
/// perform, is refused.
#[test]
fn a_plan_must_fit_its_vm() {
    let definition: VmDefinition = toml::from_str(
        "name = 'web1'\nmemory_mib = 64\n[[disks]]\nid = 'root'\n[[disks]]\nid = 'cd'\n\
         kind = 'cdrom'",
    )
    .unwrap();
    let file = |path: &str| Location::file(path.into(), DiskFormat::Raw);
    let mut good = plan(item(file("/a"), None, DiskCarrier::Mirror), false, false);
    assert_eq!(good.check(&definition), Err(PlanError::OtherDisks));
    let cd = DiskItem { id: "cd".parse().unwrap(), ..item(file("/cd"), None, DiskCarrier::None) };
    good.disks.push(cd);
    assert_eq!(good.check(&definition), Ok(()));
    assert_eq!(good.left_behind().count(), 1);
    let changed = |change: fn(&mut MigrationPlan)| {
        let mut bad = good.clone();
        change(&mut bad);
        bad.check(&definition)
    };
    let carrier = |id: &str| Err(PlanError::Carrier(id.parse().unwrap()));
    assert_eq!(changed(|plan| plan.peer = None), Err(PlanError::NoPeer));
    assert_eq!(changed(|plan| plan.disks.reverse()), Err(PlanError::OtherDisks));
    assert_eq!(changed(|plan| plan.disks[1].carrier = DiskCarrier::Mirror), carrier("cd"));
    assert_eq!(changed(|plan| plan.disks[0].carrier = DiskCarrier::None), carrier("root"));
    assert_eq!(changed(|plan| plan.disks[0].carrier = DiskCarrier::AlreadyThere), carrier("root"));
    assert_eq!(changed(|plan| plan.disks[0].source.reach = Reach::BothHosts), carrier("root"));
    let device = Location::device("/dev/sdb".into(), DiskFormat::Raw);
    let mut host_attached = good.clone();
    host_attached.disks[0].source = device;
    assert_eq!(host_attached.check(&definition), carrier("root"));
    host_attached.disks[0].carrier = DiskCarrier::None;
    assert_eq!(host_attached.check(&definition), Ok(()));
}
