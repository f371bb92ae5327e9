"""Real recordings for tests: a source on the running kernel, programs whose truth is known, and waiting without sleeping."""

import contextlib
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from events.kinds import BY_NAME
from events.records import EVENT_COLUMNS
from events.settings import ProbeSettings
from probe.source import KernelSource
from probe.watch import Selector

HERE = Path(__file__).parent
PATIENCE_S = 60  # an emulated machine is slow; a test that passes never waits that long


def wait_until(condition, what="the condition"):
    """The first true value of `condition()`; fails after a generous deadline."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.002)
    raise AssertionError(f"{what} did not come true within {PATIENCE_S} s")


@dataclass
class Recording:
    """A source and all that was drained from it."""

    source: KernelSource
    tasks: list = field(default_factory=list)
    losses: list = field(default_factory=list)
    watermark: int = 0
    _parts: list = field(default_factory=list)

    def drain(self):
        """Take what is there; returns the drained unit."""
        drained = self.source.drain()
        self._parts.append(drained.columns)
        self.tasks += drained.tasks
        self.losses += drained.losses
        assert drained.watermark.node_mono_ns >= self.watermark, "the watermark went back"
        self.watermark = drained.watermark.node_mono_ns
        return drained

    def catch_up(self):
        """Drain until everything up to now has been delivered or declared lost."""
        now = time.monotonic_ns()
        wait_until(lambda: self.drain().watermark.node_mono_ns >= now, "the watermark")
        return self

    @property
    def lost(self):
        """Losses without what the kernel hides from everybody: a sandbox's own tasks run at any time."""
        return [row for row in self.losses if row["reason"] != "hidden_task"]

    @property
    def columns(self):
        return {name: np.concatenate([p[name] for p in self._parts]) for name in EVENT_COLUMNS}

    def of(self, kind, **where):
        """Rows of one kind as dictionaries of its fields plus the head, in the order of time; `where` filters them."""
        columns, spec = self.columns, BY_NAME[kind]
        rows = np.flatnonzero(columns["kind"] == spec.number)
        rows = rows[np.argsort(columns["time_mono_ns"][rows], kind="stable")]
        out = []
        for i in rows.tolist():
            head = {n: int(columns[n][i]) for n in ("time_mono_ns", "seq", "cpu", "flags")}
            head |= {"by_tid": int(columns["tid"][i]), "by_tgid": int(columns["tgid"][i])}
            row = head | spec.decode(tuple(int(columns[f"a{k}"][i]) for k in range(5)))
            if all(row[k] == v for k, v in where.items()):
                out.append(row)
        return out

    def has(self, family):
        return self.source.session()["families"][family]["attached"]


@pytest.fixture
def record():
    """Starts recordings: `record("pid:1", ring_bytes_per_cpu=4096, families_off=[...])`; closed at the end of the test."""
    with contextlib.ExitStack() as stack:

        def start(*watch, exclude=(), **settings):
            settings = ProbeSettings(**{"ring_bytes_per_cpu": 8 << 20} | settings)
            source = KernelSource(settings, [Selector.parse(w) for w in watch], exclude=exclude)
            stack.callback(source.close)
            source.open()
            return Recording(source)

        yield start


class Helper:
    """A child process that does one step for each line it is told, and answers with one line."""

    def __init__(self, *command):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self.pid = self.process.pid

    def tell(self, line="go"):
        """One step; its answer."""
        self.process.stdin.write(line + "\n")
        answer = self.process.stdout.readline().strip()
        assert answer, f"the helper ended with status {self.process.poll()}"
        return answer

    def end(self):
        self.process.stdin.close()
        self.process.wait(PATIENCE_S)
        self.process.stdout.close()


@pytest.fixture
def helper():
    """Starts helpers: `helper(command, ...)`, or `helper.python(text)`; ended with the test."""
    running = []

    def start(*command):
        running.append(Helper(*map(str, command)))
        return running[-1]

    start.python = lambda text: start(sys.executable, "-c", text)
    yield start
    for one in running:
        with contextlib.suppress(OSError):
            one.end()


@pytest.fixture(scope="session")
def storm(tmp_path_factory):
    """The storm program, compiled: `storm CPUS CALLS` makes CALLS getppid calls on each of CPUS processors for every line."""
    binary = tmp_path_factory.mktemp("storm") / "storm"
    subprocess.run(["cc", "-O2", "-o", str(binary), str(HERE / "storm.c"), "-pthread"], check=True)
    return binary
