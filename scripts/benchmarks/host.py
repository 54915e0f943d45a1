# SPDX-License-Identifier: Apache-2.0
"""What every figure is printed with: the machine, its KVM, the program's version."""

import datetime
import json
import os
import platform
import subprocess


def output(*command, cwd=None):
    """First line that a command prints, or an empty string."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=60)
    except OSError:
        return ""
    return result.stdout.partition("\n")[0].strip()


def kvm_kind(rvmm):
    """What `rvmm doctor` finds: pvm, hardware, nested, …"""
    result = subprocess.run([rvmm, "doctor", "--json"], capture_output=True, text=True, timeout=60)
    try:
        return json.loads(result.stdout).get("kvm_kind") or "unknown"
    except ValueError:
        return "unknown"


def memory_bytes():
    """Memory of this host."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def facts(project, rvmm, qemu):
    """All of it, as a plain dictionary."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "unknown")
    commit = output("git", "describe", "--always", "--dirty", "--abbrev=12", cwd=project)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": f"{os.cpu_count()} x {model}",
        "memory_gib": round(memory_bytes() / (1 << 30), 1),
        "host_kernel": platform.release(),
        "kvm_kind": kvm_kind(rvmm),
        "commit": commit or "unknown",
        "rvmm": output(rvmm, "--version"),
        "rvmm_bytes": os.path.getsize(rvmm),
        "qemu": output(qemu, "--version") if qemu else None,
        "load_average": list(os.getloadavg()),
    }
