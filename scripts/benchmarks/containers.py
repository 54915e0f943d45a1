# SPDX-License-Identifier: Apache-2.0
"""What it costs to start a native container, beside other runtimes: busybox's `true`, from exec to the last clean-up.

Two groups, all in turn. Runtimes get the same specification and the same plain directory as root file system; rvmm's part
there is the test driver, one process for each container: its reading of a configuration and making of a specification
count, its command line and supervisor do not. With --overlay it also mounts and unmounts an overlay, which the others
cannot. Engines are the whole command `run --rm --network none IMAGE true` of rvmm, Docker and Podman: they look an image
up, put its layers together, and remove everything.
"""

import argparse
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import host
import stats

PROJECT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
# for one command
LIMIT_SECONDS = 60


def arguments():
    parser = argparse.ArgumentParser(prog="scripts/bench containers", description=__doc__)
    parser.add_argument("--runs", type=int, default=50, metavar="N", help="containers of each kind (default 50)")
    parser.add_argument("--overlay", action="store_true", help="let rvmm mount an overlay, as it does for images")
    parser.add_argument("--rvmm", metavar="FILE", help="the program (default: target/release/rvmm)")
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


def image(directory):
    """An archive that every engine loads, with busybox in one layer."""
    path = f"{directory}/bench.tar"
    rootfs, work = f"{directory}/layer", f"{directory}/archive"
    os.makedirs(work)
    os.makedirs(rootfs)
    root_file_system(rootfs)
    subprocess.run(["tar", "-C", rootfs, "--owner=0", "--group=0", "--mtime=@1", "-cf", f"{work}/layer.tar", "."], check=True)
    with open(f"{work}/layer.tar", "rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    config = {"architecture": "amd64", "os": "linux", "config": {"Cmd": ["true"], "Env": ["PATH=/bin"]},
              "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]}}
    manifest = [{"Config": "config.json", "RepoTags": ["bench:latest"], "Layers": ["layer.tar"]}]
    for name, value in (("config.json", config), ("manifest.json", manifest)):
        with open(f"{work}/{name}", "w", encoding="utf-8") as file:
            json.dump(value, file)
    subprocess.run(["tar", "-C", work, "-cf", path, "config.json", "layer.tar", "manifest.json"], check=True)
    return path


def finished(command, input=None, env=None):
    """Status, output and complaints of a command. Files take them, since a runtime may leave a process behind that holds on
    to pipes."""
    with tempfile.TemporaryFile("w+") as told, tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as bad:
        told.write(input or "")
        told.seek(0)
        child = subprocess.Popen(command, stdin=told, stdout=said, stderr=bad, env=env, start_new_session=True)
        try:
            status = child.wait(timeout=LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            raise
        said.seek(0)
        bad.seek(0)
        return status, said.read(), bad.read().strip()


def tried(command, **more):
    """Whether a command succeeds; why not, if not, on standard error."""
    try:
        status, _, complaints = finished(command, **more)
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"skipped: {error}", file=sys.stderr)
        return False
    if status:
        print(f"skipped: {' '.join(command)}: {complaints}", file=sys.stderr)
    return not status


def engines(directory, rvmm):
    """Commands that run a container from an image, by name, and the daemon that must be ended."""
    archive = image(directory)
    found, daemon = {}, None
    environment = dict(os.environ, RVMM_ROOT=f"{directory}/rvmm/data", RVMM_RUN_ROOT=f"{directory}/rvmm/run")
    if tried([rvmm, "load", "-q", "-i", archive], env=environment):
        found["rvmm run"] = ([rvmm, "run", "--rm", "--network", "none", "bench", "true"], environment)
    if shutil.which("podman"):
        podman = ["podman", "--root", f"{directory}/podman", "--runroot", f"{directory}/podman-run",
                  "--cgroup-manager", "cgroupfs", "--events-backend", "none", "--log-level", "error"]
        run = podman + ["run", "--rm", "--network", "none", "--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1000:1000",
                        "localhost/bench:latest", "true"]
        if tried(podman + ["load", "-q", "-i", archive]) and tried(run):
            found["podman run"] = (run, None)
    if shutil.which("dockerd"):
        socket = f"unix://{directory}/docker.sock"
        daemon = subprocess.Popen(
            ["dockerd", "--iptables=false", "--bridge=none", "--data-root", f"{directory}/docker", "--exec-root",
             f"{directory}/docker-run", "--pidfile", f"{directory}/docker.pid", "-H", socket],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        docker = ["docker", "-H", socket]
        for _ in range(100):
            if not subprocess.run(docker + ["version"], capture_output=True, check=False).returncode:
                break
            time.sleep(0.2)
        run = docker + ["run", "--rm", "--network", "none", "bench", "true"]
        if tried(docker + ["load", "-q", "-i", archive]) and tried(run):
            found["docker run"] = (run, None)
    return found, daemon


def cpu_ms():
    """Processor time of all children that have ended, and of theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (usage.ru_utime + usage.ru_stime) * 1000


def timed(command, **more):
    """Milliseconds by the clock and of processors, and the output."""
    before_ms = cpu_ms()
    begin = time.perf_counter()
    status, output, complaints = finished(command, **more)
    took_ms = (time.perf_counter() - begin) * 1000
    if status:
        fail(f"{' '.join(command)}: {complaints or output}")
    return took_ms, cpu_ms() - before_ms, output


def main():
    options = arguments()
    private_mounts()
    driver = os.path.abspath(options.driver or f"{PROJECT}/target/release/examples/native")
    rvmm = os.path.abspath(options.rvmm or f"{PROJECT}/target/release/rvmm")
    for path in (driver, rvmm):
        if not os.path.exists(path):
            print(f"skipped: there is no {path}", file=sys.stderr)
    # In memory: an engine's time is not to be the disk's.
    with tempfile.TemporaryDirectory(prefix="rvmm-bench-", dir="/dev/shm") as directory:
        daemon = None
        try:
            found, daemon = engines(directory, rvmm)
            measure(options, driver, rvmm, directory, found)
        finally:
            if daemon:
                daemon.terminate()
                daemon.wait()


def measure(options, driver, rvmm, directory, found):
    rootfs = f"{directory}/root"
    root_file_system(rootfs)
    setup = {"directory": f"{directory}/bundle", "layers": [rootfs] if options.overlay else [],
             "config": configuration(), "host_network": False, "volumes": {}, "filters": f"{directory}/filters"}
    plain = dict(setup, layers=[], rootfs=rootfs)
    if not options.overlay:
        setup = plain
    os.mkdir(setup["directory"])
    kinds = {}
    if os.path.exists(driver):
        subprocess.run([driver, "bundle"], input=json.dumps(plain) + "\n", text=True, check=True)
        kinds["rvmm's driver"] = lambda _: timed([driver, "bench", "1"], input=json.dumps(setup) + "\n")
    else:
        subprocess.run(["runc", "spec", "--bundle", setup["directory"]], check=True)
        with open(f"{setup['directory']}/config.json", encoding="utf-8") as file:
            spec = json.load(file)
        spec["process"].update(args=["true"], terminal=False, env=["PATH=/bin"])
        spec["process"].pop("rlimits", None)
        spec["root"] = {"path": rootfs}
        with open(f"{setup['directory']}/config.json", "w", encoding="utf-8") as file:
            json.dump(spec, file)
    for name in ("crun", "runc", "youki"):
        run = [name, "run", "--bundle", setup["directory"]]
        if tried(run + [f"bench-{os.getpid()}"]):
            if name == "youki":
                # It leaves what has ended.
                subprocess.run([name, "delete", "--force", f"bench-{os.getpid()}"], capture_output=True, check=False)
                command = 'youki run --bundle "$1" "$2"; youki delete --force "$2"'
                kinds["youki run + delete"] = lambda number, bundle=setup["directory"]: timed(
                    ["sh", "-c", command, "sh", bundle, f"bench-{os.getpid()}-{number}"])
            else:
                kinds[name] = lambda number, run=run: timed(run + [f"bench-{os.getpid()}-{number}"])
    for name, (run, environment) in found.items():
        kinds[name] = lambda _, run=run, environment=environment: timed(run, env=environment)
    times = {name: [] for name in kinds}
    processors = {name: [] for name in kinds}
    steps = {}
    for number in range(options.runs + 1):
        for name, run in list(kinds.items()):
            try:
                took_ms, used_ms, output = run(number)
            except subprocess.TimeoutExpired:
                print(f"left out: {name}: a run did not end within {LIMIT_SECONDS} s", file=sys.stderr)
                del kinds[name], times[name], processors[name]
                continue
            if number == 0:
                # The first of each kind reads its files from the disk.
                continue
            times[name].append(took_ms)
            processors[name].append(used_ms)
            if name == "rvmm's driver":
                names, values = (line.split() for line in output.splitlines())
                for step, value in zip(names, values):
                    steps.setdefault(step, []).append(int(value) / 1000)
    if os.path.exists(rvmm):
        for key, value in host.facts(PROJECT, rvmm, None).items():
            if value is not None:
                print(f"{key}: {value}")
    stats.print_table("a container's `true`", "ms", list(times.items()))
    stats.print_table("processor time of it", "ms", list(processors.items()))
    if steps:
        stats.print_table("the driver's steps", "ms", list(steps.items()))
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"times_ms": times, "processor_ms": processors, "steps_ms": steps, "load_average": os.getloadavg()}, file, indent=1)


if __name__ == "__main__":
    main()
