//! Where templates lie, which there are, and who makes one.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::super::machine::Class;
use super::build::{self, Site};
use super::key::Key;
use super::{Error, host};
use crate::container::files::{self, Lock};
use crate::container::roots::Roots;
use crate::container::state::now_ns;

/// File that says what a template is; who finds it finds the rest.
const DESCRIPTION: &str = "template.json";
/// File that is there when the template has been restored.
const PROVEN: &str = "proven";
/// How names of templates on their way in and out begin.
const UNFINISHED: &str = ".";
/// How long nobody tries again what has failed.
const FAILURE_COUNTS: Duration = Duration::from_secs(600);

/// The templates of a user.
#[derive(Clone, Debug)]
pub struct Templates {
    /// Snapshots, each in a directory `CLASS-KEY`.
    data: PathBuf,
    /// Locks, and VMs that are being made into templates.
    run: PathBuf,
}

/// A template.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    /// Its directory, which is a snapshot's.
    pub path: PathBuf,
    class: Class,
    key: String,
}

/// What is noted with a template.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Description {
    class: Class,
    key: String,
    made_ns: u64,
    made_by: String,
}

/// A template, to be listed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its name: class and key.
    pub name: String,
    /// Its class.
    pub class: Class,
    /// When it was made, in nanoseconds since 1970.
    pub made_ns: u64,
    /// Bytes that it takes on the disk.
    pub bytes: u64,
    /// Whether VMs go on from it: kernel, agent, host and rvmm are as they were.
    pub current: bool,
}

/// That no template of a key could be made, or none could be restored.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Failure {
    key: String,
    at_ns: u64,
    why: String,
}

impl Template {
    /// Its name: class and key.
    pub fn name(&self) -> String {
        format!("{}-{}", self.class.name(), self.key)
    }
}

impl Templates {
    /// Those of a user.
    pub fn new(roots: &Roots) -> Templates {
        Templates { data: roots.data.join("templates"), run: roots.run.join("templates") }
    }

    /// The template of a class. One that is not there is made, which takes as long as a boot; whoever else wants it waits for
    /// that. What has failed a short time ago is not tried again unless the caller insists.
    pub fn get(&self, class: &Class, insist: bool) -> Result<Template, Error> {
        let key = Key::of(class)?;
        self.get_or(class, &key, insist, |site| build::build(site, class, &key))
    }

    fn get_or(
        &self,
        class: &Class,
        key: &Key,
        insist: bool,
        build: impl FnOnce(&Site) -> Result<(), Error>,
    ) -> Result<Template, Error> {
        if let Some(template) = self.find(class, key) {
            return Ok(template);
        }
        let asked_ns = now_ns();
        let _lock = self.lock(class)?;
        if let Some(template) = self.find(class, key) {
            return Ok(template);
        }
        if let Some(failure) = self.failure(class, key)
            // Also for who insists: others have tried while we waited for them.
            && (!insist || failure.at_ns >= asked_ns)
        {
            return Err(Error::Failed(failure.why));
        }
        self.make(class, key, build)
            .inspect_err(|error| self.note_failure(class, key, &crate::error_chain(error)))
    }

    /// Makes a template, with the class's lock held.
    fn make(
        &self,
        class: &Class,
        key: &Key,
        build: impl FnOnce(&Site) -> Result<(), Error>,
    ) -> Result<Template, Error> {
        let site = self.site(class);
        // Of somebody who was killed.
        site.clear()?;
        files::make_directory(&self.data)?;
        let begun = site.begin();
        let built = begun.and_then(|()| build(&site)).and_then(|()| self.keep(class, key, &site));
        site.clear()?;
        let template = built?;
        let _ = fs::remove_file(self.failure_file(class));
        self.remove_others(class, key);
        Ok(template)
    }

    fn keep(&self, class: &Class, key: &Key, site: &Site) -> Result<Template, Error> {
        let description = Description {
            class: class.clone(),
            key: key.as_str().into(),
            made_ns: now_ns(),
            made_by: env!("CARGO_PKG_VERSION").into(),
        };
        files::write_json(&site.data.join(DESCRIPTION), &description)?;
        let path = self.path(class, key.as_str());
        // Of a template that was damaged, perhaps.
        files::remove_tree(&path)?;
        fs::rename(&site.data, &path).map_err(host("name the template", &path))?;
        Ok(Template { path, class: class.clone(), key: key.as_str().into() })
    }

    fn find(&self, class: &Class, key: &Key) -> Option<Template> {
        let path = self.path(class, key.as_str());
        let there = path.join(DESCRIPTION).is_file();
        there.then(|| Template { path, class: class.clone(), key: key.as_str().into() })
    }

    /// Notes that a template works.
    pub fn prove(&self, template: &Template) {
        let path = template.path.join(PROVEN);
        if !path.exists() {
            let _ = fs::File::create(path);
        }
    }

    /// Takes away a template that could not be restored. One that never could is not made again at once.
    pub fn discard(&self, template: &Template, why: &str) -> Result<(), Error> {
        let _lock = self.lock(&template.class)?;
        if !template.path.join(PROVEN).exists() {
            let failure = Failure { key: template.key.clone(), at_ns: now_ns(), why: why.into() };
            files::write_json(&self.failure_file(&template.class), &failure)?;
        }
        self.remove_directory(&template.path)
    }

    /// All templates, by name.
    pub fn list(&self) -> Result<Vec<Entry>, Error> {
        let mut entries = vec![];
        for name in files::names(&self.data)? {
            let path = self.data.join(&name);
            let Ok(description) = files::read_json::<Description>(&path.join(DESCRIPTION)) else { continue };
            let current = Key::of(&description.class).is_ok_and(|key| key.as_str() == description.key);
            entries.push(Entry {
                name,
                bytes: bytes_of(&path),
                made_ns: description.made_ns,
                class: description.class,
                current,
            });
        }
        Ok(entries)
    }

    /// Removes templates whose names begin with `name`; all of them if it is empty. Returns the names. VMs that go on from one
    /// are not touched by that.
    pub fn remove(&self, name: &str) -> Result<Vec<String>, Error> {
        let mut removed = vec![];
        for found in files::names(&self.data)? {
            if !found.starts_with(UNFINISHED) && found.starts_with(name) {
                self.remove_directory(&self.data.join(&found))?;
                removed.push(found);
            }
        }
        Ok(removed)
    }

    /// Takes away what killed processes have left.
    pub fn sweep(&self) -> Result<(), Error> {
        let left = files::names(&self.run)?.into_iter().chain(files::names(&self.data)?);
        for name in left {
            let Some(class) = self.class_of(&name) else { continue };
            let Some(_lock) = Lock::try_take(&self.lock_file(&class))? else { continue };
            Site::of(&self.data, &self.run, &class).clear()?;
        }
        Ok(())
    }

    /// The class whose leftover has this name.
    fn class_of(&self, name: &str) -> Option<String> {
        match name.strip_prefix(UNFINISHED) {
            Some(rest) => rest.strip_prefix("new-").map(Into::into),
            None => self.run.join(name).is_dir().then(|| name.to_owned()),
        }
    }

    fn site(&self, class: &Class) -> Site {
        Site::of(&self.data, &self.run, &class.name())
    }

    fn path(&self, class: &Class, key: &str) -> PathBuf {
        self.data.join(format!("{}-{key}", class.name()))
    }

    fn lock_file(&self, class: &str) -> PathBuf {
        self.run.join(format!("{class}.lock"))
    }

    fn lock(&self, class: &Class) -> Result<Lock, Error> {
        files::make_directory(&self.run)?;
        Ok(Lock::wait(&self.lock_file(&class.name()))?)
    }

    fn failure_file(&self, class: &Class) -> PathBuf {
        self.run.join(format!("{}.failed", class.name()))
    }

    fn failure(&self, class: &Class, key: &Key) -> Option<Failure> {
        let failure: Failure = files::read_json(&self.failure_file(class)).ok()?;
        let age = now_ns().saturating_sub(failure.at_ns);
        (failure.key == key.as_str() && u128::from(age) < FAILURE_COUNTS.as_nanos()).then_some(failure)
    }

    fn note_failure(&self, class: &Class, key: &Key, why: &str) {
        let failure = Failure { key: key.as_str().into(), at_ns: now_ns(), why: why.into() };
        if let Err(error) = files::write_json(&self.failure_file(class), &failure) {
            tracing::debug!("{}", crate::error_chain(&error));
        }
    }

    /// Removes templates of the class that do not fit any more.
    fn remove_others(&self, class: &Class, key: &Key) {
        for name in files::names(&self.data).unwrap_or_default() {
            let path = self.data.join(&name);
            let Ok(description) = files::read_json::<Description>(&path.join(DESCRIPTION)) else { continue };
            if description.class == *class
                && description.key != key.as_str()
                && let Err(error) = self.remove_directory(&path)
            {
                tracing::warn!("{}", crate::error_chain(&error));
            }
        }
    }

    /// Removes a template so that nobody finds half of it.
    fn remove_directory(&self, path: &Path) -> Result<(), Error> {
        let _ = fs::remove_file(path.join(DESCRIPTION));
        Ok(files::remove_tree(path)?)
    }
}

fn bytes_of(directory: &Path) -> u64 {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.metadata().ok()).map(|found| found.blocks() * 512).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn templates(directory: &Path) -> Templates {
        let roots = Roots { data: directory.join("data"), run: directory.join("run") };
        Templates::new(&roots)
    }

    fn class() -> Class {
        Class { memory_bytes: 128 << 20, cpus: 1, mtus: vec![] }
    }

    fn write(text: &'static str) -> impl Fn(&Site) -> Result<(), Error> {
        move |site| fs::write(site.data.join("state"), text).map_err(host("write", &site.data))
    }

    fn never(_: &Site) -> Result<(), Error> {
        panic!("a template was made for which there was no need")
    }

    fn contents(template: &Template) -> String {
        fs::read_to_string(template.path.join("state")).unwrap()
    }

    #[test]
    fn a_template_is_made_once_for_its_key_and_takes_the_place_of_others() {
        let directory = tempfile::tempdir().unwrap();
        let templates = templates(directory.path());
        let (class, one, two) = (class(), Key::made_up("one"), Key::made_up("two"));
        let first = templates.get_or(&class, &one, false, write("1")).unwrap();
        assert_eq!(templates.get_or(&class, &one, false, never).unwrap(), first);
        let second = templates.get_or(&class, &two, false, write("2")).unwrap();
        assert_eq!(contents(&second), "2");
        assert!(!first.path.exists());
        // Of another class.
        let other = Class { cpus: 2, ..class.clone() };
        templates.get_or(&other, &one, false, write("3")).unwrap();
        assert_eq!(contents(&second), "2");
        assert_eq!(templates.list().unwrap().len(), 2);
        assert!(templates.list().unwrap().iter().all(|entry| !entry.current));
        assert_eq!(templates.remove("128m-1c").unwrap().len(), 1);
        assert_eq!(templates.list().unwrap().len(), 1);
    }

    #[test]
    fn many_at_once_make_one() {
        let directory = tempfile::tempdir().unwrap();
        let templates = templates(directory.path());
        let made = std::sync::atomic::AtomicU32::new(0);
        let build = |site: &Site| {
            made.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            std::thread::sleep(Duration::from_millis(20));
            write("x")(site)
        };
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let found = templates.get_or(&class(), &Key::made_up("k"), false, build).unwrap();
                    assert_eq!(contents(&found), "x");
                });
            }
        });
        assert_eq!(made.into_inner(), 1);
    }

    #[test]
    fn what_has_failed_is_not_tried_again_at_once() {
        let directory = tempfile::tempdir().unwrap();
        let templates = templates(directory.path());
        let (class, key) = (class(), Key::made_up("k"));
        let fail = |_: &Site| Err(Error::NoKernel("vmlinux"));
        assert!(templates.get_or(&class, &key, false, fail).is_err());
        let refused = templates.get_or(&class, &key, false, never).unwrap_err();
        assert!(refused.to_string().contains("vmlinux"), "{refused}");
        // Another key is another matter, and so is somebody who insists.
        templates.get_or(&class, &Key::made_up("other"), false, write("x")).unwrap();
        templates.get_or(&class, &key, true, write("x")).unwrap();
        templates.get_or(&class, &key, false, never).unwrap();
        assert!(files::names(&templates.data).unwrap().iter().all(|name| !name.starts_with('.')));
    }

    #[test]
    fn one_that_never_worked_is_not_made_again_at_once() {
        let directory = tempfile::tempdir().unwrap();
        let templates = templates(directory.path());
        let (class, key) = (class(), Key::made_up("k"));
        let first = templates.get_or(&class, &key, false, write("1")).unwrap();
        templates.prove(&first);
        templates.discard(&first, "altered").unwrap();
        assert!(!first.path.exists());
        let second = templates.get_or(&class, &key, false, write("2")).unwrap();
        templates.discard(&second, "it does not start").unwrap();
        assert!(templates.get_or(&class, &key, false, never).is_err());
    }

    #[test]
    fn leftovers_of_the_killed_go_and_those_of_the_living_stay() {
        let directory = tempfile::tempdir().unwrap();
        let templates = templates(directory.path());
        let site = templates.site(&class());
        files::make_directory(&templates.data).unwrap();
        let lock = templates.lock(&class()).unwrap();
        site.begin().unwrap();
        fs::write(site.data.join("memory-1"), "x").unwrap();
        templates.sweep().unwrap();
        assert!(site.data.exists() && site.run.exists());
        drop(lock);
        templates.sweep().unwrap();
        assert!(!site.data.exists() && !site.run.exists());
    }
}
