use super::*;

#[test]
fn places_that_hold_no_snapshot_are_told_apart() {
    let directory = tempfile::tempdir().unwrap();
    assert!(matches!(read_state(&directory.path().join("state")), Err(LoadError::Missing(_))));
    assert!(matches!(read_state(directory.path()), Err(LoadError::Foreign(_))));
    assert!(matches!(read_state(Path::new("/dev/zero")), Err(LoadError::Foreign(_))));
    let pipe = directory.path().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(matches!(read_state(&pipe), Err(LoadError::Foreign(_))));
    assert!(matches!(open_memory(&pipe), Err(LoadError::Foreign(_))));
}

#[test]
fn name_of_memory_cannot_lead_elsewhere() {
    let directory = tempfile::tempdir().unwrap();
    let place = Place::directory(directory.path());
    std::fs::write(&place.state, "x").unwrap();
    let opened = open(&place, |_| Ok(((), Some("../../etc/passwd".into()))));
    assert!(matches!(opened, Err(LoadError::Foreign(_))));
}
