# SPDX-License-Identifier: Apache-2.0
"""What a guest gets from its disk and its network: fio and iperf3 in a Linux guest, under each monitor in turn."""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile

import host
import stats
from monitors import QEMU_ON_PVM, Qemu

PROJECT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
TAP, HOST_ADDRESS, GUEST_ADDRESS = "rvmmbench0", "10.93.7.1", "10.93.7.2"
GUEST_LIMIT_S = 1800

# name: (what it is, unit, what fio is told)
DISK_JOBS = {
    "rand-read-1": ("4k random read, queue depth 1", "IOPS", "--rw=randread --bs=4k --iodepth=1"),
    "rand-read-32": ("4k random read, queue depth 32", "IOPS", "--rw=randread --bs=4k --iodepth=32"),
    "rand-write-1": ("4k random write, queue depth 1", "IOPS", "--rw=randwrite --bs=4k --iodepth=1"),
    "rand-write-32": ("4k random write, queue depth 32", "IOPS", "--rw=randwrite --bs=4k --iodepth=32"),
    "read": ("1M sequential read, queue depth 4", "MiB/s", "--rw=read --bs=1M --iodepth=4"),
    "write": ("1M sequential write, queue depth 4", "MiB/s", "--rw=write --bs=1M --iodepth=4"),
}
# name: (what it is, what iperf3 is told)
NET_JOBS = {
    "tx-1": ("TCP, guest sends, 1 stream", ""),
    "rx-1": ("TCP, guest receives, 1 stream", "-R"),
    "tx-8": ("TCP, guest sends, 8 streams", "-P 8"),
    "rx-8": ("TCP, guest receives, 8 streams", "-P 8 -R"),
}


def arguments():
    parser = argparse.ArgumentParser(prog="scripts/bench io", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="runs of each monitor, in turn (default 3)")
    parser.add_argument("--seconds", type=int, default=5, metavar="S", help="length of each load (default 5)")
    parser.add_argument("--size", type=int, default=256, metavar="MIB", help="size of the disk (default 256)")
    parser.add_argument("--only", metavar="NAMES", help="only these loads, with commas between (as the table's first column)")
    parser.add_argument("--folder", metavar="DIR", help="where the disk's image is made (default: a temporary folder)")
    parser.add_argument("--json", metavar="FILE", help="write everything that was measured to FILE")
    parser.add_argument("--rvmm", metavar="FILE", help="the binary (default: target/release/rvmm, which is built first)")
    parser.add_argument("--no-vhost", action="store_true", help="packets are moved by the monitors, even where vhost-net is there")
    return parser.parse_args()


def fail(text):
    sys.exit(f"bench: {text}")


def script(jobs, seconds):
    """What the guest runs. One line of result for each load: its name and a number."""
    # The clock of a guest that was stopped for a moment is made up for; fio's own figure is by that clock.
    lines = [
        f"ip addr add {GUEST_ADDRESS}/24 dev eth0 && ip link set eth0 up",
        f"fio_job() {{ name=$1; shift; fio --name=job --filename=/dev/vdc --direct=1 --ioengine=libaio --time_based"
        f" --runtime={seconds} --randrepeat=1 --output-format=json --output=/tmp/fio.json \"$@\" >/tmp/fio.err 2>&1 ||"
        " cat /tmp/fio.err; grep -E '\"(iops|bw_bytes)\" :' /tmp/fio.json | tr -d '\\n' | sed \"s/^/fio $name /\"; echo; }",
        f"net_job() {{ name=$1; shift; iperf3 -c {HOST_ADDRESS} -t {seconds} -f m \"$@\" >/tmp/iperf 2>&1 || cat /tmp/iperf;"
        " grep -E 'receiver$' /tmp/iperf | tail -n 1 | sed \"s/^/iperf $name /\"; }",
    ]
    lines += [f"fio_job {name} {DISK_JOBS[name][2]}" for name in jobs if name in DISK_JOBS]
    lines += [f"net_job {name} {NET_JOBS[name][1]}" for name in jobs if name in NET_JOBS]
    return "\n".join(lines + ["exit 0", ""])


def parse(output, jobs):
    """The figures in a guest's output: IOPS, MiB/s, Mbit/s."""
    found = {}
    for line in output.splitlines():
        words = line.split()
        if len(words) < 3 or words[1] not in jobs:
            continue
        if words[0] == "fio":
            key = "iops" if DISK_JOBS[words[1]][1] == "IOPS" else "bw_bytes"
            values = [float(value) for value in re.findall(rf'"{key}" : ([0-9.]+)', line)]
            # Reads, writes and trims each have one; two of them are zero.
            if values:
                found[words[1]] = max(values) / (1 if key == "iops" else 1 << 20)
        elif words[0] == "iperf":
            match = re.search(r"([0-9.]+) Mbits/sec", line)
            if match:
                found[words[1]] = float(match.group(1))
    return found


class Bench:
    """Files, network and monitors of one run."""

    def __init__(self, options, folder):
        self.options, self.folder = options, folder
        self.rvmm = os.path.abspath(options.rvmm or f"{PROJECT}/target/release/rvmm")
        self.qemu = Qemu.find()
        self.facts = host.facts(PROJECT, self.rvmm, self.qemu)
        self.is_pvm = self.facts["kvm_kind"] == "pvm"
        self.kernel = f"{PROJECT}/target/guest/{'vmlinux-pvm' if self.is_pvm else 'vmlinux'}"
        self.rootfs = f"{PROJECT}/target/guest/rootfs-test.ext4"
        for path in (self.rvmm, self.kernel, self.rootfs):
            if not os.path.exists(path):
                fail(f"there is no {path}: run scripts/setup and scripts/build-rootfs --test")
        self.vhost = os.path.exists("/dev/vhost-net") and not options.no_vhost
        self.facts["vhost_net"] = self.vhost
        self.disk = f"{options.folder or folder}/disk"
        self.script = f"{folder}/script"

    def jobs(self):
        """Names of the loads to run."""
        names = [*DISK_JOBS, *NET_JOBS]
        wanted = self.options.only.split(",") if self.options.only else names
        unknown = set(wanted) - set(names)
        if unknown:
            fail(f"there is no load {', '.join(sorted(unknown))}; there are {', '.join(names)}")
        if not os.access("/dev/net/tun", os.W_OK) or os.geteuid() != 0 or not shutil.which("iperf3"):
            print("bench: no network: that needs root, /dev/net/tun and iperf3", file=sys.stderr)
            wanted = [name for name in wanted if name in DISK_JOBS]
        return wanted

    def write_files(self, jobs):
        """The disk, with all of its blocks allocated, and the script."""
        with open(self.disk, "wb") as file:
            piece = os.urandom(1 << 20)
            for _ in range(self.options.size):
                file.write(piece)
            os.fsync(file.fileno())
        text = script(jobs, self.options.seconds).encode()
        with open(self.script, "wb") as file:
            file.write(text.ljust(-(-len(text) // 4096) * 4096, b"\n"))

    def rvmm_command(self, network):
        """rvmm with the defaults that a user gets."""
        command = [self.rvmm, "--kernel", self.kernel, "--memory", "256M", "--rootfs", f"{self.rootfs},readonly"]
        command += ["--disk", f"{self.script},readonly", "--disk", self.disk]
        if network:
            command += ["--net", f"tap={TAP},vhost={'on' if self.vhost else 'off'}"]
        return command + ["--cmdline", 'quiet rvmm.exec="sh /dev/vdb"']

    def qemu_command(self, network):
        """QEMU's microvm at its best: io_uring with the host's page cache, as rvmm has it, and a thread for the disk."""
        command = Qemu(self.qemu, self.is_pvm).machine(256, self.kernel, "/dev/null") + ["-object", "iothread,id=disk"]
        cmdline = "console=ttyS0 reboot=k panic=-1 root=/dev/vda ro quiet"
        if self.is_pvm:
            cmdline += f" pvm_host pvm_syscall_fixup {QEMU_ON_PVM}"
        devices = [("root", f"{self.rootfs},readonly=on"), ("script", f"{self.script},readonly=on"), ("data", self.disk)]
        for name, file in devices:
            command += ["-drive", f"id={name},file={file},format=raw,if=none,cache=writeback,aio=io_uring"]
            thread = ",iothread=disk" if name == "data" else ""
            command += ["-device", f"virtio-blk-device,drive={name}{thread}"]
        if network:
            vhost = "on" if self.vhost else "off"
            command += ["-netdev", f"tap,id=net,ifname={TAP},script=no,downscript=no,vhost={vhost}"]
            command += ["-device", "virtio-net-device,netdev=net"]
        return command + ["-append", f'{cmdline} rvmm.exec="sh /dev/vdb"']

    def run(self, command, jobs):
        """One guest; its figures."""
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            output, log = process.communicate(timeout=GUEST_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            output, log = process.communicate()
        output, log = output.decode(errors="replace"), log.decode(errors="replace")
        found = parse(output, jobs)
        missing = [name for name in jobs if name not in found]
        if missing:
            print(f"bench: no figure for {', '.join(missing)} of {command[0]}:\n{output}\n{log}", file=sys.stderr)
        return found


class Network:
    """A tap that is there before and after the monitors, and iperf3 on it."""

    def __enter__(self):
        self.remove()
        subprocess.run(["ip", "tuntap", "add", TAP, "mode", "tap"], check=True)
        subprocess.run(["ip", "addr", "add", f"{HOST_ADDRESS}/24", "dev", TAP], check=True)
        subprocess.run(["ip", "link", "set", TAP, "up"], check=True)
        self.server = subprocess.Popen(["iperf3", "-s", "-B", HOST_ADDRESS], stdout=subprocess.DEVNULL)
        return self

    def __exit__(self, *_):
        self.server.kill()
        self.server.wait()
        self.remove()

    @staticmethod
    def remove():
        """Removes the tap, if it is there."""
        subprocess.run(["ip", "link", "del", TAP], stderr=subprocess.DEVNULL, check=False)


def measure(bench, jobs, network):
    """All rounds: the monitors in turn, in an order that turns with every round."""
    commands = [("rvmm", bench.rvmm_command(network))]
    if bench.qemu:
        commands.append(("QEMU microvm", bench.qemu_command(network)))
    records = []
    for number in range(bench.options.rounds):
        turn = number % len(commands)
        for name, command in commands[turn:] + commands[:turn]:
            records.append({"monitor": name, "round": number, "figures": bench.run(command, jobs)})
            if sys.stderr.isatty():
                print(f"\r\033[Kbench: round {number + 1}, {name}", end="", file=sys.stderr, flush=True)
    return [name for name, _ in commands], records


def report(bench, jobs, names, records):
    """Prints the medians and their ratio."""
    for key, value in bench.facts.items():
        print(f"{key:>18}  {' '.join(f'{n:.2f}' for n in value) if isinstance(value, list) else value}")
    print(f"\n{'load':<14}{'':<34}{'unit':>8}" + "".join(f"{name:>14}" for name in names) + f"{'ratio':>8}{'worst':>8}{'best':>8}")
    for job in jobs:
        title, unit = DISK_JOBS[job][:2] if job in DISK_JOBS else (NET_JOBS[job][0], "Mbit/s")
        columns = {name: [r["figures"].get(job) for r in records if r["monitor"] == name] for name in names}
        medians = [(stats.summary(columns[name]) or {}).get("median") for name in names]
        line = f"{job:<14}{title:<34}{unit:>8}" + "".join(f"{m:>14.0f}" if m is not None else f"{'-':>14}" for m in medians)
        if len(names) > 1 and all(medians):
            ratios = [a / b for a, b in zip(*columns.values()) if a and b]
            line += f"{medians[0] / medians[1]:>8.2f}{min(ratios):>8.2f}{max(ratios):>8.2f}"
        print(line)
    print(f"\nMedians of {bench.options.rounds} rounds; ratio of the medians, and the worst and best of the rounds' own.")


def main():
    options = arguments()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="rvmm-bench-") as folder:
        bench = Bench(options, folder)
        jobs = bench.jobs()
        bench.write_files(jobs)
        if any(name in NET_JOBS for name in jobs):
            with Network():
                names, records = measure(bench, jobs, True)
        else:
            names, records = measure(bench, jobs, False)
        if options.folder:
            os.remove(bench.disk)
    bench.facts["load_average_after"] = list(os.getloadavg())
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    report(bench, jobs, names, records)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"host": bench.facts, "options": vars(options), "records": records}, file, indent=1)
            file.write("\n")
    if any(name not in record["figures"] for record in records for name in jobs):
        sys.exit(1)


main()
