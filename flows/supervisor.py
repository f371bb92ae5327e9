"""N flow processes as one: each owns its share of the partitions, its own recovery folder, its own metrics port.

A flow scales by processes that share nothing (one worker each; threads and clusters are slower here, see docs/flow.md). The
supervisor starts them, watches them, and says which one ended and how. A process that dies is started again after a pause
that doubles, and resumes behind its last recorded position; after `RESTARTS_MAX` deaths within `RESTARTS_WINDOW_S`
everything is stopped and the error names the process. SIGTERM and SIGINT end all: each drains, takes a snapshot and exits
with 0.

The recovery folder remembers for how many processes it was made: positions belong to processes, so another number is
refused.
"""

import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Final

import orjson

from events.errors import ConfigError, KprobeError
from events.settings import FlowSettings

__all__ = ["RESTARTS_MAX", "RESTARTS_WINDOW_S", "Supervisor", "prepare_recovery"]

RESTARTS_MAX: Final = 5
RESTARTS_WINDOW_S: Final = 300.0
_FIRST_PAUSE_S: Final = 0.5
_POLL_S: Final = 0.05
_STOP_TIMEOUT_S: Final = 60.0
_PR_SET_PDEATHSIG: Final = 1

Say = Callable[[str], None]


def prepare_recovery(folder: Path, processes: int) -> list[Path]:
    """The recovery folders of `processes` processes, made if they are new. Raises ConfigError if made for another number."""
    layout = folder / "layout.json"
    folder.mkdir(parents=True, exist_ok=True)
    if layout.exists():
        made_for = orjson.loads(layout.read_bytes())["processes"]
        if made_for != processes:
            raise ConfigError(
                f"{folder} holds the positions of {made_for} flow processes, not of {processes}: give --processes {made_for}, "
                "or another flow.recovery_dir to read the topics from the start (what is stored already stays single)"
            )
    folders = [folder / f"process-{i}" for i in range(processes)]
    for each in folders:
        if not (each / "part-0.sqlite3").exists():
            each.mkdir(exist_ok=True)
            _make_recovery(each)
    partial = layout.with_suffix(".tmp")
    partial.write_bytes(orjson.dumps({"processes": processes}))
    partial.replace(layout)
    return folders


def _make_recovery(folder: Path) -> None:
    from bytewax.recovery import init_db_dir

    init_db_dir(folder, 1)  # type: ignore[no-untyped-call]


@dataclass(slots=True)
class _Child:
    index: int
    command: list[str]
    environment: Mapping[str, str]
    process: subprocess.Popen[bytes] | None = None
    start_at_s: float = 0.0
    deaths_s: deque[float] = field(default_factory=deque)
    ended: bool = False


class Supervisor:
    """The processes of one `kprobe flow`."""

    def __init__(self, settings: FlowSettings, environment: Mapping[str, str], say: Say, *, restart: bool = True) -> None:
        self._say, self._restart = say, restart
        self._stopping = False
        self._lock = _lock(settings.recovery_dir)
        folders = prepare_recovery(settings.recovery_dir, settings.processes)
        self._children = [
            _Child(i, _command(folder), {**environment, **_variables(settings, i)}) for i, folder in enumerate(folders)
        ]

    def run(self) -> None:
        """Run until all processes have ended. Raises KprobeError naming the one that could not be kept alive."""
        handlers = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            while not all(child.ended for child in self._children):
                for child in self._children:
                    self._look_after(child)
                time.sleep(_POLL_S)
        except BaseException:
            self._end_all()
            raise
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _look_after(self, child: _Child) -> None:
        if child.ended:
            return
        if child.process is None:
            if self._stopping:
                child.ended = True
            elif time.monotonic() >= child.start_at_s:
                self._start(child)
            return
        status = child.process.poll()
        if status is None:
            return
        name, child.process = f"flow process {child.index} (pid {child.process.pid})", None
        if status == 0:
            child.ended = True
            self._say(f"{name} ended")
        elif self._stopping and -status in (signal.SIGTERM, signal.SIGINT):
            child.ended = True  # while it started, or told twice
            self._say(f"{name} ended without a last snapshot: its open epoch will be repeated at the next start")
        elif self._stopping:
            child.ended = True
            raise KprobeError(f"{name} {_how(status)} while it was to end; its open epoch will be repeated at the next start")
        else:
            self._mourn(child, f"{name} {_how(status)}")

    def _start(self, child: _Child) -> None:
        child.process = subprocess.Popen(
            child.command,
            env=dict(child.environment),
            process_group=0,
            preexec_fn=_die_with_parent,  # noqa: PLW1509  the supervisor has no threads
        )
        self._say(f"flow process {child.index} started (pid {child.process.pid})")

    def _mourn(self, child: _Child, what: str) -> None:
        """A process died: start it again, or give up."""
        now_s = time.monotonic()
        child.deaths_s.append(now_s)
        while child.deaths_s[0] < now_s - RESTARTS_WINDOW_S:
            child.deaths_s.popleft()
        deaths = len(child.deaths_s)
        if not self._restart or deaths > RESTARTS_MAX:
            raise KprobeError(
                f"{what}; it was started again {deaths - 1} times in {RESTARTS_WINDOW_S:.0f} s, so the flow is stopped. The "
                "lines above give its error; what is stored is whole, start the flow again when the cause is gone"
            )
        pause_s = _FIRST_PAUSE_S * 2 ** (deaths - 1)
        child.start_at_s = now_s + pause_s
        self._say(f"{what}; starting it again in {pause_s:g} s ({deaths} of {RESTARTS_MAX}): it resumes at its last snapshot")

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        self._stopping = True
        for child in self._children:
            if child.process is not None:
                child.process.terminate()

    def _end_all(self) -> None:
        """Ask the others to end, then make them."""
        self._stop(signal.SIGTERM, None)
        for child in self._children:
            if child.process is not None:
                try:
                    child.process.wait(_STOP_TIMEOUT_S)
                except subprocess.TimeoutExpired:
                    child.process.kill()
                    child.process.wait()


def _lock(folder: Path) -> IO[bytes]:
    """Hold the recovery folder: two flows on one set of positions would undo each other. Raises ConfigError."""
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / "lock").open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ConfigError(
            f"another `kprobe flow` runs on {folder}: end it first, or give flow.recovery_dir another folder"
        ) from None
    return file


def _die_with_parent() -> None:
    """A child drains and ends when the supervisor is killed: nothing may go on reading unwatched."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _command(recovery: Path) -> list[str]:
    return [sys.executable, "-m", "bytewax.run", "flows.causal", "-r", str(recovery), "-s", "1", "-b", "0"]


def _variables(settings: FlowSettings, index: int) -> dict[str, str]:
    host, _, port = settings.listen.rpartition(":")
    listen = f"{host}:{int(port) + index if port != '0' and port.isdigit() else port}"
    return {
        "KPROBE_FLOW__PROCESSES": str(settings.processes),
        "KPROBE_FLOW__PROCESS": str(index),
        "KPROBE_FLOW__LISTEN": listen,
        "PYTHONUNBUFFERED": "1",
        "RUST_BACKTRACE": os.environ.get("RUST_BACKTRACE", "0"),
    }


def _how(status: int) -> str:
    """An exit status in words."""
    if status >= 0:
        return f"failed with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = str(-status)
    return f"was killed by {name}"
