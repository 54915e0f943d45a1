//! A microVM's place in a network namespace: a tap beside each device, and everything that comes in at one goes out at the
//! other. The guest takes over the device's addresses, so the wire does not notice that it leads into a machine.

use std::fs;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::error::Error;
use super::netlink::{Link, Netlink};
use super::netns;
use super::status::Interface;
use crate::tap;

/// Where a microVM is plugged in: what `--net tap=…,netns=…,mac=…,mtu=…` is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct TapPlug {
    /// The tap, which stays when the monitor closes it.
    pub tap: String,
    /// The device beside it.
    pub interface: String,
    /// The guest's hardware address, which is the device's own.
    pub mac: String,
    /// The largest packet.
    pub mtu: u16,
}

/// Makes a tap beside a device of the namespace, and takes the device's addresses away for the guest to have. The tap has
/// so many pairs of queues. A second call finds what the first has made.
pub fn plug_tap(namespace: &Path, interface: &Interface, queues: u16) -> Result<TapPlug, Error> {
    let tap = tap_name(&interface.name);
    let found = netns::within(namespace, || Netlink::open()?.link(&interface.name))?;
    let device = found.ok_or_else(|| no_device(&interface.name, namespace))?;
    let mtu = u16::try_from(device.mtu).unwrap_or(u16::MAX);
    let options = tap::Options {
        name: tap.clone(),
        netns: Some(namespace.to_path_buf()),
        queues,
        mtu: Some(mtu),
        bridge: None,
    };
    let host = |source| tap::Error::Host { what: "keep", name: tap.clone(), source };
    tap::open(&options)?.keep().map_err(host)?;
    let connected = netns::within(namespace, || {
        let mut netlink = Netlink::open()?;
        let Some(tap) = netlink.link(&tap)? else { return Ok(false) };
        // The namespace's own stack must not answer beside the guest, and has no business on the wire.
        for name in [&interface.name, &tap.name] {
            silence(name)?;
        }
        netlink.delete_addresses(device.index)?;
        for (from, to) in [(&device, &tap), (&tap, &device)] {
            redirect(&mut netlink, from, to)?;
        }
        Ok(true)
    })?;
    if !connected {
        return Err(no_device(&tap, namespace));
    }
    Ok(TapPlug { tap, interface: interface.name.clone(), mac: interface.mac.clone(), mtu })
}

/// Removes the tap. The device beside it stays, without addresses.
pub fn unplug_tap(namespace: &Path, plug: &TapPlug) -> Result<(), Error> {
    netns::within(namespace, || {
        let mut netlink = Netlink::open()?;
        if let Some(device) = netlink.link(&plug.interface)? {
            netlink.end_redirection(device.index)?;
        }
        match netlink.link(&plug.tap)? {
            Some(tap) => netlink.delete_link(tap.index),
            None => Ok(()),
        }
    })
}

fn redirect(netlink: &mut Netlink, from: &Link, to: &Link) -> io::Result<()> {
    netlink.end_redirection(from.index)?;
    netlink.redirect(from.index, to.index)
}

/// `tap0` for `eth0`.
fn tap_name(interface: &str) -> String {
    let digits = interface.trim_start_matches(|c: char| !c.is_ascii_digit());
    format!("tap{}", if digits.is_empty() { "0" } else { digits })
}

fn no_device(device: &str, namespace: &Path) -> Error {
    Error::NoDevice { device: device.into(), path: namespace.to_path_buf() }
}

/// Turns IPv6 off for a device of the namespace that the thread is in: the addresses that it makes for itself would be the
/// guest's.
fn silence(device: &str) -> io::Result<()> {
    match fs::write(format!("/proc/sys/net/ipv6/conf/{device}/disable_ipv6"), "1") {
        // A kernel without IPv6.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn tap_has_the_number_of_its_device() {
        assert_eq!(super::tap_name("eth0"), "tap0");
        assert_eq!(super::tap_name("eth12"), "tap12");
        assert_eq!(super::tap_name("wan"), "tap0");
    }
}
