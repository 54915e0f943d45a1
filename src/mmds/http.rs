//! Requests and answers, with Firecracker's statuses and texts.

use httparse::{Header, Request, Status};

use super::{Lookup, Service, Version};
use crate::metrics::mmds as counters;

/// Bytes of a request at most, its body included.
pub(super) const REQUEST_BYTES_MAX: usize = 4096;
const HEADERS_MAX: usize = 64;

const TOKEN_PATH: &str = "/latest/api/token";
const TOKEN: [&str; 2] = ["x-metadata-token", "x-aws-ec2-metadata-token"];
const TTL: [&str; 2] = ["x-metadata-token-ttl-seconds", "x-aws-ec2-metadata-token-ttl-seconds"];
const FORWARDED: &str = "x-forwarded-for";

const TEXT: &str = "text/plain";
const JSON: &str = "application/json";

/// What comes of a request that is whole.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Served {
    /// Bytes that it has.
    pub(super) taken: usize,
    /// The bytes of the answer.
    pub(super) answer: Vec<u8>,
    /// Whether nothing more is to be read from this client.
    pub(super) last: bool,
}

/// An answer before it is written.
struct Answer {
    status: u16,
    content_type: &'static str,
    header: Option<String>,
    body: String,
}

impl Answer {
    fn text(status: u16, body: impl Into<String>) -> Self {
        Self { status, content_type: TEXT, header: None, body: body.into() }
    }

    fn write(&self, minor: u8, last: bool) -> Vec<u8> {
        let reason = match self.status {
            200 => "OK",
            400 => "Bad Request",
            401 => "Unauthorized",
            404 => "Not Found",
            405 => "Method Not Allowed",
            413 => "Payload Too Large",
            _ => "Not Implemented",
        };
        let connection = if last { "close" } else { "keep-alive" };
        let header = self.header.as_deref().unwrap_or_default();
        format!(
            "HTTP/1.{minor} {} {reason}\r\nServer: rvmm\r\nConnection: {connection}\r\nContent-Type: {}\r\n\
             Content-Length: {}\r\n{header}\r\n{}",
            self.status,
            self.content_type,
            self.body.len(),
            self.body
        )
        .into_bytes()
    }
}

/// Serves the first request in `bytes`; `None` while it is not whole.
pub(super) fn serve(service: &Service, bytes: &[u8]) -> Option<Served> {
    let refuse = |status, why: &str| {
        counters::REFUSED.add(1);
        let answer = Answer::text(status, why).write(1, true);
        Some(Served { taken: bytes.len(), answer, last: true })
    };
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut request = Request::new(&mut headers);
    let head = match request.parse(bytes) {
        Ok(Status::Complete(head)) => head,
        Ok(Status::Partial) if bytes.len() < REQUEST_BYTES_MAX => return None,
        Ok(Status::Partial) => return refuse(413, "The request is too long."),
        Err(error) => return refuse(400, &format!("Invalid request: {error}.")),
    };
    if find(request.headers, &["transfer-encoding"]).is_some() {
        return refuse(400, "Transfer-Encoding is not supported.");
    }
    let body = match find(request.headers, &["content-length"]) {
        None => Some(0),
        Some((_, length)) => number(length),
    };
    let Some(body) = body else { return refuse(400, "Invalid Content-Length.") };
    let taken = head.saturating_add(body as usize);
    if taken > REQUEST_BYTES_MAX {
        return refuse(413, "The request is too long.");
    }
    if bytes.len() < taken {
        return None;
    }
    let minor = request.version.unwrap_or(1);
    let wishes = find(request.headers, &["connection"]).map(|(_, value)| value);
    let wishes =
        |what: &str| wishes.is_some_and(|value| value.trim_ascii().eq_ignore_ascii_case(what.as_bytes()));
    let last = if minor == 0 { !wishes("keep-alive") } else { wishes("close") };
    let answer = answer(service, &request);
    if answer.status != 200 {
        counters::REFUSED.add(1);
    }
    Some(Served { taken, answer: answer.write(minor, last), last })
}

fn answer(service: &Service, request: &Request<'_, '_>) -> Answer {
    let Some(path) = request.path.and_then(path) else { return Answer::text(400, "Invalid URI.") };
    match request.method {
        Some("GET") => get(service, path, request.headers),
        Some("PUT") => put(service, path, request.headers),
        _ => Answer {
            header: Some("Allow: GET, PUT\r\n".into()),
            ..Answer::text(405, "Not allowed HTTP method.")
        },
    }
}

/// The path of a target in either form.
fn path(target: &str) -> Option<&str> {
    let path = match target.strip_prefix("http://") {
        Some(rest) => rest.get(rest.find('/')?..)?,
        None => target,
    };
    path.starts_with('/').then_some(path)
}

/// A path without empty parts.
fn clean(path: &str) -> String {
    let mut clean = String::with_capacity(path.len());
    for character in path.chars() {
        if character != '/' || !clean.ends_with('/') {
            clean.push(character);
        }
    }
    clean
}

fn get(service: &Service, path: &str, headers: &[Header<'_>]) -> Answer {
    let token = find(headers, &TOKEN);
    let holds = token.map(|(_, token)| service.tokens.holds(token));
    match holds {
        Some(true) => {}
        Some(false) => counters::INVALID_TOKENS.add(1),
        None => counters::NO_TOKENS.add(1),
    }
    match (service.version, holds) {
        (Version::V1, _) | (_, Some(true)) => {}
        (Version::V2, Some(false)) => return Answer::text(401, "MMDS token not valid."),
        (Version::V2, None) => {
            let why = "No MMDS token provided. Use `X-metadata-token` or `X-aws-ec2-metadata-token` header to specify \
                       the session token.";
            return Answer::text(401, why);
        }
    }
    let clean = clean(path);
    let json = !service.imds_compat && accepts_json(headers);
    match if json { service.store.json(&clean) } else { service.store.text(&clean) } {
        Lookup::Text(body) => {
            Answer { content_type: if json { JSON } else { TEXT }, ..Answer::text(200, body) }
        }
        Lookup::Nothing => not_found(path),
        Lookup::NoText => Answer::text(501, "Cannot retrieve value. The value has an unsupported type."),
    }
}

fn put(service: &Service, path: &str, headers: &[Header<'_>]) -> Answer {
    if let Some((name, _)) = find(headers, &[FORWARDED]) {
        // A proxy that hands requests of others on must not get tokens for them.
        return Answer::text(400, format!("Invalid header. Reason: Unsupported header name. Key: {name}"));
    }
    if clean(path) != TOKEN_PATH {
        return not_found(path);
    }
    let Some((name, value)) = find(headers, &TTL) else {
        let why = "Token time to live value not found. Use `X-metadata-token-ttl-seconds` or \
                   `X-aws-ec2-metadata-token-ttl-seconds` header to specify the token's lifetime.";
        return Answer::text(400, why);
    };
    let Some(seconds) = number(value) else {
        let value = String::from_utf8_lossy(value);
        return Answer::text(
            400,
            format!("Invalid header. Reason: Invalid value. Key:{name}; Value:{value}"),
        );
    };
    match service.tokens.make(seconds) {
        Some(token) => {
            counters::TOKENS.add(1);
            Answer { header: Some(format!("{name}: {seconds}\r\n")), ..Answer::text(200, token) }
        }
        None => Answer::text(
            400,
            format!(
                "Invalid time to live value provided for token: {seconds}. Please provide a value between 1 and 21600."
            ),
        ),
    }
}

fn not_found(path: &str) -> Answer {
    Answer::text(404, format!("Resource not found: {path}."))
}

/// The first header that has one of these names.
fn find<'h>(headers: &'h [Header<'_>], names: &[&str]) -> Option<(&'h str, &'h [u8])> {
    let is = |header: &&Header<'_>| names.iter().any(|name| header.name.eq_ignore_ascii_case(name));
    headers.iter().find(is).map(|header| (header.name, header.value))
}

/// A number in decimal digits.
fn number(bytes: &[u8]) -> Option<u32> {
    let text = std::str::from_utf8(bytes.trim_ascii()).ok()?;
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

/// Whether JSON is the first of the known forms that a client names.
fn accepts_json(headers: &[Header<'_>]) -> bool {
    let Some((_, accept)) = find(headers, &["accept"]) else { return false };
    let accept = String::from_utf8_lossy(accept);
    let mut known = accept.split(',').map(|form| form.split(';').next().unwrap_or_default().trim());
    known.find(|form| [JSON, TEXT, "*/*"].contains(form)).is_some_and(|form| form == JSON)
}

#[cfg(test)]
#[path = "http_tests.rs"]
mod tests;
