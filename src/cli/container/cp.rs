//! `rvmm cp`.

use std::io::{self, stdin, stdout};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};

use crate::container::archive::{Error, Files, Kind, Name, Owner, Target, Tree};
use crate::container::records::Records;

/// Copy files between a container and the host
#[derive(clap::Args)]
#[command(
    override_usage = "rvmm cp [OPTIONS] CONTAINER:PATH LOCAL|-\n       rvmm cp [OPTIONS] LOCAL|- CONTAINER:PATH",
    after_help = "A directory is copied into a directory that is there, or becomes one that is not; DIR/. is what is in \
it. - is a tar archive on standard input or output. A LOCAL path with a colon in it begins with ./ or /.

Examples:
  rvmm cp web:/etc/nginx/nginx.conf .
  rvmm cp ./site/. web:/usr/share/nginx/html
  rvmm cp web:/var/log - | tar t"
)]
pub struct CpArguments {
    /// Keep owners: otherwise files are root's in a container, and yours on the host
    #[arg(short, long)]
    archive: bool,
    /// Copy what a link SOURCE points to
    #[arg(short = 'L', long)]
    follow_link: bool,
    /// Say nothing: nothing is said anyway
    #[arg(short, long, hide = true)]
    quiet: bool,
    /// What is copied
    source: String,
    /// Where to
    destination: String,
}

/// An argument.
#[derive(Debug, PartialEq, Eq)]
enum End<'a> {
    /// Standard input or output.
    Stream,
    Host(PathBuf),
    Container(&'a str, PathBuf),
}

/// A path as it was written, which says more than what it leads to.
struct Written {
    path: PathBuf,
    /// `…/`: it must be a directory.
    is_directory: bool,
    /// `…/.`: what is in the directory.
    is_contents: bool,
}

/// What is copied.
struct Source {
    path: PathBuf,
    is_directory: bool,
    is_contents: bool,
    name: Vec<u8>,
}

fn parse(text: &str) -> anyhow::Result<End<'_>> {
    if text == "-" {
        return Ok(End::Stream);
    }
    let is_path = text.starts_with(['/', '.']);
    match text.split_once(':').filter(|(name, _)| !is_path && !name.is_empty() && !name.contains('/')) {
        // In a container, a path begins at the root.
        Some((name, path)) if !path.is_empty() => Ok(End::Container(name, in_root(path))),
        Some((name, _)) => bail!("which path of container {name}? {name}:/ is its root"),
        None => {
            let here = std::env::current_dir().context("there is no working directory")?;
            // Not `join`, which would lose what the end says.
            let path = if text.starts_with('/') { text.into() } else { format!("{}/{text}", here.display()) };
            Ok(End::Host(path.into()))
        }
    }
}

fn in_root(path: &str) -> PathBuf {
    if path.starts_with('/') { path.into() } else { format!("/{path}").into() }
}

impl Written {
    fn new(path: &Path) -> Written {
        let bytes = path.as_os_str().as_bytes();
        let is_contents = bytes.ends_with(b"/.");
        // Without what the end says.
        let plain: PathBuf = path.components().collect();
        Written { path: plain, is_directory: bytes.ends_with(b"/"), is_contents }
    }
}

/// Copies.
pub fn run(arguments: &CpArguments, records: &Records) -> anyhow::Result<ExitCode> {
    let owner = if arguments.archive { Owner::Kept } else { Owner::Receiver };
    let of = |name: &str| -> anyhow::Result<Files> {
        let record = records.read(&records.find(name)?)?;
        Ok(Files::of(records, &record)?)
    };
    match (parse(&arguments.source)?, parse(&arguments.destination)?) {
        (End::Container(name, path), End::Stream) => {
            let mut files = of(name)?;
            let source = look(&mut files, &path, arguments.follow_link)?;
            files.read(&source.path, &source.top(), Owner::Kept, io::BufWriter::new(stdout().lock()))?;
        }
        (End::Stream, End::Container(name, path)) => {
            let mut files = of(name)?;
            let directory = files.follow(&Written::new(&path).path)?;
            if files.kind(&directory)? != Some(Kind::Directory) {
                bail!("{path:?} is no directory, which an archive needs");
            }
            files.write(&Target { directory, name: Name::Archive }, Owner::Kept, stdin().lock())?;
        }
        (End::Container(name, from), End::Host(to)) => {
            let (mut files, mut host) = (of(name)?, Files::Tree(Tree::host()?));
            let source = look(&mut files, &from, arguments.follow_link)?;
            let to = place(&mut host, &source, &to)?;
            let (reader, writer) = io::pipe().context("cannot make a pipe")?;
            let host = Tree::host()?;
            let write = move || host.write(&to, owner, reader);
            let read = || files.read(&source.path, &source.top(), Owner::Kept, io::BufWriter::new(writer));
            both(write, read)?;
        }
        (End::Host(from), End::Container(name, to)) => {
            let (mut files, mut host) = (of(name)?, Files::Tree(Tree::host()?));
            let source = look(&mut host, &from, arguments.follow_link)?;
            let to = place(&mut files, &source, &to)?;
            let top = match &to.name {
                Name::New(name) => name.clone(),
                Name::Contents | Name::Archive => b".".to_vec(),
            };
            let to = Target { directory: to.directory, name: Name::Archive };
            let (reader, writer) = io::pipe().context("cannot make a pipe")?;
            let host = Tree::host()?;
            let read = move || host.read(&source.path, &top, owner, io::BufWriter::new(writer));
            let write = || files.write(&to, owner, reader);
            both(read, write)?;
        }
        (End::Container(..), End::Container(..)) => {
            bail!("copying from container to container takes two steps")
        }
        _ => bail!("one of the two paths must be in a container, as CONTAINER:PATH"),
    }
    Ok(ExitCode::SUCCESS)
}

impl Source {
    /// What the archive's top is called.
    fn top(&self) -> Vec<u8> {
        if self.name.is_empty() { b".".to_vec() } else { self.name.clone() }
    }
}

fn look(files: &mut Files, path: &Path, follow: bool) -> anyhow::Result<Source> {
    let written = Written::new(path);
    let name = written.path.file_name().map(|name| name.as_bytes().to_vec()).unwrap_or_default();
    let must_be_directory = written.is_directory || written.is_contents;
    let path = match follow || must_be_directory {
        true => files.follow(&written.path)?,
        false => written.path,
    };
    let Some(kind) = files.kind(&path)? else { bail!("there is no {path:?}") };
    let is_directory = kind == Kind::Directory;
    if must_be_directory && !is_directory {
        bail!("{path:?} is no directory");
    }
    // The root has no name that something could be called.
    Ok(Source { is_contents: written.is_contents || name.is_empty(), path, is_directory, name })
}

fn place(files: &mut Files, source: &Source, path: &Path) -> anyhow::Result<Target> {
    let written = Written::new(path);
    let path = files.follow(&written.path)?;
    let named = |path: &Path| -> anyhow::Result<Target> {
        let name = path.file_name().context("the root cannot be replaced")?.as_bytes().to_vec();
        Ok(Target { directory: path.parent().unwrap_or(Path::new("/")).into(), name: Name::New(name) })
    };
    match files.kind(&path)? {
        Some(Kind::Directory) if source.is_contents => Ok(Target { directory: path, name: Name::Contents }),
        Some(Kind::Directory) => {
            let inner = path.join(Path::new(std::ffi::OsStr::from_bytes(&source.name)));
            let there = files.kind(&inner)?;
            if there.is_some_and(|kind| (kind == Kind::Directory) != source.is_directory) {
                bail!(
                    "{inner:?} is there, and a directory and something else are not copied over each other"
                );
            }
            Ok(Target { directory: path, name: Name::New(source.name.clone()) })
        }
        Some(_) if source.is_directory => {
            bail!("{path:?} is no directory, and a directory was to be copied there")
        }
        Some(_) if written.is_directory || written.is_contents => bail!("{path:?} is no directory"),
        None if !source.is_directory && (written.is_directory || written.is_contents) => {
            bail!("there is no directory {path:?}")
        }
        Some(_) => named(&path),
        None => {
            let parent = files.follow(path.parent().unwrap_or(Path::new("/")))?;
            if files.kind(&parent)? != Some(Kind::Directory) {
                bail!("there is no directory {parent:?}");
            }
            named(&path)
        }
    }
}

/// Runs two ends of a copy, the host's on a thread of its own: an agent's connection belongs to one thread.
fn both(
    host: impl FnOnce() -> Result<(), Error> + Send,
    container: impl FnOnce() -> Result<(), Error>,
) -> anyhow::Result<()> {
    let (there, here) = std::thread::scope(|scope| {
        let thread = scope.spawn(host);
        let here = container();
        (thread.join(), here)
    });
    let there = there.map_err(|_| anyhow::anyhow!("the copying thread has failed"))?;
    // Who could not write any more is not to blame.
    match (there, here) {
        (Err(error), Err(other)) if is_broken_pipe(&error) => Err(other.into()),
        (Err(error), _) => Err(error.into()),
        (Ok(()), here) => Ok(here?),
    }
}

fn is_broken_pipe(error: &Error) -> bool {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = source {
        if error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe) {
            return true;
        }
        source = error.source();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colons_are_told_from_paths() {
        assert_eq!(parse("-").unwrap(), End::Stream);
        assert_eq!(parse("web:/a/").unwrap(), End::Container("web", "/a/".into()));
        assert_eq!(parse("web:a:b").unwrap(), End::Container("web", "/a:b".into()));
        assert_eq!(parse("/a:b").unwrap(), End::Host("/a:b".into()));
        for path in ["./a:b", "a/b:c", "a", "./a/."] {
            assert!(matches!(parse(path).unwrap(), End::Host(_)), "{path}");
        }
        assert!(parse("web:").is_err());
    }

    #[test]
    fn ends_of_paths_are_kept() {
        let written = Written::new(Path::new("/a/./b/."));
        assert!(written.is_contents && !written.is_directory);
        assert_eq!(written.path.as_os_str(), "/a/b");
        assert!(Written::new(Path::new("/a/")).is_directory);
        assert_eq!(Written::new(Path::new("/.")).path.as_os_str(), "/");
    }
}
