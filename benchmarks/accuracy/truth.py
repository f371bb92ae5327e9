"""What is known of an operation from its injection, and the table of scenarios.

A scenario is a generator function `(lab, rng)`: it builds the stage, yields the pids to watch (recording starts there), injects
its fault, and returns a list of `Judged`. Truth comes from the injection and procfs alone.
"""

import random
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

from benchmarks.accuracy.lab import Lab, Operation

__all__ = ["SCENARIOS", "Judged", "Play", "Scenario", "Truth", "scenario"]

Play = Generator[list[int], None, "list[Judged]"]


@dataclass(frozen=True, slots=True)
class Truth:
    """The right answer. `kinds` empty: nobody is to be blamed. `culprits`: accepted tids or tgids; empty: nobody (null)."""

    kinds: frozenset[str]
    culprits: frozenset[int] = frozenset()
    path: tuple[int, ...] = ()  # tids from the victim to the culprit; empty: the path is not scored
    throttled_ns: int | None = None  # by cpu.stat, where it is known


@dataclass(frozen=True, slots=True)
class Judged:
    """One operation with its truth; `valid` says whether the fault did reach the victim, by the victim's own clock."""

    operation: Operation
    truth: Truth
    valid: bool = True
    note: str = ""


@dataclass(frozen=True, slots=True)
class Scenario:
    """One fault of the suite."""

    name: str
    play: Callable[[Lab, random.Random], Play]
    healthy: bool
    summary: str = field(default="")


SCENARIOS: dict[str, Scenario] = {}


def scenario(
    *, healthy: bool = False
) -> Callable[[Callable[[Lab, random.Random], Play]], Callable[[Lab, random.Random], Play]]:
    """Registers a play under its function's name."""

    def register(play: Callable[[Lab, random.Random], Play]) -> Callable[[Lab, random.Random], Play]:
        summary = (play.__doc__ or "").strip().splitlines()[0]
        SCENARIOS[play.__name__] = Scenario(play.__name__, play, healthy, summary)
        return play

    return register


def blame(kinds: str | set[str], *culprits: int, path: tuple[int, ...] = (), throttled_ns: int | None = None) -> Truth:
    """A truth with blame; several kinds only where interface.md allows both words for one mechanism."""
    return Truth(frozenset({kinds} if isinstance(kinds, str) else kinds), frozenset(culprits), path, throttled_ns)


NOBODY = Truth(frozenset())
