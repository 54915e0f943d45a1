#![allow(unsafe_code)]

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::disk::{Buffers, Durability, Engine, Io, Operation};

/// Bytes that tell where they come from.
fn pattern(file: usize, len: usize) -> Vec<u8> {
    (0..len).map(|at| (at / 251 + at % 251 + file * 37 + 1) as u8).collect()
}

/// Files of these lengths, and the parts that they are.
fn parts(directory: &Path, lens: &[usize]) -> Vec<Part> {
    let part = |(index, len): (usize, &usize)| {
        let path = directory.join(format!("part{index}"));
        std::fs::write(&path, pattern(index, *len)).unwrap();
        Part { path, name: format!("sha256:{index:04x}") }
    };
    lens.iter().enumerate().map(part).collect()
}

fn compose(parts: &[Part], io: Io) -> Arc<Image> {
    Arc::new(open_parts(parts, &Options { io, ..Options::default() }).unwrap())
}

/// What the disk should hold between the tables.
fn concatenation(lens: &[usize]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (index, len) in lens.iter().enumerate() {
        bytes.extend(pattern(index, *len));
        bytes.resize(bytes.len().next_multiple_of(ALIGN_BYTES as usize), 0);
    }
    bytes
}

/// Reads into buffers of these lengths; several reads at once if there are several.
fn read(image: &Arc<Image>, reads: &[(u64, Vec<usize>)]) -> Vec<io::Result<Vec<u8>>> {
    let mut memory: Vec<Vec<Vec<u8>>> =
        reads.iter().map(|(_, lens)| lens.iter().map(|len| vec![0xee; *len]).collect()).collect();
    let mut engine = Engine::new(Arc::clone(image), 64, Durability::OnFlush).unwrap();
    let mut results: Vec<Option<io::Result<()>>> = reads.iter().map(|_| None).collect();
    for (index, ((offset, _), memory)) in reads.iter().zip(&mut memory).enumerate() {
        let mut buffers = Buffers::default();
        for piece in memory {
            // SAFETY: the bytes outlive the engine, which is dropped before they are looked at.
            unsafe { buffers.push(piece.as_mut_ptr(), piece.len()) };
        }
        engine.start(Operation::Read { offset: *offset, buffers }, index);
    }
    engine.commit();
    engine.wait();
    while let Some((index, result)) = engine.reap() {
        assert!(results[index].replace(result).is_none(), "an operation ended twice");
    }
    drop(engine);
    let bytes = memory.into_iter().map(|memory| memory.concat());
    results.into_iter().zip(bytes).map(|(result, bytes)| result.unwrap().map(|()| bytes)).collect()
}

fn read_all(image: &Arc<Image>) -> Vec<u8> {
    let len = image.size_bytes() as usize;
    read(image, &[(0, vec![len])]).remove(0).unwrap()
}

#[test]
fn disk_is_the_files_behind_each_other_between_two_tables() {
    let directory = tempfile::tempdir().unwrap();
    let lens = [4096, 1, 4095, 4097, 70_000, 512];
    let parts = parts(directory.path(), &lens);
    for io in [Io::Sync, Io::Uring] {
        let image = compose(&parts, io);
        assert!(image.options().read_only);
        let bytes = read_all(&image);
        let (front, back) = gpt::table_bytes(lens.len());
        assert!(bytes[front as usize..bytes.len() - back as usize] == concatenation(&lens));
        assert_eq!(&bytes[512..520], b"EFI PART");
        assert_eq!(&bytes[bytes.len() - 512..bytes.len() - 504], b"EFI PART");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_read_gives_what_a_plain_file_would(
        lens in prop::collection::vec(1usize..20_000, 1..12),
        reads in prop::collection::vec((any::<u64>(), prop::collection::vec(1usize..9000, 1..8)), 1..24),
    ) {
        let directory = tempfile::tempdir().unwrap();
        let parts = parts(directory.path(), &lens);
        for io in [Io::Sync, Io::Uring] {
            let image = compose(&parts, io);
            let whole = read_all(&image);
            let placed: Vec<(u64, Vec<usize>)> =
                reads.iter().map(|(at, lens)| (at % image.size_bytes(), lens.clone())).collect();
            // The engine takes a batch at a time.
            for reads in placed.chunks(8) {
                for ((offset, lens), result) in reads.iter().zip(read(&image, reads)) {
                    let (start, len) = (*offset as usize, lens.iter().sum::<usize>());
                    match whole.get(start..start + len) {
                        Some(expected) => prop_assert!(result.unwrap() == expected, "at {offset}"),
                        None => prop_assert!(result.is_err(), "a read past the end at {offset}"),
                    }
                }
            }
        }
    }
}

#[test]
fn read_of_more_buffers_than_the_host_takes_at_once_spans_parts() {
    let directory = tempfile::tempdir().unwrap();
    let lens = [3000; 40];
    let parts = parts(directory.path(), &lens);
    for io in [Io::Sync, Io::Uring] {
        let image = compose(&parts, io);
        let (front, _) = gpt::table_bytes(lens.len());
        let whole = concatenation(&lens);
        let read = read(&image, &[(front, vec![64; whole.len() / 64])]).remove(0).unwrap();
        assert!(read == whole);
    }
}

#[test]
fn tables_pass_the_checks_of_partitioning_programs() {
    let directory = tempfile::tempdir().unwrap();
    for count in [1, 128, 129, 250, MAX_PARTS] {
        let lens: Vec<usize> = (0..count).map(|index| 100 + index * 61).collect();
        let parts = parts(directory.path(), &lens);
        let path = directory.path().join("disk");
        std::fs::write(&path, read_all(&compose(&parts, Io::Auto))).unwrap();
        let run = |program: &str, option: &str| {
            let Ok(output) = Command::new(program).arg(option).arg(&path).output() else {
                eprintln!("skipped: needs the program {program}");
                return None;
            };
            let text = format!(
                "{}{}",
                String::from_utf8_lossy(&output.stdout),
                String::from_utf8_lossy(&output.stderr)
            );
            assert!(output.status.success(), "{program}: {text}");
            Some(text)
        };
        if let Some(text) = run("sgdisk", "-v") {
            assert!(text.contains("No problems found") && !text.contains("Caution"), "{text}");
        }
        if let Some(text) = run("sfdisk", "-d") {
            let lines: Vec<&str> = text.lines().filter(|line| line.contains("start=")).collect();
            assert_eq!(lines.len(), count, "{text}");
            for (index, line) in lines.iter().enumerate() {
                let name = format!("name=\"sha256:{index:04x}\"");
                assert!(line.contains(&name), "{line}");
                let size = format!("size={:>12},", lens[index].next_multiple_of(4096) / 512);
                assert!(line.contains(&size), "{line} has not {size}");
            }
            assert!(!text.to_lowercase().contains("corrupt"), "{text}");
        }
    }
}

#[test]
fn same_parts_give_the_same_disk() {
    let directory = tempfile::tempdir().unwrap();
    let parts = parts(directory.path(), &[5000, 6000]);
    let twice = [compose(&parts, Io::Auto), compose(&parts, Io::Auto)].map(|image| read_all(&image));
    assert!(twice[0] == twice[1]);
    let swapped = [parts[1].clone(), parts[0].clone()];
    assert!(twice[0] != read_all(&compose(&swapped, Io::Auto)));
}

#[test]
fn parts_are_locked_as_readers_lock_and_never_written() {
    let directory = tempfile::tempdir().unwrap();
    let parts = parts(directory.path(), &[4096, 8192]);
    let image = compose(&parts, Io::Auto);
    let error = crate::disk::open(&parts[1].path, &Options::default()).unwrap_err();
    assert!(matches!(error, Error::Locked { .. }), "{error}");
    let reader = Options { read_only: true, ..Options::default() };
    crate::disk::open(&parts[1].path, &reader).unwrap();
    for io in [Io::Sync, Io::Uring] {
        let image = compose(&parts, io);
        let mut engine = Engine::new(Arc::clone(&image), 8, Durability::OnFlush).unwrap();
        let mut buffers = Buffers::default();
        static BYTES: [u8; 512] = [7; 512];
        // SAFETY: the bytes live for ever and are only written from.
        unsafe { buffers.push(BYTES.as_ptr().cast_mut(), BYTES.len()) };
        engine.start(Operation::Write { offset: 0, buffers }, ());
        engine.start(Operation::WriteZeroes { offset: 0, len: 4096, unmap: true }, ());
        engine.start(Operation::Discard { offset: 0, len: 4096 }, ());
        engine.commit();
        engine.wait();
        for _ in 0..3 {
            assert!(engine.reap().unwrap().1.is_err());
        }
    }
    drop(image);
    crate::disk::open(&parts[1].path, &Options::default()).unwrap();
    assert!(std::fs::read(&parts[0].path).unwrap() == pattern(0, 4096));
}

#[test]
fn truncated_part_is_an_error_of_what_is_read_there() {
    let directory = tempfile::tempdir().unwrap();
    let parts = parts(directory.path(), &[8192, 8192]);
    for io in [Io::Sync, Io::Uring] {
        let image = compose(&parts, io);
        let (front, _) = gpt::table_bytes(2);
        std::fs::write(&parts[0].path, [1; 4096]).unwrap();
        let mut results =
            read(&image, &[(front, vec![16384]), (front, vec![4096]), (front + 8192, vec![4096])]);
        assert!(results.remove(0).is_err());
        assert!(results.iter().all(Result::is_ok));
        std::fs::write(&parts[0].path, pattern(0, 8192)).unwrap();
    }
}

#[test]
fn impossible_parts_are_refused_with_their_reason() {
    let directory = tempfile::tempdir().unwrap();
    let good = parts(directory.path(), &[4096]);
    let named = |name: &str| vec![Part { name: name.into(), ..good[0].clone() }];
    let at = |path: PathBuf| vec![Part { path, name: String::new() }];
    let (empty, huge) = (directory.path().join("empty"), directory.path().join("huge"));
    File::create(&empty).unwrap();
    // 4 EiB where the file system allows it: two of them are more than a disk can hold.
    let has_huge = File::create(&huge).and_then(|file| file.set_len(1 << 62)).is_ok();
    let mut cases = vec![
        (vec![], "a disk of 0 parts"),
        (vec![good[0].clone(); MAX_PARTS + 1], "a disk of 256 parts"),
        (named(&"é".repeat(37)), "at most 36 characters"),
        (named("a\0b"), "no control characters"),
        (at(directory.path().join("none")), "does not exist"),
        (at(directory.path().into()), "is a directory"),
        (at(empty), "is empty"),
    ];
    if has_huge {
        cases.push((vec![at(huge).remove(0); 2], "larger than any disk"));
    }
    for (parts, reason) in cases {
        let message = open_parts(&parts, &Options::default()).unwrap_err().to_string();
        assert!(message.contains(reason) && !message.contains('\n'), "{message}");
    }
    open_parts(&named(&"é".repeat(36)), &Options::default()).unwrap();
}

#[test]
fn list_is_read_with_paths_from_its_own_directory() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("list.json");
    std::fs::write(&path, r#"{"parts": [{"path": "a", "name": "x"}, {"path": "/b"}]}"#).unwrap();
    let list = PartList::read(&path).unwrap();
    assert_eq!(list.parts[0], Part { path: directory.path().join("a"), name: "x".into() });
    assert_eq!(list.parts[1], Part { path: "/b".into(), name: String::new() });
    std::fs::write(&path, r#"{"parts": ["a"]}"#).unwrap();
    assert!(matches!(PartList::read(&path), Err(PartError::Form { .. })));
    assert!(matches!(PartList::read(directory.path()), Err(PartError::Read { .. })));
}
