//! A GUID partition table (UEFI 2.10 §5): bytes before and behind the partitions of a disk.

use sha2::{Digest, Sha256};

use super::SECTOR_BYTES;

/// Partitions start and end at multiples of this.
pub(super) const ALIGN_BYTES: u64 = 4096;
/// UTF-16 units of a partition's name.
pub(super) const NAME_UNITS: usize = 36;

const ENTRY_BYTES: usize = 128;
/// Entries fill whole blocks of [`ALIGN_BYTES`]; the specification wants room for 128 at least.
const ENTRIES_MIN: usize = 128;
const ENTRIES_STEP: usize = ALIGN_BYTES as usize / ENTRY_BYTES;
const HEADER_BYTES: u32 = 92;
/// Linux file system data, `0FC63DAF-8483-4772-8E79-3D69D8477DE4`, as it lies on a disk.
const LINUX_DATA: [u8; 16] =
    [0xaf, 0x3d, 0xc6, 0x0f, 0x83, 0x84, 0x72, 0x47, 0x8e, 0x79, 0x3d, 0x69, 0xd8, 0x47, 0x7d, 0xe4];
/// Attribute of a partition that must not be written.
const READ_ONLY: u64 = 1 << 60;

/// A partition, in bytes from the disk's start.
pub(super) struct Partition<'a> {
    pub(super) name: &'a str,
    pub(super) start: u64,
    pub(super) len: u64,
}

/// Bytes in front of the first partition, and behind the last, of a disk with so many partitions.
pub(super) fn table_bytes(partitions: usize) -> (u64, u64) {
    let entries = entries_bytes(partitions) as u64;
    let front = (2 * SECTOR_BYTES + entries).next_multiple_of(ALIGN_BYTES);
    (front, entries + ALIGN_BYTES)
}

/// The table of a disk that ends `table_bytes().1` behind its last partition: what lies in front, and behind.
pub(super) fn table(partitions: &[Partition<'_>], disk_bytes: u64) -> (Vec<u8>, Vec<u8>) {
    let (front_len, back_len) = table_bytes(partitions.len());
    let mut front = vec![0; front_len as usize];
    let mut back = vec![0; back_len as usize];
    let (disk_id, entries) = entries(partitions);
    let sector = SECTOR_BYTES as usize;
    let last_sector = disk_bytes / SECTOR_BYTES - 1;
    let entries_sectors = (entries.len() / sector) as u64;
    let place = |to: &mut [u8], at: usize, bytes: &[u8]| {
        if let Some(range) = to.get_mut(at..at + bytes.len()) {
            range.copy_from_slice(bytes);
        }
    };
    let header = |own, other, entries_at| Header {
        own,
        other,
        entries_at,
        first_usable: front_len / SECTOR_BYTES,
        last_usable: last_sector - entries_sectors - 1,
        disk_id,
        entries: &entries,
    };
    place(&mut front, 0, &protective_mbr(last_sector));
    place(&mut front, sector, &header(1, last_sector, 2).bytes());
    place(&mut front, 2 * sector, &entries);
    let back_entries = back.len() - sector - entries.len();
    place(&mut back, back_entries, &entries);
    let backup = header(last_sector, 1, last_sector - entries_sectors).bytes();
    place(&mut back, back_entries + entries.len(), &backup);
    (front, back)
}

fn entries_bytes(partitions: usize) -> usize {
    partitions.max(ENTRIES_MIN).next_multiple_of(ENTRIES_STEP) * ENTRY_BYTES
}

/// The disk's GUID, and the array of entries (§5.3.3).
fn entries(partitions: &[Partition<'_>]) -> ([u8; 16], Vec<u8>) {
    let mut disk = Sha256::new();
    let mut entries = Vec::with_capacity(entries_bytes(partitions.len()));
    for (index, partition) in partitions.iter().enumerate() {
        let first = partition.start / SECTOR_BYTES;
        let last = (partition.start + partition.len) / SECTOR_BYTES - 1;
        let id = Sha256::new()
            .chain_update(partition.name)
            .chain_update([0])
            .chain_update((index as u64).to_le_bytes())
            .chain_update(partition.len.to_le_bytes())
            .finalize();
        disk.update(id);
        entries.extend(LINUX_DATA);
        entries.extend(guid(&id));
        entries.extend(first.to_le_bytes());
        entries.extend(last.to_le_bytes());
        entries.extend(READ_ONLY.to_le_bytes());
        let units = partition.name.encode_utf16().chain(std::iter::repeat(0)).take(NAME_UNITS);
        entries.extend(units.flat_map(u16::to_le_bytes));
    }
    entries.resize(entries_bytes(partitions.len()), 0);
    (guid(&disk.finalize()), entries)
}

/// A GUID of version 8, RFC 9562 §5.8, from a hash, so that the same parts give the same disk.
fn guid(hash: &[u8]) -> [u8; 16] {
    let mut guid = [0; 16];
    for (to, from) in guid.iter_mut().zip(hash) {
        *to = *from;
    }
    // The first three fields are little-endian on a disk, so the version is in the eighth byte.
    guid[7] = guid[7] & 0x0f | 0x80;
    guid[8] = guid[8] & 0x3f | 0x80;
    guid
}

/// One partition over the whole disk, for programs that do not know of GPT (§5.2.3).
fn protective_mbr(last_sector: u64) -> Vec<u8> {
    let mut mbr = vec![0; 446];
    // Not bootable; from cylinder 0, head 0, sector 2 on; type: GPT; to an end that cylinders cannot express.
    mbr.extend([0, 0, 2, 0, 0xee, 0xff, 0xff, 0xff]);
    mbr.extend(1u32.to_le_bytes());
    mbr.extend(u32::try_from(last_sector).unwrap_or(u32::MAX).to_le_bytes());
    mbr.resize(510, 0);
    mbr.extend([0x55, 0xaa]);
    mbr
}

/// A header, §5.3.2; places are in sectors.
struct Header<'a> {
    own: u64,
    other: u64,
    entries_at: u64,
    first_usable: u64,
    last_usable: u64,
    disk_id: [u8; 16],
    entries: &'a [u8],
}

impl Header<'_> {
    fn bytes(&self) -> Vec<u8> {
        let with_checksum = |checksum: u32| {
            let mut bytes = Vec::with_capacity(HEADER_BYTES as usize);
            bytes.extend(b"EFI PART");
            bytes.extend(0x0001_0000u32.to_le_bytes()); // revision 1.0
            bytes.extend(HEADER_BYTES.to_le_bytes());
            bytes.extend(checksum.to_le_bytes());
            bytes.extend([0; 4]);
            bytes.extend(self.own.to_le_bytes());
            bytes.extend(self.other.to_le_bytes());
            bytes.extend(self.first_usable.to_le_bytes());
            bytes.extend(self.last_usable.to_le_bytes());
            bytes.extend(self.disk_id);
            bytes.extend(self.entries_at.to_le_bytes());
            bytes.extend(((self.entries.len() / ENTRY_BYTES) as u32).to_le_bytes());
            bytes.extend((ENTRY_BYTES as u32).to_le_bytes());
            bytes.extend(crc32fast::hash(self.entries).to_le_bytes());
            bytes
        };
        // The checksum is that of the header with 0 in its place.
        with_checksum(crc32fast::hash(&with_checksum(0)))
    }
}
