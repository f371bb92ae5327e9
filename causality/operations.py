"""Operations: what is judged. One line of the operations file, or one message of the operations topic.

    operation_id,type,tid,start_mono_ns,end_mono_ns,deadline_ns,outcome

`deadline_ns` is a duration; it and `outcome` (`ok`, `failed`) may be empty. Further columns are kept as attributes. A
row that cannot be understood raises InputError which names the row, the field, the value and what was expected; nothing
is guessed.
"""

import csv
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from events.errors import InputError

__all__ = ["COLUMNS", "Operation", "from_row", "read_csv"]

COLUMNS: Final = ("operation_id", "type", "tid", "start_mono_ns", "end_mono_ns", "deadline_ns", "outcome")
_OUTCOMES: Final = ("", "ok", "failed")
_MAX_NS: Final = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation of one thread, [start_mono_ns, end_mono_ns). `end_mono_ns` is None while it is open."""

    operation_id: str
    type: str
    tid: int
    start_mono_ns: int
    end_mono_ns: int | None
    deadline_ns: int | None = None
    outcome: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict)
    node: str = ""

    def row(self) -> dict[str, Any]:
        """The operation as the fields it was read from (`from_row` of it gives it back)."""
        fixed: dict[str, Any] = {name: getattr(self, name) for name in COLUMNS}
        return {**self.attributes, **fixed, **({"node": self.node} if self.node else {})}


def _integer(row: Mapping[str, Any], name: str, where: str, *, low: int, high: int) -> int | None:
    value = row.get(name)
    if value is None or value == "":
        return None
    try:
        number = int(value) if not isinstance(value, bool | float) else None
    except (TypeError, ValueError):
        number = None
    if number is None or not low <= number <= high:
        raise InputError(f"{where}: {name} is {value!r}; give a whole number of {low} to {high}")
    return number


def _required(row: Mapping[str, Any], name: str, where: str, *, low: int, high: int) -> int:
    number = _integer(row, name, where, low=low, high=high)
    if number is None:
        raise InputError(f"{where}: {name} is missing; it must be a whole number")
    return number


def from_row(row: Mapping[str, Any], where: str = "operation") -> Operation:
    """The operation that `row` (a CSV line or a JSON object) states. Raises InputError."""
    if not isinstance(row, Mapping):
        raise InputError(f"{where}: expected an object with the fields {', '.join(COLUMNS)}, got {type(row).__name__}")
    operation_id = str(row.get("operation_id") or "").strip()
    if not operation_id:
        raise InputError(f"{where}: operation_id is empty; every operation needs one that is unique")
    where = f"{where} {operation_id!r}"
    start = _required(row, "start_mono_ns", where, low=0, high=_MAX_NS)
    end = _integer(row, "end_mono_ns", where, low=0, high=_MAX_NS)
    if end is not None and end <= start:
        raise InputError(f"{where}: end_mono_ns {end} is not after start_mono_ns {start}")
    outcome = str(row.get("outcome") or "").strip().lower()
    if outcome not in _OUTCOMES:
        raise InputError(f"{where}: outcome is {outcome!r}; give 'ok', 'failed' or nothing")
    return Operation(
        operation_id=operation_id,
        type=str(row.get("type") or "operation"),
        tid=_required(row, "tid", where, low=1, high=2**32 - 1),
        start_mono_ns=start,
        end_mono_ns=end,
        deadline_ns=_integer(row, "deadline_ns", where, low=0, high=_MAX_NS),
        outcome=outcome,
        attributes={str(k): str(v) for k, v in row.items() if k not in COLUMNS and k != "node" and v is not None},
        node=str(row.get("node") or ""),
    )


def read_csv(text: str, where: str = "operations file") -> list[Operation]:
    """The operations of a CSV text with a header line. Raises InputError for the first line that is wrong."""
    reader = csv.DictReader(text.removeprefix("\ufeff").splitlines(keepends=True))
    missing = [c for c in COLUMNS[:5] if c not in (reader.fieldnames or [])]
    if missing:
        raise InputError(f"{where}: its header lacks {', '.join(missing)}; it must begin with {','.join(COLUMNS)}")
    operations: dict[str, Operation] = {}
    for row in reader:
        line = f"{where} line {reader.line_num}"
        if None in row:
            raise InputError(f"{line}: more values than the header has columns")
        operation = from_row(row, line)
        if operation.operation_id in operations:
            raise InputError(f"{line}: operation_id {operation.operation_id!r} occurs twice")
        operations[operation.operation_id] = operation
    return list(operations.values())
