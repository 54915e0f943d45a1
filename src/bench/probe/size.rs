//! `size`: what the image and an instance take on disk, and what is made of the image. docs/probes/size.md

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::{Context, Error, Found, Probe};
use crate::bench::executor::Executor;
use crate::bench::results::{Isolation, Value};

/// Bytes on disk.
pub struct Size;

impl Probe for Size {
    fn names(&self) -> Vec<&'static str> {
        vec!["size"]
    }

    fn is_exact(&self) -> bool {
        true
    }

    fn sample(
        &mut self,
        context: &Context,
        executor: &dyn Executor,
    ) -> Result<Vec<(&'static str, Found)>, Error> {
        let mut found = vec![];
        let bytes = |metric: &str, bytes: Option<u64>, why: &str| match bytes {
            Some(bytes) => Found::number(metric, bytes as f64),
            None => Found::failed(metric, why),
        };
        let kernel = match executor.isolation() {
            Isolation::None | Isolation::Container => Some(0),
            Isolation::Microvm if executor.name().starts_with("rvmm-") => rvmm_kernel(context),
            Isolation::Microvm | Isolation::FullVm => executor.kernel_bytes(),
        };
        found.push(bytes("kernel", kernel, "its kernel is not known"));
        if executor.isolation() == Isolation::FullVm {
            let disk = context.guest.join("full-vm/disk.ext4");
            found.push(bytes("image", allocated(&disk), "there is no disk"));
            found
                .push(Found::text("format", "a raw disk with a whole Debian, made by scripts/build-full-vm"));
        } else if executor.name() == "qemu-microvm" {
            found.push(Found::failed("image", "it starts from an initrd of its own"));
            found.push(Found::text("format", "an initrd, made for it"));
        } else {
            found.push(bytes("image", context.source.bytes.0, "rvmm does not say the image's size"));
            found.push(bytes("unpacked", context.source.bytes.1, "rvmm does not say the image's size"));
            found.push(Found::text("format", "the OCI image, as it is"));
        }
        // What a running instance adds.
        let mut instance = executor.start(&context.spawner, &context.helper(["idle"]))?;
        let measured = match executor.wait_for_line(&context.spawner, &mut instance, super::MARKER) {
            Ok(_) => Ok(executor.instance_bytes(&context.spawner, &instance)),
            Err(error) => Err(error),
        };
        executor.remove(&context.spawner, instance)?;
        let instance = measured?;
        // Shared is what an instance does not have again.
        let whole = found.iter().find(|found| found.metric == "image");
        if let (Some(own), Some(Found { value: Value::Number(whole), .. })) = (instance, whole) {
            let shared = if (own as f64) < whole / 2.0 { "yes" } else { "no" };
            let text =
                format!("{shared}: an instance adds {} KiB to {} KiB", own >> 10, (*whole as u64) >> 10);
            found.push(Found::text("shared", text));
        }
        found.push(bytes("instance", instance, "it does not say what an instance takes"));
        Ok(found.into_iter().map(|found| ("size", found)).collect())
    }
}

/// Bytes of the kernel and the agent that rvmm boots.
fn rvmm_kernel(context: &Context) -> Option<u64> {
    let kernel = if Path::new("/sys/module/kvm_pvm").exists() { "vmlinux-pvm" } else { "vmlinux" };
    let bytes = |name: &str| fs::metadata(context.guest.join(name)).ok().map(|metadata| metadata.len());
    Some(bytes(kernel)? + bytes("agent.cpio")?)
}

/// Bytes that a file, or a directory and all in it, takes on disk. What has several names counts once.
pub fn allocated(path: &Path) -> Option<u64> {
    fn walk(path: &Path, device: u64, seen: &mut std::collections::HashSet<u64>) -> u64 {
        let Ok(metadata) = fs::symlink_metadata(path) else { return 0 };
        if metadata.dev() != device || !seen.insert(metadata.ino()) {
            return 0;
        }
        let mut bytes = metadata.blocks() * 512;
        if metadata.is_dir() {
            for entry in fs::read_dir(path).into_iter().flatten().flatten() {
                bytes += walk(&entry.path(), device, seen);
            }
        }
        bytes
    }
    // Not into what is mounted below.
    let device = fs::symlink_metadata(path).ok()?.dev();
    Some(walk(path, device, &mut std::collections::HashSet::new()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directory_has_the_sum_of_its_files() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("below")).unwrap();
        fs::write(directory.path().join("below/file"), vec![1; 100_000]).unwrap();
        fs::hard_link(directory.path().join("below/file"), directory.path().join("again")).unwrap();
        let bytes = allocated(directory.path()).unwrap();
        assert!((100_000..130_000).contains(&bytes), "{bytes}");
        assert_eq!(allocated(&directory.path().join("nothing")), None);
    }
}
