//! Pulling: manifest, configuration, layers; three at a time, going on where an earlier attempt broke off.

use std::sync::Arc;

use reqwest::header::{CONTENT_RANGE, RANGE};
use reqwest::{Method, Response, StatusCode};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::client::{self, Client, Purpose};
use super::progress::{Bar, Progress};
use super::{Error, Options, aside, failed, run};
use crate::image::digest::Digest;
use crate::image::manifest::{self, CONFIG_MAX, Document, INDEX_DEPTH_MAX};
use crate::image::reference::{DEFAULT_TAG, Reference};
use crate::image::store::{Image, Lease, Partial, Store};

/// Layers on their way at the same time.
const PARALLEL: usize = 3;
/// Attempts in a row that bring nothing.
const ATTEMPTS: u32 = 5;
/// Between looks at a blob that another process is fetching.
const WAIT: std::time::Duration = std::time::Duration::from_millis(100);

/// What a pull brought.
#[derive(Debug)]
pub struct Pulled {
    /// The image.
    pub image: Image,
    /// Digest of manifest or index, under which the registry has it.
    pub digest: Digest,
    /// Whether the name stood for another image before, or for none.
    pub is_new: bool,
}

/// A blob that has to be there.
#[derive(Clone, Copy)]
struct Blob {
    digest: Digest,
    size: u64,
}

/// Fetches an image from its registry.
pub fn pull(
    store: &Store,
    reference: &Reference,
    options: &Options,
    progress: &Progress,
) -> Result<Pulled, crate::image::Error> {
    let reference = reference.clone().or_latest();
    run(pull_with(store, &reference, options, progress)).map_err(failed("pull", reference.familiar()))
}

async fn pull_with(
    store: &Store,
    reference: &Reference,
    options: &Options,
    progress: &Progress,
) -> Result<Pulled, Error> {
    let client = Client::new(reference, options, Purpose::Pull).await?;
    let tag = reference.tag().unwrap_or(DEFAULT_TAG);
    progress.say(&format!("{}: Pulling from {}", tag, reference.repository()));
    let mut fetched = client.manifest(tag, reference.digest()).await?;
    let digest = fetched.digest;
    let mut depth = 0;
    let manifest = loop {
        match manifest::parse(&fetched.bytes, fetched.media_type.as_deref())? {
            Document::Manifest(manifest) => break manifest,
            Document::Index(_) if depth >= INDEX_DEPTH_MAX => {
                return Err(client.protocol("has indexes within indexes"));
            }
            Document::Index(index) => {
                let chosen = manifest::digest_of(manifest::choose(&index)?)?;
                fetched = client.manifest("", Some(chosen)).await?;
                depth += 1;
            }
        }
    };
    let before = store.resolve(&reference.to_string()).ok().map(|image| image.id);
    let lease = store.lease()?;
    let config = Blob { digest: manifest::digest_of(manifest.config())?, size: manifest.config().size() };
    if config.size > CONFIG_MAX {
        return Err(client.protocol(format!("has a configuration of more than {CONFIG_MAX} bytes")));
    }
    let mut layers = vec![];
    for layer in manifest.layers() {
        layers.push(Blob { digest: manifest::digest_of(layer)?, size: layer.size() });
    }
    let needed: Vec<Digest> = layers.iter().chain([&config]).map(|blob| blob.digest).collect();
    store.protect(&lease, &needed)?;
    let manifest_digest = store.put_blob(&lease, &fetched.bytes)?;
    let client = Arc::new(client);
    // If it is here and damaged, this removes it.
    let _ = store.read_blob(&config.digest, CONFIG_MAX);
    fetch(Arc::clone(&client), store.clone(), config, None).await?;
    // What cannot run here is told before anything large is fetched.
    let parsed = manifest::parse_config(&store.read_blob(&config.digest, CONFIG_MAX)?)?;
    if parsed.diff_ids.len() != layers.len() {
        return Err(client.protocol("has a manifest and a configuration with different numbers of layers"));
    }
    fetch_layers(&client, store, layers, progress).await?;
    let image = name(store, lease, &manifest_digest, reference, digest)?;
    Ok(Pulled { is_new: before != Some(image.id), image, digest })
}

fn name(
    store: &Store,
    lease: Lease,
    manifest: &Digest,
    reference: &Reference,
    digest: Digest,
) -> Result<Image, Error> {
    let mut names = vec![reference.at(digest)];
    if reference.digest().is_none() {
        names.push(reference.clone());
    }
    let image = store.add_image(manifest, &names)?;
    drop(lease);
    Ok(image)
}

async fn fetch_layers(
    client: &Arc<Client>,
    store: &Store,
    mut layers: Vec<Blob>,
    progress: &Progress,
) -> Result<(), Error> {
    // An image may have the same layer twice.
    let mut seen = std::collections::BTreeSet::new();
    layers.retain(|layer| seen.insert(layer.digest));
    let turns = Arc::new(Semaphore::new(PARALLEL));
    let mut tasks = JoinSet::new();
    for layer in layers {
        let bar = progress.layer(&layer.digest.short(), layer.size);
        if store.has_blob(&layer.digest, Some(layer.size)) {
            bar.finish("Already exists");
            continue;
        }
        bar.doing("Waiting");
        let (client, store, turns) = (Arc::clone(client), store.clone(), Arc::clone(&turns));
        tasks.spawn(async move {
            let _turn = turns.acquire_owned().await;
            fetch(client, store, layer, Some(bar)).await
        });
    }
    while let Some(ended) = tasks.join_next().await {
        // The first failure ends the others: the set stops its tasks when it is dropped.
        ended.map_err(|error| Error::SetUp(error.into()))??;
    }
    Ok(())
}

/// Brings a blob into the store.
async fn fetch(client: Arc<Client>, store: Store, blob: Blob, bar: Option<Bar>) -> Result<(), Error> {
    let Blob { digest, size } = blob;
    let mut began_anew = false;
    loop {
        if store.has_blob(&digest, Some(size)) {
            if let Some(bar) = bar {
                bar.finish("Already exists");
            }
            return Ok(());
        }
        let store_too = store.clone();
        let Some(mut partial) = aside(move || store_too.try_partial(&digest)).await? else {
            // Another process is fetching it.
            tokio::time::sleep(WAIT).await;
            continue;
        };
        // It may have finished between the two looks.
        if store.has_blob(&digest, Some(size)) {
            partial.remove()?;
            continue;
        }
        let resumed = partial.length() > 0;
        if let Some(bar) = &bar {
            bar.doing(if resumed { "Resuming" } else { "Downloading" });
        }
        fetch_rest(&client, &mut partial, blob, bar.as_ref()).await?;
        let store_too = store.clone();
        match aside(move || store_too.finish_partial(partial, size)).await {
            // What was there of an earlier attempt may have been damaged by a power cut: once more from the start.
            Err(Error::Store(error)) if resumed && !began_anew => {
                if !matches!(*error, crate::image::Error::WrongDigest { .. }) {
                    return Err(Error::Store(error));
                }
                began_anew = true;
            }
            result => {
                result?;
                if let Some(bar) = bar {
                    bar.finish("Download complete");
                }
                return Ok(());
            }
        }
    }
}

async fn fetch_rest(
    client: &Client,
    partial: &mut Partial,
    blob: Blob,
    bar: Option<&Bar>,
) -> Result<(), Error> {
    let mut attempt = 0;
    loop {
        let before = partial.length();
        match try_fetch(client, partial, blob, bar).await {
            Err(error) if error.is_transient() => {
                // As long as something comes, going on is worth it.
                attempt = if partial.length() > before { 0 } else { attempt + 1 };
                if attempt >= ATTEMPTS {
                    return Err(error);
                }
                tokio::time::sleep(client::pause(attempt)).await;
            }
            result => return result,
        }
    }
}

async fn try_fetch(
    client: &Client,
    partial: &mut Partial,
    blob: Blob,
    bar: Option<&Bar>,
) -> Result<(), Error> {
    let Blob { digest, size } = blob;
    if partial.length() > size {
        partial.clear()?;
    }
    if partial.length() == size && size > 0 {
        return Ok(());
    }
    let offset = partial.length();
    let url = client.url(&format!("blobs/{digest}"))?;
    let range = |request: reqwest::RequestBuilder| {
        Ok(if offset > 0 { request.header(RANGE, format!("bytes={offset}-")) } else { request })
    };
    let mut response = client.send(&Method::GET, &url, range).await?;
    match response.status() {
        StatusCode::OK => {
            if offset > 0 {
                partial.clear()?;
            }
        }
        StatusCode::PARTIAL_CONTENT if offset > 0 && begins_at(&response, offset) => {}
        StatusCode::PARTIAL_CONTENT => return Err(client.protocol("sent another part than was asked for")),
        status => {
            if status == StatusCode::RANGE_NOT_SATISFIABLE {
                partial.clear()?;
            }
            return Err(client::refusal(response).await);
        }
    }
    let broken = |source| Error::Broken { host: client.host(), source };
    while let Some(chunk) = response.chunk().await.map_err(broken)? {
        if partial.length() + chunk.len() as u64 > size {
            partial.clear()?;
            return Err(
                client.protocol(format!("sent more than the {size} bytes that blob {} has", digest.short()))
            );
        }
        partial.write_all(&chunk)?;
        if let Some(bar) = bar {
            bar.set(partial.length());
        }
    }
    let found = partial.length();
    if found < size {
        return Err(Error::Short { what: format!("blob {}", digest.short()), found, expected: size });
    }
    Ok(())
}

/// Whether a part is the one that was asked for: `Content-Range: bytes FROM-TO/ALL`.
fn begins_at(response: &Response, offset: u64) -> bool {
    let header = response.headers().get(CONTENT_RANGE).and_then(|value| value.to_str().ok());
    let start = header.and_then(|text| text.strip_prefix("bytes ")?.split('-').next());
    start.is_some_and(|start| start.trim().parse() == Ok(offset))
}
