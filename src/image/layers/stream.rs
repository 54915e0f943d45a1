//! A tar stream, entry by entry. The `tar` crate reads the headers; what belongs together is put together here, so that
//! extended headers are bounded and their values may have any bytes.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};

use tar::{EntryType, Header};

use super::sparse::{self, Map};
use super::{Error, pax};

const BLOCK: u64 = 512;
/// Bytes of an extended header: attributes of a file take 64 KiB each at most.
const EXTENDED_MAX: u64 = 1 << 20;
/// Bytes of a long name. Linux takes 4096.
const NAME_MAX: u64 = 16 << 10;
/// Extended headers in a row before one entry.
const HEADERS_MAX: usize = 16;

/// Extended attributes: names and values.
pub type Xattrs = Vec<(Vec<u8>, Vec<u8>)>;

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// Another name of a file that has come already.
    HardLink,
    /// A symbolic link.
    Symlink,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// A directory.
    Directory,
    /// A named pipe.
    Fifo,
}

/// What the archive says of a file.
#[derive(Clone, Debug)]
pub struct Entry {
    /// As the archive has it.
    pub name: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Permission bits, set-user-id and the like among them.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds and nanoseconds since 1970.
    pub mtime: (i64, u32),
    /// Target of a link.
    pub link: Vec<u8>,
    /// Numbers of a device.
    pub device: (u32, u32),
    /// Bytes of a file, holes included.
    pub size: u64,
    /// Extended attributes.
    pub xattrs: Xattrs,
    sparse: Option<Map>,
}

/// Reads a stream. Reading from it gives the data of the entry that came last.
pub struct TarReader<R> {
    source: R,
    /// Bytes of the entry that are not yet read, and the filling behind them.
    data: u64,
    padding: u64,
}

/// What extended headers say of the entry that follows.
#[derive(Default)]
struct Extended {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<(i64, u32)>,
    xattrs: Xattrs,
    sparse: sparse::Records,
}

impl<R: Read> TarReader<R> {
    /// At the start of a stream.
    pub fn new(source: R) -> Self {
        Self { source, data: 0, padding: 0 }
    }

    /// The stream.
    pub fn into_inner(self) -> R {
        self.source
    }

    /// The next entry; `None` at the end.
    pub fn next_entry(&mut self) -> Result<Option<Entry>, Error> {
        let mut extended = Extended::default();
        for count in 0..=HEADERS_MAX {
            self.skip()?;
            let Some(header) = self.header()? else {
                let dangling = Error::Header("it ends after an extended header");
                return if count == 0 { Ok(None) } else { Err(dangling) };
            };
            let size = or_zero(&header.as_old().size, header.entry_size())
                .map_err(|_| Error::Header("a size is not a number"))?;
            match header.entry_type() {
                EntryType::XHeader => {
                    let bytes = self.body(size, EXTENDED_MAX, "bytes in an extended header")?;
                    extended.take(&bytes)?;
                }
                EntryType::GNULongName => extended.path = Some(self.long(size)?),
                EntryType::GNULongLink => extended.link = Some(self.long(size)?),
                // Comments of git; whoever writes images puts nothing else there.
                EntryType::XGlobalHeader => {
                    self.body(size, EXTENDED_MAX, "bytes in an extended header")?;
                }
                _ => return self.entry(&header, size, extended).map(Some),
            }
        }
        Err(Error::Header("too many extended headers in a row"))
    }

    /// Writes the data of the entry that came last into an empty file.
    pub fn write_file(&mut self, entry: &Entry, file: &mut File) -> io::Result<()> {
        let Some(map) = &entry.sparse else {
            return self.copy(entry.size, file);
        };
        for segment in &map.segments {
            file.seek(SeekFrom::Start(segment.offset))?;
            self.copy(segment.length, file)?;
        }
        file.set_len(map.size)
    }

    fn copy(&mut self, count: u64, to: &mut impl Write) -> io::Result<()> {
        let copied = io::copy(&mut self.take(count), to)?;
        if copied == count { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }

    fn header(&mut self) -> Result<Option<Header>, Error> {
        let mut header = Header::new_old();
        let bytes = header.as_mut_bytes();
        let mut filled = 0;
        while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match self.source.read(rest) {
                Ok(0) if filled == 0 => return Ok(None),
                Ok(0) => return Err(Error::Read(io::ErrorKind::UnexpectedEof.into())),
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::Read(error)),
            }
        }
        if bytes.iter().all(|b| *b == 0) {
            return Ok(None);
        }
        let sum = |bytes: &[u8]| bytes.iter().map(|b| u32::from(*b)).sum::<u32>();
        let (before, field, after) = (bytes.get(..148), 8 * u32::from(b' '), bytes.get(156..));
        let expected = sum(before.unwrap_or_default()) + field + sum(after.unwrap_or_default());
        match header.cksum() {
            Ok(checksum) if checksum == expected => Ok(Some(header)),
            _ => Err(Error::Header("the checksum is wrong: this is no tar archive, or a damaged one")),
        }
    }

    fn expect_data(&mut self, size: u64) -> Result<(), Error> {
        self.data = size;
        self.padding =
            size.checked_next_multiple_of(BLOCK).ok_or(Error::Header("a size is too large"))? - size;
        Ok(())
    }

    fn body(&mut self, size: u64, limit: u64, what: &'static str) -> Result<Vec<u8>, Error> {
        if size > limit {
            return Err(Error::Limit { what, limit });
        }
        self.expect_data(size)?;
        let mut bytes = vec![];
        self.read_to_end(&mut bytes).map_err(Error::Read)?;
        Ok(bytes)
    }

    fn long(&mut self, size: u64) -> Result<Vec<u8>, Error> {
        let mut name = self.body(size, NAME_MAX, "bytes in a name")?;
        if let Some(end) = name.iter().position(|b| *b == 0) {
            name.truncate(end);
        }
        Ok(name)
    }

    fn skip(&mut self) -> Result<(), Error> {
        let rest = self.data.saturating_add(self.padding);
        (self.data, self.padding) = (0, 0);
        let skipped = io::copy(&mut (&mut self.source).take(rest), &mut io::sink()).map_err(Error::Read)?;
        if skipped == rest { Ok(()) } else { Err(Error::Read(io::ErrorKind::UnexpectedEof.into())) }
    }

    fn entry(&mut self, header: &Header, size: u64, mut extended: Extended) -> Result<Entry, Error> {
        let name =
            extended.sparse.name.take().or(extended.path).unwrap_or_else(|| header.path_bytes().into_owned());
        let mut kind = match header.entry_type() {
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => Kind::File,
            EntryType::Link => Kind::HardLink,
            EntryType::Symlink => Kind::Symlink,
            EntryType::Char => Kind::CharDevice,
            EntryType::Block => Kind::BlockDevice,
            EntryType::Directory => Kind::Directory,
            EntryType::Fifo => Kind::Fifo,
            _ => return Err(Error::entry(&name, "nobody knows what this type of entry is")),
        };
        let has_data = kind == Kind::File;
        // How archives of the seventies mark a directory.
        if header.as_old().linkflag == [0] && name.ends_with(b"/") {
            kind = Kind::Directory;
        }
        let wrong = |why| Error::entry(&name, why);
        if name.contains(&0) {
            return Err(wrong("its name has a zero byte"));
        }
        // As Go's reader has it, with which nearly all images are made: other types have no data, whatever size they say.
        let mut stored = if has_data { extended.size.unwrap_or(size) } else { 0 };
        let sparse = match header.as_gnu() {
            Some(gnu) if header.entry_type() == EntryType::GNUSparse => {
                Some(sparse::old_gnu(gnu, &mut self.source, stored)?)
            }
            _ if has_data => extended.sparse.map(&mut self.source, &mut stored)?,
            _ => None,
        };
        self.expect_data(stored)?;
        let owner = |extended: Option<u64>, header: io::Result<u64>| {
            let number = extended.map_or(header, Ok).ok().and_then(|number| u32::try_from(number).ok());
            // All ones means "leave it" to the kernel.
            number.filter(|number| *number != u32::MAX).ok_or_else(|| wrong("its owner is not a number"))
        };
        let link = extended.link.or_else(|| header.link_name_bytes().map(|link| link.into_owned()));
        let link = link.unwrap_or_default();
        if link.contains(&0) {
            return Err(wrong("its target has a zero byte"));
        }
        let device = |number: io::Result<Option<u32>>| {
            number.ok().flatten().ok_or_else(|| wrong("its device numbers are not numbers"))
        };
        let device = match kind {
            Kind::CharDevice | Kind::BlockDevice => {
                (device(header.device_major())?, device(header.device_minor())?)
            }
            _ => (0, 0),
        };
        Ok(Entry {
            kind,
            mode: or_zero(&header.as_old().mode, header.mode())
                .map_err(|_| wrong("its permissions are not a number"))?
                & 0o7777,
            uid: owner(extended.uid, or_zero(&header.as_old().uid, header.uid()))?,
            gid: owner(extended.gid, or_zero(&header.as_old().gid, header.gid()))?,
            mtime: extended.mtime.unwrap_or_else(|| {
                let seconds = header.mtime().ok().and_then(|seconds| i64::try_from(seconds).ok());
                (seconds.unwrap_or(0), 0)
            }),
            link,
            device,
            size: sparse.as_ref().map_or(stored, |map| map.size),
            xattrs: extended.xattrs,
            sparse,
            name,
        })
    }
}

/// A number of the header; a field in which nothing is written means zero, as in Go's reader.
fn or_zero<T: Default>(field: &[u8], number: io::Result<T>) -> io::Result<T> {
    if field.iter().all(|byte| matches!(byte, 0 | b' ')) { Ok(T::default()) } else { number }
}

impl Extended {
    fn take(&mut self, bytes: &[u8]) -> Result<(), Error> {
        const BAD: Error = Error::Header("a value of an extended header is malformed");
        for (key, value) in pax::records(bytes)? {
            // An empty value takes back what was said before.
            let number = || if value.is_empty() { Ok(None) } else { pax::number(value).map(Some).ok_or(BAD) };
            match key {
                b"path" => self.path = Some(value.to_vec()).filter(|path| !path.is_empty()),
                b"linkpath" => self.link = Some(value.to_vec()).filter(|path| !path.is_empty()),
                b"size" => self.size = number()?,
                b"uid" => self.uid = number()?,
                b"gid" => self.gid = number()?,
                b"mtime" => {
                    let time = pax::time(value);
                    self.mtime = if value.is_empty() { None } else { Some(time.ok_or(BAD)?) };
                }
                _ => {
                    if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                        if name.is_empty() || name.contains(&0) {
                            return Err(BAD);
                        }
                        self.xattrs.push((name.to_vec(), value.to_vec()));
                    } else if let Some(key) = key.strip_prefix(b"GNU.sparse.") {
                        self.sparse.take(key, value)?;
                    }
                }
            }
        }
        Ok(())
    }
}

impl<R: Read> Read for TarReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.data).unwrap_or(usize::MAX).min(buffer.len());
        let Some(buffer) = buffer.get_mut(..most).filter(|buffer| !buffer.is_empty()) else { return Ok(0) };
        match self.source.read(buffer)? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            count => {
                self.data = self.data.saturating_sub(count as u64);
                Ok(count)
            }
        }
    }
}
