# SPDX-License-Identifier: Apache-2.0
"""The monitors that are compared: how each is started, and how its parts are told apart."""

import atexit
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import tiny_guest

QEMU = "qemu-system-x86_64"
# The guest-event port and the sleep register of docs/guest-event-port.md, for QEMU too.
EVENT_PORT, EVENT_PORT_ANSWER, SLEEP_CONTROL = 0x5F0, 0x52, 0x600
# QEMU cannot carry out XSAVE for PVM's emulator as rvmm does, so its guest has to do without vector state.
QEMU_ON_PVM = "noxsave"


class Guest:
    """What is booted."""

    def __init__(self, kernel, memory_mib, rootfs=None, cmdline="", pvm_cmdline=""):
        self.kernel, self.memory_mib, self.rootfs = kernel, memory_mib, rootfs
        self.cmdline, self.pvm_cmdline = cmdline, pvm_cmdline


class Process:
    """A monitor that runs, with pipes to its output."""

    def __init__(self, arguments, pass_fds=(), stdin=subprocess.DEVNULL):
        self.start_s = time.clock_gettime(time.CLOCK_MONOTONIC)
        self.popen = subprocess.Popen(
            arguments,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=pass_fds,
        )
        self.pid = self.popen.pid
        # A benchmark that ends early leaves no VM behind.
        atexit.register(self.kill)

    def kill(self):
        """Ends the process, if it is still there."""
        atexit.unregister(self.kill)
        if self.popen.poll() is None:
            self.popen.kill()
            self.popen.wait()

    def stop(self, signals):
        """Sends signals, some time apart, until the process ends; returns what it wrote to standard error."""
        for number in signals:
            self.popen.send_signal(number)
            try:
                self.popen.wait(0.05)
                break
            except subprocess.TimeoutExpired:
                continue
        return self.collect(20)

    def collect(self, timeout):
        """Waits for the end; returns what was written to standard error."""
        try:
            log = self.popen.communicate(timeout=timeout)[1]
        except subprocess.TimeoutExpired:
            self.popen.kill()
            log = self.popen.communicate()[1]
        self.kill()
        return log.decode(errors="replace")

    def cpu_s(self):
        """Processor time of all threads so far, in seconds."""
        total = 0
        for thread in os.listdir(f"/proc/{self.pid}/task"):
            with open(f"/proc/{self.pid}/task/{thread}/schedstat", encoding="ascii") as file:
                total += int(file.read().split()[0])
        return total / 1e9


class Rvmm:
    """rvmm itself."""

    name = "rvmm"
    # The first presses the power button, which no guest of these answers; the second ends the VM.
    end_signals = (signal.SIGTERM,) * 6

    def __init__(self, binary):
        self.binary = binary

    def start(self, guest, log_level="error"):
        """Starts rvmm with the timeline on standard error at its end."""
        arguments = [self.binary, "--kernel", guest.kernel, "--memory", f"{guest.memory_mib}M"]
        arguments += ["--timeline=json", "--log-level", log_level, "--cmdline", guest.cmdline]
        if guest.rootfs:
            arguments += ["--rootfs", f"{guest.rootfs},readonly"]
        return Process(arguments)

    def ram_ranges(self, process, _guest):
        """Host address ranges of guest memory, as rvmm logs them at level debug."""
        ranges = []
        for line in process.popen.stderr:
            match = re.search(rb"guest memory .* at host (0x[0-9a-f]+)\+(0x[0-9a-f]+)", line)
            if match:
                start, size = (int(number, 16) for number in match.groups())
                ranges.append((start, start + size))
            elif ranges:
                return ranges
        raise RuntimeError("rvmm ended early")


def pvm_additions(rvmm):
    """What rvmm adds to the command line on a PVM host, so that the peers' guests get the same."""
    with tempfile.NamedTemporaryFile() as kernel:
        kernel.write(tiny_guest.elf())
        kernel.flush()
        log = rvmm.start(Guest(kernel.name, 128), log_level="info").collect(20)
    marker = "added to the guest's command line: "
    line = next((line for line in log.splitlines() if marker in line), None)
    if line is None:
        sys.exit(f"bench: rvmm does not start:\n{log}")
    own = ("console=", "reboot=", "panic=", "root=", "virtio_mmio.device=")
    return " ".join(word for word in line.partition(marker)[2].split() if not word.startswith(own))


class Qemu:
    """Debian's QEMU with its microvm machine, set up for speed."""

    name = "QEMU microvm"
    end_signals = (signal.SIGKILL,)

    def __init__(self, binary, kvm_is_pvm):
        self.binary, self.kvm_is_pvm = binary, kvm_is_pvm

    @staticmethod
    def find():
        """The binary, or None."""
        return shutil.which(QEMU)

    def machine(self, memory_mib, kernel, events_path=None):
        """The arguments for a machine without disks; the guest's boot marks go to `events_path`."""
        machine = "microvm,acpi=off,x-option-roms=off,pit=on,pic=on,rtc=off,isa-serial=on,auto-kernel-cmdline=on"
        # Without arch-capabilities: QEMU fails on an MSR of it on PVM hosts.
        arguments = [self.binary, "-M", machine, "-accel", "kvm", "-cpu", "host,-arch-capabilities", "-smp", "1"]
        arguments += ["-m", str(memory_mib), "-nodefaults", "-no-user-config", "-display", "none"]
        arguments += ["-serial", "stdio", "-no-reboot", "-kernel", kernel]
        if events_path is not None:
            port = f"isa-debugcon,iobase={EVENT_PORT:#x},readback={EVENT_PORT_ANSWER:#x},chardev=events"
            arguments += ["-chardev", f"file,id=events,path={events_path}", "-device", port]
            arguments += ["-device", f"isa-debug-exit,iobase={SLEEP_CONTROL:#x},iosize=1"]
        return arguments

    def command(self, guest, events_fd=None):
        """The whole command line; the guest's boot marks go to `events_fd`."""
        events_path = None if events_fd is None else f"/dev/fd/{events_fd}"
        arguments = self.machine(guest.memory_mib, guest.kernel, events_path)
        cmdline = ["console=ttyS0 reboot=k panic=-1"]
        if self.kvm_is_pvm:
            cmdline += [guest.pvm_cmdline, QEMU_ON_PVM]
        if guest.rootfs:
            cmdline.append("root=/dev/vda ro")
            arguments += ["-drive", f"id=root,file={guest.rootfs},format=raw,if=none,readonly=on"]
            arguments += ["-device", "virtio-blk-device,drive=root"]
        return arguments + ["-append", " ".join(cmdline + [guest.cmdline])]

    def start(self, guest, events_fd=None):
        """Starts QEMU; the guest's boot marks go to `events_fd`."""
        return Process(self.command(guest, events_fd), () if events_fd is None else (events_fd,))

    def ram_ranges(self, process, guest):
        """Host address ranges of guest memory: the one mapping of its size."""
        wanted = guest.memory_mib << 20
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with open(f"/proc/{process.pid}/maps", encoding="ascii") as file:
                for line in file:
                    start, end = (int(number, 16) for number in line.split()[0].split("-"))
                    if end - start == wanted:
                        return [(start, end)]
            time.sleep(0.05)
        raise RuntimeError("QEMU has no mapping of the guest's memory size")


def memory_outside(pid, ram):
    """RSS, private and private dirty memory of a process in KiB, guest memory left out."""
    total = {"rss_kib": 0, "private_kib": 0, "private_dirty_kib": 0}
    parts = {}
    counts = False
    with open(f"/proc/{pid}/smaps", encoding="utf-8", errors="replace") as file:
        for line in file:
            range_match = re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ \S+\s*(.*)$", line)
            if range_match:
                start, end = (int(number, 16) for number in range_match.groups()[:2])
                counts = not any(low <= start and end <= high for low, high in ram)
                name = range_match.group(4) or "anonymous"
                continue
            key, _, value = line.partition(":")
            if not counts or key not in ("Rss", "Private_Clean", "Private_Dirty"):
                continue
            kib = int(value.split()[0])
            if key == "Rss":
                total["rss_kib"] += kib
                continue
            total["private_kib"] += kib
            if key == "Private_Dirty":
                total["private_dirty_kib"] += kib
                parts[name] = parts.get(name, 0) + kib
    return total | {"dirty_parts_kib": {name: kib for name, kib in parts.items() if kib}}
