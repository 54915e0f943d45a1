use std::sync::Arc;

use serde_json::json;

use super::*;
use crate::mmds::Store;

fn service(version: Version, imds_compat: bool) -> Service {
    let store = Store::default();
    store.put(json!({"latest": {"meta-data": {"id": "i-1"}, "n": 7}})).unwrap();
    Service::new(Arc::new(store), version, imds_compat).unwrap()
}

/// Status, headers and body of the answer to a request that is whole.
fn ask(service: &Service, request: &str) -> (u16, String, String) {
    let served = serve(service, request.as_bytes()).expect("a whole request");
    let answer = String::from_utf8(served.answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let (status, headers) = head.split_once("\r\n").unwrap();
    assert!(headers.contains(&format!("Content-Length: {}", body.len())), "{answer}");
    assert_eq!(headers.contains("Connection: close"), served.last, "{answer}");
    let status = status.strip_prefix("HTTP/1.").unwrap()[2..5].parse().unwrap();
    (status, headers.to_owned(), body.to_owned())
}

fn get(service: &Service, path: &str, headers: &str) -> (u16, String) {
    let (status, _, body) = ask(service, &format!("GET {path} HTTP/1.1\r\nHost: x\r\n{headers}\r\n"));
    (status, body)
}

fn token(service: &Service) -> String {
    let request = "PUT /latest/api/token HTTP/1.1\r\nX-aws-EC2-metadata-token-ttl-seconds: 60\r\n\r\n";
    let (status, headers, token) = ask(service, request);
    assert_eq!(status, 200);
    assert!(headers.contains("X-aws-EC2-metadata-token-ttl-seconds: 60"), "{headers}");
    token
}

#[test]
fn first_version_answers_whoever_asks() {
    let service = service(Version::V1, false);
    for path in
        ["/latest/meta-data/id", "//latest///meta-data/id/", "http://169.254.169.254/latest/meta-data/id"]
    {
        assert_eq!(get(&service, path, ""), (200, "i-1".into()), "{path}");
    }
    assert_eq!(get(&service, "/latest/meta-data/id", "X-metadata-token: nonsense\r\n").0, 200);
    assert_eq!(get(&service, "/latest", ""), (200, "meta-data/\nn".into()));
    assert_eq!(get(&service, "/latest/n", "").0, 501);
    assert_eq!(get(&service, "/nothing", ""), (404, "Resource not found: /nothing.".into()));
    assert_eq!(get(&service, "/latest/meta-data/id?x", "").0, 404);
    let token = token(&service);
    assert_eq!(get(&service, "/latest", &format!("X-metadata-token: {token}\r\n")).0, 200);
}

#[test]
fn second_version_wants_a_token_of_its_own() {
    let one = service(Version::V2, false);
    let (status, body) = get(&one, "/latest/meta-data/id", "");
    assert_eq!(status, 401);
    assert!(body.starts_with("No MMDS token provided."), "{body}");
    let held = token(&one);
    for name in ["X-metadata-token", "x-AWS-ec2-metadata-token"] {
        assert_eq!(get(&one, "/latest/meta-data/id", &format!("{name}: {held}\r\n")), (200, "i-1".into()));
    }
    let other = token(&service(Version::V2, false));
    for wrong in [&*other, "", "x", &held[1..]] {
        let answer = get(&one, "/latest/meta-data/id", &format!("X-metadata-token: {wrong}\r\n"));
        assert_eq!(answer, (401, "MMDS token not valid.".into()), "{wrong}");
    }
}

#[test]
fn form_is_what_the_client_accepts() {
    let one = service(Version::V1, false);
    for (accept, json) in [
        ("application/json", true),
        ("application/json; q=0.5, */*", true),
        ("text/html, application/json", true),
        ("text/plain, application/json", false),
        ("*/*", false),
        ("", false),
        ("application/xml", false),
    ] {
        let request = format!("GET /latest/meta-data HTTP/1.1\r\nAccept: {accept}\r\n\r\n");
        let (status, headers, body) = ask(&one, &request);
        let (form, text) = if json { (JSON, r#"{"id":"i-1"}"#) } else { (TEXT, "id") };
        assert_eq!((status, &*body), (200, text), "{accept}");
        assert!(headers.contains(&format!("Content-Type: {form}")), "{accept}: {headers}");
    }
    let compatible = service(Version::V1, true);
    assert_eq!(get(&compatible, "/latest/meta-data", "Accept: application/json\r\n").1, "id");
}

#[test]
fn wrong_requests_for_tokens_are_refused() {
    let service = service(Version::V2, false);
    let put = |path: &str, headers: &str| {
        let (status, _, body) = ask(&service, &format!("PUT {path} HTTP/1.1\r\n{headers}\r\n"));
        (status, body)
    };
    let ttl = "X-metadata-token-ttl-seconds: 60\r\n";
    assert_eq!(put("/latest/api/token", ttl).0, 200);
    for (path, headers, status, says) in [
        ("/latest/api/token", "", 400, "time to live value not found"),
        ("/latest/api/token", "X-metadata-token-ttl-seconds: 0\r\n", 400, "between 1 and 21600"),
        ("/latest/api/token", "X-metadata-token-ttl-seconds: 21601\r\n", 400, "between 1 and 21600"),
        ("/latest/api/token", "X-metadata-token-ttl-seconds: +60\r\n", 400, "Invalid value"),
        ("/latest/api/token", "X-metadata-token-ttl-seconds: 99999999999\r\n", 400, "Invalid value"),
        ("/latest/api/token", &format!("{ttl}X-Forwarded-For: 10.0.0.1\r\n"), 400, "X-Forwarded-For"),
        ("/latest/api/tokens", ttl, 404, "Resource not found"),
        ("/latest/meta-data", ttl, 404, "Resource not found"),
    ] {
        let answer = put(path, headers);
        assert_eq!(answer.0, status, "{path} {headers}: {answer:?}");
        assert!(answer.1.contains(says), "{path} {headers}: {answer:?}");
    }
}

#[test]
fn other_methods_are_told_which_there_are() {
    let service = service(Version::V1, false);
    for method in ["POST", "PATCH", "DELETE", "HEAD", "OPTIONS", "X"] {
        let (status, headers, _) = ask(&service, &format!("{method} / HTTP/1.1\r\n\r\n"));
        assert_eq!(status, 405, "{method}");
        assert!(headers.contains("Allow: GET, PUT"), "{headers}");
    }
}

#[test]
fn requests_come_in_pieces_and_in_rows() {
    let service = service(Version::V1, false);
    let put =
        "PUT /latest/api/token HTTP/1.1\r\nX-metadata-token-ttl-seconds: 60\r\nContent-Length: 3\r\n\r\nabc";
    for len in 0..put.len() {
        assert_eq!(serve(&service, &put.as_bytes()[..len]), None, "{len}");
    }
    let row = format!("{put}GET / HTTP/1.0\r\n\r\n");
    let served = serve(&service, row.as_bytes()).unwrap();
    assert_eq!((served.taken, served.last), (put.len(), false));
    let served = serve(&service, &row.as_bytes()[served.taken..]).unwrap();
    assert!(served.last && served.answer.starts_with(b"HTTP/1.0 200 OK\r\n"));
    assert!(serve(&service, b"GET / HTTP/1.1\r\nConnection: Close\r\n\r\n").unwrap().last);
    assert!(!serve(&service, b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n").unwrap().last);
}

#[test]
fn what_is_no_request_ends_the_connection() {
    let service = service(Version::V1, false);
    let long = format!("GET /{} HTTP/1.1\r\n", "x".repeat(REQUEST_BYTES_MAX));
    let many = format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(HEADERS_MAX + 1));
    for (request, status) in [
        ("\0\r\n\r\n", 400),
        ("GET / HTTP/2.0\r\n\r\n", 400),
        ("GET  HTTP/1.1\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nno header\r\n\r\n", 400),
        ("PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        ("PUT / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
        ("PUT / HTTP/1.1\r\nContent-Length: 4294967295\r\n\r\n", 413),
        (&*many, 400),
        (&*long, 413),
    ] {
        let served = serve(&service, request.as_bytes()).unwrap_or_else(|| panic!("{request:.40} is taken"));
        let answer = String::from_utf8_lossy(&served.answer).into_owned();
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{request:.40}: {answer}");
        assert!(served.last && served.taken == request.len(), "{request:.40}");
    }
    let (status, _, body) = ask(&service, "GET http:// HTTP/1.1\r\n\r\n");
    assert_eq!((status, &*body), (400, "Invalid URI."));
    assert_eq!(ask(&service, "GET * HTTP/1.1\r\n\r\n").0, 400);
}
