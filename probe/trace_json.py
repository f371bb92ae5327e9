"""Neutral events, one JSON object a line: `{"time_ns":, "cpu":, "kind":, "node": optional, FIELDS}`.

FIELDS are named as in the kernel's tracepoint formats. Besides those a line may tell what a kernel record carries by itself:
`common_pid` (current; without it the importer infers who ran from the switches), `common_tgid`, `common_comm`, `common_flags`
(the kernel's bits: 8 hardirq, 16 softirq). A line of kind "lost" says that `count` events are missing on this CPU before its
next one (0: it is not known how many).

A line that cannot be used is counted with its number and reason; the others live. Raises nothing of its own.
"""

from collections.abc import Iterable, Iterator
from typing import Any, Final

import orjson

from events.records import FLAG_HARDIRQ, FLAG_SOFTIRQ
from probe.neutral import Fields, Report, Row, as_number

__all__ = ["read_json"]

_TRACE_FLAG_HARDIRQ: Final = 0x08
_TRACE_FLAG_SOFTIRQ: Final = 0x10
_CPU_MAX: Final = 0xFFFE
_TIME_MAX: Final = (1 << 63) - 2


def _integer(document: dict[str, Any], name: str, maximum: int) -> int:
    value = document.get(name)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} is {value!r}, not an integer")
    if not 0 <= value <= maximum:
        raise ValueError(f"{name} is {value}, outside 0..{maximum}")
    return value


def _flags(fields: Fields) -> int:
    bits = as_number(fields.get("common_flags"))
    if bits is None:
        return 0
    return (FLAG_HARDIRQ if bits & _TRACE_FLAG_HARDIRQ else 0) | (FLAG_SOFTIRQ if bits & _TRACE_FLAG_SOFTIRQ else 0)


def _row(line: int, document: dict[str, Any], default_node: str) -> Row:
    kind = document.get("kind")
    if not isinstance(kind, str) or not kind:
        raise ValueError(f"kind is {kind!r}, not the name of a tracepoint")
    node = document.get("node", default_node)
    if not isinstance(node, str) or not node:
        raise ValueError(f"node is {node!r}, not a name")
    fields = Fields(document)
    return Row(
        line=line,
        node=node,
        cpu=_integer(document, "cpu", _CPU_MAX),
        time_ns=_integer(document, "time_ns", _TIME_MAX),
        kind=kind,
        fields=fields,
        tid=fields.number("common_pid", "common_tid", "waker_pid", "waker_tid", "current_tid"),
        tgid=fields.number("common_tgid") if "pid" in fields else fields.number("common_tgid", "tgid"),
        comm=fields.text("common_comm"),
        flags=_flags(fields),
        lost_before=fields.number("count", "lost") or 0 if kind == "lost" else None,
    )


def read_json(lines: Iterable[bytes], report: Report, default_node: str) -> Iterator[Row]:
    """The rows of a JSON-lines trace, in file order."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            document = orjson.loads(line)
            if not isinstance(document, dict):
                raise ValueError(f"a {type(document).__name__}, not an object")
            row = _row(number, document, default_node)
        except ValueError as error:  # orjson.JSONDecodeError is one
            reason = "not JSON" if isinstance(error, orjson.JSONDecodeError) else "unusable"
            report.skip(number, reason, str(error))
            continue
        yield row
