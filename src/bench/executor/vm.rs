//! Virtual machines without an engine: QEMU's microvm machine with rvmm's guest kernel, Firecracker, and whole Debian systems.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::Signal;

use super::plain::end;
use super::{Error, Executor, Image, Instance, Job, Network, Process, Role, find, line_of_running};
use crate::bench::process::{Invocation, Spawner};
use crate::bench::results::Isolation;

/// Which machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// QEMU's microvm, rvmm's kernel, a busybox initrd.
    QemuMicrovm,
    /// QEMU's q35, Debian's kernel, a Debian with systemd.
    FullQemu,
    /// The same system in rvmm.
    FullRvmm,
}

/// Memory of a microVM: what rvmm gives one without being told.
const MICROVM_MIB: u32 = 512;

/// Memory of a whole system.
const FULL_MIB: u32 = 1024;

/// A virtual machine.
pub struct Vm {
    kind: Kind,
    rvmm: PathBuf,
    /// Where guests' kernels and disks are.
    guest: PathBuf,
    /// For this run's own files.
    directory: PathBuf,
    kvm: String,
    initrd: PathBuf,
    cmdline: String,
}

impl Vm {
    /// `guest` holds kernels and disks, as the scripts make them.
    pub fn new(kind: Kind, rvmm: &Path, guest: &Path, directory: &Path, kvm: &str) -> Vm {
        Vm {
            kind,
            rvmm: rvmm.into(),
            guest: guest.into(),
            directory: directory.join("vm"),
            kvm: kvm.into(),
            initrd: PathBuf::new(),
            cmdline: String::new(),
        }
    }

    fn kernel(&self) -> PathBuf {
        match (self.kind, self.kvm.as_str()) {
            (Kind::QemuMicrovm, "pvm") => self.guest.join("vmlinux-pvm"),
            (Kind::QemuMicrovm, _) => self.guest.join("vmlinux"),
            _ => self.guest.join("full-vm/vmlinuz"),
        }
    }

    fn disk(&self) -> PathBuf {
        self.guest.join("full-vm/disk.ext4")
    }

    fn qemu() -> PathBuf {
        find("qemu-system-x86_64").unwrap_or_else(|| "qemu-system-x86_64".into())
    }

    /// What rvmm adds to a guest's command line on this kind of KVM: the peers' guests get the same.
    fn additions(&self, spawner: &Spawner) -> Result<String, Error> {
        const MARKER: &str = "added to the guest's command line: ";
        let words = ["--log-level", "info", "--memory", "64M", "--kernel"];
        let ask = Invocation::new([self.rvmm.to_string_lossy()])
            .and(words)
            .and([self.kernel().to_string_lossy().into_owned()]);
        let mut running =
            spawner.spawn(&ask).map_err(super::doing("ask rvmm for the guest's command line"))?;
        let line = running.line(Duration::from_secs(30), |line| {
            line.split_once(MARKER).map(|(_, additions)| additions.to_owned())
        });
        let (line, _) = line.map_err(super::doing("ask rvmm for the guest's command line"))?;
        let own = ["console=", "reboot=", "panic=", "root=", "virtio_mmio.device="];
        let others = line.split_whitespace().filter(|word| !own.iter().any(|own| word.starts_with(own)));
        Ok(others.collect::<Vec<_>>().join(" "))
    }

    /// The kernel's parameter that says what to run. Its values have no way to quote a quotation mark.
    fn exec_parameter(&self, job: &Job) -> Result<String, Error> {
        let mut line = job.argv.join(" ");
        // Its small system sets up no network by itself; QEMU's own network has this address for the guest.
        if self.kind == Kind::QemuMicrovm && job.network != Network::None && !line.is_empty() {
            line = format!("ifconfig eth0 10.0.2.15 up; exec {line}");
        }
        if line.is_empty() || line.contains('"') || line.len() > 1000 {
            return Err(Error::Unable(
                "a virtual machine without an agent runs plain command lines only".into(),
            ));
        }
        Ok(format!("rvmm.exec=\"{line}\""))
    }

    fn network(&self, job: &Job, device: &str) -> Vec<String> {
        if job.network == Network::None {
            return vec![];
        }
        let forwards: String = job
            .ports
            .iter()
            .map(|(host, inside)| format!(",hostfwd=tcp:127.0.0.1:{host}-:{inside}"))
            .collect();
        ["-netdev".into(), format!("user,id=net{forwards}"), "-device".into(), format!("{device},netdev=net")]
            .to_vec()
    }
}

fn words(text: &str) -> impl Iterator<Item = String> + '_ {
    text.split_whitespace().map(String::from)
}

impl Executor for Vm {
    fn name(&self) -> &str {
        match self.kind {
            Kind::QemuMicrovm => "qemu-microvm",
            Kind::FullQemu => "full-vm-qemu",
            Kind::FullRvmm => "full-vm-rvmm",
        }
    }

    fn isolation(&self) -> Isolation {
        match self.kind {
            Kind::QemuMicrovm => Isolation::Microvm,
            _ => Isolation::FullVm,
        }
    }

    fn version(&mut self, spawner: &Spawner) -> Result<String, String> {
        if !Path::new("/dev/kvm").exists() {
            return Err("there is no /dev/kvm on this host".into());
        }
        if self.kind != Kind::QemuMicrovm && self.kvm == "pvm" {
            return Err(
                "PVM emulates a guest's kernel code: a stock kernel would take minutes to unpack itself"
                    .into(),
            );
        }
        let kernel = self.kernel();
        if !kernel.is_file() {
            let script =
                if self.kind == Kind::QemuMicrovm { "scripts/setup" } else { "scripts/build-full-vm" };
            return Err(format!("there is no {}: run {script}", kernel.display()));
        }
        let program = if self.kind == Kind::FullRvmm { self.rvmm.clone() } else { Vm::qemu() };
        if !super::is_program(&program) {
            return Err(format!("there is no program {program:?} on this host"));
        }
        let ask = Invocation::new([program.to_string_lossy(), "--version".into()]);
        let said = spawner.output(&ask, Duration::from_secs(60)).map_err(|error| error.to_string())?;
        Ok(said.lines().next().unwrap_or_default().to_owned())
    }

    fn prepare(&mut self, spawner: &Spawner, image: &Image) -> Result<(), Error> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| Error::File { path, source }
        };
        fs::create_dir_all(&self.directory).map_err(failed(&self.directory))?;
        let helper = image.rootfs.join(super::HELPER.trim_start_matches('/'));
        let program = fs::read(&helper).map_err(failed(&helper))?;
        let base = match self.kind {
            Kind::QemuMicrovm => self.guest.join("initrd.cpio"),
            _ => self.guest.join("full-vm/initrd"),
        };
        // Archives behind each other are one to the kernel.
        let mut archive = fs::read(&base).map_err(failed(&base))?;
        archive.resize(archive.len().next_multiple_of(512), 0);
        archive.extend(newc(super::HELPER.trim_start_matches('/'), &program));
        self.initrd = self.directory.join(format!("{}.initrd", self.name()));
        fs::write(&self.initrd, archive).map_err(failed(&self.initrd))?;
        if self.kind == Kind::QemuMicrovm {
            self.cmdline = self.additions(spawner)?;
            if self.kvm == "pvm" {
                // Without an agent that carries XSAVE out, the guest must not use it.
                self.cmdline.push_str(" noxsave");
            }
        }
        Ok(())
    }

    fn run(&self, job: &Job) -> Result<Invocation, Error> {
        if !job.volumes.is_empty() {
            return Err(Error::Unable("it is started without folders of the host".into()));
        }
        let exec = self.exec_parameter(job)?;
        let mib = |usual: u32| job.memory.map_or(usual, |bytes| (bytes >> 20).clamp(64, 1 << 16) as u32);
        let kernel = self.kernel().to_string_lossy().into_owned();
        let initrd = self.initrd.to_string_lossy().into_owned();
        let mut argv: Vec<String> = vec![];
        match self.kind {
            Kind::QemuMicrovm => {
                argv.push(Vm::qemu().to_string_lossy().into_owned());
                let machine = "microvm,acpi=off,x-option-roms=off,pit=on,pic=on,rtc=off,isa-serial=on,auto-kernel-cmdline=on";
                argv.extend(words(&format!("-name {} -M {machine} -accel kvm -smp 1 -nodefaults", job.name)));
                // Without arch-capabilities: QEMU fails on an MSR of it on PVM hosts.
                argv.extend(words(
                    "-cpu host,-arch-capabilities -no-user-config -display none -serial stdio -no-reboot",
                ));
                argv.extend(words(&format!("-m {}", mib(MICROVM_MIB))));
                argv.extend(words("-device isa-debug-exit,iobase=0x600,iosize=1"));
                argv.extend(self.network(job, "virtio-net-device"));
                argv.extend(["-kernel".into(), kernel, "-initrd".into(), initrd, "-append".into()]);
                argv.push(format!("console=ttyS0 reboot=k panic=-1 quiet {} {exec}", self.cmdline));
            }
            Kind::FullQemu => {
                argv.push(Vm::qemu().to_string_lossy().into_owned());
                argv.extend(words(&format!("-name {} -M q35 -accel kvm -cpu host -smp 1", job.name)));
                argv.extend(words("-nodefaults -no-user-config -display none -serial stdio -no-reboot"));
                argv.extend(words(&format!("-m {}", mib(FULL_MIB))));
                let disk = format!("file={},format=raw,if=virtio,snapshot=on", self.disk().display());
                argv.extend(["-drive".into(), disk]);
                argv.extend(self.network(job, "virtio-net-pci"));
                argv.extend(["-kernel".into(), kernel, "-initrd".into(), initrd, "-append".into()]);
                argv.push(format!("console=ttyS0 root=/dev/vda rw quiet reboot=k panic=-1 {exec}"));
            }
            Kind::FullRvmm => {
                if job.network != Network::None {
                    return Err(Error::Unable(
                        "the whole system in rvmm is started without a network".into(),
                    ));
                }
                // Two machines must not write to one disk: each has a copy, whose holes are not copied.
                let disk = self.directory.join(format!("{}.ext4", job.name));
                let copied = std::process::Command::new("cp")
                    .arg("--sparse=always")
                    .args([&self.disk(), &disk])
                    .status()
                    .and_then(|status| match status.success() {
                        true => Ok(()),
                        false => Err(std::io::Error::other("cp failed")),
                    });
                copied.map_err(|source| Error::File { path: disk.clone(), source })?;
                argv.push(self.rvmm.to_string_lossy().into_owned());
                argv.extend(["--kernel".into(), kernel, "--initrd".into(), initrd]);
                argv.extend(["--rootfs".into(), disk.to_string_lossy().into_owned()]);
                argv.extend(words(&format!("--memory {}M --cpus 1", mib(FULL_MIB))));
                argv.extend(["--cmdline".into(), format!("rw quiet {exec}")]);
            }
        }
        Ok(Invocation::new(argv))
    }

    fn wait_for_line(&self, _: &Spawner, instance: &mut Instance, wanted: &str) -> Result<String, Error> {
        line_of_running(instance, wanted)
    }

    fn exec(&self, _: &Instance, _: &[String]) -> Result<Invocation, Error> {
        Err(Error::Unable("there is no agent in it that would run a further program".into()))
    }

    fn stop(&self, _: &Spawner, instance: &mut Instance) -> Result<(), Error> {
        end(instance, Signal::TERM)?;
        self.forget(&instance.job.name);
        Ok(())
    }

    fn kill(&self, _: &Spawner, instance: &mut Instance) -> Result<(), Error> {
        end(instance, Signal::KILL)
    }

    fn restart(&self, spawner: &Spawner, instance: &mut Instance) -> Result<(), Error> {
        instance.running = self.start(spawner, &instance.job)?.running;
        Ok(())
    }

    fn remove(&self, _: &Spawner, mut instance: Instance) -> Result<(), Error> {
        end(&mut instance, Signal::KILL)?;
        self.forget(&instance.job.name);
        Ok(())
    }

    fn processes(&self, _: &Spawner, instance: &Instance) -> Result<Vec<Process>, Error> {
        let pid =
            instance.running.as_ref().ok_or_else(|| Error::Unable("the instance does not run".into()))?.pid();
        Ok(super::descendants(pid).into_iter().map(|pid| Process { pid, role: Role::Monitor }).collect())
    }

    fn cleanup(&self, _: &Spawner, _: &str) {}

    fn kernel_bytes(&self) -> Option<u64> {
        let bytes = |path: &Path| fs::metadata(path).ok().map(|metadata| metadata.len());
        Some(bytes(&self.kernel())? + bytes(&self.initrd)?)
    }

    fn instance_bytes(&self, _: &Spawner, instance: &Instance) -> Option<u64> {
        let disk = self.directory.join(format!("{}.ext4", instance.job.name));
        Some(crate::bench::probe::size::allocated(&disk).unwrap_or(0))
    }

    fn address(&self, _: &Spawner, _: &Instance) -> Result<String, Error> {
        Err(Error::Unable("its network is QEMU's own, behind forwarded ports".into()))
    }
}

impl Vm {
    fn forget(&self, name: &str) {
        let _ = fs::remove_file(self.directory.join(format!("{name}.ext4")));
    }
}

/// An archive of the newc format with one program.
fn newc(path: &str, program: &[u8]) -> Vec<u8> {
    let mut archive = vec![];
    let mut entry = |path: &str, mode: u32, contents: &[u8]| {
        let header = format!(
            "070701{:08x}{mode:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}",
            1,
            0,
            0,
            1,
            0,
            contents.len(),
            0,
            0,
            0,
            0,
            path.len() + 1,
            0
        );
        // Writing to a vector does not fail.
        let _ = write!(archive, "{header}{path}\0");
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend_from_slice(contents);
        archive.resize(archive.len().next_multiple_of(4), 0);
    };
    entry(path, 0o100_755, program);
    entry("TRAILER!!!", 0, &[]);
    archive
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vm(kind: Kind) -> Vm {
        Vm::new(kind, Path::new("/bin/rvmm"), Path::new("/guest"), Path::new("/nowhere"), "nested")
    }

    #[test]
    fn archive_is_what_cpio_reads() {
        let archive = newc("rvmm-probe", b"program");
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("a.cpio"), &archive).unwrap();
        let output = std::process::Command::new("cpio")
            .args(["-i", "--quiet", "-F", "a.cpio"])
            .current_dir(directory.path())
            .output();
        let Ok(output) = output else {
            println!("skipped: archive_is_what_cpio_reads: there is no cpio");
            return;
        };
        assert!(output.status.success(), "{output:?}");
        assert_eq!(fs::read(directory.path().join("rvmm-probe")).unwrap(), b"program");
    }

    #[test]
    fn what_to_run_is_a_kernel_parameter() {
        let argv = vm(Kind::QemuMicrovm).run(&Job::helper("cmp-1", ["idle"])).unwrap().argv;
        assert!(argv.last().unwrap().ends_with("rvmm.exec=\"/rvmm-probe idle\""), "{argv:?}");
        assert!(argv.contains(&"/guest/vmlinux".to_owned()));
        let quoted = Job { argv: vec!["a\"b".into()], ..Job::default() };
        assert!(vm(Kind::QemuMicrovm).run(&quoted).is_err());
    }

    #[test]
    fn small_system_is_told_its_address() {
        let job =
            Job { network: Network::Bridge, ports: vec![(8080, 80)], ..Job::helper("n", ["http", "80"]) };
        let argv = vm(Kind::QemuMicrovm).run(&job).unwrap().argv;
        assert!(
            argv.last()
                .unwrap()
                .ends_with("rvmm.exec=\"ifconfig eth0 10.0.2.15 up; exec /rvmm-probe http 80\"")
        );
    }

    #[test]
    fn ports_are_forwarded() {
        let job =
            Job { network: Network::Bridge, ports: vec![(8080, 80)], ..Job::helper("n", ["http", "80"]) };
        let argv = vm(Kind::FullQemu).run(&job).unwrap().argv.join(" ");
        assert!(argv.contains(
            "-netdev user,id=net,hostfwd=tcp:127.0.0.1:8080-:80 -device virtio-net-pci,netdev=net"
        ));
    }
}
