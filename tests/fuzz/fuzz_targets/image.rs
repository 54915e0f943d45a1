//! Manifests, indexes, configurations, names and instructions of any contents are refused or read.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rvmm::image::manifest::{self, Document};
use rvmm::image::{Change, Digest, Reference, time};

fuzz_target!(|input: &[u8]| {
    for media_type in [None, Some(manifest::OCI_INDEX), Some(manifest::DOCKER_MANIFEST), Some("text/html")] {
        match manifest::parse(input, media_type) {
            Ok(Document::Manifest(manifest)) => {
                assert!(manifest.layers().len() <= manifest::LAYERS_MAX);
                manifest.layers().iter().for_each(|layer| {
                    manifest::digest_of(layer).expect("a checked digest");
                });
            }
            Ok(Document::Index(index)) => drop(manifest::choose(&index).map(manifest::digest_of)),
            Err(_) => {}
        }
    }
    if let Ok(config) = manifest::parse_config(input) {
        assert_eq!(manifest::chain_ids(&config.diff_ids).len(), config.diff_ids.len());
    }
    let Ok(text) = std::str::from_utf8(input) else { return };
    if let Ok(reference) = Reference::parse(text) {
        // Both forms lead to the same name, and neither can be taken for a path or an option.
        assert_eq!(Reference::parse(&reference.to_string()).as_ref(), Ok(&reference));
        assert_eq!(Reference::parse(&reference.familiar()).as_ref(), Ok(&reference));
        let name = reference.familiar_name();
        assert!(!name.contains("..") && !name.contains("//") && !name.starts_with(['-', '/', '.']));
        reference.is_loopback();
    }
    if let Ok(digest) = text.parse::<Digest>() {
        assert_eq!(digest.to_string(), text);
    }
    if let Some(time) = time::parse(text) {
        assert_eq!(time::parse(&time::format(time)), Some(time));
    }
    let _ = text.parse::<Change>();
});
