//! A layer of any contents is refused or unpacked, and nothing is written outside its directory; what was unpacked can
//! be packed, and comes back the same.
#![no_main]

use std::fs;
use std::path::PathBuf;
use std::sync::OnceLock;

use arbitrary::{Arbitrary, Unstructured};
use libfuzzer_sys::fuzz_target;
use rvmm::image::layers::testing::Archive;
use rvmm::image::layers::{Error, Limits, Options, Rights, pack, remove_tree, unpack};

/// Names that meet each other, so that entries replace, contain and follow one another.
const PARTS: [&str; 12] =
    ["a", "b", "c", "..", ".", "", ".wh.a", ".wh.b", ".wh..wh..opq", ".wh.", "outside", "very-long-name-of-a-part"];

#[derive(Arbitrary, Debug)]
enum Entry {
    File(Name, u8),
    Directory(Name, u16),
    Symlink(Name, Name),
    HardLink(Name, Name),
    /// Bytes of a block, as they are.
    Raw(Vec<u8>),
}

#[derive(Arbitrary, Debug)]
struct Name {
    absolute: bool,
    parts: Vec<u8>,
}

impl Name {
    fn text(&self) -> String {
        let parts = self.parts.iter().take(6).map(|part| PARTS[usize::from(*part) % PARTS.len()]);
        let start = if self.absolute { "/" } else { "" };
        format!("{start}{}", parts.collect::<Vec<_>>().join("/"))
    }
}

fn archive(entries: &[Entry]) -> Vec<u8> {
    let add = |archive: Archive, entry: &Entry| match entry {
        Entry::File(name, length) => archive.file(&name.text(), &"x".repeat(usize::from(*length))),
        Entry::Directory(name, mode) => archive.directory(&name.text(), u32::from(*mode) & 0o7777),
        Entry::Symlink(name, target) => archive.symlink(&name.text(), &target.text()),
        Entry::HardLink(name, target) => archive.hard_link(&name.text(), &target.text()),
        Entry::Raw(bytes) => archive.raw(&bytes[..bytes.len().min(512)]),
    };
    entries.iter().take(40).fold(Archive::new(), add).finish()
}

/// A directory in memory, with a file beside the layers that has to stay the only one.
fn root() -> &'static PathBuf {
    static ROOT: OnceLock<PathBuf> = OnceLock::new();
    ROOT.get_or_init(|| PathBuf::from(format!("/dev/shm/rvmm-fuzz-layer-{}", std::process::id())))
}

fuzz_target!(|input: &[u8]| {
    let mut input = Unstructured::new(input);
    let Ok(structured) = bool::arbitrary(&mut input) else { return };
    let rights = if bool::arbitrary(&mut input).unwrap_or(false) { Rights::USER } else { Rights::detect() };
    let (below, above) = if structured {
        let Ok(both) = <(Vec<Entry>, Vec<Entry>)>::arbitrary(&mut input) else { return };
        (archive(&both.0), archive(&both.1))
    } else {
        (vec![], input.take_rest().to_vec())
    };
    let root = root();
    let _ = remove_tree(root);
    let layers: Vec<PathBuf> = ["below", "above", "again"].map(|name| root.join(name)).into();
    layers.iter().for_each(|path| fs::create_dir_all(path).expect("a directory"));
    fs::write(root.join("outside"), "untouched").expect("a file");

    let limits = Limits { bytes: 1 << 20, entries: 2000, ratio: 500 };
    let options = Options { limits, rights };
    let lower = unpack(below.as_slice(), &layers[0], &[], options).is_ok();
    let lowers: &[&std::path::Path] = if lower { &[&layers[0]] } else { &[] };
    let unpacked = unpack(above.as_slice(), &layers[1], lowers, options);
    assert_eq!(fs::read_dir(root).expect("a directory").count(), 4);
    assert_eq!(fs::read_to_string(root.join("outside")).expect("a file"), "untouched");
    let mut packed = vec![];
    if unpacked.is_ok() {
        match pack(&layers[1], &mut packed, rights) {
            Ok(_) => {
                // Whiteouts and links are within the layer, so it needs nothing below.
                unpack(packed.as_slice(), &layers[2], &[], options).expect("what was packed");
                let mut twice = vec![];
                pack(&layers[2], &mut twice, rights).expect("what was unpacked again");
                assert!(packed == twice, "another archive comes of what was unpacked");
            }
            // A name that is one of a whiteout cannot come of an archive.
            Err(error @ Error::Entry { .. }) => panic!("an unpacked layer cannot be packed: {error}"),
            Err(error) => panic!("{error}"),
        }
    }
    remove_tree(root).expect("a tree");
});
