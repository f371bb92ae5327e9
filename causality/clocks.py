"""What one host's clock says when another's says something else, with an error that is proved, not guessed (D10).

A packet cannot arrive before it was sent. With the times of many packets in both directions between hosts A and B, that alone
bounds the difference of their monotonic clocks: every packet from A to B says that B's clock is at most so far ahead of A's,
every packet from B to A that it is at least so far ahead. All straight lines (offset and drift) between the two sets of points
are possible, no other is. `PairClock` keeps that set exactly, as the convex polygon of all possible (drift, offset): the
convex hull of the points, seen from the side of the lines. A bound that the polygon has already is dropped at once, so the
state stays at a few corners however many packets come.

    clock = PairClock()
    clock.add(forward=True, sent_ns=..., received_ns=...)    # A sent, B received; False: impossible, not taken
    clock.to_b(a_ns) -> (low, high) | None                   # B's time at A's time, certain bounds
    clock.to_a(b_ns) -> (low, high) | None

A bound that contradicts the polygon is a wrong match or a clock that was set. It is rejected and counted; when one direction
is rejected `STEP_AFTER` times in a row, the old polygon is frozen for the times before and a new window begins.

`ClockGraph` maps between hosts that exchange no packets, along the path with the smallest error.

Can be fooled by: nothing that keeps its clock running evenly for a window (a drift that itself drifts by more than the slack
narrows the polygon to nothing, and a new window begins). The slack, 1 ns, pays for the rounding.
"""

from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any, Final

import numpy as np
import numpy.typing as npt

__all__ = ["MAX_DRIFT", "STEP_AFTER", "Bounds", "ClockGraph", "PairClock"]

MAX_DRIFT: Final = 1e-3  # of one host's clock against another's; quartz and NTP stay below 6e-4
STEP_AFTER: Final = 8
_SLACK_NS: Final = 1.0
_WAITING_MAX: Final = 256  # bounds held while only one direction has been seen
_WINDOWS_MAX: Final = 64
Ints = npt.NDArray[np.int64]
Bounds = tuple[Ints, Ints]


@dataclass(slots=True)
class _Window:
    """One stretch of A's time: all (drift, offset) that no packet contradicts, relative to the origin; corners in order."""

    since_ns: int
    origin_ns: int
    offset_ns: int
    upper: list[tuple[int, int]] = field(default_factory=list)  # until both directions are known: (A's time, offset)
    lower: list[tuple[int, int]] = field(default_factory=list)
    corners: npt.NDArray[np.float64] | None = None  # (n, 2): drift, offset - offset_ns

    def bound(self, a_ns: int, offset_ns: int) -> tuple[float, float]:
        return float(a_ns - self.origin_ns), float(offset_ns - self.offset_ns)

    def offsets(self, a_ns: Ints) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Smallest and largest possible offset at times of A, less `offset_ns`."""
        assert self.corners is not None
        values = self.corners[:, :1] * (a_ns - self.origin_ns)[None, :] + self.corners[:, 1:]
        return values.min(axis=0), values.max(axis=0)

    def begin(self) -> None:
        """Make the polygon, now that both directions are known."""
        spans = [self.bound(*p)[0] for p in (*self.upper, *self.lower)]
        reach = MAX_DRIFT * (max(map(abs, spans)) + 1) + 1
        high = max(self.bound(*p)[1] for p in self.upper) + reach
        low = min(self.bound(*p)[1] for p in self.lower) - reach
        self.corners = np.array([(-MAX_DRIFT, low), (MAX_DRIFT, low), (MAX_DRIFT, high), (-MAX_DRIFT, high)])

    def cut(self, a_ns: int, offset_ns: int, sign: int) -> bool:
        """Keep the part of the polygon where `sign` * offset at a time is at most that of a bound; False if none is left."""
        assert self.corners is not None
        x, limit = self.bound(a_ns, offset_ns)
        over = sign * (self.corners[:, 0] * x + self.corners[:, 1] - limit) - _SLACK_NS
        if (over <= 0).all():
            return True
        if (over > 0).all():
            return False
        after, over_after = np.roll(self.corners, -1, axis=0), np.roll(over, -1)
        kept: list[npt.NDArray[np.float64]] = []
        for k in range(len(over)):
            if over[k] <= 0:
                kept.append(self.corners[k])
            if (over[k] <= 0) != (over_after[k] <= 0):
                share = over[k] / (over[k] - over_after[k])
                kept.append(self.corners[k] + share * (after[k] - self.corners[k]))
        self.corners = np.array(kept)
        return True


class PairClock:
    """The clocks of two hosts, A and B."""

    def __init__(self) -> None:
        self.rejected = 0
        self.accepted = 0
        self.steps = 0
        self._windows: list[_Window] = []
        self._refused: dict[bool, list[tuple[int, int]]] = {True: [], False: []}

    def add(self, *, forward: bool, sent_ns: int, received_ns: int) -> bool:
        """Take one packet: `forward` from A to B. False if it contradicts the others: not taken."""
        a_ns, b_ns = (sent_ns, received_ns) if forward else (received_ns, sent_ns)
        return self._take(forward, a_ns, b_ns - a_ns)

    def _take(self, forward: bool, a_ns: int, offset_ns: int) -> bool:
        if not self._windows:
            self._windows.append(_Window(a_ns, a_ns, offset_ns))
        window = self._window_at(a_ns)
        if self._fits(window, forward, a_ns, offset_ns):
            self.accepted += 1
            self._refused[forward].clear()
            return True
        self.rejected += 1
        self._refused[forward].append((a_ns, offset_ns))
        if len(self._refused[forward]) >= STEP_AFTER and window is self._windows[-1]:
            self._step(forward)
        return False

    def _step(self, forward: bool) -> None:
        """The clock was set: what was known holds for the time before."""
        refused, self._refused[forward] = self._refused[forward], []
        first = min(refused)
        self._windows.append(_Window(first[0], first[0], first[1]))
        del self._windows[:-_WINDOWS_MAX]
        self.steps += 1
        for a_ns, offset_ns in refused:
            self._fits(self._windows[-1], forward, a_ns, offset_ns)

    @staticmethod
    def _fits(window: _Window, forward: bool, a_ns: int, offset_ns: int) -> bool:
        if window.corners is not None:
            return window.cut(a_ns, offset_ns, 1 if forward else -1)
        held, other = (window.upper, window.lower) if forward else (window.lower, window.upper)
        held.append((a_ns, offset_ns))
        if not other:
            # The tightest are kept: of many packets in one direction only the fastest say anything.
            if len(held) > 2 * _WAITING_MAX:
                held.sort(key=lambda p: p[1] if forward else -p[1])
                del held[_WAITING_MAX:]
            return True
        window.begin()
        fits = all(window.cut(*p, 1) for p in sorted(window.upper)) and all(window.cut(*p, -1) for p in sorted(window.lower))
        if not fits:  # the newcomer contradicts the rest
            window.corners = None
            held.pop()
            return False
        window.upper, window.lower = [], []
        return True

    def _window_at(self, a_ns: int) -> _Window:
        return next((w for w in reversed(self._windows) if w.since_ns <= a_ns), self._windows[0])

    @property
    def known(self) -> bool:
        """Have packets of both directions been seen?"""
        return any(w.corners is not None for w in self._windows)

    def to_b(self, a_ns: Ints | int) -> Bounds | None:
        """[earliest, latest] of B's clock at times of A's, or None while only one direction is known."""
        return self._mapped(np.atleast_1d(np.asarray(a_ns, np.int64)), back=False)

    def to_a(self, b_ns: Ints | int) -> Bounds | None:
        """[earliest, latest] of A's clock at times of B's."""
        return self._mapped(np.atleast_1d(np.asarray(b_ns, np.int64)), back=True)

    def _mapped(self, times: Ints, *, back: bool) -> Bounds | None:
        if not self.known:
            return None
        low, high = np.empty(len(times), np.int64), np.empty(len(times), np.int64)
        known = [w for w in self._windows if w.corners is not None]
        limits = [w.since_ns + (w.offset_ns if back else 0) for w in known[1:]]
        chosen = np.searchsorted(np.array(limits, np.int64), times, side="right")
        for k in np.unique(chosen).tolist():
            at = chosen == k
            low[at], high[at] = _map(known[k], times[at], back=back)
        return low, high

    def state(self) -> dict[str, Any]:
        """Counters, for metrics."""
        return {"accepted": self.accepted, "rejected": self.rejected, "steps": self.steps, "known": self.known}


def _map(window: _Window, times: Ints, *, back: bool) -> Bounds:
    if not back:
        least, most = window.offsets(times)
        base = times + window.offset_ns
        return base + np.floor(least).astype(np.int64), base + np.ceil(most).astype(np.int64)
    # b = a + offset_ns + drift * (a - origin) + rest, solved for a; monotone along the polygon's edges, so corners suffice.
    assert window.corners is not None
    passed = (times - window.offset_ns - window.origin_ns).astype(np.float64)
    drift, rest = window.corners[:, :1], window.corners[:, 1:]
    shift = (passed[None, :] - rest) / (1 + drift) - passed[None, :]
    base = times - window.offset_ns
    return base + np.floor(shift.min(axis=0)).astype(np.int64), base + np.ceil(shift.max(axis=0)).astype(np.int64)


class ClockGraph:
    """The clocks of many hosts, by pairs that talk to each other."""

    def __init__(self) -> None:
        self.pairs: dict[tuple[str, str], PairClock] = {}

    def pair(self, one: str, other: str) -> tuple[PairClock, bool]:
        """(clock of two hosts, is `one` its A)."""
        a, b = sorted((one, other))
        return self.pairs.setdefault((a, b), PairClock()), one == a

    def add(self, sender: str, receiver: str, sent_ns: int, received_ns: int) -> bool:
        """Take one packet; False if it contradicts the others."""
        clock, forward = self.pair(sender, receiver)
        return clock.add(forward=forward, sent_ns=sent_ns, received_ns=received_ns)

    def direct(self, source: str, target: str, times: Ints | int) -> Bounds | None:
        """[earliest, latest] of `target`'s clock at times of `source`'s, by the packets between the two."""
        a, b = sorted((source, target))
        clock = self.pairs.get((a, b))
        if clock is None:
            return None
        return clock.to_b(times) if source == a else clock.to_a(times)

    def map(self, source: str, target: str, time_ns: int) -> tuple[int, int] | None:
        """[earliest, latest] of `target`'s clock at one time of `source`'s, along the path of hosts with the smallest error."""
        best: dict[str, tuple[int, int]] = {}
        queue: list[tuple[int, str, int, int]] = [(0, source, time_ns, time_ns)]
        while queue:
            _, host, low, high = heappop(queue)
            if host in best:
                continue
            best[host] = (low, high)
            if host == target:
                return low, high
            for pair in self.pairs:
                if host not in pair:
                    continue
                other = pair[1] if pair[0] == host else pair[0]
                found = None if other in best else self.direct(host, other, np.array([low, high], np.int64))
                if found is not None:
                    a, b = int(found[0].min()), int(found[1].max())
                    heappush(queue, (b - a, other, a, b))
        return None
