//! HTTP: requests to one repository of a registry.

use std::fs;
use std::path::Path;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use reqwest::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderValue, WWW_AUTHENTICATE};
use reqwest::{Certificate, Method, RequestBuilder, Response, StatusCode, Url};
use serde_json::Value;
use tokio::sync::Mutex;

use super::challenge::{self, Challenge};
use super::{Credentials, Error, Options, api_host};
use crate::image::digest::Digest;
use crate::image::manifest::{DOCKER_INDEX, DOCKER_MANIFEST, MANIFEST_MAX, OCI_INDEX, OCI_MANIFEST};
use crate::image::reference::Reference;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
/// Without a byte for so long, a transfer is dead.
const READ_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a registry that may or may not speak TLS has to show it.
const PROBE_TIMEOUT: Duration = Duration::from_secs(5);
/// Bytes of a token's answer and of an error's.
const TOKEN_MAX: u64 = 1 << 20;
const ERROR_MAX: u64 = 64 << 10;
/// Characters of an error's text that are shown.
const MESSAGE_MAX: usize = 300;
const ATTEMPTS: u32 = 4;
const PAUSE: Duration = Duration::from_millis(250);
const CERTIFICATES: &str = "/etc/docker/certs.d";

/// What a client is for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    Pull,
    Push,
}

/// A client of one repository.
pub(super) struct Client {
    http: reqwest::Client,
    base: Url,
    repository: String,
    purpose: Purpose,
    credentials: Option<Credentials>,
    authorization: Mutex<Option<HeaderValue>>,
}

/// A manifest or index as it came.
pub(super) struct Fetched {
    pub(super) bytes: Vec<u8>,
    pub(super) digest: Digest,
    pub(super) media_type: Option<String>,
}

fn set_up(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::SetUp(error.into())
}

/// Certificates for a registry, where Docker looks for them.
fn certificates(registry: &str) -> Vec<Certificate> {
    let Ok(entries) = fs::read_dir(Path::new(CERTIFICATES).join(registry)) else { return vec![] };
    let paths = entries.flatten().map(|entry| entry.path());
    let paths = paths.filter(|path| path.extension().is_some_and(|extension| extension == "crt"));
    paths.filter_map(|path| Certificate::from_pem(&fs::read(path).ok()?).ok()).collect()
}

/// How long to wait after so many attempts.
pub(super) fn pause(attempt: u32) -> Duration {
    PAUSE * 2u32.saturating_pow(attempt.min(6))
}

/// Does something again, after a pause, while another attempt may do better.
pub(super) async fn retrying<T, F: Future<Output = Result<T, Error>>>(
    mut task: impl FnMut() -> F,
) -> Result<T, Error> {
    let mut attempt = 0;
    loop {
        match task().await {
            Err(error) if error.is_transient() && attempt + 1 < ATTEMPTS => {
                tokio::time::sleep(pause(attempt)).await;
                attempt += 1;
            }
            result => return result,
        }
    }
}

impl Client {
    pub(super) async fn new(
        reference: &Reference,
        options: &Options,
        purpose: Purpose,
    ) -> Result<Self, Error> {
        let registry = reference.registry();
        let credentials = match &options.credentials {
            Some(credentials) => Some(credentials.clone()),
            None => options.auth_file.find(registry)?,
        };
        let lenient = !options.tls_verify || reference.is_loopback();
        let mut builder = reqwest::Client::builder()
            .user_agent(concat!("rvmm/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(READ_TIMEOUT)
            .tls_danger_accept_invalid_certs(lenient)
            .tls_certs_merge(certificates(registry));
        if reference.is_loopback() {
            builder = builder.no_proxy();
        }
        let http = builder.build().map_err(set_up)?;
        let host = api_host(reference);
        let url = |scheme: &str| Url::parse(&format!("{scheme}://{host}/v2/")).map_err(set_up);
        let mut base = url("https")?;
        // As Docker does: on this host, what does not speak TLS is spoken to without.
        if lenient && http.get(base.clone()).timeout(PROBE_TIMEOUT).send().await.is_err() {
            base = url("http")?;
        }
        Ok(Self {
            http,
            base,
            repository: reference.repository().to_owned(),
            purpose,
            credentials,
            authorization: Mutex::new(None),
        })
    }

    /// For the registry as a whole, not for a repository.
    pub(super) async fn new_for_registry(
        reference: &Reference,
        options: &Options,
        purpose: Purpose,
    ) -> Result<Self, Error> {
        Ok(Self { repository: String::new(), ..Self::new(reference, options, purpose).await? })
    }

    /// Host and port, for messages.
    pub(super) fn host(&self) -> String {
        host(&self.base)
    }

    pub(super) fn protocol(&self, why: impl Into<String>) -> Error {
        Error::Protocol { host: self.host(), why: why.into() }
    }

    /// A URL of the repository.
    pub(super) fn url(&self, rest: &str) -> Result<Url, Error> {
        self.base.join(&format!("{}/{rest}", self.repository)).map_err(set_up)
    }

    /// Where the registry wants something uploaded, with the digest added.
    pub(super) fn location(&self, response: &Response, digest: &Digest) -> Result<Url, Error> {
        let location =
            response.headers().get(reqwest::header::LOCATION).and_then(|value| value.to_str().ok());
        let location = location.ok_or_else(|| self.protocol("does not say where to upload to"))?;
        let mut url = response
            .url()
            .join(location)
            .map_err(|_| self.protocol("names a place for uploads that is none"))?;
        if !matches!(url.scheme(), "http" | "https") {
            return Err(self.protocol("names a place for uploads that is none"));
        }
        url.query_pairs_mut().append_pair("digest", &digest.to_string());
        Ok(url)
    }

    /// Whether credentials may go there.
    fn is_own(&self, url: &Url) -> bool {
        url.origin() == self.base.origin()
    }

    async fn try_send(&self, request: RequestBuilder, url: &Url) -> Result<Response, Error> {
        request.send().await.map_err(|source| Error::Connect { host: host(url), source })
    }

    /// Sends a request, and once more with a new token if the registry asks for one. Every status is an answer but 401.
    pub(super) async fn send(
        &self,
        method: &Method,
        url: &Url,
        build: impl Fn(RequestBuilder) -> Result<RequestBuilder, Error>,
    ) -> Result<Response, Error> {
        let own = self.is_own(url);
        let mut used = if own { self.authorization.lock().await.clone() } else { None };
        for attempt in 0..2 {
            let mut request = build(self.http.request(method.clone(), url.clone()))?;
            if let Some(authorization) = &used {
                request = request.header(AUTHORIZATION, authorization);
            }
            let response = self.try_send(request, url).await?;
            if response.status() != StatusCode::UNAUTHORIZED {
                return Ok(response);
            }
            if attempt == 0 && own {
                let headers = response.headers().get_all(WWW_AUTHENTICATE).iter();
                let texts = headers.filter_map(|value| value.to_str().ok());
                let challenges: Vec<Challenge> = texts.flat_map(challenge::parse).collect();
                if let Some(authorization) = self.authenticate(&challenges, used.as_ref()).await? {
                    used = Some(authorization);
                    continue;
                }
            }
            return Err(refusal(response).await);
        }
        Err(self.protocol("asks for credentials again and again"))
    }

    /// What convinces the registry; `None` if there is nothing that could. Another request may have found it meanwhile.
    async fn authenticate(
        &self,
        challenges: &[Challenge],
        used: Option<&HeaderValue>,
    ) -> Result<Option<HeaderValue>, Error> {
        let mut current = self.authorization.lock().await;
        if current.as_ref() != used {
            return Ok(current.clone());
        }
        let text = match (challenges.first(), &self.credentials) {
            (_, Some(Credentials::Token(token))) => format!("Bearer {token}"),
            (Some(Challenge::Basic), Some(Credentials::Basic { user, password })) => {
                format!("Basic {}", STANDARD.encode(format!("{user}:{password}")))
            }
            (Some(Challenge::Bearer { realm, service, scope }), _) => {
                format!("Bearer {}", self.token(realm, service.as_deref(), scope.as_deref()).await?)
            }
            _ => return Ok(None),
        };
        let mut value =
            HeaderValue::from_str(&text).map_err(|_| self.protocol("gave a token that cannot be one"))?;
        value.set_sensitive(true);
        if current.as_ref() == Some(&value) {
            return Ok(None);
        }
        *current = Some(value.clone());
        Ok(Some(value))
    }

    /// A token from the service that the registry names.
    async fn token(&self, realm: &str, service: Option<&str>, scope: Option<&str>) -> Result<String, Error> {
        let mut url = Url::parse(realm).map_err(|_| self.protocol("names a token service that is none"))?;
        let plain = url.scheme() == "http" && self.base.scheme() == "http";
        if url.scheme() != "https" && !plain {
            return Err(self.protocol("wants credentials to be sent without encryption"));
        }
        let actions = if self.purpose == Purpose::Push { "pull,push" } else { "pull" };
        let mut scopes = vec![];
        if !self.repository.is_empty() {
            scopes.push(format!("repository:{}:{actions}", self.repository));
        }
        // A registry may ask for more, such as another repository to mount from.
        scopes.extend(scope.filter(|scope| !scopes.iter().any(|own| own == scope)).map(str::to_owned));
        let mut parameters: Vec<(&str, String)> = scopes.into_iter().map(|scope| ("scope", scope)).collect();
        parameters.extend(service.map(|service| ("service", service.to_owned())));
        let request = match &self.credentials {
            Some(Credentials::Identity(token)) => {
                parameters.push(("grant_type", "refresh_token".to_owned()));
                parameters.push(("refresh_token", token.clone()));
                parameters.push(("client_id", "rvmm".to_owned()));
                let mut form = Url::parse("http://form/").map_err(set_up)?;
                form.query_pairs_mut().extend_pairs(&parameters);
                let body = form.query().unwrap_or_default().to_owned();
                let request =
                    self.http.post(url.clone()).header(CONTENT_TYPE, "application/x-www-form-urlencoded");
                request.body(body)
            }
            credentials => {
                if let Some(Credentials::Basic { user, .. }) = credentials {
                    parameters.push(("account", user.clone()));
                }
                url.query_pairs_mut().extend_pairs(&parameters);
                let request = self.http.get(url.clone());
                match credentials {
                    Some(Credentials::Basic { user, password }) => request.basic_auth(user, Some(password)),
                    _ => request,
                }
            }
        };
        let response = self.try_send(request, &url).await?;
        if !response.status().is_success() {
            return Err(refusal(response).await);
        }
        let bytes = body(response, TOKEN_MAX).await?;
        let value: Value = serde_json::from_slice(&bytes).unwrap_or_default();
        let token = ["token", "access_token"].iter().find_map(|name| value.get(name)?.as_str());
        token.map(str::to_owned).ok_or_else(|| self.protocol("gave no token"))
    }

    /// Whether the registry takes the credentials.
    pub(super) async fn check(&self) -> Result<(), Error> {
        let response = self.send(&Method::GET, &self.base, Ok).await?;
        if response.status().is_success() { Ok(()) } else { Err(refusal(response).await) }
    }

    /// Whether a token or password was asked for.
    pub(super) async fn is_authenticated(&self) -> bool {
        self.authorization.lock().await.is_some()
    }

    /// A manifest or index, by tag or digest.
    pub(super) async fn manifest(&self, tag: &str, expected: Option<Digest>) -> Result<Fetched, Error> {
        let name = expected.map_or(tag.to_owned(), |digest| digest.to_string());
        let url = self.url(&format!("manifests/{name}"))?;
        let accept = [OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST, DOCKER_INDEX].join(", ");
        retrying(|| self.try_manifest(&url, &accept, expected)).await
    }

    async fn try_manifest(
        &self,
        url: &Url,
        accept: &str,
        expected: Option<Digest>,
    ) -> Result<Fetched, Error> {
        let response = self.send(&Method::GET, url, |request| Ok(request.header(ACCEPT, accept))).await?;
        if response.status() != StatusCode::OK {
            return Err(refusal(response).await);
        }
        let header = |name: &str| {
            let value = response.headers().get(name)?.to_str().ok()?;
            Some(value.split(';').next().unwrap_or(value).trim().to_owned())
        };
        let said = header("docker-content-digest").and_then(|text| text.parse::<Digest>().ok());
        let media_type = header("content-type");
        let bytes = body(response, MANIFEST_MAX).await?;
        let digest = Digest::of(&bytes);
        for expected in [expected, said].into_iter().flatten() {
            if expected != digest {
                return Err(
                    self.protocol(format!("sent a manifest with the digest {digest}, not {expected}"))
                );
            }
        }
        Ok(Fetched { bytes, digest, media_type })
    }
}

fn host(url: &Url) -> String {
    let port = url.port().map_or(String::new(), |port| format!(":{port}"));
    format!("{}{port}", url.host_str().unwrap_or("the registry"))
}

/// A body that must not be longer than this.
pub(super) async fn body(mut response: Response, limit: u64) -> Result<Vec<u8>, Error> {
    let host = host(response.url());
    let mut bytes = vec![];
    while let Some(chunk) =
        response.chunk().await.map_err(|source| Error::Broken { host: host.clone(), source })?
    {
        if bytes.len() as u64 + chunk.len() as u64 > limit {
            return Err(Error::Protocol {
                host,
                why: format!("sent more than {limit} bytes where fewer are enough"),
            });
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}

/// What an answer means that is not the one hoped for.
pub(super) async fn refusal(response: Response) -> Error {
    let (status, host) = (response.status(), host(response.url()));
    let bytes = body(response, ERROR_MAX).await.unwrap_or_default();
    let value: Value = serde_json::from_slice(&bytes).unwrap_or_default();
    let first = value.get("errors").and_then(|errors| errors.get(0));
    let text = |name: &str| first.and_then(|error| error.get(name)).and_then(Value::as_str);
    let message =
        text("message").or(text("code")).or(value.get("details").and_then(Value::as_str)).unwrap_or("");
    let shown = message.chars().filter(|c| !c.is_control()).take(MESSAGE_MAX).collect();
    match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Error::Unauthorized { host, message: shown },
        StatusCode::NOT_FOUND => Error::NotFound { host, message: shown },
        status => Error::Status { host, status, message: shown },
    }
}
