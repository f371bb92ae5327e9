"""The lab: real processes, cgroups, loop devices, network namespaces. Everything it makes, it undoes, also on failure.

`Lab` is a context manager; each resource registers its own undoing, which runs in reverse order. Only processes that the
lab started are ever ended, by pid. Clean-up goes on after a failed step and reports all failures together at the end.
"""

import contextlib
import errno
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

__all__ = [
    "Actor",
    "Lab",
    "Operation",
    "SlowDisk",
    "Thread",
    "mono_ns",
    "set_nice",
    "wait_until",
]

_HERE = Path(__file__).parent
_DEADLINE_S = 30.0


def mono_ns() -> int:
    """CLOCK_MONOTONIC, the clock of every time in this benchmark."""
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC)


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = _DEADLINE_S) -> None:
    """Polls `condition`. Raises TimeoutError naming `what` after `timeout_s`."""
    limit = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > limit:
            raise TimeoutError(f"waited {timeout_s} s in vain for {what}")
        time.sleep(0.002)


@dataclass(frozen=True, slots=True)
class Operation:
    """One row of the operations file, and what the kernel itself counted meanwhile."""

    operation_id: str
    type: str
    tid: int
    start_mono_ns: int
    end_mono_ns: int
    deadline_ns: int
    outcome: str
    run_delay_ns: int | None = None

    @property
    def duration_ns(self) -> int:
        """How long it took by the victim's own clock."""
        return self.end_mono_ns - self.start_mono_ns

    @property
    def in_time(self) -> bool:
        """Whether nobody is to be blamed."""
        return self.outcome == "ok" and (self.deadline_ns == 0 or self.duration_ns <= self.deadline_ns)


class Thread:
    """One thread of an actor, driven over a socket."""

    def __init__(self, ours: socket.socket) -> None:
        self._socket = ours
        self._reader = ours.makefile("r")
        self.marks: dict[str, int] = {}
        self.operations: list[Operation] = []
        self.errors: list[tuple[str, int]] = []
        self.tgid, self.tid = 0, 0

    def hello(self) -> None:
        """Waits until the thread says who it is."""
        self.tgid, self.tid = (int(w) for w in self._line().split()[1:])

    def send(self, steps: str) -> None:
        """Starts `steps` (separated by ';') without waiting."""
        self._socket.sendall(steps.replace("\n", ";").encode() + b"\n")

    def _line(self, timeout_s: float = _DEADLINE_S) -> str:
        self._socket.settimeout(timeout_s)
        line = self._reader.readline()
        if not line:
            raise BrokenPipeError("the actor has ended")
        return line

    def _take(self, line: str) -> str:
        word, *rest = line.split()
        if word == "mark":
            self.marks[rest[0]] = int(rest[1])
        elif word == "fail":
            self.errors.append((rest[0], int(rest[1])))
        elif word == "op":
            ints = [int(w) for w in rest[2:6]]
            self.operations.append(Operation(rest[0], rest[1], *ints, rest[6], int(rest[7])))
        return word

    def done(self, timeout_s: float = _DEADLINE_S) -> None:
        """Waits for the end of the oldest line sent."""
        while self._take(self._line(timeout_s)) != "done":
            pass

    def run(self, steps: str, timeout_s: float = _DEADLINE_S) -> None:
        """Sends and waits. Raises RuntimeError if a step outside an operation failed."""
        before = len(self.errors)
        self.send(steps)
        self.done(timeout_s)
        if len(self.errors) > before:
            step, code = self.errors[-1]
            raise RuntimeError(f"step {step!r} failed in actor {self.tgid}: {os.strerror(code)}")

    def until_mark(self, name: str, timeout_s: float = _DEADLINE_S) -> int:
        """Waits for a mark of the line under way and returns its time."""
        while name not in self.marks:
            if self._take(self._line(timeout_s)) == "done":
                break
        return self.marks.pop(name)

    def pin(self, cpu: int) -> None:
        """Pins the thread."""
        os.sched_setaffinity(self.tid, {cpu})


@dataclass
class Actor:
    """A started process with its driven threads."""

    name: str
    process: subprocess.Popen[bytes]
    threads: list[Thread]

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    @property
    def main(self) -> Thread:
        """Its first thread."""
        return self.threads[0]

    def pin(self, cpu: int) -> "Actor":
        """Pins all its threads."""
        for thread in self.threads:
            thread.pin(cpu)
        return self

    def kill(self) -> None:
        """Ends it, if it still runs, and reaps it."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGCONT)
            self.process.kill()
        self.process.wait()


@dataclass(frozen=True, slots=True)
class SlowDisk:
    """A loop device whose every request takes a chosen time."""

    device: str
    control: Path
    pid: int

    def set_service_us(self, us: int) -> None:
        """What each request takes from now on."""
        with self.control.open("r+b") as out:
            out.write(struct.pack("<q", us))


@dataclass
class Lab:
    """Context manager; see the module's docstring."""

    keep: Path | None = None
    path: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="kprobe-lab-")))
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _serial: int = 0

    def __enter__(self) -> Self:
        self.path.chmod(0o755)
        self._stack.callback(shutil.rmtree, self.path, ignore_errors=True)
        return self

    def __exit__(self, *args: object) -> None:
        self._stack.close()

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """What is made inside is undone at its end; compiled programs stay."""
        outer, self._stack = self._stack, contextlib.ExitStack()
        try:
            yield
        finally:
            inner, self._stack = self._stack, outer
            inner.close()

    def undo(self, action: Callable[[], object]) -> None:
        """Registers `action` for the end; its failure is reported and does not stop the others."""

        def guarded() -> None:
            try:
                action()
            except (OSError, subprocess.SubprocessError, TimeoutError) as error:
                print(f"accuracy: clean-up failed: {error}", file=sys.stderr)

        self._stack.callback(guarded)

    def unique(self, stem: str) -> str:
        """A name nobody else uses."""
        self._serial += 1
        return f"kp{os.getpid()}-{stem}-{self._serial}"

    # --- processes

    def binary(self, name: str) -> Path:
        """The actor under the name (comm) `name`, compiled at first use."""
        built = self.path / "bin" / "actor"
        if not built.exists():
            built.parent.mkdir(exist_ok=True)
            sources = [str(_HERE / "victims" / name) for name in ("actor.c", "primitives.c")]
            subprocess.run(["gcc", "-O2", "-Wall", "-pthread", "-o", str(built), *sources], check=True, timeout=60)
        named = built.with_name(name)
        if not named.exists():
            shutil.copy(built, named)
        return named

    def actor(self, name: str, threads: int = 1, *, netns: str = "", fds: tuple[int, ...] = (), python: bool = False) -> Actor:
        """Starts a process called `name` with that many driven threads; ended with the scope."""
        pairs = [socket.socketpair() for _ in range(threads)]
        theirs = [b.fileno() for _, b in pairs]
        command = [sys.executable, "-S", "-E", str(_HERE / "victims/actor.py"), name] if python else [str(self.binary(name))]
        if netns:
            command = ["ip", "netns", "exec", netns, *command]
        # No session of its own: autogroups would take the meaning of nice values between actors away.
        process = subprocess.Popen([*command, *map(str, theirs)], pass_fds=(*theirs, *fds), process_group=0)
        for _, b in pairs:
            b.close()
        actor = Actor(name, process, [Thread(a) for a, _ in pairs])
        self.undo(actor.kill)
        for thread in actor.threads:
            thread.hello()
        return actor

    def pipe(self) -> tuple[int, int]:
        """A pipe to pass to actors; our ends are closed with the scope."""
        read_end, write_end = os.pipe()
        for fd in (read_end, write_end):
            os.set_inheritable(fd, True)
            self.undo(lambda fd=fd: os.close(fd))  # type: ignore[misc]
        return read_end, write_end

    def hog(self, name: str, cpu: int, *, nice: int = 0, fifo: int = 0) -> Actor:
        """A process that burns `cpu` from now on."""
        hog = self.actor(name).pin(cpu)
        if nice:
            set_nice(hog.pid, nice)
        if fifo:
            os.sched_setscheduler(hog.pid, os.SCHED_FIFO, os.sched_param(fifo))
        hog.main.send("forever")
        return hog

    # --- files the kernel reads

    def set(self, path: Path, value: object) -> None:
        """Writes a kernel file; the old value comes back at the end."""
        old = path.read_text().strip()
        path.write_text(str(value))
        self.undo(lambda: path.write_text(old))

    # --- cgroups

    def cgroup(self, controller: str, parent: Path | None = None) -> Path:
        """A new cgroup of a (version 1) controller, mounted here if it is not mounted."""
        group = (parent or self._mount_of(controller)) / self.unique(controller)
        group.mkdir()
        self.undo(lambda: _remove_cgroup(group))
        return group

    def _mount_of(self, controller: str) -> Path:
        for line in Path("/proc/self/mounts").read_text().splitlines():
            _, where, kind, options, *_ = line.split()
            if kind == "cgroup" and controller in options.split(","):
                return Path(where)
        where = self.path / f"cgroup-{controller}"
        where.mkdir()
        subprocess.run(["mount", "-t", "cgroup", "-o", controller, "cgroup", str(where)], check=True, timeout=10)
        self.undo(lambda: subprocess.run(["umount", "-l", str(where)], check=True, timeout=10))
        return where

    # --- devices

    def loop(self, backing: Path, size_mb: int, *, allocate: bool = True) -> str:
        """A loop device over a new file `backing`; detached with the scope."""
        with backing.open("wb") as out:
            if allocate:
                os.posix_fallocate(out.fileno(), 0, size_mb << 20)
            else:
                out.truncate(size_mb << 20)
        self.undo(lambda: backing.unlink(missing_ok=True))
        return self.attach(backing)

    def attach(self, backing: Path, *options: str) -> str:
        """A loop device over an existing file."""
        found = subprocess.run(
            ["losetup", "--find", "--show", *options, str(backing)], check=True, capture_output=True, text=True, timeout=10
        )
        device = found.stdout.strip()
        self.undo(lambda: subprocess.run(["losetup", "-d", device], check=True, timeout=10))
        return device

    def filesystem(self, device: str, *mkfs: str) -> Path:
        """ext4 on `device`, mounted."""
        where = self.path / self.unique("mnt")
        where.mkdir()
        subprocess.run(
            ["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", *mkfs, device], check=True, timeout=30
        )
        subprocess.run(["mount", "-o", "noatime", device, str(where)], check=True, timeout=10)
        self.undo(lambda: _unmount(where))
        return where

    def slow_disk(self, size_mb: int = 64) -> "SlowDisk":
        """A loop device of known speed; see `victims/slowdisk.c`."""
        built, stem = self.path / "bin" / "slowdisk", self.path / self.unique("slow")
        built.parent.mkdir(exist_ok=True)
        if not built.exists():
            subprocess.run(["gcc", "-O2", "-o", str(built), str(_HERE / "victims/slowdisk.c")], check=True, timeout=60)
        stem.mkdir()
        backing, control = stem.with_suffix(".img"), stem.with_suffix(".us")
        with backing.open("wb") as out:
            out.truncate(size_mb << 20)
        control.write_bytes(struct.pack("<q", 0))
        process = subprocess.Popen(
            [str(built), str(stem), str(backing), str(control)], stdout=subprocess.PIPE, start_new_session=True
        )
        self.undo(lambda: subprocess.run(["umount", "-l", str(stem)], check=True, timeout=10, capture_output=True))
        self.undo(lambda: (process.kill(), process.wait()))
        assert process.stdout is not None
        if process.stdout.readline().strip() != b"ready":
            raise OSError("the slow disk did not start")
        return SlowDisk(self.attach(stem / "disk"), control, process.pid)

    def disk(self, size_mb: int = 256) -> tuple[Path, str]:
        """A mounted ext4 on a loop device over a preallocated file: (mount point, device)."""
        device = self.loop(self.path / (self.unique("disk") + ".img"), size_mb)
        return self.filesystem(device), device

    # --- networks

    def netns_pair(self) -> tuple[str, str, str, str]:
        """Two network namespaces joined by veth: (name a, name b, address a, address b)."""
        a, b = self.unique("a"), self.unique("b")
        octet = (os.getpid() * 7 + self._serial) % 200 + 20
        addresses = (f"10.199.{octet}.1", f"10.199.{octet}.2")
        for name in (a, b):
            subprocess.run(["ip", "netns", "add", name], check=True, timeout=10)
            self.undo(lambda n=name: subprocess.run(["ip", "netns", "del", n], check=True, timeout=10))  # type: ignore[misc]
        subprocess.run(
            ["ip", "link", "add", "eth0", "netns", a, "type", "veth", "peer", "name", "eth0", "netns", b],
            check=True,
            timeout=10,
        )
        for name, address in zip((a, b), addresses, strict=True):
            subprocess.run(["ip", "-n", name, "addr", "add", f"{address}/24", "dev", "eth0"], check=True, timeout=10)
            for link in ("lo", "eth0"):
                subprocess.run(["ip", "-n", name, "link", "set", link, "up"], check=True, timeout=10)
        return a, b, *addresses


def outweigh_neighbours() -> None:
    """Gives this session's CPU group a high weight, so that a neighbour who happens to compile something does not become the
    true cause of what was injected. Among the actors nice values keep their meaning. No effect without autogroups."""
    if os.getsid(0) != os.getpid():
        child = os.fork() if os.getpgrp() == os.getpid() else 0
        if child:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda n, _: os.kill(child, n))
            os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        os.setsid()
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text("-16")


def set_nice(pid: int, nice: int) -> None:
    """Sets the nice value of an actor."""
    os.setpriority(os.PRIO_PROCESS, pid, nice)


def _remove_cgroup(group: Path) -> None:
    def gone() -> bool:
        try:
            group.rmdir()
        except OSError as error:
            if error.errno == errno.ENOENT:
                return True
            if error.errno == errno.EBUSY:
                _move_out(group)
                return False
            raise
        return True

    wait_until(gone, f"cgroup {group} to empty", 10.0)


def _move_out(group: Path) -> None:
    for pid in (group / "cgroup.procs").read_text().split():
        with contextlib.suppress(OSError):
            (group.parent / "cgroup.procs").write_text(pid)


def _unmount(where: Path) -> None:
    def gone() -> bool:
        return subprocess.run(["umount", str(where)], capture_output=True, timeout=60, check=False).returncode in {0, 32} and (
            not os.path.ismount(where)
        )

    wait_until(gone, f"unmount of {where}", 60.0)
