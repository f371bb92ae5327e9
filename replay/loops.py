"""How far a counting loop has to go: recorder and player agree on it from registers seen at one instruction.

A loop that only counts changes some registers by the same step each pass. From three passes follows how many more it takes
until the registers are as wanted, so that a replay can run such a loop at full speed for most of the way to the point
where the recording was interrupted.
"""

from collections.abc import Sequence
from typing import Final

from replay.ptrace import MASK64

__all__ = ["NO_COUNTER", "passes_left"]

NO_COUNTER: Final = -(1 << 62)
_GENERAL_REGISTERS: Final = 15


def passes_left(passes: Sequence[Sequence[int]], wanted: Sequence[int]) -> int:
    """Passes until all counters are as wanted; negative: they have gone past; NO_COUNTER: there are none, or they disagree."""
    first, second, third = passes
    votes = set()
    for register in range(_GENERAL_REGISTERS):
        step = _signed(second[register] - first[register])
        if step and step == _signed(third[register] - second[register]):
            left, rest = divmod(_signed(wanted[register] - third[register]), step)
            votes.add(NO_COUNTER if rest else left)
    return votes.pop() if len(votes) == 1 else NO_COUNTER


def _signed(value: int) -> int:
    value &= MASK64
    return value - (1 << 64) if value >> 63 else value
