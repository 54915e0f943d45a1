# SPDX-License-Identifier: Apache-2.0
"""How long it takes to save a VM and to let it go on: to the first KVM_RUN, and to the guest's answer over a device."""

import argparse
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time

import host
import stats
import tiny_guest
import tracing
from monitors import Process

PROJECT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SIZES_MIB = (128, 512, 2048)
BOOT_LIMIT_S = 300
ANSWER_LIMIT_S = 60
ECHO_PORT = 7
# The first presses the power button, the second ends the VM.
END_SIGNALS = (signal.SIGTERM,) * 6
SCRIPT = """dmesg -n 1
/usr/lib/rvmm/tests/vsock echo 7 &
echo guest is ready
wait
"""


def arguments():
    parser = argparse.ArgumentParser(prog="scripts/bench snapshot", description=__doc__)
    parser.add_argument("--runs", type=int, default=20, metavar="N", help="restores of each kind (default 20)")
    parser.add_argument("--saves", type=int, default=10, metavar="N", help="snapshots of each guest (default 10)")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES_MIB)), metavar="MIB,…", help="guest memory (default %(default)s)")
    parser.add_argument("--no-linux", action="store_true", help="tiny guests alone")
    parser.add_argument("--json", metavar="FILE", help="write everything that was measured to FILE")
    parser.add_argument("--rvmm", metavar="FILE", help="the binary (default: target/release/rvmm, which is built first)")
    parser.add_argument("--kernel", metavar="FILE", help="ELF kernel (default: the one in target/guest for this host)")
    return parser.parse_args()


def fail(text):
    sys.exit(f"bench: {text}")


def now():
    return time.clock_gettime(time.CLOCK_MONOTONIC)


class HttpUnix(http.client.HTTPConnection):
    """HTTP through a unix socket."""

    def __init__(self, path):
        super().__init__("localhost", timeout=ANSWER_LIMIT_S)
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


def put(path, where, body):
    """A request that must succeed."""
    connection = HttpUnix(path)
    connection.request("PUT", where, json.dumps(body))
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    if answer.status >= 300:
        fail(f"PUT {where}: {answer.status} {text}")


class Saved:
    """A guest of one kind and size that has been saved."""

    def __init__(self, bench, kind, memory_mib):
        self.bench, self.kind, self.memory_mib = bench, kind, memory_mib
        self.place = f"{bench.folder}/{kind}-{memory_mib}"
        os.mkdir(self.place)
        self.saves_ms = []

    def save(self):
        """Boots the guest and saves it, often."""
        bench, api = self.bench, f"{self.place}/api"
        command = [bench.rvmm, "--memory", f"{self.memory_mib}M", "--api-socket", api, "--log-level", "error"]
        if self.kind == "tiny":
            command += ["--kernel", bench.tiny_kernel]
        else:
            command += ["--kernel", bench.kernel, "--rootfs", f"{bench.rootfs},readonly", "--rng", "--balloon"]
            command += ["--disk", f"{bench.script},readonly", "--vsock", f"cid=9,socket={self.place}/first"]
            command += ["--cmdline", 'quiet rvmm.exec="sh /dev/vdb"']
        process = Process(command)
        ready = b"guest is ready" if self.kind == "Linux" else b"x"
        seen = b""
        while ready not in seen:
            piece = process.popen.stdout.read1(4096)
            if not piece:
                fail(f"the guest does not start:\n{process.collect(20)}")
            seen += piece
        if self.kind == "Linux":
            # Until everything that the answer takes has been used once.
            answer(f"{self.place}/first")
        for _ in range(self.bench.options.saves):
            start = now()
            put(api, "/snapshot/create", {"snapshot_path": f"{self.place}/snapshot/state"})
            self.saves_ms.append((now() - start) * 1e3)
        process.kill()

    def restore(self):
        """One restore, to the guest's answer."""
        tracer = self.bench.tracer
        if tracer:
            tracer.begin()
        command = [self.bench.rvmm, "restore", f"{self.place}/snapshot", "--timeline=json", "--log-level", "error"]
        if self.kind == "Linux":
            command += ["--vsock", f"{self.place}/vsock"]
        reader, writer = os.pipe()
        os.write(writer, b"q")
        process = Process(command, stdin=reader)
        os.close(reader)
        os.close(writer)
        if self.kind == "tiny":
            if process.popen.stdout.read(1) != b"y":
                fail(f"the tiny guest does not go on:\n{process.collect(20)}")
        else:
            answer(f"{self.place}/vsock")
        answer_s = now()
        seen = None
        if tracer:
            tracer.end()
            seen = tracer.look(process.pid)
        log = process.collect(20) if self.kind == "tiny" else process.stop(END_SIGNALS)
        found = next((json.loads(line) for line in reversed(log.splitlines()) if line.startswith("{")), None)
        if found is None:
            fail(f"rvmm printed no timeline:\n{log}")
        begin_s = seen.exec_s if seen else process.start_s
        before_ms = found["start_monotonic_ns"] / 1e6 - begin_s * 1e3
        at = {moment["name"]: moment["wall_us"] / 1e3 for moment in found["moments"]}
        record = {"kind": self.kind, "memory_mib": self.memory_mib, "answer_ms": (answer_s - begin_s) * 1e3}
        record["run_ms"] = seen.wall_ms if seen else before_ms + at["first KVM_RUN"]
        record["cpu_ms"] = seen.cpu_ms if seen else None
        record["kvm_ms"] = sum(call["wall_ns"] for call in found["kvm_calls"]) / 1e6
        return record | {"before_main_ms": before_ms, "moments": found["moments"]}


def answer(path):
    """Connects to the guest's echo through vsock, sends a byte, and waits for it to come back."""
    deadline = now() + ANSWER_LIMIT_S
    while now() < deadline:
        stream = socket.socket(socket.AF_UNIX)
        stream.settimeout(ANSWER_LIMIT_S)
        try:
            stream.connect(path)
        except OSError:
            time.sleep(0.0002)
            continue
        seen = b""
        try:
            stream.sendall(f"CONNECT {ECHO_PORT}\nz".encode())
            while not seen.endswith(b"\nz"):
                piece = stream.recv(64)
                if not piece:
                    break
                seen += piece
        except ConnectionError:
            # Nobody listens in the guest yet.
            time.sleep(0.01)
        stream.close()
        if seen.endswith(b"\nz"):
            return
    fail("the guest does not answer")


class Bench:
    """Everything that the measurements share."""

    def __init__(self, options, folder):
        self.options, self.folder = options, folder
        self.rvmm = os.path.abspath(options.rvmm or f"{PROJECT}/target/release/rvmm")
        self.facts = host.facts(PROJECT, self.rvmm, None)
        is_pvm = self.facts["kvm_kind"] == "pvm"
        self.kernel = os.path.abspath(options.kernel or f"{PROJECT}/target/guest/{'vmlinux-pvm' if is_pvm else 'vmlinux'}")
        self.rootfs = f"{PROJECT}/target/guest/rootfs-test.ext4"
        needed = [self.rvmm] if options.no_linux else [self.rvmm, self.kernel, self.rootfs]
        for path in needed:
            if not os.path.exists(path):
                fail(f"there is no {path}: run scripts/setup and scripts/build-rootfs --test")
        subprocess.run(["sync", self.rvmm], check=True)
        self.tiny_kernel, self.script = f"{folder}/tiny.elf", f"{folder}/script"
        with open(self.tiny_kernel, "wb") as file:
            file.write(tiny_guest.elf(waits=True))
        with open(self.script, "w", encoding="ascii") as file:
            file.write(SCRIPT + "\n" * (-len(SCRIPT) % 512))
        try:
            self.tracer = tracing.Tracer()
        except tracing.Unavailable as error:
            self.tracer = None
            print(f"bench: rvmm's own timeline is used, since tracefs cannot be: {error}", file=sys.stderr)

    def run(self):
        kinds = ["tiny"] if self.options.no_linux else ["tiny", "Linux"]
        sizes = [int(size) for size in self.options.sizes.split(",")]
        guests = [Saved(self, kind, size) for kind in kinds for size in sizes]
        for guest in guests:
            guest.save()
            progress(f"{guest.kind} of {guest.memory_mib} MiB saved")
        records = []
        for run in range(self.options.runs):
            turn = run % len(guests)
            for guest in guests[turn:] + guests[:turn]:
                records.append(guest.restore() | {"run": run})
            progress(f"restore {run + 1} of {self.options.runs}")
        return guests, records


def progress(text):
    if sys.stderr.isatty():
        print(f"\r\033[Kbench: {text}", end="", file=sys.stderr, flush=True)


def report(facts, guests, records):
    """Prints what was measured."""
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    for key, value in facts.items():
        print(f"{key:>18}  {' '.join(f'{n:.2f}' for n in value) if isinstance(value, list) else value}")
    names = [(guest.kind, guest.memory_mib) for guest in guests]

    def rows(key):
        found = []
        for kind, size in names:
            values = [r[key] for r in records if (r["kind"], r["memory_mib"]) == (kind, size)]
            found.append((f"{kind}, {size} MiB", values))
        return found

    stats.print_table("restore: process start to first KVM_RUN", "ms", rows("run_ms"))
    stats.print_table("of it on a processor", "ms", rows("cpu_ms"))
    stats.print_table("of it in KVM's calls", "ms", rows("kvm_ms"))
    stats.print_table("restore: process start to the guest's answer", "ms", rows("answer_ms"))
    saves = [(f"{guest.kind}, {guest.memory_mib} MiB", guest.saves_ms) for guest in guests]
    stats.print_table("create: request to answer, files durable", "ms", saves)
    for kind, size in names:
        chosen = [r for r in records if (r["kind"], r["memory_mib"]) == (kind, size)]
        print_stages(f"where a restore goes, {kind} of {size} MiB", chosen)


def print_stages(title, records):
    """Medians of the timeline's stages."""
    rows = [("before main (exec, loading)", [r["before_main_ms"] for r in records])]
    before = [0] * len(records)
    for name in [m["name"] for m in records[0]["moments"]]:
        here = [next((m["wall_us"] for m in r["moments"] if m["name"] == name), 0) / 1e3 for r in records]
        rows.append((f"to: {name}", [b - a for a, b in zip(before, here)]))
        before = here
        if name == "first KVM_RUN":
            break
    stats.print_table(title, "ms", rows)


def main():
    options = arguments()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="rvmm-bench-") as folder:
        bench = Bench(options, folder)
        guests, records = bench.run()
        bench.facts["load_average_after"] = list(os.getloadavg())
        report(bench.facts, guests, records)
        if options.json:
            saves = [{"kind": g.kind, "memory_mib": g.memory_mib, "saves_ms": g.saves_ms} for g in guests]
            with open(options.json, "w", encoding="utf-8") as file:
                json.dump({"host": bench.facts, "restores": records, "saves": saves}, file, indent=1)
                file.write("\n")


main()
