//! The lock that a handover puts on its VM: what it blocks, and how each refusal reads.
//!
//! | status | change | cold start, delete | next move |
//! |---|---|---|---|
//! | the guest is not ours yet, or not any more | refused | refused | refused as a change |
//! | ours, the peer has not confirmed | allowed | refused | refused while the peer is silent |
//! | ours, nothing missing | allowed | allowed | allowed |

use limosa_protocol::handover::{ColdStart, Doubt};
use limosa_protocol::id::{HostName, MigrationId, VmName};
use limosa_protocol::migration::{Migration, Role};

use super::status::{PeerAnswer, Status};
use limosa_host::failure::Hindrance;
use limosa_host::vm::Vm;
use limosa_host::vm::lock::{Activity, Blocks, Holder, VmLock};

/// Whose handover it is, for texts.
pub(super) struct Parties {
    migration: MigrationId,
    role: Role,
    vm: VmName,
    peer: HostName,
}

impl Parties {
    pub(super) fn of(view: &Migration) -> Self {
        let peer = match view.role {
            Role::Source => &view.destination,
            Role::Destination => &view.source,
        };
        Self { migration: view.id, role: view.role, vm: view.vm.clone(), peer: peer.clone() }
    }

    pub(super) fn into_peer(self) -> HostName {
        self.peer
    }

    /// The lock on the VM; none once the handover has ended.
    ///
    /// - `is_under_way`: operators have not got the VM back.
    pub(super) fn lock(&self, status: Status, is_under_way: bool) -> Option<VmLock> {
        if status.ended.is_some() {
            return None;
        }
        let activity = match status.doubt {
            Some(_) if !status.is_ours => Activity::InDoubt,
            _ if is_under_way => Activity::Moving,
            _ => Activity::Settling,
        };
        let cold_start = self.against_cold_start(status);
        Some(VmLock {
            holder: Holder::Migration { id: self.migration, role: self.role },
            activity,
            blocks: Blocks {
                change: self.against_change(status, is_under_way),
                // Its files may be the only ones, for all that is known of the peer.
                delete: cold_start.clone(),
                cold_start,
                next_move: status.awaits_peer.then(|| self.unconfirmed()),
            },
            doubt: status.doubt.map(|doubt| self.doubt_text(doubt, status.peer)),
        })
    }

    fn against_change(&self, status: Status, is_under_way: bool) -> Option<Hindrance> {
        let Self { vm, peer, migration, .. } = self;
        if status.is_ours {
            return is_under_way.then(|| self.being_moved());
        }
        Some(match status.doubt {
            Some(doubt) => {
                Hindrance::new(format!("VM {vm} is in doubt"), self.doubt_text(doubt, status.peer))
            }
            None if status.is_theirs => Hindrance::new(
                format!("VM {vm} belongs to {peer}, to which it was handed over"),
                format!(
                    "work with it there; `limosa migration show {migration}` shows what is left \
                     to do here"
                ),
            ),
            None => self.being_moved(),
        })
    }

    fn being_moved(&self) -> Hindrance {
        let Self { vm, migration, .. } = self;
        Hindrance::new(
            format!("VM {vm} is being moved"),
            format!(
                "wait for it with `limosa migration watch {migration}`, or end it with `limosa \
                 migration cancel {migration}`"
            ),
        )
    }

    fn against_cold_start(&self, status: Status) -> Option<Hindrance> {
        let Self { vm, peer, .. } = self;
        match status.cold_start {
            ColdStart::Allowed => None,
            ColdStart::Unconfirmed => Some(Hindrance::new(
                format!(
                    "VM {vm} is this host's, and {peer} has not confirmed yet that it is out of it; \
                     it is asked every second"
                ),
                format!(
                    "if {peer} is gone for good, `limosa vm recover {vm}` shows what can be done"
                ),
            )),
            ColdStart::NotOwner => self.against_change(status, false),
        }
    }

    /// The VM cannot move on yet.
    pub(super) fn unconfirmed(&self) -> Hindrance {
        let Self { vm, peer, .. } = self;
        Hindrance::new(
            format!(
                "VM {vm} is this host's, and {peer} has not confirmed yet that it is out of it"
            ),
            format!(
                "{peer} is asked every second, and then the VM can move. If {peer} is gone for \
                 good, `limosa vm recover {vm} --force-owner` does without its confirmation"
            ),
        )
    }

    /// What a doubt is, and what settles it.
    pub(super) fn doubt_text(&self, doubt: Doubt, peer_answer: PeerAnswer) -> String {
        let Self { vm, peer, .. } = self;
        let what = match doubt {
            Doubt::CommitUnanswered => format!(
                "handed over to {peer}, which does not say whether the VM runs; the copy here stays \
                 stopped"
            ),
            Doubt::CommitUnheard => format!(
                "the whole VM is here, and {peer} does not say whether it handed it over; the copy \
                 here stays stopped"
            ),
            Doubt::Unconfirmed => format!(
                "the VM is this host's and off, and {peer} has not confirmed that it is out of it"
            ),
            Doubt::GivenBack => format!(
                "the whole VM is here, stopped; it was given back to {peer}, which has not said \
                 that it has it"
            ),
            Doubt::UnknownDurability => {
                return "whether the last step was recorded is not known, because the \
                    state store failed; the copy here stays as it is. Look at the disk of the state \
                    folder, then restart limosad here: it settles by reading its record again"
                    .to_owned();
            }
        };
        format!(
            "{what}. {}; if {peer} is gone for good, see `limosa vm recover {vm}`",
            peer_answer.text(peer)
        )
    }
}

/// The lock with which a driver begins: of a migration that was reported as ended before a
/// restart, operators have the VM back.
pub(super) fn initial_lock(view: &Migration, status: Status) -> Option<VmLock> {
    Parties::of(view).lock(status, view.ended_unix_ms.is_none())
}

/// Puts the lock on the VM, unless it is the one that was published last.
pub(super) async fn publish_lock(vm: &Vm, last: &mut Option<VmLock>, lock: Option<VmLock>) {
    // The VM's mutex may be held for a while: nobody waits for it to find nothing new.
    if *last != lock {
        vm.lock().await.lock.clone_from(&lock);
        *last = lock;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parties(role: Role) -> Parties {
        let (vm, peer) = ("web1".parse().unwrap(), "b".parse().unwrap());
        Parties { migration: MigrationId(uuid::Uuid::nil()), role, vm, peer }
    }

    /// A source in the middle of a move.
    fn copying() -> Status {
        Status {
            state: "copying",
            cold_start: ColdStart::Unconfirmed,
            doubt: None,
            peer: PeerAnswer::Settles,
            ended: None,
            is_ours: false,
            is_receiving: false,
            is_theirs: false,
            may_force_owner: false,
            awaits_peer: false,
        }
    }

    fn messages(blocks: &Blocks) -> [Option<&str>; 4] {
        [&blocks.change, &blocks.cold_start, &blocks.next_move, &blocks.delete]
            .map(|found| found.as_ref().map(|hindrance| hindrance.message.as_str()))
    }

    #[test]
    fn a_moving_vm_is_not_to_be_changed() {
        let lock = parties(Role::Source).lock(copying(), true).unwrap();
        assert_eq!(lock.activity, Activity::Moving);
        assert_eq!(lock.moving().map(|(_, role)| role), Some(Role::Source));
        let [change, cold_start, next_move, delete] = messages(&lock.blocks);
        assert_eq!(change, Some("VM web1 is being moved"));
        assert!(cold_start.is_some() && cold_start == delete && next_move.is_none());
    }

    #[test]
    fn a_vm_that_was_handed_over_is_the_peers() {
        let status = Status { is_theirs: true, cold_start: ColdStart::NotOwner, ..copying() };
        let lock = parties(Role::Source).lock(status, true).unwrap();
        for message in [lock.blocks.change, lock.blocks.cold_start, lock.blocks.delete] {
            assert!(message.unwrap().message.contains("belongs to b"));
        }
    }

    #[test]
    fn a_doubt_reads_in_view_and_refusal() {
        let status = Status {
            doubt: Some(Doubt::CommitUnanswered),
            peer: PeerAnswer::IsSilent,
            is_theirs: true,
            cold_start: ColdStart::NotOwner,
            ..copying()
        };
        let lock = parties(Role::Source).lock(status, true).unwrap();
        assert_eq!(lock.activity, Activity::InDoubt);
        let change = lock.blocks.change.unwrap();
        assert_eq!(change.message, "VM web1 is in doubt");
        assert_eq!(lock.doubt, Some(change.remedy));
    }

    /// Goal: a VM that is back is an operator's at once, but does not leave or vanish while the
    /// peer may still have a part in it.
    #[test]
    fn a_vm_that_came_back_waits_for_the_peer_only_where_needed() {
        let ours = Status { is_ours: true, ..copying() };
        let lock = parties(Role::Source).lock(ours, false).unwrap();
        assert_eq!((lock.activity, lock.moving()), (Activity::Settling, None));
        let [change, cold_start, next_move, delete] = messages(&lock.blocks);
        assert!(change.is_none() && next_move.is_none());
        assert!(cold_start.is_some() && delete.is_some());
        let silent = Status { awaits_peer: true, ..ours };
        let lock = parties(Role::Source).lock(silent, false).unwrap();
        assert!(lock.blocks.next_move.is_some());
        let still_held = parties(Role::Destination).lock(ours, true).unwrap();
        assert!(still_held.blocks.change.is_some());
    }

    #[test]
    fn what_has_ended_holds_nothing() {
        use limosa_protocol::handover::Ended;
        let ended = Status { ended: Some(Ended::Moved), ..copying() };
        assert_eq!(parties(Role::Source).lock(ended, true), None);
    }
}
