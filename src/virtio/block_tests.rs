use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::disk::{self, Cache, Io, Options};
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
        Self::in_dir(tempfile::tempdir().unwrap(), options, features)
    }

    fn in_dir(dir: tempfile::TempDir, options: Options, features: u64) -> Self {
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
        // The interrupt comes after the answer.
        rig.transport.pause(std::time::Duration::from_secs(20)).unwrap();
        assert!(rig.irq.read().unwrap() > 0);
        let driver = Driver(&rig.transport);
        assert_eq!(driver.read(register::INTERRUPT_STATUS), interrupt::USED_RING);
        driver.write(register::INTERRUPT_ACK, interrupt::USED_RING);
        assert_eq!(driver.read(register::INTERRUPT_STATUS), 0);
    }
}

#[test]
fn framing_does_not_matter() {
    for io in ENGINES {
        let mut rig = Rig::new(io);
        let data = pattern(1024, 2);
        rig.fill(DATA, &data);
        // Header in three pieces, the last with the first data; status with the last data.
        rig.header(request::OUT, 3);
        let header = rig.bytes(HEADER, 16);
        rig.fill(DATA - 1, &header[15..]);
        let head = rig.ring.send(&[
            Desc::readable(HEADER, 3),
            Desc::readable(HEADER + 3, 12),
            Desc::readable(DATA - 1, 1 + 511),
            Desc::readable(DATA + 511, 513),
            Desc::writable(STATUS, 1),
        ]);
        Driver(&rig.transport).notify(0);
        assert_eq!(rig.ring.wait_used(), (head, 1));
        assert_eq!(rig.image(3 * 512, 1024), data);
        rig.header(request::IN, 3);
        let head = rig.ring.send(&[
            Desc::readable(HEADER, 16),
            Desc::writable(DATA + 0x8001, 7),
            Desc::writable(DATA + 0x9000, 1018),
        ]);
        Driver(&rig.transport).notify(0);
        assert_eq!(rig.ring.wait_used(), (head, 1025));
        let read = [rig.bytes(DATA + 0x8001, 7), rig.bytes(DATA + 0x9000, 1017)].concat();
        assert_eq!(read, data);
        assert_eq!(rig.bytes(DATA + 0x9000 + 1017, 1), [status::OK]);
    }
}

#[test]
fn ranges_outside_the_disk_are_refused() {
    let mut rig = Rig::new(Io::Auto);
    let end = MIB / 512;
    for (sector, len, code) in [
        (end - 1, 512, status::OK),
        (end - 1, 1024, status::IOERR),
        (end, 512, status::IOERR),
        (end + 1, 512, status::IOERR),
        (u64::MAX, 512, status::IOERR),
        (u64::MAX / 512, 512, status::IOERR),
        (u64::MAX / 512 + 1, 512, status::IOERR),
        (0, 511, status::IOERR),
        (0, 513, status::IOERR),
        (0, 1, status::IOERR),
    ] {
        assert_eq!(rig.request(request::IN, sector, &[Desc::writable(DATA, len)]).0, code, "{sector}+{len}");
        assert_eq!(rig.request(request::OUT, sector, &[Desc::readable(DATA, len)]).0, code, "{sector}+{len}");
    }
    assert_eq!(rig.request(request::IN, end, &[]), (status::OK, 1));
}

#[test]
fn unknown_request_is_unsupported() {
    let mut rig = Rig::new(Io::Auto);
    for kind in [2, 3, 5, 9, 10, 12, 14, 16, u32::MAX] {
        assert_eq!(rig.request(kind, 0, &[]), (status::UNSUPP, 1));
    }
}

#[test]
fn request_without_header_or_status_is_answered() {
    let mut rig = Rig::new(Io::Auto);
    let short = [Desc::readable(HEADER, 15), Desc::writable(STATUS, 1)];
    let head = rig.ring.send(&short);
    Driver(&rig.transport).notify(0);
    assert_eq!(rig.ring.wait_used(), (head, 1));
    assert_eq!(rig.bytes(STATUS, 1), [status::IOERR]);
    let no_status = [rig.header(request::FLUSH, 0)];
    for descs in [&no_status[..], &[Desc::readable(HEADER, 0)]] {
        let head = rig.ring.send(descs);
        Driver(&rig.transport).notify(0);
        assert_eq!(rig.ring.wait_used(), (head, 0));
    }
    assert_eq!(rig.request(request::FLUSH, 0, &[]), (status::OK, 1), "the device goes on");
}

#[test]
fn serial_is_twenty_bytes() {
    let mut rig = Rig::new(Io::Auto);
    assert_eq!(rig.request(request::GET_ID, 0, &[Desc::writable(DATA, 20)]), (status::OK, 21));
    assert_eq!(rig.bytes(DATA, 21), b"serial-0123456789-to\0");
    assert_eq!(rig.request(request::GET_ID, 0, &[Desc::writable(DATA, 19)]).0, status::IOERR);
}

impl Rig {
    fn range(&mut self, kind: u32, sector: u64, sectors: u32, flags: u32) -> u8 {
        let mut range = [0; 16];
        range[..8].copy_from_slice(&sector.to_le_bytes());
        range[8..12].copy_from_slice(&sectors.to_le_bytes());
        range[12..].copy_from_slice(&flags.to_le_bytes());
        self.fill(DATA, &range);
        self.request(kind, 0, &[Desc::readable(DATA, 16)]).0
    }

    fn allocated(&self) -> u64 {
        use std::os::unix::fs::MetadataExt;
        std::fs::metadata(&self.path).unwrap().blocks() * 512
    }
}

#[test]
fn discard_and_zeroes_clear_exactly_their_range() {
    for io in ENGINES {
        for (kind, flags) in [(request::DISCARD, 0), (request::WRITE_ZEROES, 0), (request::WRITE_ZEROES, 1)] {
            let mut rig = Rig::new(io);
            std::fs::write(&rig.path, vec![7; MIB as usize]).unwrap();
            assert_eq!(rig.range(kind, 9, 500, flags), status::OK);
            let mut expected = vec![7; MIB as usize];
            expected[9 * 512..509 * 512].fill(0);
            assert!(rig.image(0, MIB as usize) == expected);
            assert_eq!(std::fs::metadata(&rig.path).unwrap().len(), MIB);
            if flags == 1 || kind == request::DISCARD {
                assert!(rig.allocated() < MIB - 200_000, "{}", rig.allocated());
            }
        }
    }
}

#[test]
fn bad_ranges_to_discard_are_refused() {
    let mut rig = Rig::new(Io::Auto);
    std::fs::write(&rig.path, vec![7; MIB as usize]).unwrap();
    let end = MIB / 512;
    for kind in [request::DISCARD, request::WRITE_ZEROES] {
        assert_eq!(rig.range(kind, end - 1, 2, 0), status::IOERR);
        assert_eq!(rig.range(kind, u64::MAX, u32::MAX, 0), status::IOERR);
        assert_eq!(rig.range(kind, 0, 1, 2), status::UNSUPP);
        assert_eq!(rig.range(kind, 0, 1, u32::MAX), status::UNSUPP);
        assert_eq!(rig.range(kind, 0, 0, 0), status::OK);
        assert_eq!(rig.request(kind, 0, &[Desc::readable(DATA, 15)]).0, status::IOERR);
        assert_eq!(rig.request(kind, 0, &[Desc::readable(DATA, 32)]).0, status::IOERR);
        assert_eq!(rig.request(kind, 0, &[]).0, status::IOERR);
    }
    assert_eq!(rig.range(request::DISCARD, 0, 1, 1), status::UNSUPP);
    assert!(rig.image(0, MIB as usize).iter().all(|byte| *byte == 7));
}

#[test]
fn read_only_disk_refuses_every_change() {
    let mut rig = Rig::with(Options { read_only: true, ..Options::default() }, u64::MAX);
    assert_ne!(Driver(&rig.transport).offered() & feature::RO, 0);
    assert_eq!(rig.request(request::OUT, 0, &[Desc::readable(DATA, 512)]).0, status::IOERR);
    assert_eq!(rig.range(request::DISCARD, 0, 1, 0), status::IOERR);
    assert_eq!(rig.range(request::WRITE_ZEROES, 0, 1, 0), status::IOERR);
    assert_eq!(rig.request(request::IN, 0, &[Desc::writable(DATA, 512)]).0, status::OK);
    assert_eq!(rig.request(request::FLUSH, 0, &[]).0, status::OK);
}

#[test]
fn configuration_space_describes_the_disk() {
    let rig = Rig::new(Io::Auto);
    let field = |offset: u64, len: usize| {
        let mut data = [0; 8];
        crate::bus::BusDevice::read(&rig.transport, register::CONFIG + offset, &mut data[..len]);
        u64::from_le_bytes(data)
    };
    assert_eq!(field(0, 8), MIB / 512);
    assert_eq!(field(12, 4), 254);
    assert_eq!(field(20, 4), 512);
    assert_eq!((field(24, 1), field(26, 2)), (3, 8));
    assert_eq!(field(34, 2), 1);
    assert_eq!((field(36, 4), field(40, 4), field(44, 4)), (1 << 19, 1, 8));
    assert_eq!((field(48, 4), field(52, 4), field(56, 1)), (1 << 19, 1, 1));
    assert_eq!(Driver(&rig.transport).offered() & feature::MQ, 0);
}

#[test]
fn image_that_shrank_is_an_error_of_the_request() {
    for io in ENGINES {
        let mut rig = Rig::new(io);
        File::options().write(true).open(&rig.path).unwrap().set_len(4096).unwrap();
        assert_eq!(rig.request(request::IN, 6, &[Desc::writable(DATA, 2048)]), (status::IOERR, 1));
        assert_eq!(rig.request(request::IN, 6, &[Desc::writable(DATA, 1024)]).0, status::OK);
    }
}

/// Runs `test` in a thread with a file system of 64 KiB at a path of its own; false if this user may not mount.
fn with_tiny_file_system(test: impl FnOnce(&std::path::Path) + Send) -> bool {
    let dir = tempfile::tempdir().unwrap();
    let path = std::ffi::CString::new(dir.path().to_str().unwrap()).unwrap();
    let mount = || {
        // SAFETY: all pointers are strings that end in NUL and live until the calls return, or null where mount(2)
        // allows it; the calls change no more than the mounts that this thread and its children see.
        unsafe {
            libc::unshare(libc::CLONE_FS | libc::CLONE_NEWNS) == 0
                && libc::mount(
                    std::ptr::null(),
                    c"/".as_ptr(),
                    std::ptr::null(),
                    libc::MS_REC | libc::MS_PRIVATE,
                    std::ptr::null(),
                ) == 0
                && libc::mount(
                    c"tiny".as_ptr(),
                    path.as_ptr(),
                    c"tmpfs".as_ptr(),
                    0,
                    c"size=64k".as_ptr().cast(),
                ) == 0
        }
    };
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let mounted = mount();
            if mounted {
                test(dir.path());
            }
            mounted
        });
        thread.join().unwrap()
    })
}

#[test]
fn full_host_is_an_io_error_and_the_device_goes_on() {
    let mounted = with_tiny_file_system(|path| {
        for io in ENGINES {
            let dir = tempfile::tempdir_in(path).unwrap();
            let mut rig = Rig::in_dir(dir, Options { io, ..Options::default() }, u64::MAX);
            let data = [Desc::readable(DATA, 32 << 10)];
            assert_eq!(rig.request(request::OUT, 0, &data), (status::OK, 1));
            std::fs::write(path.join("ballast"), [1; 16 << 10]).unwrap();
            assert_eq!(rig.request(request::OUT, 64, &data), (status::IOERR, 1));
            assert_eq!(rig.request(request::FLUSH, 0, &[]), (status::OK, 1));
            assert_eq!(rig.request(request::IN, 0, &[Desc::writable(DATA, 4096)]).0, status::OK);
            std::fs::remove_file(path.join("ballast")).unwrap();
            assert_eq!(rig.request(request::OUT, 64, &[Desc::readable(DATA, 4096)]), (status::OK, 1));
        }
    });
    if !mounted {
        eprintln!("skipped: mounting a small file system needs root");
    }
}

#[test]
fn many_requests_in_flight_on_several_queues_all_come_back() {
    for io in ENGINES {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        File::create(&path).unwrap().set_len(MIB).unwrap();
        let image = disk::open(&path, &Options { io, ..Options::default() }).unwrap();
        let ram = memory::allocate(16 * MIB).unwrap();
        let options = BlockOptions { queues: 4, queue_size: 64, ..Default::default() };
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let transport = Transport::new(ram.clone(), Box::new(Block::new(image, &options)), irq).unwrap();
        let mut rings: Vec<Ring> = (0..4).map(|at| Ring::new(&ram, 0x1000 + at * 0x2000, 64)).collect();
        Driver(&transport).bring_up(u64::MAX, &rings.iter().collect::<Vec<_>>());
        assert_ne!(Driver(&transport).offered() & feature::MQ, 0);
        // Each queue has 21 chains of three descriptors: a write of its own sector, again and again.
        for round in 0..50u8 {
            for (queue, ring) in rings.iter_mut().enumerate() {
                let base = DATA + queue as u64 * 0x20000;
                for slot in 0..21u64 {
                    let at = base + slot * 0x800;
                    let sector = queue as u64 * 32 + slot;
                    let mut header = [0; 16];
                    header[0] = request::OUT as u8;
                    header[8..].copy_from_slice(&sector.to_le_bytes());
                    ram.write_slice(&header, GuestAddress(at)).unwrap();
                    ram.write_slice(&[0xff], GuestAddress(at + 16)).unwrap();
                    let data = pattern(512, round ^ sector as u8);
                    ram.write_slice(&data, GuestAddress(at + 0x400)).unwrap();
                    ring.send(&[
                        Desc::readable(at, 16),
                        Desc::readable(at + 0x400, 512),
                        Desc::writable(at + 16, 1),
                    ]);
                }
                Driver(&transport).notify(queue as u32);
            }
            for (queue, ring) in rings.iter_mut().enumerate() {
                let mut heads: Vec<u16> = (0..21).map(|_| ring.wait_used().0).collect();
                heads.sort_unstable();
                heads.dedup();
                assert_eq!(heads.len(), 21, "each once");
                for slot in 0..21u64 {
                    let at = DATA + queue as u64 * 0x20000 + slot * 0x800;
                    assert_eq!(ram.read_obj::<u8>(GuestAddress(at + 16)).unwrap(), status::OK);
                    let mut found = vec![0; 512];
                    let sector = queue as u64 * 32 + slot;
                    File::open(&path).unwrap().read_exact_at(&mut found, sector * 512).unwrap();
                    assert_eq!(found, pattern(512, round ^ sector as u8));
                }
            }
        }
    }
}

#[test]
fn engine_that_is_full_takes_the_rest_without_another_notification() {
    for io in ENGINES {
        let mut rig = Rig::new(io);
        for _ in 0..20 {
            let header = rig.header(request::IN, 0);
            for _ in 0..42 {
                rig.ring.send(&[header, Desc::writable(DATA, 512), Desc::writable(STATUS, 1)]);
            }
            Driver(&rig.transport).notify(0);
            for _ in 0..42 {
                assert_eq!(rig.ring.wait_used().1, 513);
            }
        }
    }
}

#[test]
fn reset_with_requests_in_flight_is_over_soon_and_leaves_memory_alone() {
    for io in ENGINES {
        let mut rig = Rig::new(io);
        for round in 0..400 {
            let header = rig.header(request::OUT, round % 100);
            for slot in 0..20u64 {
                let status = Desc::writable(STATUS + slot, 1);
                rig.ring.send(&[
                    header,
                    Desc::readable(DATA, 128 << 10),
                    Desc::readable(DATA, 128 << 10),
                    status,
                ]);
            }
            Driver(&rig.transport).notify(0);
            Driver(&rig.transport).reset();
            let mark = [0xa5; 20];
            rig.fill(STATUS, &mark);
            let used = rig.ring.used_index();
            std::thread::sleep(std::time::Duration::from_micros(200));
            assert_eq!(rig.bytes(STATUS, 20), mark, "nothing is written after the reset");
            assert_eq!(rig.ring.used_index(), used);
            rig.ring = Ring::new(&rig.ram, RING, 128);
            Driver(&rig.transport).bring_up(u64::MAX, &[&rig.ring]);
        }
        assert_eq!(rig.request(request::FLUSH, 0, &[]), (status::OK, 1));
    }
}

#[test]
fn paused_disk_has_nothing_in_flight() {
    for io in ENGINES {
        let mut rig = Rig::new(io);
        for _ in 0..20 {
            let header = rig.header(request::OUT, 0);
            let before = rig.ring.used_index();
            for slot in 0..20u64 {
                rig.ring.send(&[header, Desc::readable(DATA, 4096), Desc::writable(STATUS + slot, 1)]);
            }
            Driver(&rig.transport).notify(0);
            rig.transport.pause(std::time::Duration::from_secs(20)).unwrap();
            let done = rig.ring.used_index();
            std::thread::sleep(std::time::Duration::from_millis(2));
            assert_eq!(rig.ring.used_index(), done);
            rig.transport.resume();
            for _ in 0..20 {
                rig.ring.wait_used();
            }
            assert_eq!(rig.ring.used_index(), before.wrapping_add(20));
        }
    }
}

#[test]
fn driver_without_flush_gets_stable_writes_and_unsafe_disk_flushes_nothing() {
    let without_flush = !feature::FLUSH;
    for (cache, io) in
        [(Cache::Writeback, Io::Sync), (Cache::Writeback, Io::Uring), (Cache::Unsafe, Io::Auto)]
    {
        for features in [without_flush, u64::MAX] {
            let mut rig = Rig::with(Options { cache, io, ..Options::default() }, features);
            rig.fill(DATA, &[9; 512]);
            assert_eq!(rig.request(request::OUT, 2, &[Desc::readable(DATA, 512)]), (status::OK, 1));
            assert_eq!(rig.request(request::FLUSH, 0, &[]), (status::OK, 1));
            assert_eq!(rig.range(request::DISCARD, 4, 1, 0), status::OK);
            assert_eq!(rig.image(1024, 512), [9; 512]);
        }
    }
}
