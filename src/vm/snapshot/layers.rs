//! Memory that consists of an earlier snapshot's and of what has changed since.

use std::fs::File;
use std::path::{Path, PathBuf};

use super::error::LoadError;
use super::state::BasePlace;
use crate::memory::{Ram, changes, file, file::Id};
use crate::snapshot_files::Place;

/// Files of changes that lie over each other at most; after so many a snapshot has all memory again.
pub const LAYERS_MAX: usize = 16;

/// A memory file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer {
    pub(super) id: Id,
    pub(super) path: PathBuf,
}

impl Layer {
    /// The one of the snapshot `id` at `place`.
    pub(super) fn new(id: Id, place: &Place) -> Layer {
        let beside = || directory(&place.state).join(place.memory_name(&id).unwrap_or_default());
        Layer { id, path: place.memory.clone().unwrap_or_else(beside) }
    }

    /// Its name, if it is a memory file beside the state file.
    fn name_beside(&self, place: &Place) -> Option<&str> {
        let name = self.path.file_name()?.to_str()?;
        let named = place.beside(name).is_some();
        (named && directory(&self.path) == directory(&place.state)).then_some(name)
    }
}

fn directory(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Whether a snapshot at `place` may lie over these: not if it takes the place of one of them.
pub(super) fn can_lie_under(layers: &[Layer], place: &Place) -> bool {
    (1..=LAYERS_MAX).contains(&layers.len())
        && layers.iter().all(|layer| Some(&layer.path) != place.memory.as_ref())
}

/// What the state file says of them.
pub(super) fn places(layers: &[Layer], place: &Place) -> Vec<BasePlace> {
    let path = |layer: &Layer| layer.name_beside(place).map_or_else(|| layer.path.clone(), PathBuf::from);
    layers.iter().map(|layer| BasePlace { id: layer.id, path: path(layer) }).collect()
}

/// Those that lie beside the state file.
pub(super) fn names_beside(layers: &[Layer], place: &Place) -> Vec<String> {
    layers.iter().filter_map(|layer| layer.name_beside(place)).map(str::to_owned).collect()
}

/// Where a file is that a state file names.
pub(super) fn found(base: &BasePlace, place: &Place) -> Layer {
    let beside = base.path.to_str().and_then(|name| place.beside(name));
    Layer { id: base.id, path: beside.unwrap_or_else(|| base.path.clone()) }
}

fn wrong(layer: &Layer) -> impl FnOnce(file::Error) -> LoadError {
    let path = layer.path.clone();
    move |source| LoadError::Memory { path, source }
}

/// Checks that the files are what they are taken for.
pub(super) fn check(layers: &[Layer], files: &[File], size: u64) -> Result<(), LoadError> {
    for (index, (layer, file)) in layers.iter().zip(files).enumerate() {
        match index {
            0 => file::check(file, &layer.id, size).map_err(wrong(layer))?,
            _ => changes::read(file, &layer.id, size).map(drop).map_err(wrong(layer))?,
        }
    }
    Ok(())
}

/// Maps the first one, and puts the others over it.
pub(super) fn map(layers: &[Layer], files: &[File], size: u64) -> Result<Ram, LoadError> {
    let mut all = layers.iter().zip(files);
    let (first, file) = all.next().ok_or_else(|| LoadError::Missing(PathBuf::new()))?;
    let ram = file::map(file, &first.id, size).map_err(wrong(first))?;
    for (layer, file) in all {
        let runs = changes::read(file, &layer.id, size).map_err(wrong(layer))?;
        changes::lay_over(&ram, file, &runs).map_err(wrong(layer))?;
    }
    Ok(ram)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_beside_the_state_go_with_it_and_others_do_not() {
        let place = Place::directory(Path::new("/s/one"));
        let elsewhere = Place::directory(Path::new("/s/two"));
        let layers = [Layer::new([1; 16], &place), Layer::new([2; 16], &elsewhere)];
        let name = format!("memory-{}", "01".repeat(16));
        assert_eq!(layers[0].path, Path::new("/s/one").join(&name));
        assert_eq!(names_beside(&layers, &place), std::slice::from_ref(&name));
        let places = places(&layers, &place);
        assert_eq!(places[0].path, Path::new(&name));
        // The directory was moved meanwhile.
        let moved = Place::directory(Path::new("/t"));
        assert_eq!(found(&places[0], &moved).path, Path::new("/t").join(&name));
        assert_eq!(found(&places[1], &moved), layers[1]);
        let over = Place { state: "/s/x".into(), memory: Some(layers[1].path.clone()) };
        assert!(can_lie_under(&layers, &place) && !can_lie_under(&layers, &over));
        assert!(
            !can_lie_under(&[], &place) && !can_lie_under(&vec![layers[0].clone(); LAYERS_MAX + 1], &place)
        );
    }
}
