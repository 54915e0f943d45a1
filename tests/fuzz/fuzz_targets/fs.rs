//! A hostile guest's FUSE requests against a folder in memory, and a hostile file server's replies against the device.
//!
//! Holds: no panic; each request has one answer with its number and true length, short enough for the device; nothing
//! outside the folder changes; the device completes each chain once, whatever the server says.
#![no_main]

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use rvmm::fileserver::testing::{names, request, words};
use rvmm::fileserver::{FileServer, Options};
use rvmm::fuse::{self, opcode};
use rvmm::memory::{self, Ram};
use rvmm::virtio::fs::{Fs, FsOptions};
use rvmm::virtio::testing::{Desc, Ring};
use rvmm::virtio::{Activation, Completions, Device, Handled};
use vm_memory::{Bytes, GuestAddress};

const MEMORY: u64 = 1 << 20;
const NAMES: [&str; 10] = ["a", "b", "c", "link", "fifo", "..", ".", "", "a/b", "../outside"];

#[derive(Arbitrary, Debug)]
enum Body {
    Raw(Vec<u8>),
    Words(Vec<u8>, u8, u8),
    Names(u8, u8),
    Create(u8, u16, u8),
    /// Handle, offset and size, as reads, writes and lists have them.
    Access(u8, u16, u32, Vec<u8>),
}

#[derive(Arbitrary, Debug)]
struct Request {
    opcode: u8,
    node: u8,
    user: u8,
    body: Body,
}

#[derive(Arbitrary, Debug)]
struct Reply {
    index: u8,
    error: i16,
    len: u16,
    generation: bool,
    cut: u8,
}

#[derive(Arbitrary, Debug)]
struct Input {
    readonly: bool,
    requests: Vec<Request>,
    chains: Vec<(Vec<u8>, u16)>,
    replies: Vec<Reply>,
}

impl Request {
    fn bytes(&self) -> Vec<u8> {
        let name = |n: u8| NAMES[usize::from(n) % NAMES.len()];
        let body = match &self.body {
            Body::Raw(bytes) => bytes.clone(),
            Body::Words(numbers, a, b) => {
                let numbers: Vec<u32> = numbers.iter().map(|n| u32::from(*n)).collect();
                [words(&numbers), names(&[name(*a), name(*b)])].concat()
            }
            Body::Names(a, b) => names(&[name(*a), name(*b)]),
            Body::Create(flags, mode, a) => {
                [words(&[u32::from(*flags) << 1, u32::from(*mode), 0, 0]), names(&[name(*a)])].concat()
            }
            Body::Access(handle, offset, size, data) => {
                let mut body = [u64::from(*handle).to_le_bytes(), u64::from(*offset).to_le_bytes()].concat();
                body.extend(words(&[*size, 0, 0, 0, 0, 0]));
                body.extend(data);
                body
            }
        };
        // What could fill the disk of the machine, or wait for it, is left out.
        let opcode = match u32::from(self.opcode % 56) {
            opcode::FALLOCATE | opcode::SYNCFS | opcode::FSYNC | opcode::FSYNCDIR => opcode::GETATTR,
            opcode => opcode,
        };
        request(opcode, u64::from(self.node) + 1, u64::from(self.node % 16), (u32::from(self.user), 0), &body)
    }
}

fn folder() -> &'static (PathBuf, PathBuf) {
    static FOLDER: std::sync::OnceLock<(PathBuf, PathBuf)> = std::sync::OnceLock::new();
    FOLDER.get_or_init(|| {
        let base = std::env::temp_dir().join(format!("rvmm-fuzz-fs-{}", std::process::id()));
        (base.join("folder"), base.join("outside"))
    })
}

fn serve(input: &Input) {
    let (folder, outside) = folder();
    let _ = std::fs::remove_dir_all(folder);
    std::fs::create_dir_all(folder.join("a/b")).expect("a folder");
    std::fs::create_dir_all(outside).expect("a folder");
    std::fs::write(outside.join("secret"), "secret").expect("a file");
    std::fs::write(folder.join("c"), "contents").expect("a file");
    std::os::unix::fs::symlink("../outside/secret", folder.join("link")).expect("a link");
    let root = std::fs::OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(folder).expect("a folder");
    let options = Options { readonly: input.readonly, ..Options::default() };
    let mut server = FileServer::new(OwnedFd::from(root), options, false, 200).expect("a server");
    let mut reply = vec![];
    for sent in input.requests.iter().take(100).map(Request::bytes) {
        if server.answer(&sent, &mut reply) {
            assert!((16..=fuse::REPLY_BYTES_MAX).contains(&reply.len()));
            assert_eq!(reply[..4], (reply.len() as u32).to_le_bytes());
            assert_eq!(reply[8..16], sent[8..16]);
        }
    }
    assert_eq!(std::fs::read(outside.join("secret")).expect("the secret"), b"secret");
    assert_eq!(std::fs::read_dir(outside).expect("a folder").count(), 1);
    if input.readonly {
        assert_eq!(std::fs::read(folder.join("c")).expect("the file"), b"contents");
        assert_eq!(std::fs::read_dir(folder).expect("the folder").count(), 3);
    }
}

thread_local! {
    static RAM: Ram = memory::allocate(16 << 20).expect("memory for a guest");
}

fn pass_on(input: &Input) {
    let ram = RAM.with(Clone::clone);
    let mut ring = Ring::new(&ram, 0x1000, 64);
    let mut queue = ring.queue(u64::MAX);
    let (ours, mut server) = UnixStream::pair().expect("a socket");
    server.set_nonblocking(true).expect("a socket");
    let mut fs = Fs::new(ours, &FsOptions { tag: "t".into(), queues: 1 });
    fs.start(Activation { ram: ram.clone(), features: u64::MAX }).expect("a start");
    let mut done: Completions = vec![];
    let mut sent = 0;
    for (bytes, room) in input.chains.iter().take(30) {
        let at = 0x10000 + sent * 0x8000;
        assert!(at + 0x8000 <= MEMORY * 2);
        let bytes = &bytes[..bytes.len().min(0x2000)];
        ram.write_slice(bytes, GuestAddress(at)).expect("memory");
        let mut descs = vec![Desc::readable(at, bytes.len() as u32)];
        descs.push(Desc::writable(at + 0x4000, u32::from(*room % 0x4000)));
        ring.send(&descs);
        let chain = queue.pop().expect("a chain").expect("a chain");
        match fs.handle(1, chain) {
            Handled::Done(chain, written) => queue.complete(chain, written).expect("a ring"),
            Handled::Deferred => {}
            Handled::Wait(chain) => queue.complete(chain, 0).expect("a ring"),
        }
        sent += 1;
    }
    fs.flush(&mut done);
    let mut seen = vec![0; 1 << 20];
    let _ = server.read(&mut seen);
    for reply in input.replies.iter().take(60) {
        let unique = u64::from(reply.generation) << 32 | u64::from(reply.index % 32);
        let body = vec![7; usize::from(reply.len % 0x5000)];
        let mut bytes = (16 + u32::from(reply.len)).to_le_bytes().to_vec();
        bytes.extend(i32::from(reply.error.min(1)).to_le_bytes());
        bytes.extend(unique.to_le_bytes());
        bytes.extend(body);
        let cut = bytes.len().min(usize::from(reply.cut) * 100);
        let _ = server.write(&bytes[cut..]);
        fs.event(0);
        fs.flush(&mut done);
    }
    drop(server);
    fs.event(0);
    fs.flush(&mut done);
    for completion in done {
        assert_eq!(completion.queue, 1);
        assert!(completion.written <= completion.chain.writable_len());
        queue.complete(completion.chain, completion.written).expect("a ring");
    }
    assert_eq!(u64::from(ring.used_index()), sent, "each chain is completed once");
    fs.stop();
}

fuzz_target!(|input: Input| {
    serve(&input);
    pass_on(&input);
});
