#!/usr/bin/env python3
"""Which system calls each kind of thread of rvmm makes once its walls are up, counted in a trace.

Usage: syscalls.py [--learn] [--against FILE] -- RVMM ARGUMENT...

Runs a debug build under strace. With --learn, calls that are not in the lists are made and counted too, instead of ending
the VM. With --against docs/security.md, each call that was counted must stand in the table of its thread.
"""

import argparse
import collections
import os
import re
import subprocess
import sys
import tempfile

KINDS = [
    (re.compile(r"^vcpu\d+$"), "vCPU"),
    (re.compile(r"^launcher$"), "launcher"),
    (re.compile(r"^console$"), "console"),
    (re.compile(r"^api$"), "api"),
    (re.compile(r"^rvmm-keeper$"), "keeper"),
    (re.compile(r"^virtio1$"), "virtio-net"),
    (re.compile(r"^virtio2$"), "virtio-block"),
    (re.compile(r"^virtio3$"), "virtio-console"),
    (re.compile(r"^virtio4$"), "virtio-rng"),
    (re.compile(r"^virtio5$"), "virtio-balloon"),
    (re.compile(r"^virtio19$"), "virtio-vsock"),
    (re.compile(r"^virtio26$"), "virtio-fs"),
    (re.compile(r"^rvmm$"), "main"),
]
LINE = re.compile(r"^(\d+)<([^>]*)> (\w+)\((.*)$")


def kind_of(name):
    return next((kind for pattern, kind in KINDS if pattern.match(name)), None)


def counted(trace):
    """Calls by kind of thread, of each thread after its last filter was set."""
    last_filter, calls = {}, []
    with open(trace, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines):
            found = LINE.match(line)
            if not found:
                continue
            thread, name, call, rest = found.groups()
            calls.append((number, thread, name, call, rest))
            if call in ("seccomp", "prctl") and "SECCOMP" in rest:
                last_filter[thread] = number
    result = collections.defaultdict(collections.Counter)
    for number, thread, name, call, rest in calls:
        kind = kind_of(name)
        if kind and number > last_filter.get(thread, float("inf")):
            detail = re.search(r", (\w+(?: or \w+)*|0x[0-9a-f]+)", rest) if call == "ioctl" else None
            result[kind][call + (" " + detail.group(1) if detail else "")] += 1
    return result


def documented(path):
    """Calls by kind of thread, from the tables of the documentation."""
    tables, kind = collections.defaultdict(set), None
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            heading = re.match(r"^#+ Calls: (.*)$", line)
            if heading:
                kind = heading.group(1).strip()
            row = re.match(r"^\| `(\w+)`", line)
            if kind and row:
                tables[kind].add(row.group(1))
    return tables


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--learn", action="store_true")
    parser.add_argument("--against")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        trace = os.path.join(directory, "trace")
        environment = dict(os.environ)
        if options.learn:
            environment["RVMM_SANDBOX_LEARN"] = "1"
        command = ["strace", "-f", "-Y", "-qq", "-o", trace, *options.command]
        status = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, check=False).returncode
        result = counted(trace)
    wrong = []
    tables = documented(options.against) if options.against else {}
    for kind in sorted(result):
        print(f"{kind}: {len({call.split()[0] for call in result[kind]})} calls")
        for call, count in result[kind].most_common():
            print(f"  {count:8} {call}")
        if options.against:
            known = set().union(*(calls for name, calls in tables.items() if name.startswith(kind)))
            if kind.startswith("virtio"):
                known |= tables["every device"]
            wrong += [f"{kind}: {call}" for call in result[kind] if call.split()[0] not in known]
    for line in wrong:
        print(f"not documented: {line}", file=sys.stderr)
    return 1 if wrong else status


if __name__ == "__main__":
    sys.exit(main())
