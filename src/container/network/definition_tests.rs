use super::*;

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn options(name: &str) -> CreateOptions {
    CreateOptions { name: name.into(), ..CreateOptions::default() }
}

fn host(routes: &[&str], devices: &[&str]) -> Host {
    Host {
        routes: routes.iter().map(|route| net(route)).collect(),
        devices: devices.iter().map(ToString::to_string).collect(),
    }
}

fn made(options: &CreateOptions, others: &[Definition]) -> Definition {
    define(options, others, &Host::default()).unwrap()
}

#[test]
fn what_is_left_out_is_chosen_without_conflict() {
    let host = host(&["10.88.3.0/24", "192.168.0.0/16"], &["lo", "rvmm0"]);
    let first = define(&options("bridge"), &[], &host).unwrap();
    assert_eq!(first.interface.as_deref(), Some("rvmm1"));
    assert_eq!(first.subnets, [Subnet { subnet: net("10.89.0.0/24"), gateway: "10.89.0.1".parse().ok() }]);
    assert_eq!(first.id.len(), 64);
    let second = define(&CreateOptions { ipv6: true, ..options("web") }, &[first], &host).unwrap();
    assert_eq!(second.interface.as_deref(), Some("rvmm2"));
    assert_eq!(second.subnets[0].subnet, net("10.89.1.0/24"));
    assert!(net("fd00::/8").contains(&second.subnets[1].subnet) && second.has_ipv6());
}

#[test]
fn default_network_has_a_subnet_of_its_own() {
    assert_eq!(made(&options(DEFAULT_NETWORK), &[]).subnets[0].subnet, net("10.88.0.0/16"));
}

#[test]
fn named_subnets_and_gateways_are_kept() {
    let wanted = CreateOptions {
        subnets: vec![net("172.30.1.7/24"), net("fd12::/64")],
        gateways: vec!["fd12::9".parse().unwrap(), "172.30.1.254".parse().unwrap()],
        ..options("web")
    };
    let network = made(&wanted, &[]);
    assert_eq!(
        network.subnets[0],
        Subnet { subnet: net("172.30.1.0/24"), gateway: "172.30.1.254".parse().ok() }
    );
    assert_eq!(network.subnets[1].gateway, "fd12::9".parse().ok());
}

#[test]
fn impossible_networks_are_refused_with_their_reason() {
    let other = made(&CreateOptions { subnets: vec![net("172.30.0.0/16")], ..options("other") }, &[]);
    let cases: [(CreateOptions, &str); 8] = [
        (
            CreateOptions { subnets: vec![net("172.30.5.0/24")], ..options("a") },
            "overlaps with network \"other\"",
        ),
        (
            CreateOptions { subnets: vec![net("10.1.0.0/24")], ..options("a") },
            "the host's route to 10.0.0.0/9",
        ),
        (
            CreateOptions { subnets: vec![net("11.1.0.0/24"), net("11.2.0.0/24")], ..options("a") },
            "one subnet of IPv4",
        ),
        (CreateOptions { subnets: vec![net("11.1.0.0/32")], ..options("a") }, "no subnet for hosts"),
        (
            CreateOptions { gateways: vec!["1.2.3.4".parse().unwrap()], ..options("a") },
            "gateway 1.2.3.4 is no host",
        ),
        (CreateOptions { driver: Driver::Macvlan, ..options("a") }, "--subnet must name"),
        (CreateOptions { parent: Some("eth0".into()), ..options("a") }, "a bridge has no parent"),
        (CreateOptions { mtu: Some(1000), ipv6: true, ..options("a") }, "too small"),
    ];
    for (options, reason) in cases {
        let host = host(&["10.0.0.0/9"], &[]);
        let message = define(&options, std::slice::from_ref(&other), &host).unwrap_err().to_string();
        assert!(message.contains(reason), "{message}");
    }
}

#[test]
fn macvlan_may_be_where_the_host_is() {
    let wanted = CreateOptions {
        driver: Driver::Macvlan,
        subnets: vec![net("192.168.7.0/24")],
        parent: Some("eth0".into()),
        ..options("lan")
    };
    let network = define(&wanted, &[], &host(&["192.168.7.0/24"], &[])).unwrap();
    assert_eq!(network.interface.as_deref(), Some("eth0"));
    assert!(!network.has_dns());
}

#[test]
fn names_that_lead_elsewhere_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let networks = Definitions(directory.path().join("networks"));
    for name in ["", "../x", "a/b", ".hidden", "-x", "a b", &"x".repeat(129)] {
        assert!(matches!(networks.create(&options(name)), Err(Error::Name(_))), "{name}");
        assert!(networks.get(name).is_err());
        assert!(networks.remove(name).is_err());
    }
    for name in RESERVED {
        assert!(matches!(networks.create(&options(name)), Err(Error::Reserved(_))));
    }
}

#[test]
fn network_is_found_by_name_and_by_the_beginning_of_its_id() {
    let directory = tempfile::tempdir().unwrap();
    let networks = Definitions(directory.path().join("networks"));
    let made = networks.create(&options("web")).unwrap();
    assert!(matches!(networks.create(&options("web")), Err(Error::Exists(_))));
    assert_eq!(networks.find("web").unwrap(), made);
    assert_eq!(networks.find(&made.id[..12]).unwrap(), made);
    assert!(matches!(networks.find("ffffffffffff"), Err(Error::Missing(_))));
    assert_eq!(networks.all().unwrap(), [made]);
    networks.remove("web").unwrap();
    assert!(networks.all().unwrap().is_empty());
}
