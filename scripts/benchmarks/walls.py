# SPDX-License-Identifier: Apache-2.0
"""What the walls cost: time to the first KVM_RUN and memory, without a sandbox, with it, and with a jail besides."""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time

import host
import stats
import tiny_guest
from boot import fail, progress, timeline
from monitors import Process, Rvmm, memory_outside

PROJECT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
MEMORY_MIB = 128
KINDS = ("no sandbox", "sandbox", "sandbox and jail")
DEVICES = ("one disk", "all devices")
# Somebody who owns nothing.
JAIL_UID = 65534
SETTLE_S = 0.5


def arguments():
    parser = argparse.ArgumentParser(prog="scripts/bench walls", description=__doc__)
    parser.add_argument("--runs", type=int, default=30, metavar="N", help="starts of each kind (default 30)")
    parser.add_argument("--memory-runs", type=int, default=5, metavar="N", help="looks at the memory (default 5)")
    parser.add_argument("--json", metavar="FILE", help="write everything that was measured to FILE")
    parser.add_argument("--rvmm", metavar="FILE", help="the binary (default: target/release/rvmm, which is built first)")
    return parser.parse_args()


class Bench:
    """Everything that the measurements share."""

    def __init__(self, options, folder):
        self.binary = os.path.abspath(options.rvmm or f"{PROJECT}/target/release/rvmm")
        if not os.path.exists(self.binary):
            fail(f"there is no {self.binary}")
        # Pages that are not on the disk yet would count as the process's dirty memory.
        subprocess.run(["sync", self.binary], check=True)
        self.folder, self.options = folder, options
        self.facts = host.facts(PROJECT, self.binary, None)
        self.disk = f"{folder}/disk"
        for stays in (False, True):
            with open(self.kernel(stays), "wb") as file:
                file.write(tiny_guest.elf(stays=stays))
        with open(self.disk, "wb") as file:
            file.truncate(1 << 20)
        os.mkdir(f"{folder}/jail")
        self.is_root = os.geteuid() == 0
        self.has_tun = self.is_root and os.path.exists("/dev/net/tun")
        self.results = {"host": self.facts, "starts": [], "memory": []}

    def kernel(self, stays):
        """A guest that ends at once, or one that stays."""
        return f"{self.folder}/{'stays' if stays else 'ends'}.elf"

    def kinds(self):
        """What can be measured by this user."""
        return KINDS if self.is_root else KINDS[:2]

    def start(self, kind, devices, stays=False):
        """Starts rvmm."""
        log_level = "debug" if stays else "error"
        command = [self.binary, "--kernel", self.kernel(stays), "--memory", f"{MEMORY_MIB}M", "--timeline=json"]
        command += ["--log-level", log_level, "--disk", f"{self.disk},readonly"]
        if devices == "all devices":
            command += ["--rng", "--balloon", "--vsock", f"cid=3,socket={self.folder}/vsock"]
            command += ["--console", f"file={self.folder}/console", "--api-socket", f"{self.folder}/api"]
            if self.has_tun:
                command += ["--net", "tap=rvwalls0"]
        if kind == "no sandbox":
            command.append("--no-sandbox")
        elif kind == "sandbox and jail":
            command += ["--jail", f"{self.folder}/jail,uid={JAIL_UID}"]
        return Process(command)

    def wait_for_guest(self, process):
        """Waits for the guest's first byte."""
        if process.popen.stdout.read(1) != b"x":
            fail(f"rvmm did not run the tiny guest:\n{process.collect(20)}")

    def starts(self):
        """Starts of every kind, interleaved, in an order that turns with every run."""
        jobs = [(kind, devices) for devices in DEVICES for kind in self.kinds()]
        for run in range(self.options.runs + 1):
            turn = run % len(jobs)
            for kind, devices in jobs[turn:] + jobs[:turn]:
                process = self.start(kind, devices)
                self.wait_for_guest(process)
                found = timeline(process.collect(20))
                if found is None:
                    fail("rvmm printed no timeline")
                moments = {moment["name"]: moment["wall_us"] / 1e3 for moment in found["moments"]}
                record = {"kind": kind, "devices": devices, "run": run, "moments": moments}
                record["main_ms"] = moments["first KVM_RUN"]
                record["whole_ms"] = found["start_monotonic_ns"] / 1e6 - process.start_s * 1e3 + record["main_ms"]
                # The first run fills caches.
                if run:
                    self.results["starts"].append(record)
            progress(f"start {run} of {self.options.runs}")

    def memory(self):
        """Memory of monitor and keeper while the guest does nothing."""
        for run in range(self.options.memory_runs):
            for devices in DEVICES:
                for kind in self.kinds():
                    process = self.start(kind, devices, stays=True)
                    ram = Rvmm(self.binary).ram_ranges(process, None)
                    self.wait_for_guest(process)
                    time.sleep(SETTLE_S)
                    record = {"kind": kind, "devices": devices, "run": run}
                    for pid in family(process.pid):
                        found = memory_outside(pid, ram)
                        whose = "monitor" if has_vm(pid) else "keeper"
                        record[whose] = {name: kib for name, kib in found.items() if name != "dirty_parts_kib"}
                    process.stop(Rvmm.end_signals)
                    self.results["memory"].append(record)
            progress(f"memory {run + 1} of {self.options.memory_runs}")


def family(pid):
    """A process and those that it has started."""
    children = []
    for task in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{task}/children", encoding="ascii") as file:
            children += [int(child) for child in file.read().split()]
    return [pid] + [member for child in children for member in family(child)]


def has_vm(pid):
    """Whether a process has a VM of KVM's: the keeper has none."""
    links = [f"/proc/{pid}/fd/{fd}" for fd in os.listdir(f"/proc/{pid}/fd")]
    return any(os.readlink(link) == "anon_inode:kvm-vm" for link in links if os.path.islink(link))


def report(bench):
    """Prints what was measured."""
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    for key, value in bench.facts.items():
        print(f"{key:>18}  {' '.join(f'{n:.2f}' for n in value) if isinstance(value, list) else value}")
    if not bench.is_root:
        print("not root: nothing is measured with a jail")
    starts = bench.results["starts"]
    for devices in DEVICES:
        of = {kind: [r for r in starts if (r["kind"], r["devices"]) == (kind, devices)] for kind in bench.kinds()}
        rows = [(kind, [r["whole_ms"] for r in of[kind]]) for kind in bench.kinds()]
        stats.print_table(f"process start to first KVM_RUN, {devices}", "ms", rows)
        rows = []
        for kind in bench.kinds()[1:]:
            # By run, so that what the host did meanwhile falls out.
            pairs = zip(of[kind], of["no sandbox"])
            rows.append((f"{kind} more than none", [one["main_ms"] - other["main_ms"] for one, other in pairs]))
            names = [name for name in of[kind][0]["moments"] if name == "sandbox closed"]
            for name in names:
                rows.append((f"{kind}, its own moment", [closing(r["moments"], name) for r in of[kind]]))
        stats.print_table(f"what the walls cost, {devices}", "ms", rows)
    rows = []
    for devices in DEVICES:
        for kind in bench.kinds():
            for whose in ("monitor", "keeper"):
                for key, label in (("rss_kib", "RSS"), ("private_dirty_kib", "private dirty")):
                    values = [
                        r[whose][key] / 1024
                        for r in bench.results["memory"]
                        if (r["kind"], r["devices"]) == (kind, devices) and whose in r
                    ]
                    if values:
                        rows.append((f"{devices}, {kind}, {whose}, {label}", values))
    stats.print_table("memory outside guest RAM", "MiB", rows)


def closing(moments, name):
    """How long the step took that ended at a moment."""
    before = max((at for other, at in moments.items() if other != name and at <= moments[name]), default=0)
    return moments[name] - before


def main():
    options = arguments()
    # So that what is to be done at the end is done then, too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="rvmm-bench-") as folder:
        os.chmod(folder, 0o755)
        bench = Bench(options, folder)
        bench.starts()
        bench.memory()
        bench.facts["load_average_after"] = list(os.getloadavg())
        report(bench)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(bench.results, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
