//! Disks by their serial numbers.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rvmm::guest::protocol::Failure;
use rvmm::guest::spec::Volume;

use crate::system::reread_partitions;

/// How long a disk's device file may take to come: the kernel reads partition tables on its own time.
const PATIENCE: Duration = Duration::from_secs(10);
/// After that it is told to look again.
const REREAD_AFTER: Duration = Duration::from_secs(1);
const PAUSE: Duration = Duration::from_millis(5);
/// The same for a disk that was empty: its driver hears of its contents within moments.
const SHORT_PAUSE: Duration = Duration::from_micros(500);

/// The disks that are known.
#[derive(Default)]
pub struct Disks {
    /// By serial number; a disk has one as long as it is there.
    known: BTreeMap<String, Disk>,
}

struct Disk {
    name: String,
    /// It had no size when it was last looked at: a place for a disk that the host puts in later.
    is_empty: bool,
}

impl Disks {
    /// The device file of a file system's disk or partition.
    pub fn find(&mut self, volume: &Volume) -> Result<PathBuf, Failure> {
        let missing = || Failure::NoDisk { disk: volume.disk.clone(), partition: volume.partition };
        let end = Instant::now() + PATIENCE;
        let reread_at = Instant::now() + REREAD_AFTER;
        let mut told = false;
        loop {
            let name = self.name(&volume.disk);
            let waits = name.as_deref().is_some_and(|name| self.is_empty(&volume.disk, name));
            if let Some(name) = name.as_ref().filter(|_| !waits) {
                let path = Path::new("/dev").join(partition_name(name, volume.partition));
                if path.exists() {
                    return Ok(path);
                }
            }
            let now = Instant::now();
            // A disk without a partition table has no partitions to wait for, but nothing says so.
            if now > end || name.is_none() && told {
                return Err(missing());
            }
            if now > reread_at && !told {
                told = true;
                if let Some(disk) = name.and_then(|name| fs::File::open(Path::new("/dev").join(name)).ok()) {
                    // A disk that is in use keeps the table that it has.
                    let _ = reread_partitions(disk);
                }
            }
            sleep(if waits { SHORT_PAUSE } else { PAUSE });
        }
    }

    /// The number of a disk, as `MAJOR:MINOR`.
    pub fn number(&mut self, disk: &str) -> Result<String, Failure> {
        let missing = || Failure::NoDisk { disk: disk.to_owned(), partition: 0 };
        let name = self.name(disk).ok_or_else(missing)?;
        let number = fs::read_to_string(format!("/sys/block/{name}/dev")).map_err(|_| missing())?;
        Ok(number.trim().to_owned())
    }

    /// Whether a disk still has no contents. The kernel does not look for partitions in those that come later.
    fn is_empty(&mut self, serial: &str, name: &str) -> bool {
        let Some(disk) = self.known.get_mut(serial).filter(|disk| disk.is_empty) else { return false };
        disk.is_empty = size_is_0(name);
        if !disk.is_empty
            && let Ok(file) = fs::File::open(Path::new("/dev").join(name))
        {
            // One without a table has none.
            let _ = reread_partitions(file);
        }
        disk.is_empty
    }

    fn name(&mut self, serial: &str) -> Option<String> {
        if !self.known.contains_key(serial) {
            self.scan();
        }
        self.known.get(serial).map(|disk| disk.name.clone())
    }

    /// Looks at all disks that are not known yet.
    pub fn scan(&mut self) {
        for entry in fs::read_dir("/sys/block").into_iter().flatten().flatten() {
            let Ok(name) = entry.file_name().into_string() else { continue };
            if !name.starts_with("vd") || self.known.values().any(|known| known.name == name) {
                continue;
            }
            // Each look is a request to the disk.
            if let Ok(serial) = fs::read_to_string(entry.path().join("serial")) {
                let is_empty = size_is_0(&name);
                let serial = serial.trim_end_matches(['\n', '\0']).to_owned();
                self.known.insert(serial, Disk { name, is_empty });
            }
        }
    }
}

fn size_is_0(name: &str) -> bool {
    fs::read_to_string(format!("/sys/block/{name}/size")).is_ok_and(|sectors| sectors.trim() == "0")
}

/// As the kernel names partitions.
fn partition_name(disk: &str, partition: u32) -> String {
    match partition {
        0 => disk.to_owned(),
        number if disk.ends_with(|last: char| last.is_ascii_digit()) => format!("{disk}p{number}"),
        number => format!("{disk}{number}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partitions_are_named_as_the_kernel_does() {
        assert_eq!(partition_name("vda", 0), "vda");
        assert_eq!(partition_name("vda", 12), "vda12");
        assert_eq!(partition_name("nvme0n1", 2), "nvme0n1p2");
    }
}
