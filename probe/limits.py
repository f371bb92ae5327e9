"""What the probe may cost, and what it gives up when it costs more.

Every second the agent hands in what it has used. When the CPU share, averaged over a whole window, or the resident memory is
above its cap, the next step is due: detach one more family, in the order of `SHED_ORDER` (what floods most and explains least
first; the scheduler last), and when all are gone detach altogether. After a step a new window begins, so that the
effect of one step is seen before the next is taken; memory that stays too high takes a step a window as well.

Only the probe's own process is measured. What the BPF programs add to the traced programs is bounded by the cost of an event
(`docs/`), and shedding a family ends its share.
"""

import contextlib
import os
import resource
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from probe.source import SHED_ORDER

__all__ = ["Limits", "Step", "Usage", "prefer_this_thread", "read_usage"]

_NICE: Final = -10


@dataclass(frozen=True, slots=True)
class Usage:
    """What this process has used: CPU time since its start, and memory now."""

    mono_ns: int
    cpu_ns: int
    rss_bytes: int


@dataclass(frozen=True, slots=True)
class Step:
    """One step down: the family to shed, or None to detach, and why."""

    family: str | None
    reason: str


def read_usage() -> Usage:
    """The usage of this process, all threads."""
    rss_pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Usage(time.monotonic_ns(), time.process_time_ns(), rss_pages * resource.getpagesize())


def prefer_this_thread() -> None:
    """Let the calling thread go first on a busy machine: rings that wait too long for their reader overflow. It runs for a few
    per cent of a CPU, in short bursts, and never at real-time priority. Children that it forks later inherit this."""
    with contextlib.suppress(OSError):  # without the privilege it reads at the priority that it has
        os.setpriority(os.PRIO_PROCESS, 0, min(os.getpriority(os.PRIO_PROCESS, 0), _NICE))


class Limits:
    """Decides when a step is due. `families` are those attached; only they can be shed."""

    def __init__(self, *, cpu_share_max: float, memory_max_bytes: int, window_s: float, families: Sequence[str]) -> None:
        self._cpu_share_max = cpu_share_max
        self._memory_max_bytes = memory_max_bytes
        self._window_ns = int(window_s * 1e9)
        self._remaining = deque(f for f in SHED_ORDER if f in families)
        self._samples: deque[Usage] = deque()
        self._detached = False
        self.cpu_share = 0.0
        self.rss_bytes = 0

    def check(self, usage: Usage) -> Step | None:
        """The step that is due now, if any."""
        self._samples.append(usage)
        self.rss_bytes = usage.rss_bytes
        while len(self._samples) > 2 and usage.mono_ns - self._samples[1].mono_ns >= self._window_ns:
            self._samples.popleft()
        oldest = self._samples[0]
        elapsed_ns = usage.mono_ns - oldest.mono_ns
        if elapsed_ns:
            self.cpu_share = (usage.cpu_ns - oldest.cpu_ns) / elapsed_ns
        if self._detached or elapsed_ns < self._window_ns:
            return None
        reason = self._excess(usage)
        if reason is None:
            return None
        self._samples.clear()
        self._samples.append(usage)
        if self._remaining:
            return Step(self._remaining.popleft(), reason)
        self._detached = True
        return Step(None, reason)

    def _excess(self, usage: Usage) -> str | None:
        if self.cpu_share > self._cpu_share_max:
            window_s = self._window_ns / 1e9
            return f"CPU share {self.cpu_share:.2f} over {window_s:g} s is above probe.cpu_share_max {self._cpu_share_max:g}"
        if usage.rss_bytes > self._memory_max_bytes:
            return f"resident memory {usage.rss_bytes} bytes is above probe.memory_max_bytes {self._memory_max_bytes}"
        return None
