//! Images for tests.

use serde_json::{Value, json};

use super::digest::Digest;
use super::error::Error;
use super::layers::Compression;
use super::layers::testing::Archive;
use super::manifest;
use super::reference::Reference;
use super::store::{Image, Store};

/// Puts an image of these layers into a store; each is a plain tar stream.
pub fn image(store: &Store, name: &str, layers: &[Vec<u8>]) -> Result<Image, Error> {
    image_with(store, name, layers, |_| {})
}

/// The same, with a changed configuration.
pub fn image_with(
    store: &Store,
    name: &str,
    layers: &[Vec<u8>],
    change: impl FnOnce(&mut Value),
) -> Result<Image, Error> {
    let lease = store.lease()?;
    let diff_ids: Vec<Digest> = layers.iter().map(|layer| Digest::of(layer)).collect();
    let mut config = json!({
        "architecture": "amd64", "os": "linux", "created": "2026-01-02T03:04:05Z",
        "config": {"Cmd": ["/bin/sh"], "Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    });
    change(&mut config);
    let config = config.to_string().into_bytes();
    let mut blobs = vec![];
    for layer in layers {
        let packed = gzip(layer);
        blobs.push((store.put_blob(&lease, &packed)?, packed.len() as u64, Compression::Gzip));
    }
    let id = store.put_blob(&lease, &config)?;
    let manifest = manifest::build((id, config.len() as u64), &blobs)?;
    let digest = store.put_blob(&lease, &manifest)?;
    let names: Vec<Reference> =
        if name.is_empty() { vec![] } else { vec![Reference::parse(name)?.or_latest()] };
    store.add_image(&digest, &names)
}

/// A stream, compressed.
pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    use std::io::Write;
    let mut encoder = flate2::write::GzEncoder::new(vec![], flate2::Compression::fast());
    let _ = encoder.write_all(bytes);
    encoder.finish().unwrap_or_default()
}

/// A layer with one file.
pub fn layer(name: &str, data: &str) -> Vec<u8> {
    Archive::new().file(name, data).finish()
}

/// Bytes that do not compress, the same ones for the same seed.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    std::iter::repeat_with(&mut next).flatten().take(length).collect()
}

/// A layer with one file of bytes that do not compress.
pub fn large_layer(seed: u64, length: usize) -> Vec<u8> {
    let kind = tar::EntryType::Regular;
    Archive::new()
        .entry(kind, format!("large-{seed}").as_bytes(), b"", &noise(seed, length), |_| {}, &[])
        .finish()
}
