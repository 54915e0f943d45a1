# SPDX-License-Identifier: Apache-2.0
"""Starts of one image behind every wall: `busybox true` from the command to its end, in turn, image present, no network.

Native rvmm, crun on the same root file system, Docker and Podman where they are; rvmm's microVM whose guest boots (cold), which
goes on from a template (restored), and QEMU's microvm machine with the same kernel, which runs `true` as its first program.
The microVMs' time to the agent's first answer, and until the guest is set up, is told apart: on some hosts one program in
the guest costs more than a whole native start.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile

import containers
import host
import stats
from monitors import Guest, Qemu, Rvmm, pvm_additions

PROJECT = containers.PROJECT
# On a busy host a guest of an emulated kernel takes its time.
LIMIT_SECONDS = 300
MEMORY_MIB = 512


def arguments():
    parser = argparse.ArgumentParser(prog="scripts/bench start", description=__doc__)
    parser.add_argument("--runs", type=int, default=100, metavar="N", help="starts of each kind (default 100)")
    parser.add_argument("--answers", type=int, metavar="N", help="microVMs whose parts are looked at (default: a tenth of the runs)")
    parser.add_argument("--only", metavar="NAMES", help="kinds whose names contain one of these words, with commas between them")
    parser.add_argument("--rvmm", metavar="FILE", help="the program (default: target/release/rvmm)")
    parser.add_argument("--json", metavar="FILE", help="write everything that was measured to FILE")
    return parser.parse_args()


class MicroVm:
    """rvmm's microVM, started one way or the other."""

    def __init__(self, rvmm, environment, template):
        self.rvmm, self.environment = rvmm, environment
        self.flags = ["--isolation", "microvm", "--template", template, "--network", "none"]

    def command(self):
        return [self.rvmm, "run", "--rm"] + self.flags + ["bench", "true"]

    def parts_ms(self):
        """Milliseconds to the agent's answer, to a guest that is set up, and to the program's start."""
        run = [self.rvmm, "run", "-d"] + self.flags + ["bench", "busybox", "sleep", "1000"]
        took_ms, _, output = containers.timed(run, env=self.environment)
        name = output.strip()
        sandbox = f"{self.environment['RVMM_RUN_ROOT']}/sandboxes/{name[:24]}/started.json"
        with open(sandbox, encoding="utf-8") as file:
            started = json.load(file)
        subprocess.run([self.rvmm, "rm", "-f", name], env=self.environment, capture_output=True, check=True)
        return {"answer": started["answer-us"] / 1000, "set up": started["ready-us"] / 1000, "program runs": took_ms}


def qemu_command(kind, rvmm):
    """QEMU's microvm machine with a program as its first and only process."""
    qemu = Qemu.find()
    if not qemu:
        return None
    pvm = kind == "pvm"
    kernel = f"{PROJECT}/target/guest/{'vmlinux-pvm' if pvm else 'vmlinux'}"
    rootfs = f"{PROJECT}/target/guest/rootfs.ext4"
    if not (os.path.exists(kernel) and os.path.exists(rootfs)):
        print("skipped: QEMU microvm: there are no guest's kernel and root file system; scripts/setup makes them", file=sys.stderr)
        return None
    machine = Qemu(qemu, pvm)
    guest = Guest(kernel, MEMORY_MIB, rootfs, "quiet init=/bin/true", pvm_additions(Rvmm(rvmm)) if pvm else "")
    return machine.command(guest)


def crun_command(directory):
    """crun on the same files as a plain directory."""
    if not shutil.which("crun"):
        return None
    bundle = f"{directory}/crun"
    os.makedirs(bundle)
    containers.root_file_system(f"{bundle}/rootfs")
    subprocess.run(["crun", "spec", "-b", bundle], check=True)
    path = f"{bundle}/config.json"
    with open(path, encoding="utf-8") as file:
        spec = json.load(file)
    spec["process"].update(args=["true"], terminal=False, env=["PATH=/bin"])
    with open(path, "w", encoding="utf-8") as file:
        json.dump(spec, file)
    return ["crun", "run", "--bundle", bundle, f"start-{os.getpid()}"]


def kinds(directory, rvmm, kind):
    """Commands by name, with their environment, and what of them are rvmm's microVMs; and a daemon that must be ended."""
    engines, daemon = containers.engines(directory, rvmm)
    environment = dict(os.environ, RVMM_ROOT=f"{directory}/rvmm/data", RVMM_RUN_ROOT=f"{directory}/rvmm/run")
    found = {"rvmm native": engines.pop("rvmm run", None)}
    crun = crun_command(directory)
    found["crun"] = (crun, None) if crun else None
    found |= engines
    microvms = {"microVM restored": MicroVm(rvmm, environment, "require"), "microVM cold": MicroVm(rvmm, environment, "never")}
    found |= {name: (microvm.command(), environment) for name, microvm in microvms.items()}
    qemu = qemu_command(kind, rvmm)
    found["QEMU microvm"] = (qemu, None) if qemu else None
    return {name: run for name, run in found.items() if run}, microvms, daemon


def print_ratios(times):
    """Quantiles, and how they stand to the native start."""
    base = times.get("rvmm native")
    width = max(map(len, times)) + 2
    print(f"\n{'start to end, ms':<{width}}{'n':>6}{'p50':>10}{'p99':>10}{'/native':>10}")
    for name, values in times.items():
        if not values:
            continue
        ratio = f"{stats.quantile(values, 0.5) / stats.quantile(base, 0.5):.2f}" if base else ""
        print(f"{name:<{width}}{len(values):>6}{stats.quantile(values, 0.5):>10.1f}{stats.quantile(values, 0.99):>10.1f}{ratio:>10}")


def measure(options, found, microvms):
    times = {name: [] for name in found}
    for number in range(options.runs + 1):
        for name, (command, environment) in list(found.items()):
            try:
                took_ms, _, _ = containers.timed(command, env=environment)
            except subprocess.TimeoutExpired:
                print(f"left out: {name}: a start did not end within {LIMIT_SECONDS} s", file=sys.stderr)
                del found[name]
                continue
            # The first of each kind reads its files, and makes the template.
            if number > 0:
                times[name].append(took_ms)
    parts = {}
    answers = options.answers if options.answers is not None else max(1, options.runs // 10)
    for _ in range(answers):
        for name, microvm in microvms.items():
            if name in found:
                for part, value in microvm.parts_ms().items():
                    parts.setdefault(f"{name}: {part}", []).append(value)
    return times, parts


def main():
    options = arguments()
    containers.private_mounts()
    containers.LIMIT_SECONDS = LIMIT_SECONDS
    rvmm = os.path.abspath(options.rvmm or f"{PROJECT}/target/release/rvmm")
    if not os.path.exists(rvmm):
        containers.fail(f"there is no {rvmm}")
    facts = host.facts(PROJECT, rvmm, Qemu.find())
    # In memory: an engine's time is not to be the disk's.
    with tempfile.TemporaryDirectory(prefix="rvmm-start-", dir="/dev/shm") as directory:
        daemon = None
        try:
            found, microvms, daemon = kinds(directory, rvmm, facts["kvm_kind"])
            if options.only:
                words = options.only.split(",")
                found = {name: run for name, run in found.items() if any(word in name for word in words)}
            times, parts = measure(options, found, microvms)
        finally:
            if daemon:
                daemon.terminate()
                daemon.wait()
    for key, value in facts.items():
        if value is not None:
            print(f"{key}: {value}")
    print_ratios(times)
    cold, restored = times.get("microVM cold"), times.get("microVM restored")
    if cold and restored:
        print(f"\ncold / restored: {stats.quantile(cold, 0.5) / stats.quantile(restored, 0.5):.2f}")
    if parts:
        stats.print_table("parts of a microVM's start", "ms", list(parts.items()))
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"host": facts, "times_ms": times, "parts_ms": parts}, file, indent=1)


if __name__ == "__main__":
    main()
