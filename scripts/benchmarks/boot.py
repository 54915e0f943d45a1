# SPDX-License-Identifier: Apache-2.0
"""How long a VM takes to start, what the monitor costs in memory, how long Linux takes to its first user process."""

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
import tracing
from monitors import Guest, Qemu, Rvmm, memory_outside, pvm_additions

PROJECT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
MEMORY_MIB = 128
GROWTH_MIB = (128, 1024, 4096, 16384)
# How long a guest runs before the monitor's memory is looked at: Linux is in its start then.
SETTLE_S = 2.0
BOOT_LIMIT_S = 180


def arguments():
    parser = argparse.ArgumentParser(prog="scripts/bench boot", description=__doc__)
    parser.add_argument("--runs", type=int, default=20, metavar="N", help="starts of each kind (default 20)")
    parser.add_argument("--boots", type=int, default=3, metavar="N", help="boots to the first user process (default 3)")
    parser.add_argument("--memory-runs", type=int, default=3, metavar="N", help="looks at the memory (default 3)")
    parser.add_argument("--json", metavar="FILE", help="write everything that was measured to FILE")
    parser.add_argument("--rvmm", metavar="FILE", help="the binary (default: target/release/rvmm, which is built first)")
    parser.add_argument("--kernel", metavar="FILE", help="ELF kernel (default: the one in target/guest for this host)")
    parser.add_argument("--rootfs", metavar="FILE", help="disk image (default: target/guest/rootfs.ext4)")
    parser.add_argument("--no-peers", action="store_true", help="rvmm alone")
    parser.add_argument("--nice", type=int, default=0, metavar="N", help="run all monitors at this nice value")
    return parser.parse_args()


def fail(text):
    sys.exit(f"bench: {text}")


class Bench:
    """Everything that the measurements share."""

    def __init__(self, options):
        self.options = options
        rvmm = os.path.abspath(options.rvmm or f"{PROJECT}/target/release/rvmm")
        if not os.path.exists(rvmm):
            fail(f"there is no {rvmm}")
        # Pages that are not on the disk yet would count as the process's dirty memory.
        subprocess.run(["sync", rvmm], check=True)
        qemu = None if options.no_peers else Qemu.find()
        self.facts = host.facts(PROJECT, rvmm, qemu)
        is_pvm = self.facts["kvm_kind"] == "pvm"
        kernel = options.kernel or f"{PROJECT}/target/guest/{'vmlinux-pvm' if is_pvm else 'vmlinux'}"
        rootfs = options.rootfs or f"{PROJECT}/target/guest/rootfs.ext4"
        for path in (kernel, rootfs):
            if not os.path.exists(path):
                fail(f"there is no {path}: run scripts/setup")
        self.kernel, self.rootfs = os.path.abspath(kernel), os.path.abspath(rootfs)
        self.facts |= {"guest_kernel": os.path.basename(kernel), "guest_kernel_bytes": os.path.getsize(kernel)}
        self.rvmm = Rvmm(rvmm)
        self.monitors = [self.rvmm] + ([Qemu(qemu, is_pvm)] if qemu else [])
        self.pvm_cmdline = pvm_additions(self.rvmm) if is_pvm else ""
        try:
            self.tracer = tracing.Tracer()
        except tracing.Unavailable as error:
            self.tracer = None
            print(f"bench: no trace of KVM_RUN, since tracefs cannot be used: {error}", file=sys.stderr)
        self.results = {"host": self.facts, "starts": [], "growth": [], "memory": [], "boots": []}

    def guest(self, memory_mib=MEMORY_MIB, cmdline="quiet"):
        return Guest(self.kernel, memory_mib, self.rootfs, cmdline, self.pvm_cmdline)

    def start(self, monitor, guest, wait_for_byte):
        """Starts a monitor until the guest runs, or until the guest's first byte of output; then ends it."""
        if self.tracer:
            self.tracer.begin()
        process = monitor.start(guest)
        byte_s = None
        if wait_for_byte:
            if process.popen.stdout.read(1) != b"x":
                fail(f"{monitor.name} did not run the tiny guest:\n{process.collect(20)}")
            byte_s = time.clock_gettime(time.CLOCK_MONOTONIC)
        seen = self.wait_for_run(process)
        if wait_for_byte and monitor is self.rvmm:
            log = process.collect(20)
        else:
            log = process.stop(monitor.end_signals)
        record = {"monitor": monitor.name, "memory_mib": guest.memory_mib}
        begin_s = seen.exec_s if seen else process.start_s
        if seen:
            record |= {"wall_ms": seen.wall_ms, "cpu_ms": seen.cpu_ms}
        if byte_s:
            record["byte_ms"] = (byte_s - begin_s) * 1e3
        if monitor is self.rvmm:
            record |= split(timeline(log), record, begin_s)
        return record

    def wait_for_run(self, process):
        if not self.tracer:
            time.sleep(0.3)
            return None
        deadline = time.monotonic() + 20
        seen = None
        while seen is None and time.monotonic() < deadline:
            seen = self.tracer.look(process.pid)
            if seen is None:
                time.sleep(0.02)
        self.tracer.end()
        if seen is None:
            fail(f"no KVM_RUN within 20 s:\n{process.stop((signal.SIGKILL,))}")
        return seen

    def starts(self, tiny_kernel):
        """Starts of every kind, interleaved, in an order that turns with every run."""
        tiny = Guest(tiny_kernel, MEMORY_MIB)
        jobs = [("starts", "Linux", m, self.guest(), False) for m in self.monitors]
        jobs += [("starts", "tiny", m, tiny, True) for m in self.monitors]
        limit_mib = host.memory_bytes() >> 20
        jobs += [("growth", "Linux", self.rvmm, self.guest(s), False) for s in GROWTH_MIB if s < limit_mib]
        for run in range(self.options.runs):
            turn = run % len(jobs)
            for where, kind, monitor, guest, wait_for_byte in jobs[turn:] + jobs[:turn]:
                record = self.start(monitor, guest, wait_for_byte)
                self.results[where].append(record | {"guest": kind, "run": run})
            progress(f"start {run + 1} of {self.options.runs}")

    def memory(self):
        """Memory of each monitor while its guest runs."""
        for run in range(self.options.memory_runs):
            for monitor in self.monitors:
                guest = self.guest()
                process = monitor.start(guest, "debug") if monitor is self.rvmm else monitor.start(guest)
                ram = monitor.ram_ranges(process, guest)
                time.sleep(SETTLE_S)
                found = memory_outside(process.pid, ram)
                process.stop(monitor.end_signals)
                self.results["memory"].append(found | {"monitor": monitor.name, "run": run})
            progress(f"memory {run + 1} of {self.options.memory_runs}")

    def boots(self):
        """Boots to the first user process and on to the end of a command."""
        guest = self.guest(cmdline='quiet rvmm.exec="true"')
        for run in range(self.options.boots):
            for monitor in self.monitors:
                boot = self.boot_rvmm(guest) if monitor is self.rvmm else self.boot_peer(monitor, guest)
                self.results["boots"].append(boot | {"monitor": monitor.name, "run": run})
            progress(f"boot {run + 1} of {self.options.boots}")

    def boot_rvmm(self, guest):
        """The guest's marks as rvmm's timeline has them."""
        process = self.rvmm.start(guest)
        found = timeline(process.collect(BOOT_LIMIT_S))
        if found is None or process.popen.returncode != 0:
            return {"failed": True}
        before_s = found["start_monotonic_ns"] / 1e9 - process.start_s
        first = next((m for m in found["moments"] if m["name"] == "first process"), None)
        if first is None:
            return {"failed": True}
        return {
            "first_process_s": before_s + first["wall_us"] / 1e6,
            "first_process_cpu_s": first["cpu_us"] / 1e6,
            "moments": found["moments"],
        }

    def boot_peer(self, monitor, guest):
        """The guest's marks as the peer's device at the same port writes them into a pipe."""
        reader, writer = os.pipe()
        process = monitor.start(guest, writer)
        os.close(writer)
        boot = {"failed": True}
        os.set_blocking(reader, False)
        deadline = time.monotonic() + BOOT_LIMIT_S
        marks = []
        while time.monotonic() < deadline and process.popen.poll() is None and 3 not in marks:
            try:
                byte = os.read(reader, 1)
            except BlockingIOError:
                time.sleep(0.002)
                continue
            now = time.clock_gettime(time.CLOCK_MONOTONIC)
            marks += byte
            if byte == b"\1":
                boot = {"first_process_s": now - process.start_s, "first_process_cpu_s": process.cpu_s()}
        if 3 not in marks:
            boot["failed"] = True
        os.close(reader)
        process.stop(monitor.end_signals)
        return boot


def timeline(log):
    """rvmm's timeline, the last line of its standard error."""
    line = next((line for line in reversed(log.splitlines()) if line.startswith("{")), None)
    return json.loads(line) if line else None


def split(found, record, begin_s):
    """rvmm's own part and KVM's, from its timeline and what was seen from outside."""
    if found is None:
        fail("rvmm printed no timeline")
    kvm_wall = sum(call["wall_ns"] for call in found["kvm_calls"]) / 1e6
    kvm_cpu = sum(call["cpu_ns"] for call in found["kvm_calls"]) / 1e6
    parts = {
        "kvm_wall_ms": kvm_wall,
        "kvm_cpu_ms": kvm_cpu,
        "before_main_ms": found["start_monotonic_ns"] / 1e6 - begin_s * 1e3,
        "kvm_calls": found["kvm_calls"],
        "moments": found["moments"],
    }
    if "wall_ms" in record:
        parts |= {"own_wall_ms": record["wall_ms"] - kvm_wall, "own_cpu_ms": record["cpu_ms"] - kvm_cpu}
    return parts


def progress(text):
    if sys.stderr.isatty():
        print(f"\r\033[Kbench: {text}", end="", file=sys.stderr, flush=True)


def column(records, key, **where):
    """The values of `key` in the records that match."""
    return [r.get(key) for r in records if all(r.get(name) == value for name, value in where.items())]


def report(bench):
    """Prints what was measured."""
    results, facts = bench.results, bench.facts
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    for key in facts:
        value = facts[key]
        print(f"{key:>18}  {' '.join(f'{n:.2f}' for n in value) if isinstance(value, list) else value}")
    names = [monitor.name for monitor in bench.monitors]
    starts = results["starts"]
    for kind, title in (("Linux", f"ELF Linux kernel, {MEMORY_MIB} MiB"), ("tiny", f"tiny ELF guest, {MEMORY_MIB} MiB")):
        rows = []
        for key, label in (("wall_ms", "wall"), ("cpu_ms", "CPU")):
            rows += [(f"{name}, {label}", column(starts, key, guest=kind, monitor=name)) for name in names]
        stats.print_table(f"process start to first KVM_RUN, {title}", "ms", rows)
    rows = [(name, column(starts, "byte_ms", guest="tiny", monitor=name)) for name in names]
    stats.print_table("process start to first serial byte, tiny ELF guest", "ms", rows)

    rows = []
    growing = (
        ("own_wall_ms", "own, wall"),
        ("own_cpu_ms", "own, CPU"),
        ("kvm_wall_ms", "KVM's calls, wall"),
        ("kvm_cpu_ms", "KVM's calls, CPU"),
    )
    for key, label in growing:
        sizes = sorted({record["memory_mib"] for record in results["growth"]})
        rows += [(f"{label}, {size} MiB", column(results["growth"], key, memory_mib=size)) for size in sizes]
    stats.print_table("rvmm to first KVM_RUN by guest memory", "ms", rows)
    print_stages([r for r in starts if r["monitor"] == "rvmm" and r["guest"] == "Linux"])

    rows = []
    for key, label in (("rss_kib", "RSS"), ("private_kib", "private"), ("private_dirty_kib", "private dirty")):
        for name in names:
            values = [value / 1024 for value in column(results["memory"], key, monitor=name)]
            rows.append((f"{name}, {label}", values))
    stats.print_table(f"memory outside guest RAM, {MEMORY_MIB} MiB guest, Linux booting", "MiB", rows)

    if results["boots"]:
        rows = []
        for key, label in (("first_process_s", "wall"), ("first_process_cpu_s", "CPU")):
            rows += [(f"{name}, {label}", column(results["boots"], key, monitor=name)) for name in names]
        stats.print_table(f"process start to first user process, {MEMORY_MIB} MiB, 1 vCPU, quiet", "s", rows)
        for name in names:
            boots = [r for r in results["boots"] if r["monitor"] == name]
            print(f"{name}: {sum(not r.get('failed') for r in boots)} of {len(boots)} boots reached the command's end")
        if len(names) > 1 and facts["kvm_kind"] == "pvm":
            print("QEMU's guest runs with noxsave: QEMU cannot carry out XSAVE where KVM's emulator lacks it.")


def print_stages(records):
    """Medians of the timeline's stages and of KVM's calls."""
    rows = [("before main (exec, loading)", column(records, "before_main_ms"))]
    before = None
    for name in [moment["name"] for moment in records[0]["moments"] if moment["name"] != "ended"]:
        here = [next(m["wall_us"] for m in r["moments"] if m["name"] == name) / 1e3 for r in records]
        rows.append((f"to: {name}", [b - a for a, b in zip(before or [0] * len(here), here)]))
        before = here
    calls = [call["name"] for call in records[0]["kvm_calls"]]
    for name in calls:
        found = [next(c for c in r["kvm_calls"] if c["name"] == name) for r in records]
        rows.append((f"  {name} x {found[0]['count']}", [c["wall_ns"] / 1e6 for c in found]))
    stats.print_table("where rvmm's start goes, wall", "ms", rows)


def main():
    options = arguments()
    # So that what is to be done at the end is done then, too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if os.geteuid() != 0 and options.nice < 0:
        fail("a negative --nice needs root")
    if options.nice:
        os.nice(options.nice)
    bench = Bench(options)
    with tempfile.TemporaryDirectory(prefix="rvmm-bench-") as folder:
        tiny_kernel = f"{folder}/tiny.elf"
        with open(tiny_kernel, "wb") as file:
            file.write(tiny_guest.elf())
        bench.starts(tiny_kernel)
        bench.memory()
        bench.boots()
    bench.facts["load_average_after"] = list(os.getloadavg())
    report(bench)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(bench.results, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
