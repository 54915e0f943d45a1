//! Logging in: the registry is asked before credentials are kept.

use super::client::{Client, Purpose};
use super::{Credentials, Error, Options, failed, run};
use crate::image::reference::{DEFAULT_REGISTRY, Reference};

/// The registry that people mean.
fn registry(name: &str) -> Result<Reference, crate::image::Error> {
    let host = name.strip_prefix("https://").or_else(|| name.strip_prefix("http://")).unwrap_or(name);
    let host = host.split('/').next().unwrap_or(host);
    let host = if host.is_empty() { DEFAULT_REGISTRY } else { host };
    // As part of a name, so that it is checked as one.
    let reference = Reference::parse(&format!("{host}/a/b"))?;
    if reference.repository() == "a/b" {
        return Ok(reference);
    }
    Err(crate::image::Error::invalid(name, "it is not a registry: a host, with a dot, a port or localhost"))
}

/// Tries user and password, and keeps them; answers where.
pub fn login(
    name: &str,
    user: &str,
    password: &str,
    options: &Options,
) -> Result<String, crate::image::Error> {
    let reference = registry(name)?;
    let credentials = Credentials::Basic { user: user.to_owned(), password: password.to_owned() };
    let options = Options { credentials: Some(credentials), ..options.clone() };
    let task = async {
        let client = Client::new_for_registry(&reference, &options, Purpose::Pull).await?;
        client.check().await?;
        if !client.is_authenticated().await {
            tracing::warn!("{} does not ask for credentials", reference.registry());
        }
        options.auth_file.store(reference.registry(), user, password)
    };
    run(task).map_err(failed("log in to", reference.registry()))
}

/// Forgets credentials; false if there were none.
pub fn logout(name: &str, options: &Options) -> Result<bool, crate::image::Error> {
    let reference = registry(name)?;
    let forgotten: Result<bool, Error> = options.auth_file.forget(reference.registry());
    forgotten.map_err(failed("log out of", reference.registry()))
}
