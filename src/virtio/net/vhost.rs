//! vhost-net: the host's kernel moves packets between queues and tap by itself (`linux/vhost.h`).
//!
//! It is told where guest memory and the rings are and which descriptors to wait on and to signal. The guest's
//! interrupt still comes from the worker, which has to set the reason first (virtio 1.2 §4.2.2).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::spec::feature;
use crate::memory::Ram;
use crate::tap::Tap;
use crate::virtio::device::Handover;
use crate::virtio::spec::feature as common;

const GET_FEATURES: libc::Ioctl = 0x8008_af00;
const SET_FEATURES: libc::Ioctl = 0x4008_af00;
const SET_OWNER: libc::Ioctl = 0xaf01;
const RESET_OWNER: libc::Ioctl = 0xaf02;
const SET_MEM_TABLE: libc::Ioctl = 0x4008_af03;
const SET_VRING_NUM: libc::Ioctl = 0x4008_af10;
const SET_VRING_ADDR: libc::Ioctl = 0x4028_af11;
const SET_VRING_BASE: libc::Ioctl = 0x4008_af12;
const GET_VRING_BASE: libc::Ioctl = 0xc008_af12;
const SET_VRING_KICK: libc::Ioctl = 0x4008_af20;
const SET_VRING_CALL: libc::Ioctl = 0x4008_af21;
const NET_SET_BACKEND: libc::Ioctl = 0x4008_af30;

/// Regions of guest memory: below and above the MMIO hole.
const REGIONS_MAX: usize = 2;
/// Queues of a pair.
const QUEUES: u32 = 2;
/// Features that the host's kernel has to know of; it leaves the others to the tap.
const FEATURES: u64 = common::VERSION_1 | common::EVENT_IDX | common::INDIRECT_DESC | feature::MRG_RXBUF;

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Region {
    guest_addr: u64,
    size: u64,
    host_addr: u64,
    flags: u64,
}

#[repr(C)]
#[derive(Default)]
struct MemoryTable {
    count: u32,
    padding: u32,
    regions: [Region; REGIONS_MAX],
}

#[repr(C)]
struct VringState {
    index: u32,
    number: u32,
}

#[repr(C)]
struct VringFile {
    index: u32,
    fd: RawFd,
}

#[repr(C)]
#[derive(Default)]
struct VringAddr {
    index: u32,
    flags: u32,
    desc: u64,
    used: u64,
    avail: u64,
    log: u64,
}

/// A handle on the host's kernel for each pair of queues.
#[derive(Debug)]
pub struct Vhost {
    pairs: Vec<File>,
    call: EventFd,
}

impl Vhost {
    /// Opens `/dev/vhost-net` for so many pairs of queues.
    pub fn open(pairs: usize) -> io::Result<Self> {
        let open = || OpenOptions::new().read(true).write(true).open("/dev/vhost-net");
        let pairs: io::Result<Vec<File>> = (0..pairs).map(|_| open()).collect();
        let vhost = Self { pairs: pairs?, call: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)? };
        for file in &vhost.pairs {
            let mut offered = 0u64;
            ioctl(file, GET_FEATURES, &mut offered)?;
            if offered & FEATURES != FEATURES {
                return Err(io::ErrorKind::Unsupported.into());
            }
        }
        Ok(vhost)
    }

    /// Signalled when the driver is to be interrupted.
    pub(super) fn call(&self) -> &EventFd {
        &self.call
    }

    /// Starts all pairs whose queues the driver has set up.
    pub(super) fn start(
        &self,
        ram: &Ram,
        features: u64,
        tap: &Tap,
        queues: &[Handover<'_>],
    ) -> io::Result<()> {
        let mut table = MemoryTable::default();
        for (slot, region) in table.regions.iter_mut().zip(ram.iter()) {
            let (guest, size) = (region.start_addr(), region.len());
            let host = ram.get_host_address(guest).map_err(io::Error::other)?;
            *slot = Region { guest_addr: guest.0, size, host_addr: host.addr() as u64, flags: 0 };
            table.count += 1;
        }
        if ram.num_regions() > REGIONS_MAX {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let mut features = features & FEATURES;
        for (pair, file) in self.pairs.iter().enumerate() {
            let both: Vec<&Handover<'_>> =
                queues.iter().filter(|queue| usize::from(queue.index) / 2 == pair).collect();
            if both.len() != QUEUES as usize {
                continue;
            }
            ioctl(file, SET_OWNER, &mut ())?;
            ioctl(file, SET_FEATURES, &mut features)?;
            ioctl(file, SET_MEM_TABLE, &mut table)?;
            for queue in &both {
                self.set_up(file, ram, queue)?;
            }
            let fd = tap.fd(pair).ok_or(io::ErrorKind::NotFound)?;
            for index in 0..QUEUES {
                ioctl(file, NET_SET_BACKEND, &mut VringFile { index, fd })?;
            }
            // The driver may have notified while nobody listened.
            for queue in both {
                let _ = queue.kick.write(1);
            }
        }
        Ok(())
    }

    fn set_up(&self, file: &File, ram: &Ram, queue: &Handover<'_>) -> io::Result<()> {
        // The host's kernel does not check these ranges against the table, so the whole of each must lie in one region.
        let host = |addr: u64, len: usize| {
            let slice = ram.get_slice(GuestAddress(addr), len).map_err(io::Error::other)?;
            Ok::<u64, io::Error>(slice.ptr_guard_mut().as_ptr().addr() as u64)
        };
        let size = usize::from(queue.size);
        let index = u32::from(queue.index) % QUEUES;
        let mut number = VringState { index, number: queue.size.into() };
        let mut base = VringState { index, number: queue.next_avail.into() };
        let mut addr = VringAddr {
            index,
            desc: host(queue.desc, 16 * size)?,
            used: host(queue.used, 6 + 8 * size)?,
            avail: host(queue.avail, 6 + 2 * size)?,
            ..VringAddr::default()
        };
        ioctl(file, SET_VRING_NUM, &mut number)?;
        ioctl(file, SET_VRING_BASE, &mut base)?;
        ioctl(file, SET_VRING_ADDR, &mut addr)?;
        ioctl(file, SET_VRING_KICK, &mut VringFile { index, fd: queue.kick.as_raw_fd() })?;
        ioctl(file, SET_VRING_CALL, &mut VringFile { index, fd: self.call.as_raw_fd() })
    }

    /// Stops all pairs: when this returns, nothing touches guest memory any more. The result is, for each queue, the
    /// number of the next chain.
    pub(super) fn stop(&self) -> Vec<Option<u16>> {
        let mut positions = Vec::with_capacity(self.pairs.len() * QUEUES as usize);
        for file in &self.pairs {
            for index in 0..QUEUES {
                // Fails where it was not started.
                let _ = ioctl(file, NET_SET_BACKEND, &mut VringFile { index, fd: -1 });
                let mut base = VringState { index, number: 0 };
                let found = ioctl(file, GET_VRING_BASE, &mut base);
                positions.push(found.ok().map(|()| base.number as u16));
            }
            let _ = ioctl(file, RESET_OWNER, &mut ());
        }
        positions
    }
}

/// A request with its argument, which some do not look at.
fn ioctl<T>(file: &File, request: libc::Ioctl, argument: &mut T) -> io::Result<()> {
    // SAFETY: each request above is used with the type that `linux/vhost.h` gives for it, which is mutably
    // borrowed for the call. What the host's kernel learns of guest memory it uses until `Vhost::stop`,
    // before which the owner of the activation does not let go of that memory.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request, std::ptr::from_mut(argument)) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
