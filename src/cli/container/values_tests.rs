use super::*;

#[test]
fn sizes_and_times_are_read_as_docker_reads_them() {
    let bytes = |text: &str| text.parse::<Bytes>().map(|bytes| bytes.0);
    assert_eq!(bytes("64m"), Ok(64 << 20));
    assert_eq!(bytes("1.5GiB"), Ok(3 << 29));
    assert_eq!(bytes("512"), Ok(512));
    assert_eq!(bytes("7kb"), Ok(7 << 10));
    assert_eq!(bytes("-1"), Ok(u64::MAX));
    for text in ["", "m", "-5", "1x", "1e30", "nan", "inf"] {
        assert!(bytes(text).is_err(), "{text}");
    }
    assert_eq!("1m30s".parse(), Ok(HealthDuration(Duration::from_secs(90))));
    assert_eq!("500ms".parse(), Ok(HealthDuration(Duration::from_millis(500))));
    for text in ["", "5", "s", "-1s", "1y"] {
        assert!(text.parse::<HealthDuration>().is_err(), "{text}");
    }
    assert_eq!("0.5".parse(), Ok(Cpus(500)));
    assert!("0".parse::<Cpus>().is_err() && "x".parse::<Cpus>().is_err());
}

#[test]
fn volumes_are_read_in_every_form() {
    let bind = |path: &str| MountSource::Bind { path: path.into(), propagation: None };
    let named = |name: &str, copy| MountSource::Volume { name: name.into(), copy };
    let mount = |source, target: &str, read_only| Mount { source, target: target.into(), read_only };
    assert_eq!(volume("/a:/b"), Ok(mount(bind("/a"), "/b", false)));
    assert_eq!(volume("/a:/b:ro"), Ok(mount(bind("/a"), "/b", true)));
    assert_eq!(volume("data:/b:ro,nocopy"), Ok(mount(named("data", false), "/b", true)));
    assert_eq!(volume("/b"), Ok(mount(named("", true), "/b", false)));
    let shared = MountSource::Bind { path: "/a".into(), propagation: Some("rshared".into()) };
    assert_eq!(volume("/a:/b:rshared"), Ok(mount(shared, "/b", false)));
    for text in ["", "a", "a:b", "/a:/b:no", "a b:/c", "/a:/b:ro:rw"] {
        assert!(volume(text).is_err(), "{text}");
    }
    assert_eq!(super::mount("type=bind,src=/a,dst=/b,readonly"), Ok(mount(bind("/a"), "/b", true)));
    assert_eq!(super::mount("source=v,target=/b"), Ok(mount(named("v", true), "/b", false)));
    let memory = MountSource::Tmpfs { size_bytes: Some(1 << 20), mode: Some(0o700), options: vec![] };
    assert_eq!(
        super::mount("type=tmpfs,target=/t,tmpfs-size=1m,tmpfs-mode=700"),
        Ok(mount(memory, "/t", false))
    );
    let memory = MountSource::Tmpfs { size_bytes: Some(1 << 20), mode: None, options: vec!["noexec".into()] };
    assert_eq!(tmpfs("/t:size=1m,noexec,ro"), Ok(mount(memory, "/t", true)));
    for text in ["type=bind,target=/b", "type=bind,src=a,target=/b", "type=nfs,target=/b", "source=a"] {
        assert!(super::mount(text).is_err(), "{text}");
    }
}

#[test]
fn ports_are_read_in_every_form() {
    let port = |host_ip: Option<&str>, host, container, protocol: &str| Port {
        host_ip: host_ip.map(|ip| ip.parse().unwrap()),
        host,
        container,
        protocol: protocol.into(),
    };
    let one = |port| Ok(Ports(vec![port]));
    assert_eq!(ports("80"), one(port(None, 0, 80, "tcp")));
    assert_eq!(ports("8080:80/udp"), one(port(None, 8080, 80, "udp")));
    assert_eq!(ports("127.0.0.1:8080:80"), one(port(Some("127.0.0.1"), 8080, 80, "tcp")));
    assert_eq!(ports("127.0.0.1::80"), one(port(Some("127.0.0.1"), 0, 80, "tcp")));
    assert_eq!(ports("[::1]:8080:80"), one(port(Some("::1"), 8080, 80, "tcp")));
    let two = Ports(vec![port(None, 90, 80, "tcp"), port(None, 91, 81, "tcp")]);
    assert_eq!(ports("90-91:80-81"), Ok(two));
    for text in ["", "0", "80:0", "x:80", "1-3:1-2", "65536", "80/icmp", "1.2.3:80:80", "3-2:3-2", ":"] {
        assert!(ports(text).is_err(), "{text}");
    }
}

#[test]
fn limits_restarts_devices_and_secrets_are_read() {
    assert_eq!(rlimit("nofile=10:20"), Ok(Rlimit { name: "NOFILE".into(), soft: 10, hard: 20 }));
    assert_eq!(rlimit("core=-1"), Ok(Rlimit { name: "CORE".into(), soft: u64::MAX, hard: u64::MAX }));
    assert!(rlimit("nofile=3:2").is_err() && rlimit("files=1").is_err() && rlimit("nofile").is_err());
    assert_eq!(restart("on-failure:3"), Ok(Restart::OnFailure(3)));
    assert_eq!(restart("unless-stopped"), Ok(Restart::UnlessStopped));
    assert!(restart("always:3").is_err() && restart("sometimes").is_err());
    let expected = Device { host: "/dev/a".into(), container: "/dev/b".into(), access: "rw".into() };
    assert_eq!(device("/dev/a:/dev/b:rw"), Ok(expected));
    assert_eq!(device("/dev/a:r").unwrap().access, "r");
    assert!(device("dev/a").is_err() && device("/dev/a:/dev/b:x").is_err());
    let expected = Secret { name: "k".into(), source: "/s/key".into(), uid: 7, gid: 0, mode: 0o400 };
    assert_eq!(secret("id=k,src=/s/key,uid=7,mode=0400"), Ok(expected));
    assert_eq!(secret("/s/key").unwrap().name, "key");
    assert!(secret("id=../x,src=/s").is_err() && secret("id=x").is_err());
    assert_eq!(host("a:1.2.3.4"), Ok(("a".into(), "1.2.3.4".into())));
    assert_eq!(host("a:host-gateway").unwrap().1, "host-gateway");
    assert!(host("a:b").is_err() && host(":1.2.3.4").is_err());
    assert_eq!("A=b=c".parse(), Ok(EnvVariable("A".into(), Some("b=c".into()))));
    assert!("".parse::<EnvVariable>().is_err() && "=x".parse::<EnvVariable>().is_err());
}
