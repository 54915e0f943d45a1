//! The files that a guest knows (nodes) and those that it has open (handles).
//!
//! A node is held by an `O_PATH` descriptor, so it stays the same file whatever happens to names meanwhile. There can
//! be more nodes than this process may have descriptors; the descriptors that were not used for longest are closed
//! then, and such a node is found again by its name in its parent, if it is still the same file there.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, Statx, StatxFlags};
use rustix::io::Errno;

use super::message::Outcome;
use crate::fuse::ROOT_NODE;

/// Nodes at most; what a guest with more than that looks up fails with `ENFILE`.
const NODES_MAX: usize = 4 << 20;
/// Directories above a node that are opened again for it; where a host moves directories about, there may be circles.
const DEPTH_MAX: usize = 4096;
/// The most recently looked up nodes, which keep their descriptors.
const RECENT: u64 = 64;

/// What makes two files the same one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Identity {
    dev: (u32, u32),
    ino: u64,
    mount: u64,
    /// Time of birth, so that a file with the number of a deleted one is another.
    born: (i64, u32),
}

impl Identity {
    fn of(stat: &Statx) -> Self {
        let dev = (stat.stx_dev_major, stat.stx_dev_minor);
        let born = (stat.stx_btime.tv_sec, stat.stx_btime.tv_nsec);
        Self { dev, ino: stat.stx_ino, mount: stat.stx_mnt_id, born }
    }
}

struct Node {
    identity: Identity,
    /// `None` for a node whose descriptor was given up.
    fd: Option<Rc<OwnedFd>>,
    file_type: u16,
    /// How often the guest was told of it, and has not forgotten it.
    lookups: u64,
    /// Open handles: such a node may have no name any more.
    handles: u32,
    /// Where it was found last.
    parent: u64,
    name: CString,
    used: u64,
}

/// All nodes.
pub(super) struct Nodes {
    nodes: HashMap<u64, Node>,
    by_identity: HashMap<Identity, u64>,
    next: u64,
    clock: u64,
    open: usize,
    open_max: usize,
}

/// A node that the guest has just been told of.
pub(super) struct Found {
    pub(super) node: u64,
    pub(super) stat: Statx,
    /// Another file system than that of its parent starts here.
    pub(super) is_submount: bool,
}

/// Everything about a file that a guest may ask for.
pub(super) fn stat(fd: BorrowedFd<'_>) -> Result<Statx, Errno> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    let wanted = StatxFlags::BASIC_STATS | StatxFlags::BTIME | StatxFlags::MNT_ID;
    rustix::fs::statx(fd, c"", flags, wanted)
}

/// Takes hold of a directory's entry, whatever it is; of a link itself and not of its target.
fn open_entry(parent: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    rustix::fs::openat2(parent, name, flags, Mode::empty(), resolve)
}

impl Nodes {
    /// The nodes of a share whose directory is `root`, with at most `open_max` descriptors.
    pub(super) fn new(root: OwnedFd, open_max: usize) -> Result<Self, Errno> {
        let stat = stat(root.as_fd())?;
        let identity = Identity::of(&stat);
        let node = Node {
            identity,
            fd: Some(Rc::new(root)),
            file_type: stat.stx_mode & libc::S_IFMT as u16,
            lookups: 1,
            handles: 0,
            parent: 0,
            name: CString::default(),
            used: 0,
        };
        let mut this = Self {
            nodes: HashMap::new(),
            by_identity: HashMap::from([(identity, ROOT_NODE)]),
            next: ROOT_NODE + 1,
            clock: 0,
            open: 1,
            open_max: open_max.max(2 * RECENT as usize),
        };
        this.nodes.insert(ROOT_NODE, node);
        Ok(this)
    }

    /// Forgets all nodes but the root, as at the start.
    pub(super) fn clear(&mut self) {
        self.nodes.retain(|number, _| *number == ROOT_NODE);
        self.by_identity.retain(|_, number| *number == ROOT_NODE);
        self.nodes.shrink_to_fit();
        self.by_identity.shrink_to_fit();
        self.open = 1;
        if let Some(root) = self.nodes.get_mut(&ROOT_NODE) {
            root.handles = 0;
        }
    }

    /// Number of nodes.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.nodes.len()
    }

    /// A node's type, as the `S_IFMT` bits of its mode.
    pub(super) fn file_type(&self, number: u64) -> Result<u32, Errno> {
        self.nodes.get(&number).map(|node| node.file_type.into()).ok_or(Errno::STALE)
    }

    /// A node's descriptor.
    pub(super) fn fd(&mut self, number: u64) -> Result<Rc<OwnedFd>, Errno> {
        // From a node without descriptor upwards to one that has its own, then down again.
        let mut missing = Vec::new();
        let mut at = number;
        let mut fd = loop {
            self.clock += 1;
            let node = self.nodes.get_mut(&at).ok_or(Errno::STALE)?;
            node.used = self.clock;
            if let Some(fd) = &node.fd {
                break Rc::clone(fd);
            }
            if missing.len() >= DEPTH_MAX {
                return Err(Errno::STALE);
            }
            missing.push(at);
            at = node.parent;
        };
        while let Some(number) = missing.pop() {
            let node = self.nodes.get(&number).ok_or(Errno::STALE)?;
            let found = match open_entry(fd.as_fd(), &node.name) {
                Err(Errno::NOENT | Errno::NOTDIR) => Err(Errno::STALE),
                result => result,
            }?;
            if Identity::of(&stat(found.as_fd())?) != node.identity {
                return Err(Errno::STALE);
            }
            fd = Rc::new(found);
            self.make_room();
            if let Some(node) = self.nodes.get_mut(&number) {
                node.fd = Some(Rc::clone(&fd));
                self.open += 1;
            }
        }
        Ok(fd)
    }

    /// Looks a name up, and counts that the guest is told of what is found.
    pub(super) fn look_up(&mut self, parent: u64, name: &CStr) -> Result<Found, Errno> {
        let directory = self.fd(parent)?;
        let parent_mount = self.nodes.get(&parent).map(|node| node.identity.mount).ok_or(Errno::STALE)?;
        let fd = match open_entry(directory.as_fd(), name) {
            Err(Errno::MFILE | Errno::NFILE) => {
                self.close_unused();
                open_entry(directory.as_fd(), name)
            }
            result => result,
        }?;
        let stat = stat(fd.as_fd())?;
        let identity = Identity::of(&stat);
        let is_directory = u32::from(stat.stx_mode) & libc::S_IFMT == libc::S_IFDIR;
        let is_submount = identity.mount != parent_mount && is_directory;
        let number = self.add(identity, fd, &stat, parent, name)?;
        Ok(Found { node: number, stat, is_submount })
    }

    fn add(
        &mut self,
        identity: Identity,
        fd: OwnedFd,
        stat: &Statx,
        parent: u64,
        name: &CStr,
    ) -> Result<u64, Errno> {
        self.clock += 1;
        if let Some(number) = self.by_identity.get(&identity).copied()
            && let Some(node) = self.nodes.get_mut(&number)
        {
            node.lookups = node.lookups.saturating_add(1);
            node.used = self.clock;
            // The newest name is the one that most likely stays. A directory has but one, and is its own parent's
            // ancestor nowhere.
            if number != ROOT_NODE && (node.parent, node.name.as_c_str()) != (parent, name) {
                (node.parent, node.name) = (parent, name.to_owned());
            }
            if node.fd.is_none() {
                node.fd = Some(Rc::new(fd));
                self.open += 1;
            }
            return Ok(number);
        }
        if self.nodes.len() >= NODES_MAX {
            return Err(Errno::NFILE);
        }
        self.make_room();
        let number = self.next;
        self.next += 1;
        let node = Node {
            identity,
            fd: Some(Rc::new(fd)),
            file_type: stat.stx_mode & libc::S_IFMT as u16,
            lookups: 1,
            handles: 0,
            parent,
            name: name.to_owned(),
            used: self.clock,
        };
        self.nodes.insert(number, node);
        self.by_identity.insert(identity, number);
        self.open += 1;
        Ok(number)
    }

    /// The guest has forgotten `count` of the times that it was told of a node.
    pub(super) fn forget(&mut self, number: u64, count: u64) {
        let Some(node) = self.nodes.get_mut(&number).filter(|_| number != ROOT_NODE) else { return };
        node.lookups = node.lookups.saturating_sub(count);
        if node.lookups == 0 && node.handles == 0 {
            self.remove(number);
        }
    }

    fn remove(&mut self, number: u64) {
        if let Some(node) = self.nodes.remove(&number) {
            self.open -= usize::from(node.fd.is_some());
            self.by_identity.remove(&node.identity);
        }
    }

    /// A handle on a node was opened: it keeps its descriptor.
    pub(super) fn opened(&mut self, number: u64) -> Outcome {
        let node = self.nodes.get_mut(&number).ok_or(Errno::STALE)?;
        node.handles += 1;
        Ok(())
    }

    /// A handle on a node was closed.
    pub(super) fn closed(&mut self, number: u64) {
        if let Some(node) = self.nodes.get_mut(&number) {
            node.handles = node.handles.saturating_sub(1);
            if node.lookups == 0 && node.handles == 0 && number != ROOT_NODE {
                self.remove(number);
            }
        }
    }

    fn make_room(&mut self) {
        if self.open >= self.open_max {
            self.close_unused();
        }
    }

    /// Closes half of the descriptors, those that were not used for longest.
    fn close_unused(&mut self) {
        let recent = self.clock.saturating_sub(RECENT);
        let may_go = |number: u64, node: &Node| {
            node.fd.is_some() && node.handles == 0 && node.used < recent && number != ROOT_NODE
        };
        let mut ages: Vec<u64> = self
            .nodes
            .iter()
            .filter(|(number, node)| may_go(**number, node))
            .map(|(_, node)| node.used)
            .collect();
        ages.sort_unstable();
        let Some(limit) = ages.get(ages.len() / 2).copied() else { return };
        for (number, node) in &mut self.nodes {
            if may_go(*number, node) && node.used <= limit {
                node.fd = None;
                self.open -= 1;
            }
        }
    }
}

/// An open file or directory.
pub(super) struct Handle {
    pub(super) file: OwnedFd,
    node: u64,
}

/// All handles.
#[derive(Default)]
pub(super) struct Handles {
    handles: HashMap<u64, Handle>,
    next: u64,
}

impl Handles {
    pub(super) fn add(&mut self, nodes: &mut Nodes, node: u64, file: OwnedFd) -> Result<u64, Errno> {
        nodes.opened(node)?;
        self.next += 1;
        self.handles.insert(self.next, Handle { file, node });
        Ok(self.next)
    }

    /// A handle, if it is one of this node.
    pub(super) fn get(&self, number: u64, node: u64) -> Result<BorrowedFd<'_>, Errno> {
        let handle = self.handles.get(&number).filter(|handle| handle.node == node);
        handle.map(|handle| handle.file.as_fd()).ok_or(Errno::BADF)
    }

    pub(super) fn remove(&mut self, nodes: &mut Nodes, number: u64, node: u64) -> Outcome {
        self.get(number, node)?;
        self.handles.remove(&number);
        nodes.closed(node);
        Ok(())
    }

    pub(super) fn clear(&mut self) {
        self.handles.clear();
        self.handles.shrink_to_fit();
    }
}
