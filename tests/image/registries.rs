//! Push, pull and log in, with a real registry.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;
use std::sync::atomic::Ordering;

use rvmm::image::registry::{Options, Progress, pull, push};
use rvmm::image::testing;

use super::server::{Answer, Cutter, Registry, Server, ok};
use super::{Home, Ran, entries, name};
use crate::support::{has_tool, tool};

#[test]
fn images_come_back_from_a_registry_as_they_were_pushed() {
    let Some(registry) = Registry::start(None) else { return };
    let (here, there) = (Home::new(), Home::new());
    let tag = name(&registry.name("a/b:1"));
    let image = here.image(&tag.to_string(), 2, 100_000);
    let options = Options::default();
    let digest = push(&here.store, &image, &tag, &options, &Progress::Quiet).expect("a push");
    assert_eq!(digest, image.manifest_digest);
    push(&here.store, &image, &tag, &options, &Progress::Quiet).expect("the same push again");
    let pulled = pull(&there.store, &tag, &options, &Progress::Quiet).expect("a pull");
    assert!(pulled.is_new && pulled.digest == digest && pulled.image.id == image.id);
    assert_eq!(
        pulled.image.names,
        [tag.at(digest), tag.clone()]
            .iter()
            .cloned()
            .collect::<std::collections::BTreeSet<_>>()
            .into_iter()
            .collect::<Vec<_>>()
    );
    assert_eq!(there.store.layer_dirs(&pulled.image).expect("directories").len(), 3);
    assert!(!pull(&there.store, &tag, &options, &Progress::Quiet).expect("another pull").is_new);
    // By digest, into a store that knows nothing of tags.
    let third = Home::new();
    let by_digest =
        pull(&third.store, &tag.at(digest), &options, &Progress::Quiet).expect("a pull by digest");
    assert_eq!((by_digest.image.id, by_digest.image.names), (image.id, vec![tag.at(digest)]));
    // What a newer image has in common is not fetched again; and the engine says what it does.
    let newer = testing::image(
        &here.store,
        &tag.to_string(),
        &[testing::layer("etc/a", "other"), testing::large_layer(2, 100_000)],
    );
    push(&here.store, &newer.expect("an image"), &tag, &options, &Progress::Quiet).expect("a push");
    let said = there.run(&["pull", &tag.to_string()]).ok();
    assert_eq!(said.stderr.matches("Already exists").count(), 1, "{}", said.stderr);
    assert_eq!(said.stderr.matches("Download complete").count(), 1, "{}", said.stderr);
    assert!(said.stdout.contains("Downloaded newer image"), "{}", said.stdout);
    let said = there.run(&["pull", "-q", &tag.to_string()]).ok();
    assert_eq!((said.stdout, said.stderr), (format!("{tag}\n"), String::new()));
    there.run(&["pull", &registry.name("a/b:none")]).fails_with(&["does not have it", "a/b:none"]);
    there.verify_clean();
}

#[test]
fn pull_goes_on_where_it_was_cut() {
    let Some(registry) = Registry::start(None) else { return };
    let (here, there) = (Home::new(), Home::new());
    let direct = name(&registry.name("a/b"));
    let size = 400_000;
    let image = here.image(&direct.to_string(), 3, size);
    push(&here.store, &image, &direct, &Options::default(), &Progress::Quiet).expect("a push");
    let cutter = Cutter::before(registry.port);
    let through = cutter.name("a/b");
    // Several times within one pull.
    cutter.each.store(150_000, Ordering::Relaxed);
    there.run(&["pull", &through]).ok();
    let passed = cutter.passed.load(Ordering::Relaxed);
    assert!(passed < size as u64 * 5 / 4, "{passed} bytes for {size}");
    there.run(&["rmi", &through]).ok();
    // By another process, after one that got nothing more.
    let pull = there.engine(&["pull", &through]).stderr(Stdio::null()).spawn();
    let mut pull = pull.expect("the engine");
    let partial = there.store.root().join("partial");
    let end = std::time::Instant::now() + crate::support::PATIENCE;
    while !entries(&partial).iter().any(|(_, path)| fs::metadata(path).is_ok_and(|stat| stat.len() > 100_000))
    {
        assert!(std::time::Instant::now() < end, "nothing arrives");
        if pull.try_wait().expect("a child").is_some() {
            break;
        }
    }
    let _ = pull.kill();
    let _ = pull.wait();
    let there_already: u64 =
        entries(&partial).iter().filter_map(|(_, path)| fs::metadata(path).ok()).map(|stat| stat.len()).sum();
    let before = cutter.passed.load(Ordering::Relaxed);
    cutter.each.store(u64::MAX, Ordering::Relaxed);
    there.run(&["pull", &through]).ok();
    let passed = cutter.passed.load(Ordering::Relaxed) - before;
    assert!(passed + there_already < size as u64 * 5 / 4, "{passed} bytes after {there_already} of {size}");
    assert_eq!(there.store.resolve(&through).expect("an image").id, image.id);
    there.run(&["image", "prune", "-f"]).ok();
    there.verify_clean();
}

#[test]
fn damaged_rest_of_an_earlier_pull_is_fetched_anew() {
    let Some(registry) = Registry::start(None) else { return };
    let (here, there) = (Home::new(), Home::new());
    let tag = name(&registry.name("a/b"));
    let image = here.image(&tag.to_string(), 4, 50_000);
    push(&here.store, &image, &tag, &Options::default(), &Progress::Quiet).expect("a push");
    // As a power cut leaves it: the length is right, the contents are not.
    let large = &image.layers[1];
    fs::write(there.store.root().join("partial").join(large.digest.hex()), vec![0; 20_000]).expect("a file");
    let longer = &image.layers[0];
    fs::write(there.store.root().join("partial").join(longer.digest.hex()), vec![0; 20_000]).expect("a file");
    pull(&there.store, &tag, &Options::default(), &Progress::Quiet).expect("a pull");
    there.verify_clean();
}

#[test]
fn damaged_blobs_are_fetched_anew_by_the_next_pull() {
    let Some(registry) = Registry::start(None) else { return };
    let home = Home::new();
    let tag = registry.name("a/b");
    let image = home.image(&tag, 8, 10_000);
    home.run(&["push", &tag]).ok();
    for digest in [image.id, image.layers[1].digest, image.layers[0].digest] {
        let path = home.store.root().join("blobs/sha256").join(digest.hex());
        let mut bytes = fs::read(&path).expect("a blob");
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&path, bytes).expect("a blob");
    }
    home.run(&["images"]).ok();
    home.run(&["pull", &tag]).fails_with(&["damaged in the store", "pull"]);
    home.run(&["pull", &tag]).fails_with(&["damaged in the store", "pull"]);
    home.run(&["pull", &tag]).ok();
    home.run(&["image", "prune", "-f"]).ok();
    home.verify_clean();
}

#[test]
fn registry_with_passwords_wants_a_login() {
    if !has_tool("htpasswd") {
        return;
    }
    let Some(registry) = Registry::start(Some(&tool("htpasswd", &["-Bbn", "me", "secret:word"]))) else {
        return;
    };
    let host = format!("127.0.0.1:{}", registry.port);
    let home = Home::new();
    let image = registry.name("a/b");
    home.image(&image, 5, 1000);
    home.run(&["push", &image]).fails_with(&["asks for credentials", &image]);
    let login = |password: &str| {
        let mut command = home.engine(&["login", "-u", "me", "--password-stdin", &host]);
        let pipes = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = pipes.spawn().expect("the engine");
        child.stdin.take().expect("a pipe").write_all(password.as_bytes()).expect("a password");
        Ran::from(child.wait_with_output().expect("the engine"))
    };
    login("wrong\n").fails_with(&["asks for credentials"]);
    assert!(!home.path("docker/config.json").exists());
    login("secret:word\n").ok();
    let kept = home.path("docker/config.json");
    assert_eq!(fs::metadata(&kept).expect("a file").permissions().mode() & 0o777, 0o600);
    home.run(&["push", &image]).ok();
    home.run(&["rmi", &image]).ok();
    home.run(&["pull", &image]).ok();
    home.run(&["logout", &host]).ok();
    home.run(&["pull", &image]).fails_with(&["asks for credentials"]);
    // The same from a helper.
    let helper = home.path("bin/docker-credential-test");
    fs::create_dir(home.path("bin")).expect("a directory");
    let script = format!(
        "#!/bin/sh\nread server\n[ \"$1 $server\" = 'get {host}' ] || {{ echo credentials not found in native keychain; exit 1; }}\n\
         echo '{{\"ServerURL\":\"{host}\",\"Username\":\"me\",\"Secret\":\"secret:word\"}}'\n"
    );
    fs::write(&helper, script).expect("a file");
    fs::set_permissions(&helper, fs::Permissions::from_mode(0o755)).expect("permissions");
    fs::write(&kept, r#"{"credsStore": "test"}"#).expect("a file");
    let path = format!("{}:{}", home.path("bin").display(), std::env::var("PATH").unwrap_or_default());
    let with_helper = home.engine(&["pull", &image]).env("PATH", path).output();
    Ran::from(with_helper.expect("the engine")).ok();
}

/// A registry that wants tokens, with an image of one layer.
fn token_registry(home: &Home, token: &'static str) -> Server {
    let image = home.image("x", 6, 1000);
    let manifest = home.store.raw_manifest(&image).expect("a manifest");
    let config = home.store.raw_config(&image).expect("a configuration");
    let blobs: Vec<_> = image
        .layers
        .iter()
        .map(|layer| {
            (layer.digest.to_string(), home.store.read_blob(&layer.digest, 1 << 20).expect("a layer"))
        })
        .chain([(image.id.to_string(), config)])
        .collect();
    Server::start(move |request, port| {
        if request.path.starts_with("/token") {
            let scope = request.path.contains("scope=repository%3Aa%2Fb%3Apull");
            let user = request.header("authorization") == Some("Basic bWU6c2VjcmV0");
            return match (scope, user) {
                (true, true) => ok(format!("{{\"token\": {token:?}}}")),
                (true, false) => {
                    Answer::Plain(401, vec![], b"{\"details\": \"incorrect username or password\"}".into())
                }
                (false, _) => Answer::Plain(400, vec![], vec![]),
            };
        }
        if request.header("authorization") != Some("Bearer good") {
            let challenge = format!(
                "Bearer realm=\"http://127.0.0.1:{port}/token\",service=\"s\",scope=\"repository:a/b:pull\""
            );
            return Answer::Plain(401, vec![("WWW-Authenticate", challenge)], vec![]);
        }
        match request.path.rsplit('/').next().unwrap_or_default() {
            "latest" => ok(manifest.clone()),
            digest => blobs
                .iter()
                .find(|(name, _)| name == digest)
                .map_or(Answer::Plain(404, vec![], vec![]), |(_, bytes)| ok(bytes.clone())),
        }
    })
}

#[test]
fn registry_with_tokens_gives_them_for_the_right_password_only() {
    use rvmm::image::registry::Credentials;
    let (source, home) = (Home::new(), Home::new());
    let basic = |password: &str| {
        let credentials = Credentials::Basic { user: "me".into(), password: password.into() };
        Options { credentials: Some(credentials), ..Options::default() }
    };
    let server = token_registry(&source, "good");
    let tag = name(&server.name("a/b"));
    pull(&home.store, &tag, &basic("secret"), &Progress::Quiet).expect("a pull");
    let error = pull(&home.store, &tag, &basic("wrong"), &Progress::Quiet).expect_err("a wrong password");
    let text = rvmm::error_chain(&error);
    assert!(text.contains("incorrect username or password"), "{text}");
    assert!(!text.contains("wrong"), "the password is shown: {text}");
    // Tokens that are none, or do not help.
    for token in ["bad", "good\nx: y", ""] {
        let server = token_registry(&source, token);
        let error = pull(&home.store, &name(&server.name("a/b")), &basic("secret"), &Progress::Quiet);
        let text = rvmm::error_chain(&error.expect_err("a bad token"));
        assert!(text.contains("credentials") || text.contains("token"), "{text}");
    }
}

/// An address of this host that is not the loopback device's; nothing is sent to find it.
fn outer_address() -> Option<String> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").ok()?;
    socket.connect("192.0.2.1:9").ok()?;
    let address = socket.local_addr().ok()?.ip();
    (address.is_ipv4() && !address.is_loopback() && !address.is_unspecified()).then(|| address.to_string())
}

#[test]
fn certificates_have_to_be_right_but_on_this_host() {
    if !has_tool("openssl") {
        return;
    }
    let home = Home::new();
    let (key, certificate) = (home.path("key"), home.path("certificate"));
    let (key, certificate) = (key.to_str().expect("a path"), certificate.to_str().expect("a path"));
    let request = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=nobody", "-days", "2"];
    tool("openssl", &[&request[..], &["-keyout", key, "-out", certificate]].concat());
    let tls = format!(", tls: {{certificate: {certificate}, key: {key}}}");
    let Some(registry) = Registry::start_with(None, "127.0.0.1", &tls) else { return };
    let image = registry.name("a/b");
    home.image(&image, 1, 1000);
    home.run(&["push", &image]).ok();
    home.run(&["rmi", &image]).ok();
    home.run(&["pull", &image]).ok();
    let Some(address) = outer_address() else {
        crate::support::skip("no address but the loopback device's");
        return;
    };
    let Some(registry) = Registry::start_with(None, &address, &tls) else { return };
    let outer = format!("{address}:{}/a/b", registry.port);
    home.run(&["tag", &image, &outer]).ok();
    home.run(&["push", &outer]).fails_with(&["cannot reach", "certificate"]);
    home.run(&["push", "--tls-verify=false", &outer]).ok();
    let Some(registry) = Registry::start_with(None, &address, "") else { return };
    let plain = format!("{address}:{}/a/b", registry.port);
    home.run(&["tag", &image, &plain]).ok();
    home.run(&["push", &plain]).fails_with(&["cannot reach"]);
    home.run(&["push", "--tls-verify=false", &plain]).ok();
}

#[test]
fn policy_says_when_a_registry_is_asked() {
    use rvmm::image::{Error, PullPolicy, obtain};
    let Some(registry) = Registry::start(None) else { return };
    let (source, home) = (Home::new(), Home::new());
    let tag = registry.name("a/b");
    let options = Options::default();
    let get = |policy| obtain(&home.store, &tag, policy, &options, &Progress::Quiet);
    let image = source.image(&tag, 1, 1000);
    push(&source.store, &image, &name(&tag), &options, &Progress::Quiet).expect("a push");
    assert!(matches!(get(PullPolicy::Never), Err(Error::NotFound(_))));
    assert_eq!(get(PullPolicy::Missing).expect("an image").id, image.id);
    let newer = source.image(&tag, 2, 1000);
    push(&source.store, &newer, &name(&tag), &options, &Progress::Quiet).expect("a push");
    assert_eq!(get(PullPolicy::Missing).expect("an image").id, image.id);
    assert_eq!(get(PullPolicy::Never).expect("an image").id, image.id);
    assert_eq!(get(PullPolicy::Always).expect("an image").id, newer.id);
    drop(registry);
    assert_eq!(get(PullPolicy::Missing).expect("an image").id, newer.id);
    assert!(get(PullPolicy::Always).is_err());
}
