"""The local servers as one thing: start what is missing, say how it is, stop it.

Files below `settings.data_dir`: `run/<server>.pid` (see `stack.process`), `log/<server>.log` (kept, the previous one as
`.log.1`), and a folder of data for each server. `up` is safe to repeat: a healthy server is left alone, one whose process
was killed is started again on its data, a stale pid file is replaced. Two commands at once wait for each other.

Fails with StoreError that names the server, the reason (port taken and by whom, Java missing, its own last log
lines) and the remedy; whatever this call had started is stopped again, so that a failed `up` leaves nothing behind.
"""

import fcntl
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from events.errors import StoreError
from events.settings import StackSettings
from stack.process import PidFile, Running, check_port, port_holder, spawn, stop, tail
from stack.servers import Server, servers_of
from stack.topics import create_topics

__all__ = ["LocalStack", "ServerStatus"]

Say = Callable[[str], None]
_POLL_S: Final = 0.1
_LOG_MAX_BYTES: Final = 64 << 20


@dataclass(frozen=True, slots=True)
class ServerStatus:
    """How one server is: `up` answers requests, `unhealthy` runs without answering, `down` does not run."""

    name: str
    state: Literal["up", "unhealthy", "down"]
    address: str
    pid: int | None
    log: Path
    detail: str = ""

    def as_json(self) -> dict[str, Any]:
        """For `kprobe status --json`."""
        return {
            "name": self.name,
            "state": self.state,
            "address": self.address,
            "pid": self.pid,
            "log": str(self.log),
            "detail": self.detail,
        }


class LocalStack:
    """The servers of `kprobe up` under one data folder. `say` gets progress, one line a call."""

    def __init__(self, settings: StackSettings, say: Say = lambda _: None) -> None:
        self.settings = settings
        self.servers: Sequence[Server] = servers_of(settings)
        self._say = say
        self._root = settings.data_dir.absolute()

    def up(self) -> list[str]:
        """Start every server that does not run and create the topics; returns the names of those it started."""
        with self._alone():
            started: list[Server] = []
            try:
                for server in self._missing():
                    self._start(server)
                    started.append(server)
                for server in self.servers:
                    self._wait(server)
                self._create_topics()
            except BaseException:
                for server in started:
                    self._stop(server)
                raise
        return [s.name for s in started]

    def down(self) -> list[str]:
        """Stop every server; returns the names of those that ran."""
        with self._alone():
            # Kafka last of all would change nothing: none of them depends on another.
            return [s.name for s in self.servers if self._stop(s)]

    def status(self) -> list[ServerStatus]:
        """How every server is, asked now."""
        return [self._status(server) for server in self.servers]

    def dead(self) -> list[str]:
        """Servers whose process has gone, without asking the others anything: cheap enough for a loop."""
        return [s.name for s in self.servers if self._pid_file(s).read() is None]

    def log(self, name: str) -> Path:
        """The log file of a server."""
        return self._root / "log" / f"{name}.log"

    def pids(self) -> dict[str, int]:
        """The process of every server that runs."""
        running = {s.name: self._pid_file(s).read() for s in self.servers}
        return {name: r.pid for name, r in running.items() if r is not None}

    @contextmanager
    def _alone(self) -> Iterator[None]:
        for folder in ("run", "log"):
            try:
                (self._root / folder).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StoreError(
                    f"cannot create {self._root / folder}: {error.strerror}; choose another folder with KPROBE_STACK__DATA_DIR"
                ) from error
        with (self._root / "run" / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._say(f"another `kprobe up` or `down` works on {self._root}: waiting for it")
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _pid_file(self, server: Server) -> PidFile:
        return PidFile(self._root / "run" / f"{server.name}.pid")

    def _missing(self) -> list[Server]:
        """Servers to start; all their ports are checked before the first one starts."""
        missing = [s for s in self.servers if self._pid_file(s).read() is None]
        for server in missing:
            for port, setting in server.ports:
                check_port(port, server.name, setting)
        return missing

    def _start(self, server: Server) -> None:
        log = self.log(server.name)
        if log.exists() and log.stat().st_size > _LOG_MAX_BYTES:
            log.replace(log.with_suffix(".log.1"))
        if self._pid_file(server).path.exists():
            self._say(f"{server.name}: its process is gone without having been stopped; starting it again on its data")
        command = server.command(lambda text: self._say(f"{server.name}: {text}"))
        running = spawn(command, log, server.environment())
        self._pid_file(server).write(running)
        self._say(f"{server.name}: starting, pid {running.pid}, log {log}")

    def _wait(self, server: Server) -> None:
        """Return when the server answers; raise StoreError if it ends, or does not answer in time."""
        began = time.monotonic()
        running = self._pid_file(server).read()
        while True:
            try:
                server.ask()
                break
            except StoreError as error:
                self._check_wait(server, running, time.monotonic() - began, error)
            time.sleep(_POLL_S)
        self._say(f"{server.name}: up at {server.address}")

    def _check_wait(self, server: Server, running: Running | None, waited_s: float, error: StoreError) -> None:
        log = self.log(server.name)
        if running is None or not running.alive:
            raise StoreError(f"{server.name} ended while starting; the end of its log {log}:\n{tail(log)}") from error
        if waited_s > server.start_timeout_s:
            raise StoreError(
                f"{server.name} does not answer after {server.start_timeout_s:.0f} s ({error}); the end of its log {log}:\n"
                f"{tail(log)}"
            ) from error

    def _create_topics(self) -> None:
        created = create_topics(f"127.0.0.1:{self.settings.kafka_port}", self.settings.partitions)
        if created:
            self._say(f"kafka: created topics {', '.join(sorted(created))} with {self.settings.partitions} partitions each")

    def _stop(self, server: Server) -> bool:
        pid_file = self._pid_file(server)
        running = pid_file.read()
        if running is None:
            pid_file.remove()
            return False
        self._say(f"{server.name}: stopping, pid {running.pid}")
        if not stop(running):
            self._say(f"{server.name}: did not end by itself and was killed; it will recover at its next start")
        pid_file.remove()
        return True

    def _status(self, server: Server) -> ServerStatus:
        log, running = self.log(server.name), self._pid_file(server).read()
        if running is None:
            detail = "killed, or the machine restarted: `kprobe up` recovers it" if self._pid_file(server).path.exists() else ""
            holder = port_holder(server.ports[0][0]) if not detail and _taken(server) else ""
            detail = detail or (f"its port {server.ports[0][0]} is held by {holder}" if holder else "")
            return ServerStatus(server.name, "down", server.address, None, log, detail)
        try:
            server.ask()
        except StoreError as error:
            return ServerStatus(server.name, "unhealthy", server.address, running.pid, log, str(error))
        return ServerStatus(server.name, "up", server.address, running.pid, log)


def _taken(server: Server) -> bool:
    try:
        check_port(server.ports[0][0], server.name, server.ports[0][1])
    except StoreError:
        return True
    return False
