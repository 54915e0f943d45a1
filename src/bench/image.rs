//! The image under test, with the helper put into it, as an archive, as files, and in rvmm's own store.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::executor::{HELPER, Image, PATIENCE};
use super::process::{self, Invocation, Spawner};

/// Why the image cannot be made ready.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A command of rvmm failed.
    #[error("cannot {what}")]
    Command {
        /// What was to be done.
        what: &'static str,
        /// Why not.
        #[source]
        source: process::Error,
    },
    /// No image was named, and the one for that case is not there.
    #[error(
        "there is no {0:?} to take without an image's name: run scripts/build-images busybox, or name an image"
    )]
    NoDefault(PathBuf),
    /// The helper is not there.
    #[error("there is no {0:?}, which runs inside the instances: run scripts/build-agent")]
    NoHelper(PathBuf),
    /// A file cannot be made.
    #[error("cannot make {path:?}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// rvmm describes the image in an unknown way.
    #[error("what rvmm says of the image {0:?} is not understood")]
    Description(String),
}

/// The image of a run, in every engine.
pub fn name_of(run: &str) -> String {
    format!("localhost/rvmm-compare:{run}")
}

/// What is known of the image that was asked for.
pub struct Source {
    /// Its name.
    pub name: String,
    /// Its digest.
    pub id: Option<String>,
    /// Bytes, compressed, as a registry would hand it out; and unpacked.
    pub bytes: (Option<u64>, Option<u64>),
}

/// Makes the image ready below `directory`.
pub fn prepare(
    spawner: &Spawner,
    rvmm: &Path,
    image: Option<&str>,
    helper: &Path,
    directory: &Path,
) -> Result<(Image, Source), Error> {
    if !helper.is_file() {
        return Err(Error::NoHelper(helper.to_owned()));
    }
    let rvmm = rvmm.to_string_lossy().into_owned();
    let command = |what, words: &[&str]| {
        let invocation = Invocation::new([rvmm.as_str()]).and(words.iter().copied());
        spawner.output(&invocation, PATIENCE).map_err(|source| Error::Command { what, source })
    };
    let source = match image {
        Some(image) => image.to_owned(),
        None => default_image(&rvmm, &command)?,
    };
    let name = name_of(&spawner.run);
    let base = format!("{}-base", spawner.run);
    let archive = directory.join("image.tar");
    let rootfs = directory.join("rootfs");
    command("make a container of the image", &["create", "--name", &base, "--network", "none", &source])?;
    command(
        "put the helper into the image",
        &["cp", &helper.to_string_lossy(), &format!("{base}:{HELPER}")],
    )?;
    command("make the image", &["commit", &base, &name])?;
    command("unpack the image", &["cp", &format!("{base}:/"), &rootfs.to_string_lossy()])?;
    command("remove the container of the image", &["rm", "-f", &base])?;
    command("write the image into an archive", &["save", "-o", &archive.to_string_lossy(), &name])?;

    let described = describe(&command("inspect the image", &["image", "inspect", &source])?)
        .ok_or_else(|| Error::Description(source.clone()))?;
    let list = |pointer: &str| -> Vec<String> {
        let words = described.pointer(pointer).and_then(Value::as_array).into_iter().flatten();
        words.filter_map(Value::as_str).map(String::from).collect()
    };
    let mut command = list("/Config/Entrypoint");
    command.extend(list("/Config/Cmd"));
    let number = |pointer: &str| described.pointer(pointer).and_then(Value::as_u64);
    let found = Source {
        name: source,
        id: described.pointer("/Id").and_then(Value::as_str).map(String::from),
        bytes: (number("/Rvmm/CompressedSize"), number("/Size")),
    };
    Ok((Image { name, archive, rootfs, env: list("/Config/Env"), command }, found))
}

fn describe(said: &str) -> Option<Value> {
    let list: Value = serde_json::from_str(&said[said.find('[')?..]).ok()?;
    list.get(0).cloned()
}

fn default_image(
    rvmm: &str,
    command: &impl Fn(&'static str, &[&str]) -> Result<String, Error>,
) -> Result<String, Error> {
    const NAME: &str = "busybox";
    if command("look for the image", &["image", "inspect", NAME]).is_ok() {
        return Ok(NAME.into());
    }
    let built =
        Path::new(rvmm).parent().and_then(Path::parent).map(|target| target.join("images/busybox.tar"));
    let places = [built.unwrap_or_default(), "target/images/busybox.tar".into()];
    let archive = places.iter().find(|path| path.is_file());
    let archive = archive.ok_or_else(|| Error::NoDefault("target/images/busybox.tar".into()))?;
    command("load the image", &["load", "-i", &archive.to_string_lossy()])?;
    Ok(NAME.into())
}
