"""Events of other tools' traces in neutral form, on their way into a capture.

A parser (`probe.trace_json`, `probe.trace_text`) yields one `Row` an event; `probe.importers` turns rows into frames. A row's
`fields` are named as the kernel names them (`prev_pid`, `target_cpu`); `Fields` reads them with the aliases that LTTng and
older kernels use. What a parser cannot use goes to `Report`, which counts everything and keeps the first few with their line.

Numbers that a trace gives as names (functions, hashed pointers that are no numbers) become the first 63 bits of the name's
SHA-256: equal names stay equal, and no kernel address collides with one.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

__all__ = ["STATE_DEAD", "Fields", "Report", "Row", "as_number", "name_number", "state_bits"]

_MESSAGES_MAX: Final = 8

# Bits of `task_struct.__state` as sched_switch hands them to a raw tracepoint.
STATE_DEAD: Final = 0x80
_LETTERS: Final[Mapping[str, int]] = {
    "R": 0,
    "S": 1,
    "D": 2,
    "T": 4,
    "t": 8,
    "X": STATE_DEAD,  # EXIT_DEAD: the last switch of a task that nobody waits for
    "Z": STATE_DEAD,
    "x": STATE_DEAD,  # TASK_DEAD, as kernels before 4.14 print it
    "P": 0x40,
    "I": 0x402,  # uninterruptible, but not counted as load: an idle kernel thread
    "K": 0x100,
    "W": 0x200,
    "N": 0x400,
    "i": 0x402,
}
# The number behind a single bit of the format's `prev_state`; 0x80 there is "I", not TASK_DEAD.
_REPORTED: Final[Mapping[int, int]] = {0x10: STATE_DEAD, 0x20: STATE_DEAD, 0x80: 0x402}
# "R+" as a number: the bit above the last state, which moved as states were added (512 in 3.x, 4096 in 4.14, 256 since).
_PREEMPTED: Final = frozenset({0x100, 0x200, 0x400, 0x800, 0x1000, 0x2000})


@dataclass(slots=True)
class Row:
    """One event as its trace tells it. None: the trace does not say."""

    line: int
    node: str
    cpu: int
    time_ns: int
    kind: str
    fields: "Fields"
    tid: int | None = None  # current
    tgid: int | None = None
    comm: str | None = None
    flags: int = 0
    lost_before: int | None = None  # events lost on this CPU just before this one; 0: how many is not known


@dataclass(slots=True)
class Report:
    """What an import took, and what it could not use."""

    events: int = 0
    unknown_kinds: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)  # reason -> lines
    notes: Counter[str] = field(default_factory=Counter)  # oddities of the trace that were kept as they are
    lost_events: int = 0
    losses: int = 0
    nodes: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    def skip(self, line: int, reason: str, detail: str) -> None:
        """Count a line that cannot be used; the first few are kept word for word."""
        self.skipped[reason] += 1
        if len(self.messages) < _MESSAGES_MAX:
            self.messages.append(f"line {line}: {reason}: {detail}")

    def to_json(self) -> dict[str, Any]:
        """The report as a document."""
        return {
            "schema": "kprobe.import/1",
            "events": self.events,
            "nodes": self.nodes,
            "unknown_kinds": dict(sorted(self.unknown_kinds.items())),
            "skipped": dict(sorted(self.skipped.items())),
            "notes": dict(sorted(self.notes.items())),
            "losses": self.losses,
            "lost_events": self.lost_events,
            "messages": self.messages,
        }


def name_number(name: str) -> int:
    """A number for something that a trace only names."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


_DECIMAL: Final = re.compile(r"-?\d+")
_HEX: Final = re.compile(r"0x[0-9a-fA-F]+|[0-9a-fA-F]{16}|[0-9a-fA-F]*[a-fA-F][0-9a-fA-F]*")
_DEVICE: Final = re.compile(r"(\d+)[,:](\d+)")


def as_number(value: Any) -> int | None:
    """The integer that `value` means: number, boolean, decimal, hex, device "8,0" or a name; None for nothing of the kind."""
    if isinstance(value, bool | int):
        return int(value)
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    if not isinstance(value, str) or not value.strip():
        return None
    text = value.strip()
    if len(text) < 16 and _DECIMAL.fullmatch(text):  # 16 digits without 0x are a hashed pointer, however decimal they look
        return int(text)
    if _HEX.fullmatch(text):
        return int(text, 16)
    if _DECIMAL.fullmatch(text):
        return int(text)
    device = _DEVICE.fullmatch(text)
    if device:
        return int(device[1]) << 20 | int(device[2])
    return {"true": 1, "false": 0, "True": 1, "False": 0}.get(text, name_number(text))


def state_bits(value: Any) -> tuple[int, bool]:
    """(state bits, preempted) of a `prev_state`, given as the format's number or as letters ("S", "R+", "D|W", "DK").

    Raises ValueError for anything else.
    """
    number = value if isinstance(value, int) else int(value) if isinstance(value, str) and value.isdecimal() else None
    if number is not None:
        if number in _PREEMPTED:
            return 0, True
        return _REPORTED.get(number, number & 0xFFFF), False
    if not isinstance(value, str) or not value:
        raise ValueError(f"prev_state is {value!r}, not a number or state letters")
    letters = value.removesuffix("+").replace("|", "")
    if not letters or any(letter not in _LETTERS for letter in letters):
        raise ValueError(f"prev_state {value!r} is not made of the kernel's state letters ({''.join(_LETTERS)})")
    bits = 0
    for letter in letters:
        bits |= _LETTERS[letter]
    if letters[0] == "R":
        bits = 0
    return bits, value.endswith("+")


class Fields:
    """The fields of one event by kernel name."""

    __slots__ = ("_values",)

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def to_dict(self) -> dict[str, Any]:
        """All fields."""
        return dict(self._values)

    def get(self, *names: str) -> Any:
        """The value of the first of `names` that the event has; None if it has none of them."""
        for name in names:
            if name in self._values:
                return self._values[name]
        return None

    def number(self, *names: str) -> int | None:
        """The same as an integer. Raises ValueError if the value is there but is no number."""
        value = self.get(*names)
        if value is None:
            return None
        number = as_number(value)
        if number is None:
            name = next(n for n in names if n in self._values)
            raise ValueError(f"{name} is {value!r}, not a number")
        return number

    def text(self, *names: str) -> str | None:
        """The same as text; None for what is not a string."""
        value = self.get(*names)
        return value if isinstance(value, str) else None

    def need(self, *names: str) -> int:
        """The same as an integer that must be there. Raises ValueError naming the field."""
        value = self.number(*names)
        if value is None:
            raise ValueError(f"field {names[0]} is missing")
        return value
