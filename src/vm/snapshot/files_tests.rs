use super::*;

const FIRST: Id = [1; 16];
const SECOND: Id = [0xab; 16];

fn write(place: &Place, id: &Id, state: &[u8]) {
    let writing = Writing::begin(place, id).unwrap();
    (&writing.memory.file).write_all(id).unwrap();
    writing.finish(state).unwrap();
}

fn names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn read(place: &Place) -> (Vec<u8>, Vec<u8>) {
    let parse = |bytes: &[u8]| {
        let id = if bytes == b"one" { FIRST } else { SECOND };
        Ok((bytes.to_vec(), Some(format!("{MEMORY}{}", hex(&id)))))
    };
    let (state, _, mut memory) = open(place, parse).unwrap();
    let mut bytes = Vec::new();
    memory.read_to_end(&mut bytes).unwrap();
    (state, bytes)
}

#[test]
fn new_snapshot_takes_the_place_of_the_earlier_one_whole() {
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path().join("deep/er");
    let place = Place::directory(&at);
    write(&place, &FIRST, b"one");
    assert_eq!(names(&at), [format!("memory-{}", "01".repeat(16)), "state".into()]);
    assert_eq!(read(&place), (b"one".to_vec(), FIRST.to_vec()));

    // One that is given up leaves the earlier one, and nothing else.
    let mut writing = Writing::begin(&place, &SECOND).unwrap();
    writing.memory.file.write_all(b"half").unwrap();
    assert!(matches!(Writing::begin(&place, &SECOND), Err(CreateError::Busy(_))));
    drop(writing);
    assert_eq!(names(&at).len(), 2);
    assert_eq!(read(&place), (b"one".to_vec(), FIRST.to_vec()));

    std::fs::write(at.join(".unfinished-from-a-killed-process"), "x").unwrap();
    std::fs::write(at.join("memory-orphan"), "x").unwrap();
    std::fs::write(at.join("notes"), "the user's own").unwrap();
    write(&place, &SECOND, b"two");
    assert_eq!(names(&at), [format!("memory-{}", "ab".repeat(16)), "notes".into(), "state".into()]);
    assert_eq!(read(&place), (b"two".to_vec(), SECOND.to_vec()));
    let mode = std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(&place.state).unwrap());
    assert_eq!(mode & 0o777, MODE);
}

#[test]
fn files_lie_where_they_are_asked_for() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let place = Place { state: at("vm.snap"), memory: Some(at("vm.mem")) };
    for (id, state) in [(FIRST, b"one"), (SECOND, b"two")] {
        write(&place, &id, state);
        assert_eq!(names(directory.path()), ["vm.mem", "vm.snap"]);
        assert_eq!(read(&place), (state.to_vec(), id.to_vec()));
    }
}

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
    assert!(is_plain(&format!("memory-{}", "0f".repeat(16))));
    for name in ["", "memory-", "../state", "memory-/etc/passwd", "memory-0f", "/etc/passwd"] {
        assert!(!is_plain(name), "{name}");
    }
    let directory = tempfile::tempdir().unwrap();
    let place = Place::directory(directory.path());
    std::fs::write(&place.state, "x").unwrap();
    let opened = open(&place, |_| Ok(((), Some("../../etc/passwd".into()))));
    assert!(matches!(opened, Err(LoadError::Foreign(_))));
}
