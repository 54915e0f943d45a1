//! Which containers use an image.

use std::fs;

use super::{Store, files};
use crate::image::digest::Digest;
use crate::image::error::Error;

/// Whether a container's id can be a file's name.
fn check(container: &str) -> Result<(), Error> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || b == b'-';
    if container.is_empty() || container.len() > 200 || !container.bytes().all(plain) {
        return Err(Error::invalid("a container's id", format!("{container:?} is none")));
    }
    Ok(())
}

impl Store {
    /// Keeps an image for a container until it is released.
    pub fn hold(&self, image: &Digest, container: &str) -> Result<(), Error> {
        check(container)?;
        let _locked = self.shared()?;
        if !self.record_path(image).exists() {
            return Err(Error::NotFound(image.to_string()));
        }
        let directory = self.path("users").join(image.hex());
        // The last user may be leaving, and remove the directory.
        let path = directory.join(container);
        for attempt in 0.. {
            fs::create_dir_all(&directory).map_err(Error::file("make", &directory))?;
            match fs::File::create(&path).and_then(|file| file.sync_all()) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound && attempt < 100 => {}
                result => {
                    result.map_err(Error::file("make", &path))?;
                    break;
                }
            }
        }
        files::sync_directory(&directory)?;
        files::sync_directory(&self.path("users"))
    }

    /// The container does not need the image any more. It is no error if it did not.
    pub fn release(&self, image: &Digest, container: &str) -> Result<(), Error> {
        check(container)?;
        let _locked = self.shared()?;
        let directory = self.path("users").join(image.hex());
        files::remove(&directory.join(container))?;
        // Fails while there are others, as it should.
        let _ = fs::remove_dir(&directory);
        Ok(())
    }

    /// All that use an image, of any image.
    pub fn all_users(&self) -> Result<Vec<(Digest, String)>, Error> {
        let users = self.path("users");
        let mut all = vec![];
        for hex in files::names(&users)? {
            let Ok(image) = format!("sha256:{hex}").parse::<Digest>() else { continue };
            all.extend(self.users(&image)?.into_iter().map(|container| (image, container)));
        }
        Ok(all)
    }

    /// The containers that use an image.
    pub fn users(&self, image: &Digest) -> Result<Vec<String>, Error> {
        files::names(&self.path("users").join(image.hex()))
    }
}
