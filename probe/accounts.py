"""The accounts of promise P1: at every hop, produced == delivered + pending + sum(dropped by reason).

`Account` is the ledger of one hop, counted in events. `RingLedger` checks the first hop from the sequence numbers alone,
without trusting the source's own counters: for every CPU, last - first + 1 == delivered + counted as lost in the ring.

The agent checks both every second and when it ends. A violation is a bug of ours, never a property of the load: it is counted,
printed, turns /healthz red and makes the command fail.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Account", "RingLedger"]


@dataclass(slots=True)
class Account:
    """What one hop was given and what became of it."""

    hop: str
    accepted: int = 0
    delivered: int = 0
    pending: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def violation(self) -> str | None:
        """What does not add up, or None."""
        found = self.delivered + self.pending + self.dropped.total()
        if found == self.accepted:
            return None
        drops = ", ".join(f"{reason} {n}" for reason, n in sorted(self.dropped.items())) or "none"
        return (
            f"hop {self.hop}: {self.accepted} events came in, but {self.delivered} delivered + {self.pending} pending + "
            f"dropped ({drops}) make {found}"
        )


class RingLedger:
    """Sequence numbers seen, per CPU, against the events delivered and the losses reported."""

    def __init__(self) -> None:
        self.delivered: Counter[int] = Counter()
        self.lost: Counter[int] = Counter()
        self._first: dict[int, int] = {}
        self._last: dict[int, int] = {}

    def add(self, columns: Mapping[str, npt.NDArray[Any]], losses: Iterable[Mapping[str, Any]]) -> None:
        """One drain: its events (each CPU's rows together) and its loss rows."""
        cpus = columns["cpu"]
        if len(cpus):
            starts = np.concatenate(([0], np.flatnonzero(np.diff(cpus)) + 1))
            counts = np.diff(np.append(starts, len(cpus)))
            lows = np.minimum.reduceat(columns["seq"], starts)
            highs = np.maximum.reduceat(columns["seq"], starts)
            for cpu, n, low, high in zip(cpus[starts].tolist(), counts.tolist(), lows.tolist(), highs.tolist(), strict=True):
                self.delivered[cpu] += n
                self._saw(cpu, low, high)
        for row in losses:
            if row.get("reason") == "ring_full" and row.get("cpu") is not None and row.get("hop") != "payload":
                self.lost[row["cpu"]] += row["count"] or 0
                if row.get("first_seq") is not None:
                    self._saw(row["cpu"], row["first_seq"], row["last_seq"])

    def violations(self, *, final: bool) -> list[str]:
        """CPUs whose numbers do not add up. Before the end a record still being written may be missing, never too many."""
        wrong = []
        for cpu, first in sorted(self._first.items()):
            numbered = self._last[cpu] - first + 1
            found = self.delivered[cpu] + self.lost[cpu]
            if found > numbered or (final and found != numbered):
                parts = f"{self.delivered[cpu]} delivered + {self.lost[cpu]} lost"
                wrong.append(f"CPU {cpu}: {numbered} sequence numbers used, but {parts} make {found}")
        return wrong

    def unexplained(self) -> dict[int, int]:
        """Numbers per CPU that were neither delivered nor reported as lost."""
        missing = {
            cpu: self._last[cpu] - first + 1 - self.delivered[cpu] - self.lost[cpu] for cpu, first in self._first.items()
        }
        return {cpu: n for cpu, n in sorted(missing.items()) if n > 0}

    def _saw(self, cpu: int, low: int, high: int) -> None:
        self._first[cpu] = min(low, self._first.get(cpu, low))
        self._last[cpu] = max(high, self._last.get(cpu, high))
