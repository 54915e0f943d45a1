use proptest::prelude::*;

use super::format::{HEADER_BYTES, encode};
use super::state::MemoryPlace;
use super::*;
use crate::kvm::features::Features;
use crate::kvm::kind::Kind;
use crate::kvm::{ChipState, VcpuState};
use crate::vm::config::{Disk, Share, Size, VmConfig};

fn config() -> VmConfig {
    VmConfig { memory: Size(32 << 20), cpus: 2, ..VmConfig::default() }
}

fn state_of(config: &VmConfig) -> MachineState {
    MachineState::new(
        Kind::Pvm,
        Features::needed(Kind::Pvm, &[]),
        MemoryPlace { id: [3; 16], size_bytes: 32 << 20, name: None, bases: vec![] },
        config,
        0xe0040,
        vec![VcpuState::default(); 2],
        ChipState::default(),
        Default::default(),
        vec![],
    )
    .unwrap()
}

fn sealed() -> Vec<u8> {
    encode(&state_of(&config())).unwrap()
}

#[test]
fn state_comes_back_as_it_was() {
    let bytes = sealed();
    let state = decode(&bytes).unwrap();
    assert_eq!(state.configuration().unwrap(), config());
    assert_eq!((state.vcpus.len(), state.memory.id), (2, [3; 16]));
    assert_eq!(encode(&state).unwrap(), bytes);
}

#[test]
fn files_that_are_cut_off_or_longer_are_refused() {
    let bytes = sealed();
    for len in 0..bytes.len() {
        let error = decode(&bytes[..len]).err();
        let told = match len {
            0..8 => matches!(error, Some(FormatError::Magic)),
            _ => matches!(error, Some(FormatError::Length { .. })),
        };
        assert!(told, "{len}: {error:?}");
    }
    let mut long = bytes;
    long.push(0);
    assert!(matches!(decode(&long), Err(FormatError::Length { .. })));
    long.resize(9 << 20, 0);
    assert!(matches!(decode(&long), Err(FormatError::TooLong(_))));
}

#[test]
fn other_formats_are_named() {
    let mut bytes = sealed();
    bytes[8] = 9;
    let error = decode(&bytes).err().unwrap();
    assert!(matches!(error, FormatError::Version { found: 9, known: FORMAT_VERSION }));
    assert!(error.to_string().contains("format 9"));
    assert!(matches!(decode(b"\x7fELF and more of it"), Err(FormatError::Magic)));
}

#[test]
fn states_that_contradict_themselves_are_refused() {
    type Change = fn(&mut VmConfig, &mut MachineState);
    let cases: [(Change, &str); 8] = [
        (|config, _| config.memory = Size(64 << 20), "two sizes"),
        (|config, _| config.cpus = 3, "vCPUs"),
        (|_, state| state.vcpus.clear(), "vCPUs"),
        (|config, _| config.cpus = 1000, "1000 vCPUs"),
        (|config, _| config.rng = true, "devices"),
        (|config, _| config.disks = vec![Disk::new("x"); 500], "500 devices"),
        (|config, _| config.shares = vec![Share::new("t", "/etc")], "devices"),
        (|_, state| state.config = "{\"cpus\": \"many\"}".into(), "invalid"),
    ];
    for (change, says) in cases {
        let (mut config, mut state) = (config(), state_of(&config()));
        change(&mut config, &mut state);
        if state.config == state_of(&self::config()).config {
            state.config = serde_json::to_string(&config).unwrap();
        }
        let error = decode(&encode(&state).unwrap()).err().unwrap().to_string();
        assert!(error.contains(says), "{error}");
    }
}

#[test]
fn place_without_a_snapshot_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let place = Place::directory(directory.path());
    assert!(matches!(Snapshot::open(&place), Err(LoadError::Missing(_))));
    std::fs::write(&place.state, "#!/bin/sh\n").unwrap();
    assert!(matches!(Snapshot::open(&place), Err(LoadError::Foreign(_))));
    std::fs::write(&place.state, sealed()).unwrap();
    // Its memory is nowhere.
    assert!(matches!(Snapshot::open(&place), Err(LoadError::Foreign(_))));
    let memory = directory.path().join("m");
    let place = Place { memory: Some(memory.clone()), ..place };
    assert!(matches!(Snapshot::open(&place), Err(LoadError::File { .. })));
    std::fs::write(&memory, "too short").unwrap();
    assert!(matches!(Snapshot::open(&place), Err(LoadError::Memory { .. })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn altered_files_are_refused(at in any::<prop::sample::Index>(), bit in 0..8u8) {
        let mut bytes = sealed();
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        prop_assert!(decode(&bytes).is_err());
    }

    #[test]
    fn bodies_of_any_bytes_are_read_or_refused(
        places in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..20),
        rest in prop::collection::vec(any::<u8>(), 0..64),
    ) {
        let mut body = sealed().split_off(HEADER_BYTES);
        for (at, value) in &places {
            let at = at.index(body.len());
            body[at] = *value;
        }
        if let Ok(state) = decode_body(&body) {
            prop_assert!(state.configuration().is_ok());
        }
        prop_assert!(decode_body(&rest).is_err());
    }
}
