//! Registries and archives that mean harm.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rvmm::image::layers::testing::Archive;
use rvmm::image::registry::{Options, Progress, pull};
use rvmm::image::{Digest, testing};
use serde_json::{Value, json};

use super::server::{Answer, Request, Server, ok, status};
use super::{Home, entries, name};

/// An image as a registry has it, to be spoilt.
#[derive(Clone)]
struct Parts {
    manifest: Value,
    config: Value,
    layer: Vec<u8>,
}

impl Parts {
    fn new() -> Self {
        let plain = testing::layer("f", "x");
        let layer = testing::gzip(&plain);
        let config = json!({
            "architecture": "amd64", "os": "linux", "config": {},
            "rootfs": {"type": "layers", "diff_ids": [Digest::of(&plain)]},
        });
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": "", "size": 0},
            "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": Digest::of(&layer), "size": layer.len()}],
        });
        let mut parts = Self { manifest, config, layer };
        parts.seal();
        parts
    }

    /// Makes the manifest fit the configuration.
    fn seal(&mut self) {
        let config = self.config.to_string();
        self.manifest["config"]["digest"] = json!(Digest::of(config.as_bytes()));
        self.manifest["config"]["size"] = json!(config.len());
    }

    fn answer(&self, request: &Request) -> Answer {
        if request.path.contains("/manifests/") {
            ok(self.manifest.to_string())
        } else if request.path.ends_with(&Digest::of(self.config.to_string().as_bytes()).to_string()) {
            ok(self.config.to_string())
        } else if request.path.contains("/blobs/") {
            ok(self.layer.clone())
        } else {
            status(200)
        }
    }
}

fn is_layer(request: &Request, parts: &Parts) -> bool {
    request.path.contains("/blobs/")
        && !request.path.ends_with(parts.manifest["config"]["digest"].as_str().unwrap_or("-"))
}

#[test]
fn hostile_registries_are_refused_and_leave_nothing() {
    type Handler = Box<dyn Fn(&Request, u16) -> Answer + Send + Sync>;
    let good = Parts::new();
    let spoilt = |change: &dyn Fn(&mut Parts)| -> Handler {
        let mut parts = Parts::new();
        change(&mut parts);
        Box::new(move |request, _| parts.answer(request))
    };
    let manifest = |answer: fn() -> Answer| -> Handler { Box::new(move |_, _| answer()) };
    let layer = |answer: fn(&Request) -> Answer| -> Handler {
        let parts = Parts::new();
        Box::new(
            move |request, _| if is_layer(request, &parts) { answer(request) } else { parts.answer(request) },
        )
    };
    let other = Digest::of(b"other").to_string();
    let cases: Vec<(&str, Handler, &str)> = vec![
        ("manifest without end", manifest(|| Answer::Endless), "more than 4194304 bytes"),
        ("manifest that is none", manifest(|| ok("<html>")), "not valid"),
        ("manifest of another time", manifest(|| ok(r#"{"schemaVersion": 1}"#)), "version 1"),
        (
            "error without end",
            Box::new(|_, _| Answer::Raw([b"HTTP/1.1 404 X\r\n\r\n".as_slice(), &[b'x'; 1 << 20]].concat())),
            "does not have it",
        ),
        ("no HTTP", Box::new(|_, _| Answer::Raw(b"220 smtp.example ready\r\n".to_vec())), "cannot reach"),
        (
            "another digest than it says",
            Box::new(|_, _| {
                Answer::Plain(200, vec![("Docker-Content-Digest", Digest::of(b"").to_string())], b"{}".into())
            }),
            "not sha256:e3b0",
        ),
        (
            "redirects without end",
            Box::new(|_, port| {
                Answer::Plain(302, vec![("Location", format!("http://127.0.0.1:{port}/v2/x"))], vec![])
            }),
            "cannot reach",
        ),
        (
            "realm without TLS elsewhere",
            Box::new(|_, _| {
                Answer::Plain(401, vec![("WWW-Authenticate", "Bearer realm=\"ftp://x/\"".into())], vec![])
            }),
            "without encryption",
        ),
        (
            "realm that is none",
            Box::new(|_, _| {
                Answer::Plain(401, vec![("WWW-Authenticate", "Bearer realm=\"::\"".into())], vec![])
            }),
            "token service",
        ),
        (
            "token without end",
            Box::new(|request, port| {
                if request.path.starts_with("/t?") {
                    Answer::Endless
                } else {
                    Answer::Plain(
                        401,
                        vec![("WWW-Authenticate", format!("Bearer realm=\"http://127.0.0.1:{port}/t\""))],
                        vec![],
                    )
                }
            }),
            "more than 1048576 bytes",
        ),
        ("layer of other contents", layer(|_| ok(vec![b'x'; Parts::new().layer.len()])), "has the digest"),
        ("layer that is longer", layer(|_| Answer::Endless), "sent more than"),
        ("layer that is shorter", layer(|_| ok("x")), "ended after"),
        (
            "part that was not asked for",
            layer(|_| Answer::Plain(206, vec![("Content-Range", "bytes 5-9/10".into())], vec![b'x'; 5])),
            "another part",
        ),
        ("layer elsewhere that is missing", layer(|_| status(404)), "does not have it"),
        (
            "image for another platform",
            spoilt(&|parts| {
                parts.config["architecture"] = json!("arm64");
                parts.seal();
            }),
            "linux/arm64",
        ),
        (
            "fewer layers than digests",
            spoilt(&|parts| {
                parts.config["rootfs"]["diff_ids"] = json!([]);
                parts.seal();
            }),
            "numbers of layers",
        ),
        (
            "huge configuration",
            spoilt(&|parts| parts.manifest["config"]["size"] = json!(1u64 << 40)),
            "configuration of more than",
        ),
        (
            "configuration of other contents",
            {
                let other = other.clone();
                spoilt(&move |parts| parts.manifest["config"]["digest"] = json!(other))
            },
            "ended after",
        ),
        (
            "digest with a path",
            spoilt(&|parts| parts.manifest["layers"][0]["digest"] = json!("sha256:../../../../etc/passwd")),
            "",
        ),
        ("negative size", spoilt(&|parts| parts.manifest["layers"][0]["size"] = json!(-1)), "not valid"),
    ];
    let run = |case: &str, handler: Handler, expected: &str| {
        let home = Home::new();
        let server = Server::start(handler);
        let error = pull(&home.store, &name(&server.name("a/b")), &Options::default(), &Progress::Quiet);
        let text = rvmm::error_chain(&error.err().unwrap_or_else(|| panic!("{case}: was pulled")));
        assert!(text.contains(expected), "{case}: {text}");
        home.store.prune(true).expect("a clean store");
        assert_eq!(entries(&home.store.root().join("blobs/sha256")), [], "{case}");
        home.verify_clean();
    };
    // Beside each other: some are tried several times, with pauses.
    std::thread::scope(|scope| {
        for (case, handler, expected) in cases {
            scope.spawn(move || run(case, handler, expected));
        }
    });
    // And the same server pulls well when nothing is spoilt.
    let home = Home::new();
    let server = Server::start(move |request, _| good.answer(request));
    pull(&home.store, &name(&server.name("a/b")), &Options::default(), &Progress::Quiet).expect("a pull");
}

#[test]
fn image_of_an_index_within_indexes_is_refused() {
    let asked = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&asked);
    // Each index names another one, by its digest: so they are made from the innermost outwards.
    let mut indexes = vec![json!({"schemaVersion": 2, "manifests": []}).to_string()];
    for _ in 0..9 {
        let inner = indexes.last().expect("an index");
        let entry = json!({
            "mediaType": "application/vnd.oci.image.index.v1+json", "digest": Digest::of(inner.as_bytes()),
            "size": inner.len(), "platform": {"os": "linux", "architecture": "amd64"},
        });
        indexes.push(json!({"schemaVersion": 2, "manifests": [entry]}).to_string());
    }
    let server = Server::start(move |request, _| {
        count.fetch_add(1, Ordering::Relaxed);
        let digest = request.path.rsplit('/').next().unwrap_or_default();
        let found = indexes.iter().find(|index| Digest::of(index.as_bytes()).to_string() == digest);
        ok(found.unwrap_or(indexes.last().expect("an index")).clone())
    });
    let home = Home::new();
    let error = pull(&home.store, &name(&server.name("a/b")), &Options::default(), &Progress::Quiet);
    assert!(rvmm::error_chain(&error.expect_err("an error")).contains("indexes within indexes"));
    assert!(asked.load(Ordering::Relaxed) < 8);
}

#[test]
fn credentials_do_not_follow_to_another_host() {
    use rvmm::image::registry::{Credentials, push};
    let seen = Arc::new(std::sync::Mutex::new(vec![]));
    let thief_seen = Arc::clone(&seen);
    let thief = Server::start(move |request, _| {
        thief_seen.lock().expect("a lock").push(request.header("authorization").map(str::to_owned));
        status(201)
    });
    let thief_port = thief.port;
    let parts = Parts::new();
    let server = Server::start(move |request, _| {
        if request.header("authorization").is_none() {
            return Answer::Plain(401, vec![("WWW-Authenticate", "Basic realm=\"x\"".into())], vec![]);
        }
        let elsewhere = format!("http://127.0.0.1:{thief_port}/x");
        match request.method.as_str() {
            "HEAD" => status(404),
            "POST" => Answer::Plain(202, vec![("Location", elsewhere)], vec![]),
            "PUT" => status(201),
            _ if is_layer(request, &parts) => Answer::Plain(307, vec![("Location", elsewhere)], vec![]),
            _ => parts.answer(request),
        }
    });
    let home = Home::new();
    let credentials = Credentials::Basic { user: "me".into(), password: "secret".into() };
    let options = Options { credentials: Some(credentials), ..Options::default() };
    let tag = name(&server.name("a/b"));
    let image = home.image(&tag.to_string(), 7, 100);
    push(&home.store, &image, &tag, &options, &Progress::Quiet).expect("a push");
    let pulled = pull(&Home::new().store, &tag, &options, &Progress::Quiet);
    assert!(pulled.is_err(), "the other host has another layer");
    let seen = seen.lock().expect("a lock");
    assert!(seen.len() >= 5 && seen.iter().all(Option::is_none), "{seen:?}");
}

#[test]
fn hostile_layers_are_refused_and_named() {
    let home = Home::new();
    let outside = home.path("outside");
    let target = outside.display().to_string();
    std::fs::create_dir(&outside).expect("a directory");
    for (case, archive, expected) in [
        ("upwards", Archive::new().file("../../../../outside/f", "x"), "leads upwards"),
        (
            "hard link out",
            Archive::new().symlink("l", &target).hard_link("h", "l/../../etc/passwd"),
            "leads upwards",
        ),
        (
            "many links",
            Archive::new().symlink("a", "b").symlink("b", "a").file("a/f", "x"),
            "too many symbolic links",
        ),
        ("not an archive", Archive::new().raw(&[1; 700]), "no tar archive"),
    ] {
        let image = testing::image(&home.store, "evil", &[archive.finish()]).expect("an image");
        let archive = home.path("evil.tar");
        home.run(&["save", "-o", archive.to_str().expect("a path"), "evil"]).ok();
        home.run(&["rmi", "evil"]).ok();
        let layer = image.layers[0].digest.short();
        home.run(&["load", "-i", archive.to_str().expect("a path")]).fails_with(&[expected, &layer]);
        assert_eq!(entries(&outside), [], "{case}");
        home.run(&["rmi", "evil"]).ok();
        home.verify_clean();
    }
}
