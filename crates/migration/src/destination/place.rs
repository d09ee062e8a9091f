//! Place for a VM that comes: folders, images, its definition; and their removal.
//!
//! **Invariants.** All of it is durable before the source sends a byte, so that
//! none of that is left for the blackout. What was made after the migration was
//! given up is removed by who made it: whoever freed the rest could not know of it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use limosa_protocol::vm::VmDefinition;

use super::incoming::Incoming;
use super::undo::{removable, remove};
use limosa_host::failure::{OrFail, Result};
use limosa_host::vm::{create, files, write_definition};

impl Incoming {
    /// Makes folders, images and the definition. What could be made is recorded by
    /// now: a crash in between finds what to remove.
    pub(super) async fn make_place(&self) -> Result<()> {
        let mut made = Vec::new();
        let placed = self.make(&mut made).await;
        self.inner.lock().await.made.clone_from(&made);
        let noted = match placed {
            Ok(()) => {
                let made = made.clone();
                self.driver.note(|record| record.made = made).await
            }
            failed => failed,
        };
        if noted.is_err() && !self.driver.still_prepares().await {
            let left = remove(&self.definition, removable(&self.plan, made)).await;
            if !left.is_empty() {
                let left = left.join("; ");
                tracing::warn!(migration = %self.job.id(), left, "to be removed by hand");
            }
        }
        noted
    }

    async fn make(&self, made: &mut Vec<PathBuf>) -> Result<()> {
        let places = self.definition.places.clone();
        let folders = move || {
            let mut made = Vec::new();
            let placed = files::make_places(&places, &mut made);
            (made, placed)
        };
        let (folders, placed) =
            tokio::task::spawn_blocking(folders).await.or_fail("making the VM's folders")?;
        made.extend(folders);
        placed?;
        for (image, disk) in self.plan.images_to_make() {
            // Nobody wants it any more if it was given up meanwhile.
            self.driver.expect_preparing()?;
            create::make_image(
                &self.context.host.qemu,
                &image.path,
                image.format,
                disk.virtual_bytes,
                made,
            )
            .await?;
        }
        let (definition, made) = (self.definition.clone(), made.clone());
        let finish = move || finish(&definition, &made);
        tokio::task::spawn_blocking(finish).await.or_fail("writing the VM's definition")?
    }
}

/// Writes the definition, and makes it durable that all is there.
fn finish(definition: &VmDefinition, made: &[PathBuf]) -> Result<()> {
    let configuration = files::place(&definition.places.configuration, "configuration")?;
    write_definition(definition, configuration)?;
    files::sync_parents(made)
}

/// Everything that a place for a VM may add to this host and that is not there
/// yet, parents first.
pub(super) async fn what_could_be_made(definition: &VmDefinition) -> Result<Vec<PathBuf>> {
    let mut expected = Vec::new();
    for (_, place) in definition.places.each() {
        expected.extend(place.map(Path::to_owned));
    }
    expected.extend(definition.disks.iter().filter_map(|disk| disk.path.clone()));
    let look = move || not_there_yet(&expected);
    tokio::task::spawn_blocking(look).await.or_fail("looking at the VM's places")
}

/// Paths and their parents that do not exist, parents first.
fn not_there_yet(paths: &[PathBuf]) -> Vec<PathBuf> {
    let mut missing = BTreeSet::new();
    for path in paths {
        let mut at = Some(path.as_path());
        while let Some(path) = at.filter(|path| !path.exists()) {
            missing.insert(path.to_owned());
            at = path.parent();
        }
    }
    // A parent sorts before what is in it.
    missing.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: the definition lies there before anything is received, and nothing
    /// of a place stays when it is given up, whatever a crash left half written.
    #[tokio::test]
    async fn a_place_is_made_and_goes_whole() {
        let folder = tempfile::tempdir().unwrap();
        let own = folder.path().join("vms/web1");
        let mut definition: VmDefinition =
            toml::from_str("name = 'web1'\nmemory_mib = 64\n[[disks]]\nid = 'a'").unwrap();
        definition.places = files::places_in(&own);
        definition.disks[0].path = Some(own.join("disks/a.raw"));
        let expected = what_could_be_made(&definition).await.unwrap();
        let mut made = Vec::new();
        files::make_places(&definition.places, &mut made).unwrap();
        std::fs::write(own.join("disks/a.raw"), "").unwrap();
        made.push(own.join("disks/a.raw"));
        finish(&definition, &made).unwrap();
        assert_eq!(limosa_host::vm::read_definition(&own).unwrap().name, definition.name);
        assert!(made.iter().all(|path| expected.contains(path)), "{made:?} {expected:?}");
        std::fs::write(own.join(".vm.toml.new"), "half of").unwrap();
        assert_eq!(remove(&definition, expected).await, Vec::<String>::new());
        assert!(folder.path().read_dir().unwrap().next().is_none());
    }
}
