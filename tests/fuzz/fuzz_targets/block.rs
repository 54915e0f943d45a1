//! A hostile guest's block requests, cut into descriptors at will, against a disk in memory and a model of it.
//!
//! Holds: no panic; each chain is answered once, with the status that the model expects; the image has the bytes that
//! the model has, and its size does not change.
#![no_main]

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use rvmm::disk::{self, Io};
use rvmm::memory::{self, Ram};
use rvmm::virtio::block::{Block, BlockOptions};
use rvmm::virtio::testing::{Desc, Ring};
use rvmm::virtio::{Activation, Completions, Device, Handled};
use vm_memory::{Bytes, GuestAddress};

const MEMORY: u64 = 1 << 20;
const SECTORS: u64 = 64;
const IMAGE: u64 = SECTORS * 512;
const HEADER: u64 = 0x8000;
const STATUS: u64 = 0x9000;
const DATA: u64 = 0x10000;
const UNANSWERED: u8 = 0xee;
const ALL: u64 = u64::MAX;

#[derive(Arbitrary, Debug)]
enum Sector {
    Near(u8),
    Any(u64),
}

#[derive(Arbitrary, Debug)]
struct Request {
    kind: u8,
    odd_kind: bool,
    sector: Sector,
    /// Sectors of data, and bytes more.
    sectors: u8,
    extra: u8,
    range: (u8, u16, u8),
    fill: u8,
    /// Where header and data are cut.
    cuts: [u16; 3],
    header_len: u8,
    no_status: bool,
}

#[derive(Arbitrary, Debug)]
struct Input {
    read_only: bool,
    uring: bool,
    requests: Vec<Request>,
}

/// A disk, and what is expected of it.
struct Rig {
    block: Block,
    image: File,
    model: Vec<u8>,
    read_only: bool,
    ram: Ram,
    ring: Ring,
}

impl Rig {
    fn new(ram: &Ram, read_only: bool, io: Io) -> Self {
        // SAFETY: memfd_create returns a descriptor that nobody else owns, or -1, which is refused.
        let image = unsafe {
            let fd = libc_memfd_create();
            assert!(fd >= 0, "a file in memory");
            File::from_raw_fd(fd)
        };
        image.set_len(IMAGE).expect("room for the image");
        let path = format!("/proc/self/fd/{}", image.as_raw_fd());
        let options = disk::Options { read_only, io, ..Default::default() };
        let opened = disk::open(Path::new(&path), &options).expect("an image");
        let mut block = Block::new(opened, &BlockOptions::default());
        block.start(Activation { ram: ram.clone(), features: ALL }).expect("a started device");
        let ring = Ring::new(ram, 0x1000, 64);
        Self { block, image, model: vec![0; IMAGE as usize], read_only, ram: ram.clone(), ring }
    }

    /// The status that a request must get, and its effect on the model.
    fn expect(&mut self, kind: u32, sector: u64, data: &[u8]) -> u8 {
        let inside = |sector: u64, len: u64| {
            let start = u128::from(sector) * 512;
            let end = start + u128::from(len);
            (end <= u128::from(IMAGE)).then_some(start as usize..end as usize)
        };
        let len = data.len() as u64;
        match kind {
            0 | 1 if !len.is_multiple_of(512) => 1,
            1 if self.read_only => 1,
            0 => u8::from(inside(sector, len).is_none()),
            1 => match inside(sector, len) {
                Some(range) => {
                    self.model[range].copy_from_slice(data);
                    0
                }
                None => 1,
            },
            4 => 0,
            8 => u8::from(len < 20),
            11 | 13 => {
                if self.read_only || len != 16 {
                    return 1;
                }
                let at = u64::from_le_bytes(data[..8].try_into().expect("8 bytes"));
                let sectors = u32::from_le_bytes(data[8..12].try_into().expect("4 bytes"));
                let flags = u32::from_le_bytes(data[12..16].try_into().expect("4 bytes"));
                let known = if kind == 13 { 1 } else { 0 };
                if flags & !known != 0 {
                    return 2;
                }
                match inside(at, u64::from(sectors) * 512) {
                    Some(range) => {
                        self.model[range].fill(0);
                        0
                    }
                    None => 1,
                }
            }
            _ => 2,
        }
    }

    fn send(&mut self, request: &Request) {
        let kind = if request.odd_kind {
            u32::from(request.kind)
        } else {
            [0, 1, 4, 8, 11, 13][usize::from(request.kind) % 6]
        };
        let sector = match request.sector {
            Sector::Near(sector) => u64::from(sector % (SECTORS as u8 + 2)),
            Sector::Any(sector) => sector,
        };
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        let header_len = usize::from(request.header_len.min(16));
        let extra = if request.extra < 200 { 0 } else { u32::from(request.extra) };
        let is_range = kind == 11 || kind == 13;
        let len = if is_range && extra == 0 {
            16
        } else if kind == 8 {
            request.sectors.into()
        } else {
            u32::from(request.sectors % 12) * 512 + extra
        };
        let mut data = vec![request.fill; len as usize];
        if is_range && len == 16 {
            let (at, sectors, flags) = request.range;
            data[..8].copy_from_slice(&u64::from(at).to_le_bytes());
            data[8..12].copy_from_slice(&u32::from(sectors % 80).to_le_bytes());
            data[12..].copy_from_slice(&u32::from(flags % 3).to_le_bytes());
        }
        let to_device = !matches!(kind, 0 | 8);
        // One stream of readable bytes and one of writable bytes, each cut where the input says.
        let mut readable = header[..header_len].to_vec();
        if to_device {
            readable.extend(&data);
        }
        let writable_len = if to_device { 0 } else { len } + u32::from(!request.no_status);
        self.ram.write_slice(&readable, GuestAddress(HEADER)).expect("the bytes lie in memory");
        self.ram.write_slice(&vec![UNANSWERED; writable_len as usize], GuestAddress(DATA)).expect("memory");
        let mut descs = cut(HEADER, readable.len() as u32, &request.cuts, 0);
        descs.extend(cut(DATA, writable_len, &request.cuts, 2));
        if descs.is_empty() {
            descs.push(Desc::readable(STATUS, 0));
        }
        let head = self.ring.send(&descs);
        let mut queue = self.ring.queue_at(ALL, self.ring.used_index());
        let chain = queue.pop().expect("a legal chain").expect("a chain");
        let mut done = Completions::new();
        let (chain, written) = match Device::handle(&mut self.block, 0, chain) {
            Handled::Done(chain, written) => (chain, written),
            Handled::Deferred => {
                self.block.drain(&mut done);
                let completion = done.pop().expect("a completion");
                assert!(done.is_empty(), "one completion");
                (completion.chain, completion.written)
            }
            Handled::Wait(_) => panic!("the engine has room for one request"),
        };
        queue.complete(chain, written).expect("the rings are in memory");
        assert_eq!(self.ring.used(), Some((head, written)));
        if request.no_status && writable_len == 0 {
            assert_eq!(written, 0);
            // Without room for a status there is no way to tell, and nothing is done.
            return;
        }
        // The last writable byte is the status, even where the guest meant it for data.
        let data_len = writable_len as usize - 1;
        let mut answer = vec![0; writable_len as usize];
        self.ram.read_slice(&mut answer, GuestAddress(DATA)).expect("the bytes lie in memory");
        // Header and data are one stream, so a header that was cut short goes on in the data.
        let Some((header, rest)) = readable.split_at_checked(16) else {
            assert_eq!(answer[data_len], 1, "no header");
            return;
        };
        let kind = u32::from_le_bytes(header[..4].try_into().expect("4 bytes"));
        let sector = u64::from_le_bytes(header[8..].try_into().expect("8 bytes"));
        let seen = if matches!(kind, 0 | 8) { vec![0; data_len] } else { rest.to_vec() };
        let expected = self.expect(kind, sector, &seen);
        assert_eq!(answer[data_len], expected, "{kind} at {sector} of {len}");
        assert!(written <= writable_len);
        if kind == 0 && expected == 0 {
            let start = sector as usize * 512;
            assert_eq!(written, writable_len);
            assert_eq!(answer[..data_len], self.model[start..start + data_len]);
        }
    }
}

/// Descriptors for `len` bytes at `base`, at most four of them.
fn cut(base: u64, len: u32, cuts: &[u16; 3], flags: u16) -> Vec<Desc> {
    let mut ends: Vec<u32> = cuts.iter().map(|cut| u32::from(*cut).min(len)).collect();
    ends.push(len);
    ends.sort_unstable();
    let mut start = 0;
    let mut descs = Vec::new();
    for end in ends {
        if end > start {
            descs.push(Desc { addr: base + u64::from(start), len: end - start, flags, next: 0 });
        }
        start = end;
    }
    descs
}

/// A file in memory.
fn libc_memfd_create() -> i32 {
    unsafe extern "C" {
        fn memfd_create(name: *const std::ffi::c_char, flags: u32) -> i32;
    }
    // SAFETY: the name is a string that ends in NUL.
    unsafe { memfd_create(c"image".as_ptr(), 1) }
}

thread_local! {
    static RAM: Ram = memory::allocate(MEMORY).expect("memory for a guest");
}

fuzz_target!(|input: Input| {
    let ram = RAM.with(Clone::clone);
    let io = if input.uring { Io::Auto } else { Io::Sync };
    let mut rig = Rig::new(&ram, input.read_only, io);
    for request in input.requests.iter().take(30) {
        rig.send(request);
    }
    rig.block.stop();
    let mut bytes = vec![0; IMAGE as usize];
    rig.image.read_exact_at(&mut bytes, 0).expect("the whole image");
    assert!(bytes == rig.model);
    assert_eq!(rig.image.metadata().expect("its size").len(), IMAGE);
});
