//! `images`.

use std::process::ExitCode;
use std::time::SystemTime;

use anyhow::bail;
use clap::{Args, ValueEnum};
use serde_json::json;

use super::print;
use super::table::{size, table};
use crate::image::{Image, Reference, Store, time};

/// How a list is printed.
#[derive(Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum ListFormat {
    /// Columns
    #[default]
    Table,
    /// A JSON object on each line
    Json,
}

/// Lists the images that are here
#[derive(Args)]
pub struct ImagesArguments {
    /// NAME[:TAG]: only those
    name: Option<String>,
    /// Print ids only
    #[arg(short, long)]
    quiet: bool,
    /// Print whole ids
    #[arg(long)]
    no_trunc: bool,
    /// Print digests
    #[arg(long)]
    digests: bool,
    /// Taken for Docker's sake: there are no images in between
    #[arg(short, long, hide = true)]
    all: bool,
    /// dangling=true: only those without a name; dangling=false: only the others
    #[arg(short, long, value_name = "FILTER")]
    filter: Vec<String>,
    /// How
    #[arg(long, value_enum, default_value_t)]
    format: ListFormat,
}

/// One line: an image under one of its names.
struct Line<'a> {
    image: &'a Image,
    repository: String,
    tag: String,
    digest: String,
}

const NONE: &str = "<none>";

/// Prints the list, newest first.
pub fn run(arguments: &ImagesArguments, store: &Store) -> anyhow::Result<ExitCode> {
    let dangling = dangling(&arguments.filter)?;
    let wanted = arguments.name.as_deref().map(Reference::parse).transpose()?;
    let mut images = store.images()?;
    images.sort_by_key(|image| std::cmp::Reverse(created(image)));
    let mut lines: Vec<Line<'_>> = images.iter().flat_map(lines).collect();
    lines.retain(|line| dangling.is_none_or(|dangling| dangling == (line.tag == NONE)));
    if let Some(wanted) = wanted {
        lines.retain(|line| {
            let fits_tag = wanted.tag().is_none_or(|tag| tag == line.tag);
            line.repository == wanted.familiar_name() && fits_tag
        });
    }
    let id = |image: &Image| if arguments.no_trunc { image.id.to_string() } else { image.id.short() };
    if arguments.quiet {
        let mut ids: Vec<String> = lines.iter().map(|line| id(line.image)).collect();
        ids.dedup();
        ids.iter().try_for_each(|id| print(id))?;
        return Ok(ExitCode::SUCCESS);
    }
    let bytes = |image: &Image| store.unpacked_size(image).unwrap_or_else(|| image.compressed_size());
    if arguments.format == ListFormat::Json {
        for line in lines {
            let object = json!({
                "Repository": line.repository,
                "Tag": line.tag,
                "Digest": line.digest,
                "ID": id(line.image),
                "CreatedAt": line.image.config.created(),
                "CreatedSince": age(line.image),
                "Size": size(bytes(line.image)),
            });
            print(&object.to_string())?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    let mut heading = vec!["REPOSITORY", "TAG", "DIGEST", "IMAGE ID", "CREATED", "SIZE"];
    let row = |line: &Line<'_>| {
        let (repository, tag, digest) = (line.repository.clone(), line.tag.clone(), line.digest.clone());
        vec![repository, tag, digest, id(line.image), age(line.image), size(bytes(line.image))]
    };
    let mut rows: Vec<Vec<String>> = lines.iter().map(row).collect();
    if !arguments.digests {
        heading.remove(2);
        rows.iter_mut().for_each(|row| drop(row.remove(2)));
    }
    print(&table(&heading, &rows))?;
    Ok(ExitCode::SUCCESS)
}

fn dangling(filters: &[String]) -> anyhow::Result<Option<bool>> {
    let mut dangling = None;
    for filter in filters {
        dangling = match filter.as_str() {
            "dangling=true" | "dangling=1" => Some(true),
            "dangling=false" | "dangling=0" => Some(false),
            _ => bail!("what is the filter {filter:?}? There is dangling=true and dangling=false"),
        };
    }
    Ok(dangling)
}

fn created(image: &Image) -> Option<SystemTime> {
    image.config.created().as_deref().and_then(time::parse)
}

fn age(image: &Image) -> String {
    let age = created(image).and_then(|created| SystemTime::now().duration_since(created).ok());
    age.map_or("N/A".to_owned(), time::ago)
}

fn lines(image: &Image) -> Vec<Line<'_>> {
    let digest_of = |repository: &str| {
        let found =
            image.names.iter().find(|name| name.familiar_name() == repository && name.digest().is_some());
        found.and_then(Reference::digest).map_or(NONE.to_owned(), |digest| digest.to_string())
    };
    let tagged = image.names.iter().filter_map(|name| Some((name.familiar_name(), name.tag()?.to_owned())));
    let line = |(repository, tag): (String, String)| {
        let digest = digest_of(&repository);
        Line { image, repository, tag, digest }
    };
    let lines: Vec<Line<'_>> = tagged.map(line).collect();
    if !lines.is_empty() {
        return lines;
    }
    let repository = image.names.first().map_or(NONE.to_owned(), Reference::familiar_name);
    vec![Line { image, digest: digest_of(&repository), repository, tag: NONE.to_owned() }]
}
