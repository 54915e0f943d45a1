//! Host tap devices: attached to, or made for as long as they are open; read and written packet by packet.
//!
//! Each packet has a virtio-net header of [`HEADER_BYTES`] before it, by which checksums and segmentation are left to
//! whoever comes last.
#![allow(unsafe_code)]

use std::ffi::{CString, c_int, c_short, c_uint};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

/// Length of the header before each packet: with the number of buffers, as virtio 1 has it.
pub const HEADER_BYTES: usize = 12;
/// Longest name of a network interface.
pub const NAME_BYTES_MAX: usize = libc::IFNAMSIZ - 1;

/// Adds an interface to a bridge (`linux/sockios.h`).
const SIOCBRADDIF: libc::Ioctl = 0x89a2;

/// What the one behind the descriptor takes over from the host's kernel (`TUNSETOFFLOAD`).
pub mod offload {
    /// Checksums.
    pub const CSUM: u32 = libc::TUN_F_CSUM;
    /// Segmentation of TCP over IPv4.
    pub const TSO4: u32 = libc::TUN_F_TSO4;
    /// Segmentation of TCP over IPv6.
    pub const TSO6: u32 = libc::TUN_F_TSO6;
    /// Segmentation of TCP with ECN.
    pub const TSO_ECN: u32 = libc::TUN_F_TSO_ECN;
    /// Segmentation of UDP, over IPv4 and IPv6 (Linux 6.2).
    pub const USO: u32 = libc::TUN_F_USO4 | libc::TUN_F_USO6;
}

/// Which tap, and how.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// The interface; made if there is none of that name.
    pub name: String,
    /// The network namespace that it is in.
    pub netns: Option<PathBuf>,
    /// Queues; 0 counts as 1.
    pub queues: u16,
    /// The MTU of a tap that is made here.
    pub mtu: Option<u16>,
    /// A bridge that the tap joins.
    pub bridge: Option<String>,
}

/// Why a tap cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host has no tun driver.
    #[error("/dev/net/tun does not exist; load its driver with `modprobe tun`, or give it to this container")]
    NoTun,
    /// The driver may not be used.
    #[error("/dev/net/tun may not be opened by this user; change its permissions, or run as root")]
    TunPermission,
    /// An existing tap belongs to someone else.
    #[error(
        "tap {name} belongs to another user; run as its owner or with CAP_NET_ADMIN, or make it anew with `ip tuntap \
         add {name} mode tap user $USER`"
    )]
    Permission {
        /// The tap.
        name: String,
    },
    /// There is none, and none may be made.
    #[error(
        "tap {name} does not exist and this user may not make it; run with CAP_NET_ADMIN, or have root make it with \
         `ip tuntap add {name} mode tap user $USER`"
    )]
    MayNotMake {
        /// The tap.
        name: String,
    },
    /// Another process has it.
    #[error("tap {name} is in use by another process; stop that process, or take another tap")]
    Busy {
        /// The tap.
        name: String,
    },
    /// The interface is another kind.
    #[error(
        "{name} cannot be used as a tap with {queues} queue(s): it is another kind of interface, or was made without \
         `multi_queue`"
    )]
    Mismatch {
        /// The interface.
        name: String,
        /// What was asked for.
        queues: u16,
    },
    /// The network namespace cannot be entered.
    #[error("cannot enter the network namespace {path}")]
    Namespace {
        /// Its file.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The host failed otherwise.
    #[error("cannot {what} tap {name}")]
    Host {
        /// What was being done.
        what: &'static str,
        /// The tap.
        name: String,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The tap cannot join its bridge.
    #[error("tap {name} cannot join the bridge {bridge}")]
    Bridge {
        /// The tap.
        name: String,
        /// The bridge.
        bridge: String,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

/// A piece of host memory that packets are read into or written from.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub struct Piece(libc::iovec);

// SAFETY: the pointer is only ever passed to the host kernel, which takes it from any thread of the process.
unsafe impl Send for Piece {}

impl Piece {
    /// `len` bytes at `base`.
    ///
    /// # Safety
    ///
    /// The range must stay mapped, and no Rust reference may point into it, as long as the piece is in use.
    pub unsafe fn new(base: *mut u8, len: usize) -> Self {
        Self(libc::iovec { iov_base: base.cast(), iov_len: len })
    }

    /// Its length in bytes.
    pub fn len(&self) -> usize {
        self.0.iov_len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// An open tap. One that was made here goes away with it.
#[derive(Debug)]
pub struct Tap {
    name: String,
    queues: Vec<Queue>,
    mtu: u16,
    mac: [u8; 6],
    udp_segmentation: bool,
    /// It is a real tap and no stand-in.
    real: bool,
}

#[derive(Debug)]
struct Queue {
    fd: OwnedFd,
    attached: bool,
}

/// Opens a tap, or makes it.
pub fn open(options: &Options) -> Result<Tap, Error> {
    let Some(path) = &options.netns else { return open_here(options) };
    let namespace = |source| Error::Namespace { path: path.clone(), source };
    let file = File::open(path).map_err(namespace)?;
    // A thread of its own: the namespace is the thread's, and there may be no way back.
    std::thread::scope(|scope| {
        let inside = std::thread::Builder::new().name("netns".into()).spawn_scoped(scope, || {
            enter_network_namespace(&file).map_err(namespace)?;
            open_here(options)
        });
        inside.map_err(namespace)?.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn enter_network_namespace(file: &File) -> io::Result<()> {
    // SAFETY: setns takes a descriptor, which is open, and touches no memory.
    let result = unsafe { libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn open_here(options: &Options) -> Result<Tap, Error> {
    let name = options.name.clone();
    let host = |what| {
        let name = name.clone();
        move |source| Error::Host { what, name, source }
    };
    let interface = Interface::new(&options.name).map_err(host("look at"))?;
    let existed = interface.exists();
    let count = options.queues.max(1);
    let base = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    let flags = if count > 1 { base | libc::IFF_MULTI_QUEUE } else { base };
    let attach = |flags| {
        let fd = open_tun()?;
        match interface.control(&fd, libc::TUNSETIFF, flags as c_short) {
            Ok(()) => Ok(Ok(Queue { fd, attached: true })),
            Err(error) => Ok(Err(error)),
        }
    };
    let refused = |error: io::Error| match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) if existed => Error::Permission { name: name.clone() },
        Some(libc::EPERM | libc::EACCES) => Error::MayNotMake { name: name.clone() },
        Some(libc::EBUSY) => Error::Busy { name: name.clone() },
        Some(libc::EINVAL) if existed => Error::Mismatch { name: name.clone(), queues: count },
        _ => Error::Host { what: "attach to", name: name.clone(), source: error },
    };
    let first = match attach(flags)? {
        // A tap that was made for several queues can be used with one, if this is said.
        Err(error) if existed && count == 1 && error.raw_os_error() == Some(libc::EINVAL) => {
            attach(flags | libc::IFF_MULTI_QUEUE)?
        }
        other => other,
    };
    let mut queues = vec![first.map_err(&refused)?];
    while queues.len() < usize::from(count) {
        queues.push(attach(flags)?.map_err(&refused)?);
    }
    for queue in &queues {
        set_int(&queue.fd, libc::TUNSETVNETHDRSZ, HEADER_BYTES as c_int).map_err(host("set up"))?;
        set_int(&queue.fd, libc::TUNSETVNETLE, 1).map_err(host("set up"))?;
    }
    if let (Some(mtu), false) = (options.mtu, existed) {
        interface.set_mtu(mtu).map_err(host("set the MTU of"))?;
    }
    if let Some(bridge) = &options.bridge {
        let failed = |source| Error::Bridge { name: name.clone(), bridge: bridge.clone(), source };
        interface.join(bridge).map_err(failed)?;
    }
    if !existed {
        interface.set_up().map_err(host("bring up"))?;
    } else if !interface.is_up().map_err(host("look at"))? {
        tracing::warn!("tap {name} is down, so nothing passes: `ip link set {name} up`");
    }
    let mut tap = Tap {
        mtu: interface.mtu().map_err(host("look at"))?,
        mac: interface.mac().map_err(host("look at"))?,
        name: options.name.clone(),
        queues,
        udp_segmentation: false,
        real: true,
    };
    let all = offload::CSUM | offload::TSO4 | offload::TSO6 | offload::TSO_ECN | offload::USO;
    tap.udp_segmentation = tap.set_offloads(all).is_ok();
    tap.set_offloads(0).map_err(host("set up"))?;
    Ok(tap)
}

fn open_tun() -> Result<OwnedFd, Error> {
    let path = Path::new("/dev/net/tun");
    let mut options = std::fs::OpenOptions::new();
    std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_NONBLOCK);
    options.read(true).write(true).open(path).map(OwnedFd::from).map_err(|source| {
        match source.raw_os_error() {
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => Error::NoTun,
            Some(libc::EACCES | libc::EPERM) => Error::TunPermission,
            _ => Error::Host { what: "open /dev/net/tun for", name: "device".into(), source },
        }
    })
}

fn set_int(fd: &OwnedFd, request: libc::Ioctl, value: c_int) -> io::Result<()> {
    // SAFETY: these requests read one int, which lives until the call returns.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request, &raw const value) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

impl Tap {
    /// A stand-in for a tap with one queue for each of these descriptors, which keep packets apart and do not block: for
    /// tests and fuzz targets.
    #[doc(hidden)]
    pub fn stand_in(queues: Vec<OwnedFd>, mtu: u16) -> Self {
        let queues = queues.into_iter().map(|fd| Queue { fd, attached: true }).collect();
        Self { name: "stand-in".into(), queues, mtu, mac: [0; 6], udp_segmentation: true, real: false }
    }

    /// Name of the interface.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Number of queues.
    pub fn queue_count(&self) -> usize {
        self.queues.len()
    }

    /// MTU of the interface when it was opened.
    pub fn mtu(&self) -> u16 {
        self.mtu
    }

    /// The host's own address on the interface.
    pub fn mac(&self) -> [u8; 6] {
        self.mac
    }

    /// Whether the host's kernel knows of [`offload::USO`].
    pub fn has_udp_segmentation(&self) -> bool {
        self.udp_segmentation
    }

    /// The descriptor of queue `index`.
    pub fn fd(&self, index: usize) -> Option<RawFd> {
        self.queues.get(index).map(|queue| queue.fd.as_raw_fd())
    }

    /// The same, to be read and written: each packet has its header before it.
    pub fn as_fd(&self, index: usize) -> Option<BorrowedFd<'_>> {
        self.queues.get(index).map(|queue| queue.fd.as_fd())
    }

    /// Says what the host's kernel need not do for packets from here.
    pub fn set_offloads(&self, offloads: u32) -> io::Result<()> {
        let Some(queue) = self.queues.first().filter(|_| self.real) else { return Ok(()) };
        // SAFETY: the request takes its argument by value.
        let result =
            unsafe { libc::ioctl(queue.fd.as_raw_fd(), libc::TUNSETOFFLOAD, c_uint::from(offloads)) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Has the interface stay when the last descriptor is closed.
    pub fn keep(&self) -> io::Result<()> {
        let Some(queue) = self.queues.first().filter(|_| self.real) else { return Ok(()) };
        // SAFETY: the request takes its argument by value.
        let result = unsafe { libc::ioctl(queue.fd.as_raw_fd(), libc::TUNSETPERSIST, 1) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Has the host use the first `count` queues and no others.
    pub fn set_active(&mut self, count: usize) -> io::Result<()> {
        for (index, queue) in self.queues.iter_mut().enumerate() {
            let attach = index < count;
            if attach != queue.attached {
                let flag = if attach { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
                if self.real {
                    let mut request = request();
                    request.ifr_ifru.ifru_flags = flag as c_short;
                    call(queue.fd.as_raw_fd(), libc::TUNSETQUEUE, &mut request)?;
                }
                queue.attached = attach;
            }
        }
        Ok(())
    }

    /// Loses the packets that wait to be read, or most of them if more come all the time.
    pub fn discard(&self) {
        const ENOUGH: usize = 4096;
        let mut byte = [0u8; 1];
        // SAFETY: the byte outlives all uses of the piece, and nothing else refers to it meanwhile.
        let piece = unsafe { Piece::new(byte.as_mut_ptr(), byte.len()) };
        for queue in
            (0..self.queues.len()).filter(|queue| self.queues.get(*queue).is_some_and(|queue| queue.attached))
        {
            for _ in 0..ENOUGH {
                if self.read(queue, &[piece]).is_err() {
                    break;
                }
            }
        }
    }

    /// Reads a packet into `pieces`; [`io::ErrorKind::WouldBlock`] if there is none.
    pub fn read(&self, queue: usize, pieces: &[Piece]) -> io::Result<usize> {
        self.transfer(queue, pieces, libc::readv)
    }

    /// Writes the packet that `pieces` are; [`io::ErrorKind::WouldBlock`] if the host has no room for it.
    pub fn write(&self, queue: usize, pieces: &[Piece]) -> io::Result<usize> {
        self.transfer(queue, pieces, libc::writev)
    }

    fn transfer(
        &self,
        queue: usize,
        pieces: &[Piece],
        call: unsafe extern "C" fn(c_int, *const libc::iovec, c_int) -> isize,
    ) -> io::Result<usize> {
        let fd = self.fd(queue).ok_or(io::ErrorKind::NotFound)?;
        let count = c_int::try_from(pieces.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        loop {
            // SAFETY: a piece is an iovec (repr(transparent)) whose range its maker has promised to be mapped and free
            // of references; the slice lives until the call returns.
            let result = unsafe { call(fd, pieces.as_ptr().cast(), count) };
            match usize::try_from(result) {
                Ok(bytes) => return Ok(bytes),
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
    }
}

/// An interface request that names none.
fn request() -> libc::ifreq {
    // SAFETY: all bytes zero is a value of each of its fields.
    unsafe { std::mem::zeroed() }
}

fn call(fd: RawFd, number: libc::Ioctl, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: all requests made here read and write one ifreq, which is mutably borrowed for the call.
    let result = unsafe { libc::ioctl(fd, number, std::ptr::from_mut(request)) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// An interface by its name, in this thread's network namespace.
struct Interface {
    name: CString,
    socket: OwnedFd,
}

impl Interface {
    fn new(name: &str) -> io::Result<Self> {
        let name = CString::new(name)?;
        if name.as_bytes().len() > NAME_BYTES_MAX {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: the call takes numbers only, and the descriptor that it returns is nobody else's.
        let socket = unsafe {
            let fd = libc::socket(libc::AF_UNIX, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            OwnedFd::from_raw_fd(fd)
        };
        Ok(Self { name, socket })
    }

    fn exists(&self) -> bool {
        // SAFETY: the name ends in NUL and lives until the call returns.
        unsafe { libc::if_nametoindex(self.name.as_ptr()) != 0 }
    }

    fn request(&self) -> libc::ifreq {
        let mut request = request();
        for (to, from) in request.ifr_name.iter_mut().zip(self.name.as_bytes()) {
            *to = *from as libc::c_char;
        }
        request
    }

    /// A request to the tun driver with these flags.
    fn control(&self, fd: &OwnedFd, number: libc::Ioctl, flags: c_short) -> io::Result<()> {
        let mut request = self.request();
        request.ifr_ifru.ifru_flags = flags;
        call(fd.as_raw_fd(), number, &mut request)
    }

    fn flags(&self) -> io::Result<c_short> {
        let mut request = self.request();
        call(self.socket.as_raw_fd(), libc::SIOCGIFFLAGS, &mut request)?;
        // SAFETY: the request has filled in this field, and any bits are a value of it.
        Ok(unsafe { request.ifr_ifru.ifru_flags })
    }

    fn is_up(&self) -> io::Result<bool> {
        Ok(c_int::from(self.flags()?) & libc::IFF_UP != 0)
    }

    fn set_up(&self) -> io::Result<()> {
        let mut request = self.request();
        request.ifr_ifru.ifru_flags = self.flags()? | libc::IFF_UP as c_short;
        call(self.socket.as_raw_fd(), libc::SIOCSIFFLAGS, &mut request)
    }

    fn mtu(&self) -> io::Result<u16> {
        let mut request = self.request();
        call(self.socket.as_raw_fd(), libc::SIOCGIFMTU, &mut request)?;
        // SAFETY: the request has filled in this field, and any bits are a value of it.
        let mtu = unsafe { request.ifr_ifru.ifru_mtu };
        Ok(mtu.clamp(0, u16::MAX.into()) as u16)
    }

    fn set_mtu(&self, mtu: u16) -> io::Result<()> {
        let mut request = self.request();
        request.ifr_ifru.ifru_mtu = mtu.into();
        call(self.socket.as_raw_fd(), libc::SIOCSIFMTU, &mut request)
    }

    fn mac(&self) -> io::Result<[u8; 6]> {
        let mut request = self.request();
        call(self.socket.as_raw_fd(), libc::SIOCGIFHWADDR, &mut request)?;
        // SAFETY: the request has filled in this field, and any bits are a value of it.
        let address = unsafe { request.ifr_ifru.ifru_hwaddr.sa_data };
        let mut mac = [0; 6];
        for (to, from) in mac.iter_mut().zip(address) {
            *to = from as u8;
        }
        Ok(mac)
    }

    /// Joins a bridge, unless it is in one already.
    fn join(&self, bridge: &str) -> io::Result<()> {
        // SAFETY: the name ends in NUL and lives until the call returns.
        let index = unsafe { libc::if_nametoindex(self.name.as_ptr()) };
        if index == 0 {
            return Err(io::Error::last_os_error());
        }
        let bridge = Self::new(bridge)?;
        let mut request = bridge.request();
        request.ifr_ifru.ifru_ifindex = index as c_int;
        match call(bridge.socket.as_raw_fd(), SIOCBRADDIF, &mut request) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Ok(()),
            other => other,
        }
    }
}
