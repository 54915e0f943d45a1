//! Pushing: layers and configuration that the registry does not have, then the manifest.

use std::sync::Arc;

use reqwest::header::{CONTENT_LENGTH, CONTENT_TYPE};
use reqwest::{Method, RequestBuilder, StatusCode, Url};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::client::{self, Client, Purpose};
use super::progress::{Bar, Progress};
use super::upload::Upload;
use super::{Error, Options, failed, run};
use crate::image::digest::Digest;
use crate::image::manifest::OCI_MANIFEST;
use crate::image::reference::{DEFAULT_TAG, Reference};
use crate::image::store::{Image, Store};

const PARALLEL: usize = 3;

/// Puts an image into a registry, under this name; answers the manifest's digest.
pub fn push(
    store: &Store,
    image: &Image,
    reference: &Reference,
    options: &Options,
    progress: &Progress,
) -> Result<Digest, crate::image::Error> {
    let reference = reference.clone().or_latest();
    if reference.digest().is_some() {
        return Err(crate::image::Error::invalid(
            reference.familiar(),
            "a name to push to has a tag and no digest",
        ));
    }
    run(push_with(store, image, &reference, options, progress)).map_err(failed("push", reference.familiar()))
}

async fn push_with(
    store: &Store,
    image: &Image,
    reference: &Reference,
    options: &Options,
    progress: &Progress,
) -> Result<Digest, Error> {
    let client = Arc::new(Client::new(reference, options, Purpose::Push).await?);
    progress.say(&format!(
        "The push refers to repository [{}/{}]",
        reference.registry(),
        reference.repository()
    ));
    let manifest = store.raw_manifest(image)?;
    let lease = store.lease()?;
    let mut blobs: Vec<(Digest, u64)> = image.layers.iter().map(|layer| (layer.digest, layer.size)).collect();
    blobs.push((image.id, image.manifest.config().size()));
    store.protect(&lease, &blobs.iter().map(|blob| blob.0).collect::<Vec<_>>())?;
    let mut seen = std::collections::BTreeSet::new();
    blobs.retain(|blob| seen.insert(blob.0));
    let turns = Arc::new(Semaphore::new(PARALLEL));
    let mut tasks = JoinSet::new();
    for (digest, size) in blobs {
        let bar = progress.layer(&digest.short(), size);
        bar.doing("Waiting");
        let (client, store, turns) = (Arc::clone(&client), store.clone(), Arc::clone(&turns));
        tasks.spawn(async move {
            let _turn = turns.acquire_owned().await;
            upload(&client, &store, digest, size, bar).await
        });
    }
    while let Some(ended) = tasks.join_next().await {
        ended.map_err(|error| Error::SetUp(error.into()))??;
    }
    drop(lease);
    let media_type =
        image.manifest.media_type().as_ref().map_or(OCI_MANIFEST.to_owned(), ToString::to_string);
    let digest = image.manifest_digest;
    let tag = reference.tag().unwrap_or(DEFAULT_TAG);
    let url = client.url(&format!("manifests/{tag}"))?;
    client::retrying(|| put_manifest(&client, &url, &media_type, &manifest)).await?;
    Ok(digest)
}

async fn put_manifest(client: &Client, url: &Url, media_type: &str, manifest: &[u8]) -> Result<(), Error> {
    let put = |request: RequestBuilder| Ok(request.header(CONTENT_TYPE, media_type).body(manifest.to_vec()));
    let response = client.send(&Method::PUT, url, put).await?;
    if response.status() == StatusCode::CREATED { Ok(()) } else { Err(client::refusal(response).await) }
}

async fn upload(client: &Client, store: &Store, digest: Digest, size: u64, bar: Bar) -> Result<(), Error> {
    let bar = Arc::new(bar);
    let answer = client::retrying(|| try_upload(client, store, digest, size, &bar)).await?;
    bar.finish(answer);
    Ok(())
}

async fn try_upload(
    client: &Client,
    store: &Store,
    digest: Digest,
    size: u64,
    bar: &Arc<Bar>,
) -> Result<&'static str, Error> {
    let url = client.url(&format!("blobs/{digest}"))?;
    let there = client.send(&Method::HEAD, &url, Ok).await?;
    match there.status() {
        StatusCode::OK => return Ok("Layer already exists"),
        StatusCode::NOT_FOUND => {}
        _ => return Err(client::refusal(there).await),
    }
    bar.doing("Pushing");
    let begin = client.url("blobs/uploads/")?;
    let begun = client.send(&Method::POST, &begin, |request| Ok(request.header(CONTENT_LENGTH, 0))).await?;
    if begun.status() != StatusCode::ACCEPTED {
        return Err(client::refusal(begun).await);
    }
    let location = client.location(&begun, &digest)?;
    let put = |request: RequestBuilder| {
        let body = reqwest::Body::wrap(Upload::new(store.open_blob(&digest)?, size, Arc::clone(bar)));
        let request = request.header(CONTENT_TYPE, "application/octet-stream");
        Ok(request.header(CONTENT_LENGTH, size).body(body))
    };
    let done = client.send(&Method::PUT, &location, put).await?;
    if done.status() == StatusCode::CREATED { Ok("Pushed") } else { Err(client::refusal(done).await) }
}
