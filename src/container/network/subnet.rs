//! Subnets: which are free, and which addresses in them.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// The default network's, if the host has no route into it.
const DEFAULT: Ipv4Net = net([10, 88, 0], 16);
/// Where subnets of 256 addresses are taken from for other networks: 10.89.0.0/16 to 10.95.0.0/16, and on hosts that have
/// all of 10.0.0.0/8 behind them 172.24.0.0/16 to 172.31.0.0/16.
const POOL: [(u8, std::ops::RangeInclusive<u8>); 2] = [(10, 89..=95), (172, 24..=31)];

const fn net([first, second, third]: [u8; 3], prefix: u8) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(first, second, third, 0), prefix)
}

/// Whether two subnets have an address in common.
pub(super) fn overlap(one: &IpNet, other: &IpNet) -> bool {
    one.contains(&other.network()) || other.contains(&one.network())
}

/// The first subnet of ours that overlaps with none of `taken`.
pub(super) fn free(taken: &[IpNet], default_network: bool) -> Option<IpNet> {
    let range = |(first, seconds): (u8, std::ops::RangeInclusive<u8>)| {
        seconds.flat_map(move |second| (0..=255).map(move |third| net([first, second, third], 24)))
    };
    let pool = POOL.into_iter().flat_map(range);
    let first = default_network.then_some(DEFAULT);
    let is_free = |subnet: &IpNet| !taken.iter().any(|net| overlap(net, subnet));
    first.into_iter().chain(pool).map(IpNet::V4).find(is_free)
}

/// A unique local IPv6 subnet, RFC 4193 §3.1, from 7 random bytes.
pub(super) fn unique_local(random: [u8; 7]) -> Option<IpNet> {
    let mut bytes = [0; 16];
    bytes[0] = 0xfd;
    bytes[1..8].copy_from_slice(&random);
    Ipv6Net::new(Ipv6Addr::from(bytes), 64).ok().map(IpNet::V6)
}

/// The first address of a subnet, which is the gateway's where none is named.
pub(super) fn first_address(subnet: &IpNet) -> Option<IpAddr> {
    addresses(subnet, None).next()
}

/// Addresses that a host in the subnet may have, beginning behind `after` and going round once.
fn addresses(subnet: &IpNet, after: Option<IpAddr>) -> Box<dyn Iterator<Item = IpAddr>> {
    let (first, last) = bounds(subnet);
    let number = |address| match address {
        IpAddr::V4(address) => u128::from(u32::from(address)),
        IpAddr::V6(address) => u128::from(address),
    };
    let is_v4 = matches!(subnet, IpNet::V4(_));
    let address = move |number: u128| {
        if is_v4 {
            IpAddr::V4(Ipv4Addr::from(u32::try_from(number).unwrap_or(u32::MAX)))
        } else {
            IpAddr::V6(Ipv6Addr::from(number))
        }
    };
    let start =
        after.map(number).filter(|after| (first..last).contains(after)).map_or(first, |after| after + 1);
    Box::new((start..=last).chain(first..start).map(address))
}

/// Numbers of the first and the last address that a host may have.
fn bounds(subnet: &IpNet) -> (u128, u128) {
    match subnet {
        IpNet::V4(net) => {
            let (first, last) = (u32::from(net.network()).into(), u32::from(net.broadcast()).into());
            // RFC 3021: subnets of two addresses have no network or broadcast address.
            if net.prefix_len() >= 31 { (first, last) } else { (first + 1, last - 1) }
        }
        IpNet::V6(net) => {
            let (first, last) = (u128::from(net.network()), u128::from(net.broadcast()));
            // RFC 4291 §2.6.1: the first address is the subnet's routers'.
            if net.prefix_len() >= 127 { (first, last) } else { (first + 1, last) }
        }
    }
}

/// Whether a host in the subnet may have the address.
pub(super) fn is_host(subnet: &IpNet, address: IpAddr) -> bool {
    let (first, last) = bounds(subnet);
    let number = match address {
        IpAddr::V4(address) => u128::from(u32::from(address)),
        IpAddr::V6(address) => u128::from(address),
    };
    subnet.contains(&address) && (first..=last).contains(&number)
}

/// A free address, the next one behind the last that was given, so that none is used again soon.
pub(super) fn free_address(subnet: &IpNet, last: Option<IpAddr>, taken: &BTreeSet<IpAddr>) -> Option<IpAddr> {
    // Whatever the subnet's size, one of the first `taken + 1` addresses is free.
    addresses(subnet, last).take(taken.len().saturating_add(1)).find(|address| !taken.contains(address))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    #[test]
    fn free_subnet_avoids_routes_of_any_length() {
        assert_eq!(free(&[], true), Some(parse("10.88.0.0/16")));
        assert_eq!(free(&[], false), Some(parse("10.89.0.0/24")));
        assert_eq!(free(&[parse("10.88.7.0/24")], true), Some(parse("10.89.0.0/24")));
        assert_eq!(
            free(&[parse("10.89.0.0/23"), parse("10.89.2.128/25")], false),
            Some(parse("10.89.3.0/24"))
        );
        assert_eq!(free(&[parse("10.88.0.0/15")], true), Some(parse("10.90.0.0/24")));
        assert_eq!(free(&[parse("10.0.0.0/8")], true), Some(parse("172.24.0.0/24")));
        assert_eq!(free(&[parse("10.0.0.0/8"), parse("172.16.0.0/12")], false), None);
    }

    #[test]
    fn addresses_go_round_and_leave_out_what_hosts_may_not_have() {
        let subnet = parse("10.89.0.0/29");
        let mut taken = BTreeSet::from([first_address(&subnet).unwrap()]);
        let mut last = None;
        let mut given = vec![];
        while let Some(address) = free_address(&subnet, last, &taken) {
            taken.insert(address);
            given.push(address.to_string());
            last = Some(address);
        }
        assert_eq!(given, ["10.89.0.2", "10.89.0.3", "10.89.0.4", "10.89.0.5", "10.89.0.6"]);
        taken.remove(&"10.89.0.3".parse().unwrap());
        assert_eq!(free_address(&subnet, last, &taken), Some("10.89.0.3".parse().unwrap()));
    }

    #[test]
    fn small_and_large_subnets_have_addresses() {
        assert_eq!(first_address(&parse("10.0.0.4/31")), Some("10.0.0.4".parse().unwrap()));
        assert_eq!(first_address(&parse("fd00::/64")), Some("fd00::1".parse().unwrap()));
        let taken = BTreeSet::from(["fd00::1".parse().unwrap()]);
        assert_eq!(free_address(&parse("fd00::/64"), None, &taken), Some("fd00::2".parse().unwrap()));
        let all = parse("0.0.0.0/0");
        let end = Some("255.255.255.254".parse().unwrap());
        assert_eq!(free_address(&all, end, &BTreeSet::new()), Some("0.0.0.1".parse().unwrap()));
        assert_eq!(unique_local([1; 7]), Some(parse("fd01:101:101:101::/64")));
    }

    #[test]
    fn network_and_broadcast_addresses_are_no_hosts() {
        let subnet = parse("10.89.0.0/24");
        for (address, is) in [
            ("10.89.0.0", false),
            ("10.89.0.1", true),
            ("10.89.0.254", true),
            ("10.89.0.255", false),
            ("10.90.0.1", false),
        ] {
            assert_eq!(is_host(&subnet, address.parse().unwrap()), is, "{address}");
        }
    }
}
