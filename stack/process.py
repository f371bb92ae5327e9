"""One server as a child process: its pid file, its log, whether it still lives, and who holds a port.

A pid file holds `{"pid", "start_ticks", "boot_id"}`; pid and start time together name one process of one boot, so a stale
file (the machine rebooted, the server was killed, the pid was given to somebody else) is recognised and never signalled.
Servers run in a session of their own: a Ctrl-C meant for the command does not reach them; the command stops them in order.
"""

import errno
import os
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import orjson
import psutil

from events.errors import StoreError
from events.identity import read_boot_id

__all__ = ["PidFile", "Running", "check_port", "port_holder", "spawn", "stop", "tail"]

_STOP_TIMEOUT_S: Final = 30.0  # Neo4j writes a checkpoint before it ends
_POLL_S: Final = 0.05


@dataclass(frozen=True, slots=True)
class Running:
    """One life of one process."""

    pid: int
    start_ticks: int

    @property
    def alive(self) -> bool:
        """Whether this very process still runs (a zombie does not; our own are reaped here)."""
        _reap(self.pid)
        return _start_ticks(self.pid) == self.start_ticks


@dataclass(frozen=True, slots=True)
class PidFile:
    """The pid file of one server."""

    path: Path

    def write(self, running: Running) -> None:
        """Replace the file in one step."""
        partial = self.path.with_suffix(".tmp")
        partial.write_bytes(
            orjson.dumps({"pid": running.pid, "start_ticks": running.start_ticks, "boot_id": read_boot_id()}) + b"\n"
        )
        partial.replace(self.path)

    def read(self) -> Running | None:
        """The live process that the file names; None if there is no file or it is stale."""
        try:
            content = orjson.loads(self.path.read_bytes())
            running = Running(int(content["pid"]), int(content["start_ticks"]))
            same_boot = content["boot_id"] == read_boot_id()
        except (FileNotFoundError, orjson.JSONDecodeError, KeyError, TypeError, ValueError):
            return None
        return running if same_boot and running.alive else None

    def remove(self) -> None:
        """Forget the process."""
        self.path.unlink(missing_ok=True)


def spawn(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Running:
    """Start `command` in a session of its own, its output appended to `log`. Raises StoreError if it cannot run."""
    append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    files = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, str(log), append, 0o640),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    try:
        pid = os.posix_spawn(command[0], list(command), dict(environment), file_actions=files, setsid=True)
    except OSError as error:
        raise StoreError(f"cannot run {command[0]}: {error.strerror}") from error
    # None only if it is gone already; then 0 never matches and `alive` is False, as it should be.
    return Running(pid, _start_ticks(pid) or 0)


def stop(running: Running, timeout_s: float = _STOP_TIMEOUT_S) -> bool:
    """End a process: SIGTERM, then SIGKILL after `timeout_s`. True if it ended by itself in time."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):  # it may end between any two lines
            if running.alive:
                os.kill(running.pid, number)
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if not running.alive:
                return number == signal.SIGTERM
            time.sleep(_POLL_S)
    raise StoreError(f"pid {running.pid} survived SIGKILL for {timeout_s:.0f} s; /proc/{running.pid}/stack says where it hangs")


def check_port(port: int, server: str, setting: str) -> None:
    """Raise StoreError, naming the holder and the setting to change, if `port` on loopback is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise StoreError(f"cannot use port {port} for {server}: {error.strerror}; change {setting}") from error
            raise StoreError(
                f"port {port}, meant for {server}, is held by {port_holder(port)}; stop that, or choose another with {setting}"
            ) from error


def port_holder(port: int) -> str:
    """Who listens on a TCP port, in words."""
    for connection in psutil.net_connections("tcp"):
        local = connection.laddr
        if connection.status == psutil.CONN_LISTEN and local and local.port == port and connection.pid:
            try:
                words = psutil.Process(connection.pid).cmdline()
            except psutil.Error:
                break
            return f"pid {connection.pid} ({' '.join(words)[:120]})"
    return "a process that this user may not see"


def tail(log: Path, lines: int = 12) -> str:
    """The last lines of a log, for an error message."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 16384))
            content = file.read().decode(errors="replace")
    except FileNotFoundError:
        return "(no log)"
    return "\n".join(content.splitlines()[-lines:]) or "(the log is empty)"


def _start_ticks(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat; None for a process that is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _reap(pid: int) -> None:
    with suppress(ChildProcessError):  # not our child: its own parent, or init, reaps it
        os.waitpid(pid, os.WNOHANG)
