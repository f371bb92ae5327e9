"""Switches that happened but were not recorded, because the kernel did not run the probe's program: found, counted, located.

Some kernels run no BPF program while certain tasks are current: sandboxes hide their own processes so. What such a task does,
and its switch-out, have no event and no sequence number. Two things show it all the same:

- The kernel's own count of switches of each CPU. The program compares it with the count at the switch before, so that
  `not_run` of a sched_switch says exactly how many are missing between the two.
- The current task. Between two neighbouring events of a CPU it changes only by a switch; if their processes differ and the
  first is no switch to the second's, then a switch lies between the two times.

The second says where, the first how many. Each becomes a loss row (`probe.source`).

Guarantees: a row comes in the drain that has the first event after it, so that no watermark passes it unsaid; per CPU the
counts of the rows sum to the kernel's own count as soon as the CPU has switched once more.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from events.kinds import BY_NAME

__all__ = ["Unseen", "UnseenSwitches"]

_SWITCH: Final = BY_NAME["sched_switch"]
_NOT_RUN: Final = _SWITCH.fields["not_run"]
_LOW: Final = np.uint64(0xFFFFFFFF)


@dataclass(frozen=True, slots=True)
class Unseen:
    """`count` switches of a CPU within (from_mono_ns, to_mono_ns); `tid` had been let in before them (None: not known)."""

    cpu: int
    from_mono_ns: int
    to_mono_ns: int
    count: int
    tid: int | None


class UnseenSwitches:
    """Follows one CPU; `told` is the sum of all counts so far."""

    def __init__(self, cpu: int) -> None:
        self.cpu = cpu
        self.told = 0
        self._last: tuple[npt.NDArray[Any], int] | None = None  # the last event and its full number
        self._switch: tuple[int, int] | None = None  # the last switch: its time, and whom it let in
        self._told_since = 0  # switches told of since that one

    def find(self, events: npt.NDArray[Any], seq: npt.NDArray[np.uint64]) -> list[Unseen]:
        """What is missing up to the last of `events` (sorted by time), that no earlier call has told."""
        if not len(events):
            return []
        new = 0
        if self._last is not None:
            events = np.concatenate((self._last[0], events))
            seq = np.concatenate((np.array([self._last[1]], np.uint64), seq))
            new = 1
        is_switch = events["kind"] == _SWITCH.number
        switches = np.flatnonzero(is_switch[new:]) + new
        places = _broken(events, seq, is_switch)
        counts = (events["a2"][switches] >> np.uint64(_NOT_RUN.shift)).astype(np.int64)
        # Stretch j lies before switch j; the last one is still open.
        found = np.bincount(np.searchsorted(switches, places, side="right"), minlength=len(switches) + 1)
        found[0] += self._told_since
        out = [self._at(events, k, bool(is_switch[k])) for k in places.tolist()]
        out += [self._before(events, switches, j, n) for j, n in _more(counts, found)]
        if len(switches):
            last = events[switches[-1]]
            self._switch = int(last["time_mono_ns"]), int(last["a0"] & _LOW)
        self._told_since = int(found[-1])
        self._last = events[-1:].copy(), int(seq[-1])
        self.told += sum(u.count for u in out)
        return out

    def _at(self, events: npt.NDArray[Any], k: int, after_switch: bool) -> Unseen:
        """One switch between the events k and k + 1."""
        tid = int(events["a0"][k] & _LOW) if after_switch else int(events["tid"][k])
        return Unseen(self.cpu, int(events["time_mono_ns"][k]), int(events["time_mono_ns"][k + 1]), 1, tid)

    def _before(self, events: npt.NDArray[Any], switches: npt.NDArray[np.intp], j: int, count: int) -> Unseen:
        """`count` switches somewhere in stretch j."""
        until = int(events["time_mono_ns"][switches[j]])
        if j == 0:
            since, tid = self._switch or (int(events["time_mono_ns"][0]), None)
        else:
            before = events[switches[j - 1]]
            since, tid = int(before["time_mono_ns"]), int(before["a0"] & _LOW)
        return Unseen(self.cpu, since, until, count, tid)


def _broken(
    events: npt.NDArray[Any], seq: npt.NDArray[np.uint64], is_switch: npt.NDArray[np.bool_]
) -> npt.NDArray[np.intp]:
    """Places k so that a switch is missing between the events k and k + 1, and no event lost in the ring explains it."""
    tgid = events["tgid"]
    places = np.flatnonzero((tgid[1:] != tgid[:-1]) | is_switch[:-1])
    let_in = (events["a0"][places] >> np.uint64(32)).astype(np.uint32)
    owner = np.where(is_switch[places], let_in, tgid[places])
    places = places[owner != tgid[places + 1]]
    unexplained: npt.NDArray[np.intp] = places[seq[places + 1] - seq[places] == 1]
    return unexplained


def _more(counts: npt.NDArray[np.int64], found: npt.NDArray[np.intp]) -> list[tuple[int, int]]:
    """(stretch, how many more switches the kernel counted in it than were found)."""
    rest = counts - found[:-1]
    return [(j, int(rest[j])) for j in np.flatnonzero(rest > 0).tolist()]
