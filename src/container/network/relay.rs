//! Frames between a tap and passt, for microVMs of users without privileges.
//!
//! pasta takes connections from the host's loopback device to the namespace's loopback device, where no microVM listens.
//! passt is the same program without a namespace: all that it carries are frames on a socket (each with its length before
//! it, big-endian, 32 bits), as QEMU's. So a process of our own stands in pasta's place at the namespace's `eth0`, a tap,
//! and everything else is as with pasta.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, setns};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::error::Error;
use crate::tap::{self, HEADER_BYTES, Tap};

/// The engine's subcommand that is this process.
pub const SUBCOMMAND: &str = "network-relay";
/// Longest frame, and what an Ethernet header takes of it.
const FRAME_BYTES_MAX: usize = 65_535;
const ETHERNET_BYTES: usize = 14;
/// The length before each frame.
const LENGTH_BYTES: usize = 4;

/// What is relayed.
#[derive(Clone, Debug)]
pub struct Options {
    /// The namespace of the tap.
    pub netns: PathBuf,
    /// The tap; it is made.
    pub device: String,
    /// Its largest packet.
    pub mtu: u16,
    /// passt's socket.
    pub socket: PathBuf,
    /// The guest's hardware address.
    pub mac: [u8; 6],
}

/// Connects both sides, goes on as a process of nobody's, and relays until passt has ended. The process that was started
/// ends when the connection is there.
pub fn run(options: &Options) -> Result<(), Error> {
    let namespace = |source| Error::Namespace { what: "enter", path: options.netns.clone(), source };
    let file = File::open(&options.netns).map_err(namespace)?;
    setns(&file, CloneFlags::CLONE_NEWNET).map_err(|errno| namespace(errno.into()))?;
    let wanted =
        tap::Options { name: options.device.clone(), mtu: Some(options.mtu), ..tap::Options::default() };
    let tap = tap::open(&wanted)?;
    let failed = |what: &'static str| move |source| Error::Relay { what, source };
    let mut socket = UnixStream::connect(&options.socket).map_err(failed("connect to passt"))?;
    // passt learns the guest's address from what the guest sends; until then it would send to nobody.
    socket.write_all(&with_length(&announcement(options.mac))).map_err(failed("talk to passt"))?;
    nix::unistd::daemon(false, false).map_err(|errno| failed("go on in the background")(errno.into()))?;
    socket.set_nonblocking(true).map_err(failed("talk to passt"))?;
    relay(&tap, &socket).map_err(failed("relay frames"))
}

/// A question for the address that every network has and nobody answers to (ARP, RFC 5227 section 1.1).
fn announcement(mac: [u8; 6]) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend(mac);
    // ARP; Ethernet and IPv4, with addresses of 6 and 4 bytes; a request.
    frame.extend([0x08, 0x06, 0x00, 0x01, 0x08, 0x00, 6, 4, 0x00, 0x01]);
    frame.extend(mac);
    frame.extend([0; 4 + 6 + 4]);
    frame
}

fn with_length(frame: &[u8]) -> Vec<u8> {
    let length = u32::try_from(frame.len()).unwrap_or(0);
    [&length.to_be_bytes(), frame].concat()
}

fn relay(tap: &Tap, socket: &UnixStream) -> io::Result<()> {
    let Some(device) = tap.as_fd(0) else { return Ok(()) };
    let mut incoming = Incoming::default();
    // What passt has not taken yet.
    let mut outgoing: Vec<u8> = vec![];
    let mut packet = vec![0; HEADER_BYTES + FRAME_BYTES_MAX];
    loop {
        let full = !outgoing.is_empty();
        let of_device = if full { PollFlags::empty() } else { PollFlags::IN };
        let of_socket = if full { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
        let mut fds = [PollFd::new(&device, of_device), PollFd::new(socket, of_socket)];
        match poll(&mut fds, None) {
            Err(Errno::INTR) => continue,
            result => drop(result?),
        }
        let (device_ready, socket_ready) = (fds[0].revents(), fds[1].revents());
        if socket_ready.contains(PollFlags::OUT) {
            send(socket, &mut outgoing)?;
        }
        if socket_ready.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) {
            if !incoming.fill(socket)? {
                return Ok(());
            }
            while let Some(frame) = incoming.next_frame()? {
                deliver(device, frame);
            }
        }
        if device_ready.contains(PollFlags::IN) {
            match rustix::io::read(device, &mut packet) {
                Ok(length) if length > HEADER_BYTES => {
                    outgoing.extend(with_length(packet.get(HEADER_BYTES..length).unwrap_or_default()));
                    send(socket, &mut outgoing)?;
                }
                Ok(_) | Err(Errno::AGAIN | Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        } else if device_ready.intersects(PollFlags::ERR | PollFlags::HUP) {
            // The namespace is gone, and the tap with it.
            return Ok(());
        }
    }
}

fn send(mut socket: &UnixStream, outgoing: &mut Vec<u8>) -> io::Result<()> {
    match socket.write(outgoing) {
        Ok(sent) => drop(outgoing.drain(..sent)),
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
        Err(error) => return Err(error),
    }
    Ok(())
}

/// Hands a frame to the tap, which loses it if it has no room, as networks do.
fn deliver(device: BorrowedFd<'_>, frame: &[u8]) {
    // Nothing is left to others: no checksums, no segmentation.
    let header = [0; HEADER_BYTES];
    let _ = rustix::io::writev(device, &[io::IoSlice::new(&header), io::IoSlice::new(frame)]);
}

/// What has come from passt, in frames.
#[derive(Default)]
struct Incoming {
    bytes: Vec<u8>,
    /// Where the next frame begins.
    at: usize,
}

impl Incoming {
    /// Reads what there is; false at the end.
    fn fill(&mut self, mut socket: impl Read) -> io::Result<bool> {
        self.bytes.drain(..self.at);
        self.at = 0;
        let filled = self.bytes.len();
        self.bytes.resize(filled + FRAME_BYTES_MAX + LENGTH_BYTES, 0);
        let result = socket.read(self.bytes.get_mut(filled..).unwrap_or_default());
        self.bytes.truncate(filled + result.as_ref().copied().unwrap_or(0));
        match result {
            Ok(count) => Ok(count > 0),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                Ok(true)
            }
            Err(error) => Err(error),
        }
    }

    fn next_frame(&mut self) -> io::Result<Option<&[u8]>> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let Some((length, rest)) = rest.split_first_chunk::<LENGTH_BYTES>() else { return Ok(None) };
        let length = u32::from_be_bytes(*length) as usize;
        if !(ETHERNET_BYTES..=FRAME_BYTES_MAX).contains(&length) {
            return Err(io::Error::other(format!("passt sends a frame of {length} bytes")));
        }
        let frame = rest.get(..length);
        self.at += if frame.is_some() { LENGTH_BYTES + length } else { 0 };
        Ok(frame)
    }
}

/// Six bytes in hexadecimal digits, with colons between them.
pub fn parse_mac(text: &str) -> Result<[u8; 6], Error> {
    let bytes: Option<Vec<u8>> = text.split(':').map(|byte| u8::from_str_radix(byte, 16).ok()).collect();
    bytes.and_then(|bytes| bytes.try_into().ok()).ok_or_else(|| Error::Mac(text.into()))
}

/// What the engine is told to become such a process.
pub(super) fn arguments(options: &Options) -> Vec<std::ffi::OsString> {
    let mac: Vec<String> = options.mac.iter().map(|byte| format!("{byte:02x}")).collect();
    let path = |path: &Path| path.as_os_str().to_owned();
    vec![
        SUBCOMMAND.into(),
        "--netns".into(),
        path(&options.netns),
        "--device".into(),
        options.device.clone().into(),
        "--mtu".into(),
        options.mtu.to_string().into(),
        "--socket".into(),
        path(&options.socket),
        "--mac".into(),
        mac.join(":").into(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_found_however_they_come() {
        let frames = [vec![1u8; 14], vec![2; 1500], vec![3; FRAME_BYTES_MAX]];
        let stream: Vec<u8> = frames.iter().flat_map(|frame| with_length(frame)).collect();
        for size in [1usize, 3, 17, 4096, stream.len()] {
            let mut incoming = Incoming::default();
            let mut found = vec![];
            for piece in stream.chunks(size) {
                let mut piece = piece;
                while !piece.is_empty() {
                    assert!(incoming.fill(&mut piece).unwrap());
                    while let Some(frame) = incoming.next_frame().unwrap() {
                        found.push(frame.to_vec());
                    }
                }
            }
            assert_eq!(found, frames, "in pieces of {size}");
            assert!(!incoming.fill(&b""[..]).unwrap());
        }
    }

    #[test]
    fn frames_of_impossible_lengths_are_errors() {
        for length in [0u32, 13, 65_536, u32::MAX] {
            let mut incoming = Incoming::default();
            incoming.fill(&length.to_be_bytes()[..]).unwrap();
            assert!(incoming.next_frame().is_err(), "{length}");
        }
    }

    #[test]
    fn frames_pass_both_ways_and_the_relay_ends_with_passt() {
        use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
        let flags = SocketFlags::NONBLOCK;
        let (ours, its) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        let tap = Tap::stand_in(vec![its], 1500);
        let (mut passt, socket) = UnixStream::pair().unwrap();
        socket.set_nonblocking(true).unwrap();
        std::thread::scope(|scope| {
            let relay = scope.spawn(|| relay(&tap, &socket));
            let frame = [7u8; 60];
            rustix::io::write(&ours, &[&[0u8; HEADER_BYTES][..], &frame].concat()).unwrap();
            let mut seen = [0u8; LENGTH_BYTES + 60];
            passt.read_exact(&mut seen).unwrap();
            assert_eq!(seen.to_vec(), with_length(&frame));
            passt.write_all(&with_length(&frame)).unwrap();
            poll(&mut [PollFd::new(&ours, PollFlags::IN)], None).unwrap();
            let mut packet = [1u8; 200];
            let length = rustix::io::read(&ours, &mut packet[..]).unwrap();
            assert_eq!(packet[..length], [&[0u8; HEADER_BYTES][..], &frame].concat());
            drop(passt);
            relay.join().unwrap().unwrap();
        });
    }
}
