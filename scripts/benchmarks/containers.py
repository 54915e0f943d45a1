# SPDX-License-Identifier: Apache-2.0
"""What it costs to start a native container, beside other runtimes: busybox's `true`, from exec to the last clean-up.

All get the same specification and the same plain directory as root file system, and are run in turn. rvmm is the test
driver, one process for each container: its reading of a configuration and making of a specification count, its command
line and supervisor do not. With --overlay rvmm also mounts and unmounts an overlay, which the others cannot.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time

import stats

PROJECT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def arguments():
    parser = argparse.ArgumentParser(prog="scripts/bench containers", description=__doc__)
    parser.add_argument("--runs", type=int, default=50, metavar="N", help="containers of each kind (default 50)")
    parser.add_argument("--overlay", action="store_true", help="let rvmm mount an overlay, as it does for images")
    parser.add_argument("--driver", metavar="FILE", help="the driver (default: target/release/examples/native)")
    parser.add_argument("--json", metavar="FILE", help="write everything that was measured to FILE")
    return parser.parse_args()


def fail(text):
    sys.exit(f"bench: {text}")


def configuration():
    """A container as `rvmm` writes it; what is left out has no default there."""
    return {
        "id": "be" * 32, "name": "bench", "created-ns": 0, "isolation": "native", "image": "busybox",
        "image-id": "sha256:0", "hostname": None, "mounts": [], "read-only": False, "devices": [], "sysctls": {},
        "process": {"args": ["true"], "env": [], "cwd": "/", "user": "", "groups": [], "terminal": False,
                    "stdin": False, "init": False, "rlimits": []},
        "limits": {"memory-bytes": None, "memory-swap-bytes": None, "memory-reservation-bytes": None,
                   "cpu-millis": None, "cpu-shares": None, "cpuset": None, "pids": None, "io-weight": None, "io": [],
                   "shm-bytes": None, "disk-bytes": None},
        "security": {"privileged": False, "cap-add": [], "cap-drop": [], "seccomp": "default",
                     "no-new-privileges": False, "unmask": False},
        "network": {"mode": "none", "ports": [], "dns": [], "dns-search": [], "dns-options": [], "hosts": []},
        "restart": "no", "auto-remove": True, "stop-signal": "TERM", "stop-timeout": {"secs": 10, "nanos": 0},
        "health": None, "labels": {}, "secrets": [],
    }


def root_file_system(path):
    for name in ("bin", "dev", "etc", "proc", "sys", "tmp"):
        os.makedirs(f"{path}/{name}")
    shutil.copy(shutil.which("busybox"), f"{path}/bin/busybox")
    os.symlink("busybox", f"{path}/bin/true")


def private_mounts():
    """Runs this in a mount namespace without a version 2 hierarchy beside version 1, in which crun refuses to work."""
    mounts = open("/proc/self/mounts", encoding="utf-8").read()
    if " /sys/fs/cgroup/unified cgroup2 " in mounts and "BENCH_INSIDE" not in os.environ:
        os.environ["BENCH_INSIDE"] = "1"
        inner = ["unshare", "-m", "sh", "-c", 'umount /sys/fs/cgroup/unified && exec "$@"', "sh"]
        os.execvp("unshare", inner + [sys.executable] + sys.argv)


def cpu_ms():
    """Processor time of all children that have ended, and of theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (usage.ru_utime + usage.ru_stime) * 1000


def timed(command, **more):
    """Milliseconds by the clock and of processors, and the output."""
    before_ms = cpu_ms()
    begin = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False, **more)
    took_ms = (time.perf_counter() - begin) * 1000
    if done.returncode:
        fail(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return took_ms, cpu_ms() - before_ms, done.stdout


def main():
    options = arguments()
    private_mounts()
    driver = os.path.abspath(options.driver or f"{PROJECT}/target/release/examples/native")
    if not os.path.exists(driver):
        fail(f"there is no {driver}: cargo build --release --example native")
    with tempfile.TemporaryDirectory(prefix="rvmm-bench-") as directory:
        rootfs = f"{directory}/root"
        root_file_system(rootfs)
        setup = {"directory": f"{directory}/bundle", "layers": [rootfs] if options.overlay else [],
                 "config": configuration(), "host_network": False, "volumes": {}, "filters": f"{directory}/filters"}
        plain = dict(setup, layers=[], rootfs=rootfs)
        if not options.overlay:
            setup = plain
        os.mkdir(setup["directory"])
        subprocess.run([driver, "bundle"], input=json.dumps(plain) + "\n", text=True, check=True)
        kinds = {"rvmm": lambda _: timed([driver, "bench", "1"], input=json.dumps(setup) + "\n")}
        for name in ("crun", "runc", "youki"):
            if shutil.which(name):
                run = [name, "run", "--bundle", setup["directory"]]
                kinds[name] = lambda number, run=run: timed(run + [f"bench-{os.getpid()}-{number}"])
            else:
                print(f"skipped: {name} is not installed", file=sys.stderr)
        times = {name: [] for name in kinds}
        processors = {name: [] for name in kinds}
        steps = {}
        for number in range(options.runs + 1):
            for name, run in kinds.items():
                took_ms, used_ms, output = run(number)
                if number == 0:
                    # The first of each kind reads its files from the disk.
                    continue
                times[name].append(took_ms)
                processors[name].append(used_ms)
                if name == "rvmm":
                    names, values = (line.split() for line in output.splitlines())
                    for step, value in zip(names, values):
                        steps.setdefault(step, []).append(int(value) / 1000)
    stats.print_table("a container's `true`", "ms", list(times.items()))
    stats.print_table("processor time of it", "ms", list(processors.items()))
    stats.print_table("rvmm's steps", "ms", list(steps.items()))
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"times_ms": times, "processor_ms": processors, "steps_ms": steps, "load_average": os.getloadavg()}, file, indent=1)


if __name__ == "__main__":
    main()
