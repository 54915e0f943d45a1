//! `image inspect`.

use std::process::ExitCode;

use clap::Args;
use serde_json::{Map, Value, json};

use super::print;
use crate::error_chain;
use crate::image::{Image, Store};

/// Prints all that is known of images, as JSON
#[derive(Args)]
pub struct InspectArguments {
    /// Names or ids
    #[arg(required = true)]
    images: Vec<String>,
}

/// Prints a list; exit code 1 if an image is not there.
pub fn run(arguments: &InspectArguments, store: &Store) -> anyhow::Result<ExitCode> {
    let (mut found, mut code) = (vec![], ExitCode::SUCCESS);
    for name in &arguments.images {
        match store.resolve(name) {
            Ok(image) => found.push(describe(store, &image)?),
            Err(error) => {
                eprintln!("rvmm: {}", error_chain(&error));
                code = ExitCode::FAILURE;
            }
        }
    }
    print(&serde_json::to_string_pretty(&Value::Array(found))?)?;
    Ok(code)
}

/// An image in the form of `docker image inspect`.
pub fn describe(store: &Store, image: &Image) -> anyhow::Result<Value> {
    let raw: Value = serde_json::from_slice(&store.raw_config(image)?)?;
    let get = |name: &str| raw.get(name).cloned().unwrap_or_default();
    let layers: Vec<String> = image.layers.iter().map(|layer| layer.diff_id.to_string()).collect();
    let mut object = Map::new();
    let size = store.unpacked_size(image);
    for (name, value) in [
        ("Id", json!(image.id)),
        ("RepoTags", json!(image.tags())),
        ("RepoDigests", json!(image.digests())),
        ("Comment", get("comment")),
        ("Created", get("created")),
        ("Author", get("author")),
        ("Config", get("config")),
        ("Architecture", get("architecture")),
        ("Os", get("os")),
        ("Size", json!(size.unwrap_or_else(|| image.compressed_size()))),
        ("RootFS", json!({"Type": "layers", "Layers": layers})),
        ("History", get("history")),
        (
            "Rvmm",
            json!({
                "Manifest": image.manifest_digest,
                "CompressedSize": image.compressed_size(),
                "Unpacked": size.is_some(),
                "Layers": image.layers,
                "Containers": store.users(&image.id)?,
            }),
        ),
    ] {
        object.insert(name.to_owned(), value);
    }
    Ok(Value::Object(object))
}
