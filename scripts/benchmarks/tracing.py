# SPDX-License-Identifier: Apache-2.0
"""When a process started, when it first entered KVM_RUN, and how long it was on a processor until then.

Told by the kernel's own trace (an ftrace instance that follows this process and its children), so that every monitor is
measured in the same way and from outside.
"""

import atexit
import os
import re
import subprocess
import tempfile

KVM_RUN = 0xAE80
MOUNT_POINTS = ("/sys/kernel/tracing", "/sys/kernel/debug/tracing")

EVENTS = (
    "syscalls/sys_enter_ioctl",
    "syscalls/sys_enter_execve",
    "sched/sched_process_fork",
    "sched/sched_switch",
)

LINE = re.compile(r"^\s*.{1,16}-(\d+)\s+\[\d+\]\s+\S+\s+(\d+\.\d+): (\w+)(.*)$")
FORK = re.compile(r" pid=(\d+) .*child_pid=(\d+)")
SWITCH = re.compile(r"prev_pid=(\d+).*==>.*next_pid=(\d+)")


class Unavailable(Exception):
    """The host does not let us trace."""


class Start:
    """What the trace says of one process."""

    def __init__(self, exec_s, run_s, cpu_s):
        self.exec_s, self.run_s, self.cpu_s = exec_s, run_s, cpu_s

    @property
    def wall_ms(self):
        return (self.run_s - self.exec_s) * 1e3

    @property
    def cpu_ms(self):
        return self.cpu_s * 1e3


class Tracer:
    """An ftrace instance of our own, gone when the program ends."""

    def __init__(self):
        self.mounted = None
        base = next((path for path in MOUNT_POINTS if os.path.isdir(f"{path}/instances")), None)
        if base is None:
            base = tempfile.mkdtemp(prefix="rvmm-bench-tracefs-")
            mount = ["mount", "-t", "tracefs", "nodev", base]
            result = subprocess.run(mount, capture_output=True, text=True)
            if result.returncode:
                os.rmdir(base)
                raise Unavailable(result.stderr.strip())
            self.mounted = base
        atexit.register(self.close)
        self.at = f"{base}/instances/rvmm-bench-{os.getpid()}"
        try:
            os.mkdir(self.at)
            self.put("trace_clock", "mono")
            self.put("options/overwrite", "0")
            self.put("options/event-fork", "1")
            self.put("buffer_size_kb", "4096")
            self.put("set_event_pid", str(os.getpid()))
            self.put("events/syscalls/sys_enter_ioctl/filter", f"cmd == {KVM_RUN:#x}")
            for event in EVENTS:
                self.put(f"events/{event}/enable", "1")
            self.put("tracing_on", "0")
        except OSError as error:
            self.close()
            raise Unavailable(str(error)) from error

    def put(self, name, value):
        with open(f"{self.at}/{name}", "w", encoding="ascii") as file:
            file.write(value)

    def close(self):
        """Removes the instance and what was mounted for it."""
        if os.path.isdir(self.at):
            self.put("tracing_on", "0")
            os.rmdir(self.at)
        if self.mounted:
            subprocess.run(["umount", self.mounted], check=False)
            os.rmdir(self.mounted)
            self.mounted = None

    def begin(self):
        """Forgets what was traced and traces."""
        self.put("trace", "")
        self.put("tracing_on", "1")

    def end(self):
        """Traces no more."""
        self.put("tracing_on", "0")

    def look(self, pid):
        """What is known of process `pid`: a Start, or None if it has not entered KVM_RUN yet."""
        with open(f"{self.at}/trace", encoding="utf-8", errors="replace") as file:
            events = [match.groups() for match in map(LINE.match, file) if match]
        exec_s = run_s = None
        for thread, time, event, _ in events:
            if event.startswith("sys_execve") and int(thread) == pid and exec_s is None:
                exec_s = float(time)
            elif event.startswith("sys_ioctl") and exec_s is not None:
                run_s = float(time)
                break
        if run_s is None:
            return None
        return Start(exec_s, run_s, on_cpu(events, pid, exec_s, run_s))


def on_cpu(events, pid, begin, end):
    """Seconds in which a thread of `pid` was on a processor between `begin` and `end`."""
    threads = {pid}
    since = {pid: begin}
    total = 0.0
    for _, time, event, rest in events:
        time = float(time)
        if not begin <= time <= end:
            continue
        if event == "sched_process_fork":
            parent, child = (int(number) for number in FORK.search(rest).groups())
            threads |= {child} if parent in threads else set()
        elif event == "sched_switch":
            previous, following = (int(number) for number in SWITCH.search(rest).groups())
            if previous in since:
                total += time - since.pop(previous)
            if following in threads:
                since[following] = time
    return total + sum(end - time for time in since.values())
