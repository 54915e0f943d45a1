use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::disk::{self, Io, Options};
use crate::memory;
use crate::virtio::mmio::Transport;
use crate::virtio::spec::{interrupt, register};
use crate::virtio::testing::{Desc, Driver, Ring};

const MIB: u64 = 1 << 20;
const RING: u64 = 0x1000;
const HEADER: u64 = 0x8000;
const STATUS: u64 = 0x8800;
const DATA: u64 = 0x10000;

/// A block device with an image behind it and a driver in front.
struct Rig {
    transport: Transport,
    irq: EventFd,
    ram: Ram,
    ring: Ring,
    path: PathBuf,
    _dir: tempfile::TempDir,
}

impl Rig {
    fn new(io: Io) -> Self {
        Self::with(Options { io, ..Options::default() }, u64::MAX)
    }

    fn with(options: Options, features: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        File::create(&path).unwrap().set_len(MIB).unwrap();
        let image = disk::open(&path, &options).unwrap();
        let ram = memory::allocate(16 * MIB).unwrap();
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let options = BlockOptions { serial: "serial-0123456789-too-long".into(), ..Default::default() };
        let device = Box::new(Block::new(image, &options));
        let transport = Transport::new(ram.clone(), device, irq.try_clone().unwrap()).unwrap();
        let ring = Ring::new(&ram, RING, 128);
        Driver(&transport).bring_up(features, &[&ring]);
        Self { transport, irq, ram, ring, path, _dir: dir }
    }

    fn header(&self, kind: u32, sector: u64) -> Desc {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.ram.write_slice(&header, GuestAddress(HEADER)).unwrap();
        Desc::readable(HEADER, 16)
    }

    /// Sends a request with these data descriptors; returns status and used length.
    fn request(&mut self, kind: u32, sector: u64, data: &[Desc]) -> (u8, u32) {
        self.ram.write_obj(0xffu8, GuestAddress(STATUS)).unwrap();
        let mut descs = vec![self.header(kind, sector)];
        descs.extend(data);
        descs.push(Desc::writable(STATUS, 1));
        let head = self.ring.send(&descs);
        Driver(&self.transport).notify(0);
        let (used, len) = self.ring.wait_used();
        assert_eq!(used, head);
        (self.ram.read_obj(GuestAddress(STATUS)).unwrap(), len)
    }

    fn fill(&self, addr: u64, bytes: &[u8]) {
        self.ram.write_slice(bytes, GuestAddress(addr)).unwrap();
    }

    fn bytes(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ram.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
        bytes
    }

    fn image(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        File::open(&self.path).unwrap().read_exact_at(&mut bytes, offset).unwrap();
        bytes
    }
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|at| (at as u8).wrapping_mul(31).wrapping_add((at >> 8) as u8) ^ seed).collect()
}

const ENGINES: [Io; 2] = [Io::Sync, Io::Uring];

#[test]
fn written_bytes_are_read_back_and_are_in_the_image() {
    for io in ENGINES {
        let mut rig = Rig::new(io);
        let data = pattern(4096, 1);
        rig.fill(DATA, &data);
        assert_eq!(rig.request(request::OUT, 8, &[Desc::readable(DATA, 4096)]), (status::OK, 1));
        assert_eq!(rig.image(4096, 4096), data);
        let (code, len) = rig.request(request::IN, 8, &[Desc::writable(DATA + 0x10001, 4096)]);
        assert_eq!((code, len), (status::OK, 4097));
        assert_eq!(rig.bytes(DATA + 0x10001, 4096), data);
        assert_eq!(rig.request(request::FLUSH, 0, &[]), (status::OK, 1));
        assert!(rig.irq.read().unwrap() > 0);
        let driver = Driver(&rig.transport);
        assert_eq!(driver.read(register::INTERRUPT_STATUS), interrupt::USED_RING);
        driver.write(register::INTERRUPT_ACK, interrupt::USED_RING);
        assert_eq!(driver.read(register::INTERRUPT_STATUS), 0);
    }
}
