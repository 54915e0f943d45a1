//! A guest's side of FUSE, for tests and fuzz targets. Nothing of the monitor uses it.

use crate::fuse::{self, opcode};

/// A guest that asks and gets answers, or error numbers.
pub struct Client<T> {
    /// Takes a request and returns the reply.
    pub exchange: T,
    /// Who asks.
    pub user: (u32, u32),
    unique: u64,
}

/// What a guest is told of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The number to name it by.
    pub node: u64,
    /// Inode number.
    pub ino: u64,
    /// Size in bytes.
    pub size: u64,
    /// Type and permissions.
    pub mode: u32,
    /// Number of names.
    pub links: u32,
    /// Owner and group.
    pub owner: (u32, u32),
}

/// A request with its header.
pub fn request(opcode: u32, unique: u64, node: u64, user: (u32, u32), body: &[u8]) -> Vec<u8> {
    let mut request = vec![];
    request.extend(((fuse::IN_HEADER_BYTES + body.len()) as u32).to_le_bytes());
    request.extend(opcode.to_le_bytes());
    request.extend(unique.to_le_bytes());
    request.extend(node.to_le_bytes());
    request.extend(user.0.to_le_bytes());
    request.extend(user.1.to_le_bytes());
    request.extend([0; 8]);
    request.extend(body);
    request
}

/// Numbers of 32 bits as they stand in a message.
pub fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn number(bytes: &[u8], at: usize, len: usize) -> u64 {
    let mut number = [0; 8];
    number[..len].copy_from_slice(&bytes[at..at + len]);
    u64::from_le_bytes(number)
}

fn attributes(bytes: &[u8], node: u64) -> Entry {
    let word = |at| number(bytes, at, 4) as u32;
    Entry {
        node,
        ino: number(bytes, 0, 8),
        size: number(bytes, 8, 8),
        mode: word(60),
        links: word(64),
        owner: (word(68), word(72)),
    }
}

/// The entry at the start of an answer.
pub fn entry(bytes: &[u8]) -> Entry {
    attributes(&bytes[40..], number(bytes, 0, 8))
}

/// A name, or two, each with its NUL.
pub fn names(names: &[&str]) -> Vec<u8> {
    names.iter().flat_map(|name| [name.as_bytes(), b"\0"].concat()).collect()
}

impl<T: FnMut(&[u8]) -> Vec<u8>> Client<T> {
    /// A guest's root user, with nothing negotiated.
    pub fn new(exchange: T) -> Self {
        Self { exchange, user: (0, 0), unique: 0 }
    }

    /// Asks, and returns the answer's body or the error number.
    pub fn ask(&mut self, opcode: u32, node: u64, body: &[u8]) -> Result<Vec<u8>, i32> {
        self.unique += 2;
        let reply = (self.exchange)(&request(opcode, self.unique, node, self.user, body));
        assert_eq!(number(&reply, 0, 4), reply.len() as u64, "the length of the reply");
        assert_eq!(number(&reply, 8, 8), self.unique, "the number of the reply");
        match number(&reply, 4, 4) as u32 as i32 {
            0 => Ok(reply[fuse::OUT_HEADER_BYTES..].to_vec()),
            error => Err(-error),
        }
    }

    /// Begins a session as Linux does.
    pub fn init(&mut self) -> Result<Vec<u8>, i32> {
        let mut body = words(&[7, 38, 1 << 20, u32::MAX]);
        body.extend([0; 48]);
        self.ask(opcode::INIT, 0, &body)
    }

    /// Looks a name up.
    pub fn look_up(&mut self, parent: u64, name: &str) -> Result<Entry, i32> {
        self.ask(opcode::LOOKUP, parent, &names(&[name])).map(|body| entry(&body))
    }

    /// Looks a path up from the root.
    pub fn walk(&mut self, path: &str) -> Result<Entry, i32> {
        let mut found = Err(libc::ENOENT);
        let mut node = fuse::ROOT_NODE;
        for name in path.split('/') {
            found = self.look_up(node, name);
            node = found?.node;
        }
        found
    }

    /// Attributes of a node.
    pub fn attributes(&mut self, node: u64) -> Result<Entry, i32> {
        self.ask(opcode::GETATTR, node, &[0; 16]).map(|body| attributes(&body[16..], node))
    }

    /// Opens a file; returns the handle.
    pub fn open(&mut self, node: u64, flags: i32) -> Result<u64, i32> {
        self.ask(opcode::OPEN, node, &words(&[flags as u32, 0])).map(|body| number(&body, 0, 8))
    }

    /// Opens a directory; returns the handle.
    pub fn open_directory(&mut self, node: u64) -> Result<u64, i32> {
        self.ask(opcode::OPENDIR, node, &words(&[0, 0])).map(|body| number(&body, 0, 8))
    }

    /// Makes a file and opens it; returns entry and handle.
    pub fn create(&mut self, parent: u64, name: &str, flags: i32, mode: u32) -> Result<(Entry, u64), i32> {
        let body = [words(&[flags as u32, mode, 0, 0]), names(&[name])].concat();
        let body = self.ask(opcode::CREATE, parent, &body)?;
        Ok((entry(&body), number(&body, 128, 8)))
    }

    /// Makes a directory.
    pub fn mkdir(&mut self, parent: u64, name: &str) -> Result<Entry, i32> {
        let body = [words(&[0o755, 0]), names(&[name])].concat();
        self.ask(opcode::MKDIR, parent, &body).map(|body| entry(&body))
    }

    /// Makes a file of any type.
    pub fn mknod(&mut self, parent: u64, name: &str, mode: u32, device: u32) -> Result<Entry, i32> {
        let body = [words(&[mode, device, 0, 0]), names(&[name])].concat();
        self.ask(opcode::MKNOD, parent, &body).map(|body| entry(&body))
    }

    /// Makes a symbolic link.
    pub fn symlink(&mut self, parent: u64, name: &str, target: &str) -> Result<Entry, i32> {
        self.ask(opcode::SYMLINK, parent, &names(&[name, target])).map(|body| entry(&body))
    }

    /// Gives a file another name.
    pub fn link(&mut self, node: u64, parent: u64, name: &str) -> Result<Entry, i32> {
        let body = [&node.to_le_bytes()[..], &names(&[name])].concat();
        self.ask(opcode::LINK, parent, &body).map(|body| entry(&body))
    }

    /// Renames.
    pub fn rename(&mut self, parent: u64, name: &str, to: u64, new: &str, flags: u32) -> Result<(), i32> {
        let body = [&to.to_le_bytes()[..], &words(&[flags, 0]), &names(&[name, new])].concat();
        self.ask(opcode::RENAME2, parent, &body).map(|_| ())
    }

    /// Deletes a name.
    pub fn unlink(&mut self, parent: u64, name: &str) -> Result<(), i32> {
        self.ask(opcode::UNLINK, parent, &names(&[name])).map(|_| ())
    }

    /// Reads from an open file.
    pub fn read(&mut self, node: u64, handle: u64, offset: u64, size: u32) -> Result<Vec<u8>, i32> {
        let mut body = [handle.to_le_bytes(), offset.to_le_bytes()].concat();
        body.extend(words(&[size, 0, 0, 0, 0, 0]));
        self.ask(opcode::READ, node, &body)
    }

    /// Writes to an open file; returns the number of bytes.
    pub fn write(&mut self, node: u64, handle: u64, offset: u64, data: &[u8]) -> Result<u32, i32> {
        let mut body = [handle.to_le_bytes(), offset.to_le_bytes()].concat();
        body.extend(words(&[data.len() as u32, 0, 0, 0, 0, 0]));
        body.extend(data);
        self.ask(opcode::WRITE, node, &body).map(|body| number(&body, 0, 4) as u32)
    }

    /// Sets attributes: the bits of `setattr` in `valid` say which of the rest count.
    pub fn set(
        &mut self,
        node: u64,
        valid: u32,
        size: u64,
        mode: u32,
        owner: (u32, u32),
    ) -> Result<Entry, i32> {
        let mut body = words(&[valid, 0, 0, 0]);
        body.extend(size.to_le_bytes());
        body.extend([0; 8 + 24 + 12]);
        body.extend(words(&[mode, 0, owner.0, owner.1, 0]));
        self.ask(opcode::SETATTR, node, &body).map(|body| attributes(&body[16..], node))
    }

    /// Sets an extended attribute.
    pub fn set_xattr(&mut self, node: u64, name: &str, value: &[u8]) -> Result<(), i32> {
        let body = [&words(&[value.len() as u32, 0])[..], &names(&[name]), value].concat();
        self.ask(opcode::SETXATTR, node, &body).map(|_| ())
    }

    /// Gets an extended attribute.
    pub fn xattr(&mut self, node: u64, name: &str, size: u32) -> Result<Vec<u8>, i32> {
        self.ask(opcode::GETXATTR, node, &[words(&[size, 0]), names(&[name])].concat())
    }

    /// Lists a directory: names and inode numbers, in the order in which they come.
    pub fn list(&mut self, node: u64, size: u32) -> Result<Vec<(String, u64)>, i32> {
        self.list_in_pieces(node, size, |_| ())
    }

    /// Lists a directory as [`Client::list`] does, and hands the names of each reply to `piece`.
    pub fn list_in_pieces(
        &mut self,
        node: u64,
        size: u32,
        mut piece: impl FnMut(&[(String, u64)]),
    ) -> Result<Vec<(String, u64)>, i32> {
        let handle = self.open_directory(node)?;
        let (mut found, mut offset) = (vec![], 0u64);
        loop {
            let mut body = [handle.to_le_bytes(), offset.to_le_bytes()].concat();
            body.extend(words(&[size, 0, 0, 0, 0, 0]));
            let mut rest = &self.ask(opcode::READDIRPLUS, node, &body)?[..];
            if rest.is_empty() {
                break;
            }
            let before = found.len();
            while !rest.is_empty() {
                let dirent = &rest[128..];
                let len = number(dirent, 16, 4) as usize;
                offset = number(dirent, 8, 8);
                let name = String::from_utf8_lossy(&dirent[24..24 + len]).into_owned();
                found.push((name, number(dirent, 0, 8)));
                rest = &rest[(128 + 24 + len).next_multiple_of(8)..];
            }
            piece(&found[before..]);
        }
        let mut body = handle.to_le_bytes().to_vec();
        body.extend([0; 16]);
        self.ask(opcode::RELEASEDIR, node, &body)?;
        Ok(found)
    }
}
